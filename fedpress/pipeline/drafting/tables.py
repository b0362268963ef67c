"""Drafts a recipe for a table: label, client, task, and windows if its rows are a series."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from fedpress.data.column_facts import ColumnFacts
from fedpress.data.column_types import WORDS
from fedpress.data.describe import MOST_CLASSES, TableFacts
from fedpress.data.describe_series import SeriesFacts
from fedpress.errors import Argument, DataError, RecipeError
from fedpress.pipeline.drafting.base import Draft, name_of, relative
from fedpress.pipeline.drafting.series import series_lines
from fedpress.tasks import Forecast, Survival

# Windows of several columns need smaller steps at first.
ADAM = 'optimizer = "adam"\nlr = 0.002\n'
TABLE = """name = {name}
description = {description}

[data]
source = {source}
path = {path}{reading}
{clients}
label_column = {label}  # what is predicted
{task}{types}{drop}{missing}{series}
[model]
architecture = "mlp"  # its sizes follow from the data

[[stage]]
kind = "train"  # on the public rows alone
epochs = 10
batch_size = 32
{optimizer}
[[stage]]
kind = "federate"  # on the private rows, which stay with their clients
num_rounds = 10
{optimizer_of_clients}batch_size = 32
# privacy = {{ unit = "sample", epsilon = 8.0, delta = 1e-4 }}  # noise that hides each row

[[stage]]
kind = "export"  # artifacts/model.onnx, which takes raw rows by fedpress predict
"""


def of_table(
    facts: TableFacts, label: str | None, client: str | None, task: str | None, folder: Path
) -> Draft:
    """Drafts a recipe for a table; for the arguments see `fedpress.pipeline.drafting.draft`.

    Raises:
        DataError: if no column can be predicted, or there is no such column.
    """
    path = Path(facts.path)
    if label is None and not facts.labels:
        raise DataError(
            "it has no column that could be predicted",
            place=f"'{path}'",
            cure="name one with --label COLUMN",
        )
    targets = _targets(facts, label if label is not None else facts.labels[0])
    names = [target.name for target in targets]
    called = ", ".join(names)
    owner = client if client is not None else _owner(facts, names)
    if owner:
        facts.column(owner)  # raises an error if there is none of this name
    task = task or _task_for(targets, facts)
    _refuse_one_label(task, names)
    series = _series(facts, task)
    roles = {*names, owner}
    used = roles | _placed(series)
    left_out = _left_out(facts, used)
    nobody = "none; all rows are one client's" if series else "none; rows are dealt to 10 clients"
    chosen = [f"label: {called}", f"client: {owner or nobody}", f"task: {task}"]
    chosen += _told_of_rows(facts, series) + _told_of_columns(facts, left_out, used)
    gaps = [c.name for c in facts.columns if c.missing and c not in left_out]
    text = TABLE.format(
        name=json.dumps(name_of(path.stem)),
        description=json.dumps(f"predicts {called} from {path.name}"),
        source=json.dumps(facts.source),
        path=json.dumps(relative(path, folder)),
        reading=_reading(facts),
        clients=_client_lines(owner, series is not None),
        label=json.dumps(names if len(names) > 1 else names[0], ensure_ascii=False),
        task=_task_lines(task, targets[0]),
        types=_types_line(facts, left_out, roles),
        drop=_drop_line(left_out),
        missing=_missing_line(targets, gaps, series is not None),
        **_training(series, owner),
    )
    return Draft(text, {}, tuple(chosen))


def _targets(facts: TableFacts, label: str) -> list[ColumnFacts]:
    """Returns the label columns: one, or several with commas between their names."""
    if any(column.name == label for column in facts.columns):
        return [facts.column(label)]
    return [facts.column(name.strip()) for name in label.split(",")]


def _refuse_one_label(task: str, names: Sequence[str]) -> None:
    """Raises a RecipeError if a survival has not two labels."""
    if task == Survival.kind and len(names) != 2:
        raise RecipeError(
            f"the task survival needs a time and an event, got {', '.join(names)}",
            place="label",
            cure="name both, the time first, such as --label months,died",
        )


def _owner(facts: TableFacts, labels: Sequence[str]) -> str:
    """Returns the column that most likely names the client; "" if there is none."""
    # A column that tells series apart is the client: windows cannot be dealt.
    by = (facts.series.by,) if facts.series is not None and facts.series.by else ()
    return next((name for name in (*by, *facts.clients) if name not in labels), "")


def _series(facts: TableFacts, task: str) -> SeriesFacts | None:
    """Returns how the rows of a forecast follow each other; None for another task.

    Raises:
        DataError: if a forecast is asked for, and they do not.
    """
    if task != Forecast.kind:
        return None
    if facts.series is None:
        raise DataError(
            "its rows are no series at regular times, so there is nothing to forecast",
            place=f"'{facts.path}'",
            cure=("give another ", Argument("task"), ", or columns of dates and of stations"),
        )
    return facts.series


def _placed(series: SeriesFacts | None) -> set[str]:
    """Returns the columns that only say where a row stands in a series."""
    return set() if series is None else {*series.order, series.by}


def _training(series: SeriesFacts | None, owner: str) -> dict[str, str]:
    """Returns the table of the series, and the optimizers of the stages."""
    if series is None:
        return {"series": "", "optimizer": "", "optimizer_of_clients": "lr = 0.1\n"}
    lines = series_lines(series, owner)
    return {"series": lines, "optimizer": ADAM, "optimizer_of_clients": ADAM}


def _told_of_rows(facts: TableFacts, series: SeriesFacts | None) -> list[str]:
    """Returns sentences about the table in a database, and the order of a series."""
    told = []
    if facts.other_tables:
        others = ", ".join(facts.other_tables)
        told.append(f"table: {facts.table}, the largest; the others are {others}")
    if series is not None:
        told.append(f"series: rows in the order of {', '.join(series.order)}")
    return told


def _told_of_columns(
    facts: TableFacts, left_out: Sequence[ColumnFacts], used: set[str]
) -> list[str]:
    """Returns a sentence for each column that is left out, and one about dates."""
    told = [f"left out: {column.name} ({column.type})" for column in left_out]
    inputs = [c for c in facts.columns if c.name not in used and c not in left_out]
    dates = [c.name for c in inputs if c.type == "date"]
    if dates:
        told.append(f"learned from: {', '.join(dates)} (date); drop_columns leaves dates out")
    return told


def _task_for(targets: Sequence[ColumnFacts], facts: TableFacts) -> str:
    """Returns the task that the label columns suggest; numbers of a series are forecast."""
    if len(targets) > 1:
        flags = all(target.type == "number" and target.distinct == 2 for target in targets)
        return "multilabel" if flags else "regression"
    target = targets[0]
    if target.type == "number" and target.distinct > MOST_CLASSES:
        return "regression" if facts.series is None else Forecast.kind
    return "classification"


def _left_out(facts: TableFacts, used: set[str]) -> list[ColumnFacts]:
    """Returns the columns that are no features, such as free text and numbers of rows."""
    others = [column for column in facts.columns if column.name not in used]
    return [column for column in others if not _is_feature(column)]


def _is_feature(column: ColumnFacts) -> bool:
    # Codes with few words are features; if there are many, each row has another one.
    codes = column.type == "integer id" and bool(column.words) and bool(column.declare)
    return column.type in ("number", "word", "date") or codes


def _reading(facts: TableFacts) -> str:
    lines = f"\ntable = {json.dumps(facts.table)}" if facts.table else ""
    if facts.encoding:
        lines += f"\nencoding = {json.dumps(facts.encoding)}"
    if facts.delimiter != ",":
        lines += f"\ndelimiter = {json.dumps(facts.delimiter)}"
    if facts.decimal != ".":
        lines += f"\ndecimal = {json.dumps(facts.decimal)}"
    return lines


def _client_lines(owner: str, series: bool) -> str:
    share = "public_share = 0.2  # the first rows" if series else "public_share = 0.1  # some rows"
    public = f"{share} of each client; words and means are of these"
    if owner:
        return f"client_column = {json.dumps(owner)}  # whose a row is\n{public}"
    if series:
        return f"num_clients = 1  # neighbouring windows share rows and cannot be dealt\n{public}"
    return f"num_clients = 10  # no column names the clients: rows are dealt\n{public}"


def _task_lines(task: str, target: ColumnFacts) -> str:
    line = f"task = {json.dumps(task)}\n"
    if task == "classification" and target.type == "word":
        names = sorted(word for word, _ in target.words)
        # All rows were looked at, also private ones, so the user decides what is published.
        line += "# The classes are published with the model: all names must be no secret.\n"
        line += f"classes = {json.dumps(names, ensure_ascii=False)}\n"
    elif task == "classification":
        line += "# Declares that the list of classes is no secret.\n"
        line += f"public_words = [{json.dumps(target.name)}]\n"
    return line


def _types_line(facts: TableFacts, left_out: Sequence[ColumnFacts], roles: set[str]) -> str:
    """Returns the line that says how columns are understood.

    Args:
        facts: the table.
        left_out: columns that are no features.
        roles: names of the label column and the client column.
    """
    told = {}
    for column in facts.columns:
        # Labels and clients may be codes, but no dates.
        fits = column.name not in roles or column.declare in WORDS
        if column.declare and column not in left_out and fits:
            told[column.name] = column.declare
    if not told:
        return ""
    pairs = ", ".join(f"{json.dumps(name)} = {json.dumps(given)}" for name, given in told.items())
    return f"types = {{ {pairs} }}  # how columns are understood\n"


def _drop_line(columns: Sequence[ColumnFacts]) -> str:
    if not columns:
        return ""
    why = ", ".join(sorted({column.type for column in columns}))
    names = json.dumps([column.name for column in columns], ensure_ascii=False)
    return f"drop_columns = {names}  # {why}\n"


def _missing_line(targets: Sequence[ColumnFacts], gaps: Sequence[str], series: bool) -> str:
    if series and gaps:
        return 'missing = "mean"  # fills a missing cell; windows without a target are left out\n'
    if any(target.missing for target in targets):
        return 'missing = "drop"  # leaves out rows without a value\n'
    if gaps:
        return 'missing = "mean"  # fills a missing cell with the public mean\n'
    return ""
