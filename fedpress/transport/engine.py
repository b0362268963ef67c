"""Engines decide where simulated clients run: in this process, in others, or on a Ray cluster.

The engine is not a key of the recipe (the file that describes a run), because it must not change a
result: with every engine the clients send the same messages, and as many bytes. Only the engine
"stacked" adds numbers in another order; the result then says that it was used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from pydantic import BaseModel, Field, ValidationError

from fedpress.core.names import ClientId
from fedpress.core.settings import SETTINGS
from fedpress.errors import Argument, RecipeError, SettingError, Words, suggestion
from fedpress.federation import Transport
from fedpress.transport.actor import Side
from fedpress.transport.local import LocalTransport
from fedpress.transport.processes.engine import (
    ProcessEngine,
    device_of,
    open_processes,
    why_no_fork,
)
from fedpress.transport.processes.settings import ProcessSettings
from fedpress.transport.ray.engine import open_ray
from fedpress.transport.ray.settings import RaySettings
from fedpress.transport.stacked import StackedTransport, Trial
from fedpress.workspace.state import Engine


@dataclass(frozen=True)
class LocalEngine:
    """Runs all clients in this process, one after another.

    Attributes:
        real_bytes: whether messages are converted to bytes and back; else their bytes are counted.
    """

    real_bytes: bool = False

    def connect(
        self, clients: Mapping[ClientId, Side], build: Callable[..., Any]
    ) -> LocalTransport:
        """Returns a transport to `clients`; see `fedpress.workspace.state.Engine`.

        An engine with other processes calls `build` there to make the inputs that clients share.
        Here all clients are in this process, so it is not called.
        """
        if self.real_bytes:
            return LocalTransport({name: side.handle for name, side in clients.items()})
        return LocalTransport.of_messages({name: side.answer for name, side in clients.items()})

    @property
    def rounding(self) -> str:
        """None of its own; see `fedpress.workspace.state.Engine`."""
        return ""


class LocalSettings(BaseModel):
    """Settings of the local engine.

    Attributes:
        bytes: "computed": messages are handed over as they are, and their bytes are counted.
            "real": they are converted to bytes and back, as over a network. The results are equal.
    """

    model_config = SETTINGS

    kind: Literal["local"] = "local"
    bytes: Literal["computed", "real"] = "computed"


@contextmanager
def open_local(settings: LocalSettings) -> Iterator[LocalEngine]:
    """Yields the engine; there is nothing to start or to stop."""
    yield LocalEngine(real_bytes=settings.bytes == "real")


@dataclass(eq=False)
class StackedEngine:
    """Trains several clients of a round in one program, in this process.

    Attributes:
        at_once: largest number of clients in it; None: what fits into the memory of most devices.
        tries: whether to measure if this is the faster way, and to train alone what it cannot train.
        latest: transport to the clients of the current stage; None before the first stage.
    """

    at_once: int | None = None
    tries: bool = False
    latest: StackedTransport | None = None

    def connect(
        self, clients: Mapping[ClientId, Side], build: Callable[..., Any]
    ) -> StackedTransport:
        """Returns a transport to `clients`; see `fedpress.workspace.state.Engine`."""
        trial = Trial() if self.tries else None
        self.latest = StackedTransport(clients, self.at_once, trial=trial)
        return self.latest

    @property
    def rounding(self) -> str:
        """Its name, once a client of the stage was trained in a stack; see `Engine`."""
        return "stacked" if self.latest is not None and self.latest.stacked else ""


class StackedSettings(BaseModel):
    """Settings of the engine that trains several clients in one program.

    Attributes:
        at_once: largest number of clients in it; None: up to 128, fewer of large models.
    """

    model_config = SETTINGS

    kind: Literal["stacked"] = "stacked"
    at_once: int | None = Field(default=None, ge=1)


@contextmanager
def open_stacked(settings: StackedSettings) -> Iterator[StackedEngine]:
    """Yields the engine; there is nothing to start or to stop."""
    yield StackedEngine(settings.at_once)


class AutoSettings(BaseModel):
    """Settings of the default engine: there are none except its name."""

    model_config = SETTINGS

    kind: Literal["auto"] = "auto"


PATIENCE = 0.5
"""Seconds of the clients' work in this process before the default engine starts workers, which takes
about a tenth of it. So a stage never takes much longer than with the better engine."""


@dataclass(eq=False)
class AutoEngine:
    """Runs clients in this process, and in worker processes if their work takes long.

    On a GPU it trains several in one program, if that is faster.

    Attributes:
        processes: starts the workers; None if this process cannot fork, or has one core.
        latest: the engine of the current stage.
    """

    processes: ProcessEngine | None
    latest: Engine = field(default_factory=LocalEngine)

    def connect(self, clients: Mapping[ClientId, Side], build: Callable[..., Any]) -> Transport:
        """Returns a transport to `clients`; see `fedpress.workspace.state.Engine`."""
        # On a CPU the bits must not depend on what was faster. On a GPU they are no promise, and
        # processes cannot share it as well as one process can use it.
        if device_of(clients).type != "cpu":
            self.latest = StackedEngine(tries=True)
        elif self.processes is None:
            self.latest = LocalEngine()
        else:
            self.latest = self.processes
        transport: Transport = self.latest.connect(clients, build)
        return transport

    @property
    def rounding(self) -> str:
        """That of the engine which it chose; see `fedpress.workspace.state.Engine`."""
        return self.latest.rounding


@contextmanager
def open_auto(settings: AutoSettings) -> Iterator[AutoEngine]:
    """Yields the engine, and ends its workers after the block."""
    workers = ProcessSettings().number
    if workers == 1 or why_no_fork():
        yield AutoEngine(None)
        return
    with open_processes(ProcessSettings()) as processes:
        processes.patience = PATIENCE
        yield AutoEngine(processes)


class EngineSettings(Protocol):
    """The interface of the settings of an engine."""

    @property
    def kind(self) -> str:
        """Name of the engine."""
        ...


@dataclass(frozen=True)
class Row:
    """An engine.

    Attributes:
        settings: the class of its settings.
        open: starts the engine with these settings, and stops it after the block.
    """

    settings: type[BaseModel]
    open: Callable[[Any], AbstractContextManager[Engine]]


ENGINES = {
    "auto": Row(AutoSettings, open_auto),
    "local": Row(LocalSettings, open_local),
    "processes": Row(ProcessSettings, open_processes),
    "stacked": Row(StackedSettings, open_stacked),
    "ray": Row(RaySettings, open_ray),
}
"""Name of an engine -> its row."""


def open_engine(settings: EngineSettings) -> AbstractContextManager[Engine]:
    """Starts an engine, and stops it after the block.

    Raises:
        NetworkError: if the engine is "ray", and there is no cluster at the address, or no room.
    """
    return ENGINES[settings.kind].open(settings)


def engine_settings(engine: str | Mapping[str, Any] = "auto") -> EngineSettings:
    """Returns the settings of an engine.

    Args:
        engine: name of the engine, or a dictionary with its name ("kind") and settings, such as
            `{"kind": "ray", "actors": 4}`. Without a kind it is the engine that has these settings.

    Raises:
        RecipeError: if there is no such engine, or a setting is wrong.
        NetworkError: if the engine is "ray" and Ray is not installed.

    >>> engine_settings("local")
    LocalSettings(kind='local', bytes='computed')
    >>> engine_settings({"bytes": "real"})
    LocalSettings(kind='local', bytes='real')
    >>> engine_settings("rya")
    Traceback (most recent call last):
        ...
    fedpress.errors.RecipeError: engine: got 'rya', expected auto, local, processes, stacked or ray; did you mean 'ray'?
    """
    table = {"kind": engine} if isinstance(engine, str) else dict(engine)
    kind = table.get("kind", _kind_with(table))
    if kind not in ENGINES:
        *first, last = ENGINES
        raise RecipeError(
            f"got {'no kind' if kind is None else repr(kind)}, expected {', '.join(first)} or {last}",
            place="engine",
            cure=suggestion(str(kind), list(ENGINES)) or ("give ", Argument("engine", "auto")),
        )
    try:
        settings: EngineSettings = ENGINES[kind].settings(**{**table, "kind": kind})  # type: ignore[assignment]
    except ValidationError as error:
        raise _mistake(error, kind) from error
    return settings


def _kind_with(table: Mapping[str, Any]) -> str | None:
    """Returns the only engine that has all settings in `table`; None if there are none or several."""
    fitting = [
        name for name, row in ENGINES.items() if set(table) <= set(row.settings.model_fields)
    ]
    return fitting[0] if len(fitting) == 1 else None


def _mistake(error: ValidationError, kind: str) -> RecipeError:
    """Converts the first error of pydantic into an error with place and cure."""
    # Only the first error is shown, because the others often follow from it.
    first = error.errors()[0]
    key = str(first["loc"][0])
    # The same words as in the other errors of fedpress: "got ..., expected ...".
    text = (
        str(first["msg"])
        .replace("Input should be", "expected")
        .replace("expected greater", "expected a number greater")
    )
    problem = f"got {first['input']!r}, {text}"
    cure: Words = "give another value"
    # An error that our own validator raised has a better cure than "give another value".
    own = first.get("ctx", {}).get("error")
    if isinstance(own, SettingError):
        problem, cure = own.problem, own.cure
    if first["type"] == "extra_forbidden":
        problem = "no such setting of this engine"
        cure = suggestion(key, list(ENGINES[kind].settings.model_fields)) or "leave it out"
        for name, row in ENGINES.items():
            if key in row.settings.model_fields:
                cure = ("give ", Argument("engine", name), ", or leave it out")
    return RecipeError(problem, place=f"engine.{key}", cure=cure)
