"""Converts messages between server and clients to bytes, and packs their tensors losslessly."""

from fedpress.core.canonical import JSON
from fedpress.wire.message import Message, pack, packed_size, unpack

__all__ = ["JSON", "Message", "pack", "packed_size", "unpack"]
