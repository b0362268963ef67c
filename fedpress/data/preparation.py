"""How the rows of a table become the inputs of a network: what a device needs beside the file that it runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from fedpress.core.examples import Preprocess
from fedpress.errors import DataError

Kind = Literal["number", "truth", "words"]
Unknown = Literal["zeros", "other", "refused"]
Missing = Literal["error", "drop", "mean"]


@dataclass(frozen=True)
class InputColumn:
    """One raw column, and the inputs that it becomes.

    Attributes:
        name: of the column.
        kind: "number"; "truth", whose true and false are 1 and 0; or "words", of which each has an input of its own
            that is 1 for this word and else 0.
        words: the words in the order of their inputs, with "other" among them if unknown words have an input.
        unknown: what a word that is not listed is: zeros in all inputs, the word "other", or refused.
        fill: of each input, the value that fills a gap, before standardisation; empty where gaps are refused.
    """

    name: str
    kind: Kind
    words: tuple[str, ...] = ()
    unknown: Unknown = "zeros"
    fill: tuple[float, ...] = ()

    @property
    def width(self) -> int:
        """How many inputs it becomes."""
        return len(self.words) if self.kind == "words" else 1


@dataclass(frozen=True)
class Preparation:
    """The raw columns in the order of their inputs, and the standardisation that follows.

    It holds what was declared or learned from public rows, and nothing else.

    Attributes:
        columns: in the order of the inputs.
        gaps: the texts that mean "no value"; an empty cell of another kind is None or NaN.
        decimal: what stands before the decimals of numbers that are given as text.
        mean: of each input. A network's file does not apply it: `fedpress.data.prepare` does.
        std: likewise.
        class_names: in the order of the network's outputs.
    """

    columns: tuple[InputColumn, ...]
    gaps: tuple[str, ...] = ()
    decimal: str = "."
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    class_names: tuple[str, ...] = ()

    @property
    def width(self) -> int:
        """How many inputs there are."""
        return sum(column.width for column in self.columns)

    def with_standardisation(
        self, preprocess: Preprocess, class_names: Sequence[str]
    ) -> Preparation:
        """Returns the same columns with the standardisation and the classes of a network."""
        mean, std = preprocess.mean or (0.0,), preprocess.std or (1.0,)
        if len(mean) == 1:  # one value for all inputs
            mean, std = mean * self.width, std * self.width
        return replace(self, mean=mean, std=std, class_names=tuple(class_names))

    def to_json(self) -> dict[str, Any]:
        """Returns plain JSON values, the content of `inputs.json`."""
        columns: list[dict[str, Any]] = []
        for column in self.columns:
            line: dict[str, Any] = {"name": column.name, "kind": column.kind}
            if column.kind == "words":
                line |= {"words": list(column.words), "unknown": column.unknown}
            columns.append(line | {"fill": list(column.fill) or None})
        return {
            "input": f"float32 [N, {self.width}]: the columns in order, gaps filled, then (x - mean) / std",
            "columns": columns,
            "gaps": list(self.gaps),
            "decimal": self.decimal,
            "mean": list(self.mean),
            "std": list(self.std),
            "standardised_by_the_file": False,
            "class_names": list(self.class_names),
        }

    @classmethod
    def read(cls, path: str | Path) -> Preparation:
        """Reads the file `inputs.json` that lies beside an exported or packed file.

        Raises:
            DataError: if it cannot be read, or does not fit together.
        """
        try:
            return cls._of(json.loads(Path(path).read_text("utf-8")))
        except OSError as error:
            raise DataError(
                f"cannot be read ({error.strerror})", place=f"'{path}'", cure="check the path"
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"corrupt ({error})", place=f"'{path}'", cure="copy it again from the run folder"
            ) from error

    @classmethod
    def _of(cls, page: Mapping[str, Any]) -> Preparation:
        columns = tuple(_column(line) for line in page["columns"])
        mean, std = tuple(map(float, page["mean"])), tuple(map(float, page["std"]))
        found = cls(
            columns, tuple(page["gaps"]), page["decimal"], mean, std, tuple(page["class_names"])
        )
        Preprocess(mean, std)
        if len(mean) != found.width:
            raise ValueError(f"{len(mean)} means for {found.width} inputs")
        return found


def _column(line: Mapping[str, Any]) -> InputColumn:
    unknown = line.get("unknown", "zeros")
    if line["kind"] not in get_args(Kind) or unknown not in get_args(Unknown):
        raise ValueError(
            f"column {line['name']!r} is of the kind {line['kind']!r}, unknown words {unknown!r}"
        )
    fill = tuple(map(float, line["fill"] or ()))
    found = InputColumn(line["name"], line["kind"], tuple(line.get("words", ())), unknown, fill)
    if fill and len(fill) != found.width:
        raise ValueError(
            f"column {found.name!r} has {len(fill)} values to fill {found.width} inputs"
        )
    if unknown == "other" and "other" not in found.words:
        raise ValueError(f"column {found.name!r} has no word 'other' for those that are not listed")
    return found
