"""Clipped per-sample gradients by ghost norms: nearly as fast as a plain training step.

One forward and one backward pass give the input `a` and the output gradient `b` of every layer for
the whole batch. In layers with few positions (small images), the norm of each sample's gradient is
computed from the Gram matrices of `a` and `b` ("ghost norm"). In other layers it is computed from
the sample's gradient. Then `b` is multiplied by the clip factors, and one weight gradient per layer
gives the clipped sum.

Li et al. 2022 (arXiv:2110.05679, section 4); Bu et al. 2022, arXiv:2205.10683 (mixed ghost norm)
and arXiv:2210.00038 (book-keeping).

`RULES` has an entry for each supported type of layer. `supports` returns False for a network that
trains parameters of any other layer.
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
"""Relative distance of two neighbouring float32 numbers."""


@dataclass(frozen=True)
class ParameterTerm:
    """One parameter's contribution to each sample's norm and to the clipped sum.

    Attributes:
        squares: squared norms of the per-sample gradients of this parameter, float64 [n].
        total: clip factors [n] -> sum over samples of factor * gradient, float32 of the parameter's
            shape.
        magnitude: for each sample, a bound on the sum of the absolute values of the summands of any
            entry of its gradient, float64 [n]. If the summands cancel in `total`, the rounding
            error is relative to `magnitude`, not to the norm.
    """

    squares: Tensor
    total: Callable[[Tensor], Tensor]
    magnitude: Tensor | float = 0.0


Rule = Callable[[Any, Tensor, Tensor], dict[str, ParameterTerm]]
"""(module, input a [n, ...], output gradient b [n, ...]) -> terms by parameter name."""


def supports(model: nn.Module) -> bool:
    """Returns whether `add_ghost_` can be used for this network.

    Each trainable parameter must be the weight or bias of exactly one module whose type is in
    `RULES`, and every layer that pads must pad by a given number of zeros.
    """
    owners: dict[int, int] = {}
    for module in model.modules():
        if not _pads_with_zeros(module):
            return False
        for name, p in module.named_parameters(recurse=False):
            if not p.requires_grad:
                continue
            # Only the exact type, because a subclass may compute something else.
            if type(module) not in RULES or name not in ("weight", "bias"):
                return False
            owners[id(p)] = owners.get(id(p), 0) + 1
    # If two modules share a parameter, its norm has a cross term, which no rule computes.
    return all(count == 1 for count in owners.values())


def _pads_with_zeros(module: nn.Module) -> bool:
    """Returns whether a module pads with zeros, and its padding is a number, not "same"."""
    zeros = getattr(module, "padding_mode", "zeros") == "zeros"
    return zeros and not isinstance(getattr(module, "padding", 0), str)


def add_ghost_(views: list[Tensor], query: Query) -> Measured:
    """Adds the clipped gradient of every sample to `views`, in one pass over the batch.

    If norms are not finite, their samples are added one by one, and all others in a second pass.

    Args:
        views: the sum, as one view per trainable parameter; changed in place.
        query: the samples.

    Raises:
        NotImplementedError: if a layer ran more than once or not at all in the forward pass.
    """
    x = query.x
    losses, layers = _record(query)
    # The sensitivity depends on the norms, so autocast must not compute them in 16 bits.
    with torch.autocast(x.device.type, enabled=False):
        terms = []
        for module, a, b in layers:
            terms += terms_of(module, a, b)
        norms = norms_of([term for _, term in terms], len(x), x.device)
        bad = ~torch.isfinite(norms)
        if bad.any():
            return _add_apart_(bad, views, query)
        scale = clip_factors(norms, query.clip_norm).float()
        view_of = {id(p): view for p, view in zip(trainable(query.model), views, strict=True)}
        for p, term in terms:
            view_of[id(p)].add_(term.total(scale))
    return [Sample(*pair) for pair in zip(losses.tolist(), norms.tolist(), strict=True)]


def _record(query: Query) -> tuple[Tensor, list[tuple[nn.Module, Tensor, Tensor]]]:
    """Runs the batch forward and backward.

    Returns:
        The losses [n], and for each trained layer: the module, its input [n, ...] and its output
        gradient [n, ...].
    """
    model = query.model
    loss_fn = query.loss_fn
    seen: list[tuple[nn.Module, Tensor, Any]] = []

    def see(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        # The graph's edge instead of the tensor, which an in-place ReLU may overwrite.
        seen.append((module, args[0].detach(), torch.autograd.graph.get_gradient_edge(output)))

    owners = [module for module in model.modules() if _trains(module)]
    handles = [module.register_forward_hook(see) for module in owners]
    try:
        outputs = call(model, query.x)
    finally:
        # A remaining hook would run in every later forward pass.
        for handle in handles:
            handle.remove()
    # If a layer ran twice, its norms have a cross term, which no rule computes.
    if sorted(id(m) for m, _, _ in seen) != sorted(id(m) for m in owners):
        raise NotImplementedError("a layer ran more than once, or not at all")
    # Losses are computed in float32 even under autocast.
    losses = torch.func.vmap(lambda o, t: loss_fn(o[None], t[None]))(outputs.float(), query.y)
    # In the gradient of the sum of losses, each row is the output gradient of one sample.
    grads = torch.autograd.grad(losses.sum(), [edge for _, _, edge in seen])
    layers = []
    for (module, a, _), b in zip(seen, grads, strict=True):
        layers.append((module, a, b))
    return losses.detach(), layers


def _trains(module: nn.Module) -> bool:
    """Returns whether the module itself, without its children, has a trained parameter."""
    return any(p.requires_grad for p in module.parameters(recurse=False))


def terms_of(module: nn.Module, a: Tensor, b: Tensor) -> list[tuple[nn.Parameter, ParameterTerm]]:
    """Returns the term of each trained parameter of `module`.

    Args:
        module: a layer whose type is in `RULES`.
        a: inputs of the layer [n, ...].
        b: gradients of the samples' losses with respect to the layer's outputs [n, ...].
    """
    # Convolutions compute per-sample gradients in 16 bits under autocast, see `_conv`.
    if not isinstance(module, nn.Conv2d):
        a = a.float()
        b = b.float()
    terms = RULES[type(module)](module, a, b)
    found = []
    for name, p in module.named_parameters(recurse=False):
        if p.requires_grad:
            found.append((p, terms[name]))
    return found


def norms_of(terms: list[ParameterTerm], n: int, device: torch.device) -> Tensor:
    """Returns the norms [n], increased by the possible rounding error of the clipped sum."""
    squares = torch.zeros(n, dtype=torch.float64, device=device)
    rounding = torch.zeros_like(squares)
    for term in terms:
        # Rounding may make a square slightly negative.
        squares += term.squares.clamp_min(0)
        rounding += (ROUNDING * torch.as_tensor(term.magnitude)) ** 2
    return squares.sqrt() * (1 + 4 * ROUNDING) + rounding.sqrt()


def _add_apart_(bad: Tensor, views: list[Tensor], query: Query) -> Measured:
    """Adds the `bad` samples (bool [n]) one by one, and all other samples together.

    A bad sample has no finite float32 norm; the loop may find a finite norm in float64. In a batch,
    the NaN values of one sample would spread over the whole sum.
    """
    measured: Measured = [Sample(0.0, 0.0)] * len(query.x)
    good_rows = (~bad).nonzero().flatten()
    bad_rows = bad.nonzero().flatten()
    if len(good_rows):
        found = add_ghost_(views, query.take(good_rows))
        for row, sample in zip(good_rows.tolist(), found, strict=True):
            measured[row] = sample
    found = add_loop_(views, query.take(bad_rows))
    for row, sample in zip(bad_rows.tolist(), found, strict=True):
        measured[row] = sample
    return measured


def _explicit(gradients: Tensor, shape: torch.Size) -> ParameterTerm:
    """Returns the term of a parameter with this `shape` from the per-sample gradients [n, ...]."""
    flat = gradients.flatten(1).float()
    return ParameterTerm(row_norms(flat).square(), lambda scale: (scale @ flat).view(shape))


def _linear(module: nn.Linear, a: Tensor, b: Tensor) -> dict[str, ParameterTerm]:
    """Rule of linear layers: a [n, ..., i], b [n, ..., o].

    The middle dimensions are positions, such as the tokens of a sentence. Gradients are summed over
    the positions.
    """
    a = a.reshape(len(a), -1, a.shape[-1])
    b = b.reshape(len(b), -1, b.shape[-1])
    shape = module.weight.shape
    positions = a.shape[1]
    # Gram matrices need positions^2 (i + o) products, per-sample gradients positions * i * o.
    if positions > 1 and positions * (shape[0] + shape[1]) > shape[0] * shape[1]:
        weight = _explicit(torch.bmm(b.transpose(1, 2), a), shape)
    else:
        # In float64, because entries of the Gram matrices may cancel in the sum.
        weight = ParameterTerm(
            squares=_gram(a.double()).mul_(_gram(b.double())).sum((1, 2)),
            total=lambda scale: (b * scale[:, None, None]).flatten(0, 1).T @ a.flatten(0, 1),
            magnitude=_magnitude(a, b),
        )
    return {"weight": weight, "bias": _explicit(b.sum(1), shape[:1])}


def _conv(module: nn.Conv2d, a: Tensor, b: Tensor) -> dict[str, ParameterTerm]:
    """Rule of convolutions: a [n, i, H, W], b [n, o, H', W']."""
    shape = module.weight.shape
    if module.groups == 1 and _ghost_is_cheaper(module, a, b):
        # In 16 bits the rounding error of the sum would depend on all samples, so one more sample
        # could move the sum by more than the clip norm.
        a = a.float()
        b = b.float()

        def total(scale: Tensor) -> Tensor:
            return _weight_gradient(module, a, b * scale[:, None, None, None])[0]

        weight = ParameterTerm(convolution_squares(module, a, b), total, _magnitude(a, b))
    else:
        # For small weights, eight samples as groups of one convolution were measured fastest.
        together = 8 if shape.numel() < 2**16 else 1
        gradients = []
        pairs = zip(a.to(b.dtype).split(together), b.split(together), strict=True)
        for some_a, some_b in pairs:
            gradients.append(_weight_gradient(module, some_a, some_b, samples=len(some_a)))
        weight = _explicit(torch.cat(gradients), shape)
    return {"weight": weight, "bias": _explicit(b.float().sum((2, 3)), shape[:1])}


def _weight_gradient(module: nn.Conv2d, a: Tensor, b: Tensor, samples: int = 1) -> Tensor:
    """Returns weight gradients [samples, o, i, kh, kw].

    If `samples` is 1, this is the gradient of the whole batch; otherwise one gradient per sample.
    """
    o, *rest = module.weight.shape
    if samples > 1:
        # Samples become groups of channels of one image.
        a, b = (v.contiguous().view(1, -1, *v.shape[2:]) for v in (a, b))
    settings = (module.stride, module.padding, module.dilation, samples * module.groups)
    weight: Tensor = conv2d_weight(a, (samples * o, *rest), b, *settings)
    return weight.view(samples, o, *rest)


def _ghost_is_cheaper(module: nn.Conv2d, a: Tensor, b: Tensor) -> bool:
    """Returns whether Gram matrices need fewer multiplications than per-sample gradients.

    In measurements this was true for images below 16 x 16.
    """
    pixels = (a.shape[2] + 2 * int(module.padding[0])) * (a.shape[3] + 2 * int(module.padding[1]))
    places = b.shape[2] * b.shape[3]
    return 2 * (pixels**2 * a.shape[1] + places**2 * b.shape[1]) < places * module.weight.numel()


def convolution_squares(module: nn.Conv2d, a: Tensor, b: Tensor) -> Tensor:
    """Returns the squared norms of the per-sample weight gradients, float64 [n].

    This is the sum over output positions s, t of <patch_s, patch_t> <b_s, b_t>. Products of patches
    are sums of products of pixels, so patches need not be copied.
    """
    (sh, sw), (dh, dw), (kh, kw) = module.stride, module.dilation, module.kernel_size
    ph, pw = int(module.padding[0]), int(module.padding[1])
    padded = F.pad(a, (pw, pw, ph, ph)).double()
    n, _, height, width = padded.shape
    h, w = b.shape[2:]
    pixels = _gram(padded.flatten(2).transpose(1, 2)).view(n, height, width, height, width)
    patches = torch.zeros(n, h, w, h, w, dtype=torch.float64, device=a.device)
    for i in range(0, kh * dh, dh):
        for j in range(0, kw * dw, dw):
            rows = slice(i, i + sh * (h - 1) + 1, sh)
            columns = slice(j, j + sw * (w - 1) + 1, sw)
            patches += pixels[:, rows, columns, rows, columns]
    gradients = _gram(b.flatten(2).transpose(1, 2).double())
    return (patches.view(n, h * w, h * w) * gradients).sum((1, 2))


def _gram(rows: Tensor) -> Tensor:
    """Returns the scalar products of all pairs of rows: [n, k, m] -> [n, k, k]."""
    return torch.bmm(rows, rows.transpose(1, 2))


def _magnitude(a: Tensor, b: Tensor) -> Tensor:
    """Returns |a| |b| of each sample, float64 [n].

    By Cauchy-Schwarz, this bounds the sum of absolute summands of each gradient entry.
    """
    bound: Tensor = a.flatten(1).norm(dim=1).double() * b.flatten(1).norm(dim=1).double()
    return bound


def _affine(normal: Tensor, b: Tensor, channels: int) -> dict[str, ParameterTerm]:
    """Rule for scale and bias of a normalisation with channels in dimension 1.

    `normal` [n, c, ...] is the output of the layer before scale and bias.
    """
    each = (normal * b).reshape(len(b), channels, -1).sum(2)
    bias = b.reshape(len(b), channels, -1).sum(2)
    shape = torch.Size([channels])
    return {"weight": _explicit(each, shape), "bias": _explicit(bias, shape)}


def _batch_norm(module: nn.BatchNorm2d, a: Tensor, b: Tensor) -> dict[str, ParameterTerm]:
    """Rule of batch normalisation with frozen statistics (`check_separable` allows no other)."""
    normal = F.batch_norm(a, module.running_mean, module.running_var, eps=module.eps)
    return _affine(normal, b, module.num_features)


def _group_norm(module: nn.GroupNorm, a: Tensor, b: Tensor) -> dict[str, ParameterTerm]:
    return _affine(F.group_norm(a, module.num_groups, eps=module.eps), b, module.num_channels)


def _layer_norm(module: nn.LayerNorm, a: Tensor, b: Tensor) -> dict[str, ParameterTerm]:
    shape = torch.Size(module.normalized_shape)
    normal = F.layer_norm(a, shape, eps=module.eps)
    # Dimensions between batch and normalised shape are positions with shared parameters.
    scale = (normal * b).reshape(len(b), -1, shape.numel()).sum(1)
    bias = b.reshape(len(b), -1, shape.numel()).sum(1)
    return {"weight": _explicit(scale, shape), "bias": _explicit(bias, shape)}


RULES: dict[type, Rule] = {
    nn.Linear: _linear,
    nn.Conv2d: _conv,
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    nn.GroupNorm: _group_norm,
    nn.LayerNorm: _layer_norm,
}
"""Type of a layer -> its rule; a subclass has no rule, because it may compute something else."""
