"""Gradients of pooling, written with kernels that ExecuTorch 1.5 has right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten


def rewrite_pooling_(graph: fx.GraphModule) -> None:
    """Writes the gradients of pooling with kernels that ExecuTorch 1.5 has right.

    Its kernel of max pooling adds to memory that it does not clear: each value is scattered to where its maximum came
    from. It has none of average pooling: without overlap, each value is spread over its window.
    """
    for node in list(graph.graph.nodes):
        if node.target is aten.max_pool2d_with_indices_backward.default:
            _replace_(graph, node, _scattered_to_maxima)
        elif node.target is aten.avg_pool2d_backward.default and _covers(node):
            _replace_(graph, node, _spread_over_windows)
    graph.recompile()


def _replace_(graph: fx.GraphModule, node: fx.Node, twin: Callable[..., Tensor]) -> None:
    """Puts the operations of the function `twin` in the place of `node`."""
    from torch.fx.experimental.proxy_tensor import make_fx

    given = [a.meta["val"] if isinstance(a, fx.Node) else a for a in node.args]
    traced = make_fx(lambda *tensors: twin(*_fill(given, tensors)))(
        *[v for v in given if isinstance(v, Tensor)]
    )
    inputs = iter([a for a in node.args if isinstance(a, fx.Node)])
    copied: dict[fx.Node, fx.Node] = {}
    with graph.graph.inserting_before(node):
        for inner in traced.graph.nodes:
            if inner.op == "placeholder":
                copied[inner] = next(inputs)
            elif inner.op == "call_function":
                copied[inner] = graph.graph.node_copy(inner, copied.__getitem__)
            else:
                node.replace_all_uses_with(copied[inner.args[0]])
    graph.graph.erase_node(node)


def _fill(values: Sequence[Any], tensors: Sequence[Tensor]) -> list[Any]:
    """Puts `tensors` in the places of the tensors among `values`."""
    given = iter(tensors)
    return [next(given) if isinstance(v, Tensor) else v for v in values]


def _scattered_to_maxima(gradient: Tensor, x: Tensor, *others: Any) -> Tensor:
    planes = x.shape[:2]
    zeros = torch.zeros(*planes, x.shape[2] * x.shape[3])
    return zeros.scatter_add(
        2, others[-1].reshape(*planes, -1), gradient.reshape(*planes, -1)
    ).reshape(x.shape)


def _covers(node: fx.Node) -> bool:
    """Whether windows of an average lie side by side and leave nothing out."""
    arguments: list[Any] = list(node.args)
    _, x, size, *others = arguments
    stride, padding = others[0] or size, others[1]
    inside = x.meta["val"].shape[2:]
    fits = all(length % step == 0 for length, step in zip(inside, size, strict=False))
    return (
        len(size) == 2
        and list(stride) == list(size)
        and not any(padding)
        and fits
        and others[4] is None
    )


def _spread_over_windows(gradient: Tensor, x: Tensor, size: Sequence[int], *_: Any) -> Tensor:
    n, c, h, w = gradient.shape
    windows = (gradient / (size[0] * size[1])).reshape(n, c, h, 1, w, 1)
    return windows.expand(n, c, h, size[0], w, size[1]).reshape(x.shape)
