"""Which channels of a model can go, and what goes with each: read from the graph that `torch.export` captures."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedpress.compress.ids import Ids, Value
from fedpress.compress.rules import find_rule
from fedpress.errors import ModelError

Example = Tensor | tuple[Tensor, ...]
Owner = tuple[str, int, NDArray[np.int64]]
"""A tensor's name, one of its axes, and the ids of that axis."""


@dataclass(frozen=True)
class Slice:
    """Indices [channels, repeats] along one axis of a parameter or buffer, and what the tensor does with them."""

    tensor: str
    axis: int
    role: str  # "write" (weights that compute the channel), "read" (weights that sum over it), "scale", "follow"
    index: Tensor


@dataclass(frozen=True)
class Layer:
    """Channels that touch the same tensors along the same axes, for instance the residual stream of a stage."""

    name: str
    slices: tuple[Slice, ...]

    @property
    def channels(self) -> int:
        """Number of removable channels."""
        return len(self.slices[0].index)

    @property
    def unit(self) -> int:
        """Width that goes with one removable channel: 1, or more where channels are tied (groups)."""
        return next((s.index.shape[1] for s in self.slices if s.role == "write"), 1)

    def role(self, role: str) -> list[Slice]:
        """Returns the slices with this role."""
        return [s for s in self.slices if s.role == role]


@dataclass(frozen=True)
class ChannelGraph:
    """The removable channels of a model, by layer, and the layers that stay whole with the reason."""

    layers: tuple[Layer, ...]
    shapes: Mapping[str, tuple[int, ...]]  # of every parameter, shared ones once
    whole: Mapping[str, str]

    def parameters(self, kept: Sequence[int]) -> int:
        """Returns the exact number of parameters when layer i keeps `kept[i]` of its channels."""
        sizes = {name: list(shape) for name, shape in self.shapes.items()}
        for layer, keep in zip(self.layers, kept, strict=True):
            for s in layer.slices:
                if s.tensor in sizes:
                    sizes[s.tensor][s.axis] -= (layer.channels - keep) * s.index.shape[1]
        return int(sum(np.prod(size, dtype=np.int64) for size in sizes.values()))


def inputs(example: Example) -> tuple[Tensor, ...]:
    """Returns the example as a tuple of arguments."""
    return (example,) if isinstance(example, Tensor) else tuple(example)


def trace(model: nn.Module, example: Example, *, whole: Sequence[str] = ()) -> ChannelGraph:
    """Finds the channels of `model` that can be removed, from the operations that run on `example`.

    Args:
        model: any module that `torch.export` can capture; it is left in its mode.
        example: its input [n, ...] or a tuple of inputs; a batch of two is a good choice.
        whole: names of modules (or name prefixes) that must keep all their outputs.

    Raises:
        ModelError: if the model cannot be captured, or an operation has no rule.
    """
    exported = _export(model, inputs(example))
    ids = Ids()
    owners, unused = _walk(exported, ids, _first_names(model))
    _freeze_named(ids, whole)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    layers, kept_whole = _layers(ids, owners)
    return ChannelGraph(tuple(layers), shapes, kept_whole | dict.fromkeys(unused, "forward does not use it"))


def _first_names(model: nn.Module) -> dict[str, str]:
    """Maps every name of a parameter or buffer to its first one, because shared tensors have several."""
    first: dict[int, str] = {}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: first.setdefault(id(tensor), name) for name, tensor in named}


def _export(model: nn.Module, arguments: tuple[Tensor, ...]) -> torch.export.ExportedProgram:
    modes = {m: m.training for m in model.modules()}
    try:
        return torch.export.export(model.eval(), arguments, strict=False)
    except Exception as error:  # torch.export raises whatever the user's code meets
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"the model cannot be captured by torch.export ({reason}); "
            "remove data-dependent control flow from forward, or check the example input"
        ) from error
    finally:
        for module, mode in modes.items():
            module.training = mode


def _walk(
    exported: torch.export.ExportedProgram, ids: Ids, first_names: Mapping[str, str]
) -> tuple[list[Owner], list[str]]:
    """Passes ids through every node; returns the ids of each axis of each tensor, and the parameters without use."""
    signature = exported.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    owners: list[Owner] = []
    unused: list[str] = []
    values: dict[torch.fx.Node, Any] = {}
    for node in exported.graph.nodes:
        shape = _shape(node)
        if node.op == "placeholder" and node.name in names:
            axes = tuple(ids.fresh(size) for size in shape)
            name = first_names[names[node.name]]
            owners += [(name, i, axis) for i, axis in enumerate(axes)]
            unused += [] if node.users or node.name in signature.inputs_to_buffers else [name]
            values[node] = Value(shape, axes)
        elif node.op in ("placeholder", "get_attr"):
            values[node] = Value(shape, (None,) * len(shape))
        elif node.op == "output":
            ids.operation = ""
            for value in _values(torch.fx.node.map_arg(node.args, values.get)):
                for axis in value.axes:
                    ids.freeze(axis, "it is an output of the model")
        elif node.target is operator.getitem:
            values[node] = values[node.args[0]][node.args[1]]
        else:
            values[node] = _call(node, shape, values, ids)
    return owners, unused


def _call(node: torch.fx.Node, shape: tuple[int, ...], values: Mapping[torch.fx.Node, Any], ids: Ids) -> Any:
    path = [fqn for fqn, _ in node.meta.get("nn_module_stack", {}).values()]
    ids.module = path[-1] if path else ""
    ids.operation = str(node.target)
    apply = find_rule(node.target)
    if apply is None:
        raise ModelError(
            f"channel pruning has no rule for {ids.place}; add one to fedpress.compress.rules.RULES, "
            "or write that module with operations it knows"
        )
    args, options = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])
    axes = apply(ids, shape, *args, **options)
    if isinstance(axes, list):
        return [Value(tuple(v.shape), a) for v, a in zip(node.meta["val"], axes, strict=True)]
    return Value(shape, axes)


def _shape(node: torch.fx.Node) -> tuple[int, ...]:
    """Returns the shape of the node's output, or of its first output."""
    first = node.meta.get("val")
    while isinstance(first, list | tuple) and first:
        first = first[0]
    return tuple(getattr(first, "shape", ()))


def _values(tree: Any) -> Iterator[Value]:
    if isinstance(tree, Value):
        yield tree
    elif isinstance(tree, list | tuple):
        for item in tree:
            yield from _values(item)


def _freeze_named(ids: Ids, whole: Sequence[str]) -> None:
    for name in whole:
        hits = [axis for axis, role, m in ids.roles if role == "write" and (m == name or m.startswith(name + "."))]
        if not hits:
            known = ", ".join(sorted({m for _, role, m in ids.roles if role == "write"}))
            raise ModelError(f"no module '{name}' with channels to keep whole; the model has: {known}")
        for axis in hits:
            ids.freeze(axis, "asked for by `whole`")


def _layers(ids: Ids, owners: Sequence[Owner]) -> tuple[list[Layer], dict[str, str]]:
    """Groups classes of ids by the tensors and axes that they touch."""
    labels = ids.labels()
    frozen: dict[int, str] = {}
    for axis, why in ids.frozen:
        for label in np.unique(labels[axis]).tolist():
            frozen.setdefault(label, why)
    names: dict[int, str] = {}  # class -> the first module that writes it
    whole: dict[str, str] = {}
    for axis, role, module in ids.roles:
        for label in np.unique(labels[axis]).tolist() if role == "write" else ():
            names.setdefault(label, module)
            if label in frozen:
                whole.setdefault(module, frozen[label])
    members: dict[int, list[tuple[int, int]]] = {label: [] for label in names if label not in frozen}
    for k, (_, _, axis) in enumerate(owners):
        for i, label in enumerate(labels[axis].tolist()):
            if label in members:
                members[label].append((k, i))
    groups: dict[tuple[int, ...], list[int]] = {}
    for label, touched in members.items():
        groups.setdefault(tuple(k for k, _ in touched), []).append(label)
    roles = {int(i): role for axis, role, _ in ids.roles for i in axis[:1]}
    seen: dict[str, int] = {}
    layers = []
    for touched_axes, classes in groups.items():
        table = np.array([[i for _, i in members[label]] for label in classes], dtype=np.int64)
        order = np.argsort(table[:, 0], kind="stable")
        name = names[classes[0]]
        seen[name] = seen.get(name, 0) + 1
        layers.append(
            Layer(
                name if seen[name] == 1 else f"{name}#{seen[name]}",
                tuple(_slices(touched_axes, table[order], owners, roles)),
            )
        )
    return layers, whole


def _slices(
    touched: tuple[int, ...],
    table: NDArray[np.int64],
    owners: Sequence[Owner],
    roles: Mapping[int, str],
) -> Iterator[Slice]:
    columns = np.array(touched)
    for k in dict.fromkeys(touched):
        tensor, axis, own = owners[k]
        yield Slice(tensor, axis, roles.get(int(own[0]), "follow"), torch.from_numpy(table[:, columns == k].copy()))
