"""What an aggregator is: it combines the vectors of a round's clients into one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeAlias

from torch import Tensor

from fedpress.codecs import Bound, Key
from fedpress.core.canonical import JSON
from fedpress.core.names import ClientId
from fedpress.federation.exchange import Transport
from fedpress.federation.vector_codec import VectorCodec
from fedpress.federation.vectors import Vectors

Weights: TypeAlias = Literal["examples", "equal"]


@dataclass(frozen=True, eq=False)
class Contribution:
    """What one client contributes to an aggregate.

    Attributes:
        key: of this client in this round.
        weight: of the client in a mean.
        vectors: decoded and clipped to their bounds; empty for an aggregator that sees no single
            update.
        tensors: as they came, still masked in a secure sum.
        secure: header fields of the secure sum.
    """

    key: Key
    weight: float
    vectors: Vectors
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    secure: Mapping[str, JSON] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Total:
    """The result of an aggregate.

    Attributes:
        vectors: for each name a sum (or a centre, such as a median) in float64.
        weight: sum of the clients' weights; 0 if nothing came.
    """

    vectors: Vectors
    weight: float


class Gathering(Protocol):
    """One aggregate in the making: contributions are added one by one.

    Float sums depend on the order, so the same bits need the same order.
    """

    def add(self, contribution: Contribution) -> None:
        """Adds one contribution; WireError if it is refused, and then nothing has changed."""
        ...

    def close(self) -> Total:
        """Returns the aggregate; SecureError if there can be none."""
        ...


class Session(Protocol):
    """The server's side of the aggregates of one run."""

    def invite(self, cohort: Sequence[ClientId]) -> dict[str, JSON]:
        """Returns what a "fit" must say besides, so that the clients can contribute."""
        ...

    def begin(
        self, vector_codecs: Sequence[VectorCodec], cohort: Sequence[ClientId], key: Key
    ) -> Gathering:
        """Begins one aggregate.

        Args:
            vector_codecs: of the named vectors, the update first.
            cohort: who was asked.
            key: of the round; it decodes a sum.

        Raises:
            SecureError: if the clients of the cohort cannot be summed.
        """
        ...


class Aggregator(Protocol):
    """One row of the table; frozen, and alike on both sides."""

    @property
    def kind(self) -> str:
        """Name of the row."""
        ...

    @property
    def sees_updates(self) -> bool:
        """Whether the server sees single decoded updates; if not, it learns the aggregate alone."""
        ...

    @property
    def weights(self) -> Weights:
        """The finest weighting that it can do: "examples" (a number for each client) or "equal"."""
        ...

    @property
    def sums(self) -> bool:
        """Whether it returns a sum, to be divided by the weight; if not, a centre (a median)."""
        ...

    def sensitivity(self, moved: Bound, cohort: int) -> float | None:
        """Returns by how much one protected unit moves the aggregate, in L2; None if unbounded.

        Without a bound the aggregator is refused wherever noise on the aggregate must hide a unit.
        Noise in every vector before it is aggregated needs no bound here.

        Args:
            moved: by how much one protected unit moves one client's vector.
            cohort: number of clients in a round.
        """
        ...

    def check(self, vector_codecs: Sequence[VectorCodec]) -> None:
        """Raises RecipeError if it cannot aggregate what these codecs produce."""
        ...

    def open(self, transport: Transport | None, run: str) -> Session:
        """Sets up the aggregates of one run, named `run`."""
        ...
