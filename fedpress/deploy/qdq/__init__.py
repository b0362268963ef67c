"""A model becomes a graph that says where an integer runtime rounds: quantize and dequantize around every operation.

The graph is an ordinary `torch.export` program with the operations `quantized_decomposed.(de)quantize_per_tensor` on
activations and `dequantize_per_channel` (of groups: `dequantize_per_channel_group`) on the int8 codes of weights. It
runs in torch, where it is the oracle of every artifact that is lowered from it.
"""

from fedpress.deploy.qdq.graph import IntegerFormat
from fedpress.deploy.qdq.program import QuantizedProgram, quantized_program

__all__ = ["IntegerFormat", "QuantizedProgram", "quantized_program"]
