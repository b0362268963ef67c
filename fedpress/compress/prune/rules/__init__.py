"""One rule per ATen operation: how channel ids pass through it, and which of them it ties or freezes.

A rule takes the collector `ids`, the output's shape, and the operation's own arguments with tensors as `Value`s; it
returns the axes of the output (a list of them if the operation returns several tensors). To teach the engine a new
operation, add a function with `@rule(...)`. Operations that ATen tags as pointwise need none, nor do those that ATen
can take apart into operations with rules (`decompose`).
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
from fedpress.compress.prune.rules.decompose import parts_of
from fedpress.compress.prune.rules.table import RULES, find_rule, rule, zero_stays

__all__ = [
    "RULES",
    "attention",
    "convolution",
    "find_rule",
    "normalization",
    "parts_of",
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
