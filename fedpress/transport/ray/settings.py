"""Settings of the Ray engine: where its actors run, and what each of them takes."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Literal

from pydantic import BaseModel, Field, field_validator

from fedpress.core.settings import SETTINGS
from fedpress.errors import NetworkError, SettingError


def check_installed() -> None:
    """Checks that Ray is installed.

    Raises:
        NetworkError: if it is not.
    """
    if find_spec("ray") is None:
        raise NetworkError(
            "Ray is not installed", place="engine", cure='pip install "fedpress[ray]"'
        )


class RaySettings(BaseModel):
    """Where the actors run, and what each of them takes.

    Attributes:
        address: address of a running cluster, of which this machine is a node: "auto" or HOST:PORT.
            None: Ray is started on this machine, and ended with the run.
        cpus_per_client: number of CPUs of an actor, which runs one client at a time. Torch uses as
            many threads, rounded down, but at least one.
        gpus_per_client: number of GPUs of an actor; 0: the clients train on the CPU.
        actors: largest number of actors; None: as many as the cluster has room for. There are never
            more actors than clients.
    """

    model_config = SETTINGS

    kind: Literal["ray"] = "ray"
    address: str | None = None
    cpus_per_client: float = Field(default=1.0, gt=0)
    gpus_per_client: float = Field(default=0.0, ge=0)
    actors: int | None = Field(default=None, ge=1)

    @field_validator("address")
    @classmethod
    def _is_address(cls, value: str | None) -> str | None:
        if value is None or value == "auto":
            return value
        host, _, port = value.rpartition(":")
        if not host or not port.isdigit() or "/" in value:
            raise SettingError(
                f"got {value!r}, expected auto or HOST:PORT",
                cure="give the address that ray start --head printed, such as 10.0.0.1:6379",
            )
        return value

    def model_post_init(self, context: Any) -> None:
        """Checks that Ray is installed, so that the error comes before any work."""
        check_installed()

    @property
    def threads(self) -> int:
        """Threads of torch in each actor."""
        return max(1, int(self.cpus_per_client))

    @property
    def size(self) -> str:
        """Numbers of CPUs and GPUs of an actor, in words."""
        return f"{self.cpus_per_client:g} CPUs and {self.gpus_per_client:g} GPUs"
