"""Which optimizer takes which parameter, and Muon, fast without bfloat16 instructions too."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from fedpress.core.parameters import part_of, trainable
from fedpress.nn.quantized import qparam_ids
from fedpress.training.checks import nothing_to_train
from fedpress.training.settings import TrainSettings

SGD_BESIDE_MUON = {"momentum": 0.9, "weight_decay": 5e-4}
"""What SGD does with the parameters that Muon leaves: these belong to its learning rate, `head_lr`."""


ADAMS: dict[str, type[torch.optim.Adam]] = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}
"""Optimizers with running means of gradients and of their squares, by their word in a recipe."""

MEMORIES = ("momentum_buffer", "exp_avg", "exp_avg_sq")
"""What torch's optimizers remember of each entry of a weight."""


class Optimizers:
    """The optimizers of one training: one for all parameters, or Muon for the hidden weights and SGD for the rest.

    Args:
        model: its trainable parameters are taken.
        helpers: a module whose parameters go to the first one besides.
        settings: which optimizers, and their rates.

    Attributes:
        each: torch's optimizers, Muon last.
        views: pairs of a filter and the matrix that Muon sees, which shares its memory.

    Raises:
        TrainingError: if there are epochs to train but nothing that trains.
    """

    def __init__(self, model: nn.Module, helpers: nn.Module, settings: TrainSettings) -> None:
        hidden = hidden_weights(model) if settings.optimizer == "muon" else []
        taken = {id(p) for p in hidden}
        rest = [p for p in (*trainable(model), *trainable(helpers)) if id(p) not in taken]
        if not rest and not hidden and settings.epochs:
            raise nothing_to_train()

        self.views = [(p, _view(p)) for p in hidden]
        matrices = [view for _, view in self.views]
        found = (_elementwise(rest, settings, spared=qparam_ids(model)), _muon(matrices, settings))
        self.each = [optimizer for optimizer in found if optimizer is not None]
        self._rates = [[group["lr"] for group in o.param_groups] for o in self.each]

    def set_rate_(self, factor: float) -> None:
        """Sets every learning rate to `factor` times that of the settings."""
        for optimizer, rates in zip(self.each, self._rates, strict=True):
            for group, lr in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = lr * factor

    def step_(self) -> None:
        """Takes one step along the gradients of the parameters."""
        for parameter, view in self.views:
            view.grad = None if parameter.grad is None else as_matrix(parameter.grad, parameter)
        for optimizer in self.each:
            optimizer.step()

    @torch.no_grad()
    def forget_(self, weight: nn.Parameter, where: Tensor) -> None:
        """Zeroes what is remembered of `weight` where `where`, of its shape, is true: there it begins to train anew."""
        view = next((view for p, view in self.views if p is weight), None)
        key, entries = (weight, where) if view is None else (view, as_matrix(where, weight))
        for optimizer in self.each:
            slot = optimizer.state.get(key, {})
            for memory in MEMORIES:
                if slot.get(memory) is not None:
                    slot[memory].masked_fill_(entries, 0)

    def state(self) -> dict[str, Tensor]:
        """Returns what the optimizers remember as named tensors, the living ones."""
        out: dict[str, Tensor] = {}
        for at, optimizer in enumerate(self.each):
            for key, slot in optimizer.state_dict()["state"].items():
                for leaf, value in slot.items():
                    if isinstance(value, Tensor):
                        out[f"{at}/{key}/{leaf}"] = value
        return out

    def load_(self, state: dict[str, Tensor]) -> None:
        """Takes up the `state()` of earlier optimizers of the same model and settings."""
        for at, optimizer in enumerate(self.each):
            params = [p for group in optimizer.param_groups for p in group["params"]]
            slots: dict[int, dict[str, Tensor]] = {}
            for name, value in part_of(state, f"{at}/").items():
                key, _, leaf = name.partition("/")
                slots.setdefault(int(key), {})[leaf] = _laid_out_like(params[int(key)], value)
            optimizer.load_state_dict({**optimizer.state_dict(), "state": slots})


def _view(weight: nn.Parameter) -> nn.Parameter:
    view = nn.Parameter(as_matrix(weight.data, weight))
    assert view.data_ptr() == weight.data_ptr(), "a view must share its weight's memory"
    return view


def _muon(matrices: list[nn.Parameter], settings: TrainSettings) -> torch.optim.Optimizer | None:
    if not matrices:
        return None
    momentum, decay = settings.momentum, settings.weight_decay
    return Muon(matrices, settings.lr, momentum=momentum, weight_decay=decay)


def _elementwise(
    parameters: list[nn.Parameter], settings: TrainSettings, *, spared: set[int]
) -> torch.optim.Optimizer | None:
    """An optimizer that looks at each entry by itself, and whose weight decay acts on weights alone.

    Norms and biases have one dimension, `spared` are step sizes.
    """
    if not parameters:
        return None
    lr, momentum, decay = settings.lr, settings.momentum, settings.weight_decay
    if settings.optimizer == "muon":
        lr, momentum = settings.head_lr, SGD_BESIDE_MUON["momentum"]
        decay = SGD_BESIDE_MUON["weight_decay"]
    # Step sizes of groups have two dimensions, so that the number of dimensions alone does not tell them from weights.
    decays = [p for p in parameters if p.dim() > 1 and id(p) not in spared]
    stays = [p for p in parameters if p.dim() <= 1 or id(p) in spared]
    groups = [{"params": decays, "weight_decay": decay}, {"params": stays, "weight_decay": 0.0}]
    used = [group for group in groups if group["params"]]
    if settings.optimizer in ADAMS:
        return ADAMS[settings.optimizer](used, lr=lr, betas=settings.betas)
    return torch.optim.SGD(used, lr, momentum, nesterov=momentum > 0)


class Muon(torch.optim.Muon):
    """torch's Muon (Jordan 2024) as it is by default, state included, but orthogonalised in float32.

    `torch.optim.Muon` multiplies in bfloat16. Processors without the instructions imitate it many times slower than
    they multiply float32, and a step then takes longer than the forward and backward pass (benchmarks/muon.py). Its
    other settings, such as the number of Newton-Schulz steps, are not looked at.

    Args:
        params: The matrices, [m, n] each.
        lr: Learning rate; a step moves a matrix by `lr * sqrt(max(1, m / n))` along its orthogonalised momentum.
        momentum: Share of the old in the running mean of gradients.
        weight_decay: Decoupled: a step multiplies a matrix by `1 - lr * weight_decay`.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        *,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
    ) -> None:
        super().__init__(params, lr, weight_decay, momentum)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Takes one step; matrices without a gradient stay."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                state = self.state[matrix]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(matrix.grad)
                mean = state["momentum_buffer"].lerp_(matrix.grad, 1 - momentum)
                direction = orthogonalized(matrix.grad.lerp(mean, momentum))
                rows, columns = matrix.shape
                matrix.mul_(1 - lr * group["weight_decay"])
                matrix.add_(direction, alpha=-lr * math.sqrt(max(1, rows / columns)))
        return loss


def orthogonalized(matrix: Tensor) -> Tensor:
    """Returns a matrix [m, n] with the singular vectors of `matrix` and singular values of 0.7 to 1.2: Newton-Schulz.

    With X = matrix / its norm, five steps X <- (a + b S + c S^2) X for S = X X^T (Jordan 2024). Their factors are
    polynomials of the first S and commute, so they are multiplied up on the short side and X itself is touched twice,
    not 15 times: at 9 columns a row, as in a 3x3 convolution, that is 2.7 times fewer products, and a quarter more in a
    square matrix. Singular values under a thousandth of the norm stay below 0.7, as they do in other forms of it.
    """
    x = matrix.float()
    x = x.T if len(x) > x.shape[1] else x
    x = x / x.norm().clamp(min=1e-7)
    gram = x @ x.T
    factor = factors = _factor(gram)
    for _ in range(4):
        gram = factor @ gram @ factor
        factor = _factor(gram)
        factors = factor @ factors
    found: Tensor = (factors @ x).to(matrix.dtype)
    return found.T if len(matrix) > matrix.shape[1] else found


def _factor(gram: Tensor) -> Tensor:
    a, b, c = 3.4445, -4.7750, 2.0315
    factor = torch.addmm(gram, gram, gram, beta=b, alpha=c)
    factor.diagonal().add_(a)
    return factor


def hidden_weights(model: nn.Module) -> list[nn.Parameter]:
    """Returns the weights that Muon takes: of all convolutions and linear layers but the first and the last, each once.

    A computed weight (weight norm and the like) is not a parameter: what it is computed from goes the way of the rest.
    """
    weights = [m.weight for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    ends = {id(w) for w in (*weights[:1], *weights[-1:])}
    inner = {
        id(w): w
        for w in weights
        if id(w) not in ends and isinstance(w, nn.Parameter) and w.requires_grad
    }
    return list(inner.values())


def as_matrix(x: Tensor, weight: Tensor) -> Tensor:
    """Returns a filter [o, i, h, w], or its gradient, as a matrix [o, h*w*i].

    Its columns are in the order of `weight`'s memory. It is the same memory if `x` lies like `weight`, a copy else.
    """
    if x.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last):
        x = x.permute(0, 2, 3, 1)
    return x.reshape(len(x), -1) if x.dim() == 4 else x


def _laid_out_like(parameter: Tensor, value: Tensor) -> Tensor:
    """Gives a saved momentum the memory layout of its parameter, which files do not keep."""
    return torch.empty_like(parameter).copy_(value) if value.shape == parameter.shape else value
