"""Making a network small: which channels matter, which go together, and removing them for good."""

from fedpress.compress.approximate import Difference, Norm, difference, refit_norms_
from fedpress.compress.cost import Latency, latency, macs, parameters, state_bytes
from fedpress.compress.graph import ChannelGraph
from fedpress.compress.parity import check_parity
from fedpress.compress.planning import PruningPlan, plan
from fedpress.compress.remove import mask_, remove_
from fedpress.compress.restore import restore_batch_norm_
from fedpress.compress.scores import SCORES, score
from fedpress.compress.sensitivity import Point, channel_units, sensitivity, weight_unit
from fedpress.compress.single import prune_single_channel
from fedpress.compress.targets import Target, bytes_target, macs_target, parameter_target
from fedpress.compress.trace import trace

__all__ = [
    "SCORES",
    "ChannelGraph",
    "Difference",
    "Latency",
    "Norm",
    "Point",
    "PruningPlan",
    "Target",
    "bytes_target",
    "channel_units",
    "check_parity",
    "difference",
    "latency",
    "macs",
    "macs_target",
    "mask_",
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
