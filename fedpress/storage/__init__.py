"""Loads saved models, packs a model losslessly into one small file, and measures file sizes."""

# Other folders import these names from here and not from the files.
from fedpress.storage.load import load
from fedpress.storage.packed import Packed, check_packable, pack, unpack
from fedpress.storage.sizes import file_bytes, nonzero_parameters, packed_file_bytes

__all__ = [
    "Packed",
    "check_packable",
    "file_bytes",
    "load",
    "nonzero_parameters",
    "pack",
    "packed_file_bytes",
    "unpack",
]
