"""The optimizer Muon, fast without bfloat16 instructions too."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


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
    x = (factors @ x).to(matrix.dtype)
    return x.T if len(matrix) > matrix.shape[1] else x


def _factor(gram: Tensor) -> Tensor:
    a, b, c = 3.4445, -4.7750, 2.0315
    factor = torch.addmm(gram, gram, gram, beta=b, alpha=c)
    factor.diagonal().add_(a)
    return factor
