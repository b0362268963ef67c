"""What an aggregator is: how the server makes one vector of what the clients of a round sent."""

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
    """What one client gives to an aggregate.

    Attributes:
        key: of this client in this round.
        weight: of the client in a mean.
        vectors: decoded and within their promises; empty for an aggregator that sees no single
            update.
        tensors: as they came.
        secure: what the client says for a secure sum.
    """

    key: Key
    weight: float
    vectors: Vectors
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    secure: Mapping[str, JSON] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Total:
    """What came out: for each name a sum (or a centre) in float64, and the weight behind it, 0 if nothing came."""

    vectors: Vectors
    weight: float


class Gathering(Protocol):
    """One aggregate as it grows: contributions come one after another, always in the same order for the same bits."""

    def add(self, contribution: Contribution) -> None:
        """Takes one more; WireError if it is refused, and then it moved nothing."""
        ...

    def close(self) -> Total:
        """Returns the aggregate; SecureError if there can be none."""
        ...


class Session(Protocol):
    """The server's side of the aggregates of one run."""

    def invite(self, cohort: Sequence[ClientId]) -> dict[str, JSON]:
        """Returns what a request says besides, so that the clients of `cohort` can send what is aggregated here."""
        ...

    def begin(
        self, vector_codecs: Sequence[VectorCodec], cohort: Sequence[ClientId], key: Key
    ) -> Gathering:
        """Begins one aggregate of vectors that travel on `vector_codecs`.

        Args:
            vector_codecs: the named vectors, the update first.
            cohort: who was asked.
            key: of the round, for decoding a sum.

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
        """Whether it works on single decoded updates; else the server learns the aggregate alone."""
        ...

    @property
    def weights(self) -> Weights:
        """The finest weighting that it can do: "examples" (a number for each client) or "equal"."""
        ...

    @property
    def sums(self) -> bool:
        """Whether it gives a sum, which is divided afterwards; else a centre, such as a median, that stays."""
        ...

    def sensitivity(self, moved: Bound, cohort: int) -> float | None:
        """Returns the L2 distance by which one protected unit moves the aggregate of a `cohort`; None: no promise.

        `moved` says how far one protected unit moves one client's vector. Without a promise it is
        refused wherever noise on the aggregate must hide a unit; noise in every vector before it is
        aggregated needs no promise.
        """
        ...

    def check(self, vector_codecs: Sequence[VectorCodec]) -> None:
        """Raises RecipeError if it cannot aggregate what the codecs of `vector_codecs` make."""
        ...

    def open(self, transport: Transport | None, run: str) -> Session:
        """Sets up the aggregates of one run, named `run`."""
        ...
