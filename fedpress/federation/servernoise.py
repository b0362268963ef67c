"""The noise that a trusted server adds to a sum: fresh in every round, or correlated over the rounds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedpress.codecs import Key
from fedpress.core import random
from fedpress.core.random_source import AesCtrRandom
from fedpress.federation.vectors import UPDATE
from fedpress.privacy.noise.factorization import Factorization
from fedpress.privacy.noise.mechanism import add_noise, noise_sum
from fedpress.privacy.plan import PrivacyPlan

KEYS = "noise_keys"
FAILURE_KEYS = "failure_keys"


@dataclass(frozen=True)
class ServerNoise:
    """Gaussian noise of `plan.noise_std` on each value of a sum; `factorization` mixes the draws of past rounds in."""

    plan: PrivacyPlan
    factorization: Factorization | None = None

    @property
    def multiplier(self) -> float:
        """Standard deviation of the noise on one value of a round, over the clip norm."""
        if self.factorization is None:
            return self.plan.noise_multiplier
        root = math.sqrt(sum(w * w for w in self.factorization.coefficients))
        return self.plan.noise_multiplier * self.factorization.sensitivity * root

    @property
    def _how(self) -> tuple[object, ...]:
        """All that says how a draw becomes noise: one draw at two scales on one sum would tell the sum."""
        return (self.plan,) if self.factorization is None else (self.plan, self.factorization)

    def count(
        self, counts: Tensor, state: Mapping[str, Tensor], key: Key, hidden: str
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns noised `counts` [k] and the state: coordinates of the same mechanism, in units of the clip norm.

        `hidden` names all that the noise hides besides.
        """
        plan, name = (
            replace(self.plan, clip_norm=1.0),
            random.fingerprint(counts, *self._how, hidden),
        )
        return replace(self, plan=plan)._noised(counts, state, key, "failures", name, FAILURE_KEYS)

    def add(
        self, total: Tensor, state: Mapping[str, Tensor], key: Key, name: str = UPDATE
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the noised `total` [d] of the vector `name`, and the state with what later rounds need of this draw.

        Noise is a function of a secret and of what it hides. Other sums, or the same one under another plan, get
        independent noise, so that two runs of one seed cannot be subtracted; equal ones get an equal answer, which
        says nothing new. To whom the secret is unknown each noise looks freshly drawn.
        """
        own = "" if name == UPDATE else f".{name}"  # two vectors of a round never share their noise
        hidden = random.fingerprint(total, *self._how)
        return self._noised(total, state, key, f"noise{own}", hidden, f"{KEYS}{own}")

    def _noised(
        self,
        total: Tensor,
        state: Mapping[str, Tensor],
        key: Key,
        word: str,
        hidden: str,
        keys_name: str,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Adds noise from the stream `word`, named by what it hides; past draws have their keys in the state."""
        if self.factorization is None:
            return noise_sum(total, self.plan, key.private_stream(word, hidden)), dict(state)
        # Past draws are made again from their keys: a few bytes each, where the draws would be vectors.
        fresh = torch.frombuffer(
            bytearray(key.private_key(word, hidden)), dtype=torch.uint8
        ).reshape(1, 32)
        keys = fresh
        if keys_name in state:
            keys = torch.cat([fresh, state[keys_name]])[: len(self.factorization.coefficients)]
        draws = [AesCtrRandom(bytes(past.tolist())).normal(total.numel()) for past in keys]
        mixed = self.factorization.sensitivity * self.factorization.noise(draws)
        return add_noise(total, self.plan, mixed, exact=key.secret is not None), {
            **state,
            keys_name: keys,
        }
