"""Secure sums: the server learns the sum of the clients' vectors and nothing else."""

from fedpress.secure.combiner import Combiner, SecureRound
from fedpress.secure.keys import identity
from fedpress.secure.member import Member
from fedpress.secure.parts import Part
from fedpress.secure.plan import SecurePlan

__all__ = ["Combiner", "Member", "Part", "SecurePlan", "SecureRound", "identity"]
