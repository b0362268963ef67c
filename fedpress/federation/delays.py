"""How long clients take: simulated seconds from sending a model to the arrival of its answer.

Each delay is drawn from a stream named by seed, client and task. It depends on no order of events
and on no data, so a run that is repeated, or resumed after a kill, has the same delays.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal, Protocol, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

from fedpress.core.names import ClientId
from fedpress.core.random_source import public_stream


class Delays(Protocol):
    """One row of the table: a distribution of delays."""

    def draw(self, seed: int, client: ClientId, task: int) -> float:
        """Returns the simulated seconds, finite and not below 0, of task number `task`."""
        ...


class Constant(BaseModel):
    """Every client always takes the same time."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["constant"] = "constant"
    seconds: float = Field(
        default=1.0, ge=0, allow_inf_nan=False, description="that every task takes"
    )

    def draw(self, seed: int, client: ClientId, task: int) -> float:
        """See `Delays`.

        >>> Constant(seconds=2.5).draw(1, "a", 1)
        2.5
        """
        return self.seconds


class Lognormal(BaseModel):
    """Devices of different speed: exp of a normal number of the device, times one of each task.

    `devices` and `tasks` are standard deviations of the logarithm. With `devices = 1.0` one client
    in six is 2.7 times slower than the median, and one in 44 is 7.4 times slower.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["lognormal"] = "lognormal"
    median: float = Field(
        default=1.0,
        gt=0,
        allow_inf_nan=False,
        description="seconds that half of the tasks take at most",
    )
    devices: float = Field(
        default=1.0,
        ge=0,
        le=5,
        description="how much devices differ: standard deviation of the logarithm",
    )
    tasks: float = Field(
        default=0.1,
        ge=0,
        le=5,
        description="how much the tasks of one device differ: standard deviation of the logarithm",
    )

    def draw(self, seed: int, client: ClientId, task: int) -> float:
        """See `Delays`."""
        # Without the task in its name: a slow device is slow in all its tasks.
        device = _normal(seed, "delay", client)
        once = _normal(seed, "delay", client, "task", task)
        return self.median * math.exp(self.devices * device + self.tasks * once)


class Exponential(BaseModel):
    """Equal devices; the time of a task has an exponential distribution, as in queueing theory."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["exponential"] = "exponential"
    mean: float = Field(
        default=1.0, gt=0, allow_inf_nan=False, description="seconds that a task takes on average"
    )

    def draw(self, seed: int, client: ClientId, task: int) -> float:
        """See `Delays`."""
        stream = public_stream(seed, "delay", client, "task", task)
        # 0 <= share < 1, so log1p(-share) is finite; log(share) would not be at 0.
        share = float(stream.uniform())
        return -self.mean * math.log1p(-share)


AnyDelays: TypeAlias = Annotated[Constant | Lognormal | Exponential, Field(discriminator="kind")]
DELAYS: dict[str, type[Constant] | type[Lognormal] | type[Exponential]] = {
    "constant": Constant,
    "lognormal": Lognormal,
    "exponential": Exponential,
}


def _normal(seed: int, *words: str | int) -> float:
    return float(public_stream(seed, *words).normal())
