"""Rounds of federated learning: who takes part, what clients do, how updates come home, what the server does."""

from fedpress.federate.adders import PlainSum
from fedpress.federate.algorithms import SERVERS, Adam, Algorithm, Average, Momentum, Server
from fedpress.federate.client import Client, agreement
from fedpress.federate.exchange import ClientId, Traffic, Transport
from fedpress.federate.local import LOCAL_UPDATES, LocalSettings, private_sgd, sgd
from fedpress.federate.rounds import RoundRecord, rounds
from fedpress.federate.sampling import Cohort
from fedpress.federate.transforms import Bound, Clip, Key, Transform
from fedpress.federate.uplink import Uplink

__all__ = [
    "LOCAL_UPDATES",
    "SERVERS",
    "Adam",
    "Algorithm",
    "Average",
    "Bound",
    "Client",
    "ClientId",
    "Clip",
    "Cohort",
    "Key",
    "LocalSettings",
    "Momentum",
    "PlainSum",
    "RoundRecord",
    "Server",
    "Traffic",
    "Transform",
    "Transport",
    "Uplink",
    "agreement",
    "private_sgd",
    "rounds",
    "sgd",
]
