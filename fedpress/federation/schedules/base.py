"""What a schedule is: when the server asks whom for an update, and when it takes a step.

A schedule decides, and knows no messages: so a run can be looked ahead without training anything.
Its clock is virtual: `delays` say how long each task takes, and the scheduler sorts answers by the
time at which they would have come.

A task is named by its client and a number: one more than the version of the model that the client
is sent, and the version is the number of server steps in it. No client is sent the same version
twice, so no name comes twice: streams of chance that are named by it give fresh noise each time,
and a client can refuse a second question under one name.
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
        due: simulated seconds from the start of the run to its answer.
    """

    client: ClientId
    task: int
    due: float


@dataclass(frozen=True)
class Timing:
    """When a server step was taken and with whose answers.

    Attributes:
        answered: clients whose answers the step waited for, also those that are late or do not
            count.
        staleness: for each answer in the step, in the order of the sum, how many server steps were
            taken while its client was at work.
        late: those of them that passed the deadline.
        spare: clients that were asked and not needed, since enough others were faster.
        simulated_seconds: of the virtual clock since the start of the run; None without delays.
    """

    answered: tuple[ClientId, ...] = ()
    staleness: tuple[int, ...] = ()
    late: tuple[ClientId, ...] = ()
    spare: tuple[ClientId, ...] = ()
    simulated_seconds: float | None = None


@dataclass(frozen=True)
class ScheduleContext:
    """What a schedule works with, the same from the first step to the last.

    Attributes:
        clients: all that can be asked, in a fixed order.
        cohort: how many updates are in one server step, and how they are drawn.
        seed: of the delays, and of draws that nobody hides.
        draw_seed: of draws that privacy rests on: a secret, where there is one.
        delays: how long clients take; None without a virtual clock.
    """

    clients: Sequence[ClientId]
    cohort: Cohort
    seed: int
    draw_seed: int = field(repr=False)
    delays: Delays | None = None

    def due(self, client: ClientId, task: int, now: float) -> float:
        """Returns when the answer to a task that is sent `now` comes."""
        if self.delays is None:
            return now
        return now + self.delays.draw(self.seed, client, task)


class Scheduler(Protocol):
    """A schedule at work. For each server step: `begin`, then `ask` and `wait` and `take` in turn, then `end`."""

    def begin(self, step: int) -> None:
        """Begins to gather for server step `step`, counted from 1."""
        ...

    def ask(self) -> list[Assignment]:
        """Returns the tasks that must be sent now."""
        ...

    def wait(self) -> list[Assignment]:
        """Returns the tasks of which the next answer is taken, whichever comes first; none: the step is complete."""
        ...

    def take(self, assignment: Assignment) -> None:
        """Notes that the answer to a task came, or that it never will."""
        ...

    def end(self) -> tuple[Timing, dict[ClientId, str]]:
        """Ends the step; returns its timing, and why clients came too late."""
        ...

    @property
    def patience(self) -> float | None:
        """Real seconds to wait for the next answer; None: however long it takes. Without a virtual clock alone."""
        ...

    @property
    def at_work(self) -> Sequence[Assignment]:
        """Tasks whose answers are still wanted, in the order in which they were sent."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Returns all that is needed to go on after a finished step."""
        ...


class Participation(Protocol):
    """Who will be asked how often in a run of some steps; privacy is planned and charged from it before anybody is."""

    @property
    def composed_tasks(self) -> int:
        """Tasks of one client that its noise must last for."""
        ...

    @property
    def max_tasks(self) -> int:
        """Tasks of the client that is asked most often."""
        ...

    def tasks(self, client: ClientId) -> int:
        """Returns how often `client` is asked in the whole run, at most."""
        ...

    def asked(self, step: int) -> list[ClientId]:
        """Returns who is asked while server step `step` is gathered."""
        ...


class Schedule(Protocol):
    """One row of the table: the settings of a schedule."""

    @property
    def kind(self) -> str:
        """Name of the row."""
        ...

    @property
    def one_model(self) -> bool:
        """Whether all answers of a server step start from the same model, and all of its clients are known before."""
        ...

    @property
    def timed(self) -> bool:
        """Whether it looks at the time, so that a simulation needs a clock."""
        ...

    @property
    def drops(self) -> bool:
        """Whether who is in a server step hangs on how fast the others are."""
        ...

    def cohort(self, size: int | None, population: int, sampling: str) -> Cohort:
        """Returns the plan of the updates in one server step, from the recipe's keys `cohort` and `sampling`."""
        ...

    def check(self, cohort: Cohort) -> None:
        """Raises RecipeError unless `cohort` is the plan of the updates in one of its steps."""
        ...

    def weight(self, staleness: int) -> float:
        """Returns the factor of an update, never above 1: a clipped update stays within its clip norm."""
        ...

    def plan_participation(self, context: ScheduleContext, num_steps: int) -> Participation:
        """Returns who will be asked in `num_steps` server steps."""
        ...

    def open(self, context: ScheduleContext, state: Mapping[str, Tensor]) -> Scheduler:
        """Begins, or goes on from what `state` gave; empty to begin."""
        ...


def look_ahead(
    schedule: Schedule, context: ScheduleContext, num_steps: int
) -> list[list[ClientId]]:
    """Returns who is asked in each of `num_steps` server steps, as a run with this clock will ask.

    Nothing of it hangs on data: who is drawn follows from the seed, who answers first from the
    delays, and an answer that does not count takes its place in the step as any other does.
    """
    scheduler = schedule.open(context, {})
    asked: list[list[ClientId]] = []
    for step in range(1, num_steps + 1):
        scheduler.begin(step)
        names = [one.client for one in scheduler.ask()]
        while waiting := scheduler.wait():
            scheduler.take(waiting[0])
            names += [one.client for one in scheduler.ask()]
        scheduler.end()
        asked.append(names)
    return asked
