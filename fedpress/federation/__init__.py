"""Rounds of federated learning: who takes part, what clients do, how updates come home, what the server does."""

from fedpress.core.names import ClientId
from fedpress.federation.aggregators.mean import Adder, PlainSum, SecureSum
from fedpress.federation.agreement import Agreement, Terms
from fedpress.federation.algorithms.fedopt import (
    SERVERS,
    Adam,
    Algorithm,
    Average,
    Momentum,
    Server,
)
from fedpress.federation.client import Client, ClientPlan
from fedpress.federation.client_state import ClientState, DiskState, InMemoryState
from fedpress.federation.downlink import Downlink
from fedpress.federation.exchange import Traffic, Transport
from fedpress.federation.local import LOCAL_UPDATES, LocalSettings, private_sgd, sgd
from fedpress.federation.ondevice import device_sgd
from fedpress.federation.sampling import Cohort
from fedpress.federation.server import RoundRecord, rounds
from fedpress.federation.uplink import Uplink

__all__ = [
    "LOCAL_UPDATES",
    "SERVERS",
    "Adam",
    "Adder",
    "Agreement",
    "Algorithm",
    "Average",
    "Client",
    "ClientId",
    "ClientPlan",
    "ClientState",
    "Cohort",
    "DiskState",
    "Downlink",
    "InMemoryState",
    "LocalSettings",
    "Momentum",
    "PlainSum",
    "RoundRecord",
    "SecureSum",
    "Server",
    "Terms",
    "Traffic",
    "Transport",
    "Uplink",
    "device_sgd",
    "private_sgd",
    "rounds",
    "sgd",
]
