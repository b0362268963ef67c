"""Runs a long stage from its last checkpoint, with progress, records and new checkpoints."""

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
    """The state of a computation for a checkpoint: named tensors, and facts as JSON values.

    The computation may change these tensors in its next step: copy or save them at once.
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    facts: Mapping[str, JsonValue] = field(default_factory=dict)


@dataclass(frozen=True)
class Milestone:
    """A point in a computation at which a record is written or a checkpoint saved.

    Attributes:
        record: line for the records of the run; empty: no record is written.
        note: new text beside the progress bar; None: the text does not change.
        timed: whether the seconds since the start of the stage are added to the record.
        saves: whether a checkpoint is saved. The computation must be resumable from here.
    """

    record: Mapping[str, JsonValue] = field(default_factory=dict)
    note: str | None = None
    timed: bool = False
    saves: bool = True


class Resumable(Protocol):
    """A computation in steps. Resuming it at a milestone does not change a bit of its result."""

    def events(self) -> Iterator[Tick | Milestone]:
        """Continues from the current state; yields a `Tick` after each step, and milestones."""
        ...

    def state(self) -> Snapshot:
        """Returns the current state. It is called at milestones only."""
        ...

    def load_(self, saved: Snapshot) -> None:
        """Replaces the state of a new computation by a saved state of the same computation."""
        ...


def drive(work: Resumable, folder: StageFolder) -> Generator[Tick, None, None]:
    """Runs `work` from the last checkpoint in `folder` to the end of `work`.

    It yields a `Tick` for every step. If the text beside the progress bar changes between steps, it
    yields the last tick again with the new text.

    Raises:
        RunError: if the checkpoint is damaged, or the folder cannot be written.
    """
    tensors, facts = folder.load_progress()
    if facts:
        log.info("goes on from the checkpoint in %s", folder.path)
        work.load_(Snapshot(tensors, facts))
    # A checkpoint contains the seconds spent before it; the clock continues from there.
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
        # The record is written before the checkpoint, because the checkpoint stores the number of
        # records.
        if event.record:
            record = dict(event.record)
            if event.timed:
                record["seconds"] = round(seconds, 2)
            folder.record(**record)
        if event.saves:
            saved = work.state()
            own = {**saved.facts, "seconds": seconds, "note": note}
            folder.save_progress(saved.tensors, own)
        # The last tick is repeated, so that the new note is shown at once.
        if last is not None and event.note is not None:
            yield replace(last, note=note)
