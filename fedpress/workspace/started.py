"""Whose run a folder is: a mark that only the user who started it could make says that its functions are known.

A recipe that a user names is consent to the functions in it. The recipe in a run folder is none, since the folder may
come from anybody: it counts where the mark of its start fits. The key of the marks never leaves the user's files.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import tomllib
from collections.abc import Sequence
from pathlib import Path

KEY_BYTES = 32
OWN = ("fedpress.commands.subject:no_data", "fedpress.models.memory:held")
"""Functions of fedpress that its commands write into recipes."""


def functions_of(text: str) -> list[str]:
    """Returns the `module:function` names in the TOML of a recipe; none if it is no recipe.

    >>> functions_of('model = {architecture = "nets:Net"}')
    ['nets:Net']
    """
    try:
        tree = tomllib.loads(text)
    except (ValueError, RecursionError):
        return []
    tables = [(tree.get("model"), "architecture"), (tree.get("data"), "source")]
    named = [
        table[key]
        for table, key in tables
        if isinstance(table, dict) and isinstance(table.get(key), str)
    ]
    return list(dict.fromkeys(name for name in named if ":" in name and name not in OWN))


def mark(names: Sequence[str], recipe: str | None) -> str | None:
    """Returns the mark of a run; None where the user's files cannot hold a key.

    Args:
        names: the functions that its recipe names.
        recipe: the path of the recipe file, beside which they are looked for.
    """
    key = _key()
    if key is None:
        return None
    said = json.dumps([sorted(names), recipe]).encode()
    return hmac.new(key, said, hashlib.sha256).hexdigest()


def fits(found: object, names: Sequence[str], recipe: str | None) -> bool:
    """Whether this user has made the mark `found` for these functions and this place."""
    right = mark(names, recipe)
    return (
        right is not None
        and isinstance(found, str)
        and hmac.compare_digest(found.encode(), right.encode())
    )


def _key() -> bytes | None:
    try:
        state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
        path = Path(state) / "fedpress" / "key"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            part = path.with_name(f"key.{secrets.token_hex(8)}")
            handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(handle, "wb") as file:
                file.write(secrets.token_bytes(KEY_BYTES))
            try:
                os.link(part, path)  # of two processes the first one makes the key
            except FileExistsError:
                pass
            finally:
                part.unlink()
        found = path.read_bytes()
    except (OSError, RuntimeError):  # no home, or one that cannot be written
        return None
    return found if len(found) == KEY_BYTES else None
