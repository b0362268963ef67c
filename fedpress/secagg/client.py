"""A client of a secure sum: it masks its vector, and helps to unmask one sum per round."""

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
from fedpress.secagg.message import (
    JSON,
    SecAggMessage,
    as_tensor,
    read_bytes,
    read_names,
    read_number,
)
from fedpress.secagg.plan import SecurePlan
from fedpress.secagg.public import SEED, PublicRound, Roster, SecAggSetup, commitment
from fedpress.secagg.shares import share_secrets

KEPT_ROUNDS = 2
"""Questions about this many newest rounds may be repeated; those about older ones are refused."""


class SecAggClient:
    """One client of a secure sum.

    The same question gets the same bytes again, also after a restart. A different question about
    the same step of a round is refused: two vectors under the same masks would show their
    difference, and two lists of clients would open two sums.

    Args:
        name: the client's name, unique in the run.
        secret: 32 bytes that only this client has, the same in every run.
        plan: what was agreed.
        identities: every client's `identity`, known beforehand and not from a server that is not
            trusted.
        run: name of the run, the same for all clients.

    Raises:
        RecipeError: if the secret is not 32 bytes or the identities do not hold the client's own.
    """

    def __init__(
        self, name: str, secret: bytes, plan: SecurePlan, identities: Mapping[str, bytes], run: str
    ) -> None:
        if len(secret) != 32:
            raise RecipeError(f"got {len(secret)} bytes, expected 32 random ones", place="secret")
        # With another identity all others would refuse what this client signs.
        if identities.get(name) != identity(secret):
            raise RecipeError(
                f"the identity of {name!r} is not that of its secret",
                place="identities",
                cure="give identity(secret) for this client",
            )
        self.name = name
        self._secret = secret
        self._setup = SecAggSetup(plan, dict(identities), run)
        self._key = KeyPair(secret, run)
        self._roster: Roster | None = None
        self._shared_secrets: dict[str, bytes] = {}
        # Round -> step -> hexadecimal digest of the question; under "context" that of the round.
        self._answered: dict[int, dict[str, str]] = {}

    def join(self) -> SecAggMessage:
        """Returns the first message of the set-up: this client's signed public key for the run."""
        signature = self._sign("join", self.name, self._key.public)
        return SecAggMessage(
            {}, {"key": as_tensor(self._key.public), "signature": as_tensor(signature)}
        )

    def accept(self, roster: SecAggMessage) -> SecAggMessage:
        """Checks and keeps all clients' keys; returns the second message, a signed digest of them.

        Raises:
            WireError: if the roster is faulty.
            SecureError: if another roster was accepted in this run.
        """
        checked = Roster.from_message(roster, self._setup)
        self._keep_roster(checked)
        signature = self._sign("accept", self.name, checked.digest)
        return SecAggMessage({}, {"signature": as_tensor(signature)})

    def mask(self, values: Tensor, *, round: int, cohort: Sequence[str]) -> SecAggMessage:
        """Returns `values` masked, with encrypted shares of the masks' seeds.

        The first exchange of a round.

        Args:
            values: whole numbers, int64 [d], taken modulo 2^bits.
            round: number of the round, not below earlier ones.
            cohort: names of all clients of the round, this one among them.

        Raises:
            RecipeError: if the values are of another type, empty, or beyond the bound of the plan.
            WireError: if the cohort is not as planned.
            SecureError: if other values were masked in this round, or the round is over.
        """
        words = self._checked_words(values)
        public = self._public_round(round, cohort, len(values))
        me = public.names.index(self.name)
        # A digest and not the values: the saved state must not hold private data.
        question = digest_all([b"values", public.context, values.detach().contiguous().numpy()])
        self._answer_once(public, "mask", question)
        # Derived from the question: the same one gets the same random bytes again, which makes the
        # answer repeatable, and another one gets different ones.
        key = derive(self._secret, "mask", public.context, question)

        own_seed = derive(key, "own", size=SEED)
        neighbours = public.neighbours(me)
        shared_seeds = [self._shared_seed(public, public.names[j]) for j in neighbours]
        # Of two neighbours the one with the lower number adds their mask, the other subtracts it.
        masks = [(own_seed, True)]
        for seed, j in zip(shared_seeds, neighbours, strict=True):
            masks.append((seed, bool(me < j)))
        add_masks_(words, masks)

        nonce = derive(key, "nonce", size=NONCE)
        sealed = self._sealed_shares(public, [own_seed, *shared_seeds], key, nonce)
        # By these the server sees whether two neighbours derived the same seed, and whether a
        # recovered seed is right.
        commitments = b"".join(commitment(seed) for seed in (own_seed, *shared_seeds))
        tensors = {
            "masked": to_tensor(words, self._setup.plan.bits),
            "nonce": as_tensor(nonce),
            "sealed": as_tensor(b"".join(sealed)).view(len(sealed), -1),
            "commitments": as_tensor(commitments).view(-1, SEED),
        }
        # The committee counts only clients that signed: the server cannot invent one.
        signature = self._sign("report", public.context, self.name, report_digest(tensors))
        return SecAggMessage({"round": round}, {**tensors, "signature": as_tensor(signature)})

    def _sealed_shares(
        self, public: PublicRound, seeds: Sequence[bytes], key: bytes, nonce: bytes
    ) -> list[bytes]:
        """Returns, for each member of the committee, its shares of all `seeds`, encrypted."""
        rows = np.frombuffer(b"".join(seeds), np.uint8).reshape(-1, SEED)
        points = range(1, 1 + len(public.committee))
        threshold = self._setup.plan.threshold
        shares = share_secrets(rows, points, threshold, derive(key, "polynomials"))
        sealed = []
        for k, share in zip(public.committee, shares, strict=True):
            # One nonce suffices, since each member has a key of its own. With the context, shares
            # of another round cannot be passed off as those of this one.
            seal_key = self._seal_key(public, self.name, public.names[k])
            sealed.append(seal(seal_key, nonce, share.tobytes(), public.context))
        return sealed

    def unmask(self, request: SecAggMessage) -> SecAggMessage:
        """Returns this client's shares for one list of clients that reported.

        The second exchange of a round. The answer is encrypted with a new key, of which every
        member of the committee gets a share. A member's share is hidden by a pad that both
        derive from the list, and the member gives its pads away for the list that it was sent. So
        `threshold` members with the same list open each other's answers, and lists that differ
        between members open nothing.

        Raises:
            WireError: if the request is faulty, or a client on the list did not report.
            SecureError: if the list is too short, if another one was answered in this round, or if
                the round is over.
        """
        place = "unmask"
        public = self._public_round(
            read_number(request, "round", place),
            read_names(request, "cohort", place),
            read_number(request, "size", place),
        )
        me = public.names.index(self.name)
        self._check_may_unmask(public, me)
        reported, label = self._checked_list(request, public, me)
        clients: list[int] = np.flatnonzero(reported).tolist()
        sizes = [public.sealed_size(i) for i in clients]
        sealed = read_bytes(request, "sealed", (sum(sizes),), place)
        nonces = read_bytes(request, "nonces", (len(clients), NONCE), place)
        question = digest(label, sealed.tobytes(), nonces.tobytes())
        self._answer_once(public, "unmask", question)

        blobs = np.split(sealed, np.cumsum(sizes)[:-1])
        body = self._opened_shares(public, reported, clients, blobs, nonces)
        key = derive(self._secret, "unmask", question)
        body_key = derive(key, "body")
        members = public.members(reported)
        # Points belong to places in the committee. The shares of members that did not report are
        # computed, but not sent.
        key_shares = share_secrets(
            np.frombuffer(body_key, np.uint8)[None],
            range(1, 1 + len(public.committee)),
            self._setup.plan.threshold,
            derive(key, "polynomials"),
        )
        locks = []
        opens = []
        for k in members:
            holder = public.names[public.committee[k]]
            locks.append(self._pad(public, label, self.name, holder))
            opens.append(self._pad(public, label, holder, self.name))
        return SecAggMessage(
            {"round": public.number},
            {
                # The key is used once, so any nonce is new.
                "body": as_tensor(seal(body_key, bytes(NONCE), body, label)),
                "commitment": as_tensor(commitment(body_key)),
                "locks": as_tensor(b"".join(locks)).view(-1, 32)
                ^ as_tensor(key_shares[members, 0]),
                "opens": as_tensor(b"".join(opens)).view(-1, 32),
            },
        )

    def _check_may_unmask(self, public: PublicRound, me: int) -> None:
        if me not in public.committee:
            raise WireError(
                f"{self.name!r} is not in the committee of round {public.number}",
                place="unmask.cohort",
                cure="ask its members",
            )
        if self._answered.get(public.number, {}).get("context") != public.context.hex():
            raise SecureError(
                f"{self.name!r} masked no vector of this cohort",
                place=f"round {public.number}",
                cure="ask those who did",
            )

    def _opened_shares(
        self,
        public: PublicRound,
        reported: np.ndarray,
        clients: Sequence[int],
        blobs: Sequence[np.ndarray],
        nonces: np.ndarray,
    ) -> bytes:
        """Returns the shares that unmask the sum, as the body of an answer.

        Args:
            public: the round.
            reported: who reported, bool [cohort].
            clients: numbers of those who reported.
            blobs: what each of them encrypted for this client.
            nonces: the nonce of each of them, uint8 [clients, NONCE].

        Returns:
            A byte for each client, 1 if its shares could not be read, then all wanted shares.
        """
        unread = np.zeros(len(clients), np.uint8)
        wanted = []
        for row, (i, blob) in enumerate(zip(clients, blobs, strict=True)):
            key = self._seal_key(public, public.names[i], self.name)
            opened = unseal(key, nonces[row].tobytes(), blob.tobytes(), public.context)
            unread[row] = opened is None
            # Zeros in place of what cannot be read keep the length of the answer.
            shares = np.frombuffer(opened or bytes(len(blob) - TAG), np.uint8).reshape(-1, SEED)
            wanted.append(shares[wanted_rows(public, i, reported)])
        return unread.tobytes() + b"".join(rows.tobytes() for rows in wanted)

    def state(self) -> dict[str, JSON]:
        """Returns what must be saved before an answer is sent, as JSON.

        A client that forgets what it answered can be asked a second question about the same round.
        """
        roster = [] if self._roster is None else self._roster.rows
        answered: dict[str, JSON] = {}
        for number, steps in self._answered.items():
            answered[str(number)] = dict(steps.items())
        return {"run": self._setup.run, "roster": roster, "answered": answered}

    def load_state_(self, state: Mapping[str, JSON]) -> None:
        """Restores what `state` returned.

        Raises:
            RecipeError: if it is something else, or of another run.
        """
        try:
            answered = _read_answered(state["answered"])
            rows: list[list[str]] = state["roster"]  # type: ignore[assignment]
            if rows:
                names, keys, signatures = zip(*rows, strict=True)
                saved = Roster(
                    names, tuple(map(bytes.fromhex, keys)), tuple(map(bytes.fromhex, signatures))
                )
                # Checked like a roster from the server: a file can be changed.
                self._keep_roster(Roster.from_message(saved.to_message(), self._setup))
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
                    f"not the state of {self.name!r} in run {self._setup.run!r} "
                    f"({type(error).__name__})"
                ),
                place="state",
                cure="load what this run saved",
            ) from error
        self._answered = answered

    def take_over_(self, state: Mapping[str, JSON]) -> None:
        """Takes over the state of a run with another name, as after an update of fedpress.

        All clients join again, but the last answered round stays answered. In the renamed run its
        masks would be others, and a second list of clients could open a second sum of the same
        vectors; the difference of two sums shows single clients.

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
        # No round has this context, so every question about the round is refused.
        self._answered = {max(rounds): {"context": "another run"}} if rounds else {}

    def _keep_roster(self, roster: Roster) -> None:
        if self._roster is not None and self._roster.digest != roster.digest:
            raise SecureError(
                "another roster was accepted in this run",
                place="roster",
                cure="start a new run to change who takes part",
            )
        if roster.key_of.get(self.name) != self._key.public:
            raise WireError(
                f"the key of {self.name!r} is missing, or not its own",
                place="roster.keys",
                cure="send what it sent to join",
            )
        self._roster = roster

    def _checked_words(self, values: Tensor) -> np.ndarray:
        # Other types would be converted to whole numbers without an error.
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
        # Sums of clients that keep the bound cannot overflow.
        bound = self._setup.plan.bound
        if bound is not None and not bool((values >= -bound).all() and (values <= bound).all()):
            raise RecipeError(
                f"a value is beyond the bound of {bound}, so sums could overflow",
                place="values",
                cure="clip first",
            )
        return to_words(values, self._setup.plan.bits)

    def _public_round(self, number: int, cohort: Sequence[str], size: int) -> PublicRound:
        if self._roster is None:
            raise SecureError(
                "none was accepted in this run", place="roster", cure="send the roster first"
            )
        public = PublicRound.of(self._setup, self._roster, number, cohort, size)
        if self.name not in public.names:
            raise WireError(
                f"{self.name!r} was asked but is not in it",
                place="round.cohort",
                cure="ask only the cohort",
            )
        return public

    def _checked_list(
        self, request: SecAggMessage, public: PublicRound, me: int
    ) -> tuple[np.ndarray, bytes]:
        """Returns who reported (bool [cohort]) and the digest of the list.

        Every client on it must have signed its report: the server cannot list others.
        """
        flags = read_bytes(request, "reported", (len(public.names),), "unmask")
        # This client did report, so a list without it is wrong.
        if flags.max() > 1 or not flags[me]:
            raise WireError(
                "expected 0 or 1 per client, and 1 for who is asked",
                place="unmask.reported",
                cure="send what was reported",
            )
        reported = flags.astype(bool)
        count = int(reported.sum())
        digests = read_bytes(request, "digests", (count, 32), "unmask")
        signatures = read_bytes(request, "signatures", (count, SIGNATURE), "unmask")
        for i, made, signature in zip(np.flatnonzero(reported), digests, signatures, strict=True):
            words = ("report", public.context, public.names[i], made.tobytes())
            if not self._setup.signed(public.names[i], signature.tobytes(), *words):
                raise WireError(
                    f"{public.names[i]!r} signed no such report",
                    place="unmask.signatures",
                    cure="list only who reported",
                )
        problem = public.too_few(reported)
        if problem:
            raise SecureError(problem, place=f"round {public.number}", cure="the sum stays closed")
        return reported, list_digest(public, reported, digests)

    def _answer_once(self, public: PublicRound, step: str, question: bytes) -> None:
        """Notes the `question` of a `step`, or raises SecureError if another one was answered."""
        # Only the newest rounds are remembered, so an older one could be answered twice.
        newest = max(self._answered, default=public.number)
        if public.number not in self._answered and public.number < newest:
            raise SecureError(
                f"it is over, round {newest} was answered",
                place=f"round {public.number}",
                cure="ask about a later one",
            )
        steps = self._answered.setdefault(public.number, {"context": public.context.hex()})
        if (
            steps["context"] != public.context.hex()
            or steps.setdefault(step, question.hex()) != question.hex()
        ):
            raise SecureError(
                f"{self.name!r} answered another {step} question",
                place=f"round {public.number}",
                cure="repeat the same one or go on",
            )
        for old in sorted(self._answered)[:-KEPT_ROUNDS]:
            del self._answered[old]

    def _shared_secret(self, other: str) -> bytes:
        """Returns the secret that this client shares with `other`."""
        # Computed when it is first needed: a round needs only those of neighbours and committee.
        if other not in self._shared_secrets:
            assert self._roster is not None
            secret = self._key.shared_secret(self._roster.key_of[other])
            # `Roster.from_message` has refused keys without a secret.
            assert secret is not None
            self._shared_secrets[other] = secret
        return self._shared_secrets[other]

    def _shared_seed(self, public: PublicRound, other: str) -> bytes:
        """Returns the seed of the mask with a neighbour, which the neighbour derives as well."""
        return derive(self._shared_secret(other), "seed", public.context, size=SEED)

    def _seal_key(self, public: PublicRound, owner: str, holder: str) -> bytes:
        """Returns the key under which `owner` sends its shares to `holder`."""
        other = holder if owner == self.name else owner
        # Both names in their order: the way back has another key, so it may use the same nonce.
        return derive(self._shared_secret(other), "seal", public.context, owner, holder)

    def _pad(self, public: PublicRound, label: bytes, owner: str, holder: str) -> bytes:
        """Returns the pad that hides the holder's share of the owner's body key.

        Both derive the same pad only if both were sent the list with digest `label`.
        """
        other = holder if owner == self.name else owner
        return derive(self._shared_secret(other), "lock", label, owner, holder)

    def _sign(self, *words: str | int | bytes) -> bytes:
        return sign(self._secret, *self._setup.words, *words)


def _read_answered(saved: JSON) -> dict[int, dict[str, str]]:
    """Reads the answered rounds of a saved state, or raises what reading something else raises."""
    rounds: dict[str, dict[str, str]] = saved  # type: ignore[assignment]
    answered = {}
    for number, steps in rounds.items():
        # Each round has the digest of what it is about, besides its answered steps.
        if "context" not in steps:
            raise KeyError("context")
        answered[int(number)] = {str(step): str(question) for step, question in steps.items()}
    return answered


def report_digest(tensors: Mapping[str, Tensor]) -> bytes:
    """Returns the digest of a report, which its sender signs."""
    names = ("masked", "nonce", "sealed", "commitments")
    return digest_all(tensors[name].contiguous().numpy() for name in names)


def list_digest(public: PublicRound, reported: np.ndarray, digests: np.ndarray) -> bytes:
    """Returns the digest of who reported and of what each of them reported."""
    return digest("list", public.context, reported.tobytes(), digests.tobytes())


def wanted_rows(public: PublicRound, client: int, reported: np.ndarray) -> list[int]:
    """Returns which seeds of a client that reported are opened.

    Its own seed, in row 0, and those that it shares with neighbours who did not report. The seeds
    with neighbours who did report stay closed: their masks cancel in the sum, and with them open
    the client's vector would be open too.
    """
    return [0, *(1 + np.flatnonzero(~reported[public.neighbours(client)]))]
