"""Makes a pruning plan: chooses the channels to keep by scores, so that a cost target is met."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import chain, islice, zip_longest
from math import ceil, gcd
from typing import Any, Literal, get_args

import torch
from pydantic import BaseModel, model_validator
from torch import Tensor, nn

from fedpress.compress.prune.graph import ChannelGraph, ChannelGroup, kept_indices
from fedpress.compress.prune.sensitivity import SensitivityPoint, growth_by_channel
from fedpress.compress.prune.targets import Target, full_widths, parameter_target
from fedpress.errors import ModelError, RecipeError
from fedpress.nn.forward_sizes import Numbers

Scope = Literal["global", "layer", "sensitivity"]
MOST_OVERSHOOT = 2.0
"""A target is refused if the narrowest allowed network costs over this many times the target."""
MOST_THRESHOLDS = 20
"""Largest number of thresholds to start the search from; the first is nearly always enough."""
OLD_NAMES = {"whole": "unprunable", "told": "notes"}
"""Field of a plan in version 0.1 -> its present name; files of that version are still read."""


class LayerChange(BaseModel, frozen=True):
    """The width of one layer before and after pruning.

    The width is the number of channels times the indices that one channel takes (its `unit`).
    """

    name: str
    before: int
    after: int


class PruningPlan(BaseModel, frozen=True):
    """The result of planning: the indices to keep of each tensor, in types that JSON can save.

    Attributes:
        keep: tensor name -> axis -> kept indices; tensors that lose nothing are left out.
        layers: the width of each layer (group of channels) before and after.
        unprunable: name of each module with channels that cannot be pruned -> the reason ("whole"
            in files of version 0.1).
        numbers: corrections of sizes that are written into forward code, such as `view(n, 4, 8)`.
        parameters_before: number of parameters of the model.
        parameters_after: number of parameters of the pruned model.
        approximate: modules whose norms average over pruned channels, in the order they run.
        notes: name of each setting that was not met exactly -> the value that was reached ("told"
            in files of version 0.1).
    """

    keep: dict[str, dict[int, tuple[int, ...]]]
    layers: tuple[LayerChange, ...]
    unprunable: dict[str, str]
    numbers: Numbers = {}
    parameters_before: int
    parameters_after: int
    approximate: tuple[str, ...] = ()
    notes: dict[str, str] = {}

    @model_validator(mode="before")
    @classmethod
    def _rename_fields_of_version_0_1(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return {OLD_NAMES.get(key, key): value for key, value in given.items()}


def plan(
    model: nn.Module,
    graph: ChannelGraph,
    scores: Sequence[Tensor],
    *,
    keep_params: float = 0.30,
    target: Target | None = None,
    round_to: int = 8,
    scope: Scope = "global",
    points: Sequence[SensitivityPoint] = (),
    min_keep: float = 0.1,
    tolerance: float = 0.005,
    exact: bool = False,
) -> PruningPlan:
    """Chooses the channels to keep so that `keep_params` of the parameters remain.

    With `target`, another cost is reduced instead, for instance multiply-adds. First a threshold on
    the scores is searched, the same for all layers. Every width (kept channels, times the indices
    that one channel takes) is rounded to a multiple of `round_to`. Then single layers are made one
    step wider or narrower while this helps. If no widths come within `tolerance` of the target, the
    nearest widths are taken, and the plan's `notes` say so: "0.5066, the nearest to 0.5 that the
    widths allow".

    Args:
        model: the traced model.
        graph: its channels.
        scores: one vector [channels] per layer of `graph`; the lowest scores are pruned first.
        keep_params: share of the parameters to keep, in (0, 1].
        target: used instead of `keep_params` (see `fedpress.compress.prune.targets`).
        round_to: a layer's width becomes a multiple of this, or stays as it is.
        scope: "global" uses one threshold for all channels; "layer" prunes the same share of each
            layer; "sensitivity" prunes every layer until the loss has grown by the same amount,
            according to the measured `points`.
        points: results of `fedpress.compress.sensitivity`, needed for scope "sensitivity".
        min_keep: smallest share of its channels that a layer keeps.
        tolerance: largest difference between the wanted and the reached cost that needs no note, as
            a share of the whole network's cost.
        exact: whether to raise an error if the target is missed by more than `tolerance`.

    Raises:
        RecipeError: if a setting is out of range, the target is less than half the cost of the
            narrowest allowed network, or a limit or an `exact` target cannot be met.
        ModelError: if no channel of the model can be removed.
    """
    check_settings(graph, round_to, min_keep, scope)
    target = target or parameter_target(graph, keep_params)
    largest_miss = tolerance * target.cost(full_widths(graph))
    allowed = [allowed_widths(layer, round_to, min_keep) for layer in graph.groups]
    order = _order(graph, scores, scope, points)
    best = full_widths(graph)
    for start in islice(_thresholds(order, allowed, target), MOST_THRESHOLDS):
        kept = _correct(start, allowed, target, largest_miss)
        # Because widths are rounded, a later threshold may lead to a cost nearer to the target.
        if target.miss(kept) < target.miss(best):
            best = kept
        if target.miss(best) <= largest_miss:
            break

    # If the target is a limit, every cost up to it is accepted, and the miss above it is infinite.
    is_exceeded = target.miss(best) == float("inf")
    missed = target.miss(best) > largest_miss and not target.limit
    if is_exceeded or (missed and (exact or _is_far(allowed, target))):
        raise _unreachable(graph, allowed, target, target.cost(best))
    # The scores decide which channels of each width are kept.
    made = make_plan(model, graph, scores, best)
    if not missed:
        return made
    notes = _nearest_share(graph, target, target.cost(best))
    return made.model_copy(update={"notes": notes})


def _is_far(allowed: Sequence[list[int]], target: Target) -> bool:
    """Returns whether even the narrowest network costs far more than the target."""
    return target.cost([choice[0] for choice in allowed]) > MOST_OVERSHOOT * target.wanted


def _nearest_share(graph: ChannelGraph, target: Target, reached: float) -> dict[str, str]:
    """Returns the note that says which share was reached instead of the wanted one."""
    full = target.full_cost or target.cost(full_widths(graph))
    wanted = f"{target.wanted / full:.4g}"
    return {target.key: f"{reached / full:.4g}, the nearest to {wanted} that the widths allow"}


def _order(
    graph: ChannelGraph, scores: Sequence[Tensor], scope: Scope, points: Sequence[SensitivityPoint]
) -> list[Tensor]:
    """Returns for each layer the numbers [channels] that the threshold is applied to.

    Within a layer these numbers have the order of the scores.
    """
    if scope == "sensitivity":
        return growth_by_channel(graph, scores, points)
    if scope == "layer":
        return [_ranks(values) for values in scores]
    return list(scores)


def allowed_widths(layer: ChannelGroup, round_to: int, min_keep: float) -> list[int]:
    """Returns the numbers of channels that a layer may keep, rising; the last is all channels.

    For the others, channels times `layer.unit` (indices per channel) is a multiple of `round_to`.
    With `round_to` = 8 and unit 1, a layer of 12 channels may keep 8 or 12 channels.
    """
    # A channel may be several indices wide, for instance a head of width 64: any number of such
    # heads is a multiple of 8 already.
    step = round_to // gcd(round_to, layer.unit)
    # A layer without channels would make every output constant.
    least = max(1, ceil(min_keep * layer.channels))
    widths = []
    for n in range(step, layer.channels, step):
        if n >= least:
            widths.append(n)
    return [*widths, layer.channels]


def make_plan(
    model: nn.Module, graph: ChannelGraph, scores: Sequence[Tensor], kept: Sequence[int]
) -> PruningPlan:
    """Returns the plan that keeps the `kept[i]` channels of layer i with the highest scores.

    If scores are equal, the first channels are kept.

    Raises:
        ModelError: if a layer would keep no channel, or more than it has.
    """
    for layer, n in zip(graph.groups, kept, strict=True):
        if not 1 <= n <= layer.channels:
            raise ModelError(
                f"the plan keeps {n} of the {layer.channels} channels of '{layer.name}'",
                place="kept",
                cure="keep at least 1 channel and at most all",
            )
    pruned = []
    layers = []
    for layer, values, n in zip(graph.groups, scores, kept, strict=True):
        pruned.append(values.argsort(descending=True, stable=True)[n:])
        before, after = layer.channels * layer.unit, n * layer.unit
        layers.append(LayerChange(name=layer.name, before=before, after=after))

    is_pruned = any(len(channels) for channels in pruned)
    return PruningPlan(
        keep=kept_indices(model, graph, pruned),
        numbers=graph.corrections(pruned),
        layers=tuple(layers),
        unprunable=dict(graph.unprunable),
        approximate=graph.approximate if is_pruned else (),
        parameters_before=graph.parameters(full_widths(graph)),
        parameters_after=graph.parameters(kept),
    )


def check_settings(graph: ChannelGraph, round_to: int, min_keep: float, scope: str) -> None:
    """Checks that settings are in range, and that something in the graph can be pruned.

    Raises:
        RecipeError: if a setting is out of range.
        ModelError: if nothing can be pruned.
    """
    if round_to < 1:
        raise RecipeError(
            f"got {round_to}, expected a whole number of at least 1",
            place="round_to",
            cure="try 8",
        )
    if not 0 <= min_keep <= 1:
        raise RecipeError(
            f"got {min_keep}, expected a share between 0 and 1",
            place="min_keep",
            cure="try 0.1",
        )
    if scope not in get_args(Scope):
        raise RecipeError(
            f"got '{scope}', expected one of {', '.join(get_args(Scope))}", place="scope"
        )

    if not graph.groups:
        # Three reasons show what is wrong, and fit into a message.
        first = list(graph.unprunable.items())[:3]
        reasons = "; ".join(f"'{name}': {why}" for name, why in first) or "it has no layers"
        every_reason = " ".join(graph.unprunable.values())
        cure = "change these modules or do not prune"
        if "asked for by `ignore`" in every_reason:
            cure = "name fewer modules in ignore"
        elif "a mean over channels" in every_reason:
            cure = 'allow approximate = ["layer_norm"], change these modules or do not prune'
        raise ModelError(
            f"no channel of this model can be removed ({reasons})", place="model", cure=cure
        )


def _thresholds(
    order: Sequence[Tensor], allowed: Sequence[list[int]], target: Target
) -> Iterator[list[int]]:
    """Yields rounded widths for thresholds whose cost is farther and farther from `target`.

    Costs above and below the target alternate. The first is the nearest cost above it.
    """
    rising = [values.sort().values for values in order]
    thresholds = [-float("inf"), *torch.cat(rising).unique().tolist()]

    def widths(threshold: float) -> list[int]:
        found = []
        for values, choice in zip(rising, allowed, strict=True):
            at_most = torch.searchsorted(values, values.new_tensor(threshold), right=True)
            found.append(_nearest(len(values) - int(at_most), choice))
        return found

    # The cost falls as the threshold rises: find the first threshold whose cost is within the
    # target. Costs are negated, because bisection needs rising keys.
    at = bisect_left(thresholds, -target.wanted, key=lambda each: -target.cost(widths(each)))
    below = (widths(each) for each in thresholds[at:])
    above = (widths(each) for each in reversed(thresholds[:at]))
    # Different thresholds may round to the same widths.
    seen: list[list[int]] = []
    for kept in chain.from_iterable(zip_longest(above, below)):
        if kept is not None and kept not in seen:
            seen.append(kept)
            yield kept


def _nearest(n: int, choice: Sequence[int]) -> int:
    """Returns the allowed width nearest to `n`; if two are equally near, the larger one."""
    return min(reversed(choice), key=lambda width: abs(width - n))


def _correct(
    kept: list[int], allowed: Sequence[list[int]], target: Target, tolerance: float
) -> list[int]:
    """Changes single widths by one step as long as that brings the cost nearer to `target`.

    This is a greedy search: it takes the best of all single steps, again and again, until the error
    is at most a fifth of `tolerance`. If no single step helps and the error is above `tolerance`,
    two steps at once are tried, for instance one layer wider and another narrower.
    """
    error = target.miss

    while error(kept) > tolerance / 5:
        moves = _single_steps(kept, allowed)
        best = min(moves, key=error, default=kept)
        if error(best) >= error(kept) > tolerance:
            best = min(_double_steps(moves, allowed), key=error, default=kept)
        if error(best) >= error(kept):
            break
        kept = best
    return kept


def _single_steps(widths: list[int], allowed: Sequence[list[int]]) -> list[list[int]]:
    """Returns all widths in which one layer is one allowed step narrower or wider."""
    moves = []
    for i, choice in enumerate(allowed):
        at = choice.index(widths[i])
        for j in (at - 1, at + 1):
            if 0 <= j < len(choice):
                moves.append([*widths[:i], choice[j], *widths[i + 1 :]])
    return moves


def _double_steps(moves: Sequence[list[int]], allowed: Sequence[list[int]]) -> Iterator[list[int]]:
    """Yields all widths that are one more step away from `moves`."""
    for move in moves:
        yield from _single_steps(move, allowed)


def _ranks(values: Tensor) -> Tensor:
    """Returns ranks in (0, 1), so that one threshold prunes the same share of each layer."""
    # The half centres the ranks: 2 channels have 1/4 and 3/4, 4 channels 1/8, 3/8, 5/8, 7/8.
    return (values.argsort(stable=True).argsort().float() + 0.5) / len(values)


def _unreachable(
    graph: ChannelGraph, allowed: Sequence[list[int]], target: Target, reached: float
) -> RecipeError:
    """Returns the error for a target that no widths meet; it names the nearest reachable cost."""
    full = target.full_cost or target.cost(full_widths(graph))
    least = target.cost([choice[0] for choice in allowed])
    kept = f" ({len(graph.unprunable)} modules cannot be pruned)" if graph.unprunable else ""
    kind = "size" if target.limit else "share"

    def shown(cost: float) -> str:
        return f"{cost:.0f}" if target.limit else f"{cost / full:.4g}"

    # Two cases: even the narrowest network costs too much, or no widths come near enough.
    if least > target.wanted:
        # Rounded up, so that the share can be met when the user asks for it.
        smallest = shown(least if target.limit else ceil(least / full * 1e4) / 1e4 * full)
        return RecipeError(
            (
                f"{shown(target.wanted)} cannot be reached, the smallest {kind} of this model "
                f"is {smallest}{kept}"
            ),
            place=target.key,
            cure=f"raise {target.key}, or lower min_keep or round_to",
        )
    return RecipeError(
        (
            f"{shown(target.wanted)} cannot be met within the tolerance, the nearest {kind} "
            f"found is {shown(reached)}{kept}"
        ),
        place=target.key,
        cure=f"lower round_to, take that {kind}, or leave exact out",
    )
