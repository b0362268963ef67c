"""How much each weight matters: one row per score in `WEIGHT_SCORES`; the least important is lowest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedpress.compress.prune.derivatives import differentiable, gradient, hessian_gradient, mean
from fedpress.compress.prune.scores import Losses
from fedpress.compress.sparse.weights import Weight
from fedpress.core.random_source import Source, chance_of
from fedpress.errors import ModelError, RecipeError, suggestion

Values = list[Tensor]


@dataclass(frozen=True, eq=False)
class WeightEvidence:
    """What a score may look at.

    Attributes:
        model: in which the weights are.
        weights: to be scored.
        losses: runs the model over some public batches and yields the loss of each.
        generator: for "random".
        moved: what `Movement` has summed up while the weights trained, by name.
    """

    model: nn.Module
    weights: Sequence[Weight]
    losses: Losses | None = None
    generator: Source = None
    moved: Mapping[str, Tensor] | None = None


def magnitude(evidence: WeightEvidence) -> Values:
    """|w|."""
    return [w.value.detach().abs() for w in evidence.weights]


def lamp(evidence: WeightEvidence) -> Values:
    """w^2 over the sum of the squares in its layer that are not smaller (Lee et al. 2021, arXiv:2010.07611, eq. 3).

    It makes the weights of layers comparable, and the largest of each layer scores 1, so that none is cut off.
    """
    scores = []
    for w in evidence.weights:
        squares = w.value.detach().double().square().flatten()
        rising, order = squares.sort(stable=True)
        rest = rising.flip(0).cumsum(0).flip(0)
        score = torch.empty_like(squares).scatter_(
            0, order, rising / rest.clamp_min(torch.finfo(torch.double).tiny)
        )
        scores.append(score.view(w.value.shape))
    return scores


def taylor(evidence: WeightEvidence) -> Values:
    """Mean over batches of |w dL/dw|: how much the loss changes, to first order, if the weight goes.

    Molchanov et al. 2017, arXiv:1611.06440. The model is in evaluation mode.
    """
    return _over_batches(evidence, "taylor", lambda w, g: (w * g).abs())


def fisher(evidence: WeightEvidence) -> Values:
    """w^2 F / 2 with F the mean square of dL/dw: Optimal Brain Damage (LeCun et al. 1990) with the diagonal Fisher.

    F is that of single examples if each loss is that of one example; the model is in evaluation mode.
    """
    return _over_batches(evidence, "fisher", lambda w, g: (w * g).square() / 2)


def snip(evidence: WeightEvidence) -> Values:
    """|w dL/dw| with the gradient of all batches together (Lee et al. 2019, arXiv:1810.02340, eq. 4).

    For networks at their initialisation, whose norms take the statistics of the batch.
    """
    values = [w.value for w in evidence.weights]
    with differentiable(evidence.model, values, batch_statistics=True):
        slopes = mean(gradient(loss, values) for loss in _losses(evidence, "snip"))
    return [(v.detach() * g).abs() for v, g in zip(values, slopes, strict=True)]


def grasp(evidence: WeightEvidence) -> Values:
    """What the weight adds to the flow of gradients, w (H g) (Wang et al. 2020, arXiv:2002.07376, eq. 8).

    Their score is its negative, of which they remove the highest. H g is that of each batch, and their mean is taken.
    For networks at their initialisation, whose norms take the statistics of the batch.
    """
    values = [w.value for w in evidence.weights]
    with differentiable(evidence.model, values, batch_statistics=True):
        products = mean(hessian_gradient(loss, values) for loss in _losses(evidence, "grasp"))
    return [v.detach() * h for v, h in zip(values, products, strict=True)]


def movement(evidence: WeightEvidence) -> Values:
    """Minus the sum of w dL/dw over the training so far (Sanh et al. 2020, arXiv:2005.07683): what moves away from 0.

    There a pruned weight may come back; here its zero stays, and so does its score.
    """
    if evidence.moved is None:
        raise ModelError(
            "the score 'movement' is summed up while the network trains",
            place="score",
            cure="take schedule 'gradual' or 'rewind'",
        )
    return [evidence.moved[w.name] for w in evidence.weights]


def random(evidence: WeightEvidence) -> Values:
    """Uniform numbers: the control that every other score has to beat."""
    if evidence.generator is None:
        raise ModelError(
            "the score 'random' needs a `generator`",
            place="generator",
            cure="give a torch.Generator",
        )
    chance = chance_of(evidence.generator)
    return [chance.uniform(*w.value.shape, dtype=torch.float32) for w in evidence.weights]


WEIGHT_SCORES: dict[str, Callable[[WeightEvidence], Values]] = {
    "magnitude": magnitude,
    "lamp": lamp,
    "taylor": taylor,
    "fisher": fisher,
    "snip": snip,
    "grasp": grasp,
    "movement": movement,
    "random": random,
}


def score_weights(score: str, evidence: WeightEvidence) -> dict[str, Tensor]:
    """Scores every entry of the weights: a tensor of its shape for each, by name.

    Raises:
        RecipeError: if there is no such score.
        ModelError: if what the score needs is missing, or a score is not finite.
    """
    if score not in WEIGHT_SCORES:
        known = list(WEIGHT_SCORES)
        raise RecipeError(
            f"no such score '{score}'",
            place="score",
            cure=suggestion(score, known, f"use one of {', '.join(known)}"),
        )
    values = WEIGHT_SCORES[score](evidence)
    for w, scores in zip(evidence.weights, values, strict=True):
        if not scores.isfinite().all():
            raise ModelError(
                f"the score '{score}' of '{w.name}' is not finite",
                place="model",
                cure="sparsify a model whose training went well",
            )
    return {w.name: scores for w, scores in zip(evidence.weights, values, strict=True)}


class Movement:
    """Sums -w dL/dw of every backward pass while it watches; `sums` by name are what "movement" looks at."""

    def __init__(self, weights: Sequence[Weight]) -> None:
        self.weights = weights
        self.sums = {w.name: torch.zeros_like(w.value) for w in weights}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watches the gradients as they are made; leaves no trace."""
        handles = [w.value.register_post_accumulate_grad_hook(self._add(w)) for w in self.weights]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _add(self, weight: Weight) -> Callable[[Tensor], None]:
        def add(parameter: Tensor) -> None:
            assert parameter.grad is not None
            self.sums[weight.name].sub_(parameter.detach() * parameter.grad)

        return add


def gradients(losses: Iterable[Tensor], weights: Sequence[Weight]) -> dict[str, Tensor]:
    """Returns the mean gradient of `losses` by each of `weights`, by name."""
    values = [w.value for w in weights]
    means = mean(gradient(loss, values) for loss in losses)
    return {w.name: g for w, g in zip(weights, means, strict=True)}


def _over_batches(
    evidence: WeightEvidence, name: str, effect: Callable[[Tensor, Tensor], Tensor]
) -> Values:
    """Returns the mean over batches of `effect(weight, gradient)`, in evaluation mode."""
    values = [w.value for w in evidence.weights]
    with differentiable(evidence.model, values):
        pairs = (
            zip(values, gradient(loss, values), strict=True) for loss in _losses(evidence, name)
        )
        return mean([effect(v.detach(), g) for v, g in pair] for pair in pairs)


def _losses(evidence: WeightEvidence, name: str) -> Iterator[Tensor]:
    if evidence.losses is None:
        raise ModelError(
            f"the score '{name}' needs `losses`, the loss on some batches",
            place="losses",
            cure="give them or use 'magnitude'",
        )
    count = 0
    for loss in evidence.losses():
        count += 1
        yield loss
    if not count:
        raise ModelError(
            f"the score '{name}' was given no batches", place="losses", cure="give at least one"
        )
