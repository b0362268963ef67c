"""Drafts a first recipe for a user's file, folder or function: `fedpress init`."""

from __future__ import annotations

from pathlib import Path

from fedpress.data.describe import describe_file
from fedpress.errors import RecipeError
from fedpress.pipeline.drafting.base import Draft
from fedpress.pipeline.drafting.folders import of_arrays, of_folder, of_texts
from fedpress.pipeline.drafting.functions import of_function
from fedpress.pipeline.drafting.tables import of_table
from fedpress.tasks import TASKS

__all__ = ["Draft", "draft"]


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
        data: a table (.csv, .parquet, .arrow, .db), arrays (.npz), a text (.txt); a folder of
            `client/label/image.png`, `client/label/sound.wav`, `client.txt` or arrays; or
            `module:function`, for which a stub and a test are drafted.
        label: column of a table to predict, or several with commas between, such as the time and
            the event of a survival; None: the most likely one.
        client: column that names the client of a row, "" for none; None: the most likely one.
        task: what is learned; None: it follows from the label. Rows at regular times are a
            forecast.
        folder: folder of the recipe, to which its paths are relative.

    Raises:
        DataError: if the data cannot be read, or have no such column.
        RecipeError: if there is no such task, or the data have no columns for the flags.
    """
    if task is not None and task not in TASKS:
        raise RecipeError(f"no task '{task}'", place="task", cure=f"give one of {', '.join(TASKS)}")
    path = Path(data)
    if ":" in data and not path.exists():
        return of_function(data)
    if path.is_dir():
        return of_folder(path, folder)
    if path.suffix == ".npz" and path.exists():
        return of_arrays(path, folder)
    if path.suffix == ".txt" and path.exists():
        return of_texts(path, folder)
    return of_table(describe_file(path), label, client, task, folder)
