"""Scores each entry of a weight; the entries with the lowest scores are pruned first.

`WEIGHT_SCORES` lists the functions by name. Each returns one tensor of scores for each weight, in
the weight's shape. For scores of whole channels see `fedpress.compress.prune.scores`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedpress.compress.prune.derivatives import (
    differentiable,
    gradient,
    hessian_gradient,
    mean_over_batches,
)
from fedpress.compress.prune.scores import Losses
from fedpress.compress.sparse.weights import Weight
from fedpress.core.random_source import Source, as_random_source
from fedpress.errors import ModelError, RecipeError, suggestion

# The scores of all weights: one tensor each, in the weight's shape.
Values = list[Tensor]


@dataclass(frozen=True, eq=False)
class WeightScoreInputs:
    """The arguments of a score function.

    Attributes:
        model: the model that has the weights.
        weights: the weights to score.
        losses: function that yields the model's loss on each of some public batches, for scores
            with gradients.
        generator: source of random numbers, for "random".
        moved: the sums of a `Movement` object after training, by name of the weight, for
            "movement".
    """

    model: nn.Module
    weights: Sequence[Weight]
    losses: Losses | None = None
    generator: Source = None
    moved: Mapping[str, Tensor] | None = None


def magnitude(inputs: WeightScoreInputs) -> Values:
    """Scores by |w|."""
    return [w.value.detach().abs() for w in inputs.weights]


def lamp(inputs: WeightScoreInputs) -> Values:
    """Scores by LAMP: w^2 divided by the sum of all squares in the layer that are not smaller.

    Example: the weights 1 and 2 have the scores 1 / (1 + 4) and 4 / 4. This makes weights of
    different layers comparable. The largest weight of each layer has the score 1, so no layer loses
    all its weights (Lee et al. 2021, arXiv:2010.07611, eq. 3).
    """
    scores = []
    for w in inputs.weights:
        # float64, because small squares would be lost in a float32 sum over a large layer.
        squares = w.value.detach().double().square().flatten()
        rising, order = squares.sort(stable=True)
        not_smaller = rising.flip(0).cumsum(0).flip(0)
        # A layer of zeros has scores 0, not 0 / 0.
        ratios = rising / not_smaller.clamp_min(torch.finfo(torch.double).tiny)
        score = torch.empty_like(squares).scatter_(0, order, ratios)
        scores.append(score.view(w.value.shape))
    return scores


def taylor(inputs: WeightScoreInputs) -> Values:
    """Scores by the mean over batches of |w dL/dw|.

    This is a first-order estimate of how much the loss changes if w becomes 0 (Molchanov et al.
    2017, arXiv:1611.06440). The model is in evaluation mode.
    """
    return _over_batches(inputs, "taylor", lambda w, g: (w * g).abs())


def fisher(inputs: WeightScoreInputs) -> Values:
    """Scores by w^2 F / 2, with F the mean square of dL/dw over the losses.

    This is a second-order estimate of how much the loss changes if w becomes 0: Optimal Brain
    Damage (LeCun et al. 1990) with the diagonal Fisher information as Hessian. F is the Fisher
    information only if each loss is that of one example. The model is in evaluation mode.
    """
    return _over_batches(inputs, "fisher", lambda w, g: (w * g).square() / 2)


def snip(inputs: WeightScoreInputs) -> Values:
    """Scores by |w dL/dw| with the mean gradient of all batches (SNIP).

    Lee et al. 2019, arXiv:1810.02340, eq. 4. The score is meant for networks at their
    initialisation, so batch-norm layers use the statistics of the batch.
    """
    values = [w.value for w in inputs.weights]
    with differentiable(inputs.model, values, batch_statistics=True):
        slopes = mean_over_batches(gradient(loss, values) for loss in _losses(inputs, "snip"))
    scores = []
    for value, slope in zip(values, slopes, strict=True):
        scores.append((value.detach() * slope).abs())
    return scores


def grasp(inputs: WeightScoreInputs) -> Values:
    """Scores by the mean over batches of w (H g), with g the gradient and H the Hessian (GraSP).

    The score estimates how much the weight adds to the norm of the gradient. Wang et al. 2020
    (arXiv:2002.07376, eq. 8) use the negative of this score and remove the highest. The score is
    meant for networks at their initialisation, so batch-norm layers use the statistics of the
    batch.
    """
    values = [w.value for w in inputs.weights]
    with differentiable(inputs.model, values, batch_statistics=True):
        losses = _losses(inputs, "grasp")
        products = mean_over_batches(hessian_gradient(loss, values) for loss in losses)
    scores = []
    for value, product in zip(values, products, strict=True):
        scores.append(value.detach() * product)
    return scores


def movement(inputs: WeightScoreInputs) -> Values:
    """Scores by minus the sum of w dL/dw over all training steps.

    The score is high for weights that move away from 0 (Sanh et al. 2020, arXiv:2005.07683). In the
    paper a pruned weight may become nonzero again; here it stays 0, so its score does not change
    any more.
    """
    # Only the schedules that the cure names prune while the network trains.
    if inputs.moved is None:
        raise ModelError(
            "the score 'movement' is accumulated while the network trains",
            place="score",
            cure="take schedule 'gradual' or 'rewind'",
        )
    return [inputs.moved[w.name] for w in inputs.weights]


def random(inputs: WeightScoreInputs) -> Values:
    """Scores by uniform random numbers, as a baseline for all other scores."""
    # Torch's global generator would give masks that cannot be repeated.
    if inputs.generator is None:
        raise ModelError(
            "the score 'random' needs a `generator`",
            place="generator",
            cure="give a torch.Generator",
        )
    chance = as_random_source(inputs.generator)
    return [chance.uniform(*w.value.shape, dtype=torch.float32) for w in inputs.weights]


WEIGHT_SCORES: dict[str, Callable[[WeightScoreInputs], Values]] = {
    "magnitude": magnitude,
    "lamp": lamp,
    "taylor": taylor,
    "fisher": fisher,
    "snip": snip,
    "grasp": grasp,
    "movement": movement,
    "random": random,
}


def score_weights(score: str, inputs: WeightScoreInputs) -> dict[str, Tensor]:
    """Returns the scores of the weights by name, each in the shape of its weight.

    Raises:
        RecipeError: if there is no such score.
        ModelError: if something that the score needs is missing, or a score is not finite.
    """
    if score not in WEIGHT_SCORES:
        known = list(WEIGHT_SCORES)
        raise RecipeError(
            f"no such score '{score}'",
            place="score",
            cure=suggestion(score, known, f"use one of {', '.join(known)}"),
        )
    values = WEIGHT_SCORES[score](inputs)
    by_name: dict[str, Tensor] = {}
    for w, scores in zip(inputs.weights, values, strict=True):
        # A NaN would sort before or after all others, and the mask would look valid.
        if not scores.isfinite().all():
            raise ModelError(
                f"the score '{score}' of '{w.name}' is not finite",
                place="model",
                cure="sparsify a model whose training went well",
            )
        by_name[w.name] = scores
    return by_name


class Movement:
    """Accumulates -w dL/dw over backward passes, for the score "movement".

    Attributes:
        weights: the weights to score.
        sums: the present sums by name of the weight, in its shape.
    """

    def __init__(self, weights: Sequence[Weight]) -> None:
        self.weights = weights
        self.sums = {w.name: torch.zeros_like(w.value) for w in weights}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Within the block, adds -w * w.grad after each backward pass.

        Gradients that an earlier pass left in `w.grad` count again, so clear them before each pass.
        The model is not changed.
        """
        handles = []
        for w in self.weights:
            handles.append(w.value.register_post_accumulate_grad_hook(self._add(w)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _add(self, weight: Weight) -> Callable[[Tensor], None]:
        def add(parameter: Tensor) -> None:
            assert parameter.grad is not None
            # A post-accumulate hook: the gradient of this step is complete here.
            self.sums[weight.name].sub_(parameter.detach() * parameter.grad)

        return add


def gradients(losses: Iterable[Tensor], weights: Sequence[Weight]) -> dict[str, Tensor]:
    """Returns the mean gradient of `losses` with respect to each of `weights`, by name."""
    values = [w.value for w in weights]
    means = mean_over_batches(gradient(loss, values) for loss in losses)
    names = [w.name for w in weights]
    return dict(zip(names, means, strict=True))


def _over_batches(
    inputs: WeightScoreInputs, name: str, effect: Callable[[Tensor, Tensor], Tensor]
) -> Values:
    """Returns the mean over batches of `effect(weight, gradient)`, in evaluation mode."""
    values = [w.value for w in inputs.weights]

    # A generator, so that the gradients of only one batch are in memory.
    def batches() -> Iterator[Values]:
        for loss in _losses(inputs, name):
            effects = []
            for value, g in zip(values, gradient(loss, values), strict=True):
                effects.append(effect(value.detach(), g))
            yield effects

    with differentiable(inputs.model, values):
        return mean_over_batches(batches())


def _losses(inputs: WeightScoreInputs, name: str) -> Iterator[Tensor]:
    """Yields the losses of the batches; raises an error if there are none."""
    if inputs.losses is None:
        raise ModelError(
            f"the score '{name}' needs `losses`, the loss on some batches",
            place="losses",
            cure="give them or use 'magnitude'",
        )
    # The caller's losses are lazy: only after the loop is it known whether there were any.
    is_empty = True
    for loss in inputs.losses():
        is_empty = False
        yield loss
    if is_empty:
        raise ModelError(
            f"the score '{name}' was given no batches", place="losses", cure="give at least one"
        )
