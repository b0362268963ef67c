"""The public side of a secure sum: the roster of a run, graph and committee of each round."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache

import numpy as np

from fedpress.errors import WireError
from fedpress.secagg import graph
from fedpress.secagg.keys import SIGNATURE, TAG, can_agree, derive, digest, verify
from fedpress.secagg.message import JSON, SecAggMessage, as_tensor, read_bytes, read_names
from fedpress.secagg.plan import SecurePlan

SEED = 16
"""Bytes of a mask's seed, and of the commitment to it."""


@dataclass(frozen=True)
class SecAggSetup:
    """What is agreed before the run.

    Attributes:
        plan: cohort, bits, drop-outs and corrupt clients.
        identities: the identity key of every client by its name.
        run: name of the run.
    """

    plan: SecurePlan
    identities: Mapping[str, bytes]
    run: str

    def signed(self, name: str, signature: bytes, *words: str | int | bytes) -> bool:
        """Says whether `name` signed `words` in this run and under this plan."""
        known = self.identities.get(name)
        return known is not None and verify(known, signature, *self.words, *words)

    @cached_property
    def words(self) -> tuple[str, str]:
        """The beginning of everything that is signed: a signature fits no other run or plan."""
        return self.run, json.dumps(asdict(self.plan), sort_keys=True)


@dataclass(frozen=True)
class Roster:
    """The key of every client for the run, signed by it, sorted by name.

    Attributes:
        names: names of the clients.
        keys: X25519 public key [32] of each.
        signatures: signature [64] of each on its key.
    """

    names: tuple[str, ...]
    keys: tuple[bytes, ...]
    signatures: tuple[bytes, ...]

    @classmethod
    def from_message(cls, message: SecAggMessage, setup: SecAggSetup) -> Roster:
        """Reads and checks a roster.

        Raises:
            WireError: if a name is unknown or listed twice, a signature is not by its owner, two
                keys are equal, or no secret can be agreed on with a key.
        """
        names = read_names(message, "names", "roster")
        keys = read_bytes(message, "keys", (len(names), 32), "roster")
        signatures = read_bytes(message, "signatures", (len(names), SIGNATURE), "roster")
        identities = tuple(setup.identities.items())
        return _checked_roster(
            tuple(names), keys.tobytes(), signatures.tobytes(), setup.plan, identities, setup.run
        )

    def to_message(self) -> SecAggMessage:
        """Returns the roster as it is sent."""
        keys = as_tensor(b"".join(self.keys)).view(-1, 32)
        signatures = as_tensor(b"".join(self.signatures)).view(-1, SIGNATURE)
        return SecAggMessage({"names": list(self.names)}, {"keys": keys, "signatures": signatures})

    @cached_property
    def digest(self) -> bytes:
        """Digest of names and keys."""
        return digest("roster", *self.names, *self.keys)

    @cached_property
    def rows(self) -> list[JSON]:
        """Name, key and signature of each client as JSON; all callers share this list."""
        rows: list[JSON] = []
        for name, key, signature in zip(self.names, self.keys, self.signatures, strict=True):
            rows.append([name, key.hex(), signature.hex()])
        return rows

    @cached_property
    def key_of(self) -> dict[str, bytes]:
        """The key of each client by its name."""
        return dict(zip(self.names, self.keys, strict=True))


@lru_cache(maxsize=4)
def _checked_roster(
    names: tuple[str, ...],
    keys: bytes,
    signatures: bytes,
    plan: SecurePlan,
    identities: tuple[tuple[str, bytes], ...],
    run: str,
) -> Roster:
    """Checks a roster, once for all clients of one process.

    The arguments are all that the result depends on, and all of it is public, so the cache cannot
    mix up two clients' views. In a simulation of 1,000 clients each would check the same 1,000
    signatures.
    """
    # One order, so that all clients compute the same digest.
    if sorted(set(names)) != list(names):
        raise WireError(
            "expected different names in order",
            place="roster.names",
            cure="send each client once",
        )
    roster = Roster(names, _rows(keys, 32), _rows(signatures, SIGNATURE))
    # With the key of another client, one could pass as the other end of its pairwise masks.
    if len(set(roster.keys)) != len(names):
        raise WireError(
            "two clients have the same key", place="roster.keys", cure="send each client's own"
        )
    setup = SecAggSetup(plan, dict(identities), run)
    for name, key, signature in zip(names, roster.keys, roster.signatures, strict=True):
        # A server that replaces a key by its own could compute all masks of that client.
        if not setup.signed(name, signature, "join", name, key):
            raise WireError(
                f"the key of {name!r} is not signed by it",
                place="roster.signatures",
                cure="send what it sent to join",
            )
        if not can_agree(key):
            raise WireError(
                f"no secret can be agreed on with the key of {name!r}",
                place="roster.keys",
                cure="leave this client out",
            )
    return roster


def _rows(data: bytes, size: int) -> tuple[bytes, ...]:
    return tuple(data[at : at + size] for at in range(0, len(data), size))


@dataclass(frozen=True)
class PublicRound:
    """What server and clients both compute about one round.

    Attributes:
        number: number of the round.
        names: names of the cohort, sorted. Clients are numbered by their place in it.
        size: number of values in each vector.
        context: 32-byte digest of all that this round is about.
        plan: the plan of the run.
    """

    number: int
    names: tuple[str, ...]
    size: int
    context: bytes
    plan: SecurePlan

    @classmethod
    def of(
        cls, setup: SecAggSetup, roster: Roster, number: int, cohort: Sequence[str], size: int
    ) -> PublicRound:
        """Returns the round of this `number`, cohort and vector size.

        Raises:
            WireError: if the cohort is not of the planned size, or a client is not in the roster.
        """
        # Sorted, so that the order in which a server lists the cohort changes nothing.
        names = tuple(sorted(cohort))
        if len(names) != setup.plan.cohort or len(set(names)) != len(names):
            raise WireError(
                f"got {len(set(names))} clients, expected {setup.plan.cohort} different ones",
                place="round.cohort",
            )
        strangers = set(names).difference(roster.names)
        if strangers:
            raise WireError(
                f"{min(strangers)!r} is not in the roster",
                place="round.cohort",
                cure="ask only clients that joined",
            )
        # All keys of the round are derived with this digest. A message about another run, plan,
        # roster, round, size or cohort therefore cannot be decrypted or verified in this one.
        context = digest("round", *setup.words, roster.digest, number, size, *names)
        return cls(number, names, size, context, setup.plan)

    @cached_property
    def edges(self) -> np.ndarray:
        """Which clients mask with which, bool [cohort, cohort]."""
        # Drawn from a digest of the whole cohort: a client cannot choose its neighbours, and the
        # server can only draw another graph by asking another cohort.
        return graph.edges(derive(self.context, "graph"), len(self.names), self.plan.edge_prob)

    @cached_property
    def committee(self) -> tuple[int, ...]:
        """Numbers of the clients that hold shares; the member at place k has the point k + 1."""
        # Drawn from a digest of the round: a server cannot choose its members, except by asking
        # another cohort.
        by_lot = sorted(range(len(self.names)), key=lambda i: digest("committee", self.context, i))
        return tuple(sorted(by_lot[: self.plan.committee]))

    def members(self, reported: np.ndarray) -> list[int]:
        """Returns the places in the committee of the members that reported (bool [cohort])."""
        return [k for k, i in enumerate(self.committee) if reported[i]]

    def neighbours(self, client: int) -> np.ndarray:
        """Returns the numbers of the clients that `client` masks with, in order."""
        return np.flatnonzero(self.edges[client])

    def sealed_size(self, client: int) -> int:
        """Returns the bytes of what `client` encrypts for one member of the committee."""
        # A share of its own seed, one of each seed with a neighbour, and the authentication tag.
        return SEED * (1 + int(self.edges[client].sum())) + TAG

    def too_few(self, reported: np.ndarray) -> str:
        """Says why the sum of the clients that reported (bool [cohort]) would reveal too much.

        Empty if it would not.
        """
        count = int(reported.sum())
        if count < self.plan.survivors:
            return (
                f"{count} of {len(self.names)} clients reported, and at least "
                f"{self.plan.survivors} must"
            )
        # The number alone would let a server cut one client off by naming all its neighbours as
        # drop-outs; see `graph`.
        in_sum = self.edges[reported][:, reported].sum(1)
        if in_sum.min() < self.plan.least_neighbours:
            return (
                f"a client is left with {int(in_sum.min())} neighbours that reported, "
                f"and at least {self.plan.least_neighbours} must"
            )
        return ""


def commitment(seed: bytes) -> bytes:
    """Returns 16 bytes by which a seed can be checked, but not found.

    >>> commitment(bytes(16)).hex()[:8] != commitment(b"1" * 16).hex()[:8]
    True
    """
    # A longer one would be no harder to invert: a seed has no more bits.
    return derive(seed, "commitment", size=SEED)
