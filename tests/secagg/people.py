"""A server and its clients in one process, for the tests of the secure sum."""

import hashlib

import torch

from fedpress.secagg import SecAggClient, SecAggMessage, SecAggServer, SecurePlan, identity


def secret(name):
    return hashlib.sha256(name.encode()).digest()


def group(n, *, bits=18, run="run", extra=0, **plan):
    """Returns (combiner, members by name), set up; the plan's cohort is n, `extra` more clients join."""
    names = [f"c{i}" for i in range(n + extra)]
    known = {name: identity(secret(name)) for name in names}
    settings = SecurePlan(n, bits, **plan)
    members = {name: SecAggClient(name, secret(name), settings, known, run) for name in names}
    combiner = SecAggServer(settings, known, run)
    for name, member in members.items():
        combiner.join(name, member.join())
    roster = combiner.roster()
    for name, member in members.items():
        combiner.accepted(name, member.accept(roster))
    return combiner, members


def numbers(n, size=7, bits=18, seed=0):
    limit = max(1, (1 << (bits - 1)) // n)
    drawn = torch.randint(-limit, limit, (n, size), generator=torch.Generator().manual_seed(seed))
    return drawn.to(torch.int64)


def reported(combiner, members, values, *, round=1, silent=()):
    """Runs the first exchange; `silent` are the names that do not report."""
    cohort = list(members)
    secure = combiner.open(round, cohort, values.shape[1])
    for row, (name, member) in enumerate(members.items()):
        part = member.mask(values[row], round=round, cohort=cohort)
        if name not in silent:
            secure.add(name, part)
    return secure


def changed(part, **tensors):
    return SecAggMessage(dict(part.header), {**part.tensors, **tensors})
