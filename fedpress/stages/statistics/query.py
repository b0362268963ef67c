"""The query of a statistics stage: which sums are asked, and what follows from the noised answer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from pydantic import JsonValue
from torch import Tensor

from fedpress.data.preparation import InputColumn, Preparation
from fedpress.data.statistics import chosen
from fedpress.errors import RecipeError, suggestion
from fedpress.federation import trust_of
from fedpress.models.column_sums import ColumnSums, Number
from fedpress.stages.statistics.settings import StatisticsSettings

QUARTILES = (0.25, 0.5, 0.75)
LEAST = 1e-6
"""Shares of rows below this one count as this one, so that nothing is divided by 0."""
NORMAL = 1.349
"""Distance of the quartiles of a normal distribution with standard deviation 1."""


@dataclass
class Answer:
    """What a query found.

    Attributes:
        preparation: how rows become inputs, with the statistics.
        columns: column of numbers -> its statistics, and the standard error that the noise gives
            its mean (or median).
        words: column -> the words that keep inputs.
        weak: columns whose mean the noise moves by more than their standard deviation.
        hidden: columns whose standard deviation the noise hides: the one given is an upper bound.
        chosen_by_noise: column of words, or "vocabulary" -> (how many of its words the noise alone
            may have chosen, how many there are).
    """

    preparation: Preparation
    columns: dict[str, JsonValue] = field(default_factory=dict)
    words: dict[str, JsonValue] = field(default_factory=dict)
    weak: list[str] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)
    chosen_by_noise: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def warning(self) -> str:
        """A sentence about columns that the query could not measure; "" if there are none."""
        said = []
        for name, (lost, count) in self.chosen_by_noise.items():
            said.append(
                f"the noise alone may have chosen {lost} of the {count} words of '{name}', so give "
                "fewer words or a larger epsilon"
            )
        if self.weak:
            said.append(weak_columns(self.weak))
        if rest := [name for name in self.hidden if name not in self.weak]:
            said.append(f"the noise hides the standard deviation of {_listed(rest)}, {ADVICE}")
        return "; ".join(said)


@dataclass(frozen=True)
class Query:
    """The sums that a statistics stage asks for.

    Attributes:
        settings: the settings of the stage.
        about: the columns of the data, without statistics.
    """

    settings: StatisticsSettings
    about: Preparation

    def __post_init__(self) -> None:
        self._check_names()
        self._check_dates()
        self._check_bounds()
        if not any(True for _ in self._asked()):
            raise RecipeError(
                "the data have no column of numbers, no column whose words are counted, and no "
                "missing cells to fill",
                place="bounds",
                cure='leave this stage out, and set data.statistics = "public"',
            )

    @property
    def gaps(self) -> bool:
        """Whether missing cells are to be filled."""
        return any(column.fill for column in self.about.columns)

    @property
    def arguments(self) -> dict[str, JsonValue]:
        """The arguments of the network that makes the sums, see `ColumnSums`."""
        numbers: list[JsonValue] = []
        flags: list[JsonValue] = []
        for at, column in self._asked():
            if column.kind == "number":
                low, high = self.settings.bounds[column.name]
                numbers.append([at, low, high, self.settings.bins])
            else:
                flags.append([at, column.width])
        private = self.settings.privacy
        # Where the sums are divided by the number of all clients, some may not have answered.
        counted = trust_of(private.unit, private.trust).fixed_divisor
        return {"numbers": numbers, "flags": flags, "gaps": self.gaps, "counted": counted}

    def answer(self, network: ColumnSums, means: Tensor, std: float) -> Answer:
        """Computes the statistics from the noised means of all sums.

        Everything here is computed from noised numbers and the recipe, so it costs no privacy.

        Args:
            network: the network that makes the sums.
            means: noised mean of each sum over the rows (or over the clients' means) [width].
            std: standard deviation of the noise on each of them.
        """
        found = Answer(self.about)
        means = means.double()
        if network.counted:
            share = max(float(means[0]), std, LEAST)
            means, std = means[1:] / share, std / share
        parts = means.split([network.width_of(column) for column in network.columns])
        answers = {
            column.at: (column, part.tolist())
            for column, part in zip(network.columns, parts, strict=True)
        }
        columns, mean, scale, at = [], [], [], 0
        for column in self.about.columns:
            asked = answers.get(at)
            at += column.width
            if asked is None:
                columns.append(column)
                mean += [0.0] * column.width
                scale += [1.0] * column.width
            elif isinstance(asked[0], Number):
                center, spread = self._of_numbers(column.name, asked[0], asked[1], std, found)
                columns.append(replace(column, fill=(center,) if column.fill else ()))
                mean.append(center)
                scale.append(spread)
            else:
                kept = self._of_words(column, asked[1], std, found)
                columns.append(kept)
                # Inputs of 0 and 1 have a fit scale as they are.
                mean += [0.0] * kept.width
                scale += [1.0] * kept.width
        found.preparation = replace(
            self.about, columns=tuple(columns), mean=tuple(mean), std=tuple(scale)
        )
        found.words = {
            column.name: list(column.words)
            for column in columns
            if column.name in self.settings.words
        }
        return found

    def planned(self, network: ColumnSums, std: float) -> dict[str, str]:
        """Returns what the noise does to the answer, in words; with a warning if it is too much."""
        errors = self.errors(network, std)
        means = ", ".join(f"{name} {error:.3g}" for name, error in errors.items())
        # No spread between two bounds is larger than half their distance.
        hopeless = [name for name, error in errors.items() if error > self._half(name)]
        found = {"error_of_means": means}
        return found | ({"warning": weak_columns(hopeless)} if hopeless else {})

    def errors(self, network: ColumnSums, std: float) -> dict[str, float]:
        """Returns what the noise adds to the mean of each column of numbers, if no cell is missing.

        It is the standard deviation of the noise, in the column's own unit. With quantiles it is
        that of a column whose values are spread evenly between the bounds.
        """
        names = [column.name for _, column in self._asked() if column.kind == "number"]
        numbers = [column for column in network.columns if isinstance(column, Number)]
        return {
            name: std * one.half * (2 * math.sqrt(one.levels) if one.bins else 1)
            for name, one in zip(names, numbers, strict=True)
        }

    def _half(self, name: str) -> float:
        low, high = self.settings.bounds[name]
        return (high - low) / 2

    def _asked(self) -> Iterator[tuple[int, InputColumn]]:
        """Yields the columns of which sums are asked, numbers first, with their first input."""
        placed = []
        at = 0
        for column in self.about.columns:
            placed.append((at, column))
            at += column.width
        yield from ((at, column) for at, column in placed if column.kind == "number")
        for at, column in placed:
            counted = column.kind in ("words", "truth")
            if counted and (column.fill or column.name in self.settings.words):
                yield at, column

    def _of_numbers(
        self, name: str, asked: Number, sums: list[float], std: float, found: Answer
    ) -> tuple[float, float]:
        """Returns the center and the spread of a column of numbers, and notes them in `found`."""
        share, sums, error = self._of_present(sums, std)
        sums = [one / share for one in sums]
        if asked.bins:
            low, median, high = (quantile(q, sums, asked) for q in QUARTILES)
            one_bin = 2 * asked.half / asked.bins
            # Below a bin nothing is known of the spread.
            spread = max((high - low) / NORMAL, one_bin)
            # The noise moves the share below the median by about this much; a normal density
            # there turns shares into values.
            moved = error * math.sqrt(asked.levels) * math.sqrt(2 * math.pi) * spread
            told: dict[str, JsonValue] = {"median": median, "quartiles": [low, high]}
            told["error"] = moved
            center, weak = median, moved > spread
        else:
            u = min(max(sums[0], -1.0), 1.0)
            variance = (sums[1] + 1) / 2 - u**2
            # A variance below its own noise says only that it is not much larger than that.
            least = error * math.sqrt(0.25 + 4 * u**2)
            center = asked.center + asked.half * u
            spread = asked.half * math.sqrt(min(max(variance, least), 1.0))
            # Also if the variance is as large as its noise allows.
            weak = error**2 > variance + 2 * least
            if variance < least:
                found.hidden.append(name)
            told = {"mean": center, "std": spread, "error": asked.half * error}
        found.columns[name] = told
        if weak:
            found.weak.append(name)
        return center, spread

    def _of_words(
        self, column: InputColumn, sums: list[float], std: float, found: Answer
    ) -> InputColumn:
        """Returns the column with its most frequent words, and the share of each as its fill."""
        share, counts, _ = self._of_present(sums, std)
        if column.kind != "words":
            return replace(column, fill=(min(max(counts[0] / share, 0.0), 1.0),))
        by_word = dict(zip(column.words, counts, strict=True))
        kept = column.words
        if column.name in self.settings.words:
            rest = chosen(column, ())
            ranked = sorted(set(column.words) - {*rest}, key=lambda word: -by_word[word])
            best = ranked[: self.settings.words[column.name]]
            lost = sum(by_word[word] < largest_noise(std, len(ranked)) for word in best)
            if lost:
                found.chosen_by_noise[column.name] = (lost, len(best))
            kept = chosen(column, tuple(best))
        fill = tuple(min(max(by_word[word] / share, 0.0), 1.0) for word in kept)
        return replace(column, words=kept, fill=fill if column.fill else ())

    def _of_present(self, sums: list[float], std: float) -> tuple[float, list[float], float]:
        """Splits off the share of rows with a value.

        Returns:
            The share, the other sums, and the standard deviation of the noise on a mean over these
            rows.
        """
        if not self.gaps:
            return 1.0, sums, std
        # A share below its own noise would make every mean huge.
        share = max(sums[0], std, LEAST)
        return share, sums[1:], std / share

    def _check_names(self) -> None:
        """Refuses columns that the data lack, or that are of the wrong kind."""
        kinds = {column.name: column for column in self.about.columns}
        for key, names, kind in (
            ("bounds", self.settings.bounds, "number"),
            ("words", self.settings.words, "words"),
        ):
            for name in names:
                place = f"{key}.{name}"
                column = kinds.get(name)
                if column is None:
                    raise RecipeError(
                        "the data have no feature column of this name",
                        place=place,
                        cure=suggestion(name, list(kinds), "leave it out"),
                    )
                if column.kind != kind:
                    other = f"name it in {'words' if column.kind == 'words' else 'bounds'}"
                    raise RecipeError(
                        f"this column holds {_plural(column.kind)}, not {_plural(kind)}",
                        place=place,
                        cure=f"leave it out of {key}"
                        + ("" if column.kind == "truth" else f"; {other}"),
                    )
        for name in self.settings.words:
            if kinds[name].unknown == "refused":
                raise RecipeError(
                    'with data.unknown = "drop" a row with a rare word would be left out, after '
                    "the noise was planned for it",
                    place=f"words.{name}",
                    cure='set data.unknown = "other", or leave it out of words',
                )

    def _check_dates(self) -> None:
        """Refuses dates that need a mean: the days that have passed, or a filled cell."""
        for column in self.about.columns:
            if column.kind == "date" and (column.fill or "days" in column.parts):
                raise RecipeError(
                    f"'{column.name}' is a date, of which no private mean can be asked",
                    place="bounds",
                    cure="name it in data.drop_columns",
                )

    def _check_bounds(self) -> None:
        """Refuses columns of numbers without bounds."""
        lacking = [
            column.name
            for column in self.about.columns
            if column.kind == "number" and column.name not in self.settings.bounds
        ]
        if lacking:
            raise RecipeError(
                f"{_listed(lacking)} have no bounds, and bounds from private rows would tell about them",
                place="bounds",
                cure=f"give what is known without the rows, such as {{ {_key(lacking[0])} = "
                "[0, 100] }, or name the column in data.drop_columns",
            )


def quantile(q: float, counts: Sequence[float], column: Number) -> float:
    """Returns a quantile of a column from the noised counts of a tree of bins.

    In each node the share of the left half decides which half holds the quantile. In the last bin
    values count as spread evenly.

    Args:
        q: share of the rows below the quantile.
        counts: counts of the nodes, level by level, as `Number.terms` orders them.
        column: bounds and bins.

    >>> column = Number(0, 0.0, 8.0, bins=4)
    >>> quantile(0.5, [0.5, 0.5, 0.0, 0.5, 0.5, 0.0], column)
    4.0
    """
    node, first = 0, 0
    for level in range(1, column.levels + 1):
        left, right = (max(counts[first + 2 * node + side], 0.0) for side in (0, 1))
        # Without rows in either half the quantile may be anywhere.
        share = left / (left + right) if left + right > 0 else 0.5
        first += 2**level
        if q <= share and share > 0:
            node, q = 2 * node, q / share
        else:
            node, q = 2 * node + 1, (q - share) / (1 - share)
    return column.low + (node + q) * 2 * column.half / column.bins


def largest_noise(std: float, count: int) -> float:
    """Returns how large the largest of so many draws of the noise is about.

    It is sqrt(2 log n) standard deviations (Donoho and Johnstone 1994). A count below it may be
    that of a word that nobody has.
    """
    return std * math.sqrt(2 * math.log(max(count, 2)))


ADVICE = "so give closer bounds, fewer columns or a larger epsilon"


def weak_columns(names: list[str]) -> str:
    """Returns the warning about columns whose mean is mostly noise."""
    return (
        f"the noise moves the mean of {_listed(names)} by more than the column's standard "
        f"deviation, {ADVICE}"
    )


def _listed(names: Sequence[str]) -> str:
    listed = ", ".join(f"'{name}'" for name in names[:8])
    return listed + (f" and {len(names) - 8} more" if len(names) > 8 else "")


PLURALS = {"number": "numbers", "words": "words", "truth": "true and false", "date": "dates"}


def _plural(kind: str) -> str:
    return PLURALS[kind]


def _key(name: str) -> str:
    """Returns a column's name as a key of TOML."""
    plain = name.isascii() and name.replace("_", "").replace("-", "").isalnum()
    return name if plain else f'"{name}"'
