"""The errors of fedpress: each names a place, the problem there and a cure, and reads as one sentence."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Argument:
    """An argument that a cure tells to give; Python and the command line each write it in their own way.

    Attributes:
        name: of the argument in Python.
        value: an example; a word in capitals stands for what the reader must choose. None: the name alone.
    """

    name: str
    value: object = None

    def __str__(self) -> str:
        """Returns the argument as Python writes it.

        >>> str(Argument("input_shape", (3, 32, 32))), str(Argument("data", "SOURCE")), str(Argument("out"))
        ('input_shape=(3, 32, 32)', 'data=SOURCE', 'out=')
        """
        if self.value is None:
            return f"{self.name}="
        if isinstance(self.value, str) and not self.value.isupper():
            return f'{self.name}="{self.value}"'
        return f"{self.name}={self.value}"


Words = str | Sequence[str | Argument]
"""What a cure consists of: a sentence, or its parts where it names arguments."""


class FedpressError(Exception):
    """Base of every error that a user can act on; the command line shows it without a traceback and exits with 2.

    Attributes:
        problem: what is wrong, with what was got and what was expected.
        place: where: an argument, a key of a recipe, a field of a message or a file. Functions name their own
            argument; whoever calls them for somebody else puts in its place what that person has written.
        cure: what to do, such that it works when it is followed.

    >>> error = FedpressError("got 0, expected a number above 0", place="clip_norm", cure="try 1.0")
    >>> str(error)
    'clip_norm: got 0, expected a number above 0; try 1.0'
    >>> error.place = f"recipe.stage[2].privacy.{error.place}"
    >>> str(error)
    'recipe.stage[2].privacy.clip_norm: got 0, expected a number above 0; try 1.0'
    """

    def __init__(self, problem: str, *, place: str | Path = "", cure: Words = "") -> None:
        # Only `problem` goes to the base: pickle calls the class with it and then restores the fields from __dict__.
        super().__init__(problem)
        self.place = str(place)
        self.problem = problem
        self.cure = cure

    def __str__(self) -> str:
        """Returns the sentence `place: problem; cure`, with arguments as Python writes them."""
        return self.told()

    def told(self, write: Callable[[Argument], str] = str, *, place: str | None = None) -> str:
        """Returns the sentence `place: problem; cure`.

        Args:
            write: how the reader writes an argument.
            place: how the reader knows the place; None: as it is.
        """
        at = self.place if place is None else place
        parts = [self.cure] if isinstance(self.cure, str) else self.cure
        cure = "".join(write(part) if isinstance(part, Argument) else part for part in parts)
        beginning = f"{at}: " if at else ""
        end = f"; {cure}" if cure else ""
        return f"{beginning}{self.problem}{end}"


class RecipeError(FedpressError):
    """A recipe or a setting is wrong: unknown key, wrong type or range, settings that do not fit together."""


class DataError(FedpressError):
    """Data is missing, corrupt, or too small for what was asked."""


class PublicDataError(DataError):
    """The public part of the data is empty or too small for what looks at it."""


class ModelError(FedpressError):
    """A model cannot be built, traced, pruned or rebuilt."""


class TrainingError(FedpressError):
    """Training cannot go on, for instance because the loss is not finite."""


class DivergedError(TrainingError):
    """Numbers grew until they were not finite: the learning rate is too large, or the data holds wrong values."""


class PrivacyError(FedpressError):
    """A privacy promise cannot be kept: no noise level reaches the budget, or the budget would be passed."""


class WireError(FedpressError):
    """A message is corrupt, of an unknown version, or does not fit what was agreed."""


class SecureError(FedpressError):
    """A secure sum stays closed: too few clients are left, or somebody did not keep to the protocol."""


class ExportError(FedpressError):
    """A model cannot be exported, or the artifact differs from the model."""


class RunError(FedpressError):
    """A run folder is missing, belongs to another recipe, or cannot be written."""


@contextmanager
def renaming(keys: Mapping[str, str]) -> Iterator[None]:
    """Puts what the caller's reader has written in the place of an argument, in errors that pass through.

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
