"""Checks before a run that secure sum, downlink, noise and algorithm work with the schedule."""

from __future__ import annotations

from dataclasses import dataclass

from fedpress.errors import RecipeError
from fedpress.federation.algorithms import Algorithm
from fedpress.federation.downlink import Downlink
from fedpress.federation.schedules.base import Schedule
from fedpress.federation.uplink import Uplink


@dataclass(frozen=True)
class Needs:
    """Some parts do not work with every schedule; this says which of these parts a run has.

    Attributes:
        secure: whether the run has a secure sum, whose clients must be known before they answer.
        downlink: whether the model is sent as a difference to each client's copy.
        adaptive: whether the clip norm adapts to the norms of the updates.
        correlated: whether the noise is correlated over the steps.
        client_state: whether clients store a state of the algorithm.
        hides_clients: whether noise on the sum hides that a client took part (client privacy).
    """

    secure: bool = False
    downlink: bool = False
    adaptive: bool = False
    correlated: bool = False
    client_state: bool = False
    hides_clients: bool = False

    @classmethod
    def of(cls, uplink: Uplink, downlink: Downlink | None, algorithm: Algorithm) -> Needs:
        """Finds out which parts a run has; `downlink` is None if the model is sent uncoded."""
        return cls(
            secure=not uplink.aggregator.sees_updates,
            downlink=downlink is not None,
            adaptive=uplink.adaptive is not None,
            correlated=uplink.noise is not None and uplink.noise.factorization is not None,
            client_state=algorithm.keeps_state,
            hides_clients=uplink.trust.unit == "client" and uplink.trust.on_aggregate,
        )


def check_schedule(schedule: Schedule, needs: Needs) -> None:
    """Checks that all parts of a run work with `schedule`.

    Raises:
        RecipeError: if a part does not.
    """
    if not schedule.one_model:
        _check_many_models(schedule, needs)
    # A secure sum plans noise and bits for all clients that are asked. An answer that turns out not
    # to be needed could not be removed from the masked sum.
    if schedule.drops and needs.secure:
        raise RecipeError(
            (
                "a secure sum plans noise and bits for all clients that are asked, and allows for "
                "drop-outs by max_dropout"
            ),
            place="schedule.over_selection",
            cure="leave over_selection out and make the cohort larger",
        )
    # A fast client that is added to the population may push another one out of the sum. Then two
    # updates change, but the noise is planned for a change of one.
    if schedule.drops and needs.hides_clients:
        raise RecipeError(
            (
                "a faster client pushes another one out of the sum, so one client may change it by "
                "two clip norms, and the noise is planned for one"
            ),
            place="schedule.over_selection",
            cure="leave over_selection out, or set trust = 'local'",
        )


def _check_many_models(schedule: Schedule, needs: Needs) -> None:
    """Refuses parts for which all clients of a step must be known, or start from one model.

    Raises:
        RecipeError: if there is such a part; the error names the part and the reason.
    """
    reasons = {
        "secure": (
            "a secure sum",
            "masks cancel only among clients that know each other before they answer, but here "
            "nobody knows beforehand which clients will be in a sum",
            'set aggregator = "mean"',
        ),
        "downlink": (
            "coded differences (downlink)",
            "nearly every client has another version of the model, so the server would store and "
            "code one model for each client",
            "leave downlink out",
        ),
        "adaptive": (
            "an adaptive clip norm",
            "clients that still work were sent an older clip norm, so the updates of a step have "
            "different bounds",
            "leave privacy.adaptive out",
        ),
        "correlated": (
            "correlated noise",
            "it needs a minimum number of steps between two updates of a client, but a fast client "
            "may be in every step",
            "leave privacy.correlated out",
        ),
        "client_state": (
            "an algorithm whose clients keep a state",
            "a state that belongs to an older model would correct steps from a newer one, and "
            "convergence has not been shown for this",
            'take algorithm = "fedavg"',
        ),
    }
    for name, (what, why, cure) in reasons.items():
        if getattr(needs, name):
            raise RecipeError(
                f"{what} does not go with a '{schedule.kind}' schedule: {why}",
                place="schedule",
                cure=f"take the synchronous schedule, or {cure}",
            )
