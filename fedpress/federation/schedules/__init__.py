"""The table of schedules: synchronous rounds, and buffered (asynchronous) server steps."""

from __future__ import annotations

from typing import Annotated, TypeAlias

from pydantic import Field

from fedpress.federation.schedules.base import (
    Assignment,
    Participation,
    Schedule,
    ScheduleContext,
    Scheduler,
    Timing,
)
from fedpress.federation.schedules.buffered import Buffered
from fedpress.federation.schedules.synchronous import Synchronous

AnySchedule: TypeAlias = Annotated[Synchronous | Buffered, Field(discriminator="kind")]
"""A table of a recipe, such as `{ kind = "buffered", buffer = 10 }`."""
SCHEDULES: dict[str, type[Synchronous] | type[Buffered]] = {
    "synchronous": Synchronous,
    "buffered": Buffered,
}
"""Name in a recipe -> class of the schedule's settings."""

__all__ = [
    "SCHEDULES",
    "AnySchedule",
    "Assignment",
    "Buffered",
    "Participation",
    "Schedule",
    "ScheduleContext",
    "Scheduler",
    "Synchronous",
    "Timing",
]
