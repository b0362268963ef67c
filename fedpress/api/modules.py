"""Modules in memory: the spec that builds one again, and the error where there is none."""

from __future__ import annotations

from torch import nn

from fedpress.errors import Argument, ModelError
from fedpress.models import ModelSpec, memory


def building_spec(module: nn.Module) -> ModelSpec | None:
    """Returns the spec by which any process builds a network that a call has returned.

    None if no call has returned it, it was changed since then, or only this process can build it,
    since its class is defined in a notebook for instance.
    """
    spec: ModelSpec | None = memory.spec_that_builds(module)
    return None if spec is None or spec.architecture == memory.IN_MEMORY else spec


def not_buildable(module: nn.Module, *, place: str, what: str = "it") -> ModelError:
    """Returns the error that a module cannot be written, since nothing builds it again.

    Args:
        module: to be written.
        place: the argument that asks for it.
        what: would be written.
    """
    importable = (
        "define its class in a file such as nets.py, import it from there, and keep each argument "
        "of its constructor as an attribute of the same name (self.width = width)"
    )
    error = ModelError(
        f"{what} could not be opened again, since nothing is known that builds this "
        f"{type(module).__name__}: {memory.why_no_name(module)}",
        place=place,
        cure=importable,
    )
    if memory.spec_of(module) is not None:
        # A state dict of a cut network does not fit the network that a function builds.
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
