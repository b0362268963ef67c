"""The user's cache folder: downloads, and decoded copies of files that are slow to read."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np

from fedpress.core.files import replacing
from fedpress.core.log import logger

log = logger(__name__)


def folder() -> Path:
    """Returns the path `$FEDPRESS_CACHE` or `~/.cache/fedpress`; the folder need not exist."""
    given = os.environ.get("FEDPRESS_CACHE")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "fedpress"


def decoded(
    name: str, files: Sequence[Path], decode: Callable[[], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Returns the result of `decode()`, from the cache if it has a copy.

    A copy is valid while path, size and modification time of all files are the same. Errors
    while the cache is read or written are ignored.

    Args:
        name: name of the data set; the file name of the copy begins with it.
        files: the files that `decode` reads.
        decode: reads the files into arrays by name; this is slow.
    """
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    key = blake2b(repr(sorted(stats)).encode(), digest_size=12).hexdigest()
    target = folder() / "decoded" / f"{name}-{key}.npz"
    # numpy raises errors of many types for a damaged file. We open the file ourselves, because
    # numpy would not close it after an error.
    with (
        contextlib.suppress(Exception),
        target.open("rb") as cached,
        np.load(cached, allow_pickle=False) as stored,
    ):
        log.info("%s: decoded copy read from %s", name, target)
        return dict(stored)
    log.info("%s: the cache has no decoded copy; decoding the files", name)
    arrays = decode()
    with contextlib.suppress(OSError):
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target, durable=False, shared=True) as part, part.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
    return arrays
