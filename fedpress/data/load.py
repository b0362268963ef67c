"""One call from settings to a federated data set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from fedpress.core.examples import Arrays, resized
from fedpress.core.inputs import NamedInputs, is_image
from fedpress.data import cifar10, digits, folders, functions, tables
from fedpress.data.dataset import FederatedData
from fedpress.data.examples import Examples, Progress
from fedpress.data.settings import DataSettings
from fedpress.data.split import split
from fedpress.errors import DataError

SOURCES: dict[str, Callable[[DataSettings, Progress | None], Examples]] = {
    "digits": lambda settings, progress: digits.read(),
    "cifar10": cifar10.read,
    "csv": tables.read,
    "parquet": tables.read,
    "folders": folders.read,
}


def load(settings: DataSettings, seed: int, *, progress: Progress | None = None) -> FederatedData:
    """Reads the source and shares out its rows; the result depends on the settings and the seed alone.

    Args:
        settings: the `[data]` table of the recipe.
        seed: of every random choice.
        progress: `progress(what, done, total)` is called during downloads and decoding.

    Raises:
        DataError: if data is missing, corrupt, or too small for what is asked.

    >>> load(DataSettings(source="digits", examples_per_client=60), seed=0).describe()["private"]
    600
    """
    found = _read(settings, seed, progress)
    if settings.class_weights is None:
        return found
    task = found.task.weighted(settings.class_weights, found.public.y)
    return replace(found, task=task)


def _read(settings: DataSettings, seed: int, progress: Progress | None) -> FederatedData:
    if settings.source in SOURCES:
        return split(
            _sized(SOURCES[settings.source](settings, progress), settings.image_size),
            settings,
            seed,
        )
    found = functions.read(settings, seed)
    return (
        found
        if isinstance(found, FederatedData)
        else split(_sized(found, settings.image_size), settings, seed)
    )


def _sized(examples: Examples, side: int | None) -> Examples:
    """Brings the images of sources that have a size of their own to `side` pixels."""
    if side is None:
        return examples
    test = examples.test and _resized(examples.test, side)
    return replace(examples, train=_resized(examples.train, side), test=test)


def _resized(arrays: Arrays, side: int) -> Arrays:
    """Returns images at `side` pixels, and other examples as they are.

    Raises:
        DataError: if there are several inputs, of which nobody has said which are images.
    """
    if isinstance(arrays.x, NamedInputs):
        raise DataError(
            "it resizes examples of one image, and these have several inputs",
            place="image_size",
            cure="leave it out, and resize images in the function that makes them",
        )
    return replace(arrays, x=resized(arrays.x, side)) if is_image(arrays.x) else arrays
