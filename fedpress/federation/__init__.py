"""Federated rounds: sampling of clients, local training, transport and aggregation of updates."""

from fedpress.core.names import ClientId
from fedpress.federation.aggregators import AGGREGATORS, AnyAggregator
from fedpress.federation.aggregators.base import Aggregator
from fedpress.federation.aggregators.mean import Mean
from fedpress.federation.aggregators.median import Median
from fedpress.federation.aggregators.secure import SecureSum
from fedpress.federation.agreement import Agreement, Terms
from fedpress.federation.algorithms import (
    ALGORITHMS,
    Algorithm,
    AnyAlgorithm,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedProx,
    Scaffold,
)
from fedpress.federation.algorithms.optimizers import SERVERS, Adam, Average, Momentum, Server
from fedpress.federation.client import Client
from fedpress.federation.client_plan import ClientPlan
from fedpress.federation.client_state import ClientState, DiskState, InMemoryState
from fedpress.federation.downlink import Downlink
from fedpress.federation.exchange import Traffic, Transport
from fedpress.federation.guarantee import Guarantee
from fedpress.federation.local import LocalPlan, LocalSettings, LocalWork
from fedpress.federation.ondevice import device_steps
from fedpress.federation.sampling import Cohort
from fedpress.federation.schedules import SCHEDULES, Buffered, Synchronous
from fedpress.federation.server import RoundRecord, Start, rounds
from fedpress.federation.trust import Trust, trust_of
from fedpress.federation.uplink import Uplink
from fedpress.federation.vectors import Payload

__all__ = [
    "AGGREGATORS",
    "ALGORITHMS",
    "SCHEDULES",
    "SERVERS",
    "Adam",
    "Aggregator",
    "Agreement",
    "Algorithm",
    "AnyAggregator",
    "AnyAlgorithm",
    "Average",
    "Buffered",
    "Client",
    "ClientId",
    "ClientPlan",
    "ClientState",
    "Cohort",
    "DiskState",
    "Downlink",
    "FedAdam",
    "FedAvg",
    "FedAvgM",
    "FedProx",
    "Guarantee",
    "InMemoryState",
    "LocalPlan",
    "LocalSettings",
    "LocalWork",
    "Mean",
    "Median",
    "Momentum",
    "Payload",
    "RoundRecord",
    "Scaffold",
    "SecureSum",
    "Server",
    "Start",
    "Synchronous",
    "Terms",
    "Traffic",
    "Transport",
    "Trust",
    "Uplink",
    "device_steps",
    "rounds",
    "trust_of",
]
