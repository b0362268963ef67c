"""Refuses, before the run, parts of it that do not work with its schedule, and says why."""

from __future__ import annotations

from dataclasses import dataclass

from fedpress.errors import RecipeError
from fedpress.federation.algorithms import Algorithm
from fedpress.federation.downlink import Downlink
from fedpress.federation.schedules.base import Schedule
from fedpress.federation.uplink import Uplink


@dataclass(frozen=True)
class Needs:
    """Which parts of a run need something of its schedule.

    Attributes:
        secure: a secure sum: its clients are named before they answer.
        downlink: the model travels as a difference to what each client holds.
        adaptive: the clip norm follows the updates.
        correlated: the noise is correlated over the steps.
        client_state: the algorithm keeps a state on the clients.
        hides_clients: noise on the sum must hide whether any one client was in it.
    """

    secure: bool = False
    downlink: bool = False
    adaptive: bool = False
    correlated: bool = False
    client_state: bool = False
    hides_clients: bool = False

    @classmethod
    def of(cls, uplink: Uplink, downlink: Downlink | None, algorithm: Algorithm) -> Needs:
        """Returns the needs of these bound parts."""
        return cls(
            secure=not uplink.aggregator.sees_updates,
            downlink=downlink is not None,
            adaptive=uplink.adaptive is not None,
            correlated=uplink.noise is not None and uplink.noise.factorization is not None,
            client_state=algorithm.keeps_state,
            hides_clients=uplink.trust.unit == "client" and uplink.trust.on_aggregate,
        )


def check_schedule(schedule: Schedule, needs: Needs) -> None:
    """Checks that the parts of a run work with `schedule`.

    Raises:
        RecipeError: if one of them does not, with the reason.
    """
    if not schedule.one_model:
        _check_many_models(schedule, needs)
    # Its noise and its bits are planned for everybody who is asked: an answer that is not needed
    # would have to be taken out of a sum that nobody can take apart.
    if schedule.drops and needs.secure:
        raise RecipeError(
            (
                "a secure sum plans noise and bits for everybody that it asks, and survives "
                "max_dropout of them"
            ),
            place="schedule.over_selection",
            cure="leave over_selection out and make the cohort larger",
        )
    # Adding one client to the population may push another out of the sum: that changes two updates,
    # and the noise covers a change of one.
    if schedule.drops and needs.hides_clients:
        raise RecipeError(
            (
                "a client that is faster displaces another from the sum, so one client moves "
                "it twice as far as the noise hides"
            ),
            place="schedule.over_selection",
            cure="leave over_selection out, or set trust = 'local'",
        )


def _check_many_models(schedule: Schedule, needs: Needs) -> None:
    """Refuses what needs the clients of a step to start from one model, or to be known before."""
    reasons = {
        "secure": (
            "a secure sum",
            "masks cancel only among clients that are named to each other before they answer, and "
            "nobody knows who will be in a sum",
            'set aggregator = "mean"',
        ),
        "downlink": (
            "coded differences (downlink)",
            "nearly every client holds another version, so the server would keep and code one "
            "model for each",
            "leave downlink out",
        ),
        "adaptive": (
            "an adaptive clip norm",
            "updates on their way come in units of an older clip norm, so their sum has no one "
            "bound",
            "leave privacy.adaptive out",
        ),
        "correlated": (
            "correlated noise",
            "it is planned for a least number of steps between two updates of a client, and a fast "
            "client may be in every step",
            "leave privacy.correlated out",
        ),
        "client_state": (
            "an algorithm whose clients keep a state",
            "what a client learned against an older model would correct steps from a newer one, "
            "for which nobody has shown that it converges",
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
