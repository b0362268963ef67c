"""Finds the changes that pruning made to a network, and repeats them on a dense network.

A spec (the JSON description of a saved model) stores these changes as shapes of tensors, numbers in
forward code, and numbers of groups of convolutions.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fedpress.errors import ModelError
from fedpress.nn.forward_sizes import Numbers, numbers_in, set_numbers_
from fedpress.nn.resize import get_tensor, is_depthwise, replace_tensors_, set_groups_, weight_shape


def resize_(model: nn.Module, shapes: dict[str, tuple[int, ...]]) -> None:
    """Replaces parameters and buffers by smaller tensors of zeros, and updates the layers' sizes.

    Args:
        model: the network.
        shapes: name of the parameter or buffer -> new shape.

    Raises:
        ModelError: if a name is not in the model, or if a new shape has another number of axes, a
            larger axis, or an axis of size 0.
    """
    new: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        try:
            old = get_tensor(model, name)
        except AttributeError as error:
            raise ModelError(
                f"the model has no tensor '{name}'",
                place="spec.resized",
                cure="load the spec that was saved with this model",
            ) from error
        # Pruning only makes tensors smaller, so other shapes belong to another model.
        fits = len(shape) == old.dim() and all(
            0 < size <= most for size, most in zip(shape, old.shape, strict=True)
        )
        if not fits:
            raise ModelError(
                f"'{name}' of shape {tuple(old.shape)} cannot become {tuple(shape)}",
                place="spec.resized",
                cure="load the spec that was saved with this model",
            )
        # The values do not matter: the caller loads the tensors of the pruned model.
        new[name] = old.detach().new_zeros(tuple(shape))
        if isinstance(old, nn.Parameter):
            new[name] = nn.Parameter(new[name], old.requires_grad)
    replace_tensors_(model, new)


def shapes_that_differ(model: nn.Module, dense: nn.Module) -> dict[str, tuple[int, ...]]:
    """Returns name -> shape of every tensor of `model` that has another shape in `dense`."""
    old = {name: t.shape for name, t in dense.state_dict().items()}
    found = {}
    for name, value in model.state_dict().items():
        if name in old and value.shape != old[name]:
            found[name] = tuple(value.shape)
    return found


def set_numbers_of_spec_(model: nn.Module, numbers: Numbers) -> None:
    """Corrects sizes in the forward code of the model, such as the 4 in `view(n, 4, 8)`.

    Args:
        model: changed in place.
        numbers: the field `numbers` of the model's spec.

    Raises:
        ModelError: if the code of the model has no such number.
    """
    try:
        set_numbers_(model, numbers)
    except AttributeError as error:
        raise ModelError(
            str(error),
            place="spec.numbers",
            cure=(
                "load the spec that was saved with this model, and use the code that was pruned; "
                "or prune again"
            ),
        ) from error


def set_groups_of_spec_(model: nn.Module, groups: dict[str, int]) -> None:
    """Sets the number of groups of convolutions.

    Args:
        model: changed in place.
        groups: name of a convolution -> number of groups.

    Raises:
        ModelError: if there is no such convolution, or if the number is below 1 or does not divide
            the first axis of the convolution's weight.
    """
    modules = dict(model.named_modules())
    for name, count in groups.items():
        module = modules.get(name)
        if (
            not isinstance(module, nn.modules.conv._ConvNd)
            or count < 1
            or weight_shape(module)[0] % count
        ):
            raise ModelError(
                f"'{name}' cannot have {count} groups",
                place="spec.groups",
                cure="load the spec that was saved with this model",
            )
        set_groups_(module, count)


def what_pruning_changed(model: nn.Module, dense: nn.Module) -> dict[str, Any]:
    """Returns the fields `resized`, `numbers` and `groups` of the spec of a pruned `model`.

    `dense` is the same network before pruning.
    """
    old = _convolutions(dense)
    groups = {}
    for name, module in _convolutions(model).items():
        # A depthwise convolution has as many groups as channels, so its shape implies the number.
        if name in old and module.groups != old[name].groups and not is_depthwise(old[name]):
            groups[name] = module.groups
    return {
        "resized": shapes_that_differ(model, dense),
        "numbers": numbers_in(model),
        "groups": groups,
    }


# The base class covers transposed convolutions of all dimensions too.
def _convolutions(model: nn.Module) -> dict[str, nn.modules.conv._ConvNd]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.modules.conv._ConvNd)}
