"""Converts a message (a kind, a JSON header, named tensors) to bytes and back.

The file `FORMAT.md` in this folder describes the bytes. The sender is not trusted: every size is
checked before memory is allocated, and every invalid field raises a `WireError` with its name.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite, prod

import torch
from torch import Tensor

from fedpress.core.canonical import JSON
from fedpress.errors import WireError
from fedpress.wire.packing import expand, random_size, shrunk_parts, shrunk_size
from fedpress.wire.reader import ByteReader, fail, varint

MAGIC = b"FPRS"
"""First bytes of every message."""
VERSION = 2
"""Version of the format; messages of other versions are refused."""
FRAME = struct.Struct("<4sHII")
"""Magic, version, length of the payload, CRC-32 of the payload."""

MAX_BYTES = 1 << 30
"""Default limit of a message's size in bytes."""

MAX_HEADER_BYTES = 1 << 20
"""Limit of a header's size in bytes of JSON."""

MAX_NAME_BYTES = 1024
"""Limit of a kind or a tensor's name in bytes of UTF-8."""

MAX_TENSORS = 1024
"""Limit of the number of tensors in a message."""

MAX_DIMENSIONS = 8
"""Limit of the number of dimensions of a tensor."""

# The order is part of the format: a type is sent as its position in this table.
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
CODES = {dtype: code for code, dtype in enumerate(DTYPES.values())}
"""Type of a tensor -> its position in `DTYPES`."""


@dataclass(frozen=True, eq=False)
class Message:
    """One message between server and client.

    Attributes:
        kind: a kind of `federation.protocol`, such as "fit".
        header: JSON values by name.
        tensors: tensors by name.
        packed_floats: names of float tensors that the sender packs in the shortest form; other
            floats are sent raw. It is not sent: the bytes themselves tell the form.
        by_hand: whether the message was handed over in this process, so that no bytes of the
            answer will be made either. It is not sent.
        unmade: name of a tensor that would be masked or encrypted if it was sent, and is handed
            over without that -> bits of each value that would be sent, all equally likely; or the
            tensor that would be sent, if it has too few values for its size to be certain. `pack`
            refuses such a tensor, so nobody outside of this process can get it.
    """

    kind: str
    header: Mapping[str, JSON] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    packed_floats: frozenset[str] = frozenset()
    by_hand: bool = False
    unmade: Mapping[str, int | Tensor] = field(default_factory=dict)


def pack(message: Message) -> bytes:
    """Returns the bytes of `message`; equal messages give equal bytes.

    Raises:
        WireError: if the header has a value that JSON readers refuse, such as infinity; if the
            dtype of a tensor is not in `DTYPES`; if the kind or a tensor's name cannot be
            written in UTF-8, or is longer than `MAX_NAME_BYTES`; or if a tensor is `unmade`.

    >>> pack(Message("hello", {"round": 1}))[:4]
    b'FPRS'
    """
    for name in message.unmade:
        fail(f"tensors.{name}", "it is not masked", "mask what leaves this process")
    head, tensors = _outline(message)
    parts: list[bytes | memoryview] = [head]
    for name, before in tensors.items():
        packed = shrunk_parts(message.tensors[name], pack_floats=name in message.packed_floats)
        parts += [before, varint(sum(map(len, packed))), *packed]
    length = sum(map(len, parts))
    crc = 0
    for part in parts:
        crc = zlib.crc32(part, crc)
    # Joined once: each further copy of a large model would cost time and memory.
    return b"".join((FRAME.pack(MAGIC, VERSION, length, crc), *parts))


def packed_size(message: Message) -> int:
    """Returns the number of bytes of `pack`, exactly, without making them.

    Tensors that are entropy coded are coded for it. All others cost at most one pass.

    Raises:
        WireError: see `pack`.

    >>> message = Message("update", {"round": 3}, {"values": torch.zeros(1000)})
    >>> packed_size(message), len(pack(message))
    (4048, 4048)
    """
    head, tensors = _outline(message)
    total = FRAME.size + len(head)
    for name, before in tensors.items():
        tensor, sent = message.tensors[name], message.unmade.get(name)
        if sent is None:
            size = shrunk_size(tensor, pack_floats=name in message.packed_floats)
        elif isinstance(sent, int):
            size = random_size(tensor.numel(), sent, tensor.element_size())
        else:
            size = shrunk_size(sent, random=True)
        total += len(before) + len(varint(size)) + size
    return total


def deliver(message: Message, size: int, *, max_bytes: int = MAX_BYTES) -> Message:
    """Returns the message that `unpack` would return, without making its bytes.

    It is used between two sides in one process. Tensors share memory with those of `message`, so
    neither side may change them in place; tensors that are not contiguous are copied.

    Args:
        message: a message that `pack` accepts.
        size: the result of `packed_size`.
        max_bytes: see `unpack`.

    Raises:
        WireError: if `unpack` would refuse the message.

    >>> sent = Message("fit", {"round": 1}, {"params": torch.ones(2)})
    >>> deliver(sent, packed_size(sent)).tensors["params"]
    tensor([1., 1.])
    """
    _check_length(size, max_bytes)
    head, before = _outline(message)
    # The reader checks this payload as it checks any other: it only lacks the tensors' values.
    reader = ByteReader(memoryview(head + b"".join(each + varint(0) for each in before.values())))
    kind, header = _kind_and_header(reader)
    tensors = {}
    for name in _packed_tensors(reader, max_bytes):
        tensor = message.tensors[name]
        # What is not made has no memory of its own, and shall not get any here.
        arrives = name not in message.unmade
        tensors[name] = tensor.detach().cpu().contiguous() if arrives else tensor
    return Message(kind, header, tensors, by_hand=True, unmade=message.unmade)


def _outline(message: Message) -> tuple[bytes, dict[str, bytes]]:
    """Returns all bytes of the payload but the tensors' values and their lengths.

    Returns:
        Kind, header and number of tensors; and by name what comes before a tensor's values. The
        names are sorted, as they are in a message.

    Raises:
        WireError: see `pack`.
    """
    # The sender checks the header too: else the error would only come at the receiver.
    _check_json(dict(message.header), "message.header")
    for name, tensor in message.tensors.items():
        if tensor.dtype not in CODES:
            fail(
                f"tensors.{name}",
                f"dtype {tensor.dtype} cannot be sent",
                f"use one of {', '.join(DTYPES)}",
            )
    # Keys and names are sorted, so that equal messages give equal bytes and equal digests.
    text = json.dumps(dict(message.header), sort_keys=True, separators=(",", ":")).encode()
    head = _part(_utf8(message.kind, "kind")) + _part(text) + varint(len(message.tensors))
    tensors = {}
    for name, tensor in sorted(message.tensors.items()):
        shape = b"".join(map(varint, tensor.shape))
        code = bytes([CODES[tensor.dtype], tensor.ndim])
        tensors[name] = _part(_utf8(name, "tensors")) + code + shape
    return head, tensors


def unpack(data: bytes, *, max_bytes: int = MAX_BYTES) -> Message:
    """Returns the message in `data`, which need not be trusted.

    Args:
        data: exactly one message.
        max_bytes: limit of the size of `data`, and of the total size of its unpacked tensors.

    Raises:
        WireError: if a field is invalid; the error names the field.

    >>> unpack(pack(Message("hello", {"round": 1}))).header
    {'round': 1}
    """
    reader = ByteReader(_payload(data, max_bytes))
    kind, header = _kind_and_header(reader)
    tensors = {}
    for name, packed in _packed_tensors(reader, max_bytes).items():
        tensors[name] = expand(packed.data, packed.dtype, packed.shape, f"tensors.{name}")
    return Message(kind, header, tensors)


def _kind_and_header(reader: ByteReader) -> tuple[str, dict[str, JSON]]:
    """Reads the kind and the header of a message, and checks both."""
    kind = _text(reader, "kind", MAX_NAME_BYTES)
    try:
        header = json.loads(_text(reader, "header", MAX_HEADER_BYTES))
    except (ValueError, RecursionError) as error:
        # Deeply nested JSON ends in a RecursionError.
        raise WireError(
            f"not JSON ({type(error).__name__})", place="message.header", cure="send it again"
        ) from error
    if not isinstance(header, dict):
        fail("header", f"got {type(header).__name__}", "expected an object")
    _check_json(header, "message.header")
    return kind, header


def kind_of(data: bytes) -> str:
    """Returns the kind of a packed message without unpacking the rest.

    The frame and its checksum are not checked, so use it only for messages of this process.

    Raises:
        WireError: if the bytes end before the kind does.

    >>> kind_of(pack(Message("hello", {"round": 1})))
    'hello'
    """
    return _text(ByteReader(memoryview(data)[FRAME.size :]), "kind", MAX_NAME_BYTES)


@dataclass(frozen=True, eq=False)
class _PackedTensor:
    """A tensor of a message whose `data` are not unpacked yet."""

    dtype: torch.dtype
    shape: list[int]
    data: memoryview


def _check_length(length: int, max_bytes: int) -> None:
    if length > max_bytes:
        fail(
            "length",
            f"{length} bytes are more than the {max_bytes} that are accepted",
            "raise max_bytes",
        )


def _payload(data: bytes, max_bytes: int) -> memoryview:
    """Returns the payload after checking the frame."""
    # Checked first: the checksum of an oversized message would take long.
    _check_length(len(data), max_bytes)
    if len(data) < FRAME.size:
        fail(
            "length",
            f"{len(data)} bytes are fewer than the frame's {FRAME.size}",
            "the message was cut off, send it again",
        )
    magic, version, length, crc = FRAME.unpack_from(data)
    if magic != MAGIC:
        fail("magic", f"got {magic!r}, expected {MAGIC!r}", "give what fedpress packed")
    # Other versions may have another layout, so nothing more is read from them.
    if version != VERSION:
        fail("version", f"got {version}, expected {VERSION}", "use the same fedpress on both sides")
    if length != len(data) - FRAME.size:
        fail(
            "length",
            f"{length} payload bytes were announced but {len(data) - FRAME.size} came",
        )
    payload = memoryview(data)[FRAME.size :]
    # A CRC finds accidental damage only: an attacker can compute a new one.
    if crc != zlib.crc32(payload):
        fail("crc32", "the checksum differs", "the message was damaged in transit, send it again")
    return payload


def _packed_tensors(reader: ByteReader, max_bytes: int) -> dict[str, _PackedTensor]:
    """Reads type, shape and packed bytes of each tensor.

    Tensors are unpacked only after the total of their sizes was checked against `max_bytes`,
    because a few bytes can unpack to any number of zeros.
    """
    packed: dict[str, _PackedTensor] = {}
    total = 0
    for _ in range(reader.varint("tensors", MAX_TENSORS)):
        name = _text(reader, "tensors", MAX_NAME_BYTES)
        place = f"tensors.{name}"
        if name in packed:
            fail(place, "the name comes twice", "send each tensor once")
        code = reader.byte(place)
        if code >= len(DTYPES):
            fail(
                place,
                f"dtype {code} is unknown",
                f"use one of {', '.join(DTYPES)} (numbered from 0)",
            )
        dtype = list(DTYPES.values())[code]
        dimensions = reader.byte(place)
        if dimensions > MAX_DIMENSIONS:
            fail(place, f"{dimensions} dimensions", f"at most {MAX_DIMENSIONS}")
        shape = [reader.varint(place, MAX_BYTES) for _ in range(dimensions)]
        # Sizes of 0 count as 1: torch multiplies the other sizes even if the tensor is empty, and
        # that product must not overflow.
        if prod(max(size, 1) for size in shape) > MAX_BYTES:
            fail(place, f"shape {shape} is out of range", f"at most {MAX_BYTES} values")
        total += prod(shape) * dtype.itemsize
        if total > max_bytes:
            fail(
                place,
                f"the tensors unpack to {total} bytes, more than the {max_bytes} accepted",
                "raise max_bytes",
            )
        data = reader.take(reader.varint(place, reader.left), place)
        packed[name] = _PackedTensor(dtype, shape, data)
    if reader.left:
        fail("tensors", f"{reader.left} bytes are left over")
    return packed


def _part(content: bytes) -> bytes:
    """Returns the length of `content` as a varint, and `content`."""
    return varint(len(content)) + content


def _utf8(text: str, place: str) -> bytes:
    try:
        content = text.encode()
    # A Python string may contain lone surrogates, which UTF-8 cannot represent.
    except UnicodeEncodeError as error:
        raise WireError(
            f"{text!r} cannot be written in UTF-8",
            place=f"message.{place}",
            cure="use other characters",
        ) from error
    if len(content) > MAX_NAME_BYTES:
        fail(place, f"a name of {len(content)} bytes", f"at most {MAX_NAME_BYTES}")
    return content


def _text(reader: ByteReader, place: str, most: int) -> str:
    try:
        return str(reader.take(reader.varint(place, most), place), "utf-8")
    except UnicodeDecodeError as error:
        raise WireError("not UTF-8", place=f"message.{place}", cure="send it again") from error


def _check_json(value: JSON, place: str) -> None:
    """Raises WireError for values that are not JSON, or that some JSON readers refuse.

    Some readers refuse NaN, infinity and integers that do not fit 64 bits.
    """
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise WireError(
                    f"the key {key!r} is no string", place=place, cure="use strings as keys"
                )
            _check_json(item, f"{place}.{key}")
    elif isinstance(value, list):
        for at, item in enumerate(value):
            # Texts are always valid. Skipping them saves time if a header lists all clients.
            if not isinstance(item, str):
                _check_json(item, f"{place}[{at}]")
    elif isinstance(value, float) and not isfinite(value):
        raise WireError(f"got {value}, expected a finite number", place=place, cure="leave it out")
    # Many JSON readers store whole numbers in 64 bits.
    elif isinstance(value, int) and abs(value) >= 1 << 63:
        raise WireError(
            "got an integer outside of -(2^63 - 1) to 2^63 - 1",
            place=place,
            cure="send it as a string",
        )
    elif not isinstance(value, str | int | float | None):
        raise WireError(
            f"got {type(value).__name__}, which is not JSON",
            place=place,
            cure="use numbers, strings, lists, objects",
        )
