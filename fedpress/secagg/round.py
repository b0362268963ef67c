"""One round of a secure sum on the server: adds masked vectors, and unmasks only their sum."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import repeat

import numpy as np
import torch
from torch import Tensor

from fedpress.errors import SecureError, WireError
from fedpress.secagg.keys import NONCE, SIGNATURE, unseal
from fedpress.secagg.masks import add_masks_, centred, tensor_type, to_words, word_type
from fedpress.secagg.message import (
    JSON,
    SecAggMessage,
    as_tensor,
    find_tensor,
    read_bytes,
    read_number,
    read_tensor,
)
from fedpress.secagg.public import (
    SEED,
    PublicRound,
    SecAggSetup,
    answer_shapes,
    commitment,
    list_digest,
    report_digest,
    report_shapes,
    seeds_to_open,
)
from fedpress.secagg.shares import recover_secrets
from fedpress.secagg.simulated import unmade_bytes


class SecureRound:
    """The server's side of one round.

    Call `add` with each client's report (its masked vector). Then send the `requests` to the
    committee (the clients that help to unmask), call `share` with each answer, and call `sum`.
    """

    def __init__(self, setup: SecAggSetup, public: PublicRound) -> None:
        """Starts a round; see `SecAggServer.open`."""
        self._setup = setup
        self._public = public
        self._plan = setup.plan
        self._number = {name: i for i, name in enumerate(public.names)}
        # Each masked vector is added when it arrives, so that it need not be stored.
        self._total = np.zeros(public.size, word_type(self._plan.bits))
        self._reports: dict[int, dict[str, np.ndarray]] = {}
        # Which clients reported, bool [cohort]; None until the requests are made.
        self._asked: np.ndarray | None = None
        # The seeds that are opened, for each client in the sum; see `seeds_to_open`.
        self._wanted: list[list[int]] = []
        # Answers by the member's position in the committee.
        self._answers: dict[int, dict[str, np.ndarray]] = {}

    @property
    def reported(self) -> list[str]:
        """Sorted names of the clients whose vectors are in the sum."""
        return [self._public.names[i] for i in sorted(self._reports)]

    def simulated(self) -> SimulatedRound:
        """Returns a new round of the same clients for messages without masks and ciphertexts."""
        return SimulatedRound(self._setup, self._public)

    def add(self, name: str, message: SecAggMessage) -> None:
        """Adds one client's masked vector to the sum, and stores its encrypted shares.

        Args:
            name: name of the client.
            message: result of `SecAggClient.mask`.

        Raises:
            WireError: if the report is faulty, is not signed by the client, is the client's second
                report, or comes after `requests`. Then it is not added.
        """
        place = "report"
        public = self._public
        me = self._client(name, message, place)
        if me in self._reports or self._asked is not None:
            raise WireError(
                f"{name!r} reported twice or too late", place=place, cure="report once per round"
            )
        masked = read_tensor(message, "masked", tensor_type(self._plan.bits), (public.size,), place)
        half = 1 << (self._plan.bits - 1)
        if int(masked.min()) < -half or int(masked.max()) >= half:
            raise WireError(
                f"a value is not from -2^{self._plan.bits - 1} to 2^{self._plan.bits - 1} - 1",
                place=f"{place}.masked",
                cure="send it unchanged",
            )
        self._reports[me] = self._checked(me, masked, message)
        # Words wrap around at a multiple of 2^bits, so the total needs no reduction.
        self._total += to_words(masked, self._plan.bits)

    def _checked(self, me: int, masked: Tensor, message: SecAggMessage) -> dict[str, np.ndarray]:
        """Returns the fields of a client's report that are kept, after a check of its signature."""
        place = "report"
        public, name = self._public, self._public.names[me]
        if message.unmade:
            raise _mixed(place)
        kept = _read_fields(message, report_shapes(public, me), place)
        tensors = {field: torch.from_numpy(array) for field, array in kept.items()}
        made = report_digest({"masked": masked, **tensors})
        signature = kept["signature"].tobytes()
        # Checked here, because the committee refuses the whole sum if one signature is wrong.
        if not self._setup.signed(name, signature, "report", public.context, name, made):
            raise WireError(
                f"not signed by {name!r} for this round and cohort",
                place=f"{place}.signature",
                cure="send it unchanged",
            )
        return kept | {"digest": np.frombuffer(made, np.uint8)}

    def requests(self) -> dict[str, SecAggMessage]:
        """Returns a request for each committee member that reported, by name.

        After this call no client can report, because the committee answers for one list only.

        Raises:
            SecureError: if too few clients or members of the committee reported, or two neighbours
                have different masks.
        """
        public = self._public
        reported = np.zeros(len(public.names), bool)
        reported[list(self._reports)] = True
        # `too_few` takes a minimum over the reporting clients, so it needs at least one of them.
        problem = "no client reported"
        if reported.any():
            problem = public.too_few(reported)
        members = public.members(reported)
        if not problem and len(members) < self._plan.threshold:
            problem = (
                f"{len(members)} of the committee reported, and at least {self._plan.threshold} "
                "must"
            )
        # Checked before the committee is asked, because the committee answers one list per round.
        problem = problem or self._disagreement()
        if problem:
            raise self._closed(problem)

        # From here on `add` refuses reports.
        self._asked = reported
        clients = self._clients_in_sum()
        self._wanted = [seeds_to_open(public, i, reported) for i in clients]
        header: dict[str, JSON] = {
            "round": public.number,
            "size": public.size,
            "cohort": [*public.names],
        }
        flags = as_tensor(reported.astype(np.uint8))
        return {
            public.names[public.committee[k]]: request
            for k, request in zip(members, self._questions(header, flags, members), strict=True)
        }

    def _questions(
        self, header: dict[str, JSON], flags: Tensor, members: list[int]
    ) -> Iterator[SecAggMessage]:
        """Yields the request for each of `members`, which are positions in the committee."""
        common = {
            "reported": flags,
            "nonces": as_tensor(self._reported_field("nonce")),
            "digests": as_tensor(self._reported_field("digest")),
            "signatures": as_tensor(self._reported_field("signature")),
        }
        reports = [self._reports[i] for i in self._clients_in_sum()]
        for k in members:
            # Each member gets the shares that the clients encrypted for it.
            sealed = np.concatenate([report["sealed"][k] for report in reports])
            yield SecAggMessage(header, {**common, "sealed": as_tensor(sealed)})

    def share(self, name: str, message: SecAggMessage) -> None:
        """Stores one committee member's answer.

        Args:
            name: name of the member.
            message: result of `SecAggClient.unmask`.

        Raises:
            WireError: if the answer is faulty. Then it is not stored.
        """
        place = "shares"
        public = self._public
        me = self._client(name, message, place)
        if self._asked is None or me not in public.committee or not self._asked[me]:
            raise WireError(
                f"{name!r} was not asked", place=place, cure="answer only what was asked"
            )
        k = public.committee.index(me)
        if k in self._answers:
            raise WireError(f"{name!r} answered twice", place=place, cure="answer once")
        self._answers[k] = self._answer(message, self._asked)

    def _answer(self, message: SecAggMessage, asked: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the fields of a member's answer."""
        place = "shares"
        if message.unmade:
            raise _mixed(place)
        # All expected sizes follow from the list, so a member cannot make the server store more.
        return _read_fields(message, answer_shapes(self._public, asked), place)

    def sum(self) -> Tensor:
        """Returns the sum of the vectors of all clients that reported, int64 [size].

        Its values are from -2^(bits-1) to 2^(bits-1) - 1.

        Raises:
            SecureError: if too few committee members gave right answers.
        """
        if self._asked is None:
            raise SecureError(
                "the committee was not asked to unmask",
                place=f"round {self._public.number}",
                cure="send the requests first",
            )
        return centred(self._unmasked_total(), self._plan.bits)

    def _unmasked_total(self) -> np.ndarray:
        """Returns the sum without masks, as words."""
        total = self._total.copy()
        add_masks_(total, self._to_remove(self._seeds(self._bodies())))
        return total

    def _clients_in_sum(self) -> list[int]:
        """Returns the numbers of the clients in the sum; only after `requests`."""
        assert self._asked is not None
        clients: list[int] = np.flatnonzero(self._asked).tolist()
        return clients

    def _reported_field(self, field: str) -> np.ndarray:
        """Returns one field of the reports of all clients in the sum, stacked."""
        return np.stack([self._reports[i][field] for i in self._clients_in_sum()])

    def _client(self, name: str, message: SecAggMessage, place: str) -> int:
        """Returns the number of the client that sent `message`, or raises WireError."""
        if name not in self._number:
            raise WireError(
                f"{name!r} is not in the cohort of round {self._public.number}",
                place=place,
                cure="take part only in rounds whose cohort names you",
            )
        number = read_number(message, "round", place)
        if number != self._public.number:
            raise WireError(
                f"got {number}, expected {self._public.number}",
                place=f"{place}.round",
                cure="answer the newest request",
            )
        return self._number[name]

    def _disagreement(self) -> str:
        """Returns a sentence that names a client with other masks than its neighbours; "" if none.

        Different masks do not cancel, so the sum would silently be wrong.
        """
        public = self._public
        size = len(public.names)
        # The commitment of client i to its mask with client j is at [i, j].
        table = np.zeros((size, size, SEED // 8), np.uint64)
        for i, report in self._reports.items():
            table[i, public.neighbours(i)] = report["commitments"][1:].view(np.uint64)
        both = np.zeros(size, bool)
        both[list(self._reports)] = True
        wrong = (table != table.transpose(1, 0, 2)).any(2) & both[:, None] & both[None, :]
        if not wrong.any():
            return ""
        # If two clients differ, either may be wrong. Most likely it is the client that differs from
        # the largest number of neighbours.
        name = public.names[int(wrong.sum(1).argmax())]
        return f"{name!r} and its neighbours do not agree on their masks"

    def _bodies(self) -> dict[int, bytes]:
        """Returns the answers that can be decrypted, by the member's position in the committee.

        Raises:
            SecureError: if fewer answers than the threshold can be decrypted.
        """
        assert self._asked is not None
        self._check_enough_answers()
        places = sorted(self._answers)
        threshold = self._plan.threshold
        # The list is the associated data of the encryption: `unseal` fails for an answer to another
        # list.
        label = list_digest(self._public, self._asked, self._reported_field("digest"))
        bodies = {}
        for place, key in self._body_keys(places).items():
            sealed = self._answers[place]["body"].tobytes()
            body = unseal(key, bytes(NONCE), sealed, label)
            if body is not None:
                bodies[place] = body
        if len(bodies) < threshold:
            raise self._closed(
                f"{len(bodies)} of the committee gave right answers, and at least {threshold} must"
            )
        return bodies

    def _check_enough_answers(self) -> None:
        if len(self._answers) < self._plan.threshold:
            raise self._closed(
                f"{len(self._answers)} of the committee answered, and at least "
                f"{self._plan.threshold} must"
            )

    def _body_keys(self, places: list[int]) -> dict[int, bytes]:
        """Returns the keys of the answers of the members at `places`; wrong keys are left out.

        Each member has shared its key among all members that reported (see `SecAggClient.unmask`).
        The field `locks` of its answer contains these shares, each XOR a pad. The field `opens` of
        the other members' answers contains the pads.
        """
        assert self._asked is not None
        # Locks and opens have a row for each member that was asked, even if it did not answer.
        asked = self._public.members(self._asked)
        rows = [asked.index(k) for k in places]
        # Locks are [owner, holder, 32], and opens are [holder, owner, 32].
        locks = np.stack([self._answers[k]["locks"][rows] for k in places])
        opens = np.stack([self._answers[k]["opens"][rows] for k in places])
        expected = [self._answers[k]["commitment"].tobytes() for k in places]
        keys, lost = recover_secrets(
            locks.transpose(1, 0, 2) ^ opens,
            [k + 1 for k in places],
            self._plan.threshold,
            lambda number, key: commitment(key) == expected[number],
        )
        found = {}
        for at, k in enumerate(places):
            if at not in lost:
                found[k] = keys[at].tobytes()
        return found

    def _seeds(self, bodies: Mapping[int, bytes]) -> np.ndarray:
        """Recovers the seeds that are opened, of all clients in the sum, uint8 [seeds, SEED].

        Args:
            bodies: the decrypted answers by position in the committee. Each begins with a byte for
                every client: 1 if the member could not decrypt that client's shares.

        Raises:
            SecureError: if a seed cannot be recovered.
        """
        clients = self._clients_in_sum()
        holders = np.array(sorted(bodies))
        raw = np.stack([np.frombuffer(bodies[k], np.uint8) for k in holders])
        unread, shares = np.split(raw, [len(clients)], axis=1)
        shares = shares.reshape(len(holders), -1, SEED)
        commitments = []
        for i, wanted in zip(clients, self._wanted, strict=True):
            commitments.append(self._reports[i]["commitments"][wanted])
        expected = np.concatenate(commitments)
        # The seeds of client number `at` in the sum are the rows ends[at] to ends[at + 1].
        ends = np.cumsum([0, *map(len, self._wanted)])
        seeds = np.zeros((ends[-1], SEED), np.uint8)

        # One call recovers the seeds of all clients whose shares the same members could decrypt.
        groups: dict[bytes, list[int]] = {}
        for at in range(len(clients)):
            groups.setdefault(unread[:, at].tobytes(), []).append(at)
        for flags, members in groups.items():
            able = np.flatnonzero(np.frombuffer(flags, np.uint8) == 0)
            if len(able) < self._plan.threshold:
                name = self._public.names[clients[members[0]]]
                raise self._closed(
                    f"only {len(able)} of the committee can decrypt the shares of {name!r}"
                )
            rows = np.concatenate([np.arange(ends[at], ends[at + 1]) for at in members])
            points = (holders[able] + 1).tolist()
            seeds[rows] = self._recovered(shares[np.ix_(able, rows)], points, expected[rows])
        return seeds

    def _recovered(self, shares: np.ndarray, points: list[int], expected: np.ndarray) -> np.ndarray:
        """Returns the secrets of `shares` [points, secrets, SEED].

        Raises:
            SecureError: if a secret cannot be recovered so that it matches its commitment in
                `expected`.
        """
        commitments = [row.tobytes() for row in expected]
        found, lost = recover_secrets(
            shares,
            points,
            self._plan.threshold,
            lambda number, seed: commitment(seed) == commitments[number],
        )
        if lost:
            raise self._closed("the committee's shares do not match the clients' commitments")
        return found

    def _to_remove(self, seeds: np.ndarray) -> list[tuple[bytes, bool]]:
        """Returns the seeds of the masks that did not cancel in the total, with opposite signs."""
        masks = []
        rows = iter(seeds)
        for i, opened in zip(self._clients_in_sum(), self._wanted, strict=True):
            neighbours = self._public.neighbours(i)
            # Every client added the mask of its own seed.
            masks.append((next(rows).tobytes(), False))
            # Of a mask shared with a neighbour, the client with the lower number added it, and the
            # other subtracted it; here the opposite is done.
            for row in opened[1:]:
                masks.append((next(rows).tobytes(), bool(i > neighbours[row - 1])))
        return masks

    def _closed(self, problem: str) -> SecureError:
        """Returns the error that the sum of this round cannot be unmasked."""
        return SecureError(
            problem,
            place=f"round {self._public.number}",
            cure="go on with the next round; this sum stays secret",
        )


class SimulatedRound(SecureRound):
    """A round whose reports and answers have no masks and ciphertexts; see `simulated`."""

    def _checked(self, me: int, masked: Tensor, message: SecAggMessage) -> dict[str, np.ndarray]:
        shapes = report_shapes(self._public, me)
        _check_unmade(message, {"masked": tuple(masked.shape), **shapes}, "report")
        return {}

    def _disagreement(self) -> str:
        return ""

    def _questions(
        self, header: dict[str, JSON], flags: Tensor, members: list[int]
    ) -> Iterator[SecAggMessage]:
        clients = self._clients_in_sum()
        shapes = {
            "nonces": (len(clients), NONCE),
            "digests": (len(clients), 32),
            "signatures": (len(clients), SIGNATURE),
            "sealed": (sum(map(self._public.sealed_size, clients)),),
        }
        made = unmade_bytes(header, shapes)
        request = SecAggMessage(header, {**made.tensors, "reported": flags}, made.unmade)
        return repeat(request, len(members))

    def _answer(self, message: SecAggMessage, asked: np.ndarray) -> dict[str, np.ndarray]:
        _check_unmade(message, answer_shapes(self._public, asked), "shares")
        return {}

    def _unmasked_total(self) -> np.ndarray:
        self._check_enough_answers()
        return self._total


def _check_unmade(
    message: SecAggMessage, shapes: Mapping[str, tuple[int, ...]], place: str
) -> None:
    """Checks that a message has the tensors of each name in `shapes`, and that none of them is made.

    Raises:
        WireError: if a tensor is missing, has another type or shape, or is masked or encrypted.
    """
    # First what a round with masks refuses too, so that a faulty message has the same reason there.
    for name, shape in shapes.items():
        # The caller has read the masked vector, which is the only tensor that is not of bytes.
        if name != "masked":
            find_tensor(message, name, torch.uint8, shape, place)
    if not message.unmade.keys() >= shapes.keys():
        raise _mixed(place)


def _mixed(place: str) -> WireError:
    """Returns the error that some messages have masks or ciphertexts, and others do not."""
    return WireError(
        "some clients of the round mask and encrypt, and others do not",
        place=place,
        cure="run all clients of a round in the same engine",
    )


def _read_fields(
    message: SecAggMessage, shapes: Mapping[str, tuple[int, ...]], place: str
) -> dict[str, np.ndarray]:
    """Returns a copy of the uint8 tensor of each name in `shapes`, or raises WireError."""
    # Copied, because the arrays may be views of a received message, which can then be freed.
    return {name: read_bytes(message, name, shape, place).copy() for name, shape in shapes.items()}
