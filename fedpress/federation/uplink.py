"""The uplink: the agreed codecs, aggregator, weights and noise of the clients' updates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from fedpress.codecs import Bound, Key, bind_chain
from fedpress.errors import renaming
from fedpress.federation.aggregators.base import (
    Aggregator,
    Weights,
)
from fedpress.federation.aggregators.mean import Mean
from fedpress.federation.guarantee import NO_PRIVACY, Guarantee
from fedpress.federation.sampling import Cohort
from fedpress.federation.servernoise import ServerNoise
from fedpress.federation.trust import Trust, per_vector_multiplier
from fedpress.federation.vector_codec import VectorCodec, divide
from fedpress.federation.vectors import UPDATE, ExtraVector, Payload, Vectors
from fedpress.privacy.adaptive import AdaptiveClip
from fedpress.privacy.plan import PrivacyPlan


@dataclass(frozen=True)
class Uplink:
    """The agreed processing of updates, equal on server and clients; made by `Uplink.bind`.

    Attributes:
        vector_codecs: one per named vector, the update first.
        cohort: how many clients take part in a round.
        aggregator: combines the vectors of a round, such as `Mean`.
        privacy: the privacy plan, or None.
        trust: who adds the plan's noise, and what clients may report.
        weights: "examples" weighs each client by its number of examples, "equal" by one.
        divisor: public number by which a private sum is divided, however many clients replied.
        noise: what the server adds, with trust "central".
        adaptive: how the clip norm adapts to the updates' norms. Each request then contains the
            current clip norm, and clients divide their updates by it.
    """

    vector_codecs: tuple[VectorCodec, ...]
    cohort: Cohort
    aggregator: Aggregator
    privacy: PrivacyPlan | None
    trust: Trust
    weights: Weights
    divisor: float
    noise: ServerNoise | None = None
    adaptive: AdaptiveClip | None = None

    @classmethod
    def bind(
        cls,
        payload: Payload,
        cohort: Cohort,
        *,
        guarantee: Guarantee = NO_PRIVACY,
        aggregator: Aggregator | None = None,
        weights: Weights = "examples",
    ) -> Uplink:
        """Makes an uplink after checking that its parts fit together.

        Args:
            payload: the vectors that every client sends.
            cohort: how many clients take part in a round.
            guarantee: the privacy guarantee.
            aggregator: `Mean()` if None.
            weights: weights of the clients in the mean.

        Raises:
            RecipeError: if the parts do not fit together, or the guarantee would not hold.
        """
        aggregator = aggregator or Mean()
        trust = guarantee.trust_row
        plan = guarantee.plan
        trust.check(plan, cohort, weights, aggregator)
        guarantee.check(payload)

        noise = trust.server_noise(plan, guarantee.noise)
        # Under unit "sample" each example's gradient is clipped, so the update needs no clip.
        clip_norm = plan.clip_norm if plan is not None and trust.unit == "client" else None
        vectors = payload.vectors(clip_norm)
        binder = _Binder(trust, plan, aggregator, cohort.size, noise, len(vectors))
        codecs = []
        for name, vector in vectors.items():
            codecs.append(binder.bind(name, vector, payload.start(vector)))
        vector_codecs = tuple(codecs)
        aggregator.check(vector_codecs)
        return cls(
            vector_codecs,
            cohort,
            aggregator,
            plan,
            trust,
            weights,
            guarantee.divisor or cohort.size,
            noise,
            guarantee.adaptive,
        )

    def agreed(self) -> dict[str, object]:
        """Returns the entries of the agreement: every field."""
        entries = {one.name: getattr(self, one.name) for one in fields(self)}
        # "ways" is the entry's name in version 0.1. Another name would change the agreement's
        # fingerprint, and with it the name under which a resumed run finds its secure sum.
        entries["ways"] = entries.pop("vector_codecs")
        return entries

    @property
    def size(self) -> int:
        """Number of values of an update."""
        return self.vector_codecs[0].size

    def encode(self, vectors: Vectors, key: Key, *, scale: float = 1.0) -> dict[str, Tensor]:
        """Returns the coded tensors of `vectors`, which are divided by `scale` first."""
        tensors: dict[str, Tensor] = {}
        for codec in self.vector_codecs:
            vector = vectors[codec.name]
            scaled = vector if scale == 1 else vector / scale
            tensors |= codec.encode(scaled, key)
        return tensors

    def decode(self, tensors: Mapping[str, Tensor], key: Key) -> dict[str, Tensor]:
        """Returns the vectors in untrusted `tensors`, without clipping them.

        Raises:
            WireError: if one is not of the agreed size, or not finite.
        """
        parts = divide(self.vector_codecs, tensors)
        return {codec.name: codec.decode(parts[codec.name], key) for codec in self.vector_codecs}

    def receive(self, tensors: Mapping[str, Tensor], key: Key) -> dict[str, Tensor]:
        """Returns the vectors in untrusted `tensors`, each clipped to its bound.

        Raises:
            WireError: if one is not of the agreed size, or not finite.
        """
        parts = divide(self.vector_codecs, tensors)
        return {codec.name: codec.receive(parts[codec.name], key) for codec in self.vector_codecs}

    def init(self) -> dict[str, Tensor]:
        """Returns the state before the first round."""
        if self.adaptive is None:
            return {}
        return {"clip_norm": torch.tensor(self.adaptive.initial, dtype=torch.float64)}

    def update_scale(self, state: Mapping[str, Tensor]) -> float:
        """Returns the number that clients divide updates by: the adaptive clip norm, else 1."""
        if self.adaptive is None:
            return 1.0
        return float(state["clip_norm"])


@dataclass(frozen=True)
class _Binder:
    """Binds the codecs of one vector; the fields are the same for all vectors of an uplink.

    Attributes:
        trust: who adds the noise.
        plan: plan of the noise; None without privacy.
        aggregator: gives the sensitivity of the aggregate.
        cohort: number of clients in a round.
        noise: the noise of the server; None if it adds none.
        vectors: how many vectors a client sends.
    """

    trust: Trust
    plan: PrivacyPlan | None
    aggregator: Aggregator
    cohort: int
    noise: ServerNoise | None
    vectors: int

    def bind(self, name: str, vector: ExtraVector, start: Bound) -> VectorCodec:
        """Returns the codec of one vector, whose bound before the first codec is `start`.

        Raises:
            RecipeError: if its codecs do not fit together.
        """
        privacy = self.trust.codecs(self.plan, vector.clip_norm, self.vectors)
        codecs = (*privacy, *vector.codecs)
        with renaming(_places(name, len(privacy), len(vector.codecs))):
            chain, end = bind_chain(codecs, start)
        bound = self.trust.decoded_bound(vector.clip_norm, start, end)
        return VectorCodec(name, bound, chain, codecs, end, self._noise(vector.clip_norm))

    def _noise(self, clip_norm: float | None) -> ServerNoise | None:
        """Returns the server's noise on the aggregate of a vector with L2 bound `clip_norm`.

        If `clip_norm` is None (unit "sample"), one example is protected: it moves its client's sum
        of gradients by at most the clip norm of the plan.
        """
        if self.noise is None:
            return None
        plan = self.noise.plan
        moved = plan.clip_norm if clip_norm is None else clip_norm
        sensitivity = self.aggregator.sensitivity(Bound(1, l2=moved), self.cohort)
        # `Trust.check` has refused aggregators without a sensitivity.
        assert sensitivity is not None
        multiplier = per_vector_multiplier(plan.noise_multiplier, self.vectors)
        plan = replace(plan, clip_norm=sensitivity, noise_multiplier=multiplier)
        return replace(self.noise, plan=plan)


def _places(name: str, privacy: int, own: int) -> dict[str, str]:
    """Returns the recipe's key for each codec of a vector, to be named in errors.

    The first `privacy` codecs come from the key `privacy`, the next `own` from the vector's codecs.
    Example for an update with a clip: {"chain[0]": "privacy", "chain[1]": "chain[0]"}.
    """
    given = "chain" if name == UPDATE else f"extras[{name!r}].codecs"
    places = {f"chain[{index}]": "privacy" for index in range(privacy)}
    for index in range(own):
        places[f"chain[{privacy + index}]"] = f"{given}[{index}]"
    return places
