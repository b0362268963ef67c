"""A client of a secure sum: masks its vector, and helps to unmask one sum in each round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fedpress.errors import RecipeError, SecureError, WireError
from fedpress.secagg.answered import AnsweredRounds
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
from fedpress.secagg.public import (
    SEED,
    PublicRound,
    Roster,
    SecAggSetup,
    commitment,
    list_digest,
    report_digest,
    seeds_to_open,
)
from fedpress.secagg.shares import share_secrets
from fedpress.secagg.simulated import LEAST_UNMADE, simulated_report, simulated_shares


class SecAggClient:
    """One client of a secure sum, in which the server learns only the sum of the clients' vectors.

    The answer to a repeated request has the same bytes, also after a restart. A different request
    for the same step of a round is refused: two vectors under the same masks would reveal their
    difference, and two lists of clients would open two sums.

    Args:
        name: the client's name, unique in the run.
        secret: 32 bytes that only this client has, the same in every run.
        plan: the settings on which server and clients agree.
        identities: name of each client -> its public key, a result of `identity`. The keys must be
            known before the run, and must not come from an untrusted server.
        run: name of the run, the same for all clients.

    Raises:
        RecipeError: if the secret does not have 32 bytes, or does not fit this client's public key
            in `identities`.
    """

    def __init__(
        self, name: str, secret: bytes, plan: SecurePlan, identities: Mapping[str, bytes], run: str
    ) -> None:
        if len(secret) != 32:
            raise RecipeError(f"got {len(secret)} bytes, expected 32 random bytes", place="secret")
        # With another identity, all other clients would refuse this client's signatures.
        if identities.get(name) != identity(secret):
            raise RecipeError(
                f"the identity of {name!r} does not belong to the client's secret",
                place="identities",
                cure="give identity(secret) for this client",
            )
        self.name = name
        self._secret = secret
        self._setup = SecAggSetup(plan, dict(identities), run)
        self._key = KeyPair(secret, run)
        self._roster: Roster | None = None
        self._shared_secrets: dict[str, bytes] = {}
        self._answered = AnsweredRounds(name)

    def join(self) -> SecAggMessage:
        """Returns the first message of a run: this client's signed public key."""
        signature = self._sign("join", self.name, self._key.public)
        return SecAggMessage(
            {}, {"key": as_tensor(self._key.public), "signature": as_tensor(signature)}
        )

    def accept(self, roster: SecAggMessage) -> SecAggMessage:
        """Checks and stores the keys of all clients, and returns this client's second message.

        The message contains the signed digest of all keys.

        Args:
            roster: names, keys and signatures of all clients, from the server.

        Raises:
            WireError: if the roster is faulty, or does not have this client's key.
            SecureError: if another roster was accepted in this run.
        """
        checked = Roster.from_message(roster, self._setup)
        self._keep_roster(checked)
        signature = self._sign("accept", self.name, checked.digest)
        return SecAggMessage({}, {"signature": as_tensor(signature)})

    def mask(
        self, values: Tensor, *, round: int, cohort: Sequence[str], by_hand: bool = False
    ) -> SecAggMessage:
        """Returns this client's report: masked `values`, and encrypted shares of the masks' seeds.

        This is the first exchange of a round. A seed is 16 bytes from which a mask is computed.

        Args:
            values: whole numbers, int64 [d]; the sum is modulo 2^bits.
            round: number of the round. A new round has a higher number than all rounds before it.
            cohort: names of all clients of the round, including this one.
            by_hand: whether the report stays in this process, as in a simulation. Then it has no
                masks and ciphertexts; see `fedpress.secagg.simulated`. All clients of a round must
                do the same.

        Raises:
            RecipeError: if the values have another type, are empty, or exceed the plan's bound.
            WireError: if the cohort does not have the planned size, lacks this client, or has a
                client that is not in the roster.
            SecureError: if this client has no roster, has masked other values in this round or for
                another cohort, or has answered a later round.
        """
        words = self._checked_words(values)
        public = self._public_round(round, cohort, len(values))
        me = public.names.index(self.name)
        if by_hand and len(words) >= LEAST_UNMADE:
            return simulated_report(public, me, words)
        # A digest instead of the values, because the saved state must not contain private data. The
        # words are as narrow as the sum allows, and within the bound no two values share one.
        question = digest_all([b"words", public.context, words])
        if not by_hand:
            self._answered.answer_once_(public, "mask", question)
        # Derived from the request: a repeated request gets the same random bytes and so the same
        # answer. A different request gets different bytes.
        key = derive(self._secret, "mask", public.context, question)

        own_seed = derive(key, "own", size=SEED)
        neighbours = public.neighbours(me)
        shared_seeds = [self._shared_seed(public, public.names[j]) for j in neighbours]
        # Of two neighbours, the one with the lower number adds their mask and the other subtracts
        # it, so that it cancels in the sum.
        masks = [(own_seed, True)]
        for seed, j in zip(shared_seeds, neighbours, strict=True):
            masks.append((seed, bool(me < j)))
        masked = words.copy()
        add_masks_(masked, masks)
        if by_hand:
            return simulated_report(public, me, words, masked)

        nonce = derive(key, "nonce", size=NONCE)
        sealed = self._sealed_shares(public, [own_seed, *shared_seeds], key, nonce)
        # With commitments, the server can check that two neighbours derived the same seed, and that
        # a recovered seed is right.
        commitments = b"".join(commitment(seed) for seed in (own_seed, *shared_seeds))
        tensors = {
            "masked": to_tensor(masked, self._setup.plan.bits),
            "nonce": as_tensor(nonce),
            "sealed": as_tensor(b"".join(sealed)).view(len(sealed), -1),
            "commitments": as_tensor(commitments).view(-1, SEED),
        }
        # The committee accepts only signed reports, so the server cannot invent clients.
        signature = self._sign("report", public.context, self.name, report_digest(tensors))
        return SecAggMessage({"round": round}, {**tensors, "signature": as_tensor(signature)})

    def _sealed_shares(
        self, public: PublicRound, seeds: Sequence[bytes], key: bytes, nonce: bytes
    ) -> list[bytes]:
        """Returns the encrypted shares of all `seeds` for each member of the committee."""
        rows = np.frombuffer(b"".join(seeds), np.uint8).reshape(-1, SEED)
        points = range(1, 1 + len(public.committee))
        threshold = self._setup.plan.threshold
        shares = share_secrets(rows, points, threshold, derive(key, "polynomials"))
        sealed = []
        for k, share in zip(public.committee, shares, strict=True):
            # One nonce is enough, because each member has a different key. The context is the
            # associated data, so shares of another round cannot be decrypted in this round.
            seal_key = self._seal_key(public, self.name, public.names[k])
            sealed.append(seal(seal_key, nonce, share.tobytes(), public.context))
        return sealed

    def unmask(self, request: SecAggMessage, *, by_hand: bool = False) -> SecAggMessage:
        """Returns this client's shares of the seeds, for one list of clients that reported.

        This is the second exchange of a round. Only members of the committee are asked: clients of
        the cohort that were drawn to help to unmask. The exchange stops a server that sends
        different lists to different members:

        - The answer is encrypted with a new key, and this key is shared among the members of the
          committee by secret sharing.
        - Each share of the key is hidden by a pad (a mask of 32 bytes). The two members concerned
          derive this pad from their common secret and from the list that each was sent.
        - Each member reveals the pads for its own list. So `threshold` members with the same list
          open each other's answers. With different lists the pads differ, and nothing opens.

        Args:
            request: one of `SecureRound.requests`.
            by_hand: see `mask`.

        Raises:
            WireError: if the request is faulty, if a client on the list did not report, or if this
                client is not in the committee.
            SecureError: if this client masked no vector in this round; if the list has too few
                clients, or too few neighbours of a client; if another list was answered in this
                round; or if a later round was answered.
        """
        place = "unmask"
        public = self._public_round(
            read_number(request, "round", place),
            read_names(request, "cohort", place),
            read_number(request, "size", place),
        )
        me = public.names.index(self.name)
        if by_hand:
            self._check_is_member(public, me)
            return simulated_shares(public, request)
        self._check_may_unmask(public, me)
        reported, label = self._checked_list(request, public, me)
        clients: list[int] = np.flatnonzero(reported).tolist()
        sizes = [public.sealed_size(i) for i in clients]
        sealed = read_bytes(request, "sealed", (sum(sizes),), place)
        nonces = read_bytes(request, "nonces", (len(clients), NONCE), place)
        question = digest(label, sealed.tobytes(), nonces.tobytes())
        self._answered.answer_once_(public, "unmask", question)

        blobs = np.split(sealed, np.cumsum(sizes)[:-1])
        body = self._opened_shares(public, reported, clients, blobs, nonces)
        key = derive(self._secret, "unmask", question)
        body_key = derive(key, "body")
        members = public.members(reported)
        # A point belongs to a position in the committee. Shares of members that did not report are
        # computed too, but not sent.
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
                # The key is used only once, so a nonce of zeros is fine.
                "body": as_tensor(seal(body_key, bytes(NONCE), body, label)),
                "commitment": as_tensor(commitment(body_key)),
                "locks": as_tensor(b"".join(locks)).view(-1, 32)
                ^ as_tensor(key_shares[members, 0]),
                "opens": as_tensor(b"".join(opens)).view(-1, 32),
            },
        )

    def _check_is_member(self, public: PublicRound, me: int) -> None:
        if me not in public.committee:
            raise WireError(
                f"{self.name!r} is not in the committee of round {public.number}",
                place="unmask.cohort",
                cure="ask the members of the committee",
            )

    def _check_may_unmask(self, public: PublicRound, me: int) -> None:
        self._check_is_member(public, me)
        if not self._answered.took_part(public):
            raise SecureError(
                f"{self.name!r} masked no vector in this round with this cohort",
                place=f"round {public.number}",
                cure="ask the members that reported",
            )

    def _opened_shares(
        self,
        public: PublicRound,
        reported: np.ndarray,
        clients: Sequence[int],
        blobs: Sequence[np.ndarray],
        nonces: np.ndarray,
    ) -> bytes:
        """Returns the shares that unmask the sum, as the plaintext of an answer.

        Args:
            public: the round.
            reported: which clients reported, bool [cohort].
            clients: numbers of the clients that reported.
            blobs: for each of these clients, the shares that it encrypted for this member.
            nonces: for each of these clients, the nonce, uint8 [clients, NONCE].

        Returns:
            One byte for each of these clients (1 if its shares could not be decrypted), followed by
            all shares to open.
        """
        unread = np.zeros(len(clients), np.uint8)
        wanted = []
        for row, (i, blob) in enumerate(zip(clients, blobs, strict=True)):
            key = self._seal_key(public, public.names[i], self.name)
            opened = unseal(key, nonces[row].tobytes(), blob.tobytes(), public.context)
            unread[row] = opened is None
            # Shares that cannot be decrypted are replaced by zeros, to keep the answer's length.
            shares = np.frombuffer(opened or bytes(len(blob) - TAG), np.uint8).reshape(-1, SEED)
            wanted.append(shares[seeds_to_open(public, i, reported)])
        return unread.tobytes() + b"".join(rows.tobytes() for rows in wanted)

    def state(self) -> dict[str, JSON]:
        """Returns the state as JSON. Save it before an answer is sent.

        A client that lost its state would answer a second, different request of the same round.
        """
        roster = [] if self._roster is None else self._roster.rows
        return {"run": self._setup.run, "roster": roster, "answered": self._answered.to_json()}

    def load_state_(self, state: Mapping[str, JSON]) -> None:
        """Restores a result of `state`.

        Raises:
            RecipeError: if `state` is not the state of this client in this run.
        """
        try:
            answered = AnsweredRounds.from_json(self.name, state["answered"])
            rows: list[list[str]] = state["roster"]  # type: ignore[assignment]
            if rows:
                names, keys, signatures = zip(*rows, strict=True)
                saved = Roster(
                    names, tuple(map(bytes.fromhex, keys)), tuple(map(bytes.fromhex, signatures))
                )
                # Checked like a roster from the server, because a file may have been changed.
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

    def recall_(self, state: Mapping[str, JSON]) -> None:
        """Restores what was answered, and keeps the roster that this client has.

        Args:
            state: a result of `state`, or {}: nothing was answered yet.
        """
        self._answered = AnsweredRounds(self.name)
        if state.get("run") == self._setup.run:
            self._answered = AnsweredRounds.from_json(self.name, state["answered"])
        # Saved when this run had another name.
        elif state:
            self.take_over_(state)

    def take_over_(self, state: Mapping[str, JSON]) -> None:
        """Takes over a state that was saved when this run had another name.

        An update of fedpress can change the name. Then all clients exchange keys again, but this
        client refuses all rounds up to the last one that it answered. Otherwise a second sum of the
        same vectors could be opened, under new masks and for another list of clients. The
        difference of the two sums would reveal single clients.

        Raises:
            RecipeError: if `state` is not a result of the method `state`.
        """
        try:
            self._answered.take_over_(state["answered"])
        except (KeyError, TypeError, ValueError) as error:
            raise RecipeError(
                f"not the state of {self.name!r} ({type(error).__name__})",
                place="state",
                cure="load the state that this client saved",
            ) from error

    def _keep_roster(self, roster: Roster) -> None:
        """Stores a checked roster, unless another one is stored already."""
        if self._roster is not None and self._roster.digest != roster.digest:
            raise SecureError(
                "another roster was accepted in this run",
                place="roster",
                cure="start a new run to change the clients",
            )
        if roster.key_of.get(self.name) != self._key.public:
            raise WireError(
                f"the key of {self.name!r} is missing or was replaced",
                place="roster.keys",
                cure="send the key of its join message",
            )
        self._roster = roster

    def _checked_words(self, values: Tensor) -> np.ndarray:
        """Checks the type and the bound of `values`, and returns them modulo 2^bits."""
        # Other types would be converted to integers silently.
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
        # Vectors within the bound cannot make the sum overflow.
        bound = self._setup.plan.bound
        if bound is not None and not bool((values >= -bound).all() and (values <= bound).all()):
            raise RecipeError(
                f"a value exceeds the bound of {bound}, so sums could overflow",
                place="values",
                cure="clip first",
            )
        return to_words(values, self._setup.plan.bits)

    def _public_round(self, number: int, cohort: Sequence[str], size: int) -> PublicRound:
        if self._roster is None:
            raise SecureError(
                "this client has no roster of this run",
                place="roster",
                cure="send the roster first",
            )
        public = PublicRound.of(self._setup, self._roster, number, cohort, size)
        if self.name not in public.names:
            raise WireError(
                f"{self.name!r} was asked but is not in the cohort",
                place="round.cohort",
                cure="ask only clients of the cohort",
            )
        return public

    def _checked_list(
        self, request: SecAggMessage, public: PublicRound, me: int
    ) -> tuple[np.ndarray, bytes]:
        """Returns which clients reported (bool [cohort]) and the digest of this list.

        Every client on the list must have signed its report, so the server cannot invent reports.
        """
        flags = read_bytes(request, "reported", (len(public.names),), "unmask")
        # This client has reported, so a list without it is wrong.
        if flags.max() > 1 or not flags[me]:
            raise WireError(
                "expected 0 or 1 per client, and 1 for the client that is asked",
                place="unmask.reported",
                cure="send 1 for each client that reported",
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
                    cure="list only clients that reported",
                )
        problem = public.too_few(reported)
        if problem:
            raise SecureError(
                problem,
                place=f"round {public.number}",
                cure="go on with the next round; this sum stays secret",
            )
        return reported, list_digest(public, reported, digests)

    def _shared_secret(self, other: str) -> bytes:
        """Returns the secret that this client shares with `other`."""
        # Computed on first use, because a round needs only the secrets that this client shares with
        # its neighbours and with the committee.
        if other not in self._shared_secrets:
            assert self._roster is not None
            secret = self._key.shared_secret(self._roster.key_of[other])
            # Not None, because `Roster.from_message` has refused keys of low order.
            assert secret is not None
            self._shared_secrets[other] = secret
        return self._shared_secrets[other]

    def _shared_seed(self, public: PublicRound, other: str) -> bytes:
        """Returns the seed of the mask with a neighbour, which derives the same seed."""
        return derive(self._shared_secret(other), "seed", public.context, size=SEED)

    def _seal_key(self, public: PublicRound, owner: str, holder: str) -> bytes:
        """Returns the key that encrypts the shares from client `owner` to member `holder`."""
        other = holder if owner == self.name else owner
        # The names are ordered, so the two directions have different keys.
        return derive(self._shared_secret(other), "seal", public.context, owner, holder)

    def _pad(self, public: PublicRound, label: bytes, owner: str, holder: str) -> bytes:
        """Returns the pad that hides one share of the key that encrypts the owner's answer.

        It is the share for the member `holder`. Owner and holder derive the same pad only if the
        server sent both the same list, whose digest is `label`.
        """
        other = holder if owner == self.name else owner
        return derive(self._shared_secret(other), "lock", label, owner, holder)

    def _sign(self, *words: str | int | bytes) -> bytes:
        return sign(self._secret, *self._setup.words, *words)
