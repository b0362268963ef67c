"""The server's connection to the SuperLink (Flower's server process), by which parcels are sent."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx
from flwr.app import Message
from flwr.cli.build import build_fab_from_files
from flwr.common.constant import (
    SUPERLINK_NODE_ID,
)
from flwr.proto.control_pb2 import RegisterNodeRequest, StartRunRequest
from flwr.proto.fab_pb2 import Fab
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    GetNodesRequest,
    PullAppMessagesRequest,
    PullAppMessagesResponse,
    PullTaskInputRequest,
    PushAppMessagesRequest,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.constant import TaskType
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.inflatable.inflatable_object import (
    no_object_id_recompute,
)
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity

from fedpress.core.log import logger
from fedpress.core.names import ClientId
from fedpress.errors import NetworkError
from fedpress.transport.flower.address import Address, explained
from fedpress.transport.flower.keys import node_key, registered_before
from fedpress.transport.flower.messages import (
    Arriving,
    Outgoing,
    take,
    to_record,
    to_records,
    upload,
)
from fedpress.transport.flower.superlink import START, SuperLink
from fedpress.transport.link import Lost, Parcel
from fedpress.transport.remote import Presence
from fedpress.wire.message import MAX_BYTES

log = logger(__name__)
T = TypeVar("T")

RETRY = 0.02
"""Seconds between two polls while clients without keys are asked for their names."""
PATIENCE = 300.0
"""Seconds for which the server tries again to connect to a SuperLink that is gone."""
ACQUIRE = "/flwr.proto.Runtime/AcquireTask"
"""Name of the request that takes a task; it needs the secret."""
SECRET_HEADER = "fedpress-secret"
"""HTTP header with the secret, by which the guard before the SuperLink knows the server."""
BUNDLE = {
    # Flower wants a bundle for every run. This one is empty, and nobody loads it.
    "pyproject.toml": b"""[project]
name = "fedpress"
version = "0.0.0"
description = "messages of fedpress; no code"
license = { file = "LICENSE" }
dependencies = ["flwr>=1.42.0"]
[tool.flwr.app]
publisher = "fedpress"
fab-format-version = 1
flwr-version-target = "1.42.0"
[tool.flwr.app.components]
serverapp = "nothing:app"
clientapp = "nothing:app"
""",
    "nothing.py": b"app = None\n",
    "LICENSE": b"Apache-2.0\n",
}
"""Files of the bundle: file name -> content."""


@dataclass(eq=False)
class ServerLink:
    """The server's connection to all clients; see `fedpress.transport.link.Link`.

    Attributes:
        address: address of the SuperLink.
        secret: bytes that only the server and the SuperLink know; requests of the server have them.
        keys: client name -> public key as OpenSSH text, in the order of the clients. None: without
            TLS clients have no keys, and are asked for their names.
        superlink: the SuperLink's process; None if this server has not started it.
        max_bytes: longest accepted answer, in bytes.
    """

    address: Address
    secret: bytes
    keys: Mapping[ClientId, str] | None = None
    superlink: SuperLink | None = None
    max_bytes: int = MAX_BYTES
    _nodes: dict[ClientId, int] = field(default_factory=dict)
    _names: dict[int, ClientId] = field(default_factory=dict)
    _tickets: set[str] = field(default_factory=set)
    _arriving: dict[str, Arriving] = field(default_factory=dict)
    _heartbeat: HeartbeatSender | None = None
    _runtime: RuntimeHttpClient | None = None

    def open(self) -> ServerLink:
        """Registers the clients' keys, starts a run and takes its task.

        Raises:
            NetworkError: if the SuperLink cannot be reached, or refuses.
        """
        guard = _Secret(self.secret)
        version = RuntimeVersionHttpInterceptor(component_name="flwr CLI")
        control = self.address.client(ControlHttpClient, [version, guard])
        with explained(self.address), closing(control):
            for name, key in (self.keys or {}).items():
                _register(control, name, node_key(key))
            bundle, _ = build_fab_from_files(dict(BUNDLE))
            digest = hashlib.sha256(bundle).hexdigest()
            started = control.StartRun(StartRunRequest(fab=Fab(hash_str=digest, content=bundle)))
            token = self._acquire(started.run_id, guard)
            self._runtime = self.address.client(
                RuntimeHttpClient,
                [
                    RuntimeVersionHttpInterceptor(component_name="flwr-serverapp"),
                    RuntimeTokenHttpInterceptor(token=token),
                    guard,
                ],
            )
            found = self._runtime.PullTaskInput(PullTaskInputRequest())
        self._run = found.run.run_id
        # Flower's class Message reads the ids from TaskIdentity.
        TaskIdentity.task_id = found.task_id
        TaskIdentity.run_id = found.run.run_id
        TaskIdentity.node_id = found.context.node_id
        self._heartbeat = HeartbeatSender(self._beat)
        self._heartbeat.start()
        return self

    def _acquire(self, run: int, guard: _Secret) -> str:
        """Returns the token of the task of `run`."""
        client = self.address.client(
            RuntimeHttpClient,
            [
                RuntimeVersionHttpInterceptor(component_name="SuperExec"),
                SuperExecAuthHttpInterceptor(
                    master_secret=self.secret, protected_methods=frozenset({ACQUIRE})
                ),
                guard,
            ],
        )
        end = time.monotonic() + START
        with closing(client):
            # If others use the SuperLink too, tasks of their runs may come first. They are taken,
            # but nobody runs them.
            while time.monotonic() < end:
                found = client.AcquireTask(
                    AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP])
                )
                if found.token and found.task.run_id == run:
                    return str(found.token)
                time.sleep(0.1)
        raise NetworkError(
            "the SuperLink gave the run's task to another process",
            place=self.address.text,
            cure="start it with --isolation process and the same secret",
        )

    def _healed(self, work: Callable[[], T], nothing: T) -> T:
        """Returns the result of `work()`; if it raises a NetworkError, connects again.

        If this server had started the SuperLink, and its process has ended, the process is started
        again first. Messages on their way through the old connection are lost. So `nothing` is
        returned after connecting again, and the transport sends them again.

        Raises:
            NetworkError: if connecting fails for `PATIENCE` seconds.
        """
        try:
            return work()
        except NetworkError as problem:
            log.warning("%s", problem)
        wait = 0.5
        end = time.monotonic() + PATIENCE
        while True:
            try:
                if self.superlink is not None and not self.superlink.running:
                    log.warning("the SuperLink has ended, and is started again")
                    self.superlink.restart()
                self._forget()
                self.open()
                return nothing
            except NetworkError:
                if time.monotonic() > end:
                    raise
                time.sleep(wait)
                wait = min(2 * wait, 15.0)

    def _forget(self) -> None:
        """Closes the connection, and forgets ids and messages of the SuperLink that is gone."""
        if self._heartbeat is not None:
            self._heartbeat.stop()
            self._heartbeat = None
        if self._runtime is not None:
            self._runtime.close()
            self._runtime = None
        self._nodes.clear()
        self._names.clear()
        self._tickets.clear()
        self._arriving.clear()

    def _beat(self) -> bool:
        assert self._runtime is not None
        try:
            return bool(self._runtime.SendTaskHeartbeat(SendTaskHeartbeatRequest()).success)
        except httpx.HTTPError as error:
            log.debug("heartbeat: %s", error)
            return False

    def online(self) -> Mapping[ClientId, bool]:
        """See `Link`. Nodes whose key is not in `keys` are left out."""
        return self._healed(self._look, {})

    def _look(self) -> Mapping[ClientId, bool]:
        assert self._runtime is not None
        with explained(self.address):
            nodes = self._runtime.GetNodes(GetNodesRequest()).nodes
        there = {node.node_id: node.status == "online" for node in nodes}
        if self.keys is None:
            self._name_strangers([node for node, online in there.items() if online])
            return {name: there.get(self._nodes[name], False) for name in sorted(self._nodes)}
        by_key = {node.public_key: node.node_id for node in nodes}
        found = {}
        for name, key in self.keys.items():
            node = by_key.get(node_key(key))
            if node is not None:
                self._nodes[name] = node
            found[name] = node is not None and there[node]
        return found

    def _name_strangers(self, nodes: Collection[int]) -> None:
        """Asks new nodes for the names of their clients, for two seconds at most.

        It is called only without TLS, which is for clients on this machine.
        """
        new = [node for node in nodes if node not in self._names]
        if not new:
            return
        ping = Parcel("ping", "name", "", b"")
        tickets = self._push(dict.fromkeys(new, ping))
        asked = {ticket: node for node, ticket in tickets.items()}
        end = time.monotonic() + 2.0
        while asked and time.monotonic() < end:
            for ticket, answer in self._fetch(list(asked)).items():
                node = asked.pop(ticket)
                if isinstance(answer, Parcel):
                    name = Presence.from_bytes(answer.body).name
                    self._names[node] = name
                    self._nodes[name] = node
            time.sleep(RETRY)

    def send(self, parcels: Mapping[ClientId, Parcel]) -> dict[ClientId, str]:
        """See `Link`."""
        known = {name: self._nodes[name] for name in parcels if name in self._nodes}
        by_node = {node: parcels[name] for name, node in known.items()}
        nothing: dict[int, str] = {}
        tickets = self._healed(lambda: self._push(by_node), nothing)
        known = {name: node for name, node in known.items() if node in tickets}
        return {name: tickets[node] for name, node in known.items()}

    def _push(self, parcels: Mapping[int, Parcel]) -> dict[int, str]:
        if not parcels:
            return {}
        assert self._runtime is not None
        node = Node(node_id=SUPERLINK_NODE_ID)
        with explained(self.address), no_object_id_recompute():
            # Parcels with the same body share one record, so its pieces are hashed only once.
            bodies = {id(parcel.body): to_record(parcel.body) for parcel in parcels.values()}
            outgoing = {}
            for to, parcel in parcels.items():
                content = to_records(parcel, bodies[id(parcel.body)])
                message = Message(content, dst_node_id=to, message_type="query")
                outgoing[to] = Outgoing.of(message)
            announced = self._runtime.PushMessages(
                PushAppMessagesRequest(
                    messages_list=[one.head for one in outgoing.values()],
                    message_object_trees=[one.tree for one in outgoing.values()],
                )
            )
            objects: dict[str, Any] = {}
            for one in outgoing.values():
                objects |= one.objects()
            upload(self._runtime, node, self._run, announced, objects)
        tickets = {to: str(one.message.object_id) for to, one in outgoing.items()}
        self._tickets.update(tickets.values())
        return tickets

    def poll(self, tickets: Collection[str]) -> dict[str, Parcel | Lost]:
        """See `Link`."""
        known = [ticket for ticket in tickets if ticket in self._tickets]
        # Other tickets come from a SuperLink that is gone.
        found: dict[str, Parcel | Lost] = {
            ticket: Lost("the SuperLink was started again")
            for ticket in tickets
            if ticket not in self._tickets
        }
        nothing: dict[str, Parcel | Lost] = {}
        return found | self._healed(lambda: self._fetch(known), nothing) if known else found

    def _fetch(self, tickets: Collection[str]) -> dict[str, Parcel | Lost]:
        """Fetches all complete answers; an answer that is still uploaded is left for a later call.

        So nobody waits for a client with a slow connection.
        """
        assert self._runtime is not None
        node = Node(node_id=SUPERLINK_NODE_ID)
        found: dict[str, Parcel | Lost] = {}
        with explained(self.address):
            new = [ticket for ticket in tickets if ticket not in self._arriving]
            # A request without ids would ask for all messages.
            pulled = PullAppMessagesRequest(message_ids=new)
            answer = self._runtime.PullMessages(pulled) if new else PullAppMessagesResponse()
            for head, tree in zip(answer.messages_list, answer.message_object_trees, strict=True):
                ticket = head.metadata.reply_to_message_id
                if head.HasField("error"):
                    found[ticket] = Lost(head.error.reason)
                else:
                    self._arriving[ticket] = Arriving(tree, self.max_bytes)
            # Also answers that nobody waits for any more, so that the SuperLink deletes them.
            for ticket, arriving in list(self._arriving.items()):
                fetched = take(self._runtime, node, self._run, arriving)
                if fetched is None:
                    continue
                del self._arriving[ticket]
                if ticket in tickets:
                    found[ticket] = fetched if isinstance(fetched, Lost) else fetched.parcel
        return found

    def close(self) -> None:
        """Closes the connection; ends the SuperLink if this server has started it."""
        if self._heartbeat is not None and self._heartbeat.is_running:
            self._heartbeat.stop()
        if self._runtime is not None:
            self._runtime.close()
        if self.superlink is not None:
            self.superlink.close()


@dataclass(frozen=True)
class _Secret:
    """Adds the secret to each request, which shows that the request comes from the server."""

    secret: bytes

    def intercept(self, context: Any, call_next: Callable[[Any], Any]) -> Any:
        context.request.headers[SECRET_HEADER] = self.secret.hex()
        return call_next(context)


def _register(control: ControlHttpClient, name: ClientId, key: bytes) -> None:
    """Registers the key of a client at the SuperLink; a key that it knows already is no error."""
    with registered_before():
        control.RegisterNode(RegisterNodeRequest(public_key=key, name=name))
