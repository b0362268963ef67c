"""Tables larger than memory: read in batches, and converted to inputs in a file on disk.

The file is mapped, so that the operating system brings in the rows that a step of training asks
for, and lets go of them when memory is short. It has no name and goes when the process ends.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from fedpress.data import cache
from fedpress.data.batches import TableFiles
from fedpress.data.columns import Column
from fedpress.data.dates import is_date
from fedpress.data.examples import InputRows, Progress
from fedpress.data.features import FeatureColumns, LearnedFeatures, has_gaps
from fedpress.data.gaps import refuse_gaps
from fedpress.data.scattered import ScatteredRows
from fedpress.data.settings import DataSettings
from fedpress.errors import DataError, placing

# A table becomes several times its own size while it is read: text, numbers, inputs, parts.
SHARE_OF_MEMORY = 1 / 8


def is_larger_than_memory(bytes_of_files: int) -> bool:
    """Returns whether files are too large to be read as a whole, by the memory of this machine."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return bytes_of_files > SHARE_OF_MEMORY * memory


@dataclass(frozen=True)
class StreamedColumns:
    """The feature columns of a table that is read in batches, once for each question.

    Attributes:
        files: the files of the table.
        names: the feature columns.
        rows: number of rows that count.
        kept: bool [n]: the rows of the files that count as rows; None: all.
        settings: the `[data]` table of the recipe.
        progress: called with the number of rows that were converted.
    """

    files: TableFiles
    names: Sequence[str]
    rows: int
    kept: np.ndarray | None
    settings: DataSettings
    progress: Progress | None = None

    def inputs(self, public: Tensor) -> InputRows:
        """Returns the inputs of all rows, as `FeatureColumns.inputs` does, but not in memory.

        Args:
            public: positions of the public rows, which are read into memory.

        Raises:
            DataError: as `FeatureColumns.inputs`; a row is then named by its place in its batch.
        """
        if self.settings.statistics == "private":
            raise DataError(
                "a table that is larger than memory has its statistics from public rows",
                place="statistics",
                cure="leave it out, or take a machine with more memory",
            )
        shown = self.rows_at(public)
        with placing("the public rows"):
            learned = self._learned(shown)
            x, left_out = self._encoded(learned, shown)
            fill = learned.fill(x)
            x = learned.filled(x, left_out, fill)
        left_out = self._left_out(learned)
        about = learned.preparation(fill)
        return OnDisk(x, left_out, about, columns=self, learned=learned, fill=fill)

    def encoded(self, learned: LearnedFeatures) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yields of each batch the first row, the inputs [m, d], and which rows are dropped [m].

        Missing cells are NaN.

        Args:
            learned: what the public rows say about the columns.
        """
        for first, batch in self._batches():
            with placing(f"rows {first + 1:,} to {first + len(batch):,}"):
                yield first, *self._encoded(learned, batch, first)

    def _learned(self, shown: Any) -> LearnedFeatures:
        """Returns what the public rows `shown`, and columns of public words, say."""
        columns = self._columns(shown)
        listed = [name for name in self.names if name in self.settings.public_words]
        if listed:
            whole = pa.concat_tables([batch for _, batch in self._batches(listed)])
            for name in listed:
                found = Column.of(whole, name, self._rowwise)
                # The parts of dates are learned from public rows alone.
                if not is_date(found.values.type):
                    columns[self.names.index(name)] = found
        features = FeatureColumns(tuple(columns), self._rowwise)
        return features.learned(torch.arange(len(shown)))

    @property
    def _rowwise(self) -> DataSettings:
        """The settings without a path, so that an error counts rows, not lines of a file."""
        return self.settings.model_copy(update={"path": None})

    def _columns(self, batch: Any, first: int = 0) -> list[Column]:
        settings = self._rowwise
        return [Column.of(batch, name, settings, first) for name in self.names]

    def _encoded(
        self, learned: LearnedFeatures, batch: Any, first: int = 0
    ) -> tuple[Tensor, Tensor]:
        x, left_out = learned.encoded(self._columns(batch, first))
        # A cell without a value is NaN, so that most batches need not be searched for one.
        if self.settings.missing == "error" and has_gaps(x):
            refuse_gaps(batch, self.names, self._rowwise, first)
        return x, left_out

    def _batches(self, names: Sequence[str] | None = None) -> Iterator[tuple[int, Any]]:
        """Yields the position of the first row and the features of each batch.

        Args:
            names: the columns to read; None: all features.
        """
        read = first = 0
        for batch in self.files.batches(self.names if names is None else names):
            here = slice(read, read + len(batch))
            read += len(batch)
            if self.kept is not None:
                batch = batch.filter(pa.array(self.kept[here]))
            yield first, batch
            first += len(batch)

    def rows_at(self, rows: Tensor) -> Any:
        """Returns a `pyarrow.Table` of the rows at some positions, in their order."""
        order = np.argsort(rows.numpy(), kind="stable")
        wanted = rows.numpy()[order]
        # Without rows the table still has its columns.
        parts = [self.files.columns.select(self.names)]
        for first, batch in self._batches():
            ends = np.searchsorted(wanted, [first, first + len(batch)])
            here = wanted[slice(*ends)] - first
            # Hundreds of empty columns for each of thousands of batches would fill the memory.
            if len(here):
                parts.append(batch.take(pa.array(here)))
        sorted_rows = pa.concat_tables(parts).combine_chunks()
        return sorted_rows.take(pa.array(np.argsort(order, kind="stable")))

    def _left_out(self, learned: LearnedFeatures) -> Tensor:
        """Returns which rows are dropped, bool [n]; a pass of its own only where rows may be."""
        if not learned.may_drop():
            return torch.zeros(self.rows, dtype=torch.bool)
        return torch.cat([left_out for _, _, left_out in self.encoded(learned)])


@dataclass(frozen=True, kw_only=True)
class OnDisk(InputRows):
    """Inputs that are computed when the rows of the parts are known, and lie on disk then.

    Attributes:
        columns: the columns of the files.
        learned: what the public rows say about them.
        fill: what replaces missing cells [d].
    """

    columns: StreamedColumns
    learned: LearnedFeatures
    fill: Tensor

    def of_parts(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the inputs of each part, float32 [n, d] in a mapped file.

        Args:
            parts: name -> positions of the rows of a part. No row is in two parts.
        """
        where = torch.full((len(self.left_out),), -1)
        starts, total = {}, 0
        for name, rows in parts.items():
            starts[name] = total
            where[rows] = torch.arange(total, total + len(rows))
            total += len(rows)
        assert isinstance(self.x, Tensor), "the features of a table are one tensor"
        progress = self.columns.progress
        with _room(total * self.x.shape[1] * 4) as file:
            scattered = ScatteredRows(file, total, self.x.shape[1])
            for first, x, left_out in self.columns.encoded(self.learned):
                x = self.learned.filled(x, left_out, self.fill)
                scattered.write_(x, where[first : first + len(x)])
                if progress:
                    progress("converting rows", first + len(x), len(where))
            x = _mapped(file, total, self.x.shape[1])
            return {name: x[start : start + len(parts[name])] for name, start in starts.items()}


@contextmanager
def _room(size: int) -> Iterator[Any]:
    """Opens a file without a name in the cache folder, with room for `size` bytes.

    Raises:
        DataError: if there is no room for it.
    """
    folder = cache.folder()
    # Errors of reading are no OSError here: `TableFiles` gives them a place.
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            # Reserved now: better no conversion than one that ends when the disk is full.
            os.posix_fallocate(file.fileno(), 0, max(size, 1))
            yield file
    except OSError as error:
        raise DataError(
            f"no room for {size / 1e9:.1f} GB of inputs ({error.strerror})",
            place=f"'{folder}'",
            cure="make room there, or name another folder in the environment variable "
            "FEDPRESS_CACHE",
        ) from error


def _mapped(file: Any, rows: int, width: int) -> Tensor:
    """Returns float32 [rows, width], which lies in the file; it lives on without the file's name."""
    if not rows * width:
        return torch.zeros((rows, width))
    return torch.from_numpy(np.memmap(file, np.float32, "r+", shape=(rows, width)))
