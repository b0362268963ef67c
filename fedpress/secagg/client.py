"""A client of a secure sum: it hides its vector, and helps to open the sum of those who reported, once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fedpress.errors import RecipeError, SecureError, WireError
from fedpress.secagg.keys import (
    NONCE,
    SIGNATURE,
    TAG,
    KeyPair,
    derive,
    digest,
    digest_all,
    identity,
    seal,
    sign,
    unseal,
)
from fedpress.secagg.masks import add_masks_, to_tensor, to_words
from fedpress.secagg.parts import JSON, SecAggMessage, read_bytes, read_names, read_number, tensor
from fedpress.secagg.plan import SecurePlan
from fedpress.secagg.public import SEED, Roster, Round, SecAggSetup, commitment
from fedpress.secagg.shares import split

KEPT_ROUNDS = 2  # the newest ones, which may be asked again; older ones are refused


class SecAggClient:
    """One client. The same question gets the same bytes; another question about the same step is refused.

    Args:
        name: the client's name, unique in the run.
        secret: 32 bytes that only this client has, the same in every run.
        plan: what was agreed.
        identities: every client's `identity`, known beforehand and not from the server that is not trusted.
        run: name of the run, the same for all clients.

    Raises:
        RecipeError: if the secret is not 32 bytes or the identities do not hold the client's own.
    """

    def __init__(
        self, name: str, secret: bytes, plan: SecurePlan, identities: Mapping[str, bytes], run: str
    ) -> None:
        if len(secret) != 32:
            raise RecipeError(f"got {len(secret)} bytes, expected 32 random ones", place="secret")
        if identities.get(name) != identity(secret):
            raise RecipeError(
                f"{name!r} has another identity than its secret",
                place="identities",
                cure="enter its own",
            )
        self.name, self._secret, self._setting = (
            name,
            secret,
            SecAggSetup(plan, dict(identities), run),
        )
        self._key = KeyPair(secret, run)
        self._roster: Roster | None = None
        self._pairs: dict[str, bytes] = {}
        self._answered: dict[int, dict[str, str]] = {}  # round -> step -> digest of the question

    def join(self) -> SecAggMessage:
        """Returns this client's public key for the run, signed: the first message of the set-up."""
        signature = self._sign("join", self.name, self._key.public)
        return SecAggMessage({}, {"key": tensor(self._key.public), "signature": tensor(signature)})

    def accept(self, roster: SecAggMessage) -> SecAggMessage:
        """Checks everybody's keys, keeps them, and returns a signed digest: the second message of the set-up.

        Raises:
            WireError: if the roster is faulty.
            SecureError: if another roster was accepted in this run.
        """
        self._keep(Roster.read(roster, self._setting))
        assert self._roster is not None
        return SecAggMessage(
            {}, {"signature": tensor(self._sign("accept", self.name, self._roster.digest))}
        )

    def mask(self, values: Tensor, *, round: int, cohort: Sequence[str]) -> SecAggMessage:
        """Returns `values` hidden, with sealed shares of what hides them: the first exchange of a round.

        Args:
            values: whole numbers, int64 [d], taken modulo 2^bits.
            round: number of the round, not below earlier ones.
            cohort: names of all clients of the round, this one among them.

        Raises:
            RecipeError: if the values are of another type, empty, or beyond the bound of the plan.
            WireError: if the cohort is not as planned.
            SecureError: if other values were masked in this round, or the round is over.
        """
        words = self._words(values)
        facts = self._round(round, cohort, len(values))
        me = facts.names.index(self.name)
        question = digest_all([b"values", facts.context, values.detach().contiguous().numpy()])
        self._answer_once(facts, "mask", question)
        coin = derive(
            self._secret, "mask", facts.context, question
        )  # another question, another coin

        own = derive(coin, "own", size=SEED)
        neighbours = facts.neighbours(me)
        shared = [self._shared_seed(facts, facts.names[j]) for j in neighbours]
        add_masks_(
            words,
            [(own, True), *((s, bool(me < j)) for s, j in zip(shared, neighbours, strict=True))],
        )

        seeds = np.frombuffer(b"".join([own, *shared]), np.uint8).reshape(-1, SEED)
        points = range(1, 1 + len(facts.committee))
        shares = split(seeds, points, self._setting.plan.threshold, derive(coin, "polynomials"))
        nonce = derive(coin, "nonce", size=NONCE)
        sealed = [
            seal(
                self._seal_key(facts, self.name, facts.names[k]),
                nonce,
                share.tobytes(),
                facts.context,
            )
            for k, share in zip(facts.committee, shares, strict=True)
        ]
        tensors = {
            "masked": to_tensor(words, self._setting.plan.bits),
            "nonce": tensor(nonce),
            "sealed": tensor(b"".join(sealed)).view(len(sealed), -1),
            "commitments": tensor(b"".join(commitment(s) for s in (own, *shared))).view(-1, SEED),
        }
        signature = self._sign("report", facts.context, self.name, report_digest(tensors))
        return SecAggMessage({"round": round}, {**tensors, "signature": tensor(signature)})

    def unmask(self, request: SecAggMessage) -> SecAggMessage:
        """Returns this client's shares for one list of those who reported: the second exchange of a round.

        They are sealed with a key of which `threshold` members must give a share, and a member's share of it can be
        read only with what it gives for the same list. So lists that differ between members open nothing.

        Raises:
            WireError: if the request is faulty or somebody on the list did not report.
            SecureError: if the list is too short, or another one was answered in this round, or the round is over.
        """
        place = "unmask"
        number = read_number(request, "round", place)
        facts = self._round(
            number, read_names(request, "cohort", place), read_number(request, "size", place)
        )
        me, holders = facts.names.index(self.name), facts.committee
        if me not in holders:
            raise WireError(
                f"{self.name!r} is not in the committee of round {number}",
                place=f"{place}.cohort",
                cure="ask its members",
            )
        if self._answered.get(number, {}).get("context") != facts.context.hex():
            raise SecureError(
                f"{self.name!r} masked no vector of this cohort",
                place=f"round {number}",
                cure="ask those who did",
            )
        reported, label = self._reported(request, facts, me)
        clients: list[int] = np.flatnonzero(reported).tolist()
        sizes = [facts.sealed_size(i) for i in clients]
        sealed = read_bytes(request, "sealed", (sum(sizes),), place)
        nonces = read_bytes(request, "nonces", (len(clients), NONCE), place)
        question = digest(label, sealed.tobytes(), nonces.tobytes())
        self._answer_once(facts, "unmask", question)

        unread, wanted = np.zeros(len(clients), np.uint8), []
        for row, (i, blob) in enumerate(
            zip(clients, np.split(sealed, np.cumsum(sizes)[:-1]), strict=True)
        ):
            key = self._seal_key(facts, facts.names[i], self.name)
            opened = unseal(key, nonces[row].tobytes(), blob.tobytes(), facts.context)
            unread[row] = opened is None
            shares = np.frombuffer(opened or bytes(len(blob) - TAG), np.uint8).reshape(-1, SEED)
            wanted.append(shares[wanted_rows(facts, i, reported)])
        coin = derive(self._secret, "unmask", question)
        body_key = derive(coin, "body")
        points = range(1, 1 + len(holders))
        threshold = self._setting.plan.threshold
        key_shares = split(
            np.frombuffer(body_key, np.uint8)[None], points, threshold, derive(coin, "polynomials")
        )
        present = [k for k in range(len(holders)) if reported[holders[k]]]
        locks = [self._lock(facts, label, self.name, facts.names[holders[k]]) for k in present]
        opens = [self._lock(facts, label, facts.names[holders[k]], self.name) for k in present]
        body = unread.tobytes() + b"".join(rows.tobytes() for rows in wanted)
        return SecAggMessage(
            {"round": number},
            {
                "body": tensor(seal(body_key, bytes(NONCE), body, label)),
                "commitment": tensor(commitment(body_key)),
                "locks": tensor(b"".join(locks)).view(-1, 32) ^ tensor(key_shares[present, 0]),
                "opens": tensor(b"".join(opens)).view(-1, 32),
            },
        )

    def state(self) -> dict[str, JSON]:
        """Returns what must outlive the process, as JSON: who answers twice to one round protects nobody."""
        people = [] if self._roster is None else self._roster.rows
        answered: dict[str, JSON] = {
            str(n): dict(steps.items()) for n, steps in self._answered.items()
        }
        return {"run": self._setting.run, "roster": people, "answered": answered}

    def load_state_(self, state: Mapping[str, JSON]) -> None:
        """Takes over what `state` returned; RecipeError if it is something else or of another run."""
        try:
            people: list[list[str]] = state["roster"]  # type: ignore[assignment]
            saved: dict[str, dict[str, str]] = state["answered"]  # type: ignore[assignment]
            answered = {
                int(n): {str(k): str(v) for k, v in steps.items()} for n, steps in saved.items()
            }
            if not all("context" in steps for steps in answered.values()):
                raise KeyError("context")
            if people:
                names, keys, signatures = zip(*people, strict=True)
                made = Roster(
                    names, tuple(map(bytes.fromhex, keys)), tuple(map(bytes.fromhex, signatures))
                )
                self._keep(Roster.read(made.part(), self._setting))
        except (
            KeyError,
            TypeError,
            ValueError,
            AttributeError,
            RuntimeError,
            WireError,
            SecureError,
        ) as error:
            raise RecipeError(
                (
                    f"not the state of {self.name!r} in run {self._setting.run!r} "
                    f"({type(error).__name__})"
                ),
                place="state",
                cure="load what this run saved",
            ) from error
        self._answered = answered

    def take_over_(self, state: Mapping[str, JSON]) -> None:
        """Takes over what was saved under another name of the run, as after an update of fedpress: all join anew.

        The last round that was answered stays answered. Under the new name its masks would be others, and a second
        list of those who reported would open a second sum of the same vectors: the difference shows single clients.

        Raises:
            RecipeError: if it is not what `state` returns.
        """
        try:
            answered: dict[str, JSON] = state["answered"]  # type: ignore[assignment]
            rounds = [int(number) for number in answered]
        except (KeyError, TypeError, ValueError) as error:
            raise RecipeError(
                f"not the state of {self.name!r} ({type(error).__name__})",
                place="state",
                cure="load what it saved",
            ) from error
        self._answered = {max(rounds): {"context": "another run"}} if rounds else {}

    def _keep(self, roster: Roster) -> None:
        if self._roster is not None and self._roster.digest != roster.digest:
            raise SecureError(
                "another roster was accepted in this run",
                place="roster",
                cure="start a new run to change who takes part",
            )
        if roster.key_of.get(self.name) != self._key.public:
            raise WireError(
                f"the key of {self.name!r} is missing or another",
                place="roster.keys",
                cure="send what it sent to join",
            )
        self._roster = roster

    def _words(self, values: Tensor) -> np.ndarray:
        if (
            not isinstance(values, Tensor)
            or values.dtype != torch.int64
            or values.dim() != 1
            or not len(values)
        ):
            raise RecipeError(
                "expected an int64 vector of at least one whole number",
                place="values",
                cure="discretize first",
            )
        bound = self._setting.plan.bound
        if bound is not None and not bool((values >= -bound).all() and (values <= bound).all()):
            raise RecipeError(
                f"a value is beyond the bound of {bound}, so sums could overflow",
                place="values",
                cure="clip first",
            )
        return to_words(values, self._setting.plan.bits)

    def _round(self, number: int, cohort: Sequence[str], size: int) -> Round:
        if self._roster is None:
            raise SecureError(
                "none was accepted in this run", place="roster", cure="send the roster first"
            )
        facts = Round.of(self._setting, self._roster, number, cohort, size)
        if self.name not in facts.names:
            raise WireError(
                f"{self.name!r} was asked but is not in it",
                place="round.cohort",
                cure="ask only the cohort",
            )
        return facts

    def _reported(self, request: SecAggMessage, facts: Round, me: int) -> tuple[np.ndarray, bytes]:
        """Returns who reported (bool [cohort]) and the digest of the list, after checking that each of them did."""
        flags = read_bytes(request, "reported", (len(facts.names),), "unmask")
        if flags.max() > 1 or not flags[me]:
            raise WireError(
                "expected 0 or 1 per client, and 1 for who is asked",
                place="unmask.reported",
                cure="send what was reported",
            )
        reported = flags.astype(bool)
        shape = (int(reported.sum()),)
        digests = read_bytes(request, "digests", (*shape, 32), "unmask")
        signatures = read_bytes(request, "signatures", (*shape, SIGNATURE), "unmask")
        for i, made, signature in zip(np.flatnonzero(reported), digests, signatures, strict=True):
            words = ("report", facts.context, facts.names[i], made.tobytes())
            if not self._setting.signed(facts.names[i], signature.tobytes(), *words):
                raise WireError(
                    f"{facts.names[i]!r} signed no such report",
                    place="unmask.signatures",
                    cure="list only who reported",
                )
        problem = facts.too_few(reported)
        if problem:
            raise SecureError(
                f"{problem}", place=f"round {facts.number}", cure="the sum stays closed"
            )
        return reported, list_digest(facts, reported, digests)

    def _answer_once(self, facts: Round, step: str, question: bytes) -> None:
        newest = max(self._answered, default=facts.number)
        if facts.number not in self._answered and facts.number < newest:
            raise SecureError(
                f"it is over, round {newest} was answered",
                place=f"round {facts.number}",
                cure="ask about a later one",
            )
        steps = self._answered.setdefault(facts.number, {"context": facts.context.hex()})
        if (
            steps["context"] != facts.context.hex()
            or steps.setdefault(step, question.hex()) != question.hex()
        ):
            raise SecureError(
                f"{self.name!r} answered another {step} question",
                place=f"round {facts.number}",
                cure="repeat the same one or go on",
            )
        for old in sorted(self._answered)[:-KEPT_ROUNDS]:
            del self._answered[old]

    def _pair(self, other: str) -> bytes:
        """Returns the secret that is shared with `other`, made when it is first needed: a round needs few of them."""
        if other not in self._pairs:
            assert self._roster is not None
            pair = self._key.pair(self._roster.key_of[other])
            assert pair is not None  # see `Roster.read`
            self._pairs[other] = pair
        return self._pairs[other]

    def _shared_seed(self, facts: Round, other: str) -> bytes:
        return derive(self._pair(other), "seed", facts.context, size=SEED)

    def _seal_key(self, facts: Round, owner: str, holder: str) -> bytes:
        other = holder if owner == self.name else owner
        return derive(self._pair(other), "seal", facts.context, owner, holder)

    def _lock(self, facts: Round, label: bytes, owner: str, holder: str) -> bytes:
        """Returns what hides the holder's share of the owner's body key, if both were given the list `label`."""
        other = holder if owner == self.name else owner
        return derive(self._pair(other), "lock", label, owner, holder)

    def _sign(self, *words: str | int | bytes) -> bytes:
        return sign(self._secret, *self._setting.words, *words)


def report_digest(tensors: Mapping[str, Tensor]) -> bytes:
    """Returns the digest of a report, which its sender signs."""
    names = ("masked", "nonce", "sealed", "commitments")
    return digest_all(tensors[name].contiguous().numpy() for name in names)


def list_digest(facts: Round, reported: np.ndarray, digests: np.ndarray) -> bytes:
    """Returns the digest of a list of those who reported and of what each of them reported."""
    return digest("list", facts.context, reported.tobytes(), digests.tobytes())


def wanted_rows(facts: Round, client: int, reported: np.ndarray) -> list[int]:
    """Returns which of a reporting client's shares are opened: its own seed's, and those with who did not report."""
    return [0, *(1 + np.flatnonzero(~reported[facts.neighbours(client)]))]
