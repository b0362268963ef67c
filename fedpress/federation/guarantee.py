"""The privacy that an uplink promises: the plan, who adds its noise, and what a private sum is divided by."""

from __future__ import annotations

from dataclasses import dataclass

from fedpress.errors import RecipeError
from fedpress.federation.servernoise import ServerNoise
from fedpress.federation.trust import Trust, trust_of
from fedpress.federation.vectors import Payload
from fedpress.privacy.adaptive import AdaptiveClip
from fedpress.privacy.plan import PrivacyPlan


@dataclass(frozen=True)
class Guarantee:
    """What is promised to whom; nothing without a `plan`.

    Attributes:
        plan: unit, clip norm, noise multiplier and sampling probability; under unit "sample" of clients with plans of
            their own it stands for all of them.
        trust: who adds the noise: "local", "distributed" or "central"; the usual one of the unit if None.
        noise: what the server adds, with trust "central".
        adaptive: how the clip norm follows the updates.
        divisor: public number by which a private sum is divided; the size of the cohort if None.
    """

    plan: PrivacyPlan | None = None
    trust: str | None = None
    noise: ServerNoise | None = None
    adaptive: AdaptiveClip | None = None
    divisor: float | None = None

    @property
    def row(self) -> Trust:
        """Who adds which noise, and all that follows from it.

        Raises:
            RecipeError: if the unit of the plan knows no such trust.
        """
        return trust_of(self.plan.unit if self.plan is not None else None, self.trust)

    def check(self, payload: Payload) -> None:
        """Refuses vectors whose length nothing bounds.

        Raises:
            RecipeError: if the promise does not cover what clients send.
        """
        self.row.check_vectors(self.plan, payload.extras)
        if self.adaptive is None:
            return
        if (self.row.unit, self.row.kind) != ("client", "central"):
            # Whether an update was clipped travels without noise, to a server that is trusted to add it.
            raise RecipeError(
                f"got unit {self.row.unit!r} with trust '{self.row.kind}', where nobody hides its bits",
                place="adaptive",
                cure="leave adaptive out, or take unit 'client' with trust 'central'",
            )
        if self.adaptive.count_noise is None:
            raise RecipeError(
                "not planned",
                place="adaptive.count_noise",
                cure="give it, or bind with a planned one",
            )
        if payload.extras:
            raise RecipeError(
                (
                    "it moves the clip norm of the update alone, and the algorithm sends "
                    f"'{next(iter(payload.extras))}' too"
                ),
                place="adaptive",
                cure="leave adaptive out, or take another algorithm",
            )


OPEN = Guarantee()
"""No promise."""
