"""Secure sums: the server learns the sum of the clients' vectors and nothing else."""

from fedpress.secagg.client import Member
from fedpress.secagg.keys import identity
from fedpress.secagg.parts import Part
from fedpress.secagg.plan import SecurePlan
from fedpress.secagg.server import Combiner, SecureRound

__all__ = ["Combiner", "Member", "Part", "SecurePlan", "SecureRound", "identity"]
