"""Converts parcels to messages of Flower and back, and transfers messages piece by piece.

A parcel (`fedpress.transport.link.Parcel`) is one transfer between the server and one client. A
message of Flower consists of objects; each has an id and is transferred by itself.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.supercore.constant import HEAD_BODY_DIVIDER
from flwr.supercore.inflatable.inflatable_object import (
    InflatableObject,
    get_all_nested_objects,
    get_object_body,
    get_object_children_ids_from_object_content,
    get_object_tree,
    get_object_type_from_object_content,
    iterate_object_tree,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectUnavailableError,
    inflate_object_from_contents,
    pull_objects,
    push_objects,
)

from fedpress.transport.link import Lost, Parcel

CHUNK = FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE
"""Size of the pieces, in bytes, into which Flower cuts a body; each piece is an object."""
LONGEST_PIECE = CHUNK + (64 << 10)
"""Longest accepted object of a message, in bytes: a piece, and what Flower adds to it."""
REFUSED = b"refused: "
"""Beginning of the bytes that the SuperLink stores in place of an object that it refuses (see
`store`); the reason follows. No object of Flower begins so."""
UPLOAD = 150.0
"""Seconds without a new piece after which an incomplete message counts as lost. The SuperLink ends
an upload after 180 s without a new piece."""
PATIENT = 1200.0
"""Seconds that a message may take to arrive, however little of it has come."""
SLOWEST = 128 << 10
"""Bytes a second (about 1 Mbit/s) that a message must have arrived with beyond `PATIENT` seconds.

Without this limit, a client that sends a small piece every minute would hold a round that has no
deadline for hours: a message of 1 GiB has about 200 pieces. With it a message of n bytes arrives
within PATIENT + n / SLOWEST seconds, or not at all. Up to 50 MB, a sender that needs `UPLOAD`
seconds for each piece is not too slow."""


def most_objects(max_bytes: int) -> int:
    """Returns the largest number of objects of a message with a body of `max_bytes`."""
    # A body is cut into pieces of CHUNK bytes. A message has five more objects, all small.
    return max_bytes // CHUNK + 8


def too_long(max_bytes: int) -> str:
    """Returns why a message is refused that is longer than `max_bytes`."""
    return f"more than the {max_bytes} bytes that are accepted"


def too_slow(size: int, seconds: float) -> str:
    """Returns why a message is refused of which `size` bytes arrived within `seconds`."""
    return (
        f"too slow: {size} bytes of it arrived within {seconds:.0f} s, and after {PATIENT:.0f} s "
        f"at least {SLOWEST} bytes a second are expected"
    )


def to_record(body: bytes) -> ArrayRecord:
    """Converts the body of a parcel to an array of Flower, sent in pieces of `CHUNK` bytes.

    The array is Flower's fastest type for bytes: 4 MB take 3 ms, in a ConfigRecord 17 ms.
    """
    array = Array(dtype="uint8", shape=(len(body),), stype="raw", data=body)
    return ArrayRecord({"data": array}, keep_input=False)


def to_records(parcel: Parcel, body: ArrayRecord | None = None) -> RecordDict:
    """Converts a parcel to Flower's records.

    Args:
        parcel: the parcel.
        body: the result of `to_record(parcel.body)`. Give the same result for several parcels with
            the same body: the ids of its pieces are then computed only once.
    """
    head: dict[str, Any] = {
        "what": parcel.what,
        "request": parcel.request,
        "session": parcel.session,
    }
    return RecordDict({"head": ConfigRecord(head), "body": body or to_record(parcel.body)})


def to_parcel(message: Message) -> Parcel:
    """Converts a message to a parcel. The message is not trusted: anybody may have sent it.

    Raises:
        ValueError: if the message reports an error in place of content.
        Exception: any other error, if the content was not made by `to_records`.
    """
    if message.has_error():
        raise ValueError(f"{message.error.reason}")
    records = message.content
    head = records["head"]
    assert isinstance(head, ConfigRecord)
    body = records["body"]
    assert isinstance(body, ArrayRecord)
    return Parcel(
        str(head["what"]),  # type: ignore[arg-type]
        str(head["request"]),
        str(head["session"]),
        bytes(body["data"].data),
    )


@dataclass(frozen=True, eq=False)
class Incoming:
    """A received parcel, and the message in which it came; an answer must refer to this message."""

    parcel: Parcel
    message: Message


class _TooLong(ValueError):
    """Raised for a message that is longer than the receiver accepts."""


class Arriving:
    """A message of which some objects may not have arrived yet.

    Its sender first announces the ids of all objects, and then sends the objects. Their number and
    sizes are not trusted. No method waits for an object: messages of other senders must not wait
    for a sender that is slow, or that never sends what it has announced.

    Attributes:
        root: id of the message.
    """

    def __init__(self, tree: ObjectTree, max_bytes: int) -> None:
        """Prepares the transfer.

        Args:
            tree: the announced ids.
            max_bytes: longest accepted message, in bytes.
        """
        self.root = tree.object_id
        self._names = list(dict.fromkeys(one.object_id for one in iterate_object_tree(tree)))
        self._max_bytes = max_bytes
        self._contents: dict[str, bytes] = {}
        self._size = 0
        self._lock = threading.Lock()
        self._began = self._latest = time.monotonic()

    def read(self, pull: Callable[[str], bytes]) -> Incoming | None:
        """Fetches the objects that have arrived; returns the parcel if all have, else None.

        Args:
            pull: function that returns an object by its id.

        Raises:
            ValueError: if the message is too long, arrives more slowly than `SLOWEST`, or is no
                parcel.
            ObjectPullError: if the message counts as lost, for instance because no object arrived
                for `UPLOAD` seconds.
        """
        if len(self._names) > most_objects(self._max_bytes):
            raise ValueError(too_long(self._max_bytes))

        def take(name: str) -> bytes:
            if self._size > self._max_bytes:
                raise ValueError(too_long(self._max_bytes))
            # An object that has not arrived is asked for again by the next call of `read`.
            with suppress(ObjectUnavailableError):
                content = pull(name)
                if content.startswith(REFUSED):
                    raise ValueError(content.removeprefix(REFUSED).decode())
                # Several threads fetch at the same time.
                with self._lock:
                    self._contents[name] = content
                    self._size += len(content)
                    self._latest = time.monotonic()
            return b""

        pull_objects([name for name in self._names if name not in self._contents], take)
        if len(self._contents) < len(self._names):
            if time.monotonic() - self._latest > UPLOAD:
                reason = f"no piece of it arrived for {UPLOAD:.0f} s"
                raise ObjectPullError(self.root, reason)
            took = time.monotonic() - self._began
            if took > PATIENT + self._size / SLOWEST:
                # Not lost but refused: if it were sent again, it would be as slow again.
                raise ValueError(too_slow(self._size, took))
            return None
        try:
            arrays = self._joined()
            message = inflate_object_from_contents(self.root, self._contents, objects=arrays)
            assert isinstance(message, Message)
            message.metadata.__dict__["_message_id"] = self.root
            parcel = to_parcel(message)
            # An answer needs only the message's ids. The content would stay in memory as long as
            # the client works on the answer.
            return Incoming(parcel, remove_content_from_message(message))
        except _TooLong:
            raise
        # Any exception, because the message of a stranger may be wrong in any way.
        except Exception as error:
            raise ValueError(f"not a parcel ({type(error).__name__}: {error})") from error

    def _joined(self) -> dict[str, InflatableObject]:
        """Joins the pieces of each array, and forgets the pieces; returns the arrays by id.

        Flower's own function does the same, but needs three times the memory.
        """
        arrays: dict[str, InflatableObject] = {}
        pieces: set[str] = set()
        for name, content in self._contents.items():
            if get_object_type_from_object_content(content) == Array.__qualname__:
                arrays[name] = self._array(content)
                pieces.update(get_object_children_ids_from_object_content(content))
        for name in pieces:
            self._contents.pop(name, None)
        return arrays

    def _array(self, content: bytes) -> Array:
        """Returns an array whose object has the bytes `content`, which name its pieces."""
        about = json.loads(get_object_body(content, Array))
        names = get_object_children_ids_from_object_content(content)
        bodies = []
        size = 0
        for at in about["arraychunk_ids"]:
            piece = self._contents[names[at]]
            # A view, because a slice of bytes is a copy.
            body = memoryview(piece)[piece.index(HEAD_BODY_DIVIDER) + len(HEAD_BODY_DIVIDER) :]
            bodies.append(body)
            size += len(body)
        # An array may name one piece thousands of times: a few bytes would become gigabytes.
        if size > self._max_bytes:
            raise _TooLong(too_long(self._max_bytes))
        shape = tuple(about["shape"])
        return Array(str(about["dtype"]), shape, str(about["stype"]), b"".join(bodies))


@dataclass(frozen=True, eq=False)
class Outgoing:
    """A message to send. Its object ids are announced first; then the SuperLink asks for objects.

    Attributes:
        message: the message, with its id.
        head: the message without its content, as Flower's protobuf.
        tree: ids of the message's objects.
    """

    message: Message
    head: Any
    tree: ObjectTree

    @classmethod
    def of(cls, message: Message) -> Outgoing:
        """Gives `message` its id.

        Call it only within Flower's `no_object_id_recompute`, which keeps ids after they are
        computed.
        """
        message.metadata.__dict__["_message_id"] = message.object_id
        bare = remove_content_from_message(message) if message.has_content() else message
        return cls(message, message_to_proto(bare), get_object_tree(message))

    def objects(self) -> dict[str, Any]:
        """Returns the message's objects by id; equal objects of several messages have equal ids."""
        return dict(get_all_nested_objects(self.message))


def upload(api: Any, node: Node, run: int, announced: Any, objects: Mapping[str, Any]) -> None:
    """Sends those of `objects` that the SuperLink asked for when they were announced.

    Args:
        api: client of Flower's API for the sender.
        node: the sender.
        run: id of the run to which the messages belong.
        announced: the SuperLink's answer to the announcement (`PushMessages`).
        objects: id -> object.
    """
    push = make_push_object_fn_protobuf(api.PushObject, node, run, announced.session_id)
    push_objects(dict(objects), push, object_ids_to_push=set(announced.objects_to_push))


def take(api: Any, node: Node, run: int, arriving: Arriving) -> Incoming | Lost | None:
    """Fetches the objects of a message that have arrived.

    A message that is complete, or never will be, is confirmed, so that the SuperLink deletes it.

    Args:
        api: client of Flower's API for the receiver.
        node: the receiver.
        run: id of the run to which the message belongs.
        arriving: the message.

    Returns:
        The parcel if the message is complete; None if objects are still missing; `Lost` if the
        message counts as lost, is too long, or is no parcel.
    """
    pull = make_pull_object_fn_protobuf(api.PullObject, node, run)
    found: Incoming | Lost | None
    try:
        found = arriving.read(pull)
    except ObjectPullError as error:
        found = Lost(str(error))
    except ValueError as error:
        # The sender made a wrong message, and would send the same message again.
        found = Lost(str(error), again=False)
    if found is not None:
        api.ConfirmMessageReceived(
            ConfirmMessageReceivedRequest(node=node, run_id=run, message_object_id=arriving.root)
        )
    return found
