"""Checks whether a client's data fit a recipe, before the client connects to a server.

The recipe is the TOML file with the settings of a run: data, model and stages.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from fedpress.api import begin
from fedpress.core.examples import Arrays
from fedpress.core.inputs import shape_of, shape_text
from fedpress.data import FederatedData
from fedpress.data.batches import FILE
from fedpress.data.labelled import KINDS
from fedpress.data.labelled_windows import labelled_windows
from fedpress.data.paths import TABLES
from fedpress.data.preparation_parts import TextPart
from fedpress.data.settings import DataSettings
from fedpress.errors import DataError, RecipeError
from fedpress.network.data import ARRAYS, ClientData, read_arrays
from fedpress.pipeline.recipe import Recipe
from fedpress.pipeline.start import first_state, load_data


def check_client(recipe: str, path: Path) -> str:
    """Checks the data at `path`; returns a sentence with number, shape and task of the examples.

    The columns of a table are compared with `feature_columns` of the recipe. If it names none, all
    others than the labels are taken, and the sentence lists them.

    Classes and categories are checked here only if the recipe lists them. Otherwise the server
    finds them in its public rows, and the client checks them when the server offers it the run.

    Args:
        recipe: name or file of the recipe.
        path: a table (.csv, .parquet), a file of arrays (.safetensors, .npz), a text (.txt) or a
            folder of texts, or a folder `label/image.png`, as for `fedpress client --data`.

    Raises:
        DataError: if the data cannot be read, lack a column that the recipe names, or have a class
            that the recipe does not list.
        RecipeError: if the recipe's model does not take the examples.
    """
    ClientData(path)  # raises the error for a missing path or an unknown suffix
    texts = KINDS[TextPart.key]
    if texts.takes(path) and begin.load(recipe)[1].data.source == "text":
        found, about = _read(recipe, path=path.resolve())
    elif path.is_dir():
        found, about = _folder(recipe, path)
    elif path.suffix in TABLES:
        found, about = _table(recipe, path)
    else:
        found, about = _arrays(recipe, path)
    columns = _unnamed_columns(found, about)
    try:
        first_state(about, found)  # builds the model and calls it on the first examples
    except RecipeError as error:
        # The owner of the data cannot change the recipe, and may have other columns than it needs.
        if columns:
            error.cure = f"see whether the data have the server's columns; they have {columns}"
        raise
    part = found.public
    said = (
        f"{_count(found, about, path)} examples of shape {shape_text(shape_of(part.x))}, task "
        f"{found.task.kind}: they fit {about.name}"
    )
    if columns:
        said += (
            f"; the recipe names no feature_columns, so compare these with the server's: {columns}"
        )
    return said


def _count(data: FederatedData, recipe: Recipe, path: Path) -> int:
    """Returns how many examples the client will have."""
    if recipe.data.series is not None:
        # Of the windows here some are in no part, so that no two parts share a row.
        assert data.preparation is not None
        return len(labelled_windows(path, data.preparation, recipe.data, data.task)[0])
    return len(data.public) + len(data.test) + sum(map(len, data.clients.values()))


def _unnamed_columns(data: FederatedData, recipe: Recipe) -> str:
    """Returns the columns of a table that were taken because the recipe names none; else ""."""
    about = data.preparation
    if about is None or about.kind not in KINDS or recipe.data.feature_columns is not None:
        return ""
    return ", ".join(column.name for column in about.columns)


SPLIT = ("client_column", "public_clients", "test_clients", "public_share")
"""Keys of `[data]` that divide rows among clients and parts. They are left out here, because all
rows belong to one client."""


def _read(recipe: str, **changed: object) -> tuple[FederatedData, Recipe]:
    """Loads the client's data with the recipe's settings; `changed` replaces source and path.

    About a fifth of the examples become the test set, one example belongs to a client, and all
    others are public; of windows half are public.
    """
    checked = begin.load(recipe)[1]
    kept = checked.data.model_dump(exclude_unset=True, exclude={*SPLIT})
    # A data set needs a client and a test part. Windows share rows, so they can only be divided by
    # time, into parts of one natural client.
    one: dict[str, object] = {"client_column": FILE, "public_share": 0.5}
    if checked.data.series is None:
        one = {"num_clients": 1, "examples_per_client": 1, "partition": {"kind": "iid"}}
    settings = DataSettings.model_validate(
        {**kept, **one, "validation": 0, "test_share": 0.2, **changed}
    )
    checked = checked.model_copy(update={"data": settings})
    return load_data(checked), checked


def _table(recipe: str, path: Path) -> tuple[FederatedData, Recipe]:
    where = {"source": TABLES[path.suffix], "path": path.resolve()}
    settings = begin.load(recipe)[1].data
    client = settings.client_column
    # The server does not count it among the features; a client's own table may have it or not.
    if client is None or client in settings.drop_columns:
        return _read(recipe, **where)
    try:
        return _read(recipe, **where, drop_columns=(*settings.drop_columns, client))
    except DataError as error:
        if not error.place.endswith("drop_columns"):
            raise
        return _read(recipe, **where)


def _folder(recipe: str, path: Path) -> tuple[FederatedData, Recipe]:
    # The source "folders" reads `client/label/image.png`, so the folder needs a parent. Its real
    # parent may contain unrelated folders, which would be read as further clients.
    with TemporaryDirectory() as above:
        (Path(above) / "client").symlink_to(path.resolve(), target_is_directory=True)
        return _read(recipe, source="folders", path=Path(above))


def _arrays(recipe: str, path: Path) -> tuple[FederatedData, Recipe]:
    if path.suffix not in ARRAYS:
        raise DataError(
            "the recipe's data are no text",
            place=f"'{path}'",
            cure=f"give {' or '.join(ARRAYS)} with x and y, or what the recipe's source reads",
        )
    arrays = read_arrays(path)
    checked = begin.load(recipe)[1]
    empty = arrays.take(torch.arange(0))
    classes = _classes(checked, arrays)
    data = FederatedData(
        "client",
        {},
        arrays,
        empty,
        empty,
        num_classes=len(classes),
        class_names=classes,
    )
    return data, checked


def _classes(recipe: Recipe, arrays: Arrays) -> tuple[str, ...]:
    """Returns the classes that the recipe lists; () for a regression.

    If the recipe lists none, there is one class for each number up to the largest label, or more
    if the recipe's model has a larger `num_classes`.
    """
    if arrays.y.is_floating_point():  # targets of a regression
        return ()
    largest = int(arrays.y.max()) + 1 if len(arrays) else 0
    listed = recipe.data.classes
    if listed is not None and largest > len(listed):
        raise DataError(
            f"a label is {largest - 1}, and the recipe lists {len(listed)} classes",
            place="y",
            cure="number the labels from 0, in the order in which the recipe lists the classes",
        )
    if listed is not None:
        return listed
    # One client may lack examples of the last classes. The model still has outputs for them.
    count = recipe.model.arguments.get("num_classes")
    if isinstance(count, int):
        largest = max(largest, count)
    return tuple(map(str, range(largest)))
