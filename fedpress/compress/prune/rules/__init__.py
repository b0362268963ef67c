"""One rule per ATen operation: how channel ids pass through it, which it unites and which it keeps.

A rule takes the collector `ids`, the shape of the output, and the operation's own arguments,
tensors as `Value`s. It returns the axes of the output, or a list of them if the operation returns
several tensors. To teach the engine a new operation, add a function with `@rule(...)`. Two kinds
need none: operations that ATen tags as pointwise, and those that PyTorch can decompose into
operations with rules (`decompose`).
"""

from fedpress.compress.prune.rules import (
    attention,
    convolution,
    normalization,
    picking,
    quantization,
    recurrent,
    reshaping,
    shape,
    space,
    splitting,
    statistics,
    writing,
)
from fedpress.compress.prune.rules.decompose import decompose_operation
from fedpress.compress.prune.rules.table import RULES, find_rule, rule, zero_stays

__all__ = [
    "RULES",
    "attention",
    "convolution",
    "decompose_operation",
    "find_rule",
    "normalization",
    "picking",
    "quantization",
    "recurrent",
    "reshaping",
    "rule",
    "shape",
    "space",
    "splitting",
    "statistics",
    "writing",
    "zero_stays",
]
