"""Reads a parquet file, or says in one sentence why it cannot be read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedpress.errors import DataError


def read_table(path: Path) -> Any:
    """Returns the `pyarrow.Table` of a parquet file.

    Raises:
        DataError: if the file is missing or corrupt.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path).read()
    except FileNotFoundError as error:
        raise DataError(f"'{path}': no such file; check the path") from error
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"'{path}': not a readable parquet file ({_first_line(error)}); copy or download it again"
        ) from error


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0].rstrip(". ") if str(error) else type(error).__name__
