"""Options that choose where simulated clients run: in which processes, on which machines."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

# Only for type checkers: `--help` must not wait for torch.
if TYPE_CHECKING:
    from fedpress.workspace import state

PANEL = "Where simulated clients run"
"""Title of these options in the help."""
Engine = Annotated[
    str,
    typer.Option(
        help="local (this process), processes (worker processes), stacked (several clients in one "
        "program), ray (actors of Ray), or auto (workers, on a GPU stacked, if that pays back).",
        rich_help_panel=PANEL,
    ),
]
Bytes = Annotated[
    str | None,
    typer.Option(
        "--bytes",
        help="Local messages: computed (their bytes are only counted) or real (they are packed).",
        rich_help_panel=PANEL,
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        help="Number of worker processes; by default one for each core.", rich_help_panel=PANEL
    ),
]
AtOnce = Annotated[
    int | None,
    typer.Option(
        "--at-once",
        help="Stacked: clients in one program; by default up to 128, fewer of large models.",
        rich_help_panel=PANEL,
    ),
]
Address = Annotated[
    str | None,
    typer.Option(
        help="A running cluster: auto or HOST:PORT; without it, Ray starts on this machine.",
        rich_help_panel=PANEL,
    ),
]
Cpus = Annotated[
    float | None, typer.Option(help="CPUs of an actor; 1 by default.", rich_help_panel=PANEL)
]
Gpus = Annotated[
    float | None, typer.Option(help="GPUs of an actor; 0 by default.", rich_help_panel=PANEL)
]
Actors = Annotated[
    int | None,
    typer.Option(
        help="Number of actors; by default as many as there is room for.", rich_help_panel=PANEL
    ),
]


@dataclass(frozen=True)
class Given:
    """Values of the options in this file; None for an option that the user did not give.

    Attributes:
        engine: "auto", "local", "processes", "stacked" or "ray".
        workers: number of worker processes.
        at_once: number of clients that the engine "stacked" trains in one program.
        bytes: "computed" or "real"; only for the local engine.
        address: address of a running Ray cluster.
        cpus_per_client: CPUs of each actor (a Ray process in which clients run).
        gpus_per_client: GPUs of each actor.
        actors: number of actors.
    """

    engine: str
    workers: int | None
    at_once: int | None
    bytes: str | None
    address: str | None
    cpus_per_client: float | None
    gpus_per_client: float | None
    actors: int | None

    @contextmanager
    def open(self) -> Iterator[state.Engine]:
        """Starts the engine, yields it, and stops it after the block.

        Raises:
            RecipeError: if an option is wrong.
            NetworkError: if Ray is not installed, or the cluster cannot be reached.
        """
        from fedpress.transport.engine import engine_settings, open_engine

        settings = {
            "workers": self.workers,
            "at_once": self.at_once,
            "bytes": self.bytes,
            "address": self.address,
            "cpus_per_client": self.cpus_per_client,
            "gpus_per_client": self.gpus_per_client,
            "actors": self.actors,
        }
        # Left out if not given: each engine has other settings, with defaults.
        given = {key: value for key, value in settings.items() if value is not None}
        with open_engine(engine_settings({"kind": self.engine, **given})) as engine:
            yield engine
