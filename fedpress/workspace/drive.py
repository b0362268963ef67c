"""`drive`: runs a long stage from its last checkpoint, with progress, records and checkpoints."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from pydantic import JsonValue
from torch import Tensor

from fedpress.core.log import logger
from fedpress.workspace.stage_folder import StageFolder
from fedpress.workspace.state import Tick

log = logger(__name__)


@dataclass(frozen=True)
class Snapshot:
    """The state of a computation for a checkpoint: named tensors, and facts in JSON types.

    The tensors may be those that the computation goes on to change: copy or save them at once.
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    facts: Mapping[str, JsonValue] = field(default_factory=dict)


@dataclass(frozen=True)
class Milestone:
    """A point in a computation at which a record is written or a checkpoint saved.

    Attributes:
        record: line for the records of the run; empty: none.
        note: text beside the progress bar from now on; None: as before.
        timed: whether the record gets the seconds since the start.
        saves: whether the computation can be resumed from here, so that a checkpoint is saved.
    """

    record: Mapping[str, JsonValue] = field(default_factory=dict)
    note: str | None = None
    timed: bool = False
    saves: bool = True


class Resumable(Protocol):
    """A computation in steps that can be resumed at a milestone, with the same bits as a result."""

    def events(self) -> Iterator[Tick | Milestone]:
        """Computes from the current state: yields a tick after each step, and milestones."""
        ...

    def state(self) -> Snapshot:
        """Returns the current state; called at milestones only."""
        ...

    def load_(self, saved: Snapshot) -> None:
        """Replaces the state of a new object of the same computation by a saved one."""
        ...


def drive(work: Resumable, folder: StageFolder) -> Generator[Tick, None, None]:
    """Runs `work` to its end from the last checkpoint in `folder`; yields a tick for every step.

    Raises:
        RunError: if the checkpoint is damaged, or the folder cannot be written.
    """
    tensors, facts = folder.load_progress()
    if facts:
        log.info("goes on from the checkpoint in %s", folder.path)
        work.load_(Snapshot(tensors, facts))
    # A checkpoint holds the seconds spent before it, so that the clock goes on from there.
    start = time.perf_counter() - facts.get("seconds", 0.0)
    note = facts.get("note", "")
    last: Tick | None = None

    for event in work.events():
        if isinstance(event, Tick):
            last = event if event.note else replace(event, note=note)
            yield last
            continue

        seconds = time.perf_counter() - start
        if event.note is not None:
            note = event.note
        # The record before the checkpoint: a checkpoint counts the records that belong to it.
        if event.record:
            record = dict(event.record)
            if event.timed:
                record["seconds"] = round(seconds, 2)
            folder.record(**record)
        if event.saves:
            saved = work.state()
            own = {**saved.facts, "seconds": seconds, "note": note}
            folder.save_progress(saved.tensors, own)
        # The last tick again, so that the new note is shown at once.
        if last is not None and event.note is not None:
            yield replace(last, note=note)
