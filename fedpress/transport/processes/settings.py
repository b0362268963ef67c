"""Settings of the engine of worker processes."""

from __future__ import annotations

import os
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from fedpress.errors import Argument, SettingError


def cores() -> int:
    """Returns the number of cores that this process may use."""
    # Linux can keep a process to some cores; other systems only know all of them.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class ProcessSettings(BaseModel):
    """How many processes run the clients.

    Attributes:
        workers: number of worker processes; None: one for each core. Each computes with one thread.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["processes"] = "processes"
    workers: int | None = Field(default=None, ge=1)

    @field_validator("workers")
    @classmethod
    def _has_cores(cls, value: int | None) -> int | None:
        # Workers that share a core are no quicker together, and each has its own model.
        if value is not None and value > cores():
            raise SettingError(
                f"got {value}, but this process may use {cores()} cores",
                cure=("give at most ", Argument("engine.workers", str(cores()))),
            )
        return value

    @property
    def number(self) -> int:
        """Number of worker processes."""
        return self.workers or cores()
