"""All code that uses Flower: its server process (the SuperLink), and the connections to it.

Flower only carries bytes here. Usually it loads a bundle of code, a ServerApp and a ClientApp, and
starts processes for them. Here it does not: the server starts the SuperLink with the option
`--isolation process`, by which the SuperLink runs no tasks itself. The server takes the only task
of the run, and sends messages with the token of that task. A client is one process, which uses
Flower's Fleet API. So no bundle of code is ever loaded, and a round starts no process.

Private modules of Flower are used, so its version is pinned exactly. With another version
`tests/deploy/test_flower.py` fails and shows which names have moved.
"""

from __future__ import annotations

from fedpress.transport.flower.pinned import check_installed

# Before any import of flwr: the error for a missing Flower, or another version, says what to do.
check_installed()

from fedpress.transport.flower.address import Address  # noqa: E402
from fedpress.transport.flower.messages import Incoming  # noqa: E402
from fedpress.transport.flower.node import NodeLink  # noqa: E402
from fedpress.transport.flower.server import ServerLink  # noqa: E402
from fedpress.transport.flower.superlink import SuperLink  # noqa: E402

__all__ = ["Address", "Incoming", "NodeLink", "ServerLink", "SuperLink"]
