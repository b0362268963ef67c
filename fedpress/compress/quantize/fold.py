"""Folds batch norms: multiplies each into the weights of the convolution or linear layer before it.

`find_folds` finds the pairs of norm and layer in the graph of a model; `fold_` changes the weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fedpress.compress.prune.graph import capture
from fedpress.compress.prune.ignoring import ignored_names
from fedpress.core.inputs import Example, positional
from fedpress.errors import ModelError
from fedpress.nn.batch_norm import BatchNorm
from fedpress.nn.folded import apply_folds_
from fedpress.nn.quant_scheme import fill_zero_scales
from fedpress.nn.quantized import QuantLayer, materialize_

# The operations into whose weights a batch norm can be multiplied.
FOLDED_INTO = {
    torch.ops.aten.linear.default,
    torch.ops.aten.conv1d.default,
    torch.ops.aten.conv2d.default,
    torch.ops.aten.conv3d.default,
    torch.ops.aten.conv1d.padding,
    torch.ops.aten.conv2d.padding,
    torch.ops.aten.conv3d.padding,
}

PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
"""Batch norms with torch's own forward."""


def find_folds(
    model: nn.Module, example: Example, *, ignore: Sequence[str] = ()
) -> tuple[dict[str, str], dict[str, str]]:
    """Finds the batch norms that can be folded into the convolution or linear layer before them.

    Args:
        model: the model, which is not changed.
        example: an input of the model.
        ignore: names or patterns of modules; norms and layers among these are left as they are.

    Returns:
        Two dictionaries: name of each batch norm that can be folded -> name of its layer, and name
        of each other batch norm -> why it cannot be folded.

    Raises:
        ModelError: if `torch.export` cannot capture the model's graph.
        RecipeError: if a pattern of `ignore` matches nothing.
    """
    norms = {}
    for n, m in model.named_modules():
        if isinstance(m, BatchNorm):
            norms[n] = m
    if not norms:
        return {}, {}
    unchanged = ignored_names(model, ignore)
    program = capture(model, positional(model, example))
    owned = {
        **program.graph_signature.inputs_to_parameters,
        **program.graph_signature.inputs_to_buffers,
    }

    folds: dict[str, str] = {}
    left: dict[str, str] = {}
    for name, node in _calls(program.graph, norms, owned):
        layer, reason = _layer_before(model, norms[name], name, node, owned)
        # Folding changes the weights of the layer too, so `ignore` may name either of them.
        if name in unchanged or layer in unchanged:
            reason = "asked for by `ignore`"
        if reason is None:
            folds[name] = layer
        else:
            left[name] = reason

    for name in norms:
        if name not in folds and name not in left:
            left[name] = "forward does not use it, or it has no running statistics"
    # A norm that is called twice may be in both dictionaries: then it cannot be folded.
    for name in left:
        folds.pop(name, None)
    return folds, left


def _calls(
    graph: fx.Graph, norms: Mapping[str, nn.Module], owned: Mapping[str, str]
) -> Iterator[tuple[str, Any]]:
    """Yields (name of the batch norm, node) for each batch norm that uses running statistics."""
    for node in graph.nodes:
        if node.target is not torch.ops.aten.batch_norm.default:
            continue
        # The arguments are (input, weight, bias, running mean, running variance, ...).
        name = _owner(node.args[3], owned)
        if name is not None and name in norms:
            yield name, node


def _layer_before(
    model: nn.Module, norm: nn.Module, name: str, node: fx.Node, owned: Mapping[str, str]
) -> tuple[str, str | None]:
    """Returns (layer to fold into, None), or ("", why the batch norm cannot be folded)."""
    before: Any = node.args[0]
    reason = _why_norm_stays(norm, name, node)
    if reason is None:
        reason = _why_not_into(model, node, before, owned)
    if reason is not None:
        return "", reason
    return str(_owner(before.args[1], owned)), None


def _owner(node: object, owned: Mapping[str, str]) -> str | None:
    """Returns the name of the module that holds the tensor `node`; None for a computed tensor."""
    if not isinstance(node, fx.Node) or node.name not in owned:
        return None
    return owned[node.name].rpartition(".")[0]


def _why_norm_stays(module: nn.Module, name: str, norm: fx.Node) -> str | None:
    """Returns why a batch norm cannot be replaced by an identity; None if it can."""
    # A subclass may compute something else in its forward.
    if type(module) not in PLAIN:
        return f"{type(module).__name__} may do more than a batch norm"
    if module._forward_hooks or module._forward_pre_hooks:
        return "it has a hook, which would be lost"
    tensors = []
    # Weight, bias, running mean and running variance.
    for argument in norm.args[1:5]:
        if isinstance(argument, fx.Node):
            tensors.append(argument)
    if _caller(norm) != name or any(len(tensor.users) > 1 for tensor in tensors):
        return "something else uses its statistics or parameters"
    return None


def _caller(node: fx.Node) -> str:
    """Returns the name of the module whose forward runs the operation."""
    stack = node.meta.get("nn_module_stack", {})
    if not stack:
        return ""
    # The innermost module is the last on the stack.
    name: str = list(stack.values())[-1][0]
    return name


def _why_not_into(
    model: nn.Module, norm: fx.Node, before: fx.Node, owned: Mapping[str, str]
) -> str | None:
    """Returns why a batch norm cannot be folded into the operation `before` it, or None."""
    if before.target not in FOLDED_INTO:
        return f"the operation before it is {before.target}, not a convolution or linear layer"
    # Another operation that uses the output needs it without the norm.
    if len(before.users) > 1:
        return "something else uses the output of the same layer"

    name = _owner(before.args[1], owned)
    if name is None:
        return "the layer before it computes its weight from other tensors"
    tensors = (before.args[1], norm.args[3])
    if any(isinstance(tensor, fx.Node) and len(tensor.users) > 1 for tensor in tensors):
        return f"it, or '{name}' before it, is used more than once"
    if _caller(before) != name:
        return f"something else uses the weight of '{name}'"
    reason = _why_not_bias(model, before, name, owned)
    if reason is not None:
        return reason
    # For [n, tokens, channels] torch's batch norm normalises axis 1, the tokens.
    if before.target is torch.ops.aten.linear.default and before.meta["val"].dim() != 2:
        return "it normalises another axis than the linear layer writes"

    layer = model.get_submodule(name)
    # The spec in a saved file has one name for each layer.
    names = []
    for n, m in model.named_modules(remove_duplicate=False):
        if m is layer:
            names.append(n)
    return f"'{name}' has several names" if len(names) > 1 else None


def _why_not_bias(
    model: nn.Module, before: fx.Node, name: str, owned: Mapping[str, str]
) -> str | None:
    """Returns why the bias of layer `name` cannot include the norm's shift; None if it can."""
    bias = before.args[2] if len(before.args) > 2 else None
    if not isinstance(bias, fx.Node):
        return None
    if _owner(bias, owned) is None:
        return "the layer before it computes its bias from other tensors"
    own = model.get_submodule(name)._parameters.get("bias")
    owners = []
    for n, p in model.named_parameters(remove_duplicate=False):
        if p is own:
            owners.append(n)
    if len(bias.users) > 1 or len(owners) > 1:
        return f"something else uses the bias of '{name}'"
    return None


@torch.no_grad()
def fold_(model: nn.Module, folds: Mapping[str, str]) -> None:
    """Multiplies batch norms into their layers and replaces the norms by identities.

    A layer then gives the outputs that layer and norm gave together in evaluation mode. The weights
    of a quantized layer are rounded first (`materialize_`). Then each scale is multiplied by the
    absolute value of the norm's factor, so the codes (the integers of the weights) stay the same. A
    negative factor changes the sign of the codes, and a factor of 0 makes them 0.

    Args:
        model: changed in place.
        folds: batch norm -> layer, from `find_folds`.

    Raises:
        ModelError: if a layer has a codebook, or the factor or shift of a norm is not finite.
    """
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for norm, into in folds.items():
        factors[norm] = _affine(norm, model.get_submodule(norm))
        if _weights_of(model.get_submodule(into)) == "codebook":
            raise ModelError(
                f"the channels of '{into}' share a codebook, but its batch norm would scale each "
                "channel differently",
                place="model",
                cure="fold the batch norm before the layer is quantized",
            )
    # `apply_folds_` gives every layer a bias, so the present biases are read before it.
    biases = {}
    for norm, into in folds.items():
        biases[norm] = getattr(model.get_submodule(into), "bias", None)
    apply_folds_(model, folds)
    for norm, into in folds.items():
        layer = model.get_submodule(into)
        factor, shift = factors[norm]
        assert isinstance(layer.bias, Tensor)
        _scale_weight_(layer, factor)
        old = biases[norm]
        layer.bias.copy_(shift if old is None else old.double() * factor + shift)


def _weights_of(layer: nn.Module) -> str | None:
    """Returns the kind of a layer's quantized weights; None if they are float."""
    quantization = layer.scheme.weights if isinstance(layer, QuantLayer) else None
    return None if quantization is None else quantization.kind


def _scale_weight_(layer: nn.Module, factor: Tensor) -> None:
    """Multiplies each output channel of a layer's weight by `factor` [out].

    The scales of a quantized layer are multiplied by |factor|.
    """
    assert isinstance(layer.weight, Tensor)
    materialize_(layer)
    # float64, so that folding adds only one rounding.
    layer.weight.copy_(layer.weight.double() * factor.view(-1, *[1] * (layer.weight.dim() - 1)))
    if isinstance(layer, QuantLayer) and layer.scheme.weights is not None:
        # A scale is positive; the sign is in the weights, and so in the codes.
        rows = factor.abs().view(-1, *[1] * (layer.weight_scale.dim() - 1))
        scale = layer.weight_scale.double() * rows
        has_zero = layer.scheme.weights.has_zero
        layer.weight_scale.copy_(fill_zero_scales(scale) if has_zero else scale)
        materialize_(layer)


def _affine(name: str, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Returns factor and shift [channels], float64, of a batch norm in evaluation mode."""
    assert isinstance(norm, BatchNorm)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    factor = (norm.running_var.double() + norm.eps).rsqrt()
    shift = -norm.running_mean.double() * factor
    if norm.affine:
        factor = factor * norm.weight.double()
        shift = shift * norm.weight.double() + norm.bias.double()
    if not (factor.isfinite() & shift.isfinite()).all():
        raise ModelError(
            f"'{name}' has NaN or infinite numbers",
            place="model",
            cure="load a checkpoint from before training broke",
        )
    return factor, shift
