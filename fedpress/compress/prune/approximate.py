"""Corrects layer norms after pruning of channels that they average over (approximate pruning).

`trace(model, x, approximate=["layer_norm"])` allows pruning of channels that a layer norm averages
over; "grn" allows the same for global response norms. This changes the result: the remaining
channels are normalised by their own mean and variance. `refit_norms_` then fits scale and shift of
each norm by least squares, so that its outputs on some examples come near to those of the dense
(unpruned) network. `output_difference` measures how far the two networks still differ. Apart from
mean and variance, the pruned network must compute the same as the dense one. The parity check tests
this: it compares the networks with the statistics replaced by constants (`constant_statistics`).
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

NormKind = Literal["layer_norm", "grn"]
"""A kind of norm that may lose channels; "grn" is global response norm."""
RIDGE = 1e-6
"""Weight of the old scale and shift in the fit, relative to the data. Without it, the fit of a
channel that is always 0 would have no unique solution."""
LINEARITY_TOLERANCE = 1e-3
"""A norm is fitted only if its outputs are linear in its parameters up to this error, as a share of
the largest output."""


def check_norm_kinds(names: Sequence[str]) -> frozenset[str]:
    """Checks the setting `approximate` (kinds of norms), and returns it as a set.

    Raises:
        RecipeError: if `names` is a string instead of a list, or has an unknown kind.
    """
    known = list(get_args(NormKind))
    # A single string would be read letter by letter.
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
class OutputDifference:
    """How far the outputs of two networks differ on the same examples.

    Attributes:
        relative: norm of the difference, divided by the norm of the first network's outputs.
        agreement: share of examples for which both networks predict the same class; None if the
            outputs are not [n, classes].
    """

    relative: float
    agreement: float | None


@torch.no_grad()
def output_difference(
    dense: nn.Module, small: nn.Module, batches: Sequence[Example]
) -> OutputDifference:
    """Compares two networks in evaluation mode on `batches`.

    If the networks return several outputs, only the first ones are compared.
    """
    squared_difference = squared_norm = 0.0
    same = count = 0
    with _evaluating(dense), _evaluating(small):
        for batch in batches:
            wanted = _first_tensor(call(dense, batch)).double()
            given = _first_tensor(call(small, batch)).double()
            squared_difference += float((wanted - given).square().sum())
            squared_norm += float(wanted.square().sum())
            # Only outputs [n, classes] have a predicted class to compare.
            if wanted.dim() == 2:
                same += int((wanted.argmax(1) == given.argmax(1)).sum())
                count += len(wanted)
    # Outputs that are all 0 have no norm to divide by.
    relative = (squared_difference / max(squared_norm, 1e-30)) ** 0.5
    return OutputDifference(relative, same / count if count else None)


@torch.no_grad()
def refit_norms_(
    dense: nn.Module, small: nn.Module, plan: PruningPlan, batches: Sequence[Example]
) -> dict[str, str]:
    """Fits scale and shift of each approximated norm to the outputs of this norm in `dense`.

    The norms are fitted in the order of `plan.approximate`, so the inputs of a norm come from
    norms that are already fitted. For each channel, scale and shift are the least-squares solution
    over all examples and positions. If the outputs of the whole network are farther from the dense
    ones after a fit, this fit is undone. A norm may be a torch module or the user's own module, if
    its outputs are linear in its parameters.

    Args:
        dense: the network before pruning.
        small: the network after `remove_`; its norms are changed.
        plan: the plan by which `small` was pruned.
        batches: public inputs; a few hundred examples are enough.

    Returns:
        Name of each norm that was not fitted -> the reason.
    """
    not_fitted: dict[str, str] = {}
    # The first fit is compared with pruning alone.
    best = output_difference(dense, small, batches).relative
    with _evaluating(dense), _evaluating(small):
        for name in plan.approximate:
            parameters = list(small.get_submodule(name).parameters(recurse=False))
            before = [parameter.clone() for parameter in parameters]
            why = _refit_(name, dense, small, plan, batches)
            now = output_difference(dense, small, batches).relative

            if why is None and now > best:
                # The norm's own outputs are nearer, but later layers may amplify the remaining
                # error.
                for parameter, value in zip(parameters, before, strict=True):
                    parameter.copy_(value)
                why = "the network's outputs came no nearer"
            elif why is None:
                best = now
            if why is not None:
                not_fitted[name or "the model itself"] = f"its scale was not fitted: {why}"
    return not_fitted


def _refit_(
    name: str, dense: nn.Module, small: nn.Module, plan: PruningPlan, batches: Sequence[Example]
) -> str | None:
    """Fits one norm; returns the reason if it cannot be fitted, else None."""
    norm = small.get_submodule(name)
    vectors = _pruned_vectors(name, norm, plan)
    if not vectors:
        return "it has no scale of its own"
    # A module with submodules, or with more than two such parameters, may use them for more than
    # scale and shift.
    if any(True for _ in norm.children()) or len(vectors) > 2:
        return "it does more than normalise"
    parameters = [parameter for parameter, _ in vectors]
    # All vectors of a norm lose the same channels.
    kept = torch.tensor(vectors[0][1])
    system = _NormalEquations(len(kept), len(parameters))
    for batch in batches:
        wanted = _outputs(dense, name, batch)
        calls = _arguments(small, name, batch)
        for target, (args, options) in zip(wanted, calls, strict=True):
            base, slopes, real = _linear_parts(norm, args, options, parameters)
            dim = _channel_dim(target, real)
            if dim is None:
                return "its outputs have no single axis that lost channels"
            columns = torch.stack([_rows(slope, dim) for slope in slopes], -1)

            # The fit assumes: outputs = base + sum of slope * parameter. A user's norm may differ,
            # for instance with a scale of 1 + weight**2.
            linear = (columns @ _side_by_side(parameters)[..., None])[..., 0] + _rows(base, dim)
            error = (linear - _rows(real, dim)).abs().max()
            if error > LINEARITY_TOLERANCE * real.abs().max().clamp_min(1e-6):
                return "its parameters do not enter its outputs linearly"
            goal = target.index_select(dim, kept.to(target.device))
            system.add_(columns, _rows(goal, dim) - _rows(base, dim))
    solved = system.solve(_side_by_side(parameters).cpu())
    for parameter, values in zip(parameters, solved.unbind(1), strict=True):
        parameter.copy_(values.view(parameter.shape))
    return None


def _pruned_vectors(
    name: str, norm: nn.Module, plan: PruningPlan
) -> list[tuple[nn.Parameter, tuple[int, ...]]]:
    """Returns the norm's pruned parameters with one number per channel, each with kept indices."""
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


def _side_by_side(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Returns the parameters as columns: [channels, parameters], float64."""
    return torch.stack([parameter.flatten().double() for parameter in parameters], -1)


class _NormalEquations:
    """A least-squares problem for each channel: gram @ solution = right, summed over batches.

    Only the sums are stored, so that memory does not grow with the number of examples.
    """

    def __init__(self, channels: int, unknowns: int) -> None:
        self.gram = torch.zeros(channels, unknowns, unknowns, dtype=torch.float64)
        self.right = torch.zeros(channels, unknowns, dtype=torch.float64)

    def add_(self, columns: Tensor, wanted: Tensor) -> None:
        """Adds a batch: the weighted sum of `columns` should be `wanted`.

        Args:
            columns: [channels, places, unknowns].
            wanted: [channels, places].
        """
        self.gram += (columns.transpose(1, 2) @ columns).cpu()
        self.right += (columns.transpose(1, 2) @ wanted[..., None])[..., 0].cpu()

    def solve(self, now: Tensor) -> Tensor:
        """Returns the solution [channels, unknowns], near `now` where the data do not determine it.

        This is ridge regression towards `now`, because a channel that is always 0 has a singular
        matrix.
        """
        unknowns = now.shape[1]
        # Relative to the diagonal, so that it does not depend on the scale of the outputs.
        ridge = RIDGE * self.gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)
        gram = self.gram + ridge[:, None, None] * torch.eye(unknowns, dtype=torch.float64)
        solved: Tensor = torch.linalg.solve(gram, self.right + ridge[:, None] * now)
        return solved


def _linear_parts(
    norm: nn.Module, args: Any, options: Any, parameters: Sequence[nn.Parameter]
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Measures a norm as a linear function of its parameters.

    Returns:
        The output with all parameters 0, the change if one parameter is set to 1 (for each
        parameter), and the true output.
    """
    real = _first_tensor(norm(*args, **options))
    values = [parameter.clone() for parameter in parameters]
    for parameter in parameters:
        parameter.zero_()
    base = _first_tensor(norm(*args, **options))
    slopes = []
    for parameter in parameters:
        parameter.fill_(1.0)
        slopes.append(_first_tensor(norm(*args, **options)) - base)
        parameter.zero_()
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
    return base, slopes, real


def _rows(x: Tensor, dim: int) -> Tensor:
    """Returns a tensor as [channels, places], float64."""
    if x.dim() == 1:
        return x[:, None].double()
    return x.movedim(dim, 0).flatten(1).double()


def _channel_dim(dense: Tensor, pruned: Tensor) -> int | None:
    """Returns the axis along which the sizes differ; None if it is not exactly one."""
    if dense.dim() != pruned.dim():
        return None
    differing = []
    for d in range(pruned.dim()):
        if dense.shape[d] != pruned.shape[d]:
            differing.append(d)
    return differing[0] if len(differing) == 1 else None


def _outputs(model: nn.Module, name: str, batch: Example) -> list[Tensor]:
    """Returns the outputs of the module `name`, one for each call in a forward pass."""
    seen: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_hook(
        lambda _, __, output: seen.append(_first_tensor(output))
    )
    try:
        call(model, batch)
    finally:
        hook.remove()
    return seen


def _arguments(model: nn.Module, name: str, batch: Example) -> list[tuple[Any, Any]]:
    """Returns the arguments of the module `name`, for each call in a forward pass."""
    seen: list[tuple[Any, Any]] = []
    hook = model.get_submodule(name).register_forward_pre_hook(
        lambda _, args, options: seen.append((args, options)), with_kwargs=True
    )
    try:
        call(model, batch)
    finally:
        hook.remove()
    return seen


def _first_tensor(output: Any) -> Tensor:
    from torch.utils._pytree import tree_leaves

    # A model may return several outputs; the first is compared.
    found: Tensor = next(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
    return found


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Within the block `model` is in evaluation mode; its modes are restored afterwards."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def constant_statistics(plan: PruningPlan) -> Iterator[None]:
    """Replaces the statistics of norms by constants within the block, if `plan` is approximate.

    The pruned network and the masked one (whose pruned channels are 0) must then agree exactly. A
    layer norm becomes x * weight + bias. A mean, variance or standard deviation with `keepdim`, as
    in hand-written norms, becomes 1.
    """
    # Exact pruning changes no statistics, so nothing is replaced.
    if not plan.approximate:
        yield
        return
    with _ConstantStatistics():
        yield


class _ConstantStatistics(TorchFunctionMode):
    """Replaces norms over channels by their scale and shift.

    Means, variances and standard deviations that keep the averaged axes are replaced by 1.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls `func`, or its replacement."""
        options = kwargs or {}
        if func in (F.layer_norm, F.rms_norm, F.group_norm):
            return _scale_and_shift(func, *args, **options)
        result = func(*args, **options)
        # Global average pooling drops its axes; hand-written norms use `keepdim`.
        keeps_axis = func in _MEANS and _first_tensor(result).dim() == args[0].dim()
        if not keeps_axis:
            return result
        if isinstance(result, Tensor):
            return torch.ones_like(result)
        return type(result)([torch.ones_like(each) for each in result])


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


def _scale_and_shift(
    func: Any,
    x: Tensor,
    size: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *rest: Any,
    **options: Any,
) -> Any:
    """Returns the output of a norm without its statistics: x * weight + bias."""
    if func is F.rms_norm:
        bias = None  # its fourth argument is eps
    if func is F.group_norm:
        if size != 1:
            return func(x, size, weight, bias, *rest, **options)
        # Channels are axis 1 here, and the last axis in the other norms.
        shape = [1, -1, *[1] * (x.dim() - 2)]
        weight = None if weight is None else weight.view(shape)
        bias = None if bias is None else bias.view(shape)
    out = x
    if weight is not None:
        out = out * weight
    if bias is not None:
        out = out + bias
    return out
