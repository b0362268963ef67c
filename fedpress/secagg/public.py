"""Public data of a secure sum: server and clients each compute them, with the same result.

These are the roster (the signed keys of all clients), the mask graph, and the committee (the
clients that help to unmask a sum).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache

import numpy as np
from torch import Tensor

from fedpress.errors import WireError
from fedpress.secagg import graph
from fedpress.secagg.keys import (
    NONCE,
    SIGNATURE,
    TAG,
    can_agree,
    derive,
    digest,
    digest_all,
    verify,
)
from fedpress.secagg.message import JSON, SecAggMessage, as_tensor, read_bytes, read_names
from fedpress.secagg.plan import SecurePlan

SEED = 16
"""Size in bytes of a mask's seed, and of the commitment to this seed."""


@dataclass(frozen=True)
class SecAggSetup:
    """The settings of a run, agreed before it starts.

    Attributes:
        plan: size of the cohort, bits of the sum, drop-outs and corrupt clients.
        identities: client name -> public key by which its signatures are verified.
        run: name of the run.
    """

    plan: SecurePlan
    identities: Mapping[str, bytes]
    run: str

    def signed(self, name: str, signature: bytes, *words: str | int | bytes) -> bool:
        """Returns whether client `name` signed `words` for this run and plan."""
        known = self.identities.get(name)
        return known is not None and verify(known, signature, *self.words, *words)

    @cached_property
    def words(self) -> tuple[str, str]:
        """Prefix of everything that is signed, so that no signature is valid in another run."""
        return self.run, json.dumps(asdict(self.plan), sort_keys=True)


@dataclass(frozen=True)
class Roster:
    """The signed X25519 keys of all clients of a run.

    Attributes:
        names: names of the clients, sorted.
        keys: X25519 public key [32] of each client.
        signatures: signature [64] of each client on its own key.
    """

    names: tuple[str, ...]
    keys: tuple[bytes, ...]
    signatures: tuple[bytes, ...]

    @classmethod
    def from_message(cls, message: SecAggMessage, setup: SecAggSetup) -> Roster:
        """Reads and checks a roster.

        Raises:
            WireError: if a field is missing, names are not sorted or listed twice, a key is not
                signed by a known client with this name, two keys are equal, or a key does not allow
                key agreement.
        """
        names = read_names(message, "names", "roster")
        keys = read_bytes(message, "keys", (len(names), 32), "roster")
        signatures = read_bytes(message, "signatures", (len(names), SIGNATURE), "roster")
        identities = tuple(setup.identities.items())
        return _checked_roster(
            tuple(names), keys.tobytes(), signatures.tobytes(), setup.plan, identities, setup.run
        )

    def to_message(self) -> SecAggMessage:
        """Returns the roster as a message."""
        keys = as_tensor(b"".join(self.keys)).view(-1, 32)
        signatures = as_tensor(b"".join(self.signatures)).view(-1, SIGNATURE)
        return SecAggMessage({"names": list(self.names)}, {"keys": keys, "signatures": signatures})

    @cached_property
    def digest(self) -> bytes:
        """Digest of all names and keys, which each client signs."""
        return digest("roster", *self.names, *self.keys)

    @cached_property
    def rows(self) -> list[JSON]:
        """Name, key and signature of each client, as JSON. All callers share this list."""
        rows: list[JSON] = []
        for name, key, signature in zip(self.names, self.keys, self.signatures, strict=True):
            rows.append([name, key.hex(), signature.hex()])
        return rows

    @cached_property
    def key_of(self) -> dict[str, bytes]:
        """Name of each client -> its key."""
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
    """Checks a roster. The result is cached for all clients of a process.

    In a simulation with 1,000 clients, each client would otherwise check the same 1,000 signatures.
    The result depends on the arguments only: for another roster all checks run again.
    """
    # Sorted, so that all clients compute the same digest.
    if sorted(set(names)) != list(names):
        raise WireError(
            "expected different names in sorted order",
            place="roster.names",
            cure="send each client once",
        )
    roster = Roster(names, _rows(keys, 32), _rows(signatures, SIGNATURE))
    # A client with a copy of another client's key would share that client's masks.
    if len(set(roster.keys)) != len(names):
        raise WireError(
            "two clients have the same key", place="roster.keys", cure="send each client's own key"
        )
    setup = SecAggSetup(plan, dict(identities), run)
    for name, key, signature in zip(names, roster.keys, roster.signatures, strict=True):
        # A server that replaced a client's key by its own could compute all masks of that client.
        if not setup.signed(name, signature, "join", name, key):
            raise WireError(
                f"the key of {name!r} is not signed by it",
                place="roster.signatures",
                cure="send the key and signature of the client's join message",
            )
        if not can_agree(key):
            raise WireError(
                f"the key of {name!r} is invalid: it has low order",
                place="roster.keys",
                cure="leave this client out",
            )
    return roster


def _rows(data: bytes, size: int) -> tuple[bytes, ...]:
    return tuple(data[at : at + size] for at in range(0, len(data), size))


@dataclass(frozen=True)
class PublicRound:
    """Public data of one round: server and clients each compute them, with the same result.

    Attributes:
        number: number of the round.
        names: names of the cohort, sorted. The number of a client is its position in `names`.
        size: number of values in each vector.
        context: 32-byte digest of run, plan, roster, number, size and cohort.
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
        """Returns the public data of a round.

        Args:
            setup: settings of the run.
            roster: keys of all clients of the run.
            number: number of the round.
            cohort: names of the clients of the round, in any order.
            size: number of values in each vector.

        Raises:
            WireError: if the cohort does not have the planned size, has a client twice, or has a
                client that is not in the roster.
        """
        # Sorted, so that the order in which the server lists the cohort does not matter.
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
        return _public_round(setup.words, roster.digest, number, names, size, setup.plan)

    @cached_property
    def edges(self) -> np.ndarray:
        """Which clients share a mask: bool [cohort, cohort]."""
        # Drawn from a digest of round and cohort: a client cannot choose its neighbours, and in one
        # round the server gets another graph only with another cohort.
        return graph.edges(derive(self.context, "graph"), len(self.names), self.plan.edge_prob)

    @cached_property
    def committee(self) -> tuple[int, ...]:
        """Numbers of the members, sorted; the member at position k gets the shares for point k + 1.

        A point is the argument of a polynomial in Shamir's secret sharing.
        """
        # Drawn from a digest of round and cohort, so the server cannot choose members. In one round
        # it gets another committee only with another cohort.
        by_lot = sorted(range(len(self.names)), key=lambda i: digest("committee", self.context, i))
        return tuple(sorted(by_lot[: self.plan.committee]))

    def members(self, reported: np.ndarray) -> list[int]:
        """Returns the positions in the committee of members that `reported` (bool [cohort])."""
        return [k for k, i in enumerate(self.committee) if reported[i]]

    def neighbours(self, client: int) -> np.ndarray:
        """Returns the sorted numbers of the clients that share a mask with `client`."""
        return np.flatnonzero(self.edges[client])

    def sealed_size(self, client: int) -> int:
        """Returns the size in bytes of the shares that `client` encrypts for one member."""
        # A share of its own seed, one of each seed with a neighbour, and an authentication tag.
        return SEED * (1 + int(self.edges[client].sum())) + TAG

    def too_few(self, reported: np.ndarray) -> str:
        """Returns why a sum of the clients that `reported` (bool [cohort]) must not be unmasked.

        Example: "5 of 10 clients reported, and at least 7 must". If the sum may be unmasked, the
        text is empty.
        """
        count = int(reported.sum())
        if count < self.plan.survivors:
            return (
                f"{count} of {len(self.names)} clients reported, and at least "
                f"{self.plan.survivors} must"
            )
        # The number alone is not enough: the server could isolate one client by reporting all its
        # neighbours as dropped out; see `graph`.
        in_sum = self.edges[reported][:, reported].sum(1)
        if in_sum.min() < self.plan.least_neighbours:
            return (
                f"a client has only {int(in_sum.min())} neighbours that reported, "
                f"and at least {self.plan.least_neighbours} must"
            )
        return ""


@lru_cache(maxsize=4)
def _public_round(
    words: tuple[str | int | bytes, ...],
    roster: bytes,
    number: int,
    names: tuple[str, ...],
    size: int,
    plan: SecurePlan,
) -> PublicRound:
    """Returns the public data of a round, once for all clients of a process."""
    # All keys and signatures of the round depend on this digest. So a message from another run,
    # plan, roster, round, size or cohort cannot be decrypted or verified here.
    context = digest("round", *words, roster, number, size, *names)
    return PublicRound(number, names, size, context, plan)


def commitment(seed: bytes) -> bytes:
    """Returns a commitment [16 bytes], by which a seed can be verified but not computed.

    >>> commitment(bytes(16)).hex()[:8] != commitment(b"1" * 16).hex()[:8]
    True
    """
    # A longer commitment would not be harder to invert, because a seed has 16 bytes.
    return derive(seed, "commitment", size=SEED)


def report_digest(tensors: Mapping[str, Tensor]) -> bytes:
    """Returns the digest of a client's report (see `SecAggClient.mask`), which the client signs."""
    names = ("masked", "nonce", "sealed", "commitments")
    return digest_all(tensors[name].contiguous().numpy() for name in names)


def list_digest(public: PublicRound, reported: np.ndarray, digests: np.ndarray) -> bytes:
    """Returns the digest of the list of clients that reported, and of their reports."""
    return digest("list", public.context, reported.tobytes(), digests.tobytes())


def seeds_to_open(public: PublicRound, client: int, reported: np.ndarray) -> list[int]:
    """Returns which seeds of a reporting `client` the committee opens, as row numbers.

    Row 0 is the client's own seed; it is always opened. The following rows are the seeds that the
    client shares with its neighbours, in the order of `neighbours`. Such a seed is opened only if
    the neighbour did not report. Seeds shared with reporting neighbours must stay secret: their
    masks cancel in the sum, and opening these seeds would reveal the client's vector.
    """
    return [0, *(1 + np.flatnonzero(~reported[public.neighbours(client)]))]


def report_shapes(public: PublicRound, client: int) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each tensor of random bytes in the report of `client`."""
    return {
        "nonce": (NONCE,),
        "sealed": (len(public.committee), public.sealed_size(client)),
        "commitments": (1 + len(public.neighbours(client)), SEED),
        "signature": (SIGNATURE,),
    }


def answer_shapes(public: PublicRound, reported: np.ndarray) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each tensor in the answer of a member of the committee.

    Args:
        public: the round.
        reported: which clients reported, bool [cohort].
    """
    clients = int(reported.sum())
    # One row for each of `seeds_to_open`.
    rows = clients + int(public.edges[reported][:, ~reported].sum())
    members = len(public.members(reported))
    return {
        "body": (clients + rows * SEED + TAG,),
        "commitment": (SEED,),
        "locks": (members, 32),
        "opens": (members, 32),
    }
