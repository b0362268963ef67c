"""The errors of fedpress: each has a place, a problem and a cure, and reads as one sentence."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

OWN_ARGUMENTS = ("data", "model")
"""Python arguments whose keys cannot be passed in a dictionary: they take data or a model. A
key of `data` is passed as `**{"data.x": 1}`, a key of `privacy` as `privacy={"epsilon": 8.0}`."""


@dataclass(frozen=True)
class Argument:
    """An argument named in the cure of an error, with an example value.

    A Python user reads `out="runs/a"`; a user of the command line reads `--out runs/a`.

    Attributes:
        name: name in Python, such as `keep_params`. `privacy.epsilon` is the key `epsilon` of the
            argument `privacy`; `recipe.seed` is the key `seed` of a recipe.
        value: example value; a word in capitals such as `SOURCE` stands for a value that the reader
            must choose. None: only the name is written.
    """

    name: str
    value: object = None

    def __str__(self) -> str:
        """Returns the argument as Python code, or as TOML if it is a key of a recipe.

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
    """Part of a cure that only the command line shows, such as `, then go on with --resume`.

    The sentence must be complete with and without it.
    """

    text: str

    def __str__(self) -> str:
        """Returns an empty string: a Python user does not see this part."""
        return ""


Words = str | Sequence[str | Argument | Shell]
"""A cure: a sentence, or parts of one, such as `("give ", Argument("out"))`."""


class FedpressError(Exception):
    """Base of all errors that a user can act on; the command line prints them and exits with 2.

    Attributes:
        problem: what is wrong, with the value that was found and the expected value.
        place: location of the problem: an argument, a key of a recipe, a field of a message, or a
            file. A function names its own argument. A caller that got the value from a user
            replaces this name by the key that the user wrote (see `renaming`).
        cure: what the user can do; following it must work.

    >>> error = FedpressError("got 0, expected a number above 0", place="clip_norm", cure="try 1.0")
    >>> str(error)
    'clip_norm: got 0, expected a number above 0; try 1.0'
    >>> error.place = f"recipe.stage[2].privacy.{error.place}"
    >>> str(error)
    'recipe.stage[2].privacy.clip_norm: got 0, expected a number above 0; try 1.0'
    """

    def __init__(self, problem: str, *, place: str | Path = "", cure: Words = "") -> None:
        # Pickle calls the class with `Exception.args` and then restores __dict__. With more than
        # `problem` in `args` this call would fail: `place` and `cure` are keyword arguments.
        super().__init__(problem)
        self.place = str(place)
        self.problem = problem
        self.cure = cure

    def __str__(self) -> str:
        """Returns the sentence `place: problem; cure`, with arguments as Python writes them."""
        return self.sentence()

    def sentence(
        self, write: Callable[[Argument | Shell], str] = str, *, place: str | None = None
    ) -> str:
        """Returns the sentence `place: problem; cure`.

        Args:
            write: function that writes an argument for the reader, such as a flag in a shell.
            place: name of the place for the reader; None: `self.place`.
        """
        at = self.place if place is None else place
        cure = "".join(part if isinstance(part, str) else write(part) for part in self._words())
        beginning = f"{at}: " if at else ""
        end = f"; {cure}" if cure else ""
        return f"{beginning}{self.problem}{end}"

    def change_arguments(self, change: Callable[[Argument], Argument]) -> None:
        """Replaces each argument in the cure, for example to rename it to a key of the recipe.

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
        """Appends text and arguments to the cure.

        >>> error = FedpressError("too few", cure="lower batch")
        >>> error.add_cure(", or give ", Argument("data", "SOURCE"))
        >>> str(error)
        'too few; lower batch, or give data=SOURCE'
        """
        self.cure = (*self._words(), *words)

    def _words(self) -> Sequence[str | Argument | Shell]:
        return [self.cure] if isinstance(self.cure, str) else self.cure


class RecipeError(FedpressError):
    """A recipe is wrong: unknown key, wrong type, value out of range, or settings in conflict."""


class SettingError(RecipeError, ValueError):
    """Error in a validator of a settings class; pydantic collects it as a ValueError.

    `place` and the arguments in the cure are keys of the settings class, such as `lr`. The code
    that reads the recipe adds the location of the table: `recipe.stage[2].lr`. Leave `place` empty
    in the validator of a field and in a check of all settings together: pydantic adds the location.
    """

    @classmethod
    def of(cls, error: FedpressError, *, place: str = "") -> SettingError:
        """Converts an error about the key `place` to one that pydantic collects."""
        return cls(error.problem, place=place, cure=error.cure)


class DataError(FedpressError):
    """Data is missing, corrupt, or too small for what was asked."""


class PublicDataError(DataError):
    """The public part of the data is empty or too small for the stage that uses it."""


class ModelError(FedpressError):
    """A model cannot be built, traced, pruned or rebuilt."""


class TrainingError(FedpressError):
    """Training cannot go on, for instance because the loss is not finite."""


class DivergedError(TrainingError):
    """Numbers became infinite or NaN, for example because the learning rate is too large."""


class PrivacyError(FedpressError):
    """No amount of noise gives the wanted epsilon, or the next step would exceed epsilon."""


class WireError(FedpressError):
    """A message is corrupt, of an unknown version, or does not fit what was agreed."""


class SecureError(FedpressError):
    """A secure sum cannot be unmasked: too many clients dropped out, or one broke the protocol."""


class ExportError(FedpressError):
    """A model cannot be exported, or an exported file cannot be run or differs from the model."""


class NetworkError(FedpressError):
    """The network between server and clients does not work, or one side refuses the other.

    Attributes:
        refused: True if a retry cannot succeed until someone changes the setup.
    """

    def __init__(
        self, problem: str, *, place: str | Path = "", cure: Words = "", refused: bool = False
    ) -> None:
        super().__init__(problem, place=place, cure=cure)
        self.refused = refused


class PolicyError(FedpressError):
    """A data owner's policy, or the owner's ledger of answers and privacy cost, cannot be used."""


class RunError(FedpressError):
    """A run folder is missing, belongs to another recipe, or cannot be written."""


@contextmanager
def renaming(keys: Mapping[str, str]) -> Iterator[None]:
    """Renames arguments in the place and cure of errors that are raised in the block.

    Args:
        keys: name of an argument or of its field (`noise.clip_norm`) -> name for the user.

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
    """Replaces the beginning of `place` if it is a name in `keys`; see `renaming`.

    Only whole names count. If several fit, the longest is replaced.

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
    """Prefixes the place of errors raised in the block with `place`, the file of the wrong key.

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
    """Prefixes the place of errors raised in the `with` block by `part.`: `bits` -> `part.bits`.

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


def first_line(error: BaseException) -> str:
    r"""Returns the first line of an error's text, or the error's type if it has no text.

    An assertion without a message has none, for instance.

    >>> first_line(ValueError("wrong shape.\nat line 3")), first_line(AssertionError())
    ('wrong shape', 'AssertionError')
    """
    lines = str(error).splitlines()
    return lines[0].rstrip(". ") if lines else type(error).__name__


def suggestion(word: str, known: Sequence[str], otherwise: str = "") -> str:
    """Returns `did you mean 'x'?` for the most similar of the `known` words, else `otherwise`.

    >>> suggestion("epsilom", ["epsilon", "delta"])
    "did you mean 'epsilon'?"
    >>> suggestion("epsilom", ["epsilon", "delta"], "give a budget")
    "did you mean 'epsilon'? If not, give a budget"
    >>> suggestion("x", ["epsilon", "delta"], "give a budget")
    'give a budget'
    """
    from difflib import get_close_matches  # imported here, because it is only used after a mistake

    # 0.6 is difflib's default: one or two wrong letters in a word of six are still found.
    near = get_close_matches(word, known, n=1, cutoff=0.6)
    if not near:
        return otherwise
    return f"did you mean '{near[0]}'?" + (f" If not, {otherwise}" if otherwise else "")


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """Returns `; did you mean 'x'?`, or "" if no known word is similar; see `suggestion`."""
    near = suggestion(word, known)
    return f"; {near}" if near else ""
