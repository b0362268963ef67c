"""Finds the spec that builds a user's module again, and makes the error if there is none.

A spec is the description of a model in a saved file: architecture, arguments and shapes.
"""

from __future__ import annotations

from torch import nn

from fedpress.errors import Argument, ModelError
from fedpress.models import ModelSpec, memory


def building_spec(module: nn.Module) -> ModelSpec | None:
    """Returns the spec from which any process can build a module that fedpress returned.

    Returns None in three cases: no call of fedpress returned this module; the user changed the
    module afterwards; or only this process can build the module, for example because its class is
    defined in a notebook.
    """
    spec: ModelSpec | None = memory.spec_that_builds(module)
    return None if spec is None or spec.architecture == memory.IN_MEMORY else spec


def not_buildable(module: nn.Module, *, place: str, what: str = "it") -> ModelError:
    """Returns the error for a module that cannot be saved, because it could not be built again.

    Args:
        module: the module that cannot be saved.
        place: the argument that requires saving, such as "out".
        what: the subject of the error's sentence, such as "the file".
    """
    # An attribute for each argument lets fedpress read the arguments from the finished module.
    importable = (
        "define its class in a file such as nets.py, import it from there, and keep each argument "
        "of its constructor as an attribute of the same name (self.width = width)"
    )
    error = ModelError(
        f"{what} could not be opened again, since it is not known how to build this "
        f"{type(module).__name__}: {memory.why_no_name(module)}",
        place=place,
        cure=importable,
    )
    if memory.spec_of(module) is not None:
        # A call of fedpress, such as prune, has made this module. Its state dict may no longer fit
        # the network that a function builds, so the second cure below is left out.
        error.add_cure("; then repeat the calls that made it")
        return error
    error.add_cure(
        "; or give ",
        Argument("model", "package.module:function"),
        ", a function that returns it, and ",
        Argument("checkpoint", "weights.pt"),
        " with its state_dict()",
    )
    return error
