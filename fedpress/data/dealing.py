"""The arithmetic of partitioners: what is dealt, what is asked for, and whole numbers that add up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedpress.core.random_source import RandomSource
from fedpress.errors import DataError


@dataclass(frozen=True)
class Pool:
    """Rows to be dealt: int64 `labels` [n] and, where the data knows, the natural client of each row.

    Attributes:
        labels: int64 [n].
        owners: int64 [n] positions in `owner_names`, or None.
        owner_names: names of the natural clients.
        closed: natural clients that hold nothing here (declared public or test).
    """

    labels: Tensor
    owners: Tensor | None = None
    owner_names: tuple[str, ...] = ()
    closed: frozenset[str] = frozenset()


@dataclass(frozen=True)
class PartitionSize:
    """How much is asked for; None means every natural client (or 10), and all rows."""

    num_clients: int | None = None
    examples_per_client: int | None = None


def apportion(weights: np.ndarray, total: int) -> np.ndarray:
    """Returns whole numbers [k] that sum to `total`, in proportion to `weights` [k], by largest remainder.

    >>> apportion(np.array([1.0, 1.0, 1.0]), 4).tolist()
    [2, 1, 1]
    """
    exact = weights / weights.sum() * total
    counts: np.ndarray = np.floor(exact).astype(np.int64)
    order = np.argsort(counts - exact, kind="stable")
    counts[order[: total - counts.sum()]] += 1
    return counts


def totals(available: int, ask: PartitionSize) -> tuple[int, int]:
    """Returns the number of clients and of rows for all of them, or says why there are too few rows."""
    clients = 10 if ask.num_clients is None else ask.num_clients
    each = ask.examples_per_client
    total = available if each is None else clients * each
    if total > available:
        raise DataError(
            (
                f"asked for {clients} clients of {each} examples = {total} examples, but only "
                f"{available} are left for clients"
            ),
            place="examples_per_client",
            cure="lower num_clients, examples_per_client, public_share or test_share",
        )
    if clients > total:
        raise DataError(
            f"asked for {clients} clients, but only {total} examples are left for them",
            place="num_clients",
            cure="lower num_clients",
        )
    return clients, total


def named(rows: Sequence[Tensor]) -> dict[str, Tensor]:
    """Returns the rows of clients c0, c1, ..."""
    return {f"c{i}": group for i, group in enumerate(rows)}


def numpy_generator(chance: RandomSource) -> np.random.Generator:
    """Returns numpy's generator, which has the Dirichlet distribution, with a key of 128 bits from `chance`."""
    return np.random.Generator(np.random.Philox(key=chance.words(2)))


def rows_by_class(labels: Tensor, chance: RandomSource) -> list[Tensor]:
    """Returns the shuffled row positions of each class that occurs."""
    order = chance.permutation(len(labels))
    return [order[labels[order] == label] for label in labels.unique()]


def take(rows: list[Tensor], counts: np.ndarray) -> list[Tensor]:
    """Takes `counts` [clients, classes] rows from the front of each class, client after client."""
    ends = counts.cumsum(axis=0)
    starts = ends - counts
    return [
        torch.cat([group[starts[i, c] : ends[i, c]] for c, group in enumerate(rows)])
        for i in range(len(counts))
    ]


def fit_to_supply(mixes: np.ndarray, each: int, supply: np.ndarray) -> np.ndarray:
    """Turns class mixes [clients, classes] into counts of `each` rows; a class that runs out is replaced by others."""
    left = supply.copy()
    counts = np.zeros(mixes.shape, dtype=np.int64)
    for client, mix in enumerate(mixes):
        while (missing := each - counts[client].sum()) > 0:
            weights = np.where(
                left > 0, mix + 1e-9 * supply / supply.sum(), 0.0
            )  # also if the mix has run dry
            got = np.minimum(apportion(weights, missing), left)
            counts[client] += got
            left -= got
    return counts


def fill_empty_clients(rows: list[Tensor]) -> list[Tensor]:
    """Gives each empty client one row of the largest one."""
    rows = list(rows)
    for i, group in enumerate(rows):
        if len(group) == 0:
            largest = max(range(len(rows)), key=lambda j: len(rows[j]))
            rows[i], rows[largest] = rows[largest][-1:], rows[largest][:-1]
    return rows
