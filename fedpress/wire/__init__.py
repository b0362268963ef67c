"""Messages and their bytes."""

from fedpress.wire.message import JSON, Message, pack, unpack

__all__ = ["JSON", "Message", "pack", "unpack"]
