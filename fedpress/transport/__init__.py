"""Transports: carry the server's messages to the clients, and their answers back."""

from fedpress.transport.local import Handler, LocalTransport

__all__ = ["Handler", "LocalTransport"]
