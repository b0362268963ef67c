"""The optimizers of a training run: SGD, Adam, AdamW, and Muon in float32."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from fedpress.core.parameters import tensors_under, trainable
from fedpress.nn.quantized import qparam_ids
from fedpress.training.checks import nothing_to_train
from fedpress.training.settings import TrainSettings

SGD_BESIDE_MUON = {"momentum": 0.9, "weight_decay": 5e-4}
"""SGD's settings for parameters that Muon does not train; the learning rate is `head_lr`."""

ADAMS: dict[str, type[torch.optim.Adam]] = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}
"""Optimizers with running means of gradients and squared gradients, by their name in a recipe."""

# Names of the state that torch's optimizers keep for each entry of a weight.
ENTRY_STATES = ("momentum_buffer", "exp_avg", "exp_avg_sq")


class Optimizers:
    """The optimizers of a training: one for all parameters, or Muon and SGD together.

    Muon trains the hidden weights (see `hidden_weights`), and SGD then trains all other parameters.

    Args:
        model: the model whose trainable parameters are optimized.
        helpers: a module that only training uses, such as a projection for distillation. Muon
            never trains its parameters.
        settings: name of the optimizer, learning rates, momentum and weight decay.

    Attributes:
        each: torch's optimizers, Muon last.
        views: for Muon, pairs of a hidden weight and a matrix that shares its memory.

    Raises:
        TrainingError: if `epochs` is above 0 but no parameter is trainable.
    """

    def __init__(self, model: nn.Module, helpers: nn.Module, settings: TrainSettings) -> None:
        hidden = hidden_weights(model) if settings.optimizer == "muon" else []
        taken = {id(p) for p in hidden}
        rest = [p for p in (*trainable(model), *trainable(helpers)) if id(p) not in taken]
        if not rest and not hidden and settings.epochs:
            raise nothing_to_train()

        # Muon takes matrices only, so each weight gets a view that is a matrix. A step on the view
        # changes the weight, since they share memory.
        self.views = [(p, _view(p)) for p in hidden]
        matrices = [view for _, view in self.views]
        found = (_elementwise(rest, settings, spared=qparam_ids(model)), _muon(matrices, settings))
        self.each = [optimizer for optimizer in found if optimizer is not None]
        self._rates = [[group["lr"] for group in o.param_groups] for o in self.each]

    def set_rate_(self, factor: float) -> None:
        """Sets every learning rate to `factor` times the rate in the settings."""
        for optimizer, rates in zip(self.each, self._rates, strict=True):
            for group, lr in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = lr * factor

    def step_(self) -> None:
        """Takes one step along the gradients of the parameters."""
        for parameter, view in self.views:
            view.grad = None
            if parameter.grad is not None:
                view.grad = as_matrix(parameter.grad, parameter)
        for optimizer in self.each:
            optimizer.step()

    @torch.no_grad()
    def forget_(self, weight: nn.Parameter, where: Tensor) -> None:
        """Sets the optimizer's state to 0 for some entries of `weight`.

        Call it when pruned entries become trainable again: their momentum is from before pruning.

        Args:
            weight: a parameter of the model.
            where: mask of these entries, bool, in the shape of `weight`.
        """
        key, entries = weight, where
        for parameter, view in self.views:
            if parameter is weight:
                key, entries = view, as_matrix(where, weight)
        for optimizer in self.each:
            state = optimizer.state.get(key, {})
            for name in ENTRY_STATES:
                if state.get(name) is not None:
                    state[name].masked_fill_(entries, 0)

    def state(self) -> dict[str, Tensor]:
        """Returns the states as named tensors; training changes them in place, so copy them."""
        out: dict[str, Tensor] = {}
        for at, optimizer in enumerate(self.each):
            for key, slot in optimizer.state_dict()["state"].items():
                for leaf, value in slot.items():
                    if isinstance(value, Tensor):
                        out[f"{at}/{key}/{leaf}"] = value
        return out

    def load_(self, state: dict[str, Tensor]) -> None:
        """Loads the `state()` of earlier optimizers for the same model and settings."""
        for at, optimizer in enumerate(self.each):
            params = [p for group in optimizer.param_groups for p in group["params"]]
            slots: dict[int, dict[str, Tensor]] = {}
            for name, value in tensors_under(state, f"{at}/").items():
                key, _, leaf = name.partition("/")
                slots.setdefault(int(key), {})[leaf] = _laid_out_like(params[int(key)], value)
            # Learning rates come from the settings and the schedule, not from the file.
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
    """Makes SGD, Adam or AdamW; returns None if there are no parameters.

    Parameters with at most one dimension (norms and biases) get no weight decay, nor do the step
    sizes of quantizers.

    Args:
        parameters: the parameters to train.
        settings: the settings of the training.
        spared: Python ids of the step sizes of quantizers.
    """
    if not parameters:
        return None
    lr, momentum, decay = settings.lr, settings.momentum, settings.weight_decay
    if settings.optimizer == "muon":
        lr, momentum = settings.head_lr, SGD_BESIDE_MUON["momentum"]
        decay = SGD_BESIDE_MUON["weight_decay"]
    # Norms and biases have one dimension. Step sizes of weight groups have two, like weights, so
    # they are recognised by id.
    decayed = [p for p in parameters if p.dim() > 1 and id(p) not in spared]
    others = [p for p in parameters if p.dim() <= 1 or id(p) in spared]
    groups = [{"params": decayed, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
    used = [group for group in groups if group["params"]]
    if settings.optimizer in ADAMS:
        return ADAMS[settings.optimizer](used, lr=lr, betas=settings.betas)
    return torch.optim.SGD(used, lr, momentum, nesterov=momentum > 0)


class Muon(torch.optim.Muon):
    """torch's Muon (Jordan 2024), but it orthogonalises in float32.

    The state and the defaults of momentum and weight decay are those of torch.

    `torch.optim.Muon` multiplies in bfloat16. Processors without bfloat16 instructions emulate
    bfloat16, which is many times slower than float32: a step of the optimizer takes longer than the
    forward and backward pass (benchmarks/muon.py). The number of Newton-Schulz steps is always 5.

    Args:
        params: the matrices, [m, n] each.
        lr: learning rate; a step moves a matrix by `lr * sqrt(max(1, m / n))` along its
            orthogonalised momentum.
        momentum: share of the old mean in the new running mean of gradients.
        weight_decay: decoupled weight decay: a step multiplies a matrix by `1 - lr * weight_decay`.
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
    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None
    ) -> float | None:
        """Takes one step; matrices without a gradient are not changed.

        Args:
            closure: function that computes gradients and returns the loss; None: the gradients are
                there already.

        Returns:
            The loss that `closure` returned; None without a closure.
        """
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
                # Nesterov's momentum: the running mean is mixed with the gradient once more.
                direction = orthogonalized(matrix.grad.lerp(mean, momentum))
                rows, columns = matrix.shape
                matrix.mul_(1 - lr * group["weight_decay"])
                matrix.add_(direction, alpha=-lr * math.sqrt(max(1, rows / columns)))
        return loss


def orthogonalized(matrix: Tensor) -> Tensor:
    """Returns a matrix [m, n] with the singular vectors of `matrix` and singular values near 1.

    The computation starts from X = matrix / norm(matrix) and takes five Newton-Schulz steps
    X <- (a + b S + c S^2) X with S = X X^T (Jordan 2024). Afterwards singular values are between
    0.7 and 1.2. Only those that were below a thousandth of the norm stay below 0.7, as in other
    implementations.

    The factors (a + b S + c S^2) of all steps are polynomials of the first S, so they commute. For
    m <= n they are small [m, m] matrices. They are multiplied with each other first, and their
    product is multiplied with X once. If n = 9 m, as in a 3x3 convolution, this takes 2.7 times
    fewer multiplications than five products with X. For a square matrix it takes a quarter more.
    """
    x = matrix.float()
    # S is [m, m], so it is smallest if the first dimension is the shorter one.
    if len(x) > x.shape[1]:
        x = x.T
    # After division by the norm all singular values are at most 1, as the steps need to converge.
    # The small constant avoids a division by 0 if the gradient is 0.
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
    """Returns a + b S + c S^2 for a Gram matrix S, with Jordan's coefficients."""
    a, b, c = 3.4445, -4.7750, 2.0315
    factor = torch.addmm(gram, gram, gram, beta=b, alpha=c)
    factor.diagonal().add_(a)
    return factor


def hidden_weights(model: nn.Module) -> list[nn.Parameter]:
    """Returns the weights that Muon optimizes.

    These are the trainable weights of all Conv2d and Linear layers except the first and the last of
    these layers. A weight that is no parameter is left out: with weight norm, for example, it is
    computed from two parameters. SGD optimizes everything else. A weight that two layers share is
    listed once.
    """
    weights = [m.weight for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    ends = {id(w) for w in (*weights[:1], *weights[-1:])}
    # By id, since two layers may share a weight.
    hidden: dict[int, nn.Parameter] = {}
    for weight in weights:
        if id(weight) not in ends and isinstance(weight, nn.Parameter) and weight.requires_grad:
            hidden[id(weight)] = weight
    return list(hidden.values())


def as_matrix(x: Tensor, weight: Tensor) -> Tensor:
    """Returns a filter [o, i, h, w], or its gradient, as a matrix [o, h*w*i].

    Tensors of other than four dimensions are returned unchanged.

    Args:
        x: the filter or its gradient.
        weight: the filter. Its memory layout gives the order of the columns. If `x` has the same
            layout, the result shares the memory of `x`; otherwise it is a copy.
    """
    if x.dim() != 4:
        return x
    if weight.is_contiguous(memory_format=torch.channels_last):
        x = x.permute(0, 2, 3, 1)
    return x.reshape(len(x), -1)


def _laid_out_like(parameter: Tensor, value: Tensor) -> Tensor:
    """Returns a saved state in its parameter's memory layout, because files store no layout."""
    if value.shape != parameter.shape:
        return value
    return torch.empty_like(parameter).copy_(value)
