"""Messages, their serialization to bytes, and lossless packing of tensors."""

from fedpress.core.canonical import JSON
from fedpress.wire.message import Message, pack, unpack

__all__ = ["JSON", "Message", "pack", "unpack"]
