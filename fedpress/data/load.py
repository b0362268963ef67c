"""One call from settings to a federated data set."""

from __future__ import annotations

from collections.abc import Callable

from fedpress.data import cifar10, digits
from fedpress.data.dataset import FederatedData
from fedpress.data.examples import Examples, Progress
from fedpress.data.settings import DataSettings
from fedpress.data.split import split

SOURCES: dict[str, Callable[[DataSettings, int, Progress | None], Examples | FederatedData]] = {
    "digits": digits.read,
    "cifar10": cifar10.read,
}


def load(settings: DataSettings, seed: int, *, progress: Progress | None = None) -> FederatedData:
    """Reads the source and shares out its rows; the result depends on the settings and the seed alone.

    Args:
        settings: the `[data]` table of the recipe.
        seed: of every random choice.
        progress: `progress(what, done, total)` is called during downloads and decoding.

    Raises:
        DataError: if data is missing, corrupt, or too small for what is asked.
    """
    found = SOURCES[settings.source](settings, seed, progress)
    return found if isinstance(found, FederatedData) else split(found, settings, seed)
