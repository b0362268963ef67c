"""A client's connection to the SuperLink (Flower's server process): one for the whole process."""

from __future__ import annotations

import threading

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Message
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
    RegisterNodeFleetRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import (
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPushError,
)
from flwr.supercore.interceptors import (
    RuntimeVersionHttpInterceptor,
)
from flwr.supercore.primitives.asymmetric import (
    generate_key_pairs,
    public_key_to_bytes,
)
from flwr.supernode.fleet_http_client import FleetHttpClient

from fedpress.core.log import logger
from fedpress.errors import NetworkError
from fedpress.transport.flower.address import BEAT, Address, explained
from fedpress.transport.flower.keys import registered_before
from fedpress.transport.flower.messages import (
    Arriving,
    Incoming,
    Outgoing,
    take,
    to_records,
    upload,
)
from fedpress.transport.flower.signed import SignedRequests
from fedpress.transport.link import Parcel
from fedpress.wire.message import MAX_BYTES

log = logger(__name__)


class NodeLink:
    """A client's connection to the SuperLink. Only one thread may call its methods.

    It never fetches Flower's bundle of code for a run, and reads nothing but parcels.
    """

    def __init__(
        self,
        address: Address,
        private_key: ec.EllipticCurvePrivateKey | None = None,
        *,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        """Prepares the connection; `connect` opens it.

        Args:
            address: address of the SuperLink.
            private_key: key of this client; None: a new key, which only a SuperLink without TLS
                accepts.
            max_bytes: longest accepted message, in bytes.
        """
        self._given = private_key is not None
        if private_key is None:
            private_key, _ = generate_key_pairs()
        self._key = public_key_to_bytes(private_key.public_key())
        self._address = address
        self._max_bytes = max_bytes
        self._client = address.client(
            FleetHttpClient,
            [
                RuntimeVersionHttpInterceptor(component_name="SuperNode"),
                SignedRequests(private_key),
            ],
        )
        self._node = Node()
        self._arriving: list[tuple[int, Arriving]] = []
        self._closed = threading.Event()
        self._heart = threading.Thread(target=self._beats, name="fedpress-heartbeat", daemon=True)

    def connect(self) -> None:
        """Connects, or connects again after the SuperLink was started anew.

        Raises:
            NetworkError: if that fails. Its attribute `refused` is True if it would fail again.
        """
        with explained(self._address):
            # The SuperLink refuses to activate a node that counts as connected.
            if self._is_known():
                return
            if not self._given:
                with registered_before():
                    self._client.RegisterNode(RegisterNodeFleetRequest(public_key=self._key))
            answer = self._client.ActivateNode(
                ActivateNodeRequest(public_key=self._key, heartbeat_interval=BEAT)
            )
        self._node = Node(node_id=answer.node_id)
        # A new SuperLink does not have the objects of messages that the old one had announced.
        self._arriving.clear()
        if not self._heart.ident:
            self._heart.start()

    def _beats(self) -> None:
        """Sends heartbeats until `close`, by which the SuperLink knows that this client is online.

        It runs in its own thread, because the main thread may send one message for minutes.
        """
        while not self._closed.wait(BEAT / 3):
            try:
                self._beat()
            # Ignored, because the main thread meets the same error, and connects again.
            except httpx.HTTPError as error:
                log.debug("heartbeat: %s", error)

    def _beat(self) -> bool:
        beat = SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=BEAT)
        return bool(self._client.SendNodeHeartbeat(beat).success)

    def _is_known(self) -> bool:
        """Whether the SuperLink is still the one that this node was connected to."""
        if not self._node.node_id:
            return False
        try:
            return self._beat()
        except httpx.HTTPStatusError:
            return False

    def receive(self) -> Incoming | None:
        """Returns the next complete parcel for this client; None if there is none now.

        Raises:
            NetworkError: if the server cannot be reached, or refuses.
        """
        with explained(self._address):
            answer = self._client.PullMessages(PullMessagesRequest(node=self._node))
            for head, tree in zip(answer.messages_list, answer.message_object_trees, strict=True):
                run = head.metadata.run_id
                self._arriving.append((run, Arriving(tree, self._max_bytes)))
            for one in list(self._arriving):
                run, arriving = one
                found = take(self._client, self._node, run, arriving)
                if found is None:
                    continue
                self._arriving.remove(one)
                if isinstance(found, Incoming):
                    return found
                log.warning("a message was dropped (%s)", found.reason)
        return None

    def reply(self, incoming: Incoming, parcel: Parcel, seconds: float = 0.0) -> bool:
        """Sends an answer; returns False if nobody waits for it any more.

        Args:
            incoming: what is answered.
            parcel: the answer.
            seconds: how long the client worked on the answer.

        Raises:
            NetworkError: if the server cannot be reached, or refuses for another reason.
        """
        with no_object_id_recompute():
            outgoing = Outgoing.of(Message(to_records(parcel), reply_to=incoming.message))
            run = incoming.message.metadata.run_id
            try:
                with explained(self._address):
                    announced = self._client.PushMessages(
                        PushMessagesRequest(
                            node=self._node,
                            messages_list=[outgoing.head],
                            message_object_trees=[outgoing.tree],
                            clientapp_runtime_list=[seconds],
                        )
                    )
                    upload(self._client, self._node, run, announced, outgoing.objects())
            except NetworkError as error:
                cause = error.__cause__
                gone = (httpx.codes.FORBIDDEN, httpx.codes.NOT_FOUND)
                # The run is over, or was started again: no server waits for this answer.
                if isinstance(cause, httpx.HTTPStatusError) and cause.response.status_code in gone:
                    log.info("an answer was dropped: its run is over")
                    return False
                if isinstance(cause, ObjectPushError):
                    log.info("an answer was dropped: %s", cause)
                    return False
                raise
        return True

    def close(self) -> None:
        """Closes the connection; before, it tells the SuperLink that this client leaves."""
        self._closed.set()
        if self._heart.ident:
            self._heart.join()
        try:
            self._client.DeactivateNode(DeactivateNodeRequest(node_id=self._node.node_id))
        except (httpx.HTTPError, RuntimeError) as error:
            log.debug("goodbye failed: %s", error)
        self._client.close()
