"""A model becomes a graph that says where an integer runtime rounds: quantize and dequantize around every operation.

The graph is an ordinary `torch.export` program with the operations `quantized_decomposed.(de)quantize_per_tensor` on
activations and `dequantize_per_channel` (of groups: `dequantize_per_channel_group`) on the int8 codes of weights. It
runs in torch, where it is the oracle of every artifact that is lowered from it.

torchao's PT2E makes such graphs too, and its int8 is as accurate: 93.16% of CIFAR-10 beside our 93.14% (torchao 0.18,
x86 quantizer; benchmarks/bits.py). But that quantizer knows weights of 8 bits alone (-128 to 127), none of 4 or 2 bits
or in groups, and every quantizer is for one backend, where this one graph is lowered to all four runtimes.
"""

from fedpress.deploy.qdq.graph import IntegerFormat
from fedpress.deploy.qdq.program import QuantizedProgram, quantized_program

__all__ = ["IntegerFormat", "QuantizedProgram", "quantized_program"]
