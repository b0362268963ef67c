"""Functions for dividing rows among clients: sizes, rounding to whole rows, and empty clients."""

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
    """The rows that are to be divided among clients.

    Attributes:
        labels: int64 [n]: class of each row, or another number that partitioners use as a class.
        owners: int64 [n]: the client to which a row naturally belongs, such as a hospital, as a
            position in `owner_names`; None if the data names no clients.
        owner_names: names of the natural clients.
        excluded: natural clients whose rows are all public, or all in the test set.
    """

    labels: Tensor
    owners: Tensor | None = None
    owner_names: tuple[str, ...] = ()
    excluded: frozenset[str] = frozenset()


@dataclass(frozen=True)
class PartitionSize:
    """The requested number of clients, and of rows for each client.

    Attributes:
        num_clients: number of clients; None: every natural client, or 10 clients if the data names
            none.
        examples_per_client: number of rows of each client; None: all rows are divided.
    """

    num_clients: int | None = None
    examples_per_client: int | None = None


def apportion(weights: np.ndarray, total: int) -> np.ndarray:
    """Returns integers [k] in proportion to `weights` [k] that sum to `total`.

    The numbers are rounded by the largest-remainder method.

    >>> apportion(np.array([1.0, 1.0, 1.0]), 4).tolist()
    [2, 1, 1]
    """
    exact = weights / weights.sum() * total
    counts: np.ndarray = np.floor(exact).astype(np.int64)
    # Largest remainders first. The sort is stable, so that all machines break ties alike.
    order = np.argsort(counts - exact, kind="stable")
    counts[order[: total - counts.sum()]] += 1
    return counts


def client_and_row_count(available: int, ask: PartitionSize) -> tuple[int, int]:
    """Returns the number of clients, and the number of rows for all clients together.

    Args:
        available: number of rows that can be divided.
        ask: the requested numbers.

    Raises:
        DataError: if there are too few rows.
    """
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


def by_client_name(rows: Sequence[Tensor]) -> dict[str, Tensor]:
    """Returns the rows of each client by name: c0, c1, ..."""
    return {f"c{i}": group for i, group in enumerate(rows)}


def numpy_generator(chance: RandomSource) -> np.random.Generator:
    """Returns a numpy generator with a key of 128 bits from `chance`, for Dirichlet samples."""
    return np.random.Generator(np.random.Philox(key=chance.words(2)))


def rows_by_class(labels: Tensor, chance: RandomSource) -> list[Tensor]:
    """Returns the shuffled row positions of each class that occurs."""
    order = chance.permutation(len(labels))
    # One permutation is enough: it also puts the rows of each class in random order.
    return [order[labels[order] == label] for label in labels.unique()]


def deal_counts(rows: list[Tensor], counts: np.ndarray) -> list[Tensor]:
    """Deals the rows of each class in order: client i gets `counts[i, c]` of `rows[c]`."""
    ends = counts.cumsum(axis=0)
    starts = ends - counts
    dealt = []
    for client in range(len(counts)):
        parts = []
        for label, group in enumerate(rows):
            parts.append(group[starts[client, label] : ends[client, label]])
        dealt.append(torch.cat(parts))
    return dealt


def fit_to_supply(mixes: np.ndarray, each: int, supply: np.ndarray) -> np.ndarray:
    """Converts class mixes to numbers of rows, without using more rows of a class than there are.

    If no row of a class is left, a client gets more rows of other classes.

    Args:
        mixes: [clients, classes]: shares of the classes that each client wants.
        each: number of rows of each client.
        supply: [classes]: number of rows that each class has.

    Returns:
        int64 [clients, classes]; each row sums to `each`.
    """
    left = supply.copy()
    counts = np.zeros(mixes.shape, dtype=np.int64)
    for client, mix in enumerate(mixes):
        # Each round fills the client or uses up a class, so the loop ends.
        while (missing := each - counts[client].sum()) > 0:
            # The small addition keeps the weights above 0 when all classes of the mix have run out.
            weights = np.where(left > 0, mix + 1e-9 * supply / supply.sum(), 0.0)
            got = np.minimum(apportion(weights, missing), left)
            counts[client] += got
            left -= got
    return counts


def fill_empty_clients(rows: list[Tensor]) -> list[Tensor]:
    """Moves one row of the largest client to each client without rows."""
    rows = list(rows)
    for i, group in enumerate(rows):
        # A client without rows could not take part.
        if len(group) == 0:
            largest = max(range(len(rows)), key=lambda j: len(rows[j]))
            rows[i], rows[largest] = rows[largest][-1:], rows[largest][:-1]
    return rows
