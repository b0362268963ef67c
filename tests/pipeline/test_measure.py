"""What `measure` says of single clients."""

import math

import pytest

from fedpress.pipeline.measure import by_client
from fedpress.tasks import MOST_PARTS, Binary, Regression

BINARY = Binary(("no", "yes"))


def test_the_worst_tenth_is_the_worst_client_of_ten_and_two_of_eleven():
    scores = [0.5 + at / 100 for at in range(11)]
    names = [f"c{at}" for at in range(11)]
    assert by_client(BINARY, names[:10], scores[:10])["worst_tenth"] == 0.5
    assert by_client(BINARY, names, scores)["worst_tenth"] == pytest.approx(0.505)


def test_the_worst_error_is_the_largest():
    found = by_client(Regression(("y",)), ("a", "b"), (1.0, 3.0))
    assert found == {"worst_tenth": 3.0, "test_clients": ["a", "b"], "mae_by_client": [1.0, 3.0]}


def test_a_client_of_one_class_has_no_auc_and_is_not_the_worst():
    found = by_client(BINARY, ("a", "b", "c"), (0.9, math.nan, 0.8))
    assert found["auc_by_client"] == [0.9, None, 0.8]
    assert found["worst_tenth"] == 0.8
    assert by_client(BINARY, ("a", "b"), (math.nan, math.nan))["worst_tenth"] is None


def test_many_clients_are_not_named():
    names = [str(at) for at in range(MOST_PARTS + 1)]
    assert by_client(BINARY, names, [0.5] * len(names)) == {"worst_tenth": 0.5}


def test_a_single_client_says_nothing_new():
    assert by_client(BINARY, ("a",), (0.9,)) == {}
