"""Which functions a model's file may name as its architecture: building from JSON must not mean calling anything."""

from __future__ import annotations

import functools
import os
import sys
import sysconfig
import typing
from pathlib import Path
from typing import Any

from torch import nn

from fedpress.errors import ModelError

VARIABLE = "FEDPRESS_TRUST"
_named: set[str] = set()


def trust(architecture: str) -> None:
    """Notes that the user named this architecture: then files may name it too, as long as the process lives."""
    _named.add(architecture)


def check_builder(architecture: str, builder: Any) -> None:
    """Lets pass what builds networks: a class of them, a function that says it returns one, or the user's own code.

    The user's own is what lies neither in the standard library nor among the installed packages.

    Args:
        architecture: `package.module:function`, as a file names it.
        builder: what that is.

    Raises:
        ModelError: if it is anything else, such as `os:system`, and neither this process was given the name by its
            user (see `trust`) nor FEDPRESS_TRUST holds it.
    """
    if architecture in _named or architecture in os.environ.get(VARIABLE, "").split(","):
        return
    if not (_is_network(builder) or _is_network(_returned(builder)) or _own(builder)):
        raise ModelError(
            f"model: the file names '{architecture}' as its architecture, which is no class of networks, does not say "
            "that it returns one, and belongs to an installed package; a file must not call just anything: if you "
            f"trust this one, set {VARIABLE}={architecture}"
        )


def _is_network(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, nn.Module)


def _returned(builder: Any) -> Any:
    try:
        return typing.get_type_hints(builder).get("return")
    except Exception:  # annotations that cannot be resolved say nothing
        return None


def _own(builder: Any) -> bool:
    while isinstance(builder, functools.partial):
        builder = builder.func
    file = getattr(sys.modules.get(getattr(builder, "__module__", "")), "__file__", None)
    if file is None or not callable(builder):
        return False
    installed = {Path(sysconfig.get_path(key)).resolve() for key in ("stdlib", "platstdlib", "purelib", "platlib")}
    path = Path(file).resolve()
    return installed.isdisjoint(path.parents) and not {"site-packages", "dist-packages"} & set(path.parts)
