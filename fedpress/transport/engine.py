"""Engines decide where simulated clients run: in this process, or in actors of a Ray cluster.

The engine is not a key of the recipe (the file that describes a run), because it must not change a
result: with every engine the clients send the same messages, and as many bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, ValidationError

from fedpress.core.names import ClientId
from fedpress.errors import Argument, RecipeError, SettingError, Words, suggestion
from fedpress.transport.actor import Side
from fedpress.transport.local import LocalTransport
from fedpress.transport.ray.engine import open_ray
from fedpress.transport.ray.settings import RaySettings
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


class LocalSettings(BaseModel):
    """Settings of the local engine.

    Attributes:
        bytes: "computed": messages are handed over as they are, and their bytes are counted.
            "real": they are converted to bytes and back, as over a network. The results are equal.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["local"] = "local"
    bytes: Literal["computed", "real"] = "computed"


@contextmanager
def open_local(settings: LocalSettings) -> Iterator[LocalEngine]:
    """Yields the engine; there is nothing to start or to stop."""
    yield LocalEngine(real_bytes=settings.bytes == "real")


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

    settings: Callable[..., EngineSettings]
    open: Callable[[Any], AbstractContextManager[Engine]]


ENGINES = {"local": Row(LocalSettings, open_local), "ray": Row(RaySettings, open_ray)}
"""Name of an engine -> its row."""
FIELDS = {"local": LocalSettings.model_fields, "ray": RaySettings.model_fields}
"""Name of an engine -> its settings by name, to say which engine has a setting."""


def open_engine(settings: EngineSettings) -> AbstractContextManager[Engine]:
    """Starts an engine, and stops it after the block.

    Raises:
        NetworkError: if the engine is "ray", and there is no cluster at the address, or no room.
    """
    return ENGINES[settings.kind].open(settings)


def engine_settings(engine: str | Mapping[str, Any] = "local") -> EngineSettings:
    """Returns the settings of an engine.

    Args:
        engine: name of the engine, or a dictionary with its name ("kind") and settings, such as
            `{"kind": "ray", "actors": 4}`.

    Raises:
        RecipeError: if there is no such engine, or a setting is wrong.
        NetworkError: if the engine is "ray" and Ray is not installed.

    >>> engine_settings("local")
    LocalSettings(kind='local', bytes='computed')
    >>> engine_settings("rya")
    Traceback (most recent call last):
        ...
    fedpress.errors.RecipeError: engine: got 'rya', expected local or ray; did you mean 'ray'?
    """
    table = {"kind": engine} if isinstance(engine, str) else dict(engine)
    kind = table.get("kind")
    if kind not in ENGINES:
        raise RecipeError(
            f"got {kind!r}, expected {' or '.join(ENGINES)}",
            place="engine",
            cure=suggestion(str(kind), list(ENGINES)) or ("give ", Argument("engine", "ray")),
        )
    try:
        return ENGINES[kind].settings(**table)
    except ValidationError as error:
        raise _mistake(error) from error


def _mistake(error: ValidationError) -> RecipeError:
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
        keys = [key for fields in FIELDS.values() for key in fields]
        cure = suggestion(key, keys) or "leave it out"
        # The key exists, but for another engine than the chosen one.
        for engine, fields in FIELDS.items():
            if key in fields:
                cure = ("give ", Argument("engine", engine), ", or leave it out")
    return RecipeError(problem, place=f"engine.{key}", cure=cure)
