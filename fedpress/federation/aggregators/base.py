"""The interface of an aggregator, which combines the vectors of a round's clients into one."""

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
"""How clients are weighed: by their numbers of examples, or all equally."""


@dataclass(frozen=True, eq=False)
class Contribution:
    """One client's vectors and weight, to be added to an aggregate.

    Attributes:
        key: key of this client in this round.
        weight: weight of the client in a mean.
        vectors: the decoded vectors, clipped to their bounds; empty in a secure sum.
        tensors: the tensors as they were received; in a secure sum they are masked.
        secure: header fields of the secure sum; empty for other aggregators.
    """

    key: Key
    weight: float
    vectors: Vectors
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    secure: Mapping[str, JSON] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Total:
    """The result of an aggregation.

    Attributes:
        vectors: for each name a sum (or a centre, such as a median), in float64.
        weight: sum of the clients' weights; 0 if there is no update.
    """

    vectors: Vectors
    weight: float


class Gathering(Protocol):
    """A running aggregate, to which contributions are added one by one.

    Float sums depend on the order: for the same bits, add in the same order.
    """

    def add(self, contribution: Contribution) -> None:
        """Adds one contribution; raises WireError if it is refused, and then adds nothing."""
        ...

    def close(self) -> Total:
        """Returns the aggregate; raises SecureError if it cannot be computed."""
        ...


class Session(Protocol):
    """The server's side of the aggregation in one run."""

    def invite(self, cohort: Sequence[ClientId]) -> dict[str, JSON]:
        """Returns extra header fields for the "fit" message, such as {"cohort": ["a", "b"]}."""
        ...

    def begin(
        self, vector_codecs: Sequence[VectorCodec], cohort: Sequence[ClientId], key: Key
    ) -> Gathering:
        """Starts the aggregate of one round.

        Args:
            vector_codecs: one per named vector, the update first.
            cohort: the clients that are asked.
            key: key of the round; needed to decode a secure sum.

        Raises:
            SecureError: if a secure sum over this cohort is not possible.
        """
        ...


class Aggregator(Protocol):
    """One row of the table of aggregators: frozen settings, equal on server and clients."""

    @property
    def kind(self) -> str:
        """Name of the row."""
        ...

    @property
    def sees_updates(self) -> bool:
        """Whether the server sees single updates; if not, it sees only the aggregate."""
        ...

    @property
    def weights(self) -> Weights:
        """Weights of clients that it supports: "examples" (any weights) or "equal" only."""
        ...

    @property
    def sums(self) -> bool:
        """Whether it returns a sum, which is divided afterwards, and not a centre (a median)."""
        ...

    def sensitivity(self, moved: Bound, cohort: int) -> float | None:
        """Returns the L2 sensitivity of the aggregate to one protected unit; None if unbounded.

        An aggregator without a sensitivity is refused if noise is added to the aggregate. It is
        allowed if each client adds noise to its own vector.

        Args:
            moved: bound on the change of one client's vector by one protected unit.
            cohort: number of clients in a round.
        """
        ...

    def check(self, vector_codecs: Sequence[VectorCodec]) -> None:
        """Raises RecipeError if it cannot aggregate what these codecs produce."""
        ...

    def open(self, transport: Transport | None, run: str) -> Session:
        """Starts the aggregation of the run named `run`; a secure sum exchanges keys here."""
        ...
