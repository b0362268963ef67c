"""What everybody knows: the roster of a run, and of each round its context, graph and committee."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache

import numpy as np

from fedpress.errors import WireError
from fedpress.secagg import graph
from fedpress.secagg.keys import SIGNATURE, agrees, derive, digest, verify
from fedpress.secagg.parts import JSON, SecAggMessage, read_bytes, read_names, tensor
from fedpress.secagg.plan import SecurePlan


@dataclass(frozen=True)
class SecAggSetup:
    """What is agreed before the run: the plan, everybody's identity key, and the name of the run."""

    plan: SecurePlan
    identities: Mapping[str, bytes]
    run: str

    def signed(self, name: str, signature: bytes, *words: str | int | bytes) -> bool:
        """Returns whether `name` signed `words` in this run and under this plan."""
        known = self.identities.get(name)
        return known is not None and verify(known, signature, *self.words, *words)

    @cached_property
    def words(self) -> tuple[str, str]:
        """The words that begin everything that is signed."""
        return self.run, json.dumps(asdict(self.plan), sort_keys=True)


@dataclass(frozen=True)
class Roster:
    """The agreement key of every client, signed by it, in the order of the names."""

    names: tuple[str, ...]
    keys: tuple[bytes, ...]
    signatures: tuple[bytes, ...]

    @classmethod
    def read(cls, part: SecAggMessage, setting: SecAggSetup) -> Roster:
        """Reads and checks a roster.

        Raises:
            WireError: if a name is unknown or listed twice, a signature is not by its owner, two keys are equal, or a
                key agrees on no secret.
        """
        names = read_names(part, "names", "roster")
        keys = read_bytes(part, "keys", (len(names), 32), "roster")
        signatures = read_bytes(part, "signatures", (len(names), SIGNATURE), "roster")
        known = tuple(setting.identities.items())
        return _checked_roster(
            tuple(names), keys.tobytes(), signatures.tobytes(), setting.plan, known, setting.run
        )

    def part(self) -> SecAggMessage:
        """Returns the roster as it travels."""
        keys, signatures = b"".join(self.keys), b"".join(self.signatures)
        return SecAggMessage(
            {"names": list(self.names)},
            {
                "keys": tensor(keys).view(-1, 32),
                "signatures": tensor(signatures).view(-1, SIGNATURE),
            },
        )

    @cached_property
    def digest(self) -> bytes:
        """Digest of names and keys."""
        return digest("roster", *self.names, *self.keys)

    @cached_property
    def rows(self) -> list[JSON]:
        """Name, key and signature of each client as JSON holds them; not to be changed."""
        columns = zip(self.names, self.keys, self.signatures, strict=True)
        return [[name, key.hex(), signature.hex()] for name, key, signature in columns]

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
    """Does the work of `Roster.read`, once for all clients of one process.

    Whether a signature is right hangs on what is public alone, all of which is named here. In a simulation of 1,000
    clients each would check the same 1,000 signatures.
    """
    if sorted(set(names)) != list(names):
        raise WireError(
            "expected different names in order",
            place="roster.names",
            cure="send each client once",
        )
    made = Roster(names, _rows(keys, 32), _rows(signatures, SIGNATURE))
    if len(set(made.keys)) != len(names):
        raise WireError(
            "two clients have the same key", place="roster.keys", cure="send each client's own"
        )
    setting = SecAggSetup(plan, dict(identities), run)
    for name, key, signature in zip(names, made.keys, made.signatures, strict=True):
        if not setting.signed(name, signature, "join", name, key):
            raise WireError(
                f"the key of {name!r} is not signed by it",
                place="roster.signatures",
                cure="send what it sent to join",
            )
        if not agrees(key):
            raise WireError(
                f"the key of {name!r} agrees on no secret",
                place="roster.keys",
                cure="leave this client out",
            )
    return made


def _rows(data: bytes, size: int) -> tuple[bytes, ...]:
    return tuple(data[at : at + size] for at in range(0, len(data), size))


@dataclass(frozen=True)
class Round:
    """What both sides compute of one round; `names` are the cohort in order, and clients are numbered by it."""

    number: int
    names: tuple[str, ...]
    size: int
    context: bytes
    plan: SecurePlan

    @classmethod
    def of(
        cls, setting: SecAggSetup, roster: Roster, number: int, cohort: Sequence[str], size: int
    ) -> Round:
        """Checks a cohort; WireError if it is not what was planned."""
        names = tuple(sorted(cohort))
        if len(names) != setting.plan.cohort or len(set(names)) != len(names):
            raise WireError(
                f"got {len(set(names))} clients, expected {setting.plan.cohort} different ones",
                place="round.cohort",
            )
        strangers = set(names).difference(roster.names)
        if strangers:
            raise WireError(
                f"{min(strangers)!r} is not in the roster",
                place="round.cohort",
                cure="ask only clients that joined",
            )
        context = digest("round", *setting.words, roster.digest, number, size, *names)
        return cls(number, names, size, context, setting.plan)

    @cached_property
    def edges(self) -> np.ndarray:
        """Who masks with whom, bool [cohort, cohort]; it hangs on the whole cohort, so nobody can choose into it."""
        return graph.edges(derive(self.context, "graph"), len(self.names), self.plan.edge_prob)

    @cached_property
    def committee(self) -> tuple[int, ...]:
        """Numbers of the clients that hold shares; the holder at place k has the point k + 1."""
        by_lot = sorted(range(len(self.names)), key=lambda i: digest("committee", self.context, i))
        return tuple(sorted(by_lot[: self.plan.committee]))

    def neighbours(self, client: int) -> np.ndarray:
        """Returns the numbers of the clients that `client` masks with, in order."""
        return np.flatnonzero(self.edges[client])

    def sealed_size(self, client: int) -> int:
        """Returns the bytes of one sealed share of `client`: the own seed's, each neighbour's, and the seal."""
        return SEED * (1 + int(self.edges[client].sum())) + 16

    def too_few(self, reported: np.ndarray) -> str:
        """Says why a sum of the `reported` (bool [cohort]) would show too much; empty if it would not."""
        count = int(reported.sum())
        if count < self.plan.survivors:
            return f"{count} of {len(self.names)} clients reported, and at least {self.plan.survivors} must"
        seen = self.edges[reported][:, reported].sum(1)
        if seen.min() < self.plan.least_neighbours:
            return (
                f"a client is left with {int(seen.min())} neighbours that reported, "
                f"and at least {self.plan.least_neighbours} must"
            )
        return ""


SEED = 16  # bytes of a seed that is shared, and of the commitment to it


def commitment(seed: bytes) -> bytes:
    """Returns what lets everybody check a seed, and nobody find it.

    >>> commitment(bytes(16)).hex()[:8] != commitment(b"1" * 16).hex()[:8]
    True
    """
    return derive(seed, "commitment", size=SEED)
