"""Ways to carry messages between server and clients."""

from fedpress.transport.local import Handler, LocalTransport

__all__ = ["Handler", "LocalTransport"]
