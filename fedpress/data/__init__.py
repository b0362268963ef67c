"""Loads data and divides it among clients; the result is a `FederatedData`, the data of a run."""

from typing import TYPE_CHECKING, Any

from fedpress.data.dataset import FederatedData
from fedpress.data.load import load
from fedpress.data.preparation import Preparation
from fedpress.data.settings import DataSettings

if TYPE_CHECKING:
    from fedpress.data.new_rows import prepare

__all__ = ["DataSettings", "FederatedData", "Preparation", "load", "prepare"]


def __getattr__(name: str) -> Any:
    # Only rows of tables need `prepare`, and it needs pyarrow: 0.08 s of the start of every run.
    if name != "prepare":
        raise AttributeError(f"module 'fedpress.data' has no attribute '{name}'")
    from fedpress.data.new_rows import prepare

    return prepare
