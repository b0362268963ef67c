"""Limits the messages that the SuperLink (Flower's server process) keeps until they are fetched.

A client announces the ids of a message's objects and then sends the objects. Flower checks neither
their number nor their sizes, so one client could fill the memory of the server's machine.
"""

from __future__ import annotations

from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore

from fedpress.transport.flower.messages import LONGEST_PIECE, REFUSED, most_objects, too_long
from fedpress.wire.message import MAX_BYTES


class LimitedStore(InMemoryObjectStore):
    """Flower's store of objects, which takes at most `MAX_BYTES` for one message.

    A message that is too long is not stored: its receiver finds the reason in its place, and
    refuses the message at once.
    """

    def preregister(self, run_id: int, object_tree: ObjectTree) -> list[str]:
        """Notes the announced objects; returns the ids of those that the sender must send.

        Args:
            run_id: id of the run to which the message belongs.
            object_tree: the announced ids.
        """
        root = object_tree.object_id
        with self.lock_store:
            reason = self._fault(object_tree)
            if not reason:
                return list(super().preregister(run_id, object_tree))
            if root not in self.store:
                super().preregister(run_id, ObjectTree(object_id=root))
                self._refuse(root, reason)
        # The sender sends nothing, and whatever it sends unasked is dropped.
        return []

    def _fault(self, tree: ObjectTree) -> str:
        """Returns what is wrong with the announced ids; an empty text if nothing is."""
        parts: dict[str, list[str]] = {}
        for one in iterate_object_tree(tree):
            name = one.object_id
            below = [child.object_id for child in one.children]
            known = self.store.get(name)
            before = parts.get(name, below if known is None else known.child_object_ids)
            # The store counts how often an object is used, and deletes it at 0. Two lists of parts
            # for one object make the count wrong: then its parts would stay for ever.
            if below != before:
                return f"object {name[:8]} was announced with two lists of parts"
            parts[name] = below
        return too_long(MAX_BYTES) if len(parts) > most_objects(MAX_BYTES) else ""

    def put(self, object_id: str, object_content: bytes) -> None:
        """Stores an announced object; in place of one that is too long, the reason.

        Args:
            object_id: the announced id.
            object_content: bytes of the object.
        """
        if len(object_content) <= LONGEST_PIECE:
            super().put(object_id, object_content)
            return
        with self.lock_store:
            self._refuse(object_id, f"a piece of more than {LONGEST_PIECE} bytes")

    def _refuse(self, name: str, reason: str) -> None:
        entry = self.store.get(name)
        if entry is not None and not entry.is_available:
            entry.content = REFUSED + reason.encode()
            entry.is_available = True
