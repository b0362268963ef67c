"""From a model and an example to its channels: ids are passed along the graph that `torch.export` captures."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn
from torch.fx import traceback

from fedpress.compress.prune.approximate import check_names
from fedpress.compress.prune.graph import ChannelGraph, ChannelGroup, export
from fedpress.compress.prune.grouping import channel_graph
from fedpress.compress.prune.ids import Ids
from fedpress.compress.prune.ignoring import ignored
from fedpress.compress.prune.recorder import Recorder
from fedpress.compress.prune.trials import groups_that_fail, without_followers
from fedpress.compress.prune.walk import IGNORED, Owner, Walk
from fedpress.core.inputs import Example, positional
from fedpress.errors import ModelError

TRIALS = 3
"""Groups without whose channels the code cannot run are kept, and what is left is tried again, so many times."""


def trace(
    model: nn.Module,
    example: Example,
    *,
    unprunable: Sequence[str] = (),
    ignore: Sequence[str] = (),
    approximate: Sequence[str] = (),
) -> ChannelGraph:
    """Finds the channels of `model` that can be removed, from the operations that run on `example`.

    Args:
        model: any module that `torch.export` can capture; it is left in its mode.
        example: its input [n, ...], a tuple of inputs, or a dictionary by the names of forward's first arguments; a
            batch of two is a good choice.
        unprunable: names of modules (or name prefixes) that must keep all their outputs.
        ignore: names or patterns ("block.3.*") of modules or weights of which nothing is cut, their inputs neither.
        approximate: kinds of norms that channels may be cut through, though that is not exact: "layer_norm" (also RMS
            norms, and those written by hand), "grn" (global response norm); see `fedpress.compress.prune.approximate`.

    Raises:
        ModelError: if the model cannot be captured, or forward begins with other arguments than those of `example`.
        RecipeError: if a pattern of `ignore` matches nothing, or there is no such kind of norm.
    """
    arguments = positional(model, example)
    recorder = Recorder(model)
    with recorder, traceback.preserve_node_meta(), warnings.catch_warnings():
        # The flat weights of recurrent layers.
        warnings.filterwarnings("ignore", message=".*assigned during export.*")
        exported = export(model, arguments)
    ids = Ids()
    ids.approximate = check_names(approximate)
    ids.ignored = ignored(model, ignore)
    walk = Walk(exported, ids, _first_names(model), recorder.calls)
    owners = walk.owners
    _keep_unsaved(ids, owners, model)
    ids.module = ids.operation = ""
    _keep_named(ids, unprunable)
    _keep_ignored(ids, owners, model)
    ids.resolve_splits()
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    unused = dict.fromkeys(walk.unused(), "forward does not use it")
    compare = not (_has_half_precision(exported) or _has_branches(exported))
    for _ in range(TRIALS):
        graph = channel_graph(ids, owners, shapes, arguments)
        graph = replace(
            graph,
            unprunable={**graph.unprunable, **unused},
            turns=recorder.turns(),
            approximate=tuple(ids.approximated),
        )
        graph = without_followers(model, graph, arguments)
        failing = groups_that_fail(model, graph, arguments, compare=compare)
        if not failing:
            break
        for group, reason in failing.items():
            _keep_group(ids, owners, graph.groups[group], reason)
    return graph


def _has_half_precision(exported: torch.export.ExportedProgram) -> bool:
    """Says whether anything is computed in half precision."""
    half = (torch.float16, torch.bfloat16)
    return any(
        getattr(node.meta.get("val"), "dtype", None) in half for node in exported.graph.nodes
    )


def _has_branches(exported: torch.export.ExportedProgram) -> bool:
    """Says whether code is run by torch.cond or its like, which torch compiles anew for each way it is looked at."""
    return any(node.target is torch.ops.higher_order.cond for node in exported.graph.nodes)


def _first_names(model: nn.Module) -> dict[str, str]:
    """Maps every name of a parameter or buffer to its first one, because shared tensors have several."""
    first: dict[int, str] = {}
    named = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    return {name: first.setdefault(id(tensor), name) for name, tensor in named}


def _keep_unsaved(ids: Ids, owners: Sequence[Owner], model: nn.Module) -> None:
    """Keeps what a buffer follows that no file of the model holds: it could not be rebuilt."""
    saved = model.state_dict().keys()
    for name, _, axis in owners:
        if name not in saved:
            ids.keep(axis, f"the buffer '{name}' goes with it and is not saved (persistent=False)")


def _keep_group(ids: Ids, owners: Sequence[Owner], group: ChannelGroup, reason: str) -> None:
    axes = {(name, at): axis for name, at, axis in owners}
    for part in group.slices:
        channels = axes[part.tensor, part.axis][part.index.flatten().numpy()]
        ids.keep(channels, reason)


def _keep_named(ids: Ids, unprunable: Sequence[str]) -> None:
    for name in unprunable:
        hits = [
            axis
            for axis, role, m in ids.roles
            if role == "write" and (m == name or m.startswith(name + "."))
        ]
        if not hits:
            known = ", ".join(sorted({m for _, role, m in ids.roles if role == "write"}))
            raise ModelError(
                f"no module '{name}' with channels to keep",
                place="unprunable",
                cure=f"the model has: {known}",
            )
        for axis in hits:
            ids.keep(axis, "asked for by `unprunable`")


def _keep_ignored(ids: Ids, owners: Sequence[Owner], model: nn.Module) -> None:
    """Keeps the weights that are ignored themselves; what ignored modules touch has been kept on the way."""
    first = _first_names(model)
    names = {first[name] for name in ids.ignored if name in first}
    for name, _, axis in owners:
        if name in names:
            ids.keep(axis, IGNORED)
