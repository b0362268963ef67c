"""Parcels as messages of Flower, whole and in pieces, from friends and strangers."""

import pytest

pytest.importorskip("flwr")

from flwr.app import Message
from flwr.app.message import array as flower_array
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, ObjectUnavailableError
from flwr.supercore.task_identity import TaskIdentity

from fedpress.transport.flower import messages
from fedpress.transport.flower.messages import Arriving, Outgoing, to_record, to_records
from fedpress.transport.link import Parcel


@pytest.fixture(autouse=True)
def _identity(monkeypatch):
    for name, value in {"task_id": 3, "run_id": 5, "node_id": 1}.items():
        monkeypatch.setattr(TaskIdentity, f"_{name}", value)
    # Small pieces, so that a small body has many.
    monkeypatch.setattr(flower_array, "FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE", 1000)
    monkeypatch.setattr(messages, "CHUNK", 1000)


def sent(body):
    """Returns a message that is announced, its bytes by their ids, and its parcel."""
    parcel = Parcel("call", "request", "session", body)
    with no_object_id_recompute():
        outgoing = Outgoing.of(Message(to_records(parcel), dst_node_id=7, message_type="query"))
        return outgoing, {name: one.deflate() for name, one in outgoing.objects().items()}, parcel


@pytest.mark.parametrize("size", [0, 1, 1000, 1001, 12_345])
def test_a_parcel_comes_back_from_its_pieces(size):
    outgoing, contents, parcel = sent(bytes(at % 251 for at in range(size)))
    arrived = Arriving(outgoing.tree, 20_000).read(contents.__getitem__)
    assert arrived.parcel == parcel
    assert arrived.message.metadata.message_id == outgoing.message.object_id


def test_pieces_that_are_late_are_asked_for_again_and_others_are_not():
    outgoing, contents, parcel = sent(bytes(at % 251 for at in range(5000)))
    late = set(list(contents)[:2])
    asked = []

    def pull(name):
        asked.append(name)
        if name in late:
            raise ObjectUnavailableError(name)
        return contents[name]

    arriving = Arriving(outgoing.tree, 20_000)
    assert arriving.read(pull) is None
    first, asked = asked, []
    waited = set(late)
    late.clear()
    assert arriving.read(pull).parcel == parcel
    assert set(first) == set(contents)
    assert set(asked) == waited


def test_an_upload_may_last_as_long_as_its_pieces_keep_coming(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(messages.time, "monotonic", lambda: now[0])
    # In proportion to the pieces of this test.
    monkeypatch.setattr(messages, "SLOWEST", 25)
    outgoing, contents, parcel = sent(bytes(at % 251 for at in range(5000)))
    there = []

    def pull(name):
        if name not in there:
            raise ObjectUnavailableError(name)
        return contents[name]

    arriving = Arriving(outgoing.tree, 20_000)
    for name in contents:
        assert arriving.read(pull) is None
        now[0] += 0.9 * messages.UPLOAD
        there.append(name)
    assert arriving.read(pull).parcel == parcel

    there.clear()
    stuck = Arriving(outgoing.tree, 20_000)
    now[0] += 1.1 * messages.UPLOAD
    with pytest.raises(ObjectPullError, match="no piece of it arrived"):
        stuck.read(pull)


def trickled(monkeypatch, outgoing, contents, pause):
    """Fetches a message of which one more piece arrives every `pause` seconds.

    Returns:
        The parcel, or the refusal in its place; and the seconds that it took.
    """
    now = [0.0]
    monkeypatch.setattr(messages.time, "monotonic", lambda: now[0])
    there = []

    def pull(name):
        if name not in there:
            raise ObjectUnavailableError(name)
        return contents[name]

    arriving = Arriving(outgoing.tree, 300_000)
    for name in contents:
        try:
            assert arriving.read(pull) is None
        except ValueError as refused:
            return refused, now[0]
        now[0] += pause
        there.append(name)
    return arriving.read(pull).parcel, now[0]


def test_an_answer_that_trickles_is_refused_after_twenty_minutes(monkeypatch):
    outgoing, contents, _ = sent(bytes(at % 251 for at in range(200_000)))
    assert 60.0 * len(contents) > 3 * 3600.0
    refused, took = trickled(monkeypatch, outgoing, contents, 60.0)
    assert "too slow" in str(refused)
    assert messages.PATIENT < took <= messages.PATIENT + 120.0


def test_an_answer_may_take_as_long_as_its_length_needs(monkeypatch):
    outgoing, contents, parcel = sent(bytes(at % 251 for at in range(200_000)))
    size = sum(map(len, contents.values()))
    monkeypatch.setattr(messages, "SLOWEST", 100)
    pause = size / messages.SLOWEST / len(contents)
    arrived, took = trickled(monkeypatch, outgoing, contents, pause)
    assert arrived == parcel
    assert took > 1.5 * messages.PATIENT
    refused, _ = trickled(monkeypatch, outgoing, contents, 3 * pause)
    assert "too slow" in str(refused)


def test_a_long_message_is_refused_before_all_of_it_is_fetched():
    outgoing, contents, _ = sent(bytes(at % 251 for at in range(50_000)))
    fetched = []
    with pytest.raises(ValueError, match="more than the 20000 bytes"):
        Arriving(outgoing.tree, 20_000).read(lambda name: fetched.append(name) or contents[name])
    assert len(fetched) < 30


def test_one_piece_that_is_named_a_thousand_times_is_refused():
    # All pieces of zeros are one object of 1000 bytes.
    outgoing, contents, _ = sent(bytes(1_000_000))
    assert sum(map(len, contents.values())) < 20_000
    with pytest.raises(ValueError, match="more than the 20000 bytes"):
        Arriving(outgoing.tree, 20_000).read(contents.__getitem__)
    # As long as allowed, it is no fault.
    outgoing, contents, parcel = sent(bytes(20_000))
    assert Arriving(outgoing.tree, 20_000).read(contents.__getitem__).parcel == parcel


def test_equal_bodies_have_one_set_of_pieces():
    body = bytes(at % 251 for at in range(5000))
    record = to_record(body)
    with no_object_id_recompute():
        both = [
            Outgoing.of(
                Message(
                    to_records(Parcel("call", request, "", body), record),
                    dst_node_id=7,
                    message_type="query",
                )
            )
            for request in ("a", "b")
        ]
        first, second = (get_all_nested_objects(one.message) for one in both)
    # Message, records and head are their own; the array and its pieces are not.
    assert len(set(first) - set(second)) == 3
    assert len(set(first) & set(second)) == 7
