"""Clipped per-sample gradients at nearly the price of a plain step: norms without gradients, then one weighted sum.

One forward and one backward pass give the input `a` and the output gradient `b` of every layer for the whole batch.
Per layer the norm of each sample's gradient comes from the two Gram matrices of `a` and `b` where the image is small
("ghost norm"), and from the sample's own gradient where it is large; then the clip factors scale `b` and one weight
gradient per layer gives the clipped sum. Li et al. 2022 (arXiv:2110.05679, section 4); Bu et al. 2022,
arXiv:2205.10683 (mixed ghost norm) and arXiv:2210.00038 (book-keeping).

Each layer type is a row of `RULES`; `supports` refuses networks with anything else that trains.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from fedpress.core.inputs import call
from fedpress.core.parameters import trainable
from fedpress.privacy.per_example.persample import (
    Measured,
    Query,
    Sample,
    add_loop_,
    clip_factors,
    row_norms,
)

ROUNDING = 2.0**-23


@dataclass(frozen=True)
class Part:
    """What one parameter adds to each sample's norm, and how its clipped sum is made.

    Attributes:
        squares: float64 [n], squared norms of the per-sample gradients.
        total: clip factors [n] -> sum over samples of factor * gradient, float32 of the parameter's shape.
        magnitude: float64 [n], bound of the summands inside one sample's gradient, where `total` may cancel.
    """

    squares: Tensor
    total: Callable[[Tensor], Tensor]
    magnitude: Tensor | float = 0.0


Rule = Callable[[Any, Tensor, Tensor], dict[str, Part]]
"""(module, input a [n, ...], output gradient b [n, ...]) -> parts by parameter name."""


def supports(model: nn.Module) -> bool:
    """Says whether every trainable parameter belongs to exactly one module with a row in `RULES`."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            if p.requires_grad:
                if type(module) not in RULES or name not in ("weight", "bias"):
                    return False
                owners[id(p)] = owners.get(id(p), 0) + 1
    plain = all(getattr(m, "padding_mode", "zeros") == "zeros" for m in model.modules())
    static = not any(isinstance(getattr(m, "padding", 0), str) for m in model.modules())
    return plain and static and all(count == 1 for count in owners.values())


def add_ghost_(views: list[Tensor], query: Query) -> Measured:
    """Adds the clipped gradient of every sample to `views`, in one pass over the batch.

    Raises:
        NotImplementedError: if a layer ran more than once or not at all in the forward pass.
    """
    x = query.x
    losses, layers = _record(query)
    with torch.autocast(x.device.type, enabled=False):  # the norm is a promise: never in 16 bits
        parts = [part for module, a, b in layers for part in parts_of(module, a, b)]
        norms = norms_of([part for _, part in parts], len(x), x.device)
        bad = ~torch.isfinite(norms)
        if bad.any():
            return _split_(bad, views, query)
        scale = clip_factors(norms, query.clip_norm).float()
        by_parameter = {id(p): part.total(scale) for p, part in parts}
        for view, p in zip(views, trainable(query.model), strict=True):
            view.add_(by_parameter[id(p)])
    return [Sample(*pair) for pair in zip(losses.tolist(), norms.tolist(), strict=True)]


def _record(query: Query) -> tuple[Tensor, list[tuple[nn.Module, Tensor, Tensor]]]:
    """Runs the batch; returns the losses [n] and module, input and output gradient of each layer that trains."""
    model, loss_fn = query.model, query.loss_fn
    seen: list[tuple[nn.Module, Tensor, Any]] = []

    def see(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        # an edge, not the tensor: an in-place ReLU may overwrite the output
        seen.append((module, args[0].detach(), torch.autograd.graph.get_gradient_edge(output)))

    owners = [
        m for m in model.modules() if any(p.requires_grad for p in m.parameters(recurse=False))
    ]
    handles = [module.register_forward_hook(see) for module in owners]
    try:
        outputs = call(model, query.x)
    finally:
        for handle in handles:
            handle.remove()
    if sorted(id(m) for m, _, _ in seen) != sorted(id(m) for m in owners):
        raise NotImplementedError("a layer ran more than once, or not at all")
    losses = torch.func.vmap(lambda o, t: loss_fn(o[None], t[None]))(outputs.float(), query.y)
    grads = torch.autograd.grad(losses.sum(), [edge for _, _, edge in seen])
    return losses.detach(), [(m, a, b) for (m, a, _), b in zip(seen, grads, strict=True)]


def parts_of(module: nn.Module, a: Tensor, b: Tensor) -> list[tuple[nn.Parameter, Part]]:
    """Returns what each trainable parameter of a layer adds to the squared norms of its samples.

    Args:
        module: a layer with a rule.
        a: its inputs [n, ...].
        b: the gradients of the samples' losses by its outputs [n, ...].
    """
    own = {name: p for name, p in module.named_parameters(recurse=False) if p.requires_grad}
    if not isinstance(module, nn.Conv2d):  # convolutions choose their precision
        a, b = a.float(), b.float()
    return [
        (own[name], part) for name, part in RULES[type(module)](module, a, b).items() if name in own
    ]


def norms_of(parts: list[Part], n: int, device: torch.device) -> Tensor:
    """Returns the norms [n], a hair above the truth: the rounding of the sum is inside the bound."""
    squares = torch.zeros(n, dtype=torch.float64, device=device)
    rounding = torch.zeros_like(squares)
    for part in parts:
        squares += part.squares.clamp_min(0)
        rounding += (ROUNDING * torch.as_tensor(part.magnitude)) ** 2
    return squares.sqrt() * (1 + 4 * ROUNDING) + rounding.sqrt()


def _split_(bad: Tensor, views: list[Tensor], query: Query) -> Measured:
    """Takes the samples without a finite float32 norm one by one, in float64, and the others together."""
    measured: Measured = [Sample(0.0, 0.0)] * len(query.x)
    good, others = (~bad).nonzero().flatten(), bad.nonzero().flatten()
    if len(good):
        for row, sample in zip(good.tolist(), add_ghost_(views, query.take(good)), strict=True):
            measured[row] = sample
    for row, sample in zip(others.tolist(), add_loop_(views, query.take(others)), strict=True):
        measured[row] = sample
    return measured


def _explicit(gradients: Tensor, shape: torch.Size) -> Part:
    """A part from the samples' own gradients [n, ...]."""
    flat = gradients.flatten(1).float()
    return Part(row_norms(flat).square(), lambda scale: (scale @ flat).view(shape))


def _linear(module: nn.Linear, a: Tensor, b: Tensor) -> dict[str, Part]:
    """Rows: a [n, ..., i], b [n, ..., o]; positions between batch and channels are summed."""
    a, b = a.reshape(len(a), -1, a.shape[-1]), b.reshape(len(b), -1, b.shape[-1])
    shape, t = module.weight.shape, a.shape[1]
    if t > 1 and t * (shape[0] + shape[1]) > shape[0] * shape[1]:
        weight = _explicit(torch.bmm(b.transpose(1, 2), a), shape)
    else:
        weight = Part(
            _gram(a.double()).mul_(_gram(b.double())).sum((1, 2)),
            lambda scale: (b * scale[:, None, None]).flatten(0, 1).T @ a.flatten(0, 1),
            _magnitude(a, b),
        )
    return {"weight": weight, "bias": _explicit(b.sum(1), shape[:1])}


def _conv(module: nn.Conv2d, a: Tensor, b: Tensor) -> dict[str, Part]:
    """Convolutions: a [n, i, H, W], b [n, o, H', W']."""
    shape = module.weight.shape
    if module.groups == 1 and _ghost_is_cheaper(module, a, b):
        a, b = (
            a.float(),
            b.float(),
        )  # the sum must not be rounded to 16 bits: its error would depend on everybody

        def total(scale: Tensor) -> Tensor:
            return _weight_gradient(module, a, b * scale[:, None, None, None])[0]

        weight = Part(convolution_squares(module, a, b), total, _magnitude(a, b))
    else:
        # a few samples as groups of one convolution: measured fastest while the weight is small
        together = 8 if shape.numel() < 2**16 else 1
        pairs = zip(a.to(b.dtype).split(together), b.split(together), strict=True)
        weight = _explicit(
            torch.cat([_weight_gradient(module, *pair, samples=len(pair[0])) for pair in pairs]),
            shape,
        )
    return {"weight": weight, "bias": _explicit(b.float().sum((2, 3)), shape[:1])}


def _weight_gradient(module: nn.Conv2d, a: Tensor, b: Tensor, samples: int = 1) -> Tensor:
    """Returns the weight gradient [samples, o, i, kh, kw]: of the whole batch, or of each of its `samples`."""
    o, *rest = module.weight.shape
    if samples > 1:
        a, b = (v.contiguous().view(1, -1, *v.shape[2:]) for v in (a, b))
    settings = (module.stride, module.padding, module.dilation, samples * module.groups)
    weight: Tensor = conv2d_weight(a, (samples * o, *rest), b, *settings)
    return weight.view(samples, o, *rest)


def _ghost_is_cheaper(module: nn.Conv2d, a: Tensor, b: Tensor) -> bool:
    """Compares multiplications of one sample: Gram matrices against its own gradient (measured: even below 16 x 16)."""
    pixels = (a.shape[2] + 2 * int(module.padding[0])) * (a.shape[3] + 2 * int(module.padding[1]))
    places = b.shape[2] * b.shape[3]
    return 2 * (pixels**2 * a.shape[1] + places**2 * b.shape[1]) < places * module.weight.numel()


def convolution_squares(module: nn.Conv2d, a: Tensor, b: Tensor) -> Tensor:
    """Returns sum over places s, t of <patch_s, patch_t> <b_s, b_t> in float64; patches from the Gram of pixels."""
    (sh, sw), (dh, dw), (kh, kw) = module.stride, module.dilation, module.kernel_size
    ph, pw = int(module.padding[0]), int(module.padding[1])
    padded = F.pad(a, (pw, pw, ph, ph)).double()
    n, _, height, width = padded.shape
    h, w = b.shape[2:]
    pixels = _gram(padded.flatten(2).transpose(1, 2)).view(n, height, width, height, width)
    patches = torch.zeros(n, h, w, h, w, dtype=torch.float64, device=a.device)
    for i in range(0, kh * dh, dh):
        for j in range(0, kw * dw, dw):
            rows, columns = slice(i, i + sh * (h - 1) + 1, sh), slice(j, j + sw * (w - 1) + 1, sw)
            patches += pixels[:, rows, columns, rows, columns]
    return (patches.view(n, h * w, h * w) * _gram(b.flatten(2).transpose(1, 2).double())).sum(
        (1, 2)
    )


def _gram(rows: Tensor) -> Tensor:
    return torch.bmm(rows, rows.transpose(1, 2))


def _magnitude(a: Tensor, b: Tensor) -> Tensor:
    """Cauchy-Schwarz over places: no entry of one sample's gradient sums more than |a| |b|."""
    bound: Tensor = a.flatten(1).norm(dim=1).double() * b.flatten(1).norm(dim=1).double()
    return bound


def _affine(normal: Tensor, b: Tensor, channels: int) -> dict[str, Part]:
    """Scale and bias after a normalisation over dimension 1: `normal` is the output without them."""
    each = (normal * b).reshape(len(b), channels, -1).sum(2)
    bias = b.reshape(len(b), channels, -1).sum(2)
    shape = torch.Size([channels])
    return {"weight": _explicit(each, shape), "bias": _explicit(bias, shape)}


def _batch_norm(module: nn.BatchNorm2d, a: Tensor, b: Tensor) -> dict[str, Part]:
    """Frozen batch normalisation: statistics are constants."""
    normal = F.batch_norm(a, module.running_mean, module.running_var, eps=module.eps)
    return _affine(normal, b, module.num_features)


def _group_norm(module: nn.GroupNorm, a: Tensor, b: Tensor) -> dict[str, Part]:
    return _affine(F.group_norm(a, module.num_groups, eps=module.eps), b, module.num_channels)


def _layer_norm(module: nn.LayerNorm, a: Tensor, b: Tensor) -> dict[str, Part]:
    shape = torch.Size(module.normalized_shape)
    normal = F.layer_norm(a, shape, eps=module.eps)
    each = [v.reshape(len(b), -1, shape.numel()).sum(1) for v in (normal * b, b)]
    return {"weight": _explicit(each[0], shape), "bias": _explicit(each[1], shape)}


RULES: dict[type, Rule] = {
    nn.Linear: _linear,
    nn.Conv2d: _conv,
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    nn.GroupNorm: _group_norm,
    nn.LayerNorm: _layer_norm,
}
