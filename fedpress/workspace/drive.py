"""The one loop of long work: it goes on from the last checkpoint, tells how far it is, records and saves."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from pydantic import JsonValue
from torch import Tensor

from fedpress.workspace.stage_folder import StageFolder
from fedpress.workspace.state import Tick


@dataclass(frozen=True)
class Snapshot:
    """All that work needs to go on: named tensors, and facts that JSON can hold.

    The tensors may be the living ones; whoever keeps a snapshot copies or saves them.
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    facts: Mapping[str, JsonValue] = field(default_factory=dict)


@dataclass(frozen=True)
class Milestone:
    """Work has reached a place that is worth a record.

    Attributes:
        record: what is appended to the records of the run; nothing if it is empty.
        note: what a person reads beside the bar from now on; None leaves the note that was there.
        timed: whether the record says how many seconds the work has taken so far.
        saves: whether the work can be taken up from here, so that a checkpoint is saved.
    """

    record: Mapping[str, JsonValue] = field(default_factory=dict)
    note: str | None = None
    timed: bool = False
    saves: bool = True


class Resumable(Protocol):
    """Work in many steps that can stop after a milestone and go on later, to the same bits."""

    def events(self) -> Iterator[Tick | Milestone]:
        """Does the work from where it stands: yields a tick after each step, and milestones between them."""
        ...

    def state(self) -> Snapshot:
        """Returns all that `load_` needs; asked for at milestones."""
        ...

    def load_(self, saved: Snapshot) -> None:
        """Takes up the `state()` of the same work, just begun."""
        ...


def drive(work: Resumable, folder: StageFolder) -> Generator[Tick, None, None]:
    """Does `work` to its end from the last checkpoint in `folder`; yields a tick for every step.

    A checkpoint holds the seconds that were spent until then and the note that was shown, so that both go on.

    Raises:
        RunError: if the checkpoint is damaged, or the folder cannot be written.
    """
    tensors, facts = folder.load_progress()
    if facts:
        work.load_(Snapshot(tensors, facts))
    start = time.perf_counter() - facts.get("seconds", 0.0)
    note = facts.get("note", "")
    last: Tick | None = None

    for event in work.events():
        if isinstance(event, Tick):
            last = event if event.note else replace(event, note=note)
            yield last
            continue

        seconds = time.perf_counter() - start
        note = note if event.note is None else event.note
        if event.record:
            spent = {"seconds": round(seconds, 2)} if event.timed else {}
            folder.record(**event.record, **spent)
        if event.saves:
            saved = work.state()
            own = {**saved.facts, "seconds": seconds, "note": note}
            folder.save_progress(saved.tensors, own)
        if last is not None and event.note is not None:
            yield replace(last, note=note)
