"""Transports: carry the server's messages to the clients, and their answers back."""

from fedpress.transport.local import Answering, Handler, LocalTransport

__all__ = ["Answering", "Handler", "LocalTransport"]
