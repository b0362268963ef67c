"""The noise that a trusted server adds to a sum: independent in each round, or correlated."""

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
    """Gaussian noise of standard deviation `plan.noise_std` on each value of a sum.

    With `factorization` the noise of a round is a weighted sum of this and earlier rounds' draws.
    """

    plan: PrivacyPlan
    factorization: Factorization | None = None

    @property
    def multiplier(self) -> float:
        """Standard deviation of the noise on one value of a round, divided by the clip norm."""
        if self.factorization is None:
            return self.plan.noise_multiplier
        root = math.sqrt(sum(w * w for w in self.factorization.coefficients))
        return self.plan.noise_multiplier * self.factorization.sensitivity * root

    @property
    def _scaling(self) -> tuple[object, ...]:
        """Everything that turns a draw into noise; it is part of the name of every draw.

        Otherwise one draw could hide the same sum at two scales, and two such answers give the sum:
        (s + 2z) - 2 (s + z) = -s.
        """
        return (self.plan,) if self.factorization is None else (self.plan, self.factorization)

    def count(
        self, counts: Tensor, state: Mapping[str, Tensor], key: Key, hidden: str
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Adds noise to counts: further coordinates of the same mechanism, at no further cost.

        Args:
            counts: float64 [k]; one protected unit moves one of them by at most 1.
            state: of the noise, as the round before left it.
            key: of the server in this round.
            hidden: fingerprint of what else the noise of this round hides.

        Returns:
            The noised counts [k] and the next state.
        """
        # In units of the clip norm the sum moves by at most 1, as a count does.
        plan = replace(self.plan, clip_norm=1.0)
        name = random.fingerprint(counts, *self._scaling, hidden)
        return replace(self, plan=plan)._noised(counts, state, key, "failures", name, FAILURE_KEYS)

    def add(
        self, total: Tensor, state: Mapping[str, Tensor], key: Key, name: str = UPDATE
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Adds noise to the sum of one named vector.

        The noise is a function of a secret and of what it hides. A different sum, or the same sum
        under another plan, gets independent noise: two runs of one seed cannot be subtracted. The
        same sum gets the same noise, which reveals nothing new. Without the secret, every noise
        looks freshly drawn.

        Args:
            total: the sum [d].
            state: of the noise, as the round before left it.
            key: of the server in this round.
            name: of the vector.

        Returns:
            The noised sum [d], and the next state with what later rounds need of this draw.
        """
        # Two vectors of a round must not share their noise.
        suffix = "" if name == UPDATE else f".{name}"
        hidden = random.fingerprint(total, *self._scaling)
        return self._noised(total, state, key, f"noise{suffix}", hidden, f"{KEYS}{suffix}")

    def _noised(
        self,
        total: Tensor,
        state: Mapping[str, Tensor],
        key: Key,
        word: str,
        hidden: str,
        keys_name: str,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Adds noise from the stream `word`, `hidden`; `keys_name` is where past draws are kept."""
        if self.factorization is None:
            return noise_sum(total, self.plan, key.private_stream(word, hidden)), dict(state)

        # The state holds the 32-byte keys of past draws instead of the draws: those are as long as
        # the model, and are computed again from their keys.
        own_key = bytearray(key.private_key(word, hidden))
        keys = torch.frombuffer(own_key, dtype=torch.uint8).reshape(1, 32)
        if keys_name in state:
            keys = torch.cat([keys, state[keys_name]])[: len(self.factorization.coefficients)]
        draws = []
        for past in keys:
            draws.append(AesCtrRandom(bytes(past.tolist())).normal(total.numel()))
        mixed = self.factorization.sensitivity * self.factorization.noise(draws)
        noised = add_noise(total, self.plan, mixed, exact=key.secret is not None)
        return noised, {**state, keys_name: keys}
