"""Settings of the engine of worker processes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field, field_validator

from fedpress.core.settings import SETTINGS
from fedpress.errors import Argument, SettingError

GROUP = Path("/sys/fs/cgroup")
"""Where Linux shows the limits of a container to the processes in it."""


def cores() -> int:
    """Returns the number of cores that this process may use.

    Linux can keep a process to some cores, and a container to a share of their time. Other systems
    only know all cores.
    """
    known = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        known = len(os.sched_getaffinity(0))
    share = _container_cores()
    return known if share is None else max(1, min(known, round(share)))


def _container_cores() -> float | None:
    """Returns the processor time of the container, in cores; None if it has no limit."""
    v1 = (GROUP / "cpu/cpu.cfs_quota_us", GROUP / "cpu/cpu.cfs_period_us")
    try:
        # cgroup v2 has one file: quota and period in microseconds, such as "150000 100000".
        words = (GROUP / "cpu.max").read_text("ascii").split()
    except OSError:
        try:
            words = [path.read_text("ascii").strip() for path in v1]
        except OSError:
            return None
    # Without a limit the quota is "max" in version 2, and -1 in version 1.
    if len(words) != 2 or not words[0].isdigit() or not int(words[1]):
        return None
    return int(words[0]) / int(words[1])


class ProcessSettings(BaseModel):
    """How many processes run the clients.

    Attributes:
        workers: number of worker processes; None: one for each core. Each computes with one thread.
    """

    model_config = SETTINGS

    kind: Literal["processes"] = "processes"
    workers: int | None = Field(default=None, ge=1)

    @field_validator("workers")
    @classmethod
    def _has_cores(cls, value: int | None) -> int | None:
        # Workers that share a core are no quicker together, and each has its own model.
        if value is not None and value > cores():
            raise SettingError(
                f"got {value}, but this process may use {cores()} cores",
                cure=("give at most ", Argument("engine.workers", cores())),
            )
        return value

    @property
    def number(self) -> int:
        """Number of worker processes."""
        return self.workers or cores()
