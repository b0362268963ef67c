"""The synchronous schedule: each round waits for its cohort, possibly only until a deadline."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, BeforeValidator, Field
from torch import Tensor

from fedpress.core.names import ClientId
from fedpress.core.settings import SETTINGS
from fedpress.federation.sampling import Cohort
from fedpress.federation.schedules.base import (
    Assignment,
    Participation,
    ScheduleContext,
    Scheduler,
    Timing,
)

UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}
"""Suffix of a time in a recipe -> seconds."""


def _seconds(value: object) -> object:
    """Converts a text such as "5m" to seconds; returns anything else unchanged for pydantic.

    >>> _seconds("1.5h"), _seconds(60.0), _seconds("soon")
    (5400.0, 60.0, 'soon')
    """
    if isinstance(value, str) and value[-1:] in UNITS:
        try:
            return float(value[:-1]) * UNITS[value[-1]]
        except ValueError:
            return value
    return value


class Synchronous(BaseModel):
    """The server sends the model to a cohort, and takes a step when all answers have come.

    With a deadline or over-selection, it does not wait for all answers.

    Attributes:
        deadline: seconds after which the server stops waiting; also a text such as "90s", "5m" or
            "2h". Late clients are left out of the round and told to stop. None: no deadline.
        over_selection: factor on the number of clients that are asked. Example: with 1.3 and a
            cohort of 10, the server asks 13 clients and takes the first 10 answers (Bonawitz et al.
            2019, arXiv:1902.01046, section 2).
    """

    model_config = SETTINGS

    kind: Literal["synchronous"] = "synchronous"
    deadline: Annotated[float | None, BeforeValidator(_seconds)] = Field(
        default=None, gt=0, description='seconds, or text such as "5m"; later answers are not used'
    )
    over_selection: float = Field(
        default=1.0,
        ge=1,
        le=10,
        description="factor on the number of asked clients; the first answers are used",
    )

    @property
    def one_model(self) -> bool:
        """Yes: all clients of a round start from the same model."""
        return True

    @property
    def timed(self) -> bool:
        """Only with a deadline."""
        return self.deadline is not None

    @property
    def waits_for_all(self) -> bool:
        """Yes, without a deadline and without over-selection."""
        return self.deadline is None and not self.drops

    @property
    def drops(self) -> bool:
        """Only with over-selection."""
        return self.over_selection > 1

    def cohort(self, size: int | None, population: int, sampling: str) -> Cohort:
        """Returns a cohort of `size` clients (None: all clients)."""
        return Cohort(size or population, population, sampling)  # type: ignore[arg-type]

    def check(self, cohort: Cohort) -> None:
        """Accepts any cohort."""

    def weight(self, staleness: int) -> float:
        """Returns 1: no update is stale."""
        return 1.0

    def drawn(self, cohort: Cohort) -> Cohort:
        """Returns the cohort that is asked: larger than `cohort` with over-selection."""
        # Rounded up, so that any factor above 1 asks at least one client more.
        size = min(cohort.population, math.ceil(cohort.size * self.over_selection))
        return cohort if size == cohort.size else replace(cohort, size=size)

    def plan_participation(self, context: ScheduleContext, num_steps: int) -> Participation:
        """See `Schedule`."""
        return _RoundParticipation(self.drawn(context.cohort), context, num_steps)

    def open(self, context: ScheduleContext, state: Mapping[str, Tensor]) -> Scheduler:
        """See `Schedule`."""
        return _SynchronousScheduler(self, context, float(state["now"]) if state else 0.0)


class _SynchronousScheduler:
    """The running synchronous schedule.

    Between `begin` and `end` a task is unsent, open (sent but not answered) or taken (answered).
    """

    def __init__(self, settings: Synchronous, context: ScheduleContext, now: float) -> None:
        self._settings = settings
        self._context = context
        self._now = now
        self._drawn = settings.drawn(context.cohort)
        self._started = 0.0
        self._wanted = 0
        self._asked: list[Assignment] = []
        self._unsent: list[Assignment] = []
        self._open: list[Assignment] = []
        self._taken: list[Assignment] = []

    def begin(self, step: int) -> None:
        """Draws the cohort of round `step`."""
        context = self._context
        names = self._drawn.draw(context.clients, seed=context.draw_seed, round=step)
        self._asked = []
        for name in names:
            self._asked.append(Assignment(name, step, context.due(name, step, self._now)))
        self._unsent = list(self._asked)
        self._taken = []
        self._wanted = len(names)
        if self._settings.drops:
            self._wanted = min(len(names), context.cohort.size)
        # Start of the deadline in real time. A monotonic clock, because the wall clock may be
        # adjusted.
        self._started = time.monotonic()
        self._open = self._expected()

    def _expected(self) -> list[Assignment]:
        """Returns the tasks whose answers will be taken, in the order of the cohort.

        With delays these tasks are known beforehand: they are the fastest within the deadline.
        """
        if self._context.delays is None:
            return list(self._asked)
        deadline = self._settings.deadline
        end = math.inf if deadline is None else self._now + deadline
        in_time = [one for one in self._asked if one.due <= end]
        first = set(sorted(in_time, key=lambda one: one.due)[: self._wanted])
        return [one for one in self._asked if one in first]

    def ask(self) -> list[Assignment]:
        """Returns all tasks of the cohort at the first call of a round, later an empty list."""
        unsent = self._unsent
        self._unsent = []
        return unsent

    def wait(self) -> list[Assignment]:
        """Returns one task at a time, in the order of the cohort.

        So the sum has the same order in every run, and the server handles one answer at a time.
        With over-selection and without delays it returns all open tasks, because the server then
        takes the answers that come first.
        """
        if len(self._taken) >= self._wanted:
            return []
        in_order = self._context.delays is not None or not self._settings.drops
        return self._open[:1] if in_order else list(self._open)

    def take(self, assignment: Assignment) -> None:
        """See `Scheduler`."""
        self._open.remove(assignment)
        self._taken.append(assignment)

    def end(self) -> tuple[Timing, dict[ClientId, str]]:
        """See `Scheduler`."""
        taken = set(self._taken)
        left = [one for one in self._asked if one not in taken]
        late: dict[ClientId, str] = {}
        now = max((one.due for one in self._taken), default=self._now)
        # If there are too few answers, the other clients missed the deadline on the virtual clock.
        # (In real time `take` is called for every client, also at the deadline.) If there are
        # enough answers, the other clients were not needed.
        if len(taken) < self._wanted:
            assert self._settings.deadline is not None
            late = {one.client: self._late(one) for one in left}
            now = self._now + self._settings.deadline
            left = []
        self._now = now
        unneeded = set(left)
        # The server has not waited for spare clients, so they are not in `answered`.
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
        """Returns the reason why a client is left out: its simulated time and the deadline."""
        seconds = one.due - self._now
        return (
            f"late: its answer would have come after {seconds:.4g} s, and the deadline is "
            f"{self._settings.deadline:g} s"
        )

    @property
    def _clock(self) -> float | None:
        return None if self._context.delays is None else self._now

    @property
    def patience(self) -> float | None:
        """Real seconds until the deadline; None without a deadline, or with a virtual clock."""
        if self._context.delays is not None or self._settings.deadline is None:
            return None
        return max(0.0, self._started + self._settings.deadline - time.monotonic())

    @property
    def at_work(self) -> Sequence[Assignment]:
        """No tasks: between two rounds no task is open."""
        return []

    def state(self) -> dict[str, Tensor]:
        """Returns the time of the virtual clock; empty without delays."""
        clock = self._clock
        if clock is None:
            return {}
        return {"now": torch.tensor(clock, dtype=torch.float64)}


@dataclass(frozen=True)
class _RoundParticipation:
    """Participation in synchronous rounds: a client is drawn at most once in `period` rounds.

    Attributes:
        drawn: the cohort that is asked in each round.
        context: inputs of the schedule.
        composed_tasks: number of rounds of the run.
    """

    drawn: Cohort
    context: ScheduleContext
    composed_tasks: int

    @property
    def max_tasks(self) -> int:
        """See `Participation`."""
        # Only a cyclic cohort has a period above 1: other draws may ask a client in every round.
        return math.ceil(self.composed_tasks / self.drawn.period)

    def tasks(self, client: ClientId) -> int:
        """See `Participation`."""
        return self.max_tasks

    def asked(self, step: int) -> list[ClientId]:
        """See `Participation`."""
        return self.drawn.draw(self.context.clients, seed=self.context.draw_seed, round=step)
