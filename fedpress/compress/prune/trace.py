"""Finds the prunable channels of a model, from the graph that `torch.export` captures."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn
from torch.fx import traceback

from fedpress.compress.prune.approximate import check_norm_kinds
from fedpress.compress.prune.graph import ChannelGraph, ChannelGroup, capture
from fedpress.compress.prune.grouping import channel_graph
from fedpress.compress.prune.ids import ChannelIds
from fedpress.compress.prune.ignoring import ignored_names
from fedpress.compress.prune.operations import IGNORED
from fedpress.compress.prune.recorder import Recorder
from fedpress.compress.prune.trials import drop_self_adjusting_numbers, groups_that_fail
from fedpress.compress.prune.walk import TensorAxis, Walk
from fedpress.core.inputs import Example, positional
from fedpress.errors import ModelError

TRIALS = 3
"""Largest number of rounds in which each group of channels is pruned on trial.

Groups whose trial fails in a round are not prunable in the next round.
"""


def trace(
    model: nn.Module,
    example: Example,
    *,
    unprunable: Sequence[str] = (),
    ignore: Sequence[str] = (),
    approximate: Sequence[str] = (),
) -> ChannelGraph:
    """Finds the channels of `model` that can be removed, by the operations that run on `example`.

    Args:
        model: any module that `torch.export` can capture; its mode is restored.
        example: its input [n, ...], a tuple of inputs, or a dictionary by the names of forward's
            first arguments. Use at least two examples: with one, the batch axis looks like any
            other axis of size 1.
        unprunable: names of modules that must keep all their outputs; a name also stands for all
            modules inside that module.
        ignore: names or patterns ("block.3.*") of modules or weights that must keep all their
            outputs and inputs.
        approximate: kinds of norms whose channels may be pruned although the result is then not
            exact: "layer_norm" (also RMS norms, and hand-written ones) or "grn" (global response
            norm); see `fedpress.compress.prune.approximate`.

    Raises:
        ModelError: if the model cannot be captured, forward's first arguments are not those of
            `example`, or a name in `unprunable` is no module that has output channels.
        RecipeError: if a pattern of `ignore` matches nothing, or `approximate` has an unknown kind
            of norm.
    """
    arguments = positional(model, example)
    recorder = Recorder(model)
    with recorder, traceback.preserve_node_meta(), warnings.catch_warnings():
        # torch warns that recurrent layers assign their list of weights during forward.
        warnings.filterwarnings("ignore", message=".*assigned during export.*")
        exported = capture(model, arguments)

    ids = ChannelIds()
    ids.approximate = check_norm_kinds(approximate)
    ids.ignored = ignored_names(model, ignore)
    walk = Walk(exported, ids, _first_names(model), recorder.calls)
    _keep_unsaved(ids, walk.tensor_axes, model)
    # From here on no operation is the reason, so the names of module and operation are cleared.
    ids.module = ids.operation = ""
    _keep_named(ids, unprunable)
    _keep_ignored(ids, walk.tensor_axes, model)
    # Called once all kept ids are known, because they decide which axis of a reshape is pruned.
    ids.resolve_splits()

    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    unused = dict.fromkeys(walk.unused(), "forward does not use it")
    # Each group is tried on a pruned copy of the model, and the outputs of copy and model are
    # compared. In two cases the copy only has to run: half precision rounds more than the
    # comparison allows, and `torch.cond` is compiled anew for each copy, which is slow.
    compare = not (_has_half_precision(exported) or _has_branches(exported))
    embeds = _has_embeddings(exported)
    for trial in range(TRIALS + 1):
        graph = channel_graph(ids, walk.tensor_axes, shapes, arguments)
        graph = replace(
            graph,
            unprunable={**graph.unprunable, **unused},
            call_counts=recorder.call_counts(),
            approximate=tuple(ids.approximated),
        )
        graph = drop_self_adjusting_numbers(model, graph, arguments)
        # Groups that failed in the last trial are kept in this graph.
        if trial == TRIALS:
            break
        failing = groups_that_fail(model, graph, arguments, compare=compare, embeds=embeds)
        if not failing:
            break
        for group, reason in failing.items():
            _keep_group(ids, walk.tensor_axes, graph.groups[group], reason)
    return graph


def _has_half_precision(exported: torch.export.ExportedProgram) -> bool:
    """Returns whether anything is computed in half precision."""
    for node in exported.graph.nodes:
        dtype = getattr(node.meta.get("val"), "dtype", None)
        if dtype in (torch.float16, torch.bfloat16):
            return True
    return False


def _has_embeddings(exported: torch.export.ExportedProgram) -> bool:
    """Returns whether the graph, or a graph inside it, looks up rows of an embedding."""
    for module in exported.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            if "embedding" in str(node.target):
                return True
    return False


def _has_branches(exported: torch.export.ExportedProgram) -> bool:
    """Returns whether the model has branches of `torch.cond`."""
    return any(node.target is torch.ops.higher_order.cond for node in exported.graph.nodes)


def _first_names(model: nn.Module) -> dict[str, str]:
    """Maps every name of a parameter or buffer to its first name; shared tensors have several."""
    # With one name for a shared tensor it is pruned once, not once for each module.
    first: dict[int, str] = {}
    named = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    names = {}
    for name, tensor in named:
        names[name] = first.setdefault(id(tensor), name)
    return names


def _keep_unsaved(ids: ChannelIds, tensor_axes: Sequence[TensorAxis], model: nn.Module) -> None:
    """Keeps the channels of a buffer that is not saved: it could not be rebuilt from a file."""
    saved = model.state_dict().keys()
    for name, _, axis in tensor_axes:
        if name not in saved:
            ids.keep(
                axis,
                f"the buffer '{name}' has the same channels and is not saved (persistent=False)",
            )


def _keep_group(
    ids: ChannelIds, tensor_axes: Sequence[TensorAxis], group: ChannelGroup, reason: str
) -> None:
    # Translates the group's tensors and indices back into ids.
    axes = {(name, at): axis for name, at, axis in tensor_axes}
    for part in group.slices:
        channels = axes[part.tensor, part.axis][part.index.flatten().numpy()]
        ids.keep(channels, reason)


def _keep_named(ids: ChannelIds, unprunable: Sequence[str]) -> None:
    """Keeps the output channels of the modules that the user names."""
    outputs = []
    for axis, role, module in ids.roles:
        if role == "write":
            outputs.append((axis, module))
    for name in unprunable:
        is_found = False
        for axis, module in outputs:
            if module == name or module.startswith(name + "."):
                is_found = True
                ids.keep(axis, "asked for by `unprunable`")
        if not is_found:
            known = ", ".join(sorted({module for _, module in outputs}))
            raise ModelError(
                f"no module '{name}' with channels to keep",
                place="unprunable",
                cure=f"the model has: {known}",
            )


def _keep_ignored(ids: ChannelIds, tensor_axes: Sequence[TensorAxis], model: nn.Module) -> None:
    """Keeps all channels of ignored weights; `Walk` has kept the channels of ignored modules."""
    first = _first_names(model)
    names = {first[name] for name in ids.ignored if name in first}
    for name, _, axis in tensor_axes:
        if name in names:
            ids.keep(axis, IGNORED)
