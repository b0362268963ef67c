"""Pruning rules of ATen operations: which channels are pruned together, which cannot be pruned.

Each index of a channel axis has an id; other axes, such as the batch, have None. A rule *unites*
the ids of channels that must be pruned together, and *keeps* ids that cannot be pruned. Example:
the rule of `cat` concatenates the ids along `dim` and unites the ids of all tensors along every
other axis.

A rule takes the collector `ids` (`ChannelIds`), the shape of the output, and the arguments of the
operation, with tensors as `Value`s. It returns the ids of the output's axes; a list of these if the
operation returns several tensors. For a new operation, add a function with `@rule(...)`. No rule is
needed for operations that ATen tags as pointwise, or that PyTorch can decompose into operations
with rules (`decompose`).
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
from fedpress.compress.prune.rules.table import RULES, find_rule, keeps_zeros, rule

__all__ = [
    "RULES",
    "attention",
    "convolution",
    "decompose_operation",
    "find_rule",
    "keeps_zeros",
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
]
