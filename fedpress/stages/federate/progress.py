"""The results of a federate stage after some of its rounds, as a checkpoint stores them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fedpress.core import parameters
from fedpress.federation import RoundRecord, Start
from fedpress.privacy.ledger import Ledger
from fedpress.stages.federate.failures import Failures
from fedpress.stages.federate.server import ServerSide
from fedpress.tasks import Task
from fedpress.tasks.base import json_number
from fedpress.training.evaluate import Evaluation
from fedpress.workspace.drive import Snapshot

PLAIN = ("round", "best", "best_round", "bytes_up", "bytes_down", "note", "stopped", "closed")
"""Fields of `Progress` that can be written as JSON without conversion."""
SERVER = "server/"
"""Prefix of the server's state in a checkpoint."""


@dataclass(frozen=True, eq=False)
class Progress:
    """The results of the rounds so far.

    Attributes:
        params: the server's parameters as one vector [d].
        ledger: entries of all private rounds so far, from which epsilon is computed.
        server_state: state of the server's optimizer and algorithm, such as momentum.
        round: number of finished rounds.
        best: the best validation score so far; None if there is none.
        best_round: the round with the best score; 0 if there is none.
        bytes_up: bytes from the clients in all rounds.
        bytes_down: bytes to the clients in all rounds.
        set_up: bytes (up, down) of the messages before the first round, which are not part of
            `bytes_up` and `bytes_down`. The bytes of a secure sum's keys are added after the first
            round. None in a run that an older version began: that version counted some of these
            bytes in the first round.
        note: text about the last round for the progress bar.
        stopped: why the rounds were stopped early; empty if they were not.
        closed: number of rounds in a row in which no client's update was used.
        failures: all failures so far.
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
    def begin(cls, server: ServerSide) -> Progress:
        """Returns the progress before the first round."""
        set_up = (server.set_up.up, server.set_up.down)
        return cls(parameters.flatten(server.model), server.ledger, set_up=set_up)

    @property
    def start(self) -> Start:
        """The input of the next round: parameters, number of finished rounds, server state."""
        return Start(self.params, self.round, self.server_state or None)

    def with_round(
        self, record: RoundRecord, validation: Evaluation | None, task: Task, **more: Any
    ) -> Progress:
        """Returns the progress after one more round.

        Args:
            record: the public part of the round's record.
            validation: evaluation of the new model; None without a validation set.
            task: compares scores.
            **more: further fields of the new progress, such as `ledger`.
        """
        score = json_number(validation.score) if validation else None
        # Any score is better than None, so the first one becomes the best.
        better = task.better(score, self.best)
        return Progress(
            params=record.params,
            server_state=record.server_state,
            round=record.round,
            best=score if better else self.best,
            best_round=record.round if better else self.best_round,
            bytes_up=self.bytes_up + record.bytes_up,
            bytes_down=self.bytes_down + record.bytes_down,
            # Older runs have None here and must keep it.
            set_up=self._set_up_with(record),
            note=f"validation {task.formatted(score)}" if validation else "",
            **more,
        )

    def _set_up_with(self, record: RoundRecord) -> tuple[int, int] | None:
        if self.set_up is None:
            return None
        up, down = self.set_up
        return up + record.set_up.up, down + record.set_up.down

    def snapshot(self) -> Snapshot:
        """Returns the progress as a checkpoint."""
        tensors = {"params": self.params}
        for name, tensor in (self.server_state or {}).items():
            tensors[f"{SERVER}{name}"] = tensor
        facts: dict[str, Any] = {name: getattr(self, name) for name in PLAIN}
        facts["ledger"] = self.ledger.to_json()
        facts["failures"] = self.failures.to_json()
        if self.set_up is not None:
            facts["set_up"] = [*self.set_up]
        return Snapshot(tensors, facts)

    @classmethod
    def load(cls, saved: Snapshot) -> Progress:
        """Reads a checkpoint of this version or an older one."""
        facts: Mapping[str, Any] = saved.facts
        # Older versions have neither `set_up` nor `failures`.
        set_up = facts.get("set_up")
        return cls(
            params=saved.tensors["params"],
            ledger=Ledger.from_json(facts["ledger"]),
            # A checkpoint is a flat file of tensors, so the state's tensors are found by their
            # prefix.
            server_state=parameters.tensors_under(saved.tensors, SERVER),
            set_up=None if set_up is None else tuple(set_up),
            failures=Failures.from_json(facts.get("failures", {})),
            **{name: facts[name] for name in PLAIN},
        )
