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
        key: seeds the client's random streams of this round; it contains the client's name.
        weight: weight of the client in a mean.
        vectors: name -> decoded vector, clipped to its bound; empty in a secure sum.
        tensors: the received tensors, still encoded; in a secure sum they are masked.
        secure: header fields of the secure sum; empty for other aggregators.
        position: number of earlier answers in this round, used or not.
        unmade: see `fedpress.wire.message.Message`.
    """

    key: Key
    weight: float
    vectors: Vectors
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    secure: Mapping[str, JSON] = field(default_factory=dict)
    position: int = 0
    unmade: Mapping[str, int | Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Total:
    """The result of an aggregation.

    Attributes:
        vectors: name -> sum of this vector over the clients, or a centre such as their median, in
            float64.
        weight: sum of the clients' weights; 0 if there is no update.
    """

    vectors: Vectors
    weight: float


class Gathering(Protocol):
    """The aggregate of one round, to which contributions are added one by one.

    Float sums depend on the order: for the same bits, add in the same order.
    """

    def add(self, contribution: Contribution) -> None:
        """Adds one contribution.

        Raises:
            WireError: if the contribution is refused; then nothing was added.
        """
        ...

    def close(self) -> Total:
        """Returns the aggregate.

        Raises:
            SecureError: if the aggregate cannot be computed.
        """
        ...


class PartialSum(Gathering, Protocol):
    """An aggregate to which also the sum over several clients can be added."""

    def merge(self, part: Total, position: int, clients: int) -> None:
        """Adds the sum over clients of one block.

        Args:
            part: the sum.
            position: position of the first one (see `Contribution`).
            clients: number of these clients, those whose answers were not used among them.
        """
        ...


class Session(Protocol):
    """The server's side of the aggregation in one run: starts an aggregate in each round."""

    def invite(self, cohort: Sequence[ClientId]) -> dict[str, JSON]:
        """Returns further header fields for the training request ("fit") to a cohort.

        Example: a secure sum returns {"cohort": ["a", "b"]}.
        """
        ...

    def begin(
        self, vector_codecs: Sequence[VectorCodec], cohort: Sequence[ClientId], key: Key
    ) -> Gathering:
        """Starts the aggregate of one round.

        Args:
            vector_codecs: one codec for each vector that a client sends; the first is the update's.
            cohort: the clients that are asked.
            key: seeds the server's random streams of this round, with which a secure sum is
                decoded.

        Raises:
            SecureError: if a secure sum over this cohort is not possible.
        """
        ...


class Aggregator(Protocol):
    """Settings of an aggregator, such as `Mean`; equal on server and clients, and immutable."""

    @property
    def kind(self) -> str:
        """Name of the aggregator in a recipe, such as "mean"."""
        ...

    @property
    def sees_updates(self) -> bool:
        """Whether the server sees single updates; if not, it sees only the aggregate."""
        ...

    @property
    def weights(self) -> Weights:
        """Either "equal": all clients must have the same weight; or "examples": any weights."""
        ...

    @property
    def sums(self) -> bool:
        """True if the result is a sum, which is divided later; False for a centre (a median)."""
        ...

    def sensitivity(self, moved: Bound, cohort: int) -> float | None:
        """Returns the L2 sensitivity of the aggregate to one protected unit; None if unbounded.

        An aggregator without a sensitivity is refused if noise is added to the aggregate. It is
        allowed if each client adds noise to its own vector.

        Args:
            moved: bound on how far one protected unit (example or client) moves a client's vector.
            cohort: number of clients in a round.
        """
        ...

    def part(self, vector_codecs: Sequence[VectorCodec]) -> PartialSum | None:
        """Returns an empty sum over some clients of a cohort, to be merged into that of the cohort.

        None if all updates are needed together. A round then takes memory for each of them, or
        exchanges messages with the clients.
        """
        ...

    def check(self, vector_codecs: Sequence[VectorCodec]) -> None:
        """Checks that vectors with these codecs can be aggregated.

        Raises:
            RecipeError: if they cannot.
        """
        ...

    def open(self, transport: Transport | None, run: str) -> Session:
        """Starts the aggregation of a run; a secure sum exchanges keys with the clients here.

        Args:
            transport: carries messages to the clients; None if the aggregator sends none.
            run: name of the run.

        Raises:
            SecureError: if a secure sum is not possible, for instance with too few clients.
        """
        ...
