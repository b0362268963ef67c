"""The errors of fedpress: each has a place, a problem and a cure, and reads as one sentence."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

OWN_ARGUMENTS = ("data", "model")
"""Arguments that take no dictionary, so keys of these tables are given as `**{"data.x": 1}`."""


@dataclass(frozen=True)
class Argument:
    """An argument in a cure; Python, a recipe and the command line write it differently.

    Attributes:
        name: of the argument in Python; with a dot in it a key of a table (`privacy.epsilon`);
            a key of a recipe if it begins with `recipe.`.
        value: an example; a word in capitals stands for what the reader must choose. None: the name
            alone.
    """

    name: str
    value: object = None

    def __str__(self) -> str:
        """Returns the argument as Python writes it, or as its recipe does.

        >>> str(Argument("shape", (3, 8))), str(Argument("data", "SOURCE")), str(Argument("out"))
        ('shape=(3, 8)', 'data=SOURCE', 'out=')
        >>> print(Argument("data.validation", 500), "or", Argument("recipe.data.validation", 500))
        **{"data.validation": 500} or recipe.data.validation = 500
        >>> print(Argument("privacy.epsilon", 8.0))
        privacy={"epsilon": 8.0}
        >>> print(Argument("int8", True), "or", Argument("recipe.stage[1].int8", True))
        int8=True or recipe.stage[1].int8 = true
        """
        in_recipe = self.name.startswith("recipe.")
        if self.value is None:
            return self.name if in_recipe or "." in self.name else f"{self.name}="
        if in_recipe:
            return f"{self.name} = {_in_toml(self.value)}"
        value = _in_python(self.value)
        first, *rest = self.name.split(".")
        if first in OWN_ARGUMENTS and rest:
            return f'**{{"{self.name}": {value}}}'
        for word in reversed(rest):
            value = f'{{"{word}": {value}}}'
        return f"{first}={value}"


def _in_toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_in_toml, value))}]"
    return _in_python(value)


def _in_python(value: object) -> str:
    if isinstance(value, tuple):
        parts = ", ".join(map(_in_python, value))
        return f"({parts},)" if len(value) == 1 else f"({parts})"
    word = isinstance(value, str | Path) and not str(value).isupper()
    return f'"{value}"' if word else str(value)


@dataclass(frozen=True)
class Shell:
    """Part of a cure that is shown on the command line only, such as `--resume`.

    They are written such that the sentence is whole with and without them.
    """

    words: str

    def __str__(self) -> str:
        """Returns what Python is told of it: nothing."""
        return ""


Words = str | Sequence[str | Argument | Shell]
"""What a cure consists of: a sentence, or its parts where it names arguments."""


class FedpressError(Exception):
    """Base of all errors that a user can act on; the command line prints them and exits with 2.

    Attributes:
        problem: what is wrong, with what was got and what was expected.
        place: where: an argument, a key of a recipe, a field of a message or a file. Functions name
            their own argument; whoever calls them for somebody else puts in its place what that
            person has written.
        cure: what to do, such that it works when it is followed.

    >>> error = FedpressError("got 0, expected a number above 0", place="clip_norm", cure="try 1.0")
    >>> str(error)
    'clip_norm: got 0, expected a number above 0; try 1.0'
    >>> error.place = f"recipe.stage[2].privacy.{error.place}"
    >>> str(error)
    'recipe.stage[2].privacy.clip_norm: got 0, expected a number above 0; try 1.0'
    """

    def __init__(self, problem: str, *, place: str | Path = "", cure: Words = "") -> None:
        # Pickle calls the class with the base's arguments, then restores the fields from
        # __dict__. So the base gets `problem` alone.
        super().__init__(problem)
        self.place = str(place)
        self.problem = problem
        self.cure = cure

    def __str__(self) -> str:
        """Returns the sentence `place: problem; cure`, with arguments as Python writes them."""
        return self.told()

    def told(
        self, write: Callable[[Argument | Shell], str] = str, *, place: str | None = None
    ) -> str:
        """Returns the sentence `place: problem; cure`.

        Args:
            write: how the reader writes an argument.
            place: how the reader knows the place; None: as it is.
        """
        at = self.place if place is None else place
        cure = "".join(part if isinstance(part, str) else write(part) for part in self._words())
        beginning = f"{at}: " if at else ""
        end = f"; {cure}" if cure else ""
        return f"{beginning}{self.problem}{end}"

    def change_arguments(self, change: Callable[[Argument], Argument]) -> None:
        """Puts what the reader knows in the place of the arguments that the cure names.

        >>> error = FedpressError("too few", cure=("give ", Argument("share", 0.1)))
        >>> error.change_arguments(lambda one: Argument(f"recipe.data.{one.name}", one.value))
        >>> str(error)
        'too few; give recipe.data.share = 0.1'
        """
        if not isinstance(self.cure, str):
            self.cure = tuple(
                change(part) if isinstance(part, Argument) else part for part in self.cure
            )

    def add_cure(self, *words: str | Argument | Shell) -> None:
        """Adds to what helps.

        >>> error = FedpressError("too few", cure="lower batch")
        >>> error.add_cure(", or give ", Argument("data", "SOURCE"))
        >>> str(error)
        'too few; lower batch, or give data=SOURCE'
        """
        self.cure = (*self._words(), *words)

    def _words(self) -> Sequence[str | Argument | Shell]:
        return [self.cure] if isinstance(self.cure, str) else self.cure


class RecipeError(FedpressError):
    """A recipe is wrong: an unknown key, a type, a range, or settings that do not go together."""


class SettingError(RecipeError, ValueError):
    """Raised in validators of settings classes; pydantic collects it as a ValueError.

    Its place and its arguments are the keys of the settings themselves; whoever reads the recipe
    knows where they lie. An error about the settings as a whole has no place, nor has one of a
    field's own validator: pydantic knows both.
    """

    @classmethod
    def of(cls, error: FedpressError, *, place: str = "") -> SettingError:
        """Returns another function's error about the setting `place`, for pydantic to collect."""
        return cls(error.problem, place=place, cure=error.cure)


class DataError(FedpressError):
    """Data is missing, corrupt, or too small for what was asked."""


class PublicDataError(DataError):
    """The public part of the data is empty or too small for what looks at it."""


class ModelError(FedpressError):
    """A model cannot be built, traced, pruned or rebuilt."""


class TrainingError(FedpressError):
    """Training cannot go on, for instance because the loss is not finite."""


class DivergedError(TrainingError):
    """Numbers became infinite or NaN: the learning rate is too large, or data values are wrong."""


class PrivacyError(FedpressError):
    """A privacy promise cannot be kept: no noise reaches the budget, or it would be exceeded."""


class WireError(FedpressError):
    """A message is corrupt, of an unknown version, or does not fit what was agreed."""


class SecureError(FedpressError):
    """A secure sum is not opened: too few clients are left, or one broke the protocol."""


class ExportError(FedpressError):
    """A model cannot be exported, or the artifact differs from the model."""


class NetworkError(FedpressError):
    """The network between server and clients does not work, or one side refuses the other.

    Attributes:
        refused: whether trying again makes no sense before somebody has changed something.
    """

    def __init__(
        self, problem: str, *, place: str | Path = "", cure: Words = "", refused: bool = False
    ) -> None:
        super().__init__(problem, place=place, cure=cure)
        self.refused = refused


class RunError(FedpressError):
    """A run folder is missing, belongs to another recipe, or cannot be written."""


@contextmanager
def renaming(keys: Mapping[str, str]) -> Iterator[None]:
    """Renames arguments in errors that pass through to what the caller's user has written.

    Their cures name it so, too.

    Args:
        keys: argument, or a field of one (`noise.clip_norm`) -> what the reader knows it by.

    >>> with renaming({"clip_norm": "privacy.clip_norm"}):
    ...     raise RecipeError("got 0", place="clip_norm", cure="try 1.0")
    Traceback (most recent call last):
        ...
    fedpress.errors.RecipeError: privacy.clip_norm: got 0; try 1.0
    """
    try:
        yield
    except FedpressError as error:
        error.place = renamed(error.place, keys)
        error.change_arguments(lambda one: replace(one, name=renamed(one.name, keys)))
        raise


def renamed(place: str, keys: Mapping[str, str]) -> str:
    """Returns `place` with the longest argument that it begins with replaced; see `renaming`.

    >>> renamed("chain[1].bits", {"chain": "uplink"}), renamed("chains", {"chain": "uplink"})
    ('uplink[1].bits', 'chains')
    """
    for word in sorted(keys, key=len, reverse=True):
        rest = place.removeprefix(word)
        if rest != place and rest[:1] in ("", ".", "["):
            return keys[word] + rest
    return place


@contextmanager
def placing(place: str | Path) -> Iterator[None]:
    """Puts a place before that of errors that pass through: a file before what is wrong in it.

    >>> with placing("spec.json"):
    ...     raise ModelError("got 0", place="input_shape", cure="try 8")
    Traceback (most recent call last):
        ...
    fedpress.errors.ModelError: spec.json: input_shape: got 0; try 8
    """
    try:
        yield
    except FedpressError as error:
        error.place = f"{place}: {error.place}" if error.place else str(place)
        raise


@contextmanager
def inside(part: str) -> Iterator[None]:
    """Says of which part of an argument the fields are that errors name which pass through.

    >>> with inside("chain[1]"):
    ...     raise RecipeError("got 3, expected a power of two", place="block")
    Traceback (most recent call last):
        ...
    fedpress.errors.RecipeError: chain[1].block: got 3, expected a power of two
    """
    try:
        yield
    except FedpressError as error:
        error.place = f"{part}.{error.place}" if error.place else part
        raise


def suggestion(word: str, known: Sequence[str], otherwise: str = "") -> str:
    """Returns `did you mean 'x'?` for the nearest of the `known` words, and what to do `otherwise`.

    >>> suggestion("epsilom", ["epsilon", "delta"])
    "did you mean 'epsilon'?"
    >>> suggestion("epsilom", ["epsilon", "delta"], "give a budget")
    "did you mean 'epsilon'? If not, give a budget"
    >>> suggestion("x", ["epsilon", "delta"], "give a budget")
    'give a budget'
    """
    from difflib import get_close_matches  # only a mistake needs it

    near = get_close_matches(word, known, n=1, cutoff=0.6)
    if not near:
        return otherwise
    return f"did you mean '{near[0]}'?" + (f" If not, {otherwise}" if otherwise else "")


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """Returns `; did you mean 'x'?`, to stand inside a sentence; see `suggestion`."""
    near = suggestion(word, known)
    return f"; {near}" if near else ""
