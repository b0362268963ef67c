"""Tables larger than memory: read in batches, and converted to inputs in a file on disk.

The file is mapped, so that the operating system brings in the rows that a step of training asks
for, and lets go of them when memory is short. It has no name and goes when the process ends.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from fedpress.data import cache
from fedpress.data.batches import TableFiles
from fedpress.data.columns import Column
from fedpress.data.examples import InputRows, Progress
from fedpress.data.features import FeatureColumns
from fedpress.data.gaps import refuse_gaps
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
        shown = self._rows_at(public)
        with placing("the public rows"):
            learned = self._encoded(shown, shown.slice(0, 0))
        assert learned.preparation is not None, "a table has one"
        left_out = self._left_out(shown)
        return OnDisk(learned.x, left_out, learned.preparation, columns=self, shown=shown)

    def encoded(self, shown: Any) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yields of each batch the first row, the inputs [m, d], and which rows are dropped [m].

        Args:
            shown: the public rows, a `pyarrow.Table`; they decide what the columns become.
        """
        for first, batch in self._batches():
            with placing(f"rows {first + 1:,} to {first + len(batch):,}"):
                found = self._encoded(shown, batch)
            assert isinstance(found.x, Tensor), "the features of a table are one tensor"
            yield first, found.x, found.left_out

    def _encoded(self, shown: Any, batch: Any) -> InputRows:
        """Returns the inputs of a batch, by the same code that reads a table in memory."""
        # Without a path an error counts rows, not lines of a file.
        settings = self.settings.model_copy(update={"path": None})
        if settings.missing == "error":
            refuse_gaps(batch, self.names, settings)
        both = pa.concat_tables([shown, batch], promote_options="permissive")
        columns = tuple(Column.of(both, name, settings) for name in self.names)
        found = FeatureColumns(columns, settings).inputs(torch.arange(len(shown)))
        rows = slice(len(shown), None)
        assert isinstance(found.x, Tensor), "the features of a table are one tensor"
        return replace(found, x=found.x[rows], left_out=found.left_out[rows])

    def _batches(self) -> Iterator[tuple[int, Any]]:
        """Yields the position of the first row and the features of each batch."""
        read = first = 0
        for batch in self.files.batches(self.names):
            here = slice(read, read + len(batch))
            read += len(batch)
            if self.kept is not None:
                batch = batch.filter(pa.array(self.kept[here]))
            yield first, batch
            first += len(batch)

    def _rows_at(self, rows: Tensor) -> Any:
        """Returns a `pyarrow.Table` of the rows at some positions, in the order of the files."""
        wanted = np.sort(rows.numpy())
        # Without rows the table still has its columns.
        parts = [self.files.first().select(self.names).slice(0, 0)]
        for first, batch in self._batches():
            ends = np.searchsorted(wanted, [first, first + len(batch)])
            here = wanted[slice(*ends)] - first
            # Hundreds of empty columns for each of thousands of batches would fill the memory.
            if len(here):
                parts.append(batch.take(pa.array(here)))
        return pa.concat_tables(parts, promote_options="permissive").combine_chunks()

    def _left_out(self, shown: Any) -> Tensor:
        """Returns which rows are dropped, bool [n]; a pass of its own only where rows may be."""
        if "drop" not in (self.settings.missing, self.settings.unknown):
            return torch.zeros(self.rows, dtype=torch.bool)
        return torch.cat([left_out for _, _, left_out in self.encoded(shown)])


@dataclass(frozen=True, kw_only=True)
class OnDisk(InputRows):
    """Inputs that are computed when the rows of the parts are known, and lie on disk then.

    Attributes:
        columns: the columns of the files.
        shown: the public rows, a `pyarrow.Table`.
    """

    columns: StreamedColumns
    shown: Any

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
            for first, x, _ in self.columns.encoded(self.shown):
                at = where[first : first + len(x)]
                _write(file, x[at >= 0], at[at >= 0])
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
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(tempfile.TemporaryFile(dir=folder, buffering=0))
            # Reserved now: a full disk would end the process later, in the middle of a write.
            os.posix_fallocate(file.fileno(), 0, max(size, 1))
        except OSError as error:
            raise DataError(
                f"no room for {size / 1e9:.1f} GB of inputs ({error.strerror})",
                place=f"'{folder}'",
                cure="make room there, or name another folder in the environment variable "
                "FEDPRESS_CACHE",
            ) from error
        yield file


def _write(file: Any, x: Tensor, rows: Tensor) -> None:
    """Writes `x` [n, d] to the rows of a file that `rows` int64 [n] names.

    Rows that follow each other are written at once. They are not written through a mapping: where
    memory is short, the system would have to clean each of its pages first.
    """
    order = rows.argsort()
    x, rows = x[order].contiguous(), rows[order]
    ends = torch.nonzero(rows.diff() != 1).flatten() + 1
    for part, at in zip(x.tensor_split(ends), rows.tensor_split(ends), strict=True):
        if len(part):
            os.pwrite(file.fileno(), part.numpy().data, int(at[0]) * x.shape[1] * 4)


def _mapped(file: Any, rows: int, width: int) -> Tensor:
    """Returns float32 [rows, width], which lies in the file; it lives on without the file's name."""
    if not rows * width:
        return torch.zeros((rows, width))
    return torch.from_numpy(np.memmap(file, np.float32, "r+", shape=(rows, width)))
