"""fedpress compresses PyTorch models, trains them with federated learning, and exports them.

Each name is imported at its first use, so that `import fedpress` takes under 0.1 s.
`docs/python.md` has examples, and for each function the command that does the same.
"""

from collections.abc import Collection
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedpress.api.accounting import epsilon
    from fedpress.api.evaluating import Predictions, evaluate, predict
    from fedpress.api.recipes import recipes
    from fedpress.api.result import Result
    from fedpress.api.runs import Run, check, report, run
    from fedpress.api.saving import load, save
    from fedpress.api.stages import (
        distill,
        export,
        federate,
        l0,
        pack,
        prune,
        quantize,
        sparsify,
        train,
    )
    from fedpress.api.sweeps import sweep
    from fedpress.data import FederatedData
    from fedpress.errors import FedpressError
    from fedpress.pipeline.commands.measuring import measure
    from fedpress.pipeline.recipe import Recipe
    from fedpress.privacy.accounting.accountant import noise_multiplier
    from fedpress.workspace.state import StageFinished, StageStarted, Tick

__version__ = "0.2.0"

__all__ = [
    "FederatedData",
    "FedpressError",
    "Predictions",
    "Recipe",
    "Result",
    "Run",
    "StageFinished",
    "StageStarted",
    "Tick",
    "check",
    "distill",
    "epsilon",
    "evaluate",
    "export",
    "federate",
    "l0",
    "load",
    "measure",
    "noise_multiplier",
    "pack",
    "predict",
    "prune",
    "quantize",
    "recipes",
    "report",
    "run",
    "save",
    "sparsify",
    "sweep",
    "train",
]

_NAMES_IN = {
    "fedpress.api.accounting": ("epsilon",),
    "fedpress.api.evaluating": ("Predictions", "evaluate", "predict"),
    "fedpress.api.recipes": ("recipes",),
    "fedpress.api.result": ("Result",),
    "fedpress.api.runs": ("Run", "check", "report", "run"),
    "fedpress.api.saving": ("load", "save"),
    "fedpress.api.stages": (
        "distill",
        "export",
        "federate",
        "l0",
        "pack",
        "prune",
        "quantize",
        "sparsify",
        "train",
    ),
    "fedpress.api.sweeps": ("sweep",),
    "fedpress.data": ("FederatedData",),
    "fedpress.errors": ("FedpressError",),
    "fedpress.pipeline.commands.measuring": ("measure",),
    "fedpress.pipeline.recipe": ("Recipe",),
    "fedpress.privacy.accounting.accountant": ("noise_multiplier",),
    "fedpress.workspace.state": ("StageFinished", "StageStarted", "Tick"),
}
"""Module -> the public names that it defines."""

_MODULE_OF = {name: module for module, names in _NAMES_IN.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF and name not in _kinds_of_stages():
        raise AttributeError(f"module 'fedpress' has no attribute '{name}'")
    value = getattr(import_module(_MODULE_OF.get(name, "fedpress.api.stages")), name)
    globals()[name] = value  # so that Python finds the name from now on, without `__getattr__`
    return value


def _kinds_of_stages() -> Collection[str]:
    """Returns the kinds of stages that have a function, including stages that a user has added."""
    kinds: Collection[str] = import_module("fedpress.stages.table").commands()
    return kinds


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
