"""The interface of a schedule: when the server asks which client, and when it takes a step.

A schedule handles no messages, so a run can be simulated without training. With `delays` a schedule
has a virtual clock: each task takes a simulated time, and these times decide which answers are in a
server step.

A task is one local training of one client. It is named by the client and a number: after v server
steps the model has version v, and a task that starts from this version has number v + 1. The server
never sends a client the same version twice, so no two tasks have the same name. This matters for
privacy: random streams are named after the task, so every task gets new noise, and a client can
refuse a second request for the same task.
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
    """One task of one client: a local training that starts from one version of the model.

    Attributes:
        client: the client that is asked.
        task: number of the task, which starts from the model after `task - 1` server steps.
        due: time of the answer, in simulated seconds since the start of the run.
    """

    client: ClientId
    task: int
    due: float


@dataclass(frozen=True)
class Timing:
    """The time of a server step, and the clients whose answers are in it.

    Attributes:
        answered: clients whose answers the step waited for, including late and refused answers.
        staleness: for each answer in the step, in the order of the sum, the number of server steps
            that were taken while its client was working.
        late: clients of `answered` that missed the deadline on the virtual clock.
        spare: clients that were asked but not needed, because enough other clients were faster.
        simulated_seconds: virtual time since the start of the run; None without delays.
    """

    answered: tuple[ClientId, ...] = ()
    staleness: tuple[int, ...] = ()
    late: tuple[ClientId, ...] = ()
    spare: tuple[ClientId, ...] = ()
    simulated_seconds: float | None = None


@dataclass(frozen=True)
class ScheduleContext:
    """The inputs of a schedule, the same in every step.

    Attributes:
        clients: all clients that can be asked, in a fixed order.
        cohort: how many updates are in one server step, and how their clients are drawn.
        seed: seed of the delays and of public random draws.
        draw_seed: seed of random draws that must stay secret for privacy (Poisson sampling). This
            is the server's secret, or `seed` if there is no secret.
        delays: how long clients take; None without a virtual clock.
    """

    clients: Sequence[ClientId]
    cohort: Cohort
    seed: int
    draw_seed: int = field(repr=False)
    delays: Delays | None = None

    def due(self, client: ClientId, task: int, now: float) -> float:
        """Returns the simulated time of the answer to a task that is sent at time `now`."""
        # Without delays every answer comes at once.
        if self.delays is None:
            return now
        return now + self.delays.draw(self.seed, client, task)


class Scheduler(Protocol):
    """A running schedule.

    For each server step call `begin`, then `ask`, `wait` and `take` in turn, then `end`. The
    function `look_ahead` shows the order.
    """

    def begin(self, step: int) -> None:
        """Starts server step number `step`, from 1."""
        ...

    def ask(self) -> list[Assignment]:
        """Returns the tasks that must be sent now."""
        ...

    def wait(self) -> list[Assignment]:
        """Returns the tasks to wait for: the next answer must be to one of them.

        The list is empty if the step has all its answers.
        """
        ...

    def take(self, assignment: Assignment) -> None:
        """Stores that a task was answered, or that its answer will never come."""
        ...

    def end(self) -> tuple[Timing, dict[ClientId, str]]:
        """Ends the step; returns its timing, and late client -> the reason."""
        ...

    @property
    def patience(self) -> float | None:
        """Real seconds to wait for the next answer; None: no limit, for instance with delays."""
        ...

    @property
    def at_work(self) -> Sequence[Assignment]:
        """Sent tasks whose answers a later step will use, in the order of sending."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Returns the tensors from which `Schedule.open` resumes after a finished step."""
        ...


class Participation(Protocol):
    """How often each client is asked in a run. Privacy is planned and charged for these numbers."""

    @property
    def composed_tasks(self) -> int:
        """Number of tasks of one client that the accountant composes when noise is planned.

        In synchronous rounds it is the number of rounds, although a client may be asked in fewer.
        In a buffered schedule it equals `max_tasks`.
        """
        ...

    @property
    def max_tasks(self) -> int:
        """Number of tasks of the client that is asked most often."""
        ...

    def tasks(self, client: ClientId) -> int:
        """Returns how often `client` may be asked in the whole run."""
        ...

    def asked(self, step: int) -> list[ClientId]:
        """Returns the clients that are asked in server step number `step`."""
        ...


class Schedule(Protocol):
    """Settings of a schedule, such as `Synchronous`."""

    @property
    def kind(self) -> str:
        """Name of the schedule in a recipe, such as "buffered"."""
        ...

    @property
    def one_model(self) -> bool:
        """Whether all updates of a step start from one model.

        If so, all clients that a step asks are known when the step begins.
        """
        ...

    @property
    def timed(self) -> bool:
        """Whether the schedule has a deadline, so that a simulation needs `delays`."""
        ...

    @property
    def waits_for_all(self) -> bool:
        """Whether each step takes the answers of all clients that it asks, in the order of asking."""
        ...

    @property
    def drops(self) -> bool:
        """Whether a slow client may be left out of a step because others were faster."""
        ...

    def cohort(self, size: int | None, population: int, sampling: str) -> Cohort:
        """Returns the cohort of one server step, from the recipe's keys `cohort` and `sampling`."""
        ...

    def check(self, cohort: Cohort) -> None:
        """Checks that `cohort` fits the steps of this schedule.

        Raises:
            RecipeError: if it does not.
        """
        ...

    def weight(self, staleness: int) -> float:
        """Returns the factor, from 0 to 1, on an update that is `staleness` steps old.

        A factor above 1 would make a clipped update longer than the clip norm for which the noise
        is planned.
        """
        ...

    def plan_participation(self, context: ScheduleContext, num_steps: int) -> Participation:
        """Returns which clients will be asked in `num_steps` server steps."""
        ...

    def open(self, context: ScheduleContext, state: Mapping[str, Tensor]) -> Scheduler:
        """Starts a run (empty `state`), or resumes it from a result of `Scheduler.state`."""
        ...


def look_ahead(
    schedule: Schedule, context: ScheduleContext, num_steps: int
) -> list[list[ClientId]]:
    """Simulates a run without training; returns the clients asked in each of `num_steps` steps.

    The result does not depend on data: the seed decides which clients are drawn, and the delays
    decide which client answers first. A refused answer counts in its step like a used answer, so
    refusals change nothing here.
    """
    scheduler = schedule.open(context, {})
    asked: list[list[ClientId]] = []
    for step in range(1, num_steps + 1):
        scheduler.begin(step)
        # A buffered schedule asks again after each answer, see below.
        names = [one.client for one in scheduler.ask()]
        while waiting := scheduler.wait():
            # With delays `wait` returns one task at a time, so the order is that of a real run.
            scheduler.take(waiting[0])
            names += [one.client for one in scheduler.ask()]
        scheduler.end()
        asked.append(names)
    return asked
