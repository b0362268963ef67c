"""Quantizes a captured graph: adds quantize and dequantize operations where a runtime rounds.

QDQ stands for quantize-dequantize. The graph is an ordinary `torch.export` program with the
operations `quantized_decomposed.(de)quantize_per_tensor` on activations, and
`dequantize_per_channel` (for groups `dequantize_per_channel_group`) on the int8 codes of weights.
The graph runs in torch. Every exported file is made from the graph, and the outputs of file and
graph are compared.

torchao's PT2E makes such graphs too. Its int8 is as accurate: 93.16% on CIFAR-10, ours 93.14%
(torchao 0.18, x86 quantizer; benchmarks/bits.py). PT2E is not used here for two reasons. It
has only 8-bit weights, and no weights of 4 or 2 bits or in groups. And each of its quantizers is
for one backend, while this graph is exported to four runtimes (onnxruntime, OpenVINO, ExecuTorch
and LiteRT).
"""

from fedpress.deploy.qdq.graph import IntegerFormat
from fedpress.deploy.qdq.program import QuantizedProgram, quantized_program

__all__ = ["IntegerFormat", "QuantizedProgram", "quantized_program"]
