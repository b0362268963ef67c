"""The planned privacy of a federate stage: its noise, and the privacy cost of each round."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from fedpress.codecs import Settings
from fedpress.federation import Guarantee, Trust, trust_of
from fedpress.federation.servernoise import ServerNoise
from fedpress.privacy.accounting.events import MechanismEvent
from fedpress.privacy.adaptive import AdaptiveClip
from fedpress.privacy.plan import PrivacyPlan
from fedpress.stages.federate.grid import SumGrid
from fedpress.stages.federate.settings import FederateSettings


@dataclass(frozen=True)
class Protection:
    """A stage's planned privacy.

    Attributes:
        chain: codecs that a client applies to its update, with grid and noise filled in.
        plans: client -> privacy plan; empty without privacy. The plans of two clients differ only
            if examples are protected and each client adds its own noise.
        costs: client (or "population" for all clients) -> the privacy mechanism of one round, for
            the ledger.
        grid: integer grid of a secure sum; None for a plain sum.
        noise: the server's noise; None if the server adds no noise.
        adaptive: settings of an adaptive clip norm, with the noise of its count; None if the clip
            norm is fixed.
        divisor: divisor of the private sum; None: the size of the cohort.
        charged_once: whether `costs` cover all rounds together. The first round is then charged
            for all of them.
    """

    chain: tuple[Settings, ...]
    plans: Mapping[str, PrivacyPlan] = field(default_factory=dict)
    costs: Mapping[str, MechanismEvent] = field(default_factory=dict)
    grid: SumGrid | None = None
    noise: ServerNoise | None = None
    adaptive: AdaptiveClip | None = None
    divisor: float | None = None
    charged_once: bool = False

    def guarantee(self, trust: Trust) -> Guarantee:
        """Returns the privacy guarantee as the uplink needs it: unit, clip norm and noise."""
        # Any client's plan works: the uplink needs only unit, clip norm and noise, and these are
        # equal in all plans.
        plan = next(iter(self.plans.values()), None)
        return Guarantee(plan, trust.kind, self.noise, self.adaptive, self.divisor)


def is_secure(stage: FederateSettings) -> bool:
    """Whether the stage uses a secure sum, in which the server learns only the sum of updates.

    The user can choose it as the aggregator. Trust "distributed" always needs it.
    """
    if stage.aggregator is not None:
        return not stage.aggregator.sees_updates
    return trust_of_stage(stage).noise == "sum"


def trust_of_stage(stage: FederateSettings) -> Trust:
    """Returns what `stage` protects (examples or clients), and who adds the noise."""
    private = stage.privacy
    return trust_of(None) if private is None else trust_of(private.unit, private.trust)


def repeated(event: MechanismEvent, count: int) -> MechanismEvent:
    """Returns the privacy cost of `event` repeated `count` times."""
    return replace(event, steps=event.steps * count)


def steps_per_round(stage: FederateSettings, examples: int) -> int:
    """Returns how many local steps a client with this many examples takes in a round."""
    if trust_of_stage(stage).steps == "joint":
        return 1
    return stage.epochs * math.ceil(examples / stage.batch_size)
