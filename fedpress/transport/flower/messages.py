"""Parcels as messages of Flower, and messages that arrive piece by piece."""

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
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_body,
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
"""Bytes of a body that travel as one object."""
UPLOAD = 150.0
"""Seconds between two pieces of a message; the SuperLink ends an upload after 180 without one."""


def to_record(body: bytes) -> ArrayRecord:
    """Writes the body of a parcel as one array of Flower, which travels in pieces of `CHUNK` bytes.

    Of Flower's types it is the quickest: a ConfigRecord of 4 MB takes 17 ms to write, an array 3.
    """
    array = Array(dtype="uint8", shape=(len(body),), stype="raw", data=body)
    return ArrayRecord({"data": array}, keep_input=False)


def to_records(parcel: Parcel, body: ArrayRecord | None = None) -> RecordDict:
    """Writes a parcel as Flower's records.

    Args:
        parcel: the parcel.
        body: `to_record(parcel.body)`, if several parcels have the same body; the ids of its pieces
            are then computed once.
    """
    head: dict[str, Any] = {
        "what": parcel.what,
        "request": parcel.request,
        "session": parcel.session,
    }
    return RecordDict({"head": ConfigRecord(head), "body": body or to_record(parcel.body)})


def to_parcel(message: Message) -> Parcel:
    """Reads what `to_records` wrote, from anybody.

    Raises:
        ValueError: if it is something else.
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
    """A parcel that has come, and the message that an answer must refer to."""

    parcel: Parcel
    message: Message


class Arriving:
    """A message whose objects are fetched as they arrive; nobody has checked its size.

    Its sender announces all objects first and sends them then. Nothing here waits for them, because
    others must not wait for a sender that is slow, or that never sends what it has announced.
    """

    def __init__(self, tree: ObjectTree, max_bytes: int) -> None:
        self.root = tree.object_id
        self._names = list(dict.fromkeys(one.object_id for one in iterate_object_tree(tree)))
        self._max_bytes = max_bytes
        self._contents: dict[str, bytes] = {}
        self._size = 0
        self._lock = threading.Lock()
        self._latest = time.monotonic()

    def read(self, pull: Callable[[str], bytes]) -> Incoming | None:
        """Fetches what has arrived; returns the parcel when it is complete, else None.

        Raises:
            ValueError: if it is too long or no parcel.
            ObjectPullError: if it will not arrive.
        """
        # A body is cut into pieces of CHUNK bytes. Beside them there are five small objects.
        if len(self._names) > self._max_bytes // CHUNK + 8:
            raise ValueError(self._too_long)

        def take(name: str) -> bytes:
            if self._size > self._max_bytes:
                raise ValueError(self._too_long)
            # It is asked for again at the next look.
            with suppress(ObjectUnavailableError):
                content = pull(name)
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
            return None
        if self._size > self._max_bytes + CHUNK:
            raise ValueError(self._too_long)
        try:
            self._check_repeats()
            message = inflate_object_from_contents(self.root, self._contents)
            assert isinstance(message, Message)
            message.metadata.__dict__["_message_id"] = self.root
            return Incoming(to_parcel(message), message)
        # Whatever a stranger sends may be wrong in any way.
        except Exception as error:
            raise ValueError(f"not a parcel ({type(error).__name__}: {error})") from error

    def _check_repeats(self) -> None:
        """Checks the length of the arrays: one may name the same piece thousands of times.

        Raises:
            ValueError: if they would be too long.
        """
        pieces = 0
        for content in self._contents.values():
            if get_object_type_from_object_content(content) == Array.__qualname__:
                pieces += len(json.loads(get_object_body(content, Array))["arraychunk_ids"])
        longest = max(map(len, self._contents.values()))
        if pieces * longest > self._max_bytes + longest:
            raise ValueError(self._too_long)

    @property
    def _too_long(self) -> str:
        return f"more than the {self._max_bytes} bytes that are accepted"


@dataclass(frozen=True, eq=False)
class Outgoing:
    """A message that is announced first; its objects follow, those that are not there yet.

    Attributes:
        message: with its id.
        head: the message without its content, as Flower's protobuf.
        tree: ids of its objects.
    """

    message: Message
    head: Any
    tree: ObjectTree

    @classmethod
    def of(cls, message: Message) -> Outgoing:
        """Gives `message` its id. Only within `no_object_id_recompute`, which keeps ids."""
        message.metadata.__dict__["_message_id"] = message.object_id
        bare = remove_content_from_message(message) if message.has_content() else message
        return cls(message, message_to_proto(bare), get_object_tree(message))

    def objects(self) -> dict[str, Any]:
        """Returns its objects by their ids; equal parts of several messages have one id."""
        return dict(get_all_nested_objects(self.message))


def upload(api: Any, node: Node, run: int, announced: Any, objects: Mapping[str, Any]) -> None:
    """Sends those of `objects` that the SuperLink asked for when they were announced.

    Args:
        api: client of the API of this side.
        node: the sender.
        run: the messages' run.
        announced: the answer to `PushMessages`.
        objects: by their ids.
    """
    push = make_push_object_fn_protobuf(api.PushObject, node, run, announced.session_id)
    push_objects(dict(objects), push, object_ids_to_push=set(announced.objects_to_push))


def take(api: Any, node: Node, run: int, arriving: Arriving) -> Incoming | Lost | None:
    """Fetches what has arrived of a message, and confirms the message when it is complete.

    Args:
        api: client of the API of this side.
        node: the receiver.
        run: the message's run.
        arriving: the message.

    Returns:
        None if more will arrive; `Lost` if it never will be complete, or is no parcel.
    """
    pull = make_pull_object_fn_protobuf(api.PullObject, node, run)
    found: Incoming | Lost | None
    try:
        found = arriving.read(pull)
    except ObjectPullError as error:
        found = Lost(str(error))
    except ValueError as error:
        # Its sender made it so: sent again it would be the same.
        found = Lost(str(error), again=False)
    if found is not None:
        # The SuperLink then deletes it.
        api.ConfirmMessageReceived(
            ConfirmMessageReceivedRequest(node=node, run_id=run, message_object_id=arriving.root)
        )
    return found
