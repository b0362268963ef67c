"""Makes models smaller: channel pruning, sparsity, quantization, distillation; counts their cost.

The cost of a model is its parameters, multiply-adds, bytes and latency.
"""

from fedpress.compress.cost import Latency, latency, macs, parameters, state_bytes
from fedpress.compress.prune.approximate import (
    NormKind,
    OutputDifference,
    output_difference,
    refit_norms_,
)
from fedpress.compress.prune.graph import ChannelGraph
from fedpress.compress.prune.parity import check_parity
from fedpress.compress.prune.plan import PruningPlan, plan
from fedpress.compress.prune.remove import mask_, remove_
from fedpress.compress.prune.restore import restore_batch_norm_
from fedpress.compress.prune.scores import SCORES, score
from fedpress.compress.prune.sensitivity import (
    SensitivityPoint,
    channel_units,
    sensitivity,
    weight_unit,
)
from fedpress.compress.prune.single import prune_single_channel
from fedpress.compress.prune.targets import Target, bytes_target, macs_target, parameter_target
from fedpress.compress.prune.trace import trace

__all__ = [
    "SCORES",
    "ChannelGraph",
    "Latency",
    "NormKind",
    "OutputDifference",
    "PruningPlan",
    "SensitivityPoint",
    "Target",
    "bytes_target",
    "channel_units",
    "check_parity",
    "latency",
    "macs",
    "macs_target",
    "mask_",
    "output_difference",
    "parameter_target",
    "parameters",
    "plan",
    "prune_single_channel",
    "refit_norms_",
    "remove_",
    "restore_batch_norm_",
    "score",
    "sensitivity",
    "state_bytes",
    "trace",
    "weight_unit",
]
