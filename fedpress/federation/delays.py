"""Simulated delays: how many seconds a client takes from getting a model to sending its answer.

Each delay is drawn from a random stream that is named by seed, client and task. So a delay does not
depend on data or on the order of events, and a repeated or resumed run has the same delays.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal, Protocol, TypeAlias

from pydantic import BaseModel, Field

from fedpress.core.names import ClientId
from fedpress.core.random_source import public_stream
from fedpress.core.settings import SETTINGS


class Delays(Protocol):
    """A distribution of delays, such as `Lognormal`."""

    def draw(self, seed: int, client: ClientId, task: int) -> float:
        """Returns the delay of one task in simulated seconds: finite and at least 0.

        Args:
            seed: seed of the run.
            client: name of the client.
            task: number of the client's task.
        """
        ...


class Constant(BaseModel):
    """Every client always takes the same time."""

    model_config = SETTINGS

    kind: Literal["constant"] = "constant"
    seconds: float = Field(
        default=1.0, ge=0, allow_inf_nan=False, description="seconds that every task takes"
    )

    def draw(self, seed: int, client: ClientId, task: int) -> float:
        """See `Delays`.

        >>> Constant(seconds=2.5).draw(1, "a", 1)
        2.5
        """
        return self.seconds


class Lognormal(BaseModel):
    """Devices of different speed: median x exp(devices x N1 + tasks x N2).

    N1 is a standard normal number that is drawn once for each device; N2 is drawn for each task.
    So `devices` and `tasks` are standard deviations of the logarithm. With `devices = 1.0` one
    client in six takes at least 2.7 times as long as the median, and one in 44 at least 7.4 times.
    """

    model_config = SETTINGS

    kind: Literal["lognormal"] = "lognormal"
    median: float = Field(
        default=1.0,
        gt=0,
        allow_inf_nan=False,
        description="median seconds of a task",
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
        # The stream's name has no task, so N1 is equal in all tasks: a slow device stays slow.
        device = _normal(seed, "delay", client)
        # A device is not equally fast each time: other programs run on it, and networks vary.
        once = _normal(seed, "delay", client, "task", task)
        return self.median * math.exp(self.devices * device + self.tasks * once)


class Exponential(BaseModel):
    """Equal devices; the time of a task has an exponential distribution."""

    model_config = SETTINGS

    kind: Literal["exponential"] = "exponential"
    mean: float = Field(
        default=1.0, gt=0, allow_inf_nan=False, description="seconds that a task takes on average"
    )

    def draw(self, seed: int, client: ClientId, task: int) -> float:
        """See `Delays`."""
        stream = public_stream(seed, "delay", client, "task", task)
        # Since 0 <= share < 1, log1p(-share) is finite; log(share) would be infinite at 0.
        share = float(stream.uniform())
        return -self.mean * math.log1p(-share)


AnyDelays: TypeAlias = Annotated[Constant | Lognormal | Exponential, Field(discriminator="kind")]
"""A table of a recipe, such as `{ kind = "lognormal", median = 2.0 }`."""
DELAYS: dict[str, type[Constant] | type[Lognormal] | type[Exponential]] = {
    "constant": Constant,
    "lognormal": Lognormal,
    "exponential": Exponential,
}
"""Name in a recipe -> class of the distribution."""


def _normal(seed: int, *words: str | int) -> float:
    # Drawn from a public stream, since a delay tells nothing about data: everybody with the seed
    # may compute it.
    return float(public_stream(seed, *words).normal())
