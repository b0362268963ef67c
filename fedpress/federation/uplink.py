"""The uplink: how the clients' updates are encoded, aggregated, weighed and noised.

Server and clients agree on it before the first round.
"""

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
    """The processing of updates, equal on server and clients. Use `Uplink.bind` to make one.

    Attributes:
        vector_codecs: one codec for each vector that a client sends; the first is the update's.
        cohort: how many clients take part in a round.
        aggregator: combines the vectors of a round, such as `Mean`.
        privacy: the privacy plan; None without privacy.
        trust: who adds the plan's noise, and what clients may report.
        weights: "examples" weighs each client by its number of examples; "equal" weighs all clients
            equally.
        divisor: public number by which a private sum is divided, however many clients replied.
        noise: noise that the server adds, with trust "central"; else None.
        adaptive: how the clip norm adapts to the norms of the updates; None: it is fixed. If it
            adapts, each request contains the current clip norm, by which clients divide their
            updates.
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
            aggregator: combines the vectors of a round; None: `Mean()`.
            weights: "examples" or "equal", see `Uplink`.

        Raises:
            RecipeError: if the parts do not fit together, or the guarantee would not hold.
        """
        aggregator = aggregator or Mean()
        trust = guarantee.trust_row
        plan = guarantee.plan
        trust.check(plan, cohort, weights, aggregator)
        guarantee.check(payload)

        noise = trust.server_noise(plan, guarantee.noise)
        # Under unit "sample" each example's gradient is clipped, so the update is not clipped.
        clip_norm = plan.clip_norm if plan is not None and trust.unit == "client" else None
        vectors = payload.vectors(clip_norm)
        binder = _Binder(trust, plan, aggregator, cohort.size, noise, len(vectors))
        codecs = []
        for name, vector in vectors.items():
            codecs.append(binder.bind(name, vector, payload.start(vector)))
        vector_codecs = tuple(codecs)
        # After the codecs are bound, because the check looks at their outputs (a sum of integers).
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
        """Returns the values that server and client compare: all fields."""
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
        """Divides `vectors` by `scale`, and returns their encoded tensors."""
        tensors: dict[str, Tensor] = {}
        for codec in self.vector_codecs:
            vector = vectors[codec.name]
            scaled = vector if scale == 1 else vector / scale
            tensors |= codec.encode(scaled, key)
        return tensors

    def packed_floats(self, tensors: Mapping[str, Tensor]) -> frozenset[str]:
        """Returns the names of encoded `tensors` whose floats are packed in the shortest form."""
        parts = divide(self.vector_codecs, tensors)
        names: set[str] = set()
        for codec in self.vector_codecs:
            if codec.packs_floats:
                names |= parts[codec.name].keys()
        return frozenset(names)

    def decode(self, tensors: Mapping[str, Tensor], key: Key) -> dict[str, Tensor]:
        """Decodes untrusted `tensors` to vectors by name, without clipping them.

        Raises:
            WireError: if a vector does not have the agreed size, or is not finite.
        """
        parts = divide(self.vector_codecs, tensors)
        return {codec.name: codec.decode(parts[codec.name], key) for codec in self.vector_codecs}

    def receive(self, tensors: Mapping[str, Tensor], key: Key) -> dict[str, Tensor]:
        """Decodes untrusted `tensors` to vectors by name, and clips each vector to its bound.

        Raises:
            WireError: if a vector does not have the agreed size, or is not finite.
        """
        parts = divide(self.vector_codecs, tensors)
        return {codec.name: codec.receive(parts[codec.name], key) for codec in self.vector_codecs}

    def init(self) -> dict[str, Tensor]:
        """Returns the state before the first round: the initial clip norm if it adapts."""
        if self.adaptive is None:
            return {}
        return {"clip_norm": torch.tensor(self.adaptive.initial, dtype=torch.float64)}

    def update_scale(self, state: Mapping[str, Tensor]) -> float:
        """Returns the number by which clients divide their updates: the adaptive clip norm, or 1.

        `state` is the state after the last round.
        """
        if self.adaptive is None:
            return 1.0
        return float(state["clip_norm"])


@dataclass(frozen=True)
class _Binder:
    """Makes the codec of each vector; the fields are the same for all vectors of an uplink.

    Attributes:
        trust: who adds the noise.
        plan: plan of the noise; None without privacy.
        aggregator: gives the sensitivity of the aggregate.
        cohort: number of clients in a round.
        noise: noise of the server; None if the server adds no noise.
        vectors: number of vectors that a client sends.
    """

    trust: Trust
    plan: PrivacyPlan | None
    aggregator: Aggregator
    cohort: int
    noise: ServerNoise | None
    vectors: int

    def bind(self, name: str, vector: ExtraVector, start: Bound) -> VectorCodec:
        """Returns the codec of one vector.

        Args:
            name: name of the vector.
            vector: its size, codecs and clip norm.
            start: bound of the vector before the first codec.

        Raises:
            RecipeError: if the codecs do not fit together.
        """
        privacy = self.trust.codecs(self.plan, vector.clip_norm, self.vectors)
        # Clip and noise come first: the noise must be added to the clipped vector, before other
        # codecs change it.
        codecs = (*privacy, *vector.codecs)
        with renaming(_places(name, len(privacy), len(vector.codecs))):
            chain, end = bind_chain(codecs, start)
        bound = self.trust.decoded_bound(vector.clip_norm, start, end)
        noise = self._noise(vector.clip_norm)
        packs_floats = bool(vector.codecs)
        return VectorCodec(name, bound, chain, codecs, end, noise, packs_floats)

    def _noise(self, clip_norm: float | None) -> ServerNoise | None:
        """Returns the server's noise on the aggregate of a vector with L2 bound `clip_norm`.

        Under unit "sample" `clip_norm` is None: one example is protected, and it moves its client's
        sum of gradients by at most the clip norm of the plan.
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
    """Returns which key of the recipe each codec of a vector comes from, to be named in errors.

    Example for an update with a clip of the privacy plan and one codec of its own: {"chain[0]":
    "privacy", "chain[1]": "chain[0]"}.

    Args:
        name: name of the vector.
        privacy: number of codecs that privacy adds; they come first.
        own: number of codecs of the vector itself.
    """
    given = "chain" if name == UPDATE else f"extras[{name!r}].codecs"
    places = {f"chain[{index}]": "privacy" for index in range(privacy)}
    for index in range(own):
        places[f"chain[{privacy + index}]"] = f"{given}[{index}]"
    return places
