"""From a trained model to a file that a device runs: export, parity with the model, latency."""

from fedpress.deploy.artifact import Artifact, Job
from fedpress.deploy.formats import FORMATS, Format, export, file_bytes, open_file, unknown_format
from fedpress.deploy.measure import export_all, measure, peak_memory, time_in_turn
from fedpress.deploy.ondevice import DeviceModel, export_training
from fedpress.deploy.onnx import export_onnx
from fedpress.deploy.qdq import QuantizedProgram, quantized_program
from fedpress.deploy.runtime import ROUNDING, Latency, Parity, accuracy, agreement, file_logits, latency, logits, parity

__all__ = [
    "FORMATS",
    "ROUNDING",
    "Artifact",
    "DeviceModel",
    "Format",
    "Job",
    "Latency",
    "Parity",
    "QuantizedProgram",
    "accuracy",
    "agreement",
    "export",
    "export_all",
    "export_onnx",
    "export_training",
    "file_bytes",
    "file_logits",
    "latency",
    "logits",
    "measure",
    "open_file",
    "parity",
    "peak_memory",
    "quantized_program",
    "time_in_turn",
    "unknown_format",
]
