"""Notes with which data a run began, so that it is not resumed with others: the file `data.json`.

It has digests of the files that were read, or of the examples if they came from a database, a
function or memory. A run folder may be passed on, and a plain digest would let others test whether
a guessed file or row was there. So all digests, also those of names, are made with the user's own
key: they mean something only to the user who started the run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from datetime import datetime
from hashlib import blake2b
from pathlib import Path
from typing import Any

from fedpress.core.random import fingerprint
from fedpress.data import FederatedData
from fedpress.data.settings import NEED_PATH, TABLE_SOURCES, DataSettings
from fedpress.errors import RunError, Shell
from fedpress.workspace.atomic import read_json, write_json_with_checksum
from fedpress.workspace.damage import CURES
from fedpress.workspace.started import user_key

NAME = "data.json"
WHOLE = 1 << 28
"""Files up to this size, in bytes, are read as a whole; of larger ones blocks are compared."""
BLOCK, BLOCKS = 1 << 20, 64
"""Size of a block in bytes, and how many of them are spread over a larger file."""
Seen = Mapping[str, Any]
"""Digests of data: the content of `data.json`."""


def seen(data: FederatedData, settings: DataSettings | None) -> Seen | None:
    """Returns the digests of data that were just loaded; None if the user can keep no key.

    Args:
        data: the loaded data.
        settings: where they were read from; None: they were given in memory.
    """
    key = user_key()
    if key is None:
        return None
    found: dict[str, Any] = {"key": _digest(key, b"this key")}
    if settings is not None and settings.source in ("digits", "cifar10") and not settings.path:
        # They come with fedpress, or are checked when they are downloaded.
        return found
    if settings is not None and settings.source in (*NEED_PATH, "cifar10"):
        files = {}
        for name, path in _files(settings):
            files[_digest(key, name.encode())] = _of_file(key, path)
        return found | {"files": files}
    return found | {"examples": _of_examples(key, data)}


def compare(run: Path, now: Seen | None, settings: DataSettings | None) -> list[str]:
    """Compares data with those with which a run began.

    Args:
        run: folder of the run. A folder of an older fedpress has no digests and is accepted.
        now: the digests of the data as they are now.
        settings: where they were read from; None: they were given in memory.

    Returns:
        Warnings, for example that nothing could be compared.

    Raises:
        RunError: if the data have changed. The error names the first file that has.
    """
    path = run / NAME
    if not path.exists():
        return []
    before = read_json(path, cure=CURES[NAME])
    if now is None or before.get("key") != now["key"]:
        return [
            "another user or machine began this run, so whether the data are the same could not be "
            "compared"
        ]
    for part, digest in now.get("examples", {}).items():
        if before.get("examples", {}).get(part, digest) != digest:
            raise _changed(f"the {part} are others than when this run began", "data")
    return _compare_files(before.get("files", {}), now, settings)


def differ(run: Path, other: Path) -> bool:
    """Returns whether two runs are known to have begun with different data.

    Runs of an older fedpress or of another user cannot be compared. Files are compared by their
    content, so that they may have moved.
    """
    if not ((run / NAME).exists() and (other / NAME).exists()):
        return False
    one, two = (read_json(place / NAME, cure=CURES[NAME]) for place in (run, other))
    if one.get("key") != two.get("key"):
        return False
    if "files" in one and "files" in two:
        contents = [sorted(f["content"] for f in each["files"].values()) for each in (one, two)]
        return contents[0] != contents[1]
    shared = one.get("examples", {}).keys() & two.get("examples", {}).keys()
    return any(one["examples"][part] != two["examples"][part] for part in shared)


def note(run: Path, now: Seen | None) -> None:
    """Writes `data.json` into the folder of a new run."""
    if now is not None:
        write_json_with_checksum(run / NAME, now, run)


def _compare_files(
    before: Mapping[str, Any], now: Seen, settings: DataSettings | None
) -> list[str]:
    files = now.get("files")
    if files is None or settings is None:
        return []
    key = user_key()
    assert key is not None, "checked by `seen`"
    touched = []
    for name, path in _files(settings):
        digest = _digest(key, name.encode())
        if digest not in before:
            # A single file may have been renamed or moved.
            if len(before) == len(files) == 1:
                digest, old = next(iter(files)), next(iter(before.values()))
            else:
                raise _changed("it was not there when this run began", f"'{path}'")
        else:
            old = before[digest]
        new = files[digest]
        if old["content"] != new["content"]:
            raise _changed(
                f"it has changed since this run began (last on {_changed_at(path)})", f"'{path}'"
            )
        if old.get("time") != new.get("time"):
            touched.append(str(path))
    if len(before) > len(files):
        missing = len(before) - len(files)
        what = "a file is" if missing == 1 else f"{missing:,} files are"
        raise _changed(f"{what} missing that this run began with", f"'{settings.path}'")
    if not touched:
        return []
    return [
        f"'{touched[0]}' was written again since this run began; it is large, so only its size and "
        f"{BLOCKS} of its blocks were compared, and they are the same"
    ]


def _changed(problem: str, place: str) -> RunError:
    return RunError(
        problem,
        place=place,
        cure=(
            "its result would be of two kinds of data: restore what it began with, or start a new "
            "run",
            Shell(" with --out NEW"),
        ),
    )


def _changed_at(path: Path) -> str:
    return datetime.fromtimestamp(path.stat().st_mtime).strftime("%Y-%m-%d %H:%M")


def _files(settings: DataSettings) -> Iterator[tuple[str, Path]]:
    """Yields the files that were read, each with its name below `data.path`."""
    path = settings.path
    assert path is not None, "checked by DataSettings"
    if settings.source in TABLE_SOURCES and settings.source != "huggingface":
        # Imported here: other sources do not need pyarrow.
        from fedpress.data.tables import find

        for file in find(path, settings.source):
            yield file.name, file
        return
    if path.is_file():
        yield path.name, path
        return
    for folder, folders, names in os.walk(path):
        folders.sort()
        for name in sorted(names):
            file = Path(folder) / name
            # Hidden files are not data.
            if not name.startswith("."):
                yield file.relative_to(path).as_posix(), file


def _of_file(key: bytes, path: Path) -> dict[str, str]:
    """Returns the digest of a file's content, and of the time of its last change if it is large."""
    found = blake2b(digest_size=16, key=key)
    size = path.stat().st_size
    found.update(f"{size};".encode())
    with open(path, "rb") as file:
        if size <= WHOLE:
            while chunk := file.read(BLOCK):
                found.update(chunk)
            return {"content": found.hexdigest()}
        for at in range(BLOCKS):
            # The first block is the beginning of the file, the last one its end.
            file.seek((size - BLOCK) * at // (BLOCKS - 1))
            found.update(file.read(BLOCK))
    time = _digest(key, str(path.stat().st_mtime_ns).encode())
    return {"content": found.hexdigest(), "time": time}


def _of_examples(key: bytes, data: FederatedData) -> dict[str, str]:
    """Returns a digest of the examples of the clients, and of each other part."""
    clients = [part for name, one in data.clients.items() for part in (name, one.x, one.y)]
    parts = {"examples of the clients": clients}
    for name in ("public", "validation", "test"):
        one = getattr(data, name)
        parts[f"{name} examples"] = [one.x, one.y]
    return {name: _digest(key, fingerprint(*part).encode()) for name, part in parts.items()}


def _digest(key: bytes, content: bytes) -> str:
    return blake2b(content, digest_size=16, key=key).hexdigest()
