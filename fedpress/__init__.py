"""fedpress makes a neural network small, trains it where the private data lives, and ships it to a device."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_LAZY = {"commands": "fedpress.pipeline.commands"}
"""Names of the front door that are modules elsewhere, imported when they are first asked for."""


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return import_module(_LAZY[name])
    raise AttributeError(f"module 'fedpress' has no attribute '{name}'")
