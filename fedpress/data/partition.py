"""The ways to divide rows among clients, such as "iid" or "dirichlet"; each is a settings class.

The method `deal` of each class divides the rows of `pool` into as many clients and rows as `ask`
requests; random numbers come from `chance`.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import BaseModel, BeforeValidator, Field
from torch import Tensor

from fedpress.core.random_source import RandomSource
from fedpress.data.dealing import (
    PartitionSize,
    Pool,
    apportion,
    by_client_name,
    client_and_row_count,
    deal_counts,
    fill_empty_clients,
    fit_to_supply,
    numpy_generator,
    rows_by_class,
)
from fedpress.errors import Argument, DataError, SettingError, suggestion


class _Settings(BaseModel, frozen=True, extra="forbid"):
    # Whether rows without a client become the public part if the recipe declares no public rows.
    rest_is_public: ClassVar[bool] = True


class Iid(_Settings, frozen=True):
    """Random samples whose sizes differ by one row at most."""

    kind: Literal["iid"] = "iid"

    def deal(self, pool: Pool, ask: PartitionSize, chance: RandomSource) -> dict[str, Tensor]:
        """Returns row positions by client."""
        clients, total = client_and_row_count(len(pool.labels), ask)
        rows = chance.permutation(len(pool.labels))[:total]
        return by_client_name(rows.tensor_split(clients))


class Quantity(_Settings, frozen=True):
    """Random samples of unequal sizes: the i-th largest is about proportional to `i ** -skew`.

    Every client has at least one row. `examples_per_client` is the mean size. A skew
    of 0 is iid; a skew of 1 follows Zipf's law.
    """

    kind: Literal["quantity"] = "quantity"
    skew: float = Field(
        default=1.0,
        ge=0,
        le=10,
        description="how unequal the clients' numbers of rows are; 0 = equal",
    )

    def deal(self, pool: Pool, ask: PartitionSize, chance: RandomSource) -> dict[str, Tensor]:
        """Returns row positions by client."""
        clients, total = client_and_row_count(len(pool.labels), ask)
        weights = np.arange(1, clients + 1, dtype=np.float64) ** -self.skew
        # Shuffled, so that the first client is not always the largest.
        shuffled = weights[chance.permutation(clients).numpy()]
        # Each client first gets one row, because an empty client cannot take part.
        sizes = 1 + apportion(shuffled, total - clients)
        rows = chance.permutation(len(pool.labels))[:total]
        return by_client_name(rows.split(sizes.tolist()))


class Dirichlet(_Settings, frozen=True):
    """Label skew: class shares are drawn from Dirichlet(alpha).

    With a small alpha each client has few classes. With `examples_per_client`, each client draws
    its own mix of classes, and has exactly this number of rows (Hsu et al. 2019, "Measuring the
    effects of non-identical data distribution", section 3). Without it, the rows of each class are
    divided among the clients by shares that are drawn for the class. Then the clients' sizes differ
    too (Yurochkin et al. 2019, section 4).
    """

    kind: Literal["dirichlet"] = "dirichlet"
    alpha: float = Field(
        default=0.5,
        gt=0,
        le=1e6,
        description="concentration of the Dirichlet distribution; with a small alpha each client "
        "holds few classes",
    )

    def deal(self, pool: Pool, ask: PartitionSize, chance: RandomSource) -> dict[str, Tensor]:
        """Returns row positions by client."""
        clients, _ = client_and_row_count(len(pool.labels), ask)
        rng = numpy_generator(chance)
        rows = rows_by_class(pool.labels, chance)
        if ask.examples_per_client is None:
            shares = []
            for group in rows:
                drawn = rng.dirichlet(np.full(clients, self.alpha))
                shares.append(apportion(drawn, len(group)))
            counts = np.stack(shares, axis=1)
        else:
            # The drawn mixes may need more rows of a class than there are.
            mixes = rng.dirichlet(np.full(len(rows), self.alpha), size=clients)
            supply = np.array([len(group) for group in rows])
            counts = fit_to_supply(mixes, ask.examples_per_client, supply)
        return by_client_name(fill_empty_clients(deal_counts(rows, counts)))


class Shards(_Settings, frozen=True):
    """Every client has rows of `classes_per_client` classes.

    With `examples_per_client`, a client has equally many rows of each of its classes. Without it,
    the clients that hold a class share all rows of the class evenly.

    This is the "pathological non-iid" split of McMahan et al. 2017, section 3, with one difference:
    no shard has rows of two classes.
    """

    kind: Literal["shards"] = "shards"
    classes_per_client: int = Field(default=2, ge=1, description="classes that each client holds")

    def deal(self, pool: Pool, ask: PartitionSize, chance: RandomSource) -> dict[str, Tensor]:
        """Returns row positions by client."""
        clients, _ = client_and_row_count(len(pool.labels), ask)
        rows = rows_by_class(pool.labels, chance)
        holds = self._choose_classes(clients, len(rows), chance)
        supply = np.array([len(group) for group in rows])
        counts = np.zeros((clients, len(rows)), dtype=np.int64)
        if ask.examples_per_client is None:
            # Every row must be dealt, so every class needs a client.
            if not holds.any(axis=0).all():
                raise DataError(
                    (
                        f"{clients} clients of {self.classes_per_client} classes cannot hold all "
                        f"{len(rows)} classes"
                    ),
                    place="partition 'shards'",
                    cure="raise classes_per_client or num_clients, or give examples_per_client",
                )
            for label in range(len(rows)):
                holders = np.ones(holds[:, label].sum())
                counts[holds[:, label], label] = apportion(holders, supply[label])
        else:
            for client in range(clients):
                own_classes = np.ones(holds[client].sum())
                counts[client, holds[client]] = apportion(own_classes, ask.examples_per_client)
        self._check(counts, holds, supply)
        return by_client_name(deal_counts(rows, counts))

    def _choose_classes(self, clients: int, classes: int, chance: RandomSource) -> np.ndarray:
        """Returns bool [clients, classes]: which classes each client holds.

        The clients choose one after another. Each takes the classes that the fewest clients hold so
        far; ties are broken at random.
        """
        if self.classes_per_client > classes:
            raise DataError(
                (
                    f"asked for {self.classes_per_client} classes per client but there are only "
                    f"{classes}"
                ),
                place="partition 'shards'",
                cure="lower classes_per_client",
            )
        holds = np.zeros((clients, classes), dtype=bool)
        for client in range(clients):
            tie = chance.permutation(classes).numpy()
            # lexsort sorts by its last key first: by holders, then at random.
            order = np.lexsort((tie, holds.sum(axis=0)))
            holds[client, order[: self.classes_per_client]] = True
        return holds

    def _check(self, counts: np.ndarray, holds: np.ndarray, supply: np.ndarray) -> None:
        """Checks that the supply of each class is enough, and that every held class gets a row."""
        # A client needs at least one row of every class that it holds.
        demand = np.maximum(counts, holds).sum(axis=0)
        # Only the first such class, because an error names one mistake.
        for label in np.flatnonzero(demand > supply)[:1]:
            raise DataError(
                (
                    f"{holds[:, label].sum()} clients need {demand[label]} examples of the class "
                    f"at place {label} but there are only {supply[label]}"
                ),
                place="partition 'shards'",
                cure="lower examples_per_client or num_clients",
            )
        if (counts.sum(axis=1) < self.classes_per_client).any():
            raise DataError(
                (
                    f"{counts.sum(axis=1).min()} examples cannot show {self.classes_per_client} "
                    "classes"
                ),
                place="partition 'shards'",
                cure="raise examples_per_client",
            )


class Natural(_Settings, frozen=True):
    """Every client is one natural client of the data: a person, a hospital, a folder.

    `num_clients` natural clients are chosen at random, by default all. At most
    `examples_per_client` rows of each are used. The other rows are not used. They must not become
    public, because they belong to a natural client.
    """

    kind: Literal["natural"] = "natural"
    rest_is_public: ClassVar[bool] = False

    def deal(self, pool: Pool, ask: PartitionSize, chance: RandomSource) -> dict[str, Tensor]:
        """Returns row positions by client, in the order of `pool.owner_names`."""
        if pool.owners is None:
            raise DataError(
                "the data does not name its clients",
                place="partition 'natural'",
                cure="give client_column, or choose 'iid', 'dirichlet', 'shards' or 'quantity'",
            )
        names = [name for name in pool.owner_names if name not in pool.excluded]
        if ask.num_clients is not None and ask.num_clients > len(names):
            raise DataError(
                f"asked for {ask.num_clients} clients but the data has only {len(names)}",
                place="num_clients",
                cure=("give at most ", Argument("num_clients", len(names))),
            )
        count = len(names) if ask.num_clients is None else ask.num_clients
        chosen = chance.subset(len(names), count).tolist()
        dealt = {}
        for position in chosen:
            name = names[position]
            rows = torch.nonzero(pool.owners == pool.owner_names.index(name)).flatten()
            if len(rows) == 0:
                raise DataError(
                    "no row is left for training",
                    place=f"client '{name}'",
                    cure="lower test_share or public_share, or leave this client out",
                )
            # Shuffled, because the rows of a file may be sorted by date or label.
            dealt[name] = rows[chance.permutation(len(rows))][: ask.examples_per_client]
        return dealt


def _from_word(value: object) -> object:
    """Turns `partition = "iid"` into `partition = {kind = "iid"}`."""
    if isinstance(value, str):
        value = {"kind": value}
    kinds = ["iid", "quantity", "dirichlet", "shards", "natural"]
    if isinstance(value, dict) and (kind := value.get("kind", kinds[0])) not in kinds:
        raise SettingError(
            f"no partition of kind '{kind}' (known: {', '.join(kinds)})",
            cure=suggestion(str(kind), kinds, "choose one of them"),
        )
    return value


Partition = Annotated[
    Annotated[Iid | Quantity | Dirichlet | Shards | Natural, Field(discriminator="kind")],
    BeforeValidator(_from_word),
]
"""Type of the setting `partition`: a word such as "iid", or a table with `kind` and options."""
