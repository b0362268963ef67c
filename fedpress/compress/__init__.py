"""Making a network small: which channels matter, which go together, and removing them for good."""

from fedpress.compress.cost import Latency, latency, macs, parameters, state_bytes
from fedpress.compress.graph import ChannelGraph
from fedpress.compress.planning import PruningPlan, plan
from fedpress.compress.remove import check_parity, mask_, remove_
from fedpress.compress.restore import restore_batch_norm_
from fedpress.compress.scores import SCORES, score
from fedpress.compress.single import prune_single_channel
from fedpress.compress.trace import trace

__all__ = [
    "SCORES",
    "ChannelGraph",
    "Latency",
    "PruningPlan",
    "check_parity",
    "latency",
    "macs",
    "mask_",
    "parameters",
    "plan",
    "prune_single_channel",
    "remove_",
    "restore_batch_norm_",
    "score",
    "state_bytes",
    "trace",
]
