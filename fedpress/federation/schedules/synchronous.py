"""Synchronous rounds: a cohort out, a cohort in; with a deadline, and with more clients asked than are needed."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from fedpress.core.names import ClientId
from fedpress.federation.sampling import Cohort
from fedpress.federation.schedules.base import (
    Assignment,
    Participation,
    ScheduleContext,
    Scheduler,
    Timing,
)


class Synchronous(BaseModel):
    """Rounds: a cohort is sent the model, and the step is taken when its answers are in.

    Attributes:
        deadline: seconds after which nobody is waited for; whoever is late does not count in this
            round and is told to stop.
        over_selection: so many times the cohort are asked, and the first answers of a cohort's
            number are taken (Bonawitz et al. 2019, arXiv:1902.01046).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["synchronous"] = "synchronous"
    deadline: float | None = Field(
        default=None, gt=0, description="seconds; whoever is late does not count"
    )
    over_selection: float = Field(
        default=1.0,
        ge=1,
        le=10,
        description="ask so many times the cohort, and take the first answers",
    )

    @property
    def one_model(self) -> bool:
        """All of a round start from its model."""
        return True

    @property
    def timed(self) -> bool:
        """A deadline is a time."""
        return self.deadline is not None

    @property
    def drops(self) -> bool:
        """With over-selection the slow ones are left out because others were faster."""
        return self.over_selection > 1

    def cohort(self, size: int | None, population: int, sampling: str) -> Cohort:
        """Returns `size` clients, all without one."""
        return Cohort(size or population, population, sampling)  # type: ignore[arg-type]

    def check(self, cohort: Cohort) -> None:
        """Any cohort will do."""

    def weight(self, staleness: int) -> float:
        """Nothing is stale."""
        return 1.0

    def drawn(self, cohort: Cohort) -> Cohort:
        """Returns the plan of how many are asked, where `cohort` is that of whose answers are taken."""
        size = min(cohort.population, math.ceil(cohort.size * self.over_selection))
        return cohort if size == cohort.size else replace(cohort, size=size)

    def plan_participation(self, context: ScheduleContext, num_steps: int) -> Participation:
        """See `Schedule`."""
        return _InRounds(self.drawn(context.cohort), context, num_steps)

    def open(self, context: ScheduleContext, state: Mapping[str, Tensor]) -> Scheduler:
        """See `Schedule`."""
        return _Rounds(self, context, float(state["now"]) if state else 0.0)


class _Rounds:
    """The synchronous schedule at work."""

    def __init__(self, settings: Synchronous, context: ScheduleContext, now: float) -> None:
        self._settings, self._context, self._now = settings, context, now
        self._drawn = settings.drawn(context.cohort)
        self._started = 0.0

    def begin(self, step: int) -> None:
        """Draws the cohort."""
        context, deadline = self._context, self._settings.deadline
        names = self._drawn.draw(context.clients, seed=context.draw_seed, round=step)
        self._asked = [Assignment(n, step, context.due(n, step, self._now)) for n in names]
        self._unsent, self._taken = list(self._asked), list[Assignment]()
        self._wanted = min(len(names), context.cohort.size) if self._settings.drops else len(names)
        self._started = time.monotonic()
        self._open = self._asked
        if context.delays is not None:
            ends = math.inf if deadline is None else self._now + deadline
            in_time = [one for one in self._asked if one.due <= ends]
            first = set(sorted(in_time, key=lambda one: one.due)[: self._wanted])
            self._open = [one for one in self._asked if one in first]
        self._open = list(self._open)

    def ask(self) -> list[Assignment]:
        """Returns the cohort, the first time."""
        unsent, self._unsent = self._unsent, []
        return unsent

    def wait(self) -> list[Assignment]:
        """Returns one client after the other, in the order of the cohort: the server holds one answer at a time.

        Without a virtual clock nobody knows who will be first: then over-selection waits for all at
        once.
        """
        if len(self._taken) >= self._wanted:
            return []
        alone = self._context.delays is not None or not self._settings.drops
        return self._open[:1] if alone else list(self._open)

    def take(self, assignment: Assignment) -> None:
        """See `Scheduler`."""
        self._open.remove(assignment)
        self._taken.append(assignment)

    def end(self) -> tuple[Timing, dict[ClientId, str]]:
        """See `Scheduler`."""
        taken = set(self._taken)
        left = [one for one in self._asked if one not in taken]
        late: dict[ClientId, str] = {}
        last = max((one.due for one in self._taken), default=self._now)
        if len(taken) < self._wanted:  # the server waited to the end, and the rest had not come
            assert self._settings.deadline is not None
            late = {one.client: self._late(one) for one in left}
            last, left = self._now + self._settings.deadline, []
        self._now = last
        unneeded = set(left)
        spare = tuple(one.client for one in left)
        answered = tuple(one.client for one in self._asked if one not in unneeded)
        timing = Timing(
            answered=answered,
            staleness=(0,) * len(self._taken),
            late=tuple(late),
            spare=spare,
            simulated_seconds=self._clock,
        )
        return timing, late

    def _late(self, one: Assignment) -> str:
        return (
            f"late: its answer would have come after {one.due - self._now:.4g} s, and the deadline is "
            f"{self._settings.deadline:g} s"
        )

    @property
    def _clock(self) -> float | None:
        return None if self._context.delays is None else self._now

    @property
    def patience(self) -> float | None:
        """What is left of the deadline."""
        if self._context.delays is not None or self._settings.deadline is None:
            return None
        return max(0.0, self._started + self._settings.deadline - time.monotonic())

    @property
    def at_work(self) -> Sequence[Assignment]:
        """Nobody works between two rounds."""
        return []

    def state(self) -> dict[str, Tensor]:
        """Returns the time."""
        clock = self._clock
        return {} if clock is None else {"now": torch.tensor(clock, dtype=torch.float64)}


@dataclass(frozen=True)
class _InRounds:
    """Participation in synchronous rounds: a client may be drawn in every round, or in every `period`-th one."""

    drawn: Cohort
    context: ScheduleContext
    composed_tasks: int

    @property
    def max_tasks(self) -> int:
        """See `Participation`."""
        return math.ceil(self.composed_tasks / self.drawn.period)

    def tasks(self, client: ClientId) -> int:
        """See `Participation`."""
        return self.max_tasks

    def asked(self, step: int) -> list[ClientId]:
        """See `Participation`."""
        return self.drawn.draw(self.context.clients, seed=self.context.draw_seed, round=step)
