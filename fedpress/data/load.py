"""Loads the data of a run: reads the source that a recipe names, and splits its rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from fedpress.core.examples import Arrays, resized
from fedpress.core.inputs import NamedInputs, is_image
from fedpress.core.log import logger
from fedpress.data import audio, cifar10, digits, folders, functions, numpy_files, text
from fedpress.data.column_facts import ColumnFacts, Rows
from fedpress.data.dataset import FederatedData
from fedpress.data.examples import Progress, SourceRows
from fedpress.data.settings import DataSettings
from fedpress.data.split import split_rows
from fedpress.errors import DataError

log = logger(__name__)


def _read_tables(settings: DataSettings, progress: Progress | None) -> SourceRows:
    # Imported here, because pyarrow is slow to import and the other sources do not need it.
    from fedpress.data.tables import read_tables

    return read_tables(settings, progress)


SOURCES: dict[str, Callable[[DataSettings, Progress | None], SourceRows]] = {
    "digits": lambda settings, progress: digits.read_digits(),
    "cifar10": cifar10.read_cifar10,
    "csv": _read_tables,
    "parquet": _read_tables,
    "arrow": _read_tables,
    "sql": _read_tables,
    "huggingface": _read_tables,
    "numpy": numpy_files.read_numpy,
    "folders": folders.read_folders,
    "audio": audio.read_audio,
    "text": text.read_text,
}
"""Name of each built-in source -> the function that reads its rows."""


def load(
    settings: DataSettings,
    seed: int,
    *,
    progress: Progress | None = None,
    describe: Rows | None = None,
) -> FederatedData:
    """Reads the source and splits its rows; the result depends on data, settings and seed only.

    Args:
        settings: the `[data]` table of the recipe.
        seed: seed of every random choice.
        progress: called as `progress(what, done, total)` during downloads and decoding.
        describe: the rows by which the columns of a table are described; None: they are not.

    Raises:
        DataError: if data is missing, corrupt, or has fewer rows than the settings ask for.

    >>> load(DataSettings(source="digits", examples_per_client=60), seed=0).describe()["private"]
    600
    """
    found = _read(settings, seed, progress, describe)
    if settings.class_weights is None:
        return found
    # Done after the split, because balanced weights are computed from public examples only.
    task = found.task.weighted(settings.class_weights, found.public.y)
    # Class weights may be logged: they come from public counts or the recipe.
    shown = ", ".join(f"{weight:.3g}" for weight in task.class_weights)
    log.info("class weights %s", shown)
    return replace(found, task=task)


def _read(
    settings: DataSettings, seed: int, progress: Progress | None, describe: Rows | None
) -> FederatedData:
    if settings.source in SOURCES:
        found: FederatedData | SourceRows = SOURCES[settings.source](settings, progress)
    else:
        found = functions.call_function(settings, seed)
    # The user's function has made all parts itself, so nothing is split.
    if isinstance(found, FederatedData):
        return found
    facts = found.facts
    if describe is None or facts is None:
        found = replace(found, facts=None)
    elif describe == "all":
        found = replace(found, facts=lambda public: facts(None))
    else:
        found = replace(found, facts=lambda public: _of_public(facts(public)))
    return split_rows(_at_size(found, settings.image_size), settings, seed)


def _of_public(columns: tuple[ColumnFacts, ...]) -> tuple[ColumnFacts, ...]:
    return tuple(replace(one, part="public") for one in columns)


def _at_size(examples: SourceRows, side: int | None) -> SourceRows:
    """Resizes images that are decoded already; `side`: height and width, None: no change."""
    if side is None:
        return examples
    test = examples.test and _resized(examples.test, side)
    return replace(examples, train=_resized(examples.train, side), test=test)


def _resized(arrays: Arrays, side: int) -> Arrays:
    """Returns images with height and width `side`, and other examples unchanged.

    Raises:
        DataError: if an example has several inputs, because it is not known which are images.
    """
    if isinstance(arrays.x, NamedInputs):
        raise DataError(
            "it resizes examples of a single image, but these have several inputs",
            place="image_size",
            cure="leave image_size out, and resize images in the function that makes them",
        )
    if not is_image(arrays.x):
        return arrays
    return replace(arrays, x=resized(arrays.x, side))
