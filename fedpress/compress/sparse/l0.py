"""The L0 norm by gates: min over w and gates of L(w * z; D) + lambda * E||z||_0 (Louizos, Welling & Kingma 2018).

A gate z is a hard-concrete variable (arXiv:1712.01312, section 2.2): a concrete one stretched beyond 0 and 1 and cut
off there, so that it is exactly 0 or 1 with some probability, and has a gradient between.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fedpress.compress.prune.graph import ChannelGraph, ChannelGroup
from fedpress.compress.prune.scores import tensors_of
from fedpress.compress.sparse.masks import Masks
from fedpress.compress.sparse.weights import Weight
from fedpress.core.random_source import Source, chance_of
from fedpress.errors import ModelError

BETA, LOW, HIGH = 2 / 3, -0.1, 1.1
"""Temperature and stretch of the paper's experiments."""
START = 0.9
"""How open the gates begin: the test-time gate is then at 0.98."""
LEAST = 0.05
"""A gate that stays is at least this open, so that its weight can go on."""


def sample(log_alpha: Tensor, uniform: Tensor) -> Tensor:
    """Draws gates from numbers `uniform` in (0, 1); both [...] (eq. 10 and 11).

    >>> sample(torch.tensor([-9.0, 0.0, 9.0]), torch.tensor([0.5, 0.5, 0.5]))
    tensor([0.0000, 0.5000, 1.0000])
    """
    concrete = torch.sigmoid((uniform.log() - (-uniform).log1p() + log_alpha) / BETA)
    return (concrete * (HIGH - LOW) + LOW).clamp(0, 1)


def at_test(log_alpha: Tensor) -> Tensor:
    """Returns the gates without chance, as they are after training (eq. 13)."""
    return (log_alpha.sigmoid() * (HIGH - LOW) + LOW).clamp(0, 1)


def open_probability(log_alpha: Tensor) -> Tensor:
    """Returns the probability that a gate is not 0 (eq. 12): summed, it is the expected L0 norm."""
    return torch.sigmoid(log_alpha - BETA * math.log(-LOW / HIGH))


class Gates(nn.Module):
    """Gates for a model: `log_alphas`, what they multiply, and the expected share of parameters that they leave.

    Make them with `weight_gates` or `channel_gates`.

    Args:
        log_alphas: the parameters, one tensor of any shape for each weight or layer.
        factors: from as many gates to what multiplies each parameter, by name.
        share: from as many probabilities of being open to the expected share of parameters, differentiable.
    """

    def __init__(
        self,
        log_alphas: Sequence[Tensor],
        factors: Callable[[list[Tensor]], dict[str, Tensor]],
        share: Callable[[list[Tensor]], Tensor],
    ) -> None:
        super().__init__()
        self.log_alphas = nn.ParameterList([nn.Parameter(a) for a in log_alphas])
        self.factors, self.share = factors, share
        self.generator: Source = None

    def density(self) -> Tensor:
        """Returns the expected share of parameters, differentiable, in closed form."""
        return self.share([open_probability(a) for a in self.log_alphas])

    def draw(self) -> dict[str, Tensor]:
        """Draws from `chance` what multiplies each parameter in one step of training."""
        tiny, chance = torch.finfo(torch.float32).tiny, chance_of(self.generator)
        drawn = (chance.uniform(*a.shape, dtype=torch.float32) for a in self.log_alphas)
        pairs = zip(self.log_alphas, drawn, strict=True)
        return self.factors([sample(a, u.clamp_min(tiny).to(a.device)) for a, u in pairs])

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        """Multiplies the parameters of `model` in every forward pass: by new gates in training, without chance else.

        Between passes the model is as ever: its parameters and their names, and a copy of it has the gates too.
        """
        gates = self  # a function is not copied with the model that holds it, a method would be

        def put(model: nn.Module, _: Any) -> None:
            factors = (
                gates.draw()
                if model.training
                else gates.factors([at_test(a) for a in gates.log_alphas])
            )
            stack = model.__dict__.setdefault("_ungated", [])
            stack.append(
                _swap(model, lambda name, p: p * factors[name] if name in factors else None)
            )

        def put_back(model: nn.Module, *_: Any) -> None:
            before = model.__dict__["_ungated"].pop()
            _swap(model, lambda name, _: before.get(name))
            if not model.__dict__["_ungated"]:
                del model.__dict__["_ungated"]

        handles = [
            model.register_forward_pre_hook(put, prepend=True),
            model.register_forward_hook(put_back, always_call=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def materialize_(self, model: nn.Module) -> None:
        """Multiplies the parameters of `model` by their gates for good; none is closed more than to `LEAST`."""
        factors = self.factors([at_test(a).clamp_min(LEAST) for a in self.log_alphas])
        parameters = dict(model.named_parameters())
        for name, factor in factors.items():
            parameters[name].mul_(factor)


def _swap(model: nn.Module, new: Callable[[str, Tensor], Tensor | None]) -> dict[str, Tensor]:
    """Puts `new(name, tensor)` in the place of parameters, where it is not None; returns what was there by name.

    A shared parameter is replaced in all its places by one tensor, under its first name.
    """
    names: dict[int, str] = {}
    made: dict[str, Tensor | None] = {}
    before: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        table: dict[str, Any] = module._parameters
        for key, old in table.items():
            if old is None:
                continue
            name = names.setdefault(id(old), f"{path}.{key}" if path else key)
            if name not in made:
                made[name] = new(name, old)
            if (value := made[name]) is not None:
                before[name] = old
                table[key] = value
        if isinstance(module, nn.RNNBase):  # it keeps a list of its weights besides
            module._flat_weights = [table.get(n) for n in module._flat_weights_names]
    return before


def weight_gates(
    weights: Sequence[Weight], *, generator: Source, within: Masks | None = None
) -> Gates:
    """Gives every entry of `weights` a gate; those that `within`, an earlier mask, lacks are closed for good."""
    closed = -1e4
    alphas = []
    for w in weights:
        alpha = _begin(w.value.shape, generator).to(w.value.device)
        alphas.append(alpha if within is None else alpha.masked_fill(~within[w.name], closed))
    total = sum(w.size for w in weights)
    return Gates(
        alphas,
        lambda z: {w.name: gate for w, gate in zip(weights, z, strict=True)},
        lambda p: torch.stack([each.sum() for each in p]).sum() / total,
    )


def channel_gates(model: nn.Module, graph: ChannelGraph, *, generator: Source) -> Gates:
    """Gives every removable channel of `graph` a gate, where its layer is read.

    A channel that is coupled through a residual stream has one gate, on all weights that read it. There a closed gate
    is the absence of the channel, whatever norm comes before; on the writing side a norm would undo the scale.

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
    sizes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    at = next(iter(tensors.values())).device

    def factors(z: list[Tensor]) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        for group, gate in zip(graph.groups, z, strict=True):
            for s in _gated(group):
                size = sizes[s.tensor]
                index = s.index.to(gate.device)
                line = gate.new_ones(size[s.axis]).index_put(
                    (index,), gate[:, None].expand(index.shape)
                )
                line = line.view([-1 if d == s.axis else 1 for d in range(len(size))])
                out[s.tensor] = out[s.tensor] * line if s.tensor in out else line
        return out

    def share(p: list[Tensor]) -> Tensor:
        left: dict[str, dict[int, Tensor]] = {name: {} for name in graph.shapes}
        for group, probability in zip(graph.groups, p, strict=True):
            gone = (1 - probability).sum()
            for s in group.slices:
                if s.tensor in left:
                    axes = left[s.tensor]
                    axes[s.axis] = axes.get(s.axis, gone.new_tensor(0.0)) + gone * s.index.shape[1]
        zero = p[0].new_tensor(0.0)
        counts = []
        for name, shape in graph.shapes.items():
            count = zero + 1.0
            for axis, size in enumerate(shape):
                count = count * (size - left[name].get(axis, zero))
            counts.append(count)
        return torch.stack(counts).sum() / graph.parameters(
            [group.channels for group in graph.groups]
        )

    return Gates(
        [_begin((group.channels,), generator).to(at) for group in graph.groups], factors, share
    )


def _gated(group: ChannelGroup) -> list[Any]:
    return group.role("read") or group.role("write")


def _begin(shape: Sequence[int], generator: Source) -> Tensor:
    """Draws log alpha around an open gate (section 4.1 of the paper draws around the drop-out rate)."""
    return math.log(START / (1 - START)) + 0.01 * chance_of(generator).normal(
        *shape, dtype=torch.float32
    )


class Controller:
    """Finds lambda: dual ascent on the logarithm of the expected density, with a spring (an augmented Lagrangian).

    Both gains are in units of `scale`, the lambda at which the density pulls as hard as the loss (see `balance`), and
    an error of 1 is a density e times too large. Below the target lambda may turn negative: closed gates open again.

    Args:
        scale: the unit, with which lambda begins.
        lambda_: what the ascent has come to, of an earlier controller.
        rate: gain of the ascent per step.
        spring: gain of the error itself.
    """

    def __init__(
        self, scale: float, lambda_: float | None = None, *, rate: float = 0.3, spring: float = 20.0
    ) -> None:
        self.scale, self.rate, self.spring = scale, rate, spring
        self.lambda_ = scale if lambda_ is None else lambda_

    def pull_(self, density: float, target: float) -> float:
        """Takes a step of the ascent; returns the factor of the density in the loss.

        >>> controller = Controller(1.0)
        >>> controller.pull_(0.5, 0.5), controller.pull_(0.6, 0.5) > 1, controller.pull_(0.4, 0.5) < 0
        (1.0, True, True)
        """
        error = min(max(math.log(max(density, 1e-9) / target), -1.0), 1.0)
        self.lambda_ += self.rate * self.scale * error
        return self.lambda_ + self.spring * self.scale * error


def balance(loss: Tensor, density: Tensor, gates: Gates) -> float:
    """Returns the lambda at which the density pulls on the gates as much as the loss does, in the L1 norm; else 1."""
    alphas = list(gates.log_alphas)
    pulls = []
    for value in (loss, density):
        grads = torch.autograd.grad(value, alphas, retain_graph=True, allow_unused=True)
        pulls.append(sum(float(g.abs().sum()) for g in grads if g is not None))
    return pulls[0] / pulls[1] if pulls[0] > 0 and pulls[1] > 0 and math.isfinite(pulls[0]) else 1.0
