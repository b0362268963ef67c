"""The container of a packed model: a safetensors file of named byte strings with a checksum.

A byte string is called a blob. The spec (how to build the model) and the table (which tensors are
in which blob) are JSON texts in the header.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, NoReturn

from safetensors import SafetensorError, deserialize

from fedpress.errors import ModelError

FORMAT = "fedpress packed model"
"""Text in the header by which a packed model is recognised."""
VERSION = 1
"""Version of the format; files of other versions are refused."""
CURE = "copy or pack it again"
"""The advice in errors about a damaged file."""


def damaged(place: str, problem: str) -> NoReturn:
    """Raises the error for a damaged packed file. `place` is the file's name."""
    raise ModelError(f"this packed model is damaged ({problem})", place=place, cure=CURE)


def to_bytes(blobs: Mapping[str, bytes], spec: str, table: str) -> bytes:
    """Returns the bytes of a safetensors file with a tensor of bytes (U8) for every blob.

    Equal arguments give equal bytes.

    Args:
        blobs: byte strings by name.
        spec: how to build the model, as JSON; stored in the header's metadata.
        table: which tensors are in which blob, as JSON; stored in the header's metadata.
    """
    metadata = {"format": FORMAT, "version": str(VERSION), "spec": spec, "table": table}
    metadata["checksum"] = _checksum(blobs, spec, table)
    header: dict[str, Any] = {"__metadata__": metadata}
    # Sorted, so that the bytes do not depend on the order of the dictionary.
    ordered = sorted(blobs.items())
    at = 0
    for name, blob in ordered:
        header[name] = {"dtype": "U8", "shape": [len(blob)], "data_offsets": [at, at + len(blob)]}
        at += len(blob)
    text = json.dumps(header, separators=(",", ":")).encode()
    # The data of a safetensors file begins at a multiple of 8 bytes.
    text += b" " * (-len(text) % 8)
    parts = [len(text).to_bytes(8, "little"), text]
    parts += [blob for _, blob in ordered]
    return b"".join(parts)


def from_bytes(data: bytes, place: str) -> tuple[dict[str, bytes], str, str]:
    """Returns blobs, spec and table of a container that `to_bytes` made.

    Args:
        data: bytes of the file.
        place: the file's name in errors.

    Raises:
        ModelError: if the file is no packed model, has another version, or is damaged.
    """
    try:
        # safetensors checks that the blobs are inside the file. It does not return the metadata, so
        # the header is read here as well.
        found = dict(deserialize(data))
        header_size = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + header_size]).get("__metadata__") or {}
    except (SafetensorError, ValueError, RecursionError) as error:
        damaged(place, str(error).partition("\n")[0])
    if metadata.get("format") != FORMAT:
        raise ModelError(
            (f"a safetensors file, but not a packed model (its metadata has no format '{FORMAT}')"),
            place=place,
            cure="give a file that fedpress packed, or the folder of a model",
        )
    if metadata.get("version") != str(VERSION):
        raise ModelError(
            (
                f"a packed model of version {str(metadata.get('version'))[:20]!r}, and this "
                f"fedpress reads version {VERSION}"
            ),
            place=place,
            cure=f"install the fedpress that wrote it, or {CURE}",
        )
    complete = {"spec", "table", "checksum"} <= metadata.keys()
    if not complete or any(t["dtype"] != "U8" for t in found.values()):
        damaged(place, "its header is incomplete or lists another type than bytes")
    blobs = {name: bytes(t["data"]) for name, t in found.items()}
    if _checksum(blobs, metadata["spec"], metadata["table"]) != metadata["checksum"]:
        damaged(place, "its checksum is wrong")
    return blobs, metadata["spec"], metadata["table"]


def _checksum(blobs: Mapping[str, bytes], spec: str, table: str) -> str:
    """Returns the 16-byte BLAKE2b hash, in hex, of spec, table, and names and bytes of all blobs.

    The hash detects accidental damage. It does not prove who wrote the file: anybody can compute
    it.
    """
    digest = hashlib.blake2b(digest_size=16)
    pieces: list[str | bytes] = [spec, table]
    for name, blob in sorted(blobs.items()):
        pieces += [name, blob]
    for piece in pieces:
        # "surrogatepass": names in a damaged file may be invalid Unicode and must not raise here.
        raw = piece.encode("utf-8", "surrogatepass") if isinstance(piece, str) else piece
        # The length comes first. Otherwise ("ab", "c") and ("a", "bc") would have equal checksums.
        digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.hexdigest()
