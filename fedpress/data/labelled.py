"""Reads labelled examples of one's own for a network that was trained on other data.

To add a kind of raw data, write a function here with a row in `KINDS`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fedpress.core.examples import Arrays
from fedpress.data.labelled_rows import labelled_rows
from fedpress.data.labelled_windows import labelled_windows
from fedpress.data.preparation import TABLE, Preparation
from fedpress.data.preparation_parts import SeriesPart
from fedpress.data.settings import DataSettings
from fedpress.tasks.base import Task

Reader = Callable[[Path, Preparation, DataSettings, Task], tuple[Arrays, int]]
"""Takes the file, the preparation of the training, the settings and the network's task. Returns the
examples, not standardised, and how many were left out (see `labelled_rows`)."""

KINDS: dict[str, Reader] = {TABLE: labelled_rows, SeriesPart.key: labelled_windows}
"""Kind of a preparation -> the function that reads a table for it."""
