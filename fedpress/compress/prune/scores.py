"""How much each channel matters: one row per score in `SCORES`.

Every score is a sum over all the tensors that are coupled in the channel, and is divided by the mean of its layer,
because layers of different width and depth have different scales and one threshold is to order them all. Scores from
data look at the weights that *read* the channel: batch norm's indifference to the scale of the weights that write it
would hide it there.

Two scores of weights have no row here. LAMP is a way to compare the layers of a network, and within one layer orders
channels as "l2" does; movement is summed up while a network trains. Both are in `fedpress.compress.sparse`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fedpress.compress.prune.derivatives import differentiable, gradient, hessian_gradient, mean
from fedpress.compress.prune.graph import ChannelGraph, ChannelGroup, Slice
from fedpress.core.random_source import Source, chance_of
from fedpress.errors import ModelError, RecipeError, suggestion

Losses = Callable[[], Iterable[Tensor]]
"""Runs the model over some batches and yields the loss of each, lazily: `lambda: (loss(model(x), y) for x, y in b)`."""


@dataclass(frozen=True)
class Evidence:
    """What a score may look at: the tensors by name, and for some scores the losses or a generator."""

    model: nn.Module
    tensors: Mapping[str, Tensor]
    losses: Losses | None = None
    generator: Source = None


@dataclass(frozen=True)
class Score:
    """A way to score channels: `of` gives one vector [channels] for each layer of the graph; the lowest go first.

    Attributes:
        of: takes the graph and the evidence.
        needs: what of the evidence it cannot do without: "losses", "generator", or None.
        single: whether each loss should be that of one example, because their squares are summed.
        scales: whether it looks at the scales of norms, which every layer must then have.
    """

    of: Callable[[ChannelGraph, Evidence], list[Tensor]]
    needs: str | None = None
    single: bool = False
    scales: bool = False


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Returns all parameters and buffers of `model` by name; a shared one has all its names."""
    named = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    return {name: tensor.detach() for name, tensor in named.items()}


@torch.no_grad()
def effective_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Returns `tensors_of(model)`, but for a weight that is computed from others the weight that really acts.

    The direction of a weight norm says nothing about the size of the weight. What is computed (by a parametrization,
    `weight_norm` or `torch.nn.utils.prune`) stands under the name of that original tensor that has its shape.
    """
    tensors = tensors_of(model)
    for name, module in model.named_modules(remove_duplicate=False):
        at = f"{name}." if name else ""
        computed: dict[str, Tensor] = {}
        if parametrize.is_parametrized(module):
            assert isinstance(module.parametrizations, nn.ModuleDict)
            for leaf, rule in module.parametrizations.items():
                computed |= {
                    f"parametrizations.{leaf}.{o}": getattr(module, leaf)
                    for o, _ in rule.named_parameters()
                }
        for hook in module._forward_pre_hooks.values():
            if hasattr(hook, "compute_weight"):  # torch.nn.utils.weight_norm and spectral_norm
                leaf = hook.name
                act = hook.compute_weight(
                    module, **({"do_power_iteration": False} if hasattr(hook, "eps") else {})
                )
                computed |= {f"{leaf}_{ending}": act for ending in ("v", "orig")}
            elif hasattr(hook, "apply_mask"):  # torch.nn.utils.prune
                computed[f"{hook._tensor_name}_orig"] = hook.apply_mask(module)
        for leaf, value in computed.items():
            if at + leaf in tensors and tensors[at + leaf].shape == value.shape:
                tensors[at + leaf] = value.detach()
    return tensors


def channel_sums(tensor: Tensor, where: Slice) -> Tensor:
    """Adds the values of `tensor` that belong to each channel of `where`; returns [channels]."""
    others = [d for d in range(tensor.dim()) if d != where.axis]
    line = tensor.sum(others) if others else tensor
    return line[where.index.to(line.device)].sum(1).cpu()


def l1(graph: ChannelGraph, evidence: Evidence) -> list[Tensor]:
    """Sum of |w| over the weights that write the channel (Li et al. 2017, section 3.1)."""
    return [_total(writers(group), evidence.tensors, Tensor.abs) for group in graph.groups]


def l2(graph: ChannelGraph, evidence: Evidence) -> list[Tensor]:
    """Euclidean norm of the weights that write the channel."""
    return [
        _total(writers(group), evidence.tensors, Tensor.square).sqrt() for group in graph.groups
    ]


def bn_scale(graph: ChannelGraph, evidence: Evidence) -> list[Tensor]:
    """Sum of |gamma| over the normalisations of the channel (Liu et al. 2017, network slimming).

    It means something after a training that pulled the scales to zero: `bn_penalty` of `train`.
    """
    for group in graph.groups:
        if not group.role("scale"):
            raise ModelError(
                f"the score 'bn_scale' needs a batch norm after '{group.name}', which has none",
                place="score",
                cure="use 'l1'",
            )
    return [_total(group.role("scale"), evidence.tensors, Tensor.abs) for group in graph.groups]


def fpgm(graph: ChannelGraph, evidence: Evidence) -> list[Tensor]:
    """Sum of the distances from the channel's writing weights to those of each other channel of its layer.

    The channel nearest to the geometric median of all can best be replaced by others, and goes first (He et al. 2019,
    arXiv:1811.00250, eq. 5): small weights alone are no reason.
    """
    scores = []
    for group in graph.groups:
        parts = [
            evidence.tensors[s.tensor].double().movedim(s.axis, 0)[s.index].flatten(1).cpu()
            for s in writers(group)
        ]
        filters = torch.cat(parts, 1)
        scores.append(torch.cdist(filters, filters).sum(1))
    return scores


def taylor(graph: ChannelGraph, evidence: Evidence) -> list[Tensor]:
    """Mean over batches of |sum w * dL/dw| over the weights that read the channel.

    That sum is exactly the derivative of the loss by a gate on the channel where it is read, so its size is the
    first-order change of the loss if the channel went (Molchanov et al. 2017). The model is in evaluation mode.
    """
    return mean([gate.abs() for gate in gates] for gates in _gates(graph, evidence, "taylor"))


def fisher(graph: ChannelGraph, evidence: Evidence) -> list[Tensor]:
    """Mean over losses of (sum w * dL/dw)^2 / 2: the second-order change of the loss if the channel went.

    The diagonal Fisher information of a gate on the channel stands for its second derivative (Theis et al. 2018,
    arXiv:1801.05787, eq. 6; with coupled layers Liu et al. 2021, arXiv:2108.00708). It is that of single examples if
    each loss is that of one example; of the losses of batches of n it takes about one n-th, besides the mean's square.
    """
    return mean(
        [gate.square() / 2 for gate in gates] for gates in _gates(graph, evidence, "fisher")
    )


def obd(graph: ChannelGraph, evidence: Evidence) -> list[Tensor]:
    """Sum over the reading weights of w^2 F / 2, with F the mean square of dL/dw of each weight by itself.

    Optimal Brain Damage (LeCun et al. 1990, eq. 5) with the diagonal Fisher for the Hessian: unlike "fisher" it takes
    the weights of a channel for independent of each other. About single examples the same holds as there.
    """
    read = [readers(group, evidence.model) for group in graph.groups]
    return mean(
        [_total(slices, effects, lambda effect: effect.square() / 2) for slices in read]
        for effects in _effects(graph, evidence, "obd")
    )


def snip(graph: ChannelGraph, evidence: Evidence) -> list[Tensor]:
    """|sum w * dL/dw| with the gradient of all batches together (Lee et al. 2019, arXiv:1810.02340, of a gate).

    For networks at their initialisation: norms take the statistics of the batch.
    """
    return [gate.abs() for gate in mean(_gates(graph, evidence, "snip", batch_statistics=True))]


def grasp(graph: ChannelGraph, evidence: Evidence) -> list[Tensor]:
    """Sum of w * (H g) over the reading weights: what the channel adds to the flow of gradients.

    Wang et al. 2020 (arXiv:2002.07376, eq. 8) take the negative and remove the highest. H g is that of each batch, and
    their mean is taken. For networks at their initialisation: norms take the statistics of the batch.
    """
    return mean(
        _gates(graph, evidence, "grasp", batch_statistics=True, derivative=hessian_gradient)
    )


def random(graph: ChannelGraph, evidence: Evidence) -> list[Tensor]:
    """Uniform numbers: the control that every other score has to beat."""
    assert evidence.generator is not None
    chance = chance_of(evidence.generator)
    return [chance.uniform(group.channels, dtype=torch.float32) for group in graph.groups]


SCORES: dict[str, Score] = {
    "l1": Score(l1),
    "l2": Score(l2),
    "fpgm": Score(fpgm),
    "bn_scale": Score(bn_scale, scales=True),
    "taylor": Score(taylor, needs="losses"),
    "fisher": Score(fisher, needs="losses", single=True),
    "obd": Score(obd, needs="losses", single=True),
    "snip": Score(snip, needs="losses"),
    "grasp": Score(grasp, needs="losses"),
    "random": Score(random, needs="generator"),
}


def score(
    model: nn.Module,
    graph: ChannelGraph,
    score: str,
    *,
    losses: Losses | None = None,
    generator: Source = None,
) -> list[Tensor]:
    """Scores every channel: one vector [channels] per layer of `graph`, with mean 1; the least important is lowest.

    Args:
        model: the traced model; unchanged.
        graph: its channels.
        score: a row of `SCORES`.
        losses: for the scores that need them.
        generator: for "random".

    Raises:
        RecipeError: if there is no such score.
        ModelError: if the model or the arguments lack what the score needs, or a score is not finite.
    """
    return [
        relative(v) for v in raw_scores(model, graph, score, losses=losses, generator=generator)
    ]


def raw_scores(
    model: nn.Module,
    graph: ChannelGraph,
    score: str,
    *,
    losses: Losses | None = None,
    generator: Source = None,
) -> list[Tensor]:
    """Scores like `score`, before the division by the mean of each layer."""
    if score not in SCORES:
        raise RecipeError(
            f"no such score '{score}'",
            place="score",
            cure=suggestion(score, list(SCORES), f"use one of {', '.join(SCORES)}"),
        )
    row, evidence = SCORES[score], Evidence(model, effective_tensors(model), losses, generator)
    if row.needs == "losses" and losses is None:
        raise ModelError(
            f"the score '{score}' needs `losses`, the loss on some batches",
            place="losses",
            cure="give them or use 'l1'",
        )
    if row.needs == "generator" and generator is None:
        raise ModelError(
            f"the score '{score}' needs a `generator`",
            place="generator",
            cure="give a torch.Generator",
        )
    raw = row.of(graph, evidence)
    for group, values in zip(graph.groups, raw, strict=True):
        if not values.isfinite().all():
            raise ModelError(
                f"the score '{score}' of '{group.name}' is not finite",
                place="model",
                cure="prune a model whose training went well",
            )
    return raw


def relative(values: Tensor) -> Tensor:
    """Divides the scores of a layer [channels] by the mean of their sizes; scores that are all zero stay zero.

    >>> relative(torch.tensor([1.0, 3.0]))
    tensor([0.5000, 1.5000])
    """
    mean_size = values.abs().mean()
    return values / mean_size if mean_size > 0 else values


def writers(group: ChannelGroup) -> Sequence[Slice]:
    """Returns the slices of the weights that compute the channels; all slices where no weight does."""
    return group.role("write") or group.slices


def readers(group: ChannelGroup, model: nn.Module) -> Sequence[Slice]:
    """Returns the slices of the parameters that sum over the channels, or else of those that compute them."""
    trained = dict(model.named_parameters(remove_duplicate=False))
    for slices in (group.role("read"), group.role("write"), group.slices):
        if owned := [s for s in slices if s.tensor in trained]:
            return owned
    raise ModelError(
        f"no parameter has to do with the channels of '{group.name}'",
        place="score",
        cure="use a score of magnitudes, 'l1'",
    )


def _gates(
    graph: ChannelGraph,
    evidence: Evidence,
    name: str,
    *,
    batch_statistics: bool = False,
    derivative: Callable[[Tensor, Sequence[Tensor]], list[Tensor]] = gradient,
) -> Iterator[list[Tensor]]:
    """Yields for each loss the sum of w * derivative over the weights that read each channel."""
    read = [readers(group, evidence.model) for group in graph.groups]
    for effects in _effects(
        graph, evidence, name, batch_statistics=batch_statistics, derivative=derivative
    ):
        yield [_total(slices, effects) for slices in read]


def _effects(
    graph: ChannelGraph,
    evidence: Evidence,
    name: str,
    *,
    batch_statistics: bool = False,
    derivative: Callable[[Tensor, Sequence[Tensor]], list[Tensor]] = gradient,
) -> Iterator[dict[str, Tensor]]:
    """Yields for each loss w * derivative, entry by entry, of the weights that read channels, by name.

    Of a weight that is computed from others these are the others: they are what a cut sets to zero.
    """
    assert evidence.losses is not None
    owned = dict(evidence.model.named_parameters(remove_duplicate=False))
    weights = {
        s.tensor: owned[s.tensor] for group in graph.groups for s in readers(group, evidence.model)
    }
    count = 0
    with differentiable(evidence.model, list(weights.values()), batch_statistics=batch_statistics):
        for loss in evidence.losses():
            slopes = derivative(loss, list(weights.values()))
            yield {n: w.detach() * g for (n, w), g in zip(weights.items(), slopes, strict=True)}
            count += 1
    if not count:
        raise ModelError(
            f"the score '{name}' was given no batches", place="losses", cure="give at least one"
        )


def _total(
    slices: Iterable[Slice],
    tensors: Mapping[str, Tensor],
    of: Callable[[Tensor], Tensor] = Tensor.float,
) -> Tensor:
    return torch.stack([channel_sums(of(tensors[s.tensor].float()), s) for s in slices]).sum(0)
