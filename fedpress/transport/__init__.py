"""Transports: carry messages from the server to the clients, and answers back."""

from fedpress.transport.local import Handler, LocalTransport

__all__ = ["Handler", "LocalTransport"]
