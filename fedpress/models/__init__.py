"""Architectures, and models saved as a spec (JSON) and tensors (safetensors)."""

# Other folders import these names from here and not from the files.
from fedpress.models.norms import freeze_batch_norm_
from fedpress.models.pruned import resize_, shapes_that_differ, what_pruning_changed
from fedpress.models.saved import load_model, save_model
from fedpress.models.spec import ARCHITECTURES, DATA_SIZES, NETWORKS, ModelSpec

__all__ = [
    "ARCHITECTURES",
    "DATA_SIZES",
    "NETWORKS",
    "ModelSpec",
    "freeze_batch_norm_",
    "load_model",
    "resize_",
    "save_model",
    "shapes_that_differ",
    "what_pruning_changed",
]
