"""Models on disk: a folder, a run, or one packed file, which is small and gives the same bits back."""

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
