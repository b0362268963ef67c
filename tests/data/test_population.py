import json

import pytest

from fedpress.data.population import Population
from fedpress.errors import DataError

WHOLE = Population(("b", "a"), {"b": 5, "a": 3}, {"b": b"k" * 32, "a": b"l" * 32})


@pytest.mark.parametrize("population", [WHOLE, Population(("a",)), Population(("a",), {"a": 1})])
def test_a_population_is_the_same_after_it_has_travelled(population):
    again = Population.from_json(population.to_json())
    assert again == population
    assert again.names == population.names


def test_counts_that_nobody_may_know_are_not_given():
    with pytest.raises(DataError, match="are secret"):
        _ = Population(("a", "b")).total
    assert WHOLE.total == 8


@pytest.mark.parametrize(
    ("make", "place"),
    [
        (lambda: Population(()), "population.names"),
        (lambda: Population(("a", "a")), "population.names"),
        (lambda: Population(("a", "b"), {"a": 1}), "population.examples"),
        (lambda: Population(("a",), {"a": 0}), "population.examples.a"),
        (lambda: Population(("a",), None, {"b": b""}), "population.identities"),
    ],
)
def test_what_is_no_population_is_refused_by_field(make, place):
    with pytest.raises(DataError, match=place):
        make()


@pytest.mark.parametrize(
    "change",
    [
        lambda table: table.pop("names"),
        lambda table: table.update(names=[1, 2]),
        lambda table: table.update(examples=[1.5, 2]),
        lambda table: table.update(examples=[True, 2]),
        lambda table: table.update(examples=[1]),
        lambda table: table.update(identities=["zz", "00"]),
        lambda table: table.update(identities=["00"]),
    ],
)
def test_a_text_that_is_no_population_is_refused(change):
    table = json.loads(WHOLE.to_json())
    change(table)
    with pytest.raises(DataError, match="population: not a table of clients"):
        Population.from_json(json.dumps(table))
    for text in ("", "[]", "[" * 100_000, "3"):
        with pytest.raises(DataError):
            Population.from_json(text)
