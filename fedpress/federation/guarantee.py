"""The privacy guarantee for the clients' updates: noise plan, who adds the noise, and divisor."""

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
    """A differential privacy guarantee; without a `plan` there is no privacy.

    Attributes:
        plan: what is protected (the unit: a sample or a client), clip norm, noise multiplier and
            sampling probability. Under unit "sample" with local noise each client has its own plan;
            then any of these plans stands here.
        trust: who adds the noise: "local" (each client), "distributed" (all clients together) or
            "central" (the server); None for the default of the unit.
        noise: noise that the server adds under trust "central"; None: independent noise. It is
            ignored under other trusts.
        adaptive: how the clip norm adapts to the norms of the updates; None: it is fixed.
        divisor: public number by which a private sum is divided; None: the size of the cohort.
    """

    plan: PrivacyPlan | None = None
    trust: str | None = None
    noise: ServerNoise | None = None
    adaptive: AdaptiveClip | None = None
    divisor: float | None = None

    @property
    def trust_row(self) -> Trust:
        """The row of the table `TRUSTS` for this unit and trust; it has the rules for the run.

        Raises:
            RecipeError: if the table has no such row.
        """
        return trust_of(self.plan.unit if self.plan is not None else None, self.trust)

    def check(self, payload: Payload) -> None:
        """Checks that the guarantee covers all vectors that a client sends.

        Raises:
            RecipeError: if a vector is not covered, or if the clip norm cannot adapt here.
        """
        row = self.trust_row
        row.check_vectors(self.plan, payload.extras)
        if self.adaptive is None:
            return
        # Each client reports without noise whether its update was clipped. Only a trusted server
        # may see this bit: it adds the noise to the count of all bits.
        if (row.unit, row.kind) != ("client", "central"):
            raise RecipeError(
                f"got unit {row.unit!r} with trust '{row.kind}', where clients' bits get no noise",
                place="adaptive",
                cure="leave adaptive out, or take unit 'client' with trust 'central'",
            )
        if self.adaptive.count_noise is None:
            raise RecipeError(
                "it is None",
                place="adaptive.count_noise",
                cure="give a number, or take the AdaptiveClip of a planned stage",
            )
        # All vectors of a message are divided by the adaptive clip norm, but further vectors have
        # fixed clip norms.
        if payload.extras:
            raise RecipeError(
                (
                    "only the clip norm of the update can adapt, and the algorithm also sends "
                    f"'{next(iter(payload.extras))}'"
                ),
                place="adaptive",
                cure="leave adaptive out, or take another algorithm",
            )


NO_PRIVACY = Guarantee()
"""What a run without a privacy plan guarantees: nothing."""
