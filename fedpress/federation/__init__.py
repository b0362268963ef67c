"""Rounds of federated learning: who takes part, what clients do, how updates come home, what the server does."""

from fedpress.core.names import ClientId
from fedpress.federation.aggregators.mean import Adder, PlainSum, SecureSum
from fedpress.federation.algorithms.fedopt import (
    SERVERS,
    Adam,
    Algorithm,
    Average,
    Momentum,
    Server,
)
from fedpress.federation.client import Client, agreement
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
    "Algorithm",
    "Average",
    "Client",
    "ClientId",
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
    "Traffic",
    "Transport",
    "Uplink",
    "agreement",
    "device_sgd",
    "private_sgd",
    "rounds",
    "sgd",
]
