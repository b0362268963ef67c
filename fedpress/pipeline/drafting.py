"""Writes a first recipe for a user's file, folder of images or function: `fedpress init`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedpress.core import consent
from fedpress.data.column_facts import ColumnFacts
from fedpress.data.column_types import WORDS
from fedpress.data.describe import MOST_CLASSES, TableFacts, describe_file
from fedpress.errors import Argument, DataError, RecipeError
from fedpress.tasks import TASKS

# A table of at most this many rows is small.
FEW_ROWS = 2000
TABLE = """name = {name}
description = {description}

[data]
source = {source}
path = {path}{reading}
{clients}
label_column = {label}  # what is predicted
{task}{types}{drop}{missing}
[model]
architecture = "mlp"  # its sizes follow from the data

[[stage]]
kind = "train"  # on the public rows alone
epochs = 10
batch_size = 32

[[stage]]
kind = "federate"  # on the private rows, which stay with their clients
num_rounds = 10
lr = 0.1
batch_size = 32
# privacy = {{ unit = "sample", epsilon = 8.0, delta = 1e-4 }}  # noise that hides each row

[[stage]]
kind = "export"  # artifacts/model.onnx, which takes raw rows by fedpress predict
"""

IMAGES = """name = {name}
description = {description}

[data]
source = "folders"  # {path}/CLIENT/LABEL/image.png
path = {path}
public_share = 0.1  # of each client's images, for training before the federation
image_size = {size}  # all images are resized to squares of this side

[model]
architecture = "cnn"  # its sizes follow from the data

[[stage]]
kind = "train"
epochs = 5
batch_size = 32

[[stage]]
kind = "federate"
num_rounds = 5
lr = 0.05

[[stage]]
kind = "export"
"""

FUNCTION = """name = {name}
description = {description}

[data]
source = {source}  # a function in {file}, beside this recipe
public_share = 0.1  # of each client's rows, for training before the federation

[model]
architecture = "mlp"  # its sizes follow from the data

[[stage]]
kind = "train"
epochs = 10
batch_size = 32

[[stage]]
kind = "federate"
num_rounds = 10
lr = 0.1
batch_size = 32

[[stage]]
kind = "export"
"""

STUB = '''"""Reads your data for fedpress."""

import numpy as np


def {function}(path=None, seed=0):
    """Returns the examples of each client: {{name: (x, y)}}.

    x: float32 numbers [n, ...], or uint8 images [n, channels, height, width].
    y: class numbers from 0 up [n], or words [n]; floats [n] for a regression.
    All clients have the same shapes and types, and no NaN. `path` is data.path of the recipe.
    """
    clients = {{}}
    # Replace these made-up numbers by your own.
    for number in range(5):
        chance = np.random.default_rng((seed, number))
        x = chance.normal(size=(100, 6)).astype(np.float32)
        y = np.where(x[:, 0] + x[:, 1] > 0, "high", "low")
        clients[f"client {{number}}"] = (x, y)
    return clients
'''

TEST = '''"""Checks that the data are as fedpress expects them."""

import numpy as np
from {module} import {function}


def test_every_client_has_examples_of_one_shape_and_a_target_for_each():
    clients = {function}()
    assert clients
    shapes = set()
    for x, y in clients.values():
        x, y = np.asarray(x), np.asarray(y)
        assert len(x) == len(y) > 0
        assert x.dtype == np.uint8 or np.isfinite(x).all()
        shapes.add((x.shape[1:], x.dtype, y.shape[1:]))
    assert len(shapes) == 1


def test_the_same_seed_gives_the_same_examples():
    first, second = {function}(seed=3), {function}(seed=3)
    assert all(np.array_equal(first[name][0], second[name][0]) for name in first)
'''


@dataclass(frozen=True)
class Draft:
    """A recipe that was drafted.

    Attributes:
        text: the recipe as TOML.
        files: name of each further file -> its content; they lie beside the recipe.
        chosen: one sentence for each choice that was made for the user.
    """

    text: str
    files: dict[str, str]
    chosen: tuple[str, ...]


def draft(
    data: str,
    *,
    label: str | None = None,
    client: str | None = None,
    task: str | None = None,
    folder: Path,
) -> Draft:
    """Drafts a recipe.

    Args:
        data: a table's file (.csv, .parquet, .arrow), a folder `client/label/image.png`, or
            `module:function`, for which a stub and a test are drafted.
        label: column to predict; None: the most likely one.
        client: column that names the client of a row, "" for none; None: the most likely one.
        task: what is learned; None: it follows from the label.
        folder: folder of the recipe, to which its paths are relative.

    Raises:
        DataError: if the data cannot be read, or have no such column.
        RecipeError: if there is no such task.
    """
    if task is not None and task not in TASKS:
        raise RecipeError(f"no task '{task}'", place="task", cure=f"give one of {', '.join(TASKS)}")
    path = Path(data)
    if ":" in data and not path.exists():
        return _of_function(data)
    if path.is_dir():
        return _of_images(path, folder)
    return _of_table(describe_file(path), label, client, task, folder)


def _of_table(
    facts: TableFacts, label: str | None, client: str | None, task: str | None, folder: Path
) -> Draft:
    path = Path(facts.path)
    if label is None and not facts.labels:
        raise DataError(
            "it has no column that could be predicted",
            place=f"'{path}'",
            cure=("name one with ", Argument("label", "COLUMN")),
        )
    target = facts.column(label if label is not None else facts.labels[0])
    owner = client
    if owner is None:
        owner = next((name for name in facts.clients if name != target.name), "")
    if owner:
        facts.column(owner)  # raises an error if there is none of this name
    chosen = [f"label: {target.name}", f"client: {owner or 'none; rows are dealt to 10 clients'}"]
    task = task or _task_for(target)
    chosen.append(f"task: {task}")
    left_out = _left_out(facts, {target.name, owner})
    chosen += _told_of_columns(facts, left_out)
    gaps = [c.name for c in facts.columns if c.missing and c not in left_out]
    text = TABLE.format(
        name=json.dumps(_name_of(path.stem)),
        description=json.dumps(f"predicts {target.name} from {path.name}"),
        source=json.dumps(facts.source),
        path=json.dumps(_relative(path, folder)),
        reading=_reading(facts),
        clients=_client_lines(owner, facts.rows),
        label=json.dumps(target.name),
        task=_task_lines(task, target),
        types=_types_line(facts, left_out, {target.name, owner}),
        drop=_drop_line(left_out),
        missing=_missing_line(target, gaps),
    )
    return Draft(text, {}, tuple(chosen))


def _told_of_columns(facts: TableFacts, left_out: Sequence[ColumnFacts]) -> list[str]:
    """Returns a sentence for each column that is left out, and one about dates."""
    told = [f"left out: {column.name} ({column.type})" for column in left_out]
    dates = [c.name for c in facts.columns if c.type == "date" and c not in left_out]
    if dates:
        told.append(f"learned from: {', '.join(dates)} (date); drop_columns leaves dates out")
    return told


def _task_for(target: ColumnFacts) -> str:
    """Returns the task that a label column suggests."""
    if target.type == "number" and target.distinct > MOST_CLASSES:
        return "regression"
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
    lines = ""
    if facts.delimiter != ",":
        lines += f"\ndelimiter = {json.dumps(facts.delimiter)}"
    if facts.decimal != ".":
        lines += f"\ndecimal = {json.dumps(facts.decimal)}"
    return lines


def _client_lines(owner: str, rows: int) -> str:
    public = (
        "public_share = 0.1                # of each client's rows; words and means are of these"
    )
    if owner:
        return f"client_column = {json.dumps(owner)}   # whose a row is\n{public}"
    clients = "num_clients = 10                  # no column names the clients: rows are dealt"
    return f"{clients}\n{public}"


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


def _missing_line(target: ColumnFacts, gaps: Sequence[str]) -> str:
    if target.missing:
        return 'missing = "drop"  # leaves out rows without a value\n'
    if gaps:
        return 'missing = "mean"  # fills a missing cell with the public mean\n'
    return ""


def _of_images(path: Path, folder: Path) -> Draft:
    from fedpress.data.folders import ENDINGS

    found = [file for file in sorted(path.glob("*/*/*")) if file.suffix.lower() in ENDINGS]
    if not found:
        raise DataError(
            f"'{path}' has no images in the folders client/label",
            place="data",
            cure="expected client/label/image.png; with one owner: all/label/image.png",
        )
    from PIL import Image

    with Image.open(found[0]) as image:
        side = min(64, *image.size)
    clients = len({file.parent.parent for file in found})
    text = IMAGES.format(
        name=json.dumps(_name_of(path.name)),
        description=json.dumps(f"tells the labels of {path.name} apart"),
        path=json.dumps(_relative(path, folder)),
        size=max(8, side),
    )
    return Draft(text, {}, (f"{len(found):,} images of {clients} clients",))


def _of_function(name: str) -> Draft:
    if not consent.NAME.fullmatch(name):
        raise DataError(
            f"got '{name}'", place="data", cure="give a file, a folder, or module:function"
        )
    module, function = name.split(":")
    file = f"{module}.py"
    if "." in module:
        raise DataError(
            f"'{module}' is a part of a package", place="data", cure="give a plain module:function"
        )
    text = FUNCTION.format(
        name=json.dumps(_name_of(module)),
        description=json.dumps(f"learns from the data of {name}"),
        source=json.dumps(name),
        file=file,
    )
    files = {
        file: STUB.format(function=function),
        f"test_{file}": TEST.format(module=module, function=function),
    }
    return Draft(text, files, (f"{file}: replace the made-up numbers by your own",))


def _name_of(stem: str) -> str:
    """Returns a name that a recipe may have: letters, digits, dashes."""
    plain = "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "-" for c in stem)
    return plain.strip("-_") or "recipe"


def _relative(path: Path, folder: Path) -> str:
    path, folder = path.resolve(), folder.resolve()
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.as_posix()
