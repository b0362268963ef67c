"""Which channels stay: scores become a plan that meets a target, a share of the parameters say, with rounded widths."""

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
from fedpress.compress.prune.sensitivity import Point, levels
from fedpress.compress.prune.targets import Target, full_widths, parameter_target
from fedpress.errors import ModelError, RecipeError
from fedpress.nn.forward_sizes import Numbers

Scope = Literal["global", "layer", "sensitivity"]
FAR = 2.0  # a target is refused where the smallest share that widths allow is more than so many times as large
TRIES = 20  # thresholds to correct from, before a share counts as out of reach; the first nearly always does


OLD_WORDS = {"whole": "unprunable", "told": "notes"}
"""What fields of a plan were called in version 0.1, whose files are still read."""


class LayerChange(BaseModel, frozen=True):
    """The width of one layer before and after."""

    name: str
    before: int
    after: int


class PruningPlan(BaseModel, frozen=True):
    """The indices to keep, tensor name -> axis -> indices; plain numbers, so a plan travels as JSON.

    Attributes:
        keep: the indices; tensors that lose nothing are left out.
        layers: the width of each group of channels before and after.
        unprunable: modules whose channels are all kept, and why ("whole" in files of version 0.1).
        numbers: sizes in forward code that do not follow by themselves.
        parameters_before: of the model.
        parameters_after: of the pruned model.
        approximate: modules with norms that were cut through, in order.
        notes: what whoever asked for the pruning should know, by setting ("told" in files of version 0.1).
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
    def _words_of_version_0_1(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return {OLD_WORDS.get(key, key): value for key, value in given.items()}


def plan(
    model: nn.Module,
    graph: ChannelGraph,
    scores: Sequence[Tensor],
    *,
    keep_params: float = 0.30,
    target: Target | None = None,
    round_to: int = 8,
    scope: Scope = "global",
    points: Sequence[Point] = (),
    min_keep: float = 0.1,
    tolerance: float = 0.005,
    exact: bool = False,
) -> PruningPlan:
    """Chooses the channels to keep so that `keep_params` of all parameters stay, counted exactly, or a `target` is met.

    One threshold is searched for all layers; every width goes to the nearest multiple of `round_to`, and then single
    steps in the layers that bring the count nearest correct what rounding did. Where no widths come within
    `tolerance`, the nearest found are taken and `notes` says so: "0.5066, the nearest to 0.5".

    Args:
        model: the traced model.
        graph: its channels.
        scores: one vector [channels] per layer of `graph`; low ones go first.
        keep_params: share of the parameters to keep, in (0, 1].
        target: what to come down to instead (see `fedpress.compress.prune.targets`).
        round_to: widths become multiples of this; a layer that is not wider stays whole.
        scope: "global" orders all channels together; "layer" takes the same share of each layer; "sensitivity" takes
            of each what makes the loss grow equally, by the `points` measured.
        points: what `fedpress.compress.prune.sensitivity` gave, for the scope of this name.
        min_keep: smallest share of a layer that stays.
        tolerance: largest difference between the wanted and the reached cost, as a share of the whole network's, of
            which nothing is told.
        exact: refuses a target that is missed by more than `tolerance`.

    Raises:
        RecipeError: if a setting is out of range, the target is below half of the smallest that widths allow, or a
            limit or an `exact` target cannot be met.
        ModelError: if no channel of the model can be removed.
    """
    check_settings(graph, round_to, min_keep, scope)
    target = target or parameter_target(graph, keep_params)
    full = target.cost(full_widths(graph))
    allowed = [allowed_widths(layer, round_to, min_keep) for layer in graph.groups]
    best = full_widths(graph)
    for start in islice(_thresholds(_order(graph, scores, scope, points), allowed, target), TRIES):
        kept = _correct(start, allowed, target, tolerance * full)
        if target.miss(kept) < target.miss(best):
            best = kept
        if target.miss(best) <= tolerance * full:
            break
    missed = target.miss(best) > tolerance * full and not target.limit
    if target.miss(best) == float("inf") or (missed and (exact or _far(allowed, target))):
        raise _unreachable(graph, allowed, target, target.cost(best))
    made = make_plan(model, graph, scores, best)
    if not missed:
        return made
    notes = _nearest_share(graph, target, target.cost(best))
    return made.model_copy(update={"notes": notes})


def _far(allowed: Sequence[list[int]], target: Target) -> bool:
    return target.cost([choice[0] for choice in allowed]) > FAR * target.wanted


def _nearest_share(graph: ChannelGraph, target: Target, reached: float) -> dict[str, str]:
    """Says by which share the wanted one was replaced."""
    full = target.full_cost or target.cost(full_widths(graph))
    return {
        target.key: f"{reached / full:.4g}, the nearest to {target.wanted / full:.4g} that the widths allow"
    }


def _order(
    graph: ChannelGraph, scores: Sequence[Tensor], scope: Scope, points: Sequence[Point]
) -> list[Tensor]:
    """Returns what one threshold cuts in all layers; within each it rises with the scores."""
    if scope == "sensitivity":
        return levels(graph, scores, points)
    return [_ranks(s) for s in scores] if scope == "layer" else list(scores)


def allowed_widths(layer: ChannelGroup, round_to: int, min_keep: float) -> list[int]:
    """Returns the numbers of channels, rising, that a layer may keep: whole, or a rounded width.

    The whole width is always among them, so a width of 12 may stay 12 or become 8.
    """
    step = round_to // gcd(round_to, layer.unit)
    least = max(1, ceil(min_keep * layer.channels))
    return sorted({n for n in range(step, layer.channels, step) if n >= least} | {layer.channels})


def make_plan(
    model: nn.Module, graph: ChannelGraph, scores: Sequence[Tensor], kept: Sequence[int]
) -> PruningPlan:
    """Keeps the `kept[i]` highest scores of layer i; of equal scores the first channel stays."""
    for layer, n in zip(graph.groups, kept, strict=True):
        if not 1 <= n <= layer.channels:
            raise ModelError(
                f"the plan keeps {n} of the {layer.channels} channels of '{layer.name}'",
                place="kept",
                cure="keep at least one",
            )
    pruned = [
        values.argsort(descending=True, stable=True)[n:]
        for values, n in zip(scores, kept, strict=True)
    ]
    return PruningPlan(
        keep=kept_indices(model, graph, pruned),
        numbers=graph.sizes(pruned),
        layers=tuple(
            LayerChange(name=layer.name, before=layer.channels * layer.unit, after=n * layer.unit)
            for layer, n in zip(graph.groups, kept, strict=True)
        ),
        unprunable=dict(graph.unprunable),
        approximate=graph.approximate if any(len(channels) for channels in pruned) else (),
        parameters_before=graph.parameters([layer.channels for layer in graph.groups]),
        parameters_after=graph.parameters(kept),
    )


def check_settings(graph: ChannelGraph, round_to: int, min_keep: float, scope: str) -> None:
    """Refuses settings out of range, and a graph in which nothing can go."""
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
        reasons = (
            "; ".join(f"'{name}': {why}" for name, why in list(graph.unprunable.items())[:3])
            or "it has no layers"
        )
        cure = "change these modules or do not prune"
        if any("asked for by `ignore`" in why for why in graph.unprunable.values()):
            cure = "name fewer modules in ignore"
        elif any("a mean over channels" in why for why in graph.unprunable.values()):
            cure = 'allow approximate = ["layer_norm"], change these modules or do not prune'
        raise ModelError(
            f"no channel of this model can be removed ({reasons})", place="model", cure=cure
        )


def _thresholds(
    order: Sequence[Tensor], allowed: Sequence[list[int]], target: Target
) -> Iterator[list[int]]:
    """Yields the rounded widths at the threshold that comes nearly to `target`, then at ever farther ones."""
    rising = [values.sort().values for values in order]
    cuts = [-float("inf"), *torch.cat(rising).unique().tolist()]

    def widths(cut: float) -> list[int]:
        more = [len(v) - int(torch.searchsorted(v, v.new_tensor(cut), right=True)) for v in rising]
        return [_nearest(n, choice) for n, choice in zip(more, allowed, strict=True)]

    # the cost falls as the cut rises: find the first cut that is at or below the target
    at = bisect_left(cuts, -target.wanted, key=lambda cut: -target.cost(widths(cut)))
    below = (widths(cut) for cut in cuts[at:])
    above = (widths(cut) for cut in reversed(cuts[:at]))
    seen: list[list[int]] = []
    for kept in chain.from_iterable(zip_longest(above, below)):
        if kept is not None and kept not in seen:
            seen.append(kept)
            yield kept


def _nearest(n: int, choice: Sequence[int]) -> int:
    return min(reversed(choice), key=lambda width: abs(width - n))


def _correct(
    kept: list[int], allowed: Sequence[list[int]], target: Target, tolerance: float
) -> list[int]:
    """Moves layers by one step, always to the cost nearest to `target`, while that brings it nearer.

    One layer at a time until the error is a fifth of `tolerance`; two at once where the steps of one are too coarse.
    """
    error = target.miss

    def steps(widths: list[int]) -> list[list[int]]:
        moves = []
        for i in range(len(widths)):
            at = allowed[i].index(widths[i])
            near = (allowed[i][j] for j in (at - 1, at + 1) if 0 <= j < len(allowed[i]))
            moves += [[*widths[:i], width, *widths[i + 1 :]] for width in near]
        return moves

    while error(kept) > tolerance / 5:
        moves = steps(kept)
        best = min(moves, key=error, default=kept)
        if error(best) >= error(kept) > tolerance:
            best = min((pair for one in moves for pair in steps(one)), key=error, default=kept)
        if error(best) >= error(kept):
            break
        kept = best
    return kept


def _ranks(values: Tensor) -> Tensor:
    """Returns the rank of each score as a share of its layer, so that one threshold cuts all layers alike."""
    return (values.argsort(stable=True).argsort().float() + 0.5) / len(values)


def _unreachable(
    graph: ChannelGraph, allowed: Sequence[list[int]], target: Target, reached: float
) -> RecipeError:
    full = target.full_cost or target.cost(full_widths(graph))
    least = target.cost([choice[0] for choice in allowed])
    stay = f" ({len(graph.unprunable)} modules must stay whole)" if graph.unprunable else ""
    kind = "size" if target.limit else "share"

    def shown(cost: float) -> str:
        return f"{cost:.0f}" if target.limit else f"{cost / full:.4g}"

    if least > target.wanted:
        smallest = shown(least if target.limit else ceil(least / full * 1e4) / 1e4 * full)
        return RecipeError(
            (
                f"{shown(target.wanted)} cannot be reached, the smallest {kind} of this model "
                f"is {smallest}{stay}"
            ),
            place=target.key,
            cure=f"raise {target.key}, or lower min_keep or round_to",
        )
    return RecipeError(
        (
            f"{shown(target.wanted)} cannot be met within the tolerance, the nearest {kind} "
            f"found is {shown(reached)}{stay}"
        ),
        place=target.key,
        cure=f"lower round_to, take that {kind}, or leave exact out",
    )
