"""What the SuperLink keeps of messages: at most the accepted length, with the reason in the place of the rest."""

import hashlib

import pytest

pytest.importorskip("flwr")

from flwr.proto.message_pb2 import ObjectTree

from fedpress.transport.flower import store
from fedpress.transport.flower.messages import LONGEST_PIECE, REFUSED, Arriving, most_objects
from fedpress.transport.flower.store import LimitedStore

MOST = 10 * store.MAX_BYTES


def name(text):
    return hashlib.sha256(text.encode()).hexdigest()


def tree(text, *below):
    return ObjectTree(object_id=name(text), children=below)


def reason(made, announced):
    """Returns why the receiver of a message refuses it."""
    assert made.preregister(7, announced) == []
    arriving = Arriving(made.get_object_tree(announced.object_id), MOST)
    with pytest.raises(ValueError, match=r"accepted|two lists") as caught:
        arriving.read(made.get)
    return str(caught.value)


def test_what_is_announced_is_asked_for_and_deleted_with_its_message():
    made = LimitedStore(verify=False)
    announced = tree("message", tree("a", tree("piece")), tree("b", tree("piece")))
    assert set(made.preregister(7, announced)) == {*map(name, ("message", "a", "b", "piece"))}
    made.put(name("piece"), b"x" * LONGEST_PIECE)
    assert made.get(name("piece")) == b"x" * LONGEST_PIECE
    made.delete(name("message"))
    assert len(made) == 0


def test_of_a_message_with_too_many_objects_only_the_reason_is_kept(monkeypatch):
    monkeypatch.setattr(store, "MAX_BYTES", 1 << 20)
    made = LimitedStore(verify=False)
    pieces = [tree(str(at)) for at in range(most_objects(1 << 20))]
    assert "more than the 1048576 bytes" in reason(made, tree("long", *pieces))
    assert len(made) == 1
    # The message itself is one more.
    assert len(made.preregister(7, tree("short", *pieces[1:]))) == len(pieces)


def test_of_a_piece_that_is_too_long_only_the_reason_is_kept():
    made = LimitedStore(verify=False)
    made.preregister(7, tree("message", tree("piece")))
    made.put(name("piece"), bytes(LONGEST_PIECE + 1))
    assert made.get(name("piece")).startswith(REFUSED)
    with pytest.raises(ValueError, match=f"a piece of more than {LONGEST_PIECE} bytes"):
        Arriving(tree("message", tree("piece")), MOST).read(made.get)
    # What nobody announced is not kept at all.
    made.put(name("other"), bytes(LONGEST_PIECE + 1))
    assert made.get(name("other")) is None


@pytest.mark.parametrize(
    "announced",
    [
        tree("message", tree("a", tree("message"))),
        tree("message", tree("a"), tree("b", tree("a", tree("piece")))),
        tree("message", tree("known", tree("piece"))),
    ],
    ids=["the message in itself", "two lists", "another list than before"],
)
def test_objects_that_would_never_be_deleted_are_refused(announced):
    made = LimitedStore(verify=False)
    made.preregister(7, tree("before", tree("known")))
    assert "two lists of parts" in reason(made, announced)
    made.delete(announced.object_id)
    assert len(made) == 2


def test_an_object_that_is_there_is_not_replaced():
    made = LimitedStore(verify=False)
    made.preregister(7, tree("message"))
    made.put(name("message"), b"content")
    assert made.preregister(7, tree("message", tree("piece"))) == []
    made.put(name("message"), bytes(LONGEST_PIECE + 1))
    assert made.get(name("message")) == b"content"
