from dataclasses import replace

import pytest
import torch

from fedpress.core.examples import Arrays, Preprocess
from fedpress.data.examples import SourceRows
from fedpress.data.settings import DataSettings
from fedpress.data.split import split_rows
from fedpress.errors import DataError


def numbered(n: int, *, own_test: bool = False, clients: int = 0) -> SourceRows:
    """Rows whose only feature is their number, so that a row can be followed to where it went."""

    def rows(start: int, count: int) -> Arrays:
        return Arrays(
            torch.arange(start, start + count, dtype=torch.float32)[:, None],
            torch.arange(count) % 3,
        )

    return SourceRows(
        "numbered",
        rows(0, n),
        ("a", "b", "c"),
        test=rows(1000, 5) if own_test else None,
        owners=torch.arange(n) % clients if clients else None,
        owner_names=tuple(f"p{i}" for i in range(clients)),
    )


def where_rows_went(data) -> dict[str, set[int]]:
    parts = {
        **data.clients,
        "public": data.public,
        "validation": data.validation,
        "test": data.test,
    }
    return {name: {int(v) for v in part.x.flatten()} for name, part in parts.items()}


def ask(**keys) -> DataSettings:
    return DataSettings(source="digits", **keys)


def test_every_row_goes_to_one_place_when_the_rest_is_public():
    data = split_rows(numbered(100), ask(num_clients=4, examples_per_client=10, validation=7), 0)
    went = where_rows_went(data)
    assert {name: len(rows) for name, rows in went.items()} == {
        **{f"c{i}": 10 for i in range(4)},
        "public": 33,
        "validation": 7,
        "test": 20,
    }
    assert set.union(*went.values()) == set(range(100))


def test_a_source_with_its_own_test_set_keeps_it():
    data = split_rows(
        numbered(100, own_test=True), ask(num_clients=4, examples_per_client=25, validation=0), 0
    )
    assert where_rows_went(data)["test"] == set(range(1000, 1005))
    assert len(data.public) == 0
    assert data.preprocess == Preprocess()


def test_the_same_seed_gives_the_same_rows_and_another_seed_does_not():
    first, again, other = (
        where_rows_went(split_rows(numbered(90), ask(examples_per_client=4), seed))
        for seed in (3, 3, 4)
    )
    assert first == again
    assert all(first[name] != other[name] for name in first)


def test_natural_clients_give_the_asked_share_of_their_own_rows():
    data = split_rows(
        numbered(60, clients=3), ask(test_share=0.2, public_share=0.5, validation=0.2), 0
    )
    went = where_rows_went(data)
    for owner in range(3):
        own = {row for row in range(60) if row % 3 == owner}
        assert went[f"p{owner}"] <= own
        assert len(went[f"p{owner}"]) == 8
        assert len(went["test"] & own) == 4
        assert len((went["public"] | went["validation"]) & own) == 8


def test_each_test_row_of_a_natural_client_knows_its_client():
    data = split_rows(numbered(60, clients=6), ask(test_share=0.2, validation=0), 0)
    of = [data.test_owner_names[at] for at in data.test_owners.tolist()]
    assert of == [f"p{int(row) % 6}" for row in data.test.x.flatten()]
    kept = split_rows(numbered(60, clients=6), ask(test_clients=("p5", "p1"), validation=0), 0)
    assert kept.test_owner_names == ("p1", "p5")
    assert kept.test_owners.bincount().tolist() == [10, 10]


@pytest.mark.parametrize(
    ("rows", "keys"),
    [
        (numbered(60), {"num_clients": 3}),
        (numbered(60, own_test=True, clients=6), {}),
        (numbered(60, clients=6), {"num_clients": 3, "partition": {"kind": "iid"}}),
    ],
)
def test_rows_of_no_natural_client_have_no_owner(rows, keys):
    data = split_rows(rows, ask(validation=0, **keys), 0)
    assert (data.test_owners, data.test_owner_names) == (None, ())


def test_public_and_test_clients_give_all_their_rows_and_hold_none():
    data = split_rows(
        numbered(60, clients=4), ask(public_clients=["p1"], test_clients=["p3"], validation=3), 0
    )
    went = where_rows_went(data)
    assert list(data.clients) == ["p0", "p2"]
    assert went["public"] | went["validation"] == {row for row in range(60) if row % 4 == 1}
    assert went["test"] == {row for row in range(60) if row % 4 == 3}


def test_what_natural_clients_do_not_use_never_becomes_public():
    data = split_rows(numbered(60, clients=4), ask(num_clients=2, examples_per_client=5), 0)
    assert [len(part) for part in data.clients.values()] == [5, 5]
    assert len(data.public) == len(data.validation) == 0


def test_classes_that_the_public_part_lacks_are_at_the_clients_and_in_the_test_alone():
    keys = {"num_clients": 4, "examples_per_client": 10, "validation": 5}
    whole = split_rows(numbered(100), ask(**keys), 0)
    data = split_rows(numbered(100), ask(**keys, public_lacks=["b"]), 0)
    assert set(data.public.y.tolist()) | set(data.validation.y.tolist()) == {0, 2}
    assert where_rows_went(data)["c0"] == where_rows_went(whole)["c0"]
    assert torch.equal(data.test.y, whole.test.y)
    assert data.class_names == ("a", "b", "c")


@pytest.mark.parametrize(
    ("rows", "lacks", "message"),
    [
        (numbered(100), ["bb"], "public_lacks: no class 'bb' (known: a, b, c); did you mean 'b'?"),
        (
            replace(numbered(100), targets=lambda rows: None),
            ["b"],
            "public_lacks: the classes are not known before the public rows are; name all classes "
            "with classes = [...]",
        ),
    ],
)
def test_a_class_that_cannot_be_taken_away_is_refused(rows, lacks, message):
    with pytest.raises(DataError) as caught:
        split_rows(rows, ask(num_clients=2, examples_per_client=10, public_lacks=lacks), 0)
    assert str(caught.value) == message


def test_preprocessing_is_fitted_on_the_public_part_alone():
    data = split_rows(numbered(60, clients=3), ask(public_clients=["p2"], validation=2), 0)
    assert data.preprocess == Preprocess.fit(data.public.x)
    given = split_rows(
        numbered(60, clients=3), ask(public_clients=["p2"], mean=[1.0], std=[2.0]), 0
    )
    assert given.preprocess == Preprocess((1.0,), (2.0,))


@pytest.mark.parametrize(
    ("keys", "clients", "message"),
    [
        (
            {"validation": 20, "examples_per_client": 6},
            0,
            r"asked for 20 rows of the public part, which has 20; lower",
        ),
        (
            {"validation": 5},
            0,
            r"asked for 5 rows of the public part, which has 0; .* declare more rows public",
        ),
        (
            {"examples_per_client": 60},
            0,
            r"10 clients of 60 examples = 600 examples, but only 80 are left",
        ),
        (
            {"public_clients": ["p1"]},
            0,
            r"^public_clients: the data does not name its clients; give client_column .* or use public_share",
        ),
        (
            {"test_clients": ["p11"]},
            3,
            r"^test_clients: no client 'p11' in the data \(it has p0, p1, p2\); did you mean",
        ),
        (
            {"test_share": 0.0},
            0,
            r"^test_share: 0 of 100 rows is less than one row for the test set",
        ),
        ({"mean": [0.1, 0.2], "std": [1, 1]}, 0, r"^mean: 2 values for examples of 1 channels"),
    ],
)
def test_what_cannot_be_shared_out_is_refused_with_place_and_cure(keys, clients, message):
    with pytest.raises(DataError, match=message):
        split_rows(numbered(100, clients=clients), ask(**keys), 0)
