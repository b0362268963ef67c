"""Decomposes operations without a pruning rule into operations with rules, using PyTorch's tables.

A rule says which channels of an operation are pruned together and which are kept (not pruned).
Examples of decompositions: `torch.hstack` is one `cat`; `torch.diff` is two slices and a
subtraction. PyTorch has decompositions for about a thousand operations, in C++ ("composite"
kernels) and in Python (`torch._decomp`). An operation needs its own rule only if it cannot be
decomposed, or if the rules of its parts would keep channels that can be pruned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._decomp import decomposition_table
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_unflatten


def decompose_operation(
    operation: Any, args: Sequence[Any], options: dict[str, Any]
) -> torch.fx.Graph | None:
    """Returns the graph of operations that compute `operation`, or None if it cannot be decomposed.

    Args:
        operation: an overload of an ATen operation.
        args: positional arguments of the operation, with fake tensors (shape and type without
            values), as in a graph of `torch.export`.
        options: arguments of the operation by name.

    Returns:
        A graph whose placeholders are the tensors among the arguments, in the order of
        `tree_flatten((args, options))`.
    """
    decomposition = _decomposition(operation)
    if decomposition is None:
        return None
    leaves, structure = tree_flatten((list(args), options))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def run(*given: Tensor) -> Any:
        rest = iter(given)
        filled = []
        for leaf in leaves:
            filled.append(next(rest) if isinstance(leaf, Tensor) else leaf)
        arguments, named = tree_unflatten(filled, structure)
        return decomposition(*arguments, **named)

    try:
        # The tensors are fake, so tracing computes shapes only.
        graph = make_fx(run, tracing_mode="real")(*tensors).graph
    except Exception:
        # A decomposition may need the values of its inputs, or refuse their types. Without it the
        # channels that reach the operation are kept.
        return None

    # A composite kernel that calls itself would cause an endless recursion.
    calls_itself = any(node.target is operation for node in graph.nodes)
    return None if calls_itself else graph


def _decomposition(operation: Any) -> Callable[..., Any] | None:
    """Returns the function that computes `operation` by other operations."""
    # The composite kernel comes first. It calls ATen operations, whereas Python's table sometimes
    # ends in `prims`, for which there are no rules.
    if isinstance(operation, torch._ops.OpOverload) and operation._can_decompose():
        return operation.decompose
    return decomposition_table.get(operation)
