"""From a trained model to a file that a device runs: export, parity with the model, latency."""

from fedpress.deploy.onnx import Artifact, export_onnx
from fedpress.deploy.runtime import Latency, Parity, accuracy, latency, parity

__all__ = ["Artifact", "Latency", "Parity", "accuracy", "export_onnx", "latency", "parity"]
