import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from fedpress.core.random_source import public_stream
from fedpress.data.dealing import PartitionSize, Pool, apportion
from fedpress.data.partition import Dirichlet, Iid, Natural, Partition, Quantity, Shards
from fedpress.errors import DataError

BY_LABEL = [
    Iid(),
    Quantity(skew=0.0),
    Quantity(skew=2.0),
    Dirichlet(alpha=1e-3),
    Dirichlet(alpha=0.5),
    Dirichlet(alpha=1e4),
]


def labels_of(counts: list[int]) -> torch.Tensor:
    labels = torch.cat([torch.full((count,), label) for label, count in enumerate(counts)])
    return labels[public_stream(0).permutation(len(labels))]


counts = st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(lambda counts: sum(counts) > 0)


@pytest.mark.parametrize("partition", BY_LABEL, ids=repr)
@settings(max_examples=30, deadline=None)
@given(counts=counts, clients=st.integers(1, 12), seed=st.integers(0, 1000))
def test_all_rows_go_to_exactly_one_client_and_none_is_empty(partition, counts, clients, seed):
    labels = labels_of(counts)
    if clients > len(labels):
        with pytest.raises(DataError, match=r"lower num_clients"):
            partition.deal(Pool(labels), PartitionSize(clients), public_stream(seed))
        return
    dealt = partition.deal(Pool(labels), PartitionSize(clients), public_stream(seed))
    assert list(dealt) == [f"c{i}" for i in range(clients)]
    assert all(len(rows) > 0 for rows in dealt.values())
    assert torch.cat(list(dealt.values())).sort().values.tolist() == list(range(len(labels)))


@pytest.mark.parametrize("partition", BY_LABEL, ids=repr)
@settings(max_examples=30, deadline=None)
@given(counts=counts, clients=st.integers(1, 8), each=st.integers(1, 20), seed=st.integers(0, 1000))
def test_examples_per_client_is_met_or_refused_with_the_numbers(
    partition, counts, clients, each, seed
):
    labels = labels_of(counts)
    if clients * each > len(labels):
        with pytest.raises(
            DataError,
            match=f"{clients} clients of {each} examples = {clients * each} .* {len(labels)} ",
        ):
            partition.deal(Pool(labels), PartitionSize(clients, each), public_stream(seed))
        return
    rows = list(
        partition.deal(Pool(labels), PartitionSize(clients, each), public_stream(seed)).values()
    )
    together = torch.cat(rows)
    assert len(together) == len(together.unique()) == clients * each
    assert together.min() >= 0
    assert together.max() < len(labels)
    if not isinstance(partition, Quantity):
        assert [len(group) for group in rows] == [each] * clients


@settings(max_examples=60, deadline=None)
@given(
    classes=st.integers(1, 6),
    clients=st.integers(1, 10),
    k=st.integers(1, 7),
    each=st.none() | st.integers(1, 30),
    seed=st.integers(0, 1000),
)
def test_shards_give_every_client_exactly_k_classes_or_say_why_not(classes, clients, k, each, seed):
    labels = labels_of([40] * classes)
    try:
        dealt = Shards(classes_per_client=k).deal(
            Pool(labels), PartitionSize(clients, each), public_stream(seed)
        )
    except DataError as error:
        too_many = (
            k > classes
            or (each is not None and each < k)
            or (each is None and clients * k < classes)
        )
        holders = -(-clients * k // classes)  # of the most wanted class
        short = each is not None and (holders * -(-each // k) > 40 or clients * each > 40 * classes)
        assert too_many or short, error  # noqa: PT017
        return
    rows = torch.cat(list(dealt.values()))
    assert len(rows) == len(rows.unique()) == (40 * classes if each is None else clients * each)
    assert all(len(labels[group].unique()) == k for group in dealt.values())
    if each is not None:
        assert all(len(group) == each for group in dealt.values())


@pytest.mark.parametrize("partition", [*BY_LABEL, Shards(classes_per_client=2)], ids=repr)
def test_the_same_seed_deals_the_same_rows_and_another_does_not(partition):
    pool = Pool(labels_of([50, 50, 50]))
    first, again, other = (
        partition.deal(pool, PartitionSize(5), public_stream(seed)) for seed in (1, 1, 2)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_small_alpha_means_few_classes_and_large_alpha_means_the_classes_of_all():
    pool = Pool(labels_of([500] * 10))

    def largest_share(alpha: float, each: int | None) -> float:
        dealt = Dirichlet(alpha=alpha).deal(pool, PartitionSize(10, each), public_stream(0))
        return float(
            np.mean([pool.labels[rows].bincount().max() / len(rows) for rows in dealt.values()])
        )

    for each in (None, 100):
        assert largest_share(0.01, each) > 0.6
        assert largest_share(1e5, each) < 0.15


def test_quantity_skew_one_follows_zipf():
    sizes = sorted(
        len(rows)
        for rows in Quantity(skew=1.0)
        .deal(Pool(labels_of([1100])), PartitionSize(4), public_stream(0))
        .values()
    )
    assert np.allclose(sizes[::-1], np.array([12, 6, 4, 3]) / 25 * 1100, atol=3)


def test_shards_without_room_for_all_classes_say_how_to_make_room():
    with pytest.raises(
        DataError, match=r"3 clients of 2 classes cannot hold all 10 classes; raise"
    ):
        Shards(classes_per_client=2).deal(
            Pool(labels_of([5] * 10)), PartitionSize(3), public_stream(0)
        )
    with pytest.raises(DataError, match=r"asked for 11 classes per client but there are only 10"):
        Shards(classes_per_client=11).deal(
            Pool(labels_of([50] * 10)), PartitionSize(3), public_stream(0)
        )
    with pytest.raises(
        DataError, match=r"2 clients need 10 examples of the class .* there are only 8"
    ):
        Shards(classes_per_client=2).deal(
            Pool(labels_of([8, 12])), PartitionSize(2, 10), public_stream(0)
        )


NATURAL = Pool(
    torch.zeros(6, dtype=torch.int64), torch.tensor([2, 0, 2, 0, 1, 2]), ("ann", "bob", "cleo")
)


def test_natural_clients_hold_their_own_rows():
    dealt = Natural().deal(NATURAL, PartitionSize(), public_stream(0))
    assert {name: sorted(rows.tolist()) for name, rows in dealt.items()} == {
        "ann": [1, 3],
        "bob": [4],
        "cleo": [0, 2, 5],
    }


def test_natural_can_choose_clients_and_cap_their_rows():
    dealt = Natural().deal(NATURAL, PartitionSize(2, 1), public_stream(0))
    assert len(dealt) == 2
    assert all(len(rows) == 1 for rows in dealt.values())
    chosen = {
        tuple(Natural().deal(NATURAL, PartitionSize(1), public_stream(seed))) for seed in range(20)
    }
    assert chosen == {("ann",), ("bob",), ("cleo",)}


def test_natural_refuses_data_without_clients_too_few_clients_and_empty_ones():
    with pytest.raises(DataError, match=r"does not name its clients; give client_column"):
        Natural().deal(Pool(torch.zeros(3)), PartitionSize(), public_stream(0))
    with pytest.raises(
        DataError, match=r"^num_clients: asked for 4 .* only 3; give at most num_clients=3"
    ):
        Natural().deal(NATURAL, PartitionSize(4), public_stream(0))
    empty = Pool(torch.zeros(1, dtype=torch.int64), torch.tensor([0]), ("ann", "bob"))
    with pytest.raises(DataError, match=r"client 'bob': no row is left"):
        Natural().deal(empty, PartitionSize(), public_stream(0))


@settings(max_examples=50, deadline=None)
@given(
    weights=st.lists(st.floats(0, 1e6), min_size=1, max_size=9).filter(lambda w: sum(w) > 1e-3),
    total=st.integers(0, 999),
)
def test_apportion_keeps_the_total_and_is_within_one_of_the_exact_share(weights, total):
    weights = np.array(weights)
    got = apportion(weights, total)
    assert got.sum() == total
    assert (np.abs(got - weights / weights.sum() * total) < 1 + 1e-6).all()


def test_a_partition_is_a_word_or_a_table_and_a_wrong_word_gets_a_suggestion():
    adapter = TypeAdapter(Partition)
    assert adapter.validate_python("iid") == Iid()
    assert adapter.validate_python({"kind": "dirichlet", "alpha": 0.1}) == Dirichlet(alpha=0.1)
    with pytest.raises(
        ValidationError, match=r"no partition of kind 'dirichle' .* did you mean 'dirichlet'"
    ):
        adapter.validate_python("dirichle")
    with pytest.raises(ValidationError, match=r"greater than 0"):
        adapter.validate_python({"kind": "dirichlet", "alpha": 0})
