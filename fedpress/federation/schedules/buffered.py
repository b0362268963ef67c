"""The buffered schedule: clients work all the time, and every few updates that come in make a server step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from fedpress.core.names import ClientId
from fedpress.core.random_source import private_stream
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
    """FedBuff: clients work all the time, and the server takes a step with every `buffer` updates that came in.

    Nguyen et al. 2022 (arXiv:2106.06639). Whoever answers makes room for another client, drawn at
    random from those who are idle and not in the buffer yet. An update that is s steps old counts
    with (1 + s)^-staleness_exponent.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["buffered"] = "buffered"
    buffer: int = Field(default=10, ge=1, description="updates in one server step")
    concurrency: int = Field(
        default=20, ge=1, description="most clients that work at the same time"
    )
    staleness_exponent: float = Field(
        default=0.5,
        ge=0,
        le=10,
        description="an update that is s steps old counts (1 + s) to the power of minus this; 0 = all"
        " alike",
    )

    @property
    def one_model(self) -> bool:
        """Clients start from the model that there is when they have time."""
        return False

    @property
    def timed(self) -> bool:
        """Without a clock answers come in the order of asking, which is a schedule, too."""
        return False

    @property
    def drops(self) -> bool:
        """Every answer that was asked for is taken, sooner or later."""
        return False

    def cohort(self, size: int | None, population: int, sampling: str) -> Cohort:
        """Returns the buffer as a cohort.

        Raises:
            RecipeError: if the recipe also names a cohort or a sampling, or the clients are too
                few.
        """
        if size is not None:
            raise RecipeError(
                f"got {size}, but a buffered schedule counts the updates of a step by its buffer",
                place="size",
                cure="leave cohort out",
            )
        if sampling != "fixed":
            raise RecipeError(
                (
                    f"got '{sampling}', but a buffered schedule asks one idle client at a time, so "
                    "who takes part is no independent draw and nothing is amplified"
                ),
                place="sampling",
                cure="leave sampling out",
            )
        if self.buffer > population:
            raise RecipeError(
                (
                    f"got {self.buffer}, but there are {population} clients and each is in a buffer "
                    "at most once"
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
                    f"got {self.buffer}, but the uplink is planned for {cohort.size} updates in one "
                    "step"
                ),
                place="buffer",
                cure="bind it with schedule.cohort(...)",
            )

    def weight(self, staleness: int) -> float:
        """Falls with the staleness, from 1.

        >>> Buffered().weight(0), Buffered().weight(3)
        (1.0, 0.5)
        """
        return float((1 + staleness) ** -self.staleness_exponent)

    def plan_participation(self, context: ScheduleContext, num_steps: int) -> Participation:
        """See `Schedule`."""
        return _Counted(look_ahead(self, context, num_steps))

    def open(self, context: ScheduleContext, state: Mapping[str, Tensor]) -> Scheduler:
        """See `Schedule`."""
        scheduler = _Buffer(self, context)
        if state:
            scheduler.load_(state)
        return scheduler


class _Buffer:
    """The buffered schedule at work.

    A client that is in the buffer is not asked again before the step is taken. This has three uses:

    - One client moves the sum of a step by at most one clipped update, times a weight of at most 1:
      the sensitivity is the clip norm, as in a round.
    - Its next task starts from a newer version, so the task's name is new.
    - Between two checkpoints it answers at most once, so the two states that a client keeps are
      enough to go on after a kill.

    An answer that does not count fills its place in the buffer as any other does: whether a client
    fails must change neither who is asked next nor how many steps there are.
    """

    def __init__(self, settings: Buffered, context: ScheduleContext) -> None:
        self._settings, self._context = settings, context
        self._now, self._draws, self._step = 0.0, 0, 0
        self._working: list[Assignment] = []
        self._taken: list[Assignment] = []

    def begin(self, step: int) -> None:
        """Empties the buffer; whoever is at work goes on."""
        self._step, self._taken = step, []

    def ask(self) -> list[Assignment]:
        """Draws clients until `concurrency` are at work; none once the buffer is full: the model is about to change."""
        new: list[Assignment] = []
        busy = {one.client for one in [*self._working, *self._taken]}
        room = min(
            self._settings.concurrency - len(self._working), len(self._context.clients) - len(busy)
        )
        while len(new) < room and self._unfilled:
            client = self._draw(busy)
            busy.add(client)
            due = self._context.due(client, self._step, self._now)
            new.append(Assignment(client, self._step, due))
        self._working += new
        return new

    def _draw(self, busy: set[ClientId]) -> ClientId:
        """Returns one of the clients that are not `busy`, each with the same probability."""
        self._draws += 1
        clients = self._context.clients
        stream = private_stream(self._context.seed, "cohort", self._draws)
        while True:  # a client that is busy is drawn again: cheaper than a list of all others
            client = clients[int(stream.integers(len(clients)))]
            if client not in busy:
                return client

    @property
    def _unfilled(self) -> bool:
        return len(self._taken) < self._settings.buffer

    def wait(self) -> list[Assignment]:
        """Returns whose answer comes first; without a virtual clock all who are at work."""
        if not self._unfilled or not self._working:
            return []
        if self._context.delays is None:
            return list(self._working)
        return [
            min(self._working, key=lambda one: one.due)
        ]  # the one sent first, if two come at once

    def take(self, assignment: Assignment) -> None:
        """See `Scheduler`."""
        self._working.remove(assignment)
        self._taken.append(assignment)
        self._now = max(self._now, assignment.due)

    def end(self) -> tuple[Timing, dict[ClientId, str]]:
        """See `Scheduler`; nobody is ever late."""
        staleness = tuple(self._step - one.task for one in self._taken)
        clock = None if self._context.delays is None else self._now
        answered = tuple(one.client for one in self._taken)
        return Timing(answered, staleness, simulated_seconds=clock), {}

    @property
    def patience(self) -> float | None:
        """However long it takes."""
        return None

    @property
    def at_work(self) -> Sequence[Assignment]:
        """Those whose answers will be in later steps."""
        return self._working

    def state(self) -> dict[str, Tensor]:
        """Returns the clock, the number of draws, and who is at work: by place in the list of clients."""
        places = {client: at for at, client in enumerate(self._context.clients)}
        working = self._working
        return {
            "now": torch.tensor(self._now, dtype=torch.float64),
            "draws": torch.tensor(self._draws),
            "clients": torch.tensor([places[one.client] for one in working], dtype=torch.int64),
            "tasks": torch.tensor([one.task for one in working], dtype=torch.int64),
            "due": torch.tensor([one.due for one in working], dtype=torch.float64),
        }

    def load_(self, state: Mapping[str, Tensor]) -> None:
        """Reads what `state` gave."""
        self._now, self._draws = float(state["now"]), int(state["draws"])
        rows = zip(*(state[name].tolist() for name in ("clients", "tasks", "due")), strict=True)
        for client, task, due in rows:
            self._working.append(Assignment(self._context.clients[client], task, due))


class _Counted:
    """Participation as it was found by looking ahead."""

    def __init__(self, asked: list[list[ClientId]]) -> None:
        self._asked = asked
        self._tasks = Counter(client for names in asked for client in names)

    @property
    def composed_tasks(self) -> int:
        """No client needs noise for more tasks than the busiest is given."""
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
