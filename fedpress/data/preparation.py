"""`Preparation`: how raw data become the inputs of a network; saved as `preparation.json`.

It lies beside every saved and exported model, and in the model's own file, too: in the spec of a
saved model, and in the metadata of an exported file. `fedpress.data.prepare` converts rows of a
table with it; `fedpress.data.raw_inputs` converts everything, such as texts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import JsonValue

from fedpress.core.examples import Preprocess
from fedpress.data.preparation_parts import PARTS, Part
from fedpress.errors import DataError, first_line

VERSION = 2
"""Newest version of the JSON. A reader refuses a newer one: it would prepare rows in another way.

Version 1 has columns alone, version 2 may have one of `PARTS`. The lowest version that can say it
is written, so that older readers can read what they know.
"""
FACTS = ("gaps", "decimal", "delimiter", "encoding", "class_names", "labels", "task")
KEYS = frozenset(
    ("version", "input", "columns", "mean", "std", "standardised_by_the_file", *FACTS, *PARTS)
)
"""All keys of the JSON; another key means a step that this version does not know."""
COLUMN_KEYS = frozenset({"name", "kind", "words", "unknown", "parts", "form", "fill"})
"""All keys of a column in the JSON."""
Kind = Literal["number", "truth", "words", "date"]
"""Kind of a column (see `InputColumn.kind`)."""
DATE_PARTS = {"days": 1, "month": 2, "weekday": 2, "hour": 2}
"""Part of a date -> number of its inputs (see `InputColumn.parts`)."""
Unknown = Literal["zeros", "other", "refused"]
"""What happens to a word that is not listed (see `InputColumn.unknown`)."""
TABLE = "table"
"""Kind of a preparation whose examples are rows of a table (see `Preparation.kind`)."""


@dataclass(frozen=True)
class InputColumn:
    """One column of the table, and the inputs that it becomes.

    Attributes:
        name: name of the column.
        kind: "number"; "truth" (true is 1, false is 0); "words" (one-hot, one input per word); or
            "date" (see `parts`).
        words: the words in the order of their inputs. They include "other" if unknown words have
            an input of their own.
        unknown: what happens to a word that is not listed. "zeros": all inputs are 0; "other": the
            input "other" is 1; "refused": an error.
        fill: value of each input for a missing cell, before standardisation. Empty: a missing cell
            is an error.
        parts: the parts of a date in the order of their inputs: "days" since 2000-01-01 is one
            input; "month", "weekday" and "hour" are two each, sine and cosine.
        form: how dates are written, such as "%d.%m.%Y"; None: ISO 8601.
    """

    name: str
    kind: Kind
    words: tuple[str, ...] = ()
    unknown: Unknown = "zeros"
    fill: tuple[float, ...] = ()
    parts: tuple[str, ...] = ()
    form: str | None = None

    @property
    def width(self) -> int:
        """Number of inputs that the column becomes."""
        if self.kind == "date":
            return sum(DATE_PARTS[part] for part in self.parts)
        return len(self.words) if self.kind == "words" else 1


@dataclass(frozen=True)
class Preparation:
    """The columns of a table in the order of their inputs, or another part; the standardisation.

    It is saved beside exported files. So everything in it either is in the recipe (the TOML file
    that describes the run) or comes from public rows.

    Attributes:
        columns: the columns, in the order of their inputs.
        gaps: texts that mean a missing cell, such as "NA". A cell that is not text is missing if it
            is None or NaN.
        decimal: decimal separator of numbers that are given as text.
        mean: mean of each input. `fedpress.data.prepare` subtracts it; the exported model does not.
        std: standard deviation of each input, by which `fedpress.data.prepare` divides.
        class_names: names of the classes, in the order of the network's outputs.
        delimiter: character between the columns of a CSV file.
        encoding: encoding of a CSV file; None: UTF-8.
        labels: names of the columns that the network predicts. New rows need not have them.
        task: kind and options of the task, as `Task.to_json` returns them.
        part: what is not said by columns: windows of rows, or texts, recordings or images, which
            have no columns. None: each row of a table is an example.
    """

    columns: tuple[InputColumn, ...]
    gaps: tuple[str, ...] = ()
    decimal: str = "."
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    class_names: tuple[str, ...] = ()
    delimiter: str = ","
    encoding: str | None = None
    labels: tuple[str, ...] = ()
    task: Mapping[str, JsonValue] = field(default_factory=dict)
    part: Part | None = None

    @property
    def kind(self) -> str:
        """What raw inputs are: "table", or a key of `PARTS`, such as "series"."""
        return TABLE if self.part is None else self.part.key

    @property
    def of_rows(self) -> bool:
        """Whether each row of a table is an example."""
        return self.part is None

    @property
    def width(self) -> int:
        """Number of inputs of a row; 0 without columns."""
        return sum(column.width for column in self.columns)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one example."""
        return (self.width,) if self.part is None else self.part.shape(self.width)

    @property
    def channels(self) -> int:
        """Number of means and standard deviations."""
        return self.width if self.part is None else self.part.channels(self.width)

    def with_standardisation(
        self,
        preprocess: Preprocess,
        class_names: Sequence[str],
        task: Mapping[str, JsonValue] | None = None,
    ) -> Preparation:
        """Returns the same columns with the standardisation, classes and task of a network."""
        mean, std = preprocess.mean or (0.0,), preprocess.std or (1.0,)
        # A single value applies to all inputs.
        if len(mean) == 1:
            mean, std = mean * self.channels, std * self.channels
        told = dict(task if task is not None else self.task)
        return replace(self, mean=mean, std=std, class_names=tuple(class_names), task=told)

    def to_json(self) -> dict[str, Any]:
        """Returns the preparation as plain JSON values, the content of `preparation.json`."""
        columns: list[dict[str, Any]] = []
        for column in self.columns:
            line: dict[str, Any] = {"name": column.name, "kind": column.kind}
            # Other kinds of columns have no words.
            if column.kind == "words":
                line |= {"words": list(column.words), "unknown": column.unknown}
            if column.kind == "date":
                line |= {"parts": list(column.parts), "form": column.form}
            columns.append(line | {"fill": list(column.fill) or None})
        steps, part = "the columns in order, gaps filled, then (x - mean) / std", {}
        if self.part is not None:
            steps, part = self.part.steps(), {self.part.key: self.part.to_json()}
        sizes = ", ".join(map(str, ("N", *self.shape)))
        return {
            "version": 1 if self.part is None else VERSION,
            "input": f"{'float32' if self.channels else 'int64'} [{sizes}]: {steps}",
            **part,
            "columns": columns,
            "gaps": list(self.gaps),
            "decimal": self.decimal,
            "delimiter": self.delimiter,
            "encoding": self.encoding,
            "mean": list(self.mean),
            "std": list(self.std),
            # Tells whoever reads the file that the exported network does not standardise.
            "standardised_by_the_file": False,
            "class_names": list(self.class_names),
            "labels": list(self.labels),
            "task": dict(self.task),
        }

    @classmethod
    def read(cls, path: str | Path) -> Preparation:
        """Reads `preparation.json`, which lies beside an exported or packed file.

        Older versions of fedpress called it `inputs.json`.

        Raises:
            DataError: if the file cannot be read, or its parts contradict each other.
        """
        try:
            content = json.loads(Path(path).read_text("utf-8"))
            newer = _newer(content, f"'{path}'")
            if newer is None:
                return cls._from_json(content)
        except OSError as error:
            raise DataError(
                f"cannot be read ({error.strerror})", place=f"'{path}'", cure="check the path"
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError, DataError) as error:
            raise DataError(
                f"corrupt ({first_line(error)})",
                place=f"'{path}'",
                cure="copy it again from the run folder",
            ) from error
        raise newer

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Preparation:
        """Reads the output of `to_json`, which may come from an untrusted sender.

        Raises:
            DataError: if parts are missing or contradict each other.
        """
        try:
            newer = _newer(content, "preparation")
            if newer is None:
                return cls._from_json(content)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"corrupt ({first_line(error)})",
                place="inputs",
                cure="use the same fedpress on both sides",
            ) from error
        raise newer

    @classmethod
    def _from_json(cls, content: Mapping[str, Any]) -> Preparation:
        mean = tuple(map(float, content["mean"]))
        std = tuple(map(float, content["std"]))
        parts = [PARTS[key].from_json(content[key]) for key in PARTS if key in content]
        if len(parts) > 1:
            raise ValueError(f"it has both {parts[0].key} and {parts[1].key}")
        found = cls(
            columns=tuple(_column(line) for line in content["columns"]),
            gaps=tuple(content["gaps"]),
            decimal=content["decimal"],
            mean=mean,
            std=std,
            class_names=tuple(content["class_names"]),
            # Files of fedpress 0.2.0 and older lack the following keys, and `version`.
            delimiter=content.get("delimiter", ","),
            encoding=content.get("encoding"),
            labels=tuple(content.get("labels", ())),
            task=dict(content.get("task", {})),
            part=parts[0] if parts else None,
        )
        # Raises if mean and std do not fit each other.
        Preprocess(mean, std)
        if len(mean) != found.channels:
            raise ValueError(f"{len(mean)} means for {found.channels} inputs")
        return found


def _newer(content: Mapping[str, Any], place: str) -> DataError | None:
    """Returns an error if the JSON is of another version, or has keys that this version lacks.

    A step that is left out would give other inputs, and so wrong predictions without an error.
    """
    cure = "install the fedpress that wrote it"
    version = content.get("version", 1)
    if version not in range(1, VERSION + 1):
        problem = f"version {version!r} of the preparation, this fedpress reads up to {VERSION}"
        return DataError(problem, place=place, cure=cure)
    unknown = sorted(set(content) - KEYS)
    for line in content["columns"]:
        unknown += sorted(set(line) - COLUMN_KEYS)
    for key in PARTS.keys() & content.keys():
        unknown += sorted(set(content[key]) - PARTS[key].keys)
    if unknown:
        problem = f"it has a step '{unknown[0]}' that this fedpress does not know"
        return DataError(problem, place=place, cure=cure)
    return None


def _column(line: Mapping[str, Any]) -> InputColumn:
    unknown = line.get("unknown", "zeros")
    if line["kind"] not in get_args(Kind) or unknown not in get_args(Unknown):
        raise ValueError(
            f"column {line['name']!r} is of the kind {line['kind']!r}, unknown words {unknown!r}"
        )
    fill = tuple(map(float, line["fill"] or ()))
    found = InputColumn(
        line["name"],
        line["kind"],
        tuple(line.get("words", ())),
        unknown,
        fill,
        parts=tuple(line.get("parts", ())),
        form=line.get("form"),
    )
    if not DATE_PARTS.keys() >= {*found.parts} or (found.kind == "date") != bool(found.parts):
        raise ValueError(f"column {found.name!r} has the parts {list(found.parts)}")
    # Checked here, because numpy would use a single value for all inputs.
    if fill and len(fill) != found.width:
        raise ValueError(
            f"column {found.name!r} has {len(fill)} values to fill {found.width} inputs"
        )
    if unknown == "other" and "other" not in found.words:
        raise ValueError(f"column {found.name!r} has no word 'other' for unlisted words")
    return found
