"""Rewrites the gradients of pooling with operations that ExecuTorch 1.5 computes correctly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten


def rewrite_pooling_(graph: fx.GraphModule) -> None:
    """Replaces the gradient operations of max and average pooling in `graph`.

    ExecuTorch's kernel for the gradient of max pooling adds to uninitialised memory. The operation
    is replaced by operations that add each gradient at the position of its maximum. ExecuTorch has
    no kernel for the gradient of average pooling. If the windows cover the input without overlap,
    gap or padding, this operation is replaced by operations that spread each gradient over its
    window.
    """
    for node in list(graph.graph.nodes):
        if node.target is aten.max_pool2d_with_indices_backward.default:
            _replace_(graph, node, _scattered_to_maxima)
        elif node.target is aten.avg_pool2d_backward.default and _windows_tile(node):
            _replace_(graph, node, _spread_over_windows)
    graph.recompile()


def _replace_(graph: fx.GraphModule, node: fx.Node, function: Callable[..., Tensor]) -> None:
    """Replaces `node` by the torch operations that `function` executes on the same arguments."""
    from torch.fx.experimental.proxy_tensor import make_fx

    sources = [a for a in node.args if isinstance(a, fx.Node)]
    tensors = [source.meta["val"] for source in sources]
    arguments = [a.meta["val"] if isinstance(a, fx.Node) else a for a in node.args]
    traced = make_fx(lambda *inner: function(*_with_tensors(arguments, inner)))(*tensors)

    # The traced operations are copied into the graph; their inputs become the arguments of `node`.
    inputs = iter(sources)
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


def _with_tensors(values: Sequence[Any], tensors: Sequence[Tensor]) -> list[Any]:
    """Replaces the tensors among `values` by `tensors`, in order."""
    remaining = iter(tensors)
    return [next(remaining) if isinstance(v, Tensor) else v for v in values]


def _scattered_to_maxima(gradient: Tensor, x: Tensor, *others: Any) -> Tensor:
    """Gradient of max pooling for input x [n, c, h, w].

    The last argument holds the position of each maximum in its channel, flattened to [h * w].
    """
    planes = x.shape[:2]
    positions = others[-1].reshape(*planes, -1)
    zeros = torch.zeros(*planes, x.shape[2] * x.shape[3])
    # Overlapping windows may have the same maximum, so gradients are added, not assigned.
    scattered = zeros.scatter_add(2, positions, gradient.reshape(*planes, -1))
    return scattered.reshape(x.shape)


def _windows_tile(node: fx.Node) -> bool:
    """Returns whether the windows of an average pooling have no overlap, gap or padding."""
    arguments: list[Any] = list(node.args)
    _, x, size, stride, padding, _, _, divisor = arguments
    if len(size) != 2 or divisor is not None or any(padding):
        return False
    # An empty stride means the size of the window.
    if list(stride or size) != list(size):
        return False
    height, width = x.meta["val"].shape[2:]
    return bool(height % size[0] == 0 and width % size[1] == 0)


def _spread_over_windows(gradient: Tensor, x: Tensor, size: Sequence[int], *_: Any) -> Tensor:
    """Gradient of average pooling for input x [n, c, h, w] and windows of `size`."""
    n, c, h, w = gradient.shape
    windows = (gradient / (size[0] * size[1])).reshape(n, c, h, 1, w, 1)
    return windows.expand(n, c, h, size[0], w, size[1]).reshape(x.shape)
