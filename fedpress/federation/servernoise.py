"""The noise that a trusted server adds to the sum of the clients' vectors.

The noise of different rounds is either independent, or correlated by a matrix factorization.
"""

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
"""Name of the state's tensor with the keys that seeded past draws of the update's noise."""
FAILURE_KEYS = "failure_keys"
"""Name of the state's tensor with the keys that seeded past draws of noise on failure counts."""


@dataclass(frozen=True)
class ServerNoise:
    """Gaussian noise on each value of a sum.

    Without a factorization its standard deviation is `plan.noise_std`.

    Attributes:
        plan: clip norm and noise multiplier.
        factorization: if given, the noise of a round is a weighted sum of random draws of this
            round and of earlier rounds; None: the noise of each round is independent.
    """

    plan: PrivacyPlan
    factorization: Factorization | None = None

    @property
    def multiplier(self) -> float:
        """Standard deviation of the noise on one value of a round, divided by the clip norm.

        With a factorization the first rounds have less noise, because there are fewer draws.
        """
        if self.factorization is None:
            return self.plan.noise_multiplier
        root = math.sqrt(sum(w * w for w in self.factorization.coefficients))
        return self.plan.noise_multiplier * self.factorization.sensitivity * root

    @property
    def _scaling(self) -> tuple[object, ...]:
        """The settings that decide the scale of the noise; the random stream is named by them.

        Without them in the name, the same draw z could be added to the same sum s at two scales,
        and the two answers would reveal s: (s + 2z) - 2 (s + z) = -s.
        """
        return (self.plan,) if self.factorization is None else (self.plan, self.factorization)

    def count(
        self, counts: Tensor, state: Mapping[str, Tensor], key: Key, hidden: str
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Adds noise to counts of failures, at no extra epsilon (`fedpress.federation.failures`).

        Args:
            counts: float64 [k]; one protected unit changes one count by at most 1.
            state: state of the noise after the last round.
            key: seeds the server's random streams of this round.
            hidden: fingerprint of the sums of this round, by which the random stream is named.

        Returns:
            The noised counts [k] and the next state.
        """
        # One unit moves a count by at most 1, so its clip norm is 1.
        plan = replace(self.plan, clip_norm=1.0)
        name = random.fingerprint(counts, *self._scaling, hidden)
        return replace(self, plan=plan)._noised(counts, state, key, "failures", name, FAILURE_KEYS)

    def add(
        self, total: Tensor, state: Mapping[str, Tensor], key: Key, name: str = UPDATE
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Adds noise to the sum of one vector, such as the update.

        The noise is a pseudorandom function of the key and of the sum. Another sum, or the same sum
        under another plan, gets independent noise. So the noise cannot be removed by subtracting
        the results of two runs with one seed. The same sum gets the same noise, which reveals
        nothing new.

        Args:
            total: the sum [d].
            state: state of the noise after the last round.
            key: seeds the server's random streams of this round.
            name: name of the vector.

        Returns:
            The noised sum [d], and the next state with the key of this draw for later rounds.
        """
        # Each vector of a round must get its own noise.
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
        """Adds noise to `total`; see `add`.

        Args:
            total: values [d].
            state: state of the noise after the last round.
            key: seeds the server's random streams of this round.
            word: first part of the random stream's name, such as "noise".
            hidden: second part of this name: a fingerprint of the values.
            keys_name: name of the entry in the state that holds the keys of past draws.
        """
        if self.factorization is None:
            return noise_sum(total, self.plan, key.private_stream(word, hidden)), dict(state)

        # The state holds the 32-byte keys of past draws, not the draws themselves, which are as
        # large as the model. Each draw is computed again from its key.
        own_key = bytearray(key.private_key(word, hidden))
        keys = torch.frombuffer(own_key, dtype=torch.uint8).reshape(1, 32)
        # Newest first, and no more than the factorization has coefficients.
        if keys_name in state:
            keys = torch.cat([keys, state[keys_name]])[: len(self.factorization.coefficients)]
        draws = []
        for past in keys:
            draws.append(AesCtrRandom(bytes(past.tolist())).normal(total.numel()))
        mixed = self.factorization.sensitivity * self.factorization.noise(draws)
        noised = add_noise(total, self.plan, mixed, exact=key.secret is not None)
        return noised, {**state, keys_name: keys}
