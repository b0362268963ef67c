"""The server of a secure sum: it adds hidden vectors, and sees nothing but their sum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fedpress.errors import RecipeError, SecureError, WireError
from fedpress.secagg.client import list_digest, report_digest, wanted_rows
from fedpress.secagg.keys import NONCE, SIGNATURE, TAG, unseal
from fedpress.secagg.masks import add_masks_, centred, tensor_type, to_words, word
from fedpress.secagg.parts import JSON, SecAggMessage, read, read_bytes, read_number, tensor
from fedpress.secagg.plan import SecurePlan
from fedpress.secagg.public import SEED, Roster, Round, SecAggSetup, commitment
from fedpress.secagg.shares import recover


class SecAggServer:
    """The server's side of the set-up; the same clients joining again give the same roster."""

    def __init__(self, plan: SecurePlan, identities: Mapping[str, bytes], run: str) -> None:
        self._setting = SecAggSetup(plan, dict(identities), run)
        self._joined: dict[str, tuple[bytes, bytes]] = {}
        self._roster: Roster | None = None
        self._accepted: set[str] = set()

    def join(self, name: str, part: SecAggMessage) -> None:
        """Takes a client's key; WireError if it is not signed by it, came twice, or came after the roster."""
        key = read_bytes(part, "key", (32,), "join").tobytes()
        signature = read_bytes(part, "signature", (SIGNATURE,), "join").tobytes()
        if self._roster is not None or name in self._joined:
            raise WireError(
                f"{name!r} joined twice or after the roster was made",
                place="join",
                cure="join once before it",
            )
        if not self._setting.signed(name, signature, "join", name, key):
            raise WireError(
                f"not by {name!r}, or for another run or plan",
                place="join.signature",
                cure="use the same settings",
            )
        if any(key == other for other, _ in self._joined.values()):
            raise WireError(
                f"{name!r} has the key of another client", place="join.key", cure="send your own"
            )
        self._joined[name] = key, signature

    def roster(self) -> SecAggMessage:
        """Returns everybody's keys, to be sent to all; nobody can join any more.

        Raises:
            SecureError: if fewer clients joined than a round needs.
        """
        if self._roster is None:
            if len(self._joined) < self._setting.plan.cohort:
                raise SecureError(
                    f"{len(self._joined)} clients joined, a round needs {self._setting.plan.cohort}",
                    place="join",
                    cure="wait for more",
                )
            names = tuple(sorted(self._joined))
            keys, signatures = zip(*(self._joined[name] for name in names), strict=True)
            self._roster = Roster(names, keys, signatures)
        return self._roster.part()

    def load_roster_(self, roster: SecAggMessage) -> None:
        """Takes over a roster made before the server was stopped; WireError if it is faulty."""
        self._roster = Roster.read(roster, self._setting)

    def accepted(self, name: str, part: SecAggMessage) -> None:
        """Notes that a client checked the roster; WireError if it does not say so about this one."""
        signature = read_bytes(part, "signature", (SIGNATURE,), "accept").tobytes()
        if self._roster is None or name not in self._roster.names:
            raise WireError(f"{name!r} is not in the roster", place="accept", cure="join first")
        if not self._setting.signed(name, signature, "accept", name, self._roster.digest):
            raise WireError(
                f"{name!r} signed no such roster",
                place="accept.signature",
                cure="send it the same as all",
            )
        self._accepted.add(name)

    def open(self, round: int, cohort: Sequence[str], size: int) -> SecureRound:
        """Begins a round of vectors [size].

        Raises:
            RecipeError: if the cohort is not as planned or somebody in it did not accept the roster.
        """
        if self._roster is None or not self._accepted.issuperset(cohort) or size < 1:
            raise RecipeError(
                "somebody in it did not accept the roster",
                place="cohort",
                cure="choose among those who did",
            )
        try:
            return SecureRound(
                self._setting, Round.of(self._setting, self._roster, round, cohort, size)
            )
        except WireError as error:
            place = error.place.removeprefix("round.")
            raise RecipeError(error.problem, place=place, cure=error.cure) from error


class SecureRound:
    """One sum: `add` reports as they come, send the `requests`, `share` the answers, then `sum`."""

    def __init__(self, setting: SecAggSetup, facts: Round) -> None:
        self._setting, self._facts, self._plan = setting, facts, setting.plan
        self._number = {name: i for i, name in enumerate(facts.names)}
        self._total = np.zeros(facts.size, word(self._plan.bits))
        self._reports: dict[int, dict[str, np.ndarray]] = {}
        self._asked: np.ndarray | None = None  # who reported, once that is settled
        self._wanted: list[list[int]] = []  # which shares of each of them are opened
        self._answers: dict[int, dict[str, np.ndarray]] = {}  # by the place in the committee

    @property
    def reported(self) -> list[str]:
        """Names of those whose vectors are in the sum, in order."""
        return [self._facts.names[i] for i in sorted(self._reports)]

    def add(self, name: str, part: SecAggMessage) -> None:
        """Adds one client's hidden vector and keeps only its shares.

        Raises:
            WireError: if the report is faulty, not signed by the client, came twice or too late; it is not added.
        """
        place, facts = "report", self._facts
        me = self._client(name, part, place)
        if me in self._reports or self._asked is not None:
            raise WireError(
                f"{name!r} reported twice or too late", place=place, cure="report once per round"
            )
        masked = read(part, "masked", tensor_type(self._plan.bits), (facts.size,), place)
        shapes = {
            "nonce": (NONCE,),
            "sealed": (len(facts.committee), facts.sealed_size(me)),
            "commitments": (1 + len(facts.neighbours(me)), SEED),
            "signature": (SIGNATURE,),
        }
        kept = {
            field: read_bytes(part, field, shape, place).copy() for field, shape in shapes.items()
        }
        if int(masked.min()) < 0 or int(masked.max()) >> self._plan.bits:
            raise WireError(
                f"a value is not from 0 to 2^{self._plan.bits} - 1",
                place=f"{place}.masked",
                cure="send it unchanged",
            )
        made = report_digest(
            {"masked": masked} | {field: torch.from_numpy(kept[field]) for field in shapes}
        )
        if not self._setting.signed(
            name, kept["signature"].tobytes(), "report", facts.context, name, made
        ):
            raise WireError(
                f"not by {name!r} about this round and cohort",
                place=f"{place}.signature",
                cure="send it unchanged",
            )
        self._total += to_words(masked, self._plan.bits)
        self._reports[me] = kept | {"digest": np.frombuffer(made, np.uint8)}

    def requests(self) -> dict[str, SecAggMessage]:
        """Returns the question for each member of the committee who reported; nobody can report any more.

        Raises:
            SecureError: if too few reported for the plan, or two clients do not agree on their mask.
        """
        facts = self._facts
        reported = np.zeros(len(facts.names), bool)
        reported[list(self._reports)] = True
        problem = facts.too_few(reported) if reported.any() else "nobody reported"
        holders = [k for k, i in enumerate(facts.committee) if reported[i]]
        if not problem and len(holders) < self._plan.threshold:
            problem = f"{len(holders)} of the committee reported, and at least {self._plan.threshold} must"
        problem = problem or self._disagreement()
        if problem:
            raise SecureError(
                f"{problem}", place=f"round {facts.number}", cure="the sum stays closed"
            )
        self._asked = reported
        self._wanted = [wanted_rows(facts, i, reported) for i in self._settled()]
        reports = [self._reports[i] for i in self._settled()]
        common = {
            "reported": tensor(reported.astype(np.uint8)),
            "nonces": tensor(np.stack([r["nonce"] for r in reports])),
            "digests": tensor(np.stack([r["digest"] for r in reports])),
            "signatures": tensor(np.stack([r["signature"] for r in reports])),
        }
        header: dict[str, JSON] = {
            "round": facts.number,
            "size": facts.size,
            "cohort": [*facts.names],
        }
        return {
            facts.names[facts.committee[k]]: SecAggMessage(
                header,
                common | {"sealed": tensor(np.concatenate([r["sealed"][k] for r in reports]))},
            )
            for k in holders
        }

    def share(self, name: str, part: SecAggMessage) -> None:
        """Takes one member's answer; WireError if it is faulty, which counts as none."""
        place, facts = "shares", self._facts
        me = self._client(name, part, place)
        if self._asked is None or me not in facts.committee or not self._asked[me]:
            raise WireError(
                f"{name!r} was not asked", place=place, cure="answer only what was asked"
            )
        k = facts.committee.index(me)
        if k in self._answers:
            raise WireError(f"{name!r} answered twice", place=place, cure="answer once")
        clients = self._settled()
        holders = sum(int(self._asked[i]) for i in facts.committee)
        rows = sum(map(len, self._wanted))
        shapes = {
            "body": (len(clients) + rows * SEED + TAG,),
            "commitment": (SEED,),
            "locks": (holders, 32),
            "opens": (holders, 32),
        }
        self._answers[k] = {
            field: read_bytes(part, field, shape, place).copy() for field, shape in shapes.items()
        }

    def sum(self) -> Tensor:
        """Returns the sum of those who reported, int64 [size] from -2^(bits-1) to 2^(bits-1) - 1.

        Raises:
            SecureError: if too few of the committee gave right answers.
        """
        if self._asked is None:
            raise SecureError(
                "nobody was asked to unmask",
                place=f"round {self._facts.number}",
                cure="send the requests first",
            )
        seeds = self._seeds(self._bodies())
        total = self._total.copy()
        add_masks_(total, self._to_remove(seeds))
        return centred(total, self._plan.bits)

    def _settled(self) -> list[int]:
        """Returns the numbers of those in the sum, once the requests were made."""
        assert self._asked is not None
        return [int(i) for i in np.flatnonzero(self._asked)]

    def _client(self, name: str, part: SecAggMessage, place: str) -> int:
        if name not in self._number:
            raise WireError(
                f"{name!r} is not in the cohort of round {self._facts.number}",
                place=place,
                cure="stay away",
            )
        number = read_number(part, "round", place)
        if number != self._facts.number:
            raise WireError(
                f"got {number}, expected {self._facts.number}",
                place=f"{place}.round",
                cure="answer the newest request",
            )
        return self._number[name]

    def _disagreement(self) -> str:
        """Says which client committed to other masks than its neighbours, so that the sum would be wrong."""
        facts, size = self._facts, len(self._facts.names)
        table = np.zeros((size, size, SEED // 8), np.uint64)
        for i, report in self._reports.items():
            table[i, facts.neighbours(i)] = report["commitments"][1:].view(np.uint64)
        both = np.zeros(size, bool)
        both[list(self._reports)] = True
        wrong = (table != table.transpose(1, 0, 2)).any(2) & both[:, None] & both[None, :]
        if not wrong.any():
            return ""
        return f"{facts.names[int(wrong.sum(1).argmax())]!r} and its neighbours do not agree on their masks"

    def _bodies(self) -> dict[int, bytes]:
        """Returns what the members answered, by place in the committee, as far as it can be opened."""
        assert self._asked is not None
        places, threshold = sorted(self._answers), self._plan.threshold
        if len(places) < threshold:
            raise self._closed(
                f"{len(places)} of the committee answered, and at least {threshold} must"
            )
        digests = np.stack([self._reports[i]["digest"] for i in self._settled()])
        label = list_digest(self._facts, self._asked, digests)
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

    def _body_keys(self, places: list[int]) -> dict[int, bytes]:
        """Returns the keys with which the members at `places` sealed their answers, as far as shares give them.

        Each member split its key among those of the committee who reported (see `SecAggClient.unmask`): its `locks`
        are the shares, hidden, and the others' `opens` take off what hides them.
        """
        assert self._asked is not None
        reported = [k for k, i in enumerate(self._facts.committee) if self._asked[i]]
        owners = [reported.index(k) for k in places]
        answers = [self._answers[k] for k in places]
        locks = np.stack([one["locks"][owners] for one in answers])  # [owner, holder, 32]
        opens = np.stack([one["opens"][owners] for one in answers])  # [holder, owner, 32]
        expected = [one["commitment"].tobytes() for one in answers]
        keys, lost = recover(
            locks.transpose(1, 0, 2) ^ opens,
            [k + 1 for k in places],
            self._plan.threshold,
            lambda number, key: commitment(key) == expected[number],
        )
        return {k: keys[at].tobytes() for at, k in enumerate(places) if at not in lost}

    def _seeds(self, bodies: Mapping[int, bytes]) -> np.ndarray:
        """Returns the seeds that were wanted, uint8 [seeds, SEED], from the shares in the members' `bodies`.

        A body begins with a flag for each client whose shares the member could not read. So clients are recovered in
        groups: those whose shares the same members could read.
        """
        clients, holders = self._settled(), np.array(sorted(bodies))
        raw = np.stack([np.frombuffer(bodies[k], np.uint8) for k in holders])
        unread, shares = np.split(raw, [len(clients)], axis=1)
        shares = shares.reshape(len(holders), -1, SEED)
        kept = [self._reports[i]["commitments"] for i in clients]
        expected = np.concatenate([all[i] for all, i in zip(kept, self._wanted, strict=True)])
        ends = np.cumsum([0, *map(len, self._wanted)])
        seeds = np.zeros((ends[-1], SEED), np.uint8)
        groups: dict[bytes, list[int]] = {}
        for at in range(len(clients)):
            groups.setdefault(unread[:, at].tobytes(), []).append(at)
        for flags, members in groups.items():
            able = np.flatnonzero(np.frombuffer(flags, np.uint8) == 0)
            if len(able) < self._plan.threshold:
                name = self._facts.names[clients[members[0]]]
                raise self._closed(
                    f"only {len(able)} of the committee can read what {name!r} sent them"
                )
            rows = np.concatenate([np.arange(ends[at], ends[at + 1]) for at in members])
            points = (holders[able] + 1).tolist()
            seeds[rows] = self._recovered(shares[np.ix_(able, rows)], points, expected[rows])
        return seeds

    def _recovered(self, shares: np.ndarray, points: list[int], expected: np.ndarray) -> np.ndarray:
        """Returns the secrets of `shares` [points, secrets, SEED], all of which must fit what was committed to."""
        commitments = [row.tobytes() for row in expected]
        found, lost = recover(
            shares,
            points,
            self._plan.threshold,
            lambda number, seed: commitment(seed) == commitments[number],
        )
        if lost:
            raise self._closed("the shares of the committee do not fit what clients committed to")
        return found

    def _to_remove(self, seeds: np.ndarray) -> list[tuple[bytes, bool]]:
        """Returns the masks left in the total, each with the opposite sign."""
        left, rows = [], iter(seeds)
        for i, opened in zip(self._settled(), self._wanted, strict=True):
            neighbours = self._facts.neighbours(i)
            left.append((next(rows).tobytes(), False))
            left += [(next(rows).tobytes(), bool(i > neighbours[row - 1])) for row in opened[1:]]
        return left

    def _closed(self, problem: str) -> SecureError:
        return SecureError(
            f"{problem}", place=f"round {self._facts.number}", cure="the sum stays closed"
        )
