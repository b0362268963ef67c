"""A secure sum whose messages all stay in one process, as in a simulation.

Masks cancel in the sum, and the ciphertexts, commitments and signatures protect them only on their
way. So in one process nobody makes them: the sum has the same bits, too few clients keep it closed
as always, and each message counts the bytes that it would have. `pack` refuses such messages, so
they cannot leave the process.
"""

from __future__ import annotations

import numpy as np
import torch

from fedpress.secagg.masks import to_tensor
from fedpress.secagg.message import JSON, SecAggMessage, read_bytes
from fedpress.secagg.public import PublicRound, answer_shapes, report_shapes

LEAST_UNMADE = 1 << 12
"""Number of values from which on the size of a masked vector is certain: it would differ with a
probability below 2^-1000. A shorter vector is masked, to count its bytes."""


def simulated_report(
    public: PublicRound, client: int, words: np.ndarray, masked: np.ndarray | None = None
) -> SecAggMessage:
    """Returns a client's report, for `fedpress.secagg.round.SimulatedRound`.

    Args:
        public: the round.
        client: number of the client.
        words: its vector [d].
        masked: the same with masks; needed if it is shorter than `LEAST_UNMADE`.
    """
    bits = public.plan.bits
    values = to_tensor(words, bits)
    rest = unmade_bytes({"round": public.number}, report_shapes(public, client))
    sent = bits if masked is None else to_tensor(masked, bits)
    return SecAggMessage(
        rest.header, {**rest.tensors, "masked": values}, {**rest.unmade, "masked": sent}
    )


def simulated_shares(public: PublicRound, request: SecAggMessage) -> SecAggMessage:
    """Returns the answer of a member of the committee; its shares are not made.

    Args:
        public: the round.
        request: one of the requests of `fedpress.secagg.round.SimulatedRound`.

    Raises:
        WireError: if the request is faulty.
    """
    reported = read_bytes(request, "reported", (len(public.names),), "unmask").astype(bool)
    return unmade_bytes({"round": public.number}, answer_shapes(public, reported))


def unmade_bytes(header: dict[str, JSON], shapes: dict[str, tuple[int, ...]]) -> SecAggMessage:
    """Returns a message with a stand-in for random bytes of each shape, which takes no memory."""
    zero = torch.zeros((), dtype=torch.uint8)
    tensors = {name: zero.expand(shape) for name, shape in shapes.items()}
    return SecAggMessage(header, tensors, dict.fromkeys(tensors, 8))
