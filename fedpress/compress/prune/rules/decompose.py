"""Operations without a rule of their own, taken apart into others as ATen itself does it.

`torch.hstack` is another name of `cat`, `torch.diff` is two slices and a subtraction. PyTorch knows this of a thousand
operations, in C++ ("composite" kernels) and in Python (`torch._decomp`); both are asked, one after the other. So a rule
is needed only for what cannot be taken apart, or what would lose channels on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._decomp import decomposition_table
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_unflatten


def parts_of(operation: Any, args: Sequence[Any], options: dict[str, Any]) -> torch.fx.Graph | None:
    """Returns the graph of operations that `operation` stands for, or None if it cannot be taken apart.

    Args:
        operation: an overload of an ATen operation.
        args: its arguments, with tensors without values ("fake" ones, as `torch.export` leaves them).
        options: its arguments by name.

    Returns:
        A graph whose placeholders are the tensors among the arguments, in the order of `tree_flatten((args, options))`.
    """
    body = _body(operation)
    if body is None:
        return None
    leaves, form = tree_flatten((list(args), options))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def run(*given: Tensor) -> Any:
        rest = iter(given)
        filled = [next(rest) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        arguments, named = tree_unflatten(filled, form)
        return body(*arguments, **named)

    try:
        graph = make_fx(run, tracing_mode="real")(*tensors).graph
    except (
        Exception
    ):  # whatever the decomposition raises: it needs values, say, or is not for these types
        return None
    itself = any(node.target is operation for node in graph.nodes)
    return None if itself else graph


def _body(operation: Any) -> Callable[..., Any] | None:
    """Returns the function that computes `operation` by others."""
    # The composite kernel first: what it calls are operations, where Python's table ends in `prims` now and then.
    if isinstance(operation, torch._ops.OpOverload) and operation._can_decompose():
        return operation.decompose
    return decomposition_table.get(operation)
