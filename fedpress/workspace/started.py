"""Signs run folders, so that the user who started a run can resume it without a new consent.

A user who starts a recipe consents to call the functions that it names, such as "nets:Net". A run
folder also contains a recipe, but the folder may come from a stranger. The functions in this
recipe are called without a new consent only if the folder has the user's signature (HMAC-SHA256).
The key is in a file in the user's home.
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
"""Length of the user's key."""
# Functions of fedpress that its commands write into recipes, by their names in saved files.
OWN = ("fedpress.commands.subject:no_data", "fedpress.models.memory:held")


def functions_of(text: str) -> list[str]:
    """Returns the code that a recipe names: its architecture, and the source and task of its data.

    Args:
        text: the recipe's TOML text. If it is not valid TOML, the result is empty.

    >>> functions_of('model = {architecture = "nets:Net"}')
    ['nets:Net']
    """
    try:
        tree = tomllib.loads(text)
    except (ValueError, RecursionError):
        return []
    found: list[str] = []
    model, data = tree.get("model"), tree.get("data")
    for table, key in ((model, "architecture"), (data, "source"), (data, "task")):
        name = table.get(key) if isinstance(table, dict) else None
        # A task with options is a table.
        if isinstance(name, dict):
            name = name.get("kind")
        if isinstance(name, str) and ":" in name and name not in OWN and name not in found:
            found.append(name)
    return found


def sign(names: Sequence[str], recipe: str | None) -> str | None:
    """Returns the signature of a run, in hex; None if no key can be kept in the user's home.

    Args:
        names: the functions that the run's recipe names.
        recipe: path of the recipe file; None: the recipe is not a file. The path is signed too,
            because modules are searched in the file's folder.
    """
    key = user_key()
    if key is None:
        return None
    # Sorted, because the order of functions in a recipe may change when it is written again.
    message = json.dumps([sorted(names), recipe]).encode()
    return hmac.new(key, message, hashlib.sha256).hexdigest()


def is_signed(found: object, names: Sequence[str], recipe: str | None) -> bool:
    """Whether `found`, from a run folder, is this user's signature; see `sign`."""
    right = sign(names, recipe)
    if right is None or not isinstance(found, str):
        return False
    # Constant time: the running time of == would tell an attacker how many characters are right.
    return hmac.compare_digest(found.encode(), right.encode())


def user_key() -> bytes | None:
    """Returns the user's key, 32 bytes; makes one if there is none; None if none can be kept."""
    try:
        state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
        path = Path(state) / "fedpress" / "key"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            part = path.with_name(f"key.{secrets.token_hex(8)}")
            # Readable by the user only, from the first moment.
            handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(handle, "wb") as file:
                file.write(secrets.token_bytes(KEY_BYTES))
            # os.link fails if the file exists. So, if two processes make a key at the same time,
            # both use the key of the first.
            try:
                os.link(part, path)
            except FileExistsError:
                pass
            finally:
                part.unlink()
        found = path.read_bytes()
    # The user has no home, or it cannot be written.
    except (OSError, RuntimeError):
        return None
    return found if len(found) == KEY_BYTES else None
