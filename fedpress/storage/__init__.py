"""Models on disk: a folder, a run, or one packed file, which is small and gives the same bits back."""

from fedpress.storage.load import load
from fedpress.storage.packed import Packed, check, pack, unpack

__all__ = ["Packed", "check", "load", "pack", "unpack"]
