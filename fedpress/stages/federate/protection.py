"""The privacy of a federate stage as it was planned: noise, grid, costs; and who adds the noise."""

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
    """A stage's privacy, planned.

    Attributes:
        chain: the transforms of the uplink, with grid and noise filled in.
        plans: each client's plan; the same one for all but under sample privacy of each client's
            own; empty without.
        costs: what one round costs those who take part, by name, or "population"; `whole` if it is
            the cost of all rounds together, charged before the first.
        grid: of a secure sum, None for a plain one.
        noise: what the server adds.
        adaptive: how the clip norm moves, with the noise of its count.
        divisor: of the private sum.
        whole: see `costs`.
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
        """Returns what the uplink promises by it; the plan of the first client stands for all."""
        plan = next(iter(self.plans.values()), None)
        return Guarantee(plan, trust.kind, self.noise, self.adaptive, self.divisor)


def is_secure(stage: FederateSettings) -> bool:
    """Says whether the stage sums securely: it is asked for, or the noise rests on it."""
    if stage.aggregator is not None:
        return not stage.aggregator.sees_updates
    return trust_of_stage(stage).noise == "sum"


def trust_of_stage(stage: FederateSettings) -> Trust:
    """Returns who adds which noise in `stage`."""
    private = stage.privacy
    return trust_of(None) if private is None else trust_of(private.unit, private.trust)


def repeated(phase: MechanismEvent, count: int) -> MechanismEvent:
    """Returns `phase` so many times."""
    return replace(phase, steps=phase.steps * count)


def steps_per_round(stage: FederateSettings, examples: int) -> int:
    """Returns the local steps of one round for a client of so many examples."""
    if trust_of_stage(stage).steps == "joint":
        return 1
    return stage.epochs * math.ceil(examples / stage.batch_size)
