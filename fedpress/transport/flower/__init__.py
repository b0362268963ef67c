"""Everything that touches Flower: the process of its SuperLink, and both ends of the wire.

Flower carries bytes here and nothing else. The server starts the SuperLink with its task executor
switched off (`--isolation process`), takes the run's only task itself, and sends messages under the
token of that task; a client speaks Flower's Fleet API from one long-lived process. So no bundle of
code is ever loaded on any side: there is neither a ServerApp nor a ClientApp, and a round starts no
process.

Private modules of Flower are used, so its version is pinned exactly. In another version
`tests/deploy/test_flower.py` names what has moved.
"""

from __future__ import annotations

from fedpress.transport.flower.pinned import check_installed

# Before any import of flwr, so that a missing or other Flower is told with its cure.
check_installed()

from fedpress.transport.flower.address import Address  # noqa: E402
from fedpress.transport.flower.messages import Incoming  # noqa: E402
from fedpress.transport.flower.node import NodeLink  # noqa: E402
from fedpress.transport.flower.server import ServerLink  # noqa: E402
from fedpress.transport.flower.superlink import SuperLink  # noqa: E402

__all__ = ["Address", "Incoming", "NodeLink", "ServerLink", "SuperLink"]
