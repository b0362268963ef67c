"""What a schedule is: when the server asks which client, and when it takes a step.

A schedule makes decisions and handles no messages, so a whole run can be simulated without
training. Its clock is virtual: `delays` say how long each task takes, and answers are taken in the
order in which they would have come.

A task is named by its client and a number. A model after v server steps has version v, and the task
that starts from it has number v + 1. No client is sent the same version twice, so no name is used
twice. That matters for privacy: random streams named by it give fresh noise in every task, and a
client can refuse a second question under one name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from fedpress.core.names import ClientId
from fedpress.federation.delays import Delays
from fedpress.federation.sampling import Cohort


@dataclass(frozen=True)
class Assignment:
    """One task of one client.

    Attributes:
        client: who is asked.
        task: number of the task; the model that it starts from has seen `task - 1` server steps.
        due: time of its answer, in simulated seconds since the start of the run.
    """

    client: ClientId
    task: int
    due: float


@dataclass(frozen=True)
class Timing:
    """When a server step was taken and with whose answers.

    Attributes:
        answered: clients whose answers the step waited for, including those that were late or did
            not count.
        staleness: for each answer in the step, in the order of the sum, how many server steps were
            taken while its client was at work.
        late: those of them that missed the deadline.
        spare: clients that were asked but not needed, because enough others were faster.
        simulated_seconds: of the virtual clock since the start of the run; None without delays.
    """

    answered: tuple[ClientId, ...] = ()
    staleness: tuple[int, ...] = ()
    late: tuple[ClientId, ...] = ()
    spare: tuple[ClientId, ...] = ()
    simulated_seconds: float | None = None


@dataclass(frozen=True)
class ScheduleContext:
    """What a schedule works with; the same in every step.

    Attributes:
        clients: all that can be asked, in a fixed order.
        cohort: how many updates are in one server step, and how their clients are drawn.
        seed: of the delays, and of draws that need not be secret.
        draw_seed: of draws that privacy depends on (Poisson sampling); the server's secret if it
            has one.
        delays: how long clients take; None without a virtual clock.
    """

    clients: Sequence[ClientId]
    cohort: Cohort
    seed: int
    draw_seed: int = field(repr=False)
    delays: Delays | None = None

    def due(self, client: ClientId, task: int, now: float) -> float:
        """Returns the time at which the answer to a task comes that is sent at time `now`."""
        # Without a clock every answer is due at once.
        if self.delays is None:
            return now
        return now + self.delays.draw(self.seed, client, task)


class Scheduler(Protocol):
    """A running schedule.

    For each server step call `begin`, then `ask`, `wait` and `take` in turn, then `end`; see
    `look_ahead`.
    """

    def begin(self, step: int) -> None:
        """Begins to gather updates for server step number `step`, from 1."""
        ...

    def ask(self) -> list[Assignment]:
        """Returns the tasks that must be sent now."""
        ...

    def wait(self) -> list[Assignment]:
        """Returns the tasks whose answers are waited for; the first answer to one is taken next.

        Empty if the step has all its answers.
        """
        ...

    def take(self, assignment: Assignment) -> None:
        """Notes that the answer to a task came, or never will."""
        ...

    def end(self) -> tuple[Timing, dict[ClientId, str]]:
        """Ends the step; returns its timing, and for late clients the reason."""
        ...

    @property
    def patience(self) -> float | None:
        """Real seconds to wait for the next answer; None for any time, as with a virtual clock."""
        ...

    @property
    def at_work(self) -> Sequence[Assignment]:
        """Tasks whose answers are still wanted, in the order in which they were sent."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Returns all that is needed to go on after a finished step."""
        ...


class Participation(Protocol):
    """Which client is asked how often in a run; privacy is planned and charged from it."""

    @property
    def composed_tasks(self) -> int:
        """Number of tasks of one client whose privacy costs are composed to plan its noise."""
        ...

    @property
    def max_tasks(self) -> int:
        """Tasks of the client that is asked most often."""
        ...

    def tasks(self, client: ClientId) -> int:
        """Returns how often `client` is asked in the whole run, at most."""
        ...

    def asked(self, step: int) -> list[ClientId]:
        """Returns who is asked for server step number `step`."""
        ...


class Schedule(Protocol):
    """One row of the table: the settings of a schedule."""

    @property
    def kind(self) -> str:
        """Name of the row."""
        ...

    @property
    def one_model(self) -> bool:
        """Whether all answers of a step start from one model, from clients known beforehand."""
        ...

    @property
    def timed(self) -> bool:
        """Whether it depends on time, so that a simulation needs `delays`."""
        ...

    @property
    def drops(self) -> bool:
        """Whether a slow client is left out of a step because others were faster."""
        ...

    def cohort(self, size: int | None, population: int, sampling: str) -> Cohort:
        """Returns the cohort of one server step, from the recipe's keys `cohort` and `sampling`."""
        ...

    def check(self, cohort: Cohort) -> None:
        """Raises RecipeError if `cohort` does not fit this schedule's steps."""
        ...

    def weight(self, staleness: int) -> float:
        """Returns the factor on an update, from 0 to 1.

        Above 1 a clipped update would exceed its clip norm, which the noise is measured against.
        """
        ...

    def plan_participation(self, context: ScheduleContext, num_steps: int) -> Participation:
        """Returns which clients will be asked in `num_steps` server steps."""
        ...

    def open(self, context: ScheduleContext, state: Mapping[str, Tensor]) -> Scheduler:
        """Begins with an empty `state`, or goes on from what `Scheduler.state` returned."""
        ...


def look_ahead(
    schedule: Schedule, context: ScheduleContext, num_steps: int
) -> list[list[ClientId]]:
    """Returns who is asked in each of `num_steps` server steps of a run with this clock.

    It does not depend on data: who is drawn follows from the seed, and who answers first from the
    delays. An answer that does not count takes its place in the step as any other does.
    """
    scheduler = schedule.open(context, {})
    asked: list[list[ClientId]] = []
    for step in range(1, num_steps + 1):
        scheduler.begin(step)
        names = [one.client for one in scheduler.ask()]
        while waiting := scheduler.wait():
            # As in a run, where the answer to the first of these tasks is taken next.
            scheduler.take(waiting[0])
            names += [one.client for one in scheduler.ask()]
        scheduler.end()
        asked.append(names)
    return asked
