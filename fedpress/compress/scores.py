"""How much each channel matters: one row per score in `SCORES`.

Every score is a sum over all the tensors that are coupled in the channel, and is divided by the mean of its layer,
because layers of different width and depth have different scales and one threshold is to order them all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedpress.compress.graph import ChannelGraph, Slice
from fedpress.errors import ModelError, RecipeError, did_you_mean

Losses = Callable[[], Iterable[Tensor]]
"""Runs the model over some batches and yields the loss of each, lazily: `lambda: (loss(model(x), y) for x, y in b)`."""


@dataclass(frozen=True)
class Evidence:
    """What a score may look at: the tensors by name, and for some scores the losses or a generator."""

    model: nn.Module
    tensors: Mapping[str, Tensor]
    losses: Losses | None = None
    generator: torch.Generator | None = None


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Returns all parameters and buffers of `model` by name; a shared one has all its names."""
    named = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    return {name: tensor.detach() for name, tensor in named.items()}


def channel_sums(tensor: Tensor, where: Slice) -> Tensor:
    """Adds the values of `tensor` that belong to each channel of `where`; returns [channels]."""
    others = [d for d in range(tensor.dim()) if d != where.axis]
    line = tensor.sum(others) if others else tensor
    return line[where.index.to(line.device)].sum(1).cpu()


def l1(graph: ChannelGraph, see: Evidence) -> list[Tensor]:
    """Sum of |w| over the weights that write the channel (Li et al. 2017, section 3.1)."""
    return [
        _total(layer.role("write"), {s.tensor: see.tensors[s.tensor].abs() for s in layer.slices})
        for layer in graph.layers
    ]


def l2(graph: ChannelGraph, see: Evidence) -> list[Tensor]:
    """Euclidean norm of the weights that write the channel."""
    squares = {s.tensor: see.tensors[s.tensor].square() for layer in graph.layers for s in layer.role("write")}
    return [_total(layer.role("write"), squares).sqrt() for layer in graph.layers]


def bn_scale(graph: ChannelGraph, see: Evidence) -> list[Tensor]:
    """Sum of |gamma| over the normalisations of the channel (Liu et al. 2017, network slimming)."""
    for layer in graph.layers:
        if not layer.role("scale"):
            raise ModelError(f"the score 'bn_scale' needs a batch norm after '{layer.name}', which has none; use 'l1'")
    return [
        _total(layer.role("scale"), {s.tensor: see.tensors[s.tensor].abs() for s in layer.slices})
        for layer in graph.layers
    ]


def taylor(graph: ChannelGraph, see: Evidence) -> list[Tensor]:
    """Mean over batches of |sum w * dL/dw| over the weights that read the channel.

    That sum is exactly the derivative of the loss by a gate on the channel where it is read, so its size is the
    first-order change of the loss if the channel went (Molchanov et al. 2017). Taken over the *reading* weights,
    batch norm's indifference to the scale of the writing weights does not hide it. The model is in evaluation mode.
    """
    if see.losses is None:
        raise ModelError("the score 'taylor' needs `losses`, the loss on some batches; give them or use 'l1'")
    where = [layer.role("read") or layer.role("write") for layer in graph.layers]
    owned = dict(see.model.named_parameters(remove_duplicate=False))
    weights = {s.tensor: owned[s.tensor] for slices in where for s in slices}
    trained = {name: w.requires_grad for name, w in weights.items()}
    modes = {module: module.training for module in see.model.modules()}
    totals, count = [torch.zeros(layer.channels) for layer in graph.layers], 0
    try:
        see.model.eval()
        for weight in weights.values():
            weight.requires_grad_(True)
        for loss in see.losses():
            grads = torch.autograd.grad(loss, list(weights.values()), materialize_grads=True)
            change = {n: w.detach() * g for (n, w), g in zip(weights.items(), grads, strict=True)}
            totals = [t + _total(slices, change).abs() for t, slices in zip(totals, where, strict=True)]
            count += 1
    finally:
        for name, weight in weights.items():
            weight.requires_grad_(trained[name])
        for module, mode in modes.items():
            module.training = mode
    if not count:
        raise ModelError("the score 'taylor' was given no batches; give at least one")
    return [t / count for t in totals]


def random(graph: ChannelGraph, see: Evidence) -> list[Tensor]:
    """Uniform numbers: the control that every other score has to beat."""
    if see.generator is None:
        raise ModelError("the score 'random' needs a `generator`; take one from fedpress.seeds")
    return [torch.rand(layer.channels, generator=see.generator) for layer in graph.layers]


SCORES: dict[str, Callable[[ChannelGraph, Evidence], list[Tensor]]] = {
    "l1": l1,
    "l2": l2,
    "taylor": taylor,
    "bn_scale": bn_scale,
    "random": random,
}


def score(
    model: nn.Module,
    graph: ChannelGraph,
    name: str,
    *,
    losses: Losses | None = None,
    generator: torch.Generator | None = None,
) -> list[Tensor]:
    """Scores every channel: one vector [channels] per layer of `graph`, with mean 1; the least important is lowest.

    Args:
        model: the traced model; unchanged.
        graph: its channels.
        name: a row of `SCORES`.
        losses: for "taylor".
        generator: for "random".

    Raises:
        RecipeError: if there is no such score.
        ModelError: if the model or the arguments lack what the score needs, or a score is not finite.
    """
    return [relative(v) for v in raw_scores(model, graph, name, losses=losses, generator=generator)]


def raw_scores(
    model: nn.Module,
    graph: ChannelGraph,
    name: str,
    *,
    losses: Losses | None = None,
    generator: torch.Generator | None = None,
) -> list[Tensor]:
    """Scores like `score`, before the division by the mean of each layer."""
    if name not in SCORES:
        hint = did_you_mean(name, list(SCORES))
        raise RecipeError(f"prune.score: no such score '{name}'{hint}; use one of {', '.join(SCORES)}")
    raw = SCORES[name](graph, Evidence(model, tensors_of(model), losses, generator))
    for layer, values in zip(graph.layers, raw, strict=True):
        if not values.isfinite().all():
            raise ModelError(
                f"the score '{name}' of '{layer.name}' is not finite; prune a model whose training went well"
            )
    return raw


def relative(values: Tensor) -> Tensor:
    """Divides the scores of a layer [channels] by their mean; scores that are all zero stay zero.

    >>> relative(torch.tensor([1.0, 3.0]))
    tensor([0.5000, 1.5000])
    """
    mean = values.mean()
    return values / mean if mean > 0 else values


def _total(slices: Iterable[Slice], tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([channel_sums(tensors[s.tensor].float(), s) for s in slices]).sum(0)
