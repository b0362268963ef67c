"""Where the rounds of a federate stage stand: all that is needed to go on, and to stop early."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fedpress.core import parameters
from fedpress.federation import RoundRecord, Start
from fedpress.privacy.ledger import Ledger
from fedpress.stages.federate.failures import Failures
from fedpress.stages.federate.server import ServerHalf
from fedpress.tasks import Task
from fedpress.tasks.base import number
from fedpress.training.evaluate import Evaluation
from fedpress.workspace.drive import Snapshot

PLAIN = ("round", "best", "best_round", "bytes_up", "bytes_down", "note", "stopped", "closed")
"""Fields of `Progress` that JSON holds as they are."""
SERVER = "server/"
"""Before the names of the server's state in a checkpoint."""


@dataclass(frozen=True, eq=False)
class Progress:
    """What the rounds so far have led to.

    Attributes:
        params: the server's parameters [d].
        ledger: with all rounds so far in it.
        server_state: see `RoundRecord.server_state`.
        round: how many rounds are done.
        best: the best validation score so far, None without one.
        best_round: the round that gave it.
        bytes_up: of all rounds so far, from the clients.
        bytes_down: to them.
        set_up: bytes [up, down] of the messages before the first round; None if a run of an older
            version counted some of them in its first round.
        note: what a person reads of the last round.
        stopped: why no further round is begun; empty while they go on.
        closed: rounds in a row in which no update counted.
        failures: what gave nothing so far.
    """

    params: Tensor
    ledger: Ledger
    server_state: dict[str, Tensor] | None = None
    round: int = 0
    best: float | None = None
    best_round: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    set_up: tuple[int, int] | None = None
    note: str = ""
    stopped: str = ""
    closed: int = 0
    failures: Failures = field(default_factory=Failures)

    @classmethod
    def begin(cls, server: ServerHalf) -> Progress:
        """Stands before the first round."""
        set_up = server.set_up.up, server.set_up.down
        return cls(parameters.flatten(server.model), server.ledger, set_up=set_up)

    @property
    def start(self) -> Start:
        """Where the next round goes on from."""
        return Start(self.params, self.round, self.server_state or None)

    def after(
        self, record: RoundRecord, seen: Evaluation | None, task: Task, **more: Any
    ) -> Progress:
        """Stands after the round of `record`, whose validation was `seen`; `more` are further fields."""
        score = number(seen.score) if seen else None
        better = task.better(score, self.best)
        return Progress(
            params=record.params,
            server_state=record.server_state,
            round=record.round,
            best=score if better else self.best,
            best_round=record.round if better else self.best_round,
            bytes_up=self.bytes_up + record.bytes_up,
            bytes_down=self.bytes_down + record.bytes_down,
            set_up=self._set_up_with(record),
            note=f"validation {task.formatted(score)}" if seen else "",
            **more,
        )

    def _set_up_with(self, record: RoundRecord) -> tuple[int, int] | None:
        if self.set_up is None:
            return None
        up, down = self.set_up
        return up + record.set_up.up, down + record.set_up.down

    def snapshot(self) -> Snapshot:
        """Returns what a checkpoint holds."""
        state = self.server_state or {}
        tensors = {"params": self.params, **{f"{SERVER}{k}": v for k, v in state.items()}}
        plain = {name: getattr(self, name) for name in PLAIN}
        facts: dict[str, Any] = {
            "ledger": self.ledger.to_json(),
            "failures": self.failures.to_json(),
        }
        if self.set_up is not None:
            facts["set_up"] = [*self.set_up]
        return Snapshot(tensors, plain | facts)

    @classmethod
    def load(cls, saved: Snapshot) -> Progress:
        """Reads what `snapshot` gave."""
        facts: Mapping[str, Any] = saved.facts
        set_up = facts.get("set_up")
        return cls(
            params=saved.tensors["params"],
            ledger=Ledger.from_json(facts["ledger"]),
            server_state=parameters.part_of(saved.tensors, SERVER),
            set_up=None if set_up is None else tuple(set_up),
            failures=Failures.from_json(facts.get("failures", {})),
            **{name: facts[name] for name in PLAIN},
        )
