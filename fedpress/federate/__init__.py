"""Rounds of federated learning: who takes part, what clients do, how updates come home, what the server does."""

from fedpress.federate.adders import Adder, PlainSum, SecureSum
from fedpress.federate.algorithms import SERVERS, Adam, Algorithm, Average, Momentum, Server
from fedpress.federate.client import Client, agreement
from fedpress.federate.downlink import Downlink
from fedpress.federate.exchange import ClientId, Traffic, Transport
from fedpress.federate.local import LOCAL_UPDATES, LocalSettings, private_sgd, sgd
from fedpress.federate.memory import Files, Memory, Recall
from fedpress.federate.ondevice import device_sgd
from fedpress.federate.rounds import RoundRecord, rounds
from fedpress.federate.sampling import Cohort
from fedpress.federate.transforms import (
    TRANSFORMS,
    VALUES,
    AnyTransform,
    Bound,
    Clip,
    Discretize,
    Key,
    Noise,
    Rotate,
    Settings,
    Transform,
    bind_chain,
)
from fedpress.federate.uplink import Uplink

__all__ = [
    "LOCAL_UPDATES",
    "SERVERS",
    "TRANSFORMS",
    "VALUES",
    "Adam",
    "Adder",
    "Algorithm",
    "AnyTransform",
    "Average",
    "Bound",
    "Client",
    "ClientId",
    "Clip",
    "Cohort",
    "Discretize",
    "Downlink",
    "Files",
    "Key",
    "LocalSettings",
    "Memory",
    "Momentum",
    "Noise",
    "PlainSum",
    "Recall",
    "Rotate",
    "RoundRecord",
    "SecureSum",
    "Server",
    "Settings",
    "Traffic",
    "Transform",
    "Transport",
    "Uplink",
    "agreement",
    "bind_chain",
    "device_sgd",
    "private_sgd",
    "rounds",
    "sgd",
]
