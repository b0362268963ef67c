"""L0 regularisation: trains weights w and random gates z on L(w * z) + lambda * E||z||_0.

A gate is a factor between 0 (closed) and 1 (open). It is a hard-concrete random variable (Louizos,
Welling & Kingma 2018, arXiv:1712.01312, section 2.2): a concrete variable (a differentiable
approximation of a coin flip), stretched to [-0.1, 1.1] and clamped to [0, 1]. It is exactly 0 or 1
with some probability, and differentiable in between. Its parameter is called log alpha.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fedpress.compress.prune.graph import ChannelGraph, ChannelGroup, ChannelSlice
from fedpress.compress.prune.targets import full_widths
from fedpress.compress.prune.tensors import tensors_of
from fedpress.compress.sparse.masks import Masks
from fedpress.compress.sparse.weights import Weight
from fedpress.core.random_source import Source, as_random_source
from fedpress.errors import ModelError

BETA = 2 / 3
"""Temperature of the concrete variables, as in the paper's experiments."""
LOW, HIGH = -0.1, 1.1
"""The interval that concrete variables are stretched to, as in the paper's experiments."""
START = 0.9
"""Sigmoid of the initial log alpha; the gate without randomness is then 0.98."""
SMALLEST_GATE = 0.05
"""Smallest value of a kept gate: a weight times nearly 0 would hardly train in later stages."""
CLOSED = -1e4
"""Log alpha of a permanently closed gate: its sigmoid and its gradient are 0 in float32."""


def sample(log_alpha: Tensor, uniform: Tensor) -> Tensor:
    """Draws gates from uniform random numbers in (0, 1) of the same shape (eq. 10 and 11).

    >>> sample(torch.tensor([-9.0, 0.0, 9.0]), torch.tensor([0.5, 0.5, 0.5]))
    tensor([0.0000, 0.5000, 1.0000])
    """
    concrete = torch.sigmoid((uniform.log() - (-uniform).log1p() + log_alpha) / BETA)
    return (concrete * (HIGH - LOW) + LOW).clamp(0, 1)


def expected_gate(log_alpha: Tensor) -> Tensor:
    """Returns the deterministic gates that are used after training (eq. 13)."""
    return (log_alpha.sigmoid() * (HIGH - LOW) + LOW).clamp(0, 1)


def open_probability(log_alpha: Tensor) -> Tensor:
    """Returns the probability that each gate is not 0 (eq. 12).

    The sum of these probabilities is the expected L0 norm.
    """
    return torch.sigmoid(log_alpha - BETA * math.log(-LOW / HIGH))


class Gates(nn.Module):
    """Trainable gates of a model's weights or channels.

    Create them with `weight_gates` or `channel_gates`.

    Args:
        log_alphas: the parameters of the gates, one tensor for each weight or layer.
        factors: function from the gates (a tensor for each of `log_alphas`) to factors of the
            model's parameters, by name.
        share: differentiable function from the probabilities that gates are open to the expected
            share of parameters that are kept.

    Attributes:
        generator: source of the random numbers in `draw`; None for torch's global generator.
    """

    def __init__(
        self,
        log_alphas: Sequence[Tensor],
        factors: Callable[[list[Tensor]], dict[str, Tensor]],
        share: Callable[[list[Tensor]], Tensor],
    ) -> None:
        super().__init__()
        self.log_alphas = nn.ParameterList([nn.Parameter(a) for a in log_alphas])
        self.factors = factors
        self.share = share
        self.generator: Source = None

    def density(self) -> Tensor:
        """Returns the expected share of parameters that are kept; differentiable."""
        return self.share([open_probability(a) for a in self.log_alphas])

    def draw(self) -> dict[str, Tensor]:
        """Returns a random factor for each parameter, for one step of training."""
        tiny = torch.finfo(torch.float32).tiny  # log(0) would be infinite
        chance = as_random_source(self.generator)
        gates = []
        for log_alpha in self.log_alphas:
            uniform = chance.uniform(*log_alpha.shape, dtype=torch.float32).clamp_min(tiny)
            gates.append(sample(log_alpha, uniform.to(log_alpha.device)))
        return self.factors(gates)

    def expected(self) -> dict[str, Tensor]:
        """Returns the factor of each parameter without randomness."""
        return self.factors([expected_gate(a) for a in self.log_alphas])

    @contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[None]:
        """Multiplies the parameters by the gates in every forward pass of `model` in the block.

        In training mode each pass draws new gates; in evaluation mode the gates are deterministic.
        Between passes the model has its own parameters. A deep copy of the model uses the same
        gates.
        """
        # A deep copy of the model copies its hooks. A bound method would be copied with its object,
        # so the copy would have gates of its own; a function that refers to `gates` is not copied.
        gates = self

        def multiply(model: nn.Module, _: Any) -> None:
            factors = gates.draw() if model.training else gates.expected()

            def gated(name: str, parameter: Tensor) -> Tensor | None:
                return parameter * factors[name] if name in factors else None

            # A stack, because forward may call the model again.
            stack = model.__dict__.setdefault("_ungated", [])
            stack.append(_swap(model, gated))

        def restore(model: nn.Module, *_: Any) -> None:
            before = model.__dict__["_ungated"].pop()
            _swap(model, lambda name, _: before.get(name))
            if not model.__dict__["_ungated"]:
                del model.__dict__["_ungated"]

        handles = [
            model.register_forward_pre_hook(multiply, prepend=True),
            model.register_forward_hook(restore, always_call=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def materialize_(self, model: nn.Module) -> None:
        """Multiplies the parameters of `model` by their gates, of at least `SMALLEST_GATE` each."""
        # No weight becomes 0 here: the caller's mask, not the gate's value, says what is pruned.
        factors = self.factors([expected_gate(a).clamp_min(SMALLEST_GATE) for a in self.log_alphas])
        parameters = dict(model.named_parameters())
        for name, factor in factors.items():
            parameters[name].mul_(factor)


def _swap(model: nn.Module, new: Callable[[str, Tensor], Tensor | None]) -> dict[str, Tensor]:
    """Replaces parameters by `new(name, parameter)` if that is not None; returns the old ones.

    `new` is called once for a shared parameter, with its first name; the result replaces it in all
    modules.
    """
    names: dict[int, str] = {}
    made: dict[str, Tensor | None] = {}
    before: dict[str, Tensor] = {}

    # The first module that holds a shared parameter gives it its name.
    for path, module in model.named_modules():
        # Not `setattr`: torch refuses it for a tensor that is not an `nn.Parameter`.
        table: dict[str, Any] = module._parameters
        for key, old in table.items():
            if old is None:
                continue
            name = names.setdefault(id(old), f"{path}.{key}" if path else key)
            if name not in made:
                made[name] = new(name, old)
            value = made[name]
            if value is not None:
                before[name] = old
                table[key] = value
        if isinstance(module, nn.RNNBase):  # it has its weights in a list as well
            module._flat_weights = [table.get(n) for n in module._flat_weights_names]
    return before


def weight_gates(
    weights: Sequence[Weight], *, generator: Source, within: Masks | None = None
) -> Gates:
    """Returns a gate for every entry of `weights`.

    Args:
        weights: the weights that get gates.
        generator: source of noise in the initial gates.
        within: an earlier mask of each weight; gates of entries outside it stay closed.
    """
    alphas = []
    for w in weights:
        alpha = _initial_log_alpha(w.value.shape, generator).to(w.value.device)
        if within is not None:
            alpha = alpha.masked_fill(~within[w.name], CLOSED)
        alphas.append(alpha)
    names = [w.name for w in weights]
    total = sum(w.size for w in weights)

    def factors(gates: list[Tensor]) -> dict[str, Tensor]:
        return dict(zip(names, gates, strict=True))

    def share(probabilities: list[Tensor]) -> Tensor:
        return torch.stack([each.sum() for each in probabilities]).sum() / total

    return Gates(alphas, factors, share)


def channel_gates(model: nn.Module, graph: ChannelGraph, *, generator: Source) -> Gates:
    """Returns a gate for every channel of `graph`; it multiplies the weights that read the channel.

    A weight that computes a channel writes it; a weight that sums over the channel reads it. All
    weights that read a channel, for instance in a residual network, share its gate. The weights
    that write the channel are multiplied only if no weight reads it: a norm after them would undo
    the factor.

    Args:
        model: the traced model.
        graph: its channels, from `fedpress.compress.trace`.
        generator: source of noise in the initial gates.

    Raises:
        ModelError: if the model has no channels to gate.
    """
    if not graph.groups:
        raise ModelError(
            "no channel of this model can be removed",
            place="model",
            cure="put gates on single weights (unit = 'weights')",
        )
    tensors = tensors_of(model)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    device = next(iter(tensors.values())).device

    def factors(gates: list[Tensor]) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        for group, gate in zip(graph.groups, gates, strict=True):
            for s in _gated_slices(group):
                factor = _along_axis(gate, s, shapes[s.tensor])
                # A weight may read two groups along two axes: then both gates multiply it.
                if s.tensor in out:
                    factor = out[s.tensor] * factor
                out[s.tensor] = factor
        return out

    def share(probabilities: list[Tensor]) -> Tensor:
        return _expected_parameters(graph, probabilities) / graph.parameters(full_widths(graph))

    alphas = []
    for group in graph.groups:
        alphas.append(_initial_log_alpha((group.channels,), generator).to(device))
    return Gates(alphas, factors, share)


def _along_axis(gate: Tensor, where: ChannelSlice, shape: Sequence[int]) -> Tensor:
    """Returns the gates [channels] in a shape that broadcasts with a tensor of shape `shape`.

    Indices of the axis that belong to no channel of the slice `where` get the factor 1.
    """
    index = where.index.to(gate.device)
    ones = gate.new_ones(shape[where.axis])
    line = ones.index_put((index,), gate[:, None].expand(index.shape))
    sizes = [1] * len(shape)
    sizes[where.axis] = -1
    return line.view(sizes)


def _expected_parameters(graph: ChannelGraph, probabilities: Sequence[Tensor]) -> Tensor:
    """Returns the number of parameters at the expected widths, differentiable.

    The expected size of a parameter is computed as the product of the expected lengths of its axes.
    This is exact if the lengths are independent.

    Args:
        graph: the channels.
        probabilities: the probability that each channel is kept, [channels] for each group.
    """
    zero = probabilities[0].new_tensor(0.0)
    removed: dict[tuple[str, int], Tensor] = {}  # (tensor, axis) -> expected indices removed
    for group, probability in zip(graph.groups, probabilities, strict=True):
        channels = (1 - probability).sum()
        for s in group.slices:
            key = s.tensor, s.axis
            removed[key] = removed.get(key, zero) + channels * s.index.shape[1]

    counts = []
    for name, shape in graph.shapes.items():
        count = zero + 1.0
        for axis, size in enumerate(shape):
            count = count * (size - removed.get((name, axis), zero))
        counts.append(count)
    return torch.stack(counts).sum()


def _gated_slices(group: ChannelGroup) -> list[ChannelSlice]:
    # Channels that no weight reads are gated where they are written.
    return group.slices_with_role("read") or group.slices_with_role("write")


def _initial_log_alpha(shape: Sequence[int], generator: Source) -> Tensor:
    """Returns the initial log alpha: nearly open gates, with noise so that they are not all equal.

    Section 4.1 of the paper also starts with normal noise, around the dropout rate.
    """
    noise = as_random_source(generator).normal(*shape, dtype=torch.float32)
    return math.log(START / (1 - START)) + 0.01 * noise


class DensityController:
    """Adjusts lambda, the weight of the density in the loss, until the density is the target.

    This is a PI controller (proportional and integral part) of the error log(density / target). In
    terms of optimization, it is an augmented Lagrangian, and the integral part is dual ascent. If
    the density is below the target, lambda may become negative, so that closed gates open again.

    Args:
        scale: unit of lambda and its first value. Take the lambda at which the gradients of loss
            and lambda * density are equally large (see `balance`).
        lambda_: first value of the integral part: that of an earlier controller if a stopped
            training continues, else None for `scale`.
        integral_gain: change of the integral part per step and unit of error, in units of `scale`.
        proportional_gain: proportional part per unit of error, in units of `scale`.
    """

    def __init__(
        self,
        scale: float,
        lambda_: float | None = None,
        *,
        integral_gain: float = 0.3,
        proportional_gain: float = 20.0,
    ) -> None:
        self.scale = scale
        self.integral_gain = integral_gain
        self.proportional_gain = proportional_gain
        self.lambda_ = scale if lambda_ is None else lambda_

    def step_(self, density: float, target: float) -> float:
        """Updates lambda for one training step; returns the weight of the density in the loss.

        >>> controller = DensityController(1.0)
        >>> at, above, below = (controller.step_(density, 0.5) for density in (0.5, 0.6, 0.4))
        >>> at, above > 1, below < 0
        (1.0, True, True)
        """
        # Clamped against wind-up: far from the target the integral part would grow too large.
        error = min(max(math.log(max(density, 1e-9) / target), -1.0), 1.0)
        # The integral part: it keeps its value once the error is 0.
        self.lambda_ += self.integral_gain * self.scale * error
        return self.lambda_ + self.proportional_gain * self.scale * error


def balance(loss: Tensor, density: Tensor, gates: Gates) -> float:
    """Returns the lambda at which the gradients of loss and lambda * density are equally large.

    The gradients are those with respect to the gates' parameters, and their size is the L1 norm. If
    a size is 0, or that of the loss is not finite, the result is 1.
    """
    alphas = list(gates.log_alphas)
    sizes = []
    for value in (loss, density):
        gradients = torch.autograd.grad(value, alphas, retain_graph=True, allow_unused=True)
        sizes.append(sum(float(g.abs().sum()) for g in gradients if g is not None))
    of_loss, of_density = sizes
    if of_loss > 0 and of_density > 0 and math.isfinite(of_loss):
        return of_loss / of_density
    return 1.0
