"""The noise that a trusted server adds to a sum: fresh in every round, or correlated over the rounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedpress import seeds
from fedpress.federate.transforms import Key
from fedpress.privacy.chance import Cipher
from fedpress.privacy.factorization import Factorization
from fedpress.privacy.mechanism import add_noise, noise_sum
from fedpress.privacy.plan import PrivacyPlan

KEYS = "noise_keys"


@dataclass(frozen=True)
class ServerNoise:
    """Gaussian noise of `plan.noise_std` on each value of a sum; `factorization` mixes the draws of past rounds in."""

    plan: PrivacyPlan
    factorization: Factorization | None = None

    def add(self, total: Tensor, state: Mapping[str, Tensor], key: Key) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the noised `total` [d] and the state with what later rounds need of this draw.

        Noise is a function of a secret and of what it hides. Other sums, or the same one under another plan, get
        independent noise, so that two runs of one seed cannot be subtracted; equal ones get an equal answer, which
        says nothing new. To whom the secret is unknown each noise looks freshly drawn.
        """
        hidden = seeds.fingerprint(total, self.plan)
        if self.factorization is None:
            return noise_sum(total, self.plan, key.chance("noise", hidden)), dict(state)
        # Past draws are made again from their keys: a few bytes each, where the draws would be vectors.
        fresh = torch.frombuffer(bytearray(key.hidden_key("noise", hidden)), dtype=torch.uint8).reshape(1, 32)
        keys = torch.cat([fresh, state[KEYS]])[: len(self.factorization.coefficients)] if KEYS in state else fresh
        draws = [Cipher(bytes(past.tolist())).normal(total.numel()) for past in keys]
        mixed = self.factorization.sensitivity * self.factorization.noise(draws)
        return add_noise(total, self.plan, mixed, exact=key.secret is not None), {**state, KEYS: keys}
