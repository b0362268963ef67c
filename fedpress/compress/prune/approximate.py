"""Cuts through layer norms and GRN, which are not exact: fewer channels have other means; their scales are fitted anew.

`trace(model, x, approximate=["layer_norm"])` lets the channels that a layer norm averages over be cut. What remains is
then normalised by the mean and the variance of what remains. `refit_norms_` makes good for that as far as a scale and
a shift for each channel can: by least squares its outputs on some examples become those of the uncut network. How far
the networks still differ is measured (`difference`), and all that has to be exact is checked with these statistics
held still (`constant_statistics`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fedpress.compress.prune.plan import PruningPlan
from fedpress.core.inputs import Example, call
from fedpress.errors import RecipeError, suggestion

Norm = Literal["layer_norm", "grn"]
RIDGE = 1e-6  # of the mean square: a channel that is always 0 keeps its scale
LINEAR = 1e-3  # how far a norm may be from linear in its scale and shift, relative to its outputs


def check_names(names: Sequence[str]) -> frozenset[str]:
    """Returns the kinds of norms that may be cut through.

    Raises:
        RecipeError: if there is no such kind.
    """
    known = list(get_args(Norm))
    if isinstance(names, str):
        raise RecipeError(
            f'got "{names}", expected a list', place="approximate", cure=f'give ["{names}"]'
        )
    for name in names:
        if name not in known:
            raise RecipeError(
                f"there is no '{name}'",
                place="approximate",
                cure=suggestion(name, known) or f"give {' or '.join(known)}",
            )
    return frozenset(names)


@dataclass(frozen=True)
class Difference:
    """How far the outputs of two networks are apart on the same examples.

    Attributes:
        relative: the norm of the difference, as a share of the norm of the first network's outputs.
        agreement: the share of examples with the same largest output; None where outputs are no scores of classes.
    """

    relative: float
    agreement: float | None


@torch.no_grad()
def difference(dense: nn.Module, small: nn.Module, batches: Sequence[Example]) -> Difference:
    """Compares the first outputs of two networks in evaluation mode on `batches`."""
    apart = size = 0.0
    same = count = 0
    with _evaluating(dense), _evaluating(small):
        for batch in batches:
            a, b = (_first(call(model, batch)).double() for model in (dense, small))
            apart += float((a - b).square().sum())
            size += float(a.square().sum())
            if a.dim() == 2:
                same += int((a.argmax(1) == b.argmax(1)).sum())
                count += len(a)
    return Difference((apart / max(size, 1e-30)) ** 0.5, same / count if count else None)


@torch.no_grad()
def refit_norms_(
    dense: nn.Module, small: nn.Module, plan: PruningPlan, batches: Sequence[Example]
) -> dict[str, str]:
    """Fits scales and shifts of the norms that `plan` cut through, so that they give what the uncut ones give.

    One norm after the other, in the order of the network, each with those before it fitted already. For each channel
    the weight and the bias are the solution of a least-squares problem over all examples and places. A fit that takes
    the outputs of the whole network farther away is undone. A norm may be a module of torch or the user's own, if its
    parameters enter its outputs linearly.

    Args:
        dense: the network before the cut.
        small: the same after `remove_`; its norms are changed.
        plan: what was cut.
        batches: public inputs; some hundred examples are enough.

    Returns:
        The norms that were not fitted, with the reason.
    """
    left: dict[str, str] = {}
    best = difference(dense, small, batches).relative
    with _evaluating(dense), _evaluating(small):
        for name in plan.approximate:
            before = [
                parameter.clone()
                for parameter in small.get_submodule(name).parameters(recurse=False)
            ]
            why = _refit_(name, dense, small, plan, batches)
            now = difference(dense, small, batches).relative
            if why is None and now > best:  # later layers may lean on what the fit takes away
                for parameter, value in zip(
                    small.get_submodule(name).parameters(recurse=False), before, strict=True
                ):
                    parameter.copy_(value)
                why = "the network's outputs came no nearer"
            elif why is None:
                best = now
            if why is not None:
                left[name or "the model itself"] = f"its scale was not fitted: {why}"
    return left


def _refit_(
    name: str, dense: nn.Module, small: nn.Module, plan: PruningPlan, batches: Sequence[Example]
) -> str | None:
    """Fits one norm; returns why not, if so."""
    norm = small.get_submodule(name)
    vectors = _cut_vectors(name, norm, plan)
    if not vectors:
        return "it has no scale of its own"
    if any(True for _ in norm.children()) or len(vectors) > 2:
        return "it does more than to normalise"
    parameters = [parameter for parameter, _ in vectors]
    kept = torch.tensor(vectors[0][1])
    system = _NormalEquations(len(kept), len(parameters))
    for batch in batches:
        wanted = _outputs(dense, name, batch)
        calls = _arguments(small, name, batch)
        for target, (args, options) in zip(wanted, calls, strict=True):
            base, slopes, real = _parts(norm, args, options, parameters)
            dim = _channel_dim(target, real)
            if dim is None:
                return "its outputs do not have its channels"
            columns = torch.stack([_rows(slope, dim) for slope in slopes], -1)
            modelled = (columns @ _now(parameters)[..., None])[..., 0] + _rows(base, dim)
            missed = (modelled - _rows(real, dim)).abs().max()
            if missed > LINEAR * real.abs().max().clamp_min(1e-6):
                return "its parameters do not enter its outputs linearly"
            goal = target.index_select(dim, kept.to(target.device))
            system.add_(columns, _rows(goal, dim) - _rows(base, dim))
    solved = system.solve(_now(parameters).cpu())
    for parameter, values in zip(parameters, solved.unbind(1), strict=True):
        parameter.copy_(values.view(parameter.shape))
    return None


def _cut_vectors(
    name: str, norm: nn.Module, plan: PruningPlan
) -> list[tuple[nn.Parameter, tuple[int, ...]]]:
    """Returns the norm's parameters of one number for each channel, and the indices of the channels that stay."""
    prefix = f"{name}." if name else ""
    vectors = []
    for key, parameter in norm.named_parameters(recurse=False):
        axes = plan.keep.get(prefix + key, {})
        if len(axes) != 1:
            continue
        ((axis, indices),) = axes.items()
        if parameter.numel() == parameter.shape[axis]:
            vectors.append((parameter, indices))
    return vectors


def _now(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Returns the values of the parameters side by side: [channels, parameters]."""
    return torch.stack([parameter.flatten().double() for parameter in parameters], -1)


class _NormalEquations:
    """A least-squares problem for each channel, added up over batches: gram @ solution = right."""

    def __init__(self, channels: int, unknowns: int) -> None:
        self.gram = torch.zeros(channels, unknowns, unknowns, dtype=torch.float64)
        self.right = torch.zeros(channels, unknowns, dtype=torch.float64)

    def add_(self, columns: Tensor, wanted: Tensor) -> None:
        """Adds `columns` [channels, places, unknowns], whose weighted sum shall be `wanted` [channels, places]."""
        self.gram += (columns.transpose(1, 2) @ columns).cpu()
        self.right += (columns.transpose(1, 2) @ wanted[..., None])[..., 0].cpu()

    def solve(self, now: Tensor) -> Tensor:
        """Returns the solution [channels, unknowns]; `now` stays where the examples say nothing."""
        unknowns = now.shape[1]
        ridge = RIDGE * self.gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)
        gram = self.gram + ridge[:, None, None] * torch.eye(unknowns, dtype=torch.float64)
        solved: Tensor = torch.linalg.solve(gram, self.right + ridge[:, None] * now)
        return solved


def _parts(
    norm: nn.Module, args: Any, options: Any, parameters: Sequence[nn.Parameter]
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Returns the output with all parameters 0, what each of them adds at 1, and the real output."""
    real = _first(norm(*args, **options))
    values = [parameter.clone() for parameter in parameters]
    for parameter in parameters:
        parameter.zero_()
    base = _first(norm(*args, **options))
    slopes = []
    for parameter in parameters:
        parameter.fill_(1.0)
        slopes.append(_first(norm(*args, **options)) - base)
        parameter.zero_()
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
    return base, slopes, real


def _rows(x: Tensor, dim: int) -> Tensor:
    """Returns a tensor as [channels, places]."""
    return x.movedim(dim, 0).flatten(1).double() if x.dim() > 1 else x[:, None].double()


def _channel_dim(whole: Tensor, cut: Tensor) -> int | None:
    if whole.dim() != cut.dim():
        return None
    other = [d for d in range(cut.dim()) if whole.shape[d] != cut.shape[d]]
    return other[0] if len(other) == 1 else None


def _outputs(model: nn.Module, name: str, batch: Example) -> list[Tensor]:
    """Returns what the module `name` gives, each time that it is called."""
    seen: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_hook(
        lambda _, __, output: seen.append(_first(output))
    )
    try:
        call(model, batch)
    finally:
        hook.remove()
    return seen


def _arguments(model: nn.Module, name: str, batch: Example) -> list[tuple[Any, Any]]:
    """Returns what the module `name` is called with, each time."""
    seen: list[tuple[Any, Any]] = []
    hook = model.get_submodule(name).register_forward_pre_hook(
        lambda _, args, options: seen.append((args, options)), with_kwargs=True
    )
    try:
        call(model, batch)
    finally:
        hook.remove()
    return seen


def _first(output: Any) -> Tensor:
    from torch.utils._pytree import tree_leaves

    found: Tensor = next(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
    return found


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def constant_statistics(plan: PruningPlan) -> Iterator[None]:
    """Holds still what the norms that `plan` cut through take from all channels: all else must be exact.

    While it lasts a layer norm is its scale and shift alone, and means that keep their axis, with which norms are
    written by hand, are 1.
    """
    if not plan.approximate:
        yield
        return
    with _ConstantStatistics():
        yield


class _ConstantStatistics(TorchFunctionMode):
    """Calls with statistics of channels give scale and shift alone."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls `func`, or what stands for it."""
        options = kwargs or {}
        if func in (F.layer_norm, F.rms_norm, F.group_norm):
            return _scaled(func, *args, **options)
        if func in _MEANS:
            result = func(*args, **options)
            kept = _first(result).dim() == args[0].dim()
            if kept and isinstance(result, Tensor):
                return torch.ones_like(result)
            if kept:
                return type(result)([torch.ones_like(each) for each in result])
            return result
        return func(*args, **options)


_MEANS = frozenset(
    [
        Tensor.mean,
        torch.mean,
        Tensor.var,
        torch.var,
        Tensor.std,
        torch.std,
        torch.var_mean,
        torch.std_mean,
    ]
)


def _scaled(
    func: Any,
    x: Tensor,
    size: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *rest: Any,
    **options: Any,
) -> Any:
    """Returns what a norm gives without its statistics."""
    if func is F.rms_norm:
        bias = None  # an eps may stand there
    if func is F.group_norm:
        if size != 1:
            return func(x, size, weight, bias, *rest, **options)
        shape = [-1 if d == 1 else 1 for d in range(x.dim())]
        weight, bias = (None if v is None else v.view(shape) for v in (weight, bias))
    out = x if weight is None else x * weight
    return out if bias is None else out + bias
