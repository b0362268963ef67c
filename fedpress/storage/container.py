"""The container of a packed model: a valid safetensors file of named byte strings, with a checksum over all of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, NoReturn

from safetensors import SafetensorError, deserialize

from fedpress.errors import ModelError

FORMAT = "fedpress packed model"
VERSION = 1
CURE = "copy or pack it again"


def damaged(place: str, problem: str) -> NoReturn:
    """Raises the ModelError of the packed file `place`."""
    raise ModelError(f"this packed model is damaged ({problem})", place=place, cure=CURE)


def to_bytes(blobs: Mapping[str, bytes], spec: str, table: str) -> bytes:
    """Returns the bytes of a safetensors file: a U8 tensor for every blob, the rest in the header's metadata.

    Equal arguments give equal bytes.
    """
    about = {"format": FORMAT, "version": str(VERSION), "spec": spec, "table": table}
    header: dict[str, Any] = {"__metadata__": about | {"checksum": _checksum(blobs, spec, table)}}
    at = 0
    for name, blob in sorted(blobs.items()):
        header[name] = {"dtype": "U8", "shape": [len(blob)], "data_offsets": [at, at + len(blob)]}
        at += len(blob)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join(
        [len(text).to_bytes(8, "little"), text, *(blob for _, blob in sorted(blobs.items()))]
    )


def from_bytes(data: bytes, place: str) -> tuple[dict[str, bytes], str, str]:
    """Returns the blobs, the spec and the table of what `to_bytes` made; `place` names the file in errors.

    Raises:
        ModelError: if it is no packed model, of another version, or damaged.
    """
    try:
        found = dict(deserialize(data))
        about = (
            json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__") or {}
        )
    except (SafetensorError, ValueError, RecursionError) as error:
        damaged(place, str(error).partition("\n")[0])
    if about.get("format") != FORMAT:
        raise ModelError(
            (f"a safetensors file, but not a packed model (its metadata has no format '{FORMAT}')"),
            place=place,
            cure="give one that fedpress packed, or the folder of a model",
        )
    if about.get("version") != str(VERSION):
        raise ModelError(
            (
                f"a packed model of version {str(about.get('version'))[:20]!r}, and this "
                f"fedpress reads version {VERSION}"
            ),
            place=place,
            cure=f"install the fedpress that wrote it, or {CURE}",
        )
    if not {"spec", "table", "checksum"} <= about.keys() or any(
        t["dtype"] != "U8" for t in found.values()
    ):
        damaged(place, "a part of its header is missing")
    blobs = {name: bytes(t["data"]) for name, t in found.items()}
    if _checksum(blobs, about["spec"], about["table"]) != about["checksum"]:
        damaged(place, "its checksum is wrong")
    return blobs, about["spec"], about["table"]


def _checksum(blobs: Mapping[str, bytes], spec: str, table: str) -> str:
    """BLAKE2b of 16 bytes over all parts in order, each behind its length: finds damage, is no signature."""
    digest = hashlib.blake2b(digest_size=16)
    for piece in (spec, table, *(x for pair in sorted(blobs.items()) for x in pair)):
        raw = piece.encode("utf-8", "surrogatepass") if isinstance(piece, str) else piece
        digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.hexdigest()
