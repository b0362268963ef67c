"""Scores the channels of a network; the channels with the lowest scores are pruned first.

`SCORES` has a row for each score. A score is computed from the tensors that hold the channel, in
most rows as a sum over their entries. It is divided by the mean of its layer, because one threshold
is applied to all layers, and layers of different width and depth have different scales.

A weight that computes a channel *writes* it; a weight that sums over the channel *reads* it. Scores
with gradients use the weights that read the channel: if a batch norm follows the weights that write
the channel, the loss does not depend on the scale of these weights.

`fedpress.compress.sparse` scores single weights. Two of its scores are missing here: LAMP would
order the channels of a layer as "l2" does, and movement is accumulated while a network trains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedpress.compress.prune.derivatives import (
    differentiable,
    gradient,
    hessian_gradient,
    mean_over_batches,
)
from fedpress.compress.prune.graph import ChannelGraph, ChannelGroup, ChannelSlice
from fedpress.compress.prune.tensors import effective_tensors
from fedpress.core.random_source import Source, as_random_source
from fedpress.errors import ModelError, RecipeError, suggestion

Losses = Callable[[], Iterable[Tensor]]
"""Yields the loss of each batch, lazily: `lambda: (loss(model(x), y) for x, y in batches)`."""


@dataclass(frozen=True)
class ScoreInputs:
    """The arguments of a score function.

    Attributes:
        model: the traced model.
        tensors: all parameters and buffers by name, as the forward pass uses them.
        losses: function that yields the loss of each batch, for scores with gradients.
        generator: source of random numbers, for "random".
    """

    model: nn.Module
    tensors: Mapping[str, Tensor]
    losses: Losses | None = None
    generator: Source = None


@dataclass(frozen=True)
class Score:
    """A row of `SCORES`: a function that scores channels, and what it needs.

    Attributes:
        function: returns one vector [channels] for each layer of the graph.
        needs: "losses" or "generator" if that argument is required, else None.
        per_example: whether each loss should be that of a single example, because squared gradients
            of examples are averaged.
        needs_scales: whether every layer must be followed by a norm with a scale per channel.
    """

    function: Callable[[ChannelGraph, ScoreInputs], list[Tensor]]
    needs: str | None = None
    per_example: bool = False
    needs_scales: bool = False


def channel_sums(tensor: Tensor, where: ChannelSlice) -> Tensor:
    """Returns the sum of `tensor` over the entries of each channel of `where`: [channels]."""
    others = []
    for d in range(tensor.dim()):
        if d != where.axis:
            others.append(d)
    per_index = tensor.sum(others) if others else tensor
    return per_index[where.index.to(per_index.device)].sum(1).cpu()


def l1(graph: ChannelGraph, inputs: ScoreInputs) -> list[Tensor]:
    """Scores by the sum of |w| over the weights that write the channel.

    Li et al. 2017, section 3.1.
    """
    return _total_by_layer(graph, inputs, writers, Tensor.abs)


def l2(graph: ChannelGraph, inputs: ScoreInputs) -> list[Tensor]:
    """Scores by the Euclidean norm of the weights that write the channel."""
    # Squares are summed over all tensors of the channel, and the root is taken once.
    squares = _total_by_layer(graph, inputs, writers, Tensor.square)
    return [total.sqrt() for total in squares]


def bn_scale(graph: ChannelGraph, inputs: ScoreInputs) -> list[Tensor]:
    """Scores by the sum of |gamma| over the channel's batch norms (gamma is the norm's scale).

    Network slimming, Liu et al. 2017. Train with `bn_penalty` first, an L1 penalty that makes
    unimportant scales small; without the penalty the scales say little about a channel.
    """
    for group in graph.groups:
        # Without a scale the channel would have the score 0 and be pruned first.
        if not group.slices_with_role("scale"):
            raise ModelError(
                f"the score 'bn_scale' needs a batch norm after '{group.name}', which has none",
                place="score",
                cure="use 'l1'",
            )
    return _total_by_layer(graph, inputs, lambda group: group.slices_with_role("scale"), Tensor.abs)


def fpgm(graph: ChannelGraph, inputs: ScoreInputs) -> list[Tensor]:
    """Scores by the sum of distances between the channel's filter and the layer's other filters.

    A filter is the weights that write a channel. The filter nearest to the geometric median of all
    filters is pruned first, because the other filters can replace it best (He et al. 2019,
    arXiv:1811.00250, eq. 5). A channel with small weights may have a high score.
    """
    scores = []
    for group in graph.groups:
        parts = []
        for s in writers(group):
            by_index = inputs.tensors[s.tensor].double().movedim(s.axis, 0)
            parts.append(by_index[s.index].flatten(1).cpu())
        # A channel that several layers write is compared by all of its weights.
        filters = torch.cat(parts, 1)
        # float64, because the distances of similar filters are differences of large numbers.
        scores.append(torch.cdist(filters, filters).sum(1))
    return scores


def taylor(graph: ChannelGraph, inputs: ScoreInputs) -> list[Tensor]:
    """Scores by the mean over batches of |sum of w * dL/dw over the weights that read the channel|.

    The sum is the derivative of the loss with respect to a factor (gate) on the channel. Its
    absolute value is the first-order estimate of the change of the loss if the channel is removed
    (Molchanov et al. 2017). The model is in evaluation mode.
    """
    batches = _gate_derivatives(graph, inputs, "taylor")
    return mean_over_batches(_of_each(batches, Tensor.abs))


def fisher(graph: ChannelGraph, inputs: ScoreInputs) -> list[Tensor]:
    """Scores by the mean over losses of (sum of w * dL/dw)^2 / 2.

    The sum is over the weights that read the channel. This is a second-order estimate of the change
    of the loss if the channel is removed: the Fisher information estimates the second derivative
    with respect to a gate on the channel (Theis et al. 2018, arXiv:1801.05787, eq. 6; with coupled
    layers Liu et al. 2021, arXiv:2108.00708). Each loss should be the loss of one example: the mean
    gradient of n examples has a variance that is n times smaller, so the score would be smaller
    too.
    """
    batches = _gate_derivatives(graph, inputs, "fisher")
    return mean_over_batches(_of_each(batches, lambda gate: gate.square() / 2))


def obd(graph: ChannelGraph, inputs: ScoreInputs) -> list[Tensor]:
    """Scores by the sum of w^2 F / 2 over the weights that read the channel.

    F is the mean square of dL/dw. Optimal Brain Damage (LeCun et al. 1990, eq. 5) with the diagonal
    Fisher information in place of the Hessian. Unlike "fisher", this score assumes that the weights
    of a channel are independent. Each loss should be the loss of one example.
    """
    read = [readers(group, inputs.model) for group in graph.groups]

    def batches() -> Iterator[list[Tensor]]:
        for products in _weight_times_derivative(graph, inputs, "obd"):
            halves = {}
            for name, product in products.items():
                halves[name] = product.float().square() / 2
            yield [_total(slices, halves) for slices in read]

    return mean_over_batches(batches())


def snip(graph: ChannelGraph, inputs: ScoreInputs) -> list[Tensor]:
    """Scores by |sum of w * dL/dw| with the mean gradient of all batches (SNIP).

    The sum is over the weights that read the channel. This is the connection sensitivity of Lee et
    al. 2019 (arXiv:1810.02340), for a gate on the channel. The score is meant for networks at their
    initialisation, so norms use the statistics of the batch.
    """
    batches = _gate_derivatives(graph, inputs, "snip", batch_statistics=True)
    return [gate.abs() for gate in mean_over_batches(batches)]


def grasp(graph: ChannelGraph, inputs: ScoreInputs) -> list[Tensor]:
    """Scores by the mean over batches of the sum of w * (H g) (GraSP).

    The sum is over the weights that read the channel; g is the gradient and H the Hessian. The
    score estimates how much the channel adds to the norm of the gradient. Wang et al. 2020
    (arXiv:2002.07376, eq. 8) use the negative of this score and remove the highest. The score is
    meant for networks at their initialisation, so norms use the statistics of the batch.
    """
    gates = _gate_derivatives(
        graph, inputs, "grasp", batch_statistics=True, derivative=hessian_gradient
    )
    return mean_over_batches(gates)


def random(graph: ChannelGraph, inputs: ScoreInputs) -> list[Tensor]:
    """Scores by uniform random numbers, as a baseline for all other scores."""
    # `raw_scores` has checked that there is a generator.
    assert inputs.generator is not None
    chance = as_random_source(inputs.generator)
    return [chance.uniform(group.channels, dtype=torch.float32) for group in graph.groups]


SCORES: dict[str, Score] = {
    "l1": Score(l1),
    "l2": Score(l2),
    "fpgm": Score(fpgm),
    "bn_scale": Score(bn_scale, needs_scales=True),
    "taylor": Score(taylor, needs="losses"),
    "fisher": Score(fisher, needs="losses", per_example=True),
    "obd": Score(obd, needs="losses", per_example=True),
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
    """Returns one vector [channels] of scores per layer; unimportant channels have low scores.

    The mean absolute score of each layer is 1.

    Args:
        model: the traced model; unchanged.
        graph: its channels.
        score: a key of `SCORES`, such as "l1".
        losses: function that yields the loss of each batch, for the scores with gradients.
        generator: source of random numbers, for "random".

    Raises:
        RecipeError: if there is no such score.
        ModelError: if an argument, batch norm or parameter that the score needs is missing, if
            `losses` yields nothing, or if a score is not finite.
    """
    raw = raw_scores(model, graph, score, losses=losses, generator=generator)
    return [divided_by_mean(values) for values in raw]


def raw_scores(
    model: nn.Module,
    graph: ChannelGraph,
    score: str,
    *,
    losses: Losses | None = None,
    generator: Source = None,
) -> list[Tensor]:
    """Returns the scores before they are divided by the mean of each layer; see `score`."""
    if score not in SCORES:
        raise RecipeError(
            f"no such score '{score}'",
            place="score",
            cure=suggestion(score, list(SCORES), f"use one of {', '.join(SCORES)}"),
        )
    row = SCORES[score]

    # Checked before any work: a score with gradients may take minutes.
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
    inputs = ScoreInputs(model, effective_tensors(model), losses, generator)

    raw = row.function(graph, inputs)
    for group, values in zip(graph.groups, raw, strict=True):
        # A NaN would sort before or after all others, and the plan would look valid.
        if not values.isfinite().all():
            raise ModelError(
                f"the score '{score}' of '{group.name}' is not finite",
                place="model",
                cure="prune a model whose training went well",
            )
    return raw


def divided_by_mean(values: Tensor) -> Tensor:
    """Divides a layer's scores [channels] by their mean absolute value; zeros stay zeros.

    >>> divided_by_mean(torch.tensor([1.0, 3.0]))
    tensor([0.5000, 1.5000])
    """
    # Some scores are negative, and the mean of the values themselves could be 0.
    mean_size = values.abs().mean()
    return values / mean_size if mean_size > 0 else values


def writers(group: ChannelGroup) -> Sequence[ChannelSlice]:
    """Returns the slices of weights that compute the channels; all slices if no weight does."""
    return group.slices_with_role("write") or group.slices


def readers(group: ChannelGroup, model: nn.Module) -> Sequence[ChannelSlice]:
    """Returns the slices of parameters that read the channels.

    If no parameter reads them, it returns the slices of those that write them; if none writes them
    either, the slices of all parameters that hold them.

    Raises:
        ModelError: if no parameter holds the channels.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for slices in (group.slices_with_role("read"), group.slices_with_role("write"), group.slices):
        found = []
        for s in slices:
            # Buffers, such as running means, have no gradient.
            if s.tensor in parameters:
                found.append(s)
        if found:
            return found
    raise ModelError(
        f"no parameter holds the channels of '{group.name}'",
        place="score",
        cure="use a score of magnitudes, 'l1'",
    )


def _total_by_layer(
    graph: ChannelGraph,
    inputs: ScoreInputs,
    slices_of: Callable[[ChannelGroup], Iterable[ChannelSlice]],
    function: Callable[[Tensor], Tensor],
) -> list[Tensor]:
    """Returns for each layer the sum of `function` of the entries of its channels' slices."""
    return [_total(slices_of(group), inputs.tensors, function) for group in graph.groups]


def _of_each(
    batches: Iterable[Sequence[Tensor]], function: Callable[[Tensor], Tensor]
) -> Iterator[list[Tensor]]:
    """Yields `function` of each tensor of each batch."""
    for values in batches:
        yield [function(value) for value in values]


def _gate_derivatives(
    graph: ChannelGraph,
    inputs: ScoreInputs,
    name: str,
    *,
    batch_statistics: bool = False,
    derivative: Callable[[Tensor, Sequence[Tensor]], list[Tensor]] = gradient,
) -> Iterator[list[Tensor]]:
    """Yields for each loss the sum of w * derivative over the weights that read each channel.

    With the gradient this is d loss / dt at t = 1, where a gate t multiplies these weights.
    """
    read = [readers(group, inputs.model) for group in graph.groups]
    every_loss = _weight_times_derivative(
        graph, inputs, name, batch_statistics=batch_statistics, derivative=derivative
    )
    for products in every_loss:
        yield [_total(slices, products) for slices in read]


def _weight_times_derivative(
    graph: ChannelGraph,
    inputs: ScoreInputs,
    name: str,
    *,
    batch_statistics: bool = False,
    derivative: Callable[[Tensor, Sequence[Tensor]], list[Tensor]] = gradient,
) -> Iterator[dict[str, Tensor]]:
    """Yields for each loss the products w * derivative, by name of the parameter w.

    The parameters are those that read channels. If a weight is computed from parameters (weight
    norm), the products are of these parameters, because pruning removes parts of them.
    """
    assert inputs.losses is not None
    parameters = dict(inputs.model.named_parameters(remove_duplicate=False))
    names: list[str] = []
    for group in graph.groups:
        names += [s.tensor for s in readers(group, inputs.model)]
    # A tensor that several groups read is differentiated once.
    names = list(dict.fromkeys(names))
    weights = [parameters[each] for each in names]

    is_empty = True
    with differentiable(inputs.model, weights, batch_statistics=batch_statistics):
        for loss in inputs.losses():
            derivatives = derivative(loss, weights)
            products = []
            for w, d in zip(weights, derivatives, strict=True):
                products.append(w.detach() * d)
            yield dict(zip(names, products, strict=True))
            # The losses are lazy: only the loop tells whether there are any.
            is_empty = False
    if is_empty:
        raise ModelError(
            f"the score '{name}' was given no batches", place="losses", cure="give at least one"
        )


def _total(
    slices: Iterable[ChannelSlice],
    tensors: Mapping[str, Tensor],
    function: Callable[[Tensor], Tensor] = Tensor.float,
) -> Tensor:
    """Returns for each channel the sum of `function(entry)` over all its slices: [channels]."""
    sums = []
    for s in slices:
        sums.append(channel_sums(function(tensors[s.tensor].float()), s))
    return torch.stack(sums).sum(0)
