"""A message is a kind, a small JSON header and named tensors; its bytes are laid out in `FORMAT.md`.

The reader trusts nothing: every size is checked before memory is taken, every fault is a `WireError` naming the field.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import NoReturn, TypeAlias

import torch
from safetensors import SafetensorError, deserialize
from safetensors.torch import save
from torch import Tensor

from fedpress.errors import WireError

JSON: TypeAlias = "bool | int | float | str | list[JSON] | dict[str, JSON] | None"

MAGIC = b"FPRS"
VERSION = 1
FRAME = struct.Struct("<4sHQI")  # magic, version, payload length, crc32
MAX_BYTES = 1 << 30
MAX_HEADER_BYTES = 1 << 20
MAX_TENSORS = 1024
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
}


@dataclass(frozen=True, eq=False)
class Message:
    """What one side says to the other: a `kind`, a `header` of JSON values and `tensors` by name."""

    kind: str
    header: Mapping[str, JSON] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


def pack(message: Message) -> bytes:
    """Returns the bytes of `message`; equal messages give equal bytes.

    Raises:
        WireError: if the header holds a number that is not finite, or a tensor has a dtype that does not travel.

    >>> pack(Message("hello", {"round": 1}))[:4]
    b'FPRS'
    """
    _check_json(dict(message.header), "message.header")
    for name, tensor in message.tensors.items():
        if tensor.dtype not in DTYPES.values():
            _fail(f"tensors.{name}", f"dtype {tensor.dtype} does not travel; use one of {', '.join(DTYPES)}")
    text = json.dumps({"kind": message.kind, "header": dict(message.header)}, sort_keys=True, separators=(",", ":"))
    # clone: safetensors refuses tensors that share memory
    tensors = {
        name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in message.tensors.items()
    }
    payload = save(tensors, {"fedpress": text})
    return FRAME.pack(MAGIC, VERSION, len(payload), _crc(payload)) + payload


def unpack(data: bytes, *, max_bytes: int = MAX_BYTES) -> Message:
    """Reads the message in `data`, which may come from anybody.

    Args:
        data: the whole message, nothing more.
        max_bytes: longest message that is accepted, in bytes.

    Raises:
        WireError: for every fault, with the name of the field.

    >>> unpack(pack(Message("hello", {"round": 1}))).header
    {'round': 1}
    """
    payload = _payload(data, max_bytes)
    text, tensors = _safetensors(payload)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise WireError(f"message.header: not JSON ({type(error).__name__}); send it again") from error
    if not isinstance(content, dict) or content.keys() != {"kind", "header"}:
        _fail("header", "expected exactly the keys 'kind' and 'header'")
    kind, header = content["kind"], content["header"]
    if not isinstance(kind, str):
        _fail("kind", f"got {type(kind).__name__}; expected a string")
    if not isinstance(header, dict):
        _fail("header", f"got {type(header).__name__}; expected an object")
    _check_json(header, "message.header")
    return Message(kind, header, tensors)


def _payload(data: bytes, max_bytes: int) -> bytes:
    if len(data) > max_bytes:
        _fail("length", f"{len(data)} bytes are more than the {max_bytes} that are accepted; raise max_bytes")
    if len(data) < FRAME.size:
        _fail("length", f"{len(data)} bytes are fewer than the frame's {FRAME.size}; the message was cut off")
    magic, version, length, crc = FRAME.unpack_from(data)
    if magic != MAGIC:
        _fail("magic", f"got {magic!r}, expected {MAGIC!r}; this is no fedpress message")
    if version != VERSION:
        _fail("version", f"got {version}, expected {VERSION}; use the same fedpress on both sides")
    if length != len(data) - FRAME.size:
        _fail("length", f"{length} payload bytes were announced but {len(data) - FRAME.size} came; send it again")
    payload = bytes(data[FRAME.size :])
    if crc != _crc(payload):
        _fail("crc32", "the checksum differs; the message was damaged on its way, send it again")
    return payload


def _safetensors(payload: bytes) -> tuple[str, dict[str, Tensor]]:
    """Reads the header text and the tensors; the sizes in the header are checked against the payload first."""
    announced = int.from_bytes(payload[:8], "little")
    if len(payload) < 8 or announced > min(MAX_HEADER_BYTES, len(payload) - 8):
        _fail("payload.header_length", f"got {announced}; at most {MAX_HEADER_BYTES} and inside the message")
    try:
        index = json.loads(payload[8 : 8 + announced])
        if not isinstance(index, dict) or len(index) > MAX_TENSORS + 1:
            _fail("payload.header", f"expected an object of at most {MAX_TENSORS} tensors")
        views = deserialize(payload)
    except (SafetensorError, ValueError, RecursionError) as error:
        raise WireError(f"message.payload: not a safetensors block ({type(error).__name__}); send it again") from error
    metadata = index.get("__metadata__")
    text = metadata.get("fedpress") if isinstance(metadata, dict) else None
    if not isinstance(text, str):
        _fail("header", "the payload carries no fedpress header; this is some other safetensors block")
    return text, {name: _tensor(name, view["dtype"], view["shape"], view["data"]) for name, view in views}


def _tensor(name: str, dtype: str, shape: list[int], data: bytearray) -> Tensor:
    if dtype not in DTYPES:
        _fail(f"tensors.{name}", f"dtype {dtype} does not travel; use one of {', '.join(DTYPES)}")
    if len(shape) > 8 or any(size > MAX_BYTES for size in shape):
        _fail(f"tensors.{name}", f"shape {shape} is out of range; at most 8 dimensions of {MAX_BYTES}")
    if not len(data):  # frombuffer refuses an empty buffer
        return torch.empty(shape, dtype=DTYPES[dtype])
    return torch.frombuffer(data, dtype=DTYPES[dtype]).reshape(shape)


def _check_json(value: JSON, place: str) -> None:
    """Refuses what JSON cannot carry between languages: non-finite floats, integers beyond 64 bits, other types."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise WireError(f"{place}: the key {key!r} is no string; use strings as keys")
            _check_json(item, f"{place}.{key}")
    elif isinstance(value, list):
        for at, item in enumerate(value):
            _check_json(item, f"{place}[{at}]")
    elif isinstance(value, float) and not isfinite(value):
        raise WireError(f"{place}: got {value}, expected a finite number; leave it out")
    elif isinstance(value, int) and abs(value) >= 1 << 63:
        raise WireError(f"{place}: got an integer of more than 64 bits; send it as a string")
    elif not isinstance(value, str | int | float | None):
        raise WireError(f"{place}: got {type(value).__name__}, which is not JSON; use numbers, strings, lists, objects")


def _crc(payload: bytes) -> int:
    return zlib.crc32(payload)


def _fail(place: str, problem: str) -> NoReturn:
    raise WireError(f"message.{place}: {problem}")
