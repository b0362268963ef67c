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

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from fedpress.core.inputs import call
from fedpress.core.outputs import as_float32, map_outputs
from fedpress.core.parameters import trainable
from fedpress.privacy.per_example.persample import (
    BLOCK,
    Measured,
    Query,
    Sample,
    add_loop_,
    clip_factors,
    row_norms,
)

UNIT = 2.0**-24
"""Largest relative error of one rounding to float32."""

COLUMNS = 256 * BLOCK
"""Columns of per-sample gradients that are converted to float32 at a time: they fit in a cache."""

TOGETHER = 8
"""Samples that are processed at a time where copies of all samples would not fit in a cache."""


@dataclass(frozen=True)
class ParameterTerm:
    """One parameter's contribution to each sample's norm and to the clipped sum.

    Attributes:
        squares: squared norms of the per-sample gradients of this parameter, float64 [n].
        total: clip factors [n] -> sum over samples of factor * gradient, float32 of the parameter's
            shape.
        rounding: for each sample, a bound on the L2 norm of the rounding error of its gradient
            within `total`, float64 [n]. It is not relative to the norm, because the products that
            are summed may cancel. 0 if the norm is that of the very values that are summed.
    """

    squares: Tensor
    total: Callable[[Tensor], Tensor]
    rounding: Tensor | float = 0.0


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
    losses = torch.func.vmap(
        lambda o, t: loss_fn(map_outputs(o, lambda part: part[None]), t[None])
    )(as_float32(outputs), query.y)
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
    # Their inputs are the largest, so their rules convert a few samples at a time, or none.
    if not isinstance(module, nn.Conv2d | nn.BatchNorm2d):
        a = a.float()
        b = b.float()
    terms = RULES[type(module)](module, a, b)
    found = []
    for name, p in module.named_parameters(recurse=False):
        if p.requires_grad:
            found.append((p, terms[name]))
    return found


def norms_of(terms: list[ParameterTerm], n: int, device: torch.device) -> Tensor:
    """Returns the norms [n], increased by the rounding errors that the terms declare."""
    squares = torch.zeros(n, dtype=torch.float64, device=device)
    rounding = torch.zeros_like(squares)
    for term in terms:
        # Rounding may make a square slightly negative.
        squares += term.squares.clamp_min(0)
        rounding += torch.as_tensor(term.rounding) ** 2
    return squares.sqrt() + rounding.sqrt()


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
    """Returns the term of a parameter with this `shape` from the per-sample gradients [n, ...].

    The gradients may have 16 bits. Norm and sum are computed in float32 from the same 16-bit
    values, so the clip factor bounds exactly what is added, however coarse these values are.
    """
    # Converted block by block, because a float32 copy of everything takes longer than the sum.
    parts = gradients.flatten(1).split(COLUMNS, dim=1)
    norms = torch.stack([row_norms(part.float()) for part in parts]).norm(dim=0)

    def total(scale: Tensor) -> Tensor:
        return torch.cat([scale @ part.float() for part in parts]).view(shape)

    return ParameterTerm(norms.square(), total)


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
            rounding=_rounding(a, b, positions),
        )
    return {"weight": weight, "bias": _explicit(b.sum(1), shape[:1])}


def _conv(module: nn.Conv2d, a: Tensor, b: Tensor) -> dict[str, ParameterTerm]:
    """Rule of convolutions: a [n, i, H, W], b [n, o, H', W']."""
    shape = module.weight.shape
    if module.groups > 1:
        weight = _explicit(_grouped_gradients(module, a, b), shape)
    elif _ghost_is_cheaper(module, a, b):
        weight = _conv_by_norm(module, a.float(), b.float())
    else:
        weight = _last_to_first(_explicit(patch_gradients(module, a, b), _channels_last(shape)))
    terms = {"weight": weight}
    if module.bias is not None:
        terms["bias"] = _explicit(b.sum((2, 3), dtype=torch.float32), shape[:1])
    return terms


def _conv_by_norm(module: nn.Conv2d, a: Tensor, b: Tensor) -> ParameterTerm:
    """Returns the weight's term by ghost norms, from float32 `a` and `b`.

    In 16 bits the rounding error of the sum would depend on all samples, so one more sample could
    move the sum by more than the clip norm.
    """
    shape = module.weight.shape
    settings = (module.stride, module.padding, module.dilation)

    def total(scale: Tensor) -> Tensor:
        summed: Tensor = conv2d_weight(a, shape, b * scale[:, None, None, None], *settings)
        return summed

    # The gradient is a product of b and the patches of a; a pixel is in at most kh * kw patches.
    rounding = _rounding(a, b, b.shape[2] * b.shape[3]) * math.sqrt(math.prod(module.kernel_size))
    return ParameterTerm(convolution_squares(module, a, b), total, rounding)


def patch_gradients(module: nn.Conv2d, a: Tensor, b: Tensor) -> Tensor:
    """Returns per-sample weight gradients in the type of `b`, [n, o, kh * kw * i].

    Each is a matrix product of output gradients and patches. Processors accumulate products of 16
    bits in float32; only the result is rounded to 16 bits.
    """
    (ph, pw), (sh, sw), (dh, dw) = _pairs(module.padding), module.stride, module.dilation
    kh, kw = module.kernel_size
    o, i = module.weight.shape[:2]
    gradients = b.new_empty(len(b), o, kh * kw * i)
    pieces = (t.split(TOGETHER) for t in (a, b, gradients))
    for some_a, some_b, out in zip(*pieces, strict=True):
        # Channels last: the values of a pixel are neighbours, so patches are copied in long runs.
        pixels = F.pad(some_a.to(b.dtype).permute(0, 2, 3, 1), (0, 0, pw, pw, ph, ph))
        windows = pixels.unfold(1, dh * (kh - 1) + 1, sh).unfold(2, dw * (kw - 1) + 1, sw)
        # [n, H', W', i, kh, kw] -> [n, H' * W', kh * kw * i]
        patches = (
            windows[..., ::dh, ::dw].permute(0, 1, 2, 4, 5, 3).reshape(len(some_a), -1, kh * kw * i)
        )
        torch.bmm(some_b.permute(0, 2, 3, 1).flatten(1, 2).transpose(1, 2), patches, out=out)
    return gradients


def _grouped_gradients(module: nn.Conv2d, a: Tensor, b: Tensor) -> Tensor:
    """Returns per-sample weight gradients [n, o, i / groups, kh, kw] of a grouped convolution."""
    o, *rest = module.weight.shape
    # For small weights, eight samples as groups of one convolution were measured fastest.
    together = TOGETHER if module.weight.numel() < 2**16 else 1
    gradients = []
    for some_a, some_b in zip(a.to(b.dtype).split(together), b.split(together), strict=True):
        n = len(some_a)
        # Samples become groups of channels of one image.
        image, gradient = (v.contiguous().view(1, -1, *v.shape[2:]) for v in (some_a, some_b))
        settings = (module.stride, module.padding, module.dilation, n * module.groups)
        weight = conv2d_weight(image, (n * o, *rest), gradient, *settings)
        gradients.append(weight.view(n, o, *rest))
    return torch.cat(gradients)


def _channels_last(shape: torch.Size) -> torch.Size:
    """Returns the shape [o, kh, kw, i] of a weight [o, i, kh, kw]."""
    o, i, kh, kw = shape
    return torch.Size((o, kh, kw, i))


def _last_to_first(term: ParameterTerm) -> ParameterTerm:
    """Returns the term of a weight [o, i, kh, kw] from that of the same weight [o, kh, kw, i]."""
    return replace(term, total=lambda scale: term.total(scale).permute(0, 3, 1, 2))


def _pairs(padding: object) -> tuple[int, int]:
    """Returns a convolution's padding as numbers; `supports` refuses names such as "same"."""
    assert isinstance(padding, tuple), "a name of a padding instead of numbers"
    return int(padding[0]), int(padding[1])


def _ghost_is_cheaper(module: nn.Conv2d, a: Tensor, b: Tensor) -> bool:
    """Returns whether Gram matrices cost less time than per-sample gradients.

    In measurements this was true for images below 16 x 16, and in 16 bits below 8 x 8: per-sample
    gradients are products in the type of `b`, Gram matrices and the sum after them are not.
    """
    ph, pw = _pairs(module.padding)
    pixels = (a.shape[2] + 2 * ph) * (a.shape[3] + 2 * pw)
    places = b.shape[2] * b.shape[3]
    each = 2 if b.dtype == torch.float32 else 8
    gram = pixels**2 * a.shape[1] + places**2 * b.shape[1]
    return each * gram < places * module.weight.numel()


def convolution_squares(module: nn.Conv2d, a: Tensor, b: Tensor) -> Tensor:
    """Returns the squared norms of the per-sample weight gradients, float64 [n].

    This is the sum over output positions s, t of <patch_s, patch_t> <b_s, b_t>. Products of patches
    are sums of products of pixels, so patches need not be copied.
    """
    (sh, sw), (dh, dw), (kh, kw) = module.stride, module.dilation, module.kernel_size
    ph, pw = _pairs(module.padding)
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


def _rounding(a: Tensor, b: Tensor, positions: int) -> Tensor:
    """Returns a bound on the error of summing a sample's products in float32, float64 [n].

    A sum of k products, in any order, has an error of at most (k + 1) UNIT times the sum of their
    absolute values (Higham 2002, section 3.1); one more for the clip factor on `b`. By
    Cauchy-Schwarz, those absolute values have at most the L2 norm |a| |b| over all entries.
    """
    sizes: Tensor = a.flatten(1).norm(dim=1).double() * b.flatten(1).norm(dim=1).double()
    return (positions + 2) * UNIT * sizes


def _affine(scale: Tensor, bias: Tensor) -> dict[str, ParameterTerm]:
    """Returns the terms of a normalisation's scale and bias from their gradients [n, c] each."""
    shape = scale.shape[1:]
    return {"weight": _explicit(scale, shape), "bias": _explicit(bias, shape)}


def _over_places(values: Tensor) -> Tensor:
    """Returns the sums over all dimensions after the channels: [n, c, ...] -> [n, c]."""
    places = tuple(range(2, values.dim()))
    return values.sum(places) if places else values


def _batch_norm(module: nn.BatchNorm2d, a: Tensor, b: Tensor) -> dict[str, ParameterTerm]:
    """Rule of batch normalisation with frozen statistics (`check_separable` allows no other)."""
    mean, var = module.running_mean, module.running_var
    # `check_separable` refuses a batch norm without statistics.
    assert mean is not None
    assert var is not None
    centre = mean.view(-1, *[1] * (a.dim() - 2))
    scales, biases = [], []
    for some_a, some_b in zip(a.split(TOGETHER), b.split(TOGETHER), strict=True):
        wide = some_b.float()
        # The subtraction of a float32 mean gives float32.
        scales.append(_over_places((some_a - centre).mul_(wide)))
        biases.append(_over_places(wide))
    # The divisor is the same at all places, so it is applied to the sums.
    return _affine(torch.cat(scales) * (var + module.eps).rsqrt(), torch.cat(biases))


def _group_norm(module: nn.GroupNorm, a: Tensor, b: Tensor) -> dict[str, ParameterTerm]:
    normal = F.group_norm(a, module.num_groups, eps=module.eps)
    return _affine(_over_places(normal * b), _over_places(b))


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
