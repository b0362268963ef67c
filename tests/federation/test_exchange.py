import itertools

import pytest

from fedpress.federation.exchange import Traffic, error, ordered


@pytest.mark.parametrize("order", list(itertools.permutations("abc")))
def test_replies_are_put_into_client_order(order):
    got = list(ordered(["a", "b", "c"], iter([(name, error(name)) for name in order])))
    assert [(name, reply.header["reason"]) for name, reply in got] == [
        ("a", "a"),
        ("b", "b"),
        ("c", "c"),
    ]


def test_a_missing_reply_is_none():
    got = dict(ordered(["a", "b", "c"], iter([("c", error("late"))])))
    assert got["a"] is None
    assert got["b"] is None
    assert got["c"].header["reason"] == "late"


def test_replies_that_nobody_asked_for_and_second_replies_are_ignored():
    replies = iter(
        [("x", error("stranger")), ("b", error("first")), ("b", error("second")), ("a", error("a"))]
    )
    got = list(ordered(["a", "b"], replies))
    assert [(name, reply.header["reason"]) for name, reply in got] == [("a", "a"), ("b", "first")]
    assert next(replies, None) is None


def test_only_what_came_too_early_is_held():
    taken = []

    def arriving():
        for name in "abc":
            taken.append(name)
            yield name, error(name)

    replies = ordered(["a", "b", "c"], arriving())
    next(replies)
    assert taken == ["a"]


def test_traffic_is_a_difference_of_counters():
    assert Traffic(10, 7) - Traffic(4, 2) == Traffic(6, 5)
