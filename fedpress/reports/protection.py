"""Says in words what a run protects, against whom, whom one has to trust, and what it does not."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from fedpress.reports import units
from fedpress.reports.metrics import Shown
from fedpress.reports.reading import Json, name_of

OTHERS = (
    "The other clients: so many of them must stay and be honest as the plan counts on for noise "
    "and keys."
)


@dataclass(frozen=True)
class Protection:
    """What one federated stage promises.

    Attributes:
        title: the stage's name.
        summary: the promise in one sentence.
        protected: what is protected; empty if nothing is.
        trusted: whom the promise counts on.
        unprotected: what it does not cover.
    """

    title: str
    summary: str
    protected: list[str]
    trusted: list[str]
    unprotected: list[str]


PUBLIC = [
    "The public part of the data, on which the network was trained before: nothing about it is "
    "protected.",
    "Validation and test sets: they are public, choose settings and measure the model, without "
    "any noise.",
    "Who the clients are, and how much each of them sends, is not hidden.",
]
GROUPS = (
    "Persons and clients as a whole: k examples of one person, or k clients with the same "
    "example, have together about k times the ε."
)
COUNTS = "How many examples each client has."
ONE_STEP = (
    "Each example of each client: the clients of a round take one step together, on the sum of "
    "gradients that were clipped per example, with noise that fits the whole sum."
)
CLIENT_SOFTWARE = "Each client's own software, which clips and adds noise."
SERVER_TOO = "against all who lack the noise's seed, the server too"
TAKES_PART = "That a client takes part, and in which rounds."
OWN_SCORES = (
    "What the model is worth to each client is measured on the client's own examples; it is an "
    "exact number that no ε covers."
)
SECRET_COHORTS = [
    "Secret cohorts: ε counts on it that only the server knows who took part in which round."
]
SEED = (
    "Whoever knows the seed. So that a run can be repeated, its noise follows from the seed, and "
    "with the seed it can be taken away again. In this simulation one seed makes all the noise, "
    "so ε holds for those who do not have it: with truly private data choose your own seed, and "
    "keep it and this page to yourself."
)
LISTED = (
    "That a client is on the list, and when it was asked: in a buffered schedule who is asked "
    "next depends on who is back. On real devices the time of a task may tell how much data "
    "there is."
)
SECURE_SUM = (
    "The server learned only the sum of the updates of those who reported (a secure sum), as "
    "long as it worked together with no more than the planned few of the clients."
)
SEED_KEYS = (
    "Whoever knows the seed: in this simulation the keys of the secure sum follow from it. With "
    "truly private data set secure_keys or secure_noise."
)
HIDDEN_UPDATES = (
    "No differential privacy, but a secure sum: single updates are hidden, their sum is not."
)
NO_BOUND = (
    "No differential privacy: raw data stays with the clients, but what updates give away has no "
    "bound."
)
LIMITS = [
    "Other runs on the same data: their ε add to this one's, also those of a table or a search "
    "for good settings.",
    "Attacks on how computers round numbers: the noise is drawn in floating point, by a "
    "generator made for science.",
]


def protections(stages: list[Json]) -> list[Protection]:
    """Returns what each federated stage promises.

    One without privacy breaks the promises of the others.
    """
    federated = [stage for stage in stages if stage.get("kind") == "federate"]
    found = [protection(stage) for stage in federated]
    broken = [it.title for it in found if not it.protected]
    return [_broken(it, broken) if it.protected and broken else it for it in found]


def protects(stages: list[Json]) -> bool:
    """Says whether every federated stage has a finite epsilon.

    Only then the last one's holds for the network.
    """
    federated = [stage for stage in stages if stage.get("kind") == "federate"]
    return all(units.number(stage.get("epsilon")) is not None for stage in federated)


def _broken(it: Protection, broken: list[str]) -> Protection:
    names = ", ".join(f"“{name}”" for name in broken)
    but = f"But not in the run as a whole: {names} used private data without a promise."
    return replace(it, summary=f"{it.summary} {but}")


def protection(stage: Json) -> Protection:
    """Returns what a federated stage of `result.json` promises: by unit, epsilon and delta."""
    it = _by_unit(name_of(stage), stage)
    if stage.get(f"client_{Shown.of([stage]).key}"):
        return replace(it, unprotected=[*it.unprotected, OWN_SCORES])
    return it


def _by_unit(title: str, stage: Json) -> Protection:
    if units.number(stage.get("epsilon")) is None:
        return _without_privacy(title, stage)
    if stage.get("unit") == "sample":
        return _sample(title, stage)
    if stage.get("unit") == "client":
        return _client(title, stage)
    unknown = f"the unit “{stage.get('unit')}”, which this version has no words for"
    return Protection(
        title=title,
        summary=f"{_budget(stage)} was spent for {unknown}.",
        protected=[],
        trusted=[SEED],
        unprotected=PUBLIC,
    )


def _budget(stage: Json) -> str:
    """Returns epsilon and delta; "≤" where the true epsilon may be smaller, as with a bound."""
    sign = "≤" if stage.get("epsilon_is") else "="
    delta = units.small(stage.get("delta"))
    return f"ε {sign} {units.epsilon(stage.get('epsilon'))} at δ = {delta}"


def _odds(stage: Json, what: str) -> str:
    """Returns the definition of differential privacy with this run's numbers.

    Dwork and Roth 2014, definition 2.4.
    """
    epsilon = units.number(stage.get("epsilon")) or 0.0
    # From 14 on, e^epsilon has more digits than anybody reads.
    if epsilon < 3:
        factor = f"{math.exp(epsilon):,.2f}"
    elif epsilon < 14:
        factor = f"{math.exp(epsilon):,.0f}"
    else:
        factor = f"e^{epsilon:.0f}"
    return (
        f"{what} makes any conclusion from it at most {factor} times (e^ε) likelier or less "
        f"likely, up to a failure probability of δ = {units.small(stage.get('delta'))}. That is "
        "the worst case; smaller ε is stronger."
    )


def _one_client(stage: Json) -> str:
    """Returns what the definition compares.

    In a buffered schedule one client more on the list would change who else is asked, so the list
    stays as it is.
    """
    if stage.get("schedule") == "buffered":
        return "Whether one client sends its updates, or nothing in their place,"
    return "Adding or removing one client"


def _listed(stage: Json) -> list[str]:
    return [LISTED] if stage.get("schedule") == "buffered" else []


def _trust(stage: Json) -> str:
    """Returns who adds the noise; results of version 0.1 call the clients together "secure"."""
    trust = str(stage.get("trust"))
    return "distributed" if trust == "secure" else trust


def _sample(title: str, stage: Json) -> Protection:
    trust = _trust(stage)
    if trust == "distributed":
        return _sample_distributed(title, stage)
    if trust == "central":
        return _sample_central(title, stage)
    return Protection(
        title=title,
        summary=f"{_example(stage)}, against all who lack the noise's seed.",
        protected=[
            "Each example of each client: gradients are clipped per example and noise is added "
            "inside the client, so the updates that the server sees are covered, and with them "
            "every network that is made of them.",
            _odds(stage, "Adding or removing one example"),
        ],
        trusted=[
            "Each client's own software, which clips and adds the noise before anything leaves "
            "the client.",
            SEED,
        ],
        unprotected=[
            GROUPS,
            "Updates were summed without a secure sum: the server sees each client's noisy "
            "update by itself.",
            COUNTS,
            *LIMITS,
            *PUBLIC,
        ],
    )


def _sample_distributed(title: str, stage: Json) -> Protection:
    """Returns the promise where the clients add the noise together, under a secure sum."""
    summary = f"{_example(stage)}, against everybody, the server too, who lacks the noise's seed."
    clips = (
        "Each client's own software, which clips its gradients, adds its share of the noise and "
        "hides the result."
    )
    return Protection(
        title=title,
        summary=summary,
        protected=[ONE_STEP, _odds(stage, "Adding or removing one example"), SECURE_SUM],
        trusted=[*_keys(stage), clips, OTHERS, SEED],
        unprotected=[GROUPS, COUNTS, *LIMITS, *PUBLIC],
    )


def _sample_central(title: str, stage: Json) -> Protection:
    """Returns the promise where the server adds the noise."""
    server = (
        "The server. It sees every client's sum of gradients without noise, and adds the noise."
    )
    return Protection(
        title=title,
        summary=f"{_example(stage)}, against everybody except the server.",
        protected=[ONE_STEP, _odds(stage, "Adding or removing one example")],
        trusted=[
            *_keys(stage),
            "Each client's own software, which clips its gradients.",
            server,
            SEED,
        ],
        unprotected=[GROUPS, COUNTS, *LIMITS, *PUBLIC],
    )


def _keys(stage: Json) -> list[str]:
    """Returns a sentence where keys follow from the seed: the recipe then opens every update."""
    return [SEED_KEYS] if stage.get("keys") == "seed" else []


def _client(title: str, stage: Json) -> Protection:
    trust = _trust(stage)
    if trust == "distributed":
        return _client_distributed(title, stage)
    if trust == "local":
        return _client_local(title, stage)
    # Only where not all clients take part in each round does epsilon count on nobody knowing who
    # did.
    sampled = (units.number(stage.get("sampling_prob")) or 0.0) < 1
    return Protection(
        title=title,
        summary=f"{_whole_client(stage)}, against everybody except the server.",
        protected=[
            "All data of a client together: its update is clipped and noise is added to the sum, "
            "so that other clients and users of the network learn little about any one client.",
            _odds(stage, _one_client(stage)),
        ],
        trusted=[
            "The server. It sees every client's update without noise (no secure sum was used), "
            "adds the noise, and must not keep or show what came in.",
            *(SECRET_COHORTS if sampled else []),
            SEED,
        ],
        unprotected=[
            "Nothing is hidden from the server: a client's update can reveal its examples.",
            *_listed(stage),
            *LIMITS,
            *PUBLIC,
        ],
    )


def _client_local(title: str, stage: Json) -> Protection:
    """Returns the promise where each client adds all its noise itself."""
    own_noise = (
        "All data of a client together: its update is clipped and noise of its own is added "
        "inside the client."
    )
    return Protection(
        title=title,
        summary=f"{_whole_client(stage)}, {SERVER_TOO}.",
        protected=[own_noise, _odds(stage, _one_client(stage))],
        trusted=[*_keys(stage), CLIENT_SOFTWARE, SEED],
        unprotected=[TAKES_PART, *_listed(stage), *LIMITS, *PUBLIC],
    )


def _client_distributed(title: str, stage: Json) -> Protection:
    """Returns the promise where the clients add the noise together, under a secure sum."""
    joint_noise = (
        "All data of a client together: its update is clipped, and the clients together make the "
        "noise of the sum, which is all that the server can open."
    )
    return Protection(
        title=title,
        summary=f"{_whole_client(stage)}, {SERVER_TOO}.",
        protected=[joint_noise, _odds(stage, _one_client(stage)), SECURE_SUM],
        trusted=[*_keys(stage), CLIENT_SOFTWARE, OTHERS, SEED],
        unprotected=[TAKES_PART, *_listed(stage), *LIMITS, *PUBLIC],
    )


def _example(stage: Json) -> str:
    return f"Every private example is protected with {_budget(stage)}"


def _whole_client(stage: Json) -> str:
    return f"Each client as a whole is protected with {_budget(stage)}"


def _without_privacy(title: str, stage: Json) -> Protection:
    if stage.get("sum") == "secure":
        return Protection(
            title=title,
            summary=HIDDEN_UPDATES,
            protected=[],
            trusted=[*_keys(stage), "Everybody who gets the network: it may remember examples."],
            unprotected=[
                "Private examples: what the sum of all updates, and the network made of it, give "
                "away has no bound.",
                *PUBLIC,
            ],
        )
    return Protection(
        title=title,
        summary=NO_BOUND,
        protected=[],
        trusted=[
            "The server, which sees every client's update as it is.",
            "Everybody who gets the network: it may remember examples.",
        ],
        unprotected=[
            "Private examples: they can in part be rebuilt from updates, and traced in the final "
            "network.",
            *PUBLIC,
        ],
    )
