"""Secure aggregation: the server learns the sum of the clients' vectors and nothing else."""

from fedpress.secagg.client import SecAggClient
from fedpress.secagg.keys import identity
from fedpress.secagg.message import SecAggMessage
from fedpress.secagg.plan import SecurePlan
from fedpress.secagg.round import SecureRound
from fedpress.secagg.server import SecAggServer

__all__ = ["SecAggClient", "SecAggMessage", "SecAggServer", "SecurePlan", "SecureRound", "identity"]
