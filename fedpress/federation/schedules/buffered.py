"""The buffered schedule (FedBuff): clients work asynchronously; `buffer` updates make a step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from fedpress.core.names import ClientId
from fedpress.core.random_source import private_stream
from fedpress.core.settings import SETTINGS
from fedpress.errors import RecipeError
from fedpress.federation.sampling import Cohort
from fedpress.federation.schedules.base import (
    Assignment,
    Participation,
    ScheduleContext,
    Scheduler,
    Timing,
    look_ahead,
)


class Buffered(BaseModel):
    """FedBuff: up to `concurrency` clients work at a time; `buffer` updates make a server step.

    Nguyen et al. 2022 (arXiv:2106.06639), algorithm 1. When a client answers, the server asks
    another client, which is drawn from the clients that neither work nor have an update in the
    buffer. An update that is s steps old is multiplied by (1 + s)^-staleness_exponent.
    """

    model_config = SETTINGS

    kind: Literal["buffered"] = "buffered"
    buffer: int = Field(default=10, ge=1, description="updates in one server step")
    concurrency: int = Field(
        default=20, ge=1, description="clients that work at the same time, at most"
    )
    staleness_exponent: float = Field(
        default=0.5,
        ge=0,
        le=10,
        description="e: an update that is s steps old has weight (1 + s)^-e; 0: all the same",
    )

    @property
    def one_model(self) -> bool:
        """No: each client starts from the model that is the newest when it is asked."""
        return False

    @property
    def timed(self) -> bool:
        """No: there is no deadline, and a simulation without delays takes answers in order."""
        return False

    @property
    def waits_for_all(self) -> bool:
        """No: answers to earlier versions of the model are in a step."""
        return False

    @property
    def drops(self) -> bool:
        """No: every answer is used."""
        return False

    def cohort(self, size: int | None, population: int, sampling: str) -> Cohort:
        """Returns a cohort of `buffer` clients.

        Raises:
            RecipeError: if the recipe also sets a cohort or a sampling, or if there are fewer
                clients than places in the buffer.
        """
        if size is not None:
            raise RecipeError(
                f"got {size}, but a buffered schedule takes the key buffer instead",
                place="size",
                cure="leave cohort out",
            )
        # Any other value would claim a way of sampling that this schedule does not use.
        if sampling != "fixed":
            raise RecipeError(
                (
                    f"got '{sampling}', but a buffered schedule does not draw clients "
                    "independently in each step, so there is no amplification"
                ),
                place="sampling",
                cure="leave sampling out",
            )
        # With fewer clients than places in the buffer, the buffer would never be full.
        if self.buffer > population:
            raise RecipeError(
                (
                    f"got {self.buffer}, but there are {population} clients, and each is in the "
                    "buffer at most once"
                ),
                place="buffer",
                cure="take a smaller buffer or make more clients",
            )
        return Cohort(self.buffer, population)

    def check(self, cohort: Cohort) -> None:
        """See `Schedule`."""
        if cohort != self.cohort(None, cohort.population, cohort.sampling):
            raise RecipeError(
                (
                    f"got {self.buffer}, but the uplink is planned for {cohort.size} updates in "
                    "one step"
                ),
                place="buffer",
                cure="bind the uplink with schedule.cohort(...)",
            )

    def weight(self, staleness: int) -> float:
        """Returns (1 + staleness)^-staleness_exponent: 1 for a fresh update, less for an old one.

        >>> Buffered().weight(0), Buffered().weight(3)
        (1.0, 0.5)
        """
        return float((1 + staleness) ** -self.staleness_exponent)

    def plan_participation(self, context: ScheduleContext, num_steps: int) -> Participation:
        """See `Schedule`."""
        # Who is asked depends on who answers first, so it can only be found by a simulation.
        return _SimulatedParticipation(look_ahead(self, context, num_steps))

    def open(self, context: ScheduleContext, state: Mapping[str, Tensor]) -> Scheduler:
        """See `Schedule`."""
        scheduler = _BufferedScheduler(self, context)
        if state:
            scheduler.load_(state)
        return scheduler


class _BufferedScheduler:
    """The running buffered schedule.

    A client whose update is in the buffer is not asked again before the server's step. There are
    three reasons:

    - One client moves the sum of a step by at most one clipped update times a weight of at most 1.
      So the sensitivity is the clip norm, as in a synchronous round.
    - The client's next task starts from a newer version of the model, so the task has a new name.
    - The client answers at most once between two checkpoints, so the two states that it stores are
      enough to resume after a crash.

    A refused answer fills a place in the buffer like a used answer. A failure depends on the
    client's data, so it must not change which client is asked next.
    """

    def __init__(self, settings: Buffered, context: ScheduleContext) -> None:
        self._settings = settings
        self._context = context
        self._now = 0.0
        self._draws = 0
        self._step = 0
        self._working: list[Assignment] = []
        self._taken: list[Assignment] = []

    def begin(self, step: int) -> None:
        """Empties the buffer; working clients continue."""
        self._step = step
        self._taken = []

    def ask(self) -> list[Assignment]:
        """Draws clients until `concurrency` clients work; draws none if the buffer is full."""
        new: list[Assignment] = []
        # If the buffer is full, the model is about to change: a client that is asked now would
        # start from the old model.
        if not self._unfilled:
            return new
        busy = {one.client for one in [*self._working, *self._taken]}
        idle = len(self._context.clients) - len(busy)
        room = min(self._settings.concurrency - len(self._working), idle)
        while len(new) < room:
            client = self._draw(busy)
            busy.add(client)
            due = self._context.due(client, self._step, self._now)
            new.append(Assignment(client, self._step, due))
        self._working += new
        return new

    def _draw(self, busy: set[ClientId]) -> ClientId:
        """Returns one of the clients that are not `busy`, each with the same probability."""
        # Streams are numbered by draw, because a step may draw any number of clients.
        self._draws += 1
        clients = self._context.clients
        stream = private_stream(self._context.seed, "cohort", self._draws)
        # Rejection sampling needs no list of the idle clients, of which there may be thousands. It
        # is fast if most clients are idle, as usual.
        while True:
            client = clients[int(stream.integers(len(clients)))]
            if client not in busy:
                return client

    @property
    def _unfilled(self) -> bool:
        return len(self._taken) < self._settings.buffer

    def wait(self) -> list[Assignment]:
        """Returns the task whose answer comes first; without delays all open tasks."""
        if not self._unfilled or not self._working:
            return []
        if self._context.delays is None:
            return list(self._working)
        # Of tasks with equal times, `min` returns the one that was sent first.
        return [min(self._working, key=lambda one: one.due)]

    def take(self, assignment: Assignment) -> None:
        """See `Scheduler`."""
        self._working.remove(assignment)
        self._taken.append(assignment)
        # Without `max` the clock would go backwards if the answer was due before the current time.
        self._now = max(self._now, assignment.due)

    def end(self) -> tuple[Timing, dict[ClientId, str]]:
        """See `Scheduler`; no client is ever late."""
        staleness = tuple(self._step - one.task for one in self._taken)
        clock = None if self._context.delays is None else self._now
        answered = tuple(one.client for one in self._taken)
        return Timing(answered, staleness, simulated_seconds=clock), {}

    @property
    def patience(self) -> float | None:
        """None: there is no deadline."""
        return None

    @property
    def at_work(self) -> Sequence[Assignment]:
        """Tasks that are sent and not yet answered."""
        return self._working

    def state(self) -> dict[str, Tensor]:
        """Returns clock, number of draws and open tasks; clients are stored as indices."""
        places = {client: index for index, client in enumerate(self._context.clients)}
        clients = []
        tasks = []
        due = []
        for one in self._working:
            clients.append(places[one.client])
            tasks.append(one.task)
            due.append(one.due)
        return {
            "now": torch.tensor(self._now, dtype=torch.float64),
            "draws": torch.tensor(self._draws),
            "clients": torch.tensor(clients, dtype=torch.int64),
            "tasks": torch.tensor(tasks, dtype=torch.int64),
            "due": torch.tensor(due, dtype=torch.float64),
        }

    def load_(self, state: Mapping[str, Tensor]) -> None:
        """Restores a result of `state`."""
        self._now = float(state["now"])
        self._draws = int(state["draws"])
        columns = [state[name].tolist() for name in ("clients", "tasks", "due")]
        for client, task, due in zip(*columns, strict=True):
            self._working.append(Assignment(self._context.clients[client], task, due))


class _SimulatedParticipation:
    """Participation counted in a simulation of the schedule (`look_ahead`)."""

    def __init__(self, asked: list[list[ClientId]]) -> None:
        self._asked = asked
        self._tasks: Counter[ClientId] = Counter()
        for names in asked:
            self._tasks.update(names)

    @property
    def composed_tasks(self) -> int:
        """Number of tasks of the busiest client: without amplification every task counts."""
        return self.max_tasks

    @property
    def max_tasks(self) -> int:
        """See `Participation`."""
        return max(self._tasks.values(), default=0)

    def tasks(self, client: ClientId) -> int:
        """See `Participation`."""
        return self._tasks[client]

    def asked(self, step: int) -> list[ClientId]:
        """See `Participation`."""
        return self._asked[step - 1]
