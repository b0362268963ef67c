"""Messages and their bytes."""

from fedpress.core.canonical import JSON
from fedpress.wire.message import Message, pack, unpack

__all__ = ["JSON", "Message", "pack", "unpack"]
