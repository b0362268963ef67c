"""The privacy guarantee of an uplink: plan, who adds the noise, divisor of a private sum."""

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
    """What is guaranteed, and against whom; nothing without a `plan`.

    Attributes:
        plan: unit, clip norm, noise multiplier and sampling probability. Under unit "sample" with
            local noise each client has a plan of its own; any one of them stands here for all.
        trust: who adds the noise: "local", "distributed" or "central"; None for the default of the
            unit.
        noise: what the server adds, with trust "central".
        adaptive: how the clip norm follows the updates.
        divisor: public number by which a private sum is divided; the cohort's size if None.
    """

    plan: PrivacyPlan | None = None
    trust: str | None = None
    noise: ServerNoise | None = None
    adaptive: AdaptiveClip | None = None
    divisor: float | None = None

    @property
    def trust_row(self) -> Trust:
        """The row of the table `TRUSTS`: who adds which noise, and all that follows from it.

        Raises:
            RecipeError: if there is no such trust for the unit of the plan.
        """
        return trust_of(self.plan.unit if self.plan is not None else None, self.trust)

    def check(self, payload: Payload) -> None:
        """Checks that the guarantee covers every vector of `payload`.

        Raises:
            RecipeError: if it does not.
        """
        row = self.trust_row
        row.check_vectors(self.plan, payload.extras)
        if self.adaptive is None:
            return
        # Each client reports one bit, whether its update was clipped, without noise of its own.
        # Only a trusted server may see it, because the server adds the noise to the count.
        if (row.unit, row.kind) != ("client", "central"):
            raise RecipeError(
                f"got unit {row.unit!r} with trust '{row.kind}', where nobody hides its bits",
                place="adaptive",
                cure="leave adaptive out, or take unit 'client' with trust 'central'",
            )
        if self.adaptive.count_noise is None:
            raise RecipeError(
                "not planned",
                place="adaptive.count_noise",
                cure="give it, or bind with a planned one",
            )
        # Further vectors have fixed clip norms, but all would travel in units of the moving one.
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
"""No privacy."""
