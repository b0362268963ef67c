"""Exports a model to a file for a device, compares it with the model, and measures its latency."""

from fedpress.deploy.artifact import ROUNDING, TOLERANCE, Artifact, Job
from fedpress.deploy.device_model import DeviceModel
from fedpress.deploy.formats import (
    FORMATS,
    Format,
    export,
    file_bytes,
    file_metadata,
    open_file,
    unknown_format,
)
from fedpress.deploy.measure import Candidate, export_all, measure
from fedpress.deploy.memory import peak_memory
from fedpress.deploy.ondevice import export_training
from fedpress.deploy.onnx import export_onnx
from fedpress.deploy.processor import Processor, this_processor
from fedpress.deploy.qdq import IntegerFormat, QuantizedProgram, quantized_program
from fedpress.deploy.raw_columns import INSIDE, RawColumns
from fedpress.deploy.runtime import (
    Latency,
    Parity,
    agreement,
    column_outputs,
    file_logits,
    file_outputs,
    latency,
    logits,
    main_outputs,
    metrics,
    model_outputs,
    parity,
    structured_outputs,
)
from fedpress.deploy.session import Session
from fedpress.deploy.timing import Runnable, time_in_turn

__all__ = [
    "FORMATS",
    "INSIDE",
    "ROUNDING",
    "TOLERANCE",
    "Artifact",
    "Candidate",
    "DeviceModel",
    "Format",
    "IntegerFormat",
    "Job",
    "Latency",
    "Parity",
    "Processor",
    "QuantizedProgram",
    "RawColumns",
    "Runnable",
    "Session",
    "agreement",
    "column_outputs",
    "export",
    "export_all",
    "export_onnx",
    "export_training",
    "file_bytes",
    "file_logits",
    "file_metadata",
    "file_outputs",
    "latency",
    "logits",
    "main_outputs",
    "measure",
    "metrics",
    "model_outputs",
    "open_file",
    "parity",
    "peak_memory",
    "quantized_program",
    "structured_outputs",
    "this_processor",
    "time_in_turn",
    "unknown_format",
]
