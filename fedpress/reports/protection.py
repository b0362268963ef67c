"""Says in words what a run protects, from whom, whom one must trust, and what is not protected."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from fedpress.reports import units
from fedpress.reports.metrics import Shown
from fedpress.reports.reading import Json

OTHERS = (
    "The other clients: so many of them must stay and be honest as the plan counts on for noise "
    "and keys."
)


@dataclass(frozen=True)
class Protection:
    """The answers to a reader's questions about one federated stage."""

    title: str
    summary: str
    protected: list[str]
    trusted: list[str]
    unprotected: list[str]


PUBLIC = [
    "The public part of the data, on which the network was trained before: nothing about it is protected.",
    "Validation and test sets: they are public, choose settings and measure the model, without any noise.",
    "Who the clients are, and how much each of them sends, is not hidden.",
]
OWN_SCORES = (
    "What the model is worth to each client is measured on the client's own examples; it is an exact "
    "number that no ε covers."
)
SECRET_COHORTS = [
    "Secret cohorts: ε counts on it that only the server knows who took part in which round."
]
SEED = (
    "Whoever knows the seed. So that a run can be repeated, its noise follows from the seed, and with the seed it can"
    " be taken away again. In this simulation one seed makes all the noise, so ε holds for those who do not have it:"
    " with truly private data choose your own seed, and keep it and this page to yourself."
)
LISTED = (
    "That a client is on the list, and when it was asked: in a buffered schedule who is asked next hangs on who is"
    " back. On real devices the time of a task may tell how much data there is."
)
SECURE_SUM = (
    "The server learned only the sum of the updates of those who reported (a secure sum), as long as it worked together"
    " with no more than the planned few of the clients."
)
SEED_KEYS = (
    "Whoever knows the seed: in this simulation the keys of the secure sum follow from it. With truly private data set"
    " secure_keys or secure_noise."
)
LIMITS = [
    "Other runs on the same data: their ε add to this one's, also those of a table or a search for good settings.",
    "Attacks on how computers round numbers: the noise is drawn in floating point, by a generator made for science.",
]


def protections(stages: list[Json]) -> list[Protection]:
    """Returns what each federated stage promises; one without privacy breaks the promises of the others."""
    federated = [stage for stage in stages if stage.get("kind") == "federate"]
    found = [protection(stage) for stage in federated]
    broken = [it.title for it in found if not it.protected]
    return [_broken(it, broken) if it.protected and broken else it for it in found]


def protects(stages: list[Json]) -> bool:
    """Says whether every federated stage has a finite epsilon; only then the last one's holds for the network."""
    return all(
        units.number(stage.get("epsilon")) is not None
        for stage in stages
        if stage.get("kind") == "federate"
    )


def _broken(it: Protection, broken: list[str]) -> Protection:
    names = ", ".join(f"“{name}”" for name in broken)
    summary = (
        f"{it.summary} But not in the run as a whole: {names} used private data without a promise."
    )
    return replace(it, summary=summary)


def protection(stage: Json) -> Protection:
    """Returns what a federated `stage` of `result.json` promises, by its `unit`, `epsilon` and `delta`."""
    it = _by_unit(str(stage.get("name") or stage.get("kind")), stage)
    return (
        replace(it, unprotected=[*it.unprotected, OWN_SCORES])
        if stage.get(f"client_{Shown.of([stage]).key}")
        else it
    )


def _by_unit(title: str, stage: Json) -> Protection:
    if units.number(stage.get("epsilon")) is None:
        return _without_privacy(title, stage)
    if stage.get("unit") == "sample":
        return _sample(title, stage)
    if stage.get("unit") == "client":
        return _client(title, stage)
    return Protection(
        title=title,
        summary=f"{_budget(stage)} was spent for the unit “{stage.get('unit')}”, which this version has no words for.",
        protected=[],
        trusted=[SEED],
        unprotected=PUBLIC,
    )


def _budget(stage: Json) -> str:
    sign = "≤" if stage.get("epsilon_is") else "="
    return (
        f"ε {sign} {units.epsilon(stage.get('epsilon'))} at δ = {units.small(stage.get('delta'))}"
    )


def _odds(stage: Json, what: str) -> str:
    """The definition of differential privacy, with this run's numbers."""
    epsilon = units.number(stage.get("epsilon")) or 0.0
    factor = (
        f"{math.exp(epsilon):,.2f}"
        if epsilon < 3
        else f"{math.exp(epsilon):,.0f}"
        if epsilon < 14
        else f"e^{epsilon:.0f}"
    )
    return (
        f"{what} makes any conclusion from it at most {factor} times (e^ε) likelier or less likely, up to a failure"
        f" probability of δ = {units.small(stage.get('delta'))}. That is the worst case; smaller ε is stronger."
    )


def _one_client(stage: Json) -> str:
    """What the definition compares: with a client more on the list, a buffered schedule would ask others, too."""
    if stage.get("schedule") == "buffered":
        return "Whether one client sends its updates, or nothing in their place,"
    return "Adding or removing one client"


def _listed(stage: Json) -> list[str]:
    return [LISTED] if stage.get("schedule") == "buffered" else []


def _trust(stage: Json) -> str:
    """Who adds the noise; results of version 0.1 call the clients together "secure"."""
    trust = str(stage.get("trust"))
    return "distributed" if trust == "secure" else trust


def _sample(title: str, stage: Json) -> Protection:
    if (trust := _trust(stage)) in ("distributed", "central"):
        return _joint(title, stage, trust)
    return Protection(
        title=title,
        summary=f"Every private example is protected with {_budget(stage)}, against all who lack the noise's seed.",
        protected=[
            "Each example of each client: gradients are clipped per example and noise is added inside the client, so"
            " the updates that the server sees are covered, and with them every network that is made of them.",
            _odds(stage, "Adding or removing one example"),
        ],
        trusted=[
            "Each client's own software, which clips and adds the noise before anything leaves the client.",
            SEED,
        ],
        unprotected=[
            "Persons and clients as a whole: k examples of one person, or k clients with the same example, have"
            " together about k times the ε.",
            "Updates were summed without a secure sum: the server sees each client's noisy update by itself.",
            "How many examples each client has.",
            *LIMITS,
            *PUBLIC,
        ],
    )


def _keys(stage: Json) -> list[str]:
    """In a simulation keys may follow from the seed: then whoever has the recipe can open every update."""
    return [SEED_KEYS] if stage.get("keys") == "seed" else []


def _joint(title: str, stage: Json, trust: str) -> Protection:
    secure = trust == "distributed"
    whom = (
        "everybody, the server too, who lacks the noise's seed"
        if secure
        else "everybody except the server"
    )
    return Protection(
        title=title,
        summary=f"Every private example is protected with {_budget(stage)}, against {whom}.",
        protected=[
            "Each example of each client: the clients of a round take one step together, on the sum of gradients that"
            " were clipped per example, with noise that fits the whole sum.",
            _odds(stage, "Adding or removing one example"),
            *([SECURE_SUM] if secure else []),
        ],
        trusted=[
            *_keys(stage),
            "Each client's own software, which clips its gradients"
            + (", adds its share of the noise and hides the result." if secure else "."),
            *(
                [OTHERS]
                if secure
                else [
                    "The server. It sees every client's sum of gradients without noise, and adds the noise."
                ]
            ),
            SEED,
        ],
        unprotected=[
            "Persons and clients as a whole: k examples of one person, or k clients with the same example, have"
            " together about k times the ε.",
            "How many examples each client has.",
            *LIMITS,
            *PUBLIC,
        ],
    )


def _client_without_server(title: str, stage: Json, trust: str) -> Protection:
    secure = trust == "distributed"
    return Protection(
        title=title,
        summary=f"Each client as a whole is protected with {_budget(stage)}, the server included, against all who lack"
        " the noise's seed.",
        protected=[
            "All data of a client together: its update is clipped"
            + (
                ", and the clients together make the noise of the sum, which is all that the server can open."
                if secure
                else " and noise of its own is added inside the client."
            ),
            _odds(stage, _one_client(stage)),
            *([SECURE_SUM] if secure else []),
        ],
        trusted=[
            *_keys(stage),
            "Each client's own software, which clips and adds noise.",
            *([OTHERS] if secure else []),
            SEED,
        ],
        unprotected=[
            "That a client takes part, and in which rounds.",
            *_listed(stage),
            *LIMITS,
            *PUBLIC,
        ],
    )


def _client(title: str, stage: Json) -> Protection:
    if (trust := _trust(stage)) in ("distributed", "local"):
        return _client_without_server(title, stage, trust)
    return Protection(
        title=title,
        summary=f"Each client as a whole is protected with {_budget(stage)}, against everybody except the server.",
        protected=[
            "All data of a client together: its update is clipped and noise is added to the sum, so that other clients"
            " and users of the network learn little about any one client.",
            _odds(stage, _one_client(stage)),
        ],
        trusted=[
            "The server. It sees every client's update without noise (no secure sum was used), adds the noise, and must"
            " not keep or show what came in.",
            *(SECRET_COHORTS if (units.number(stage.get("sampling_prob")) or 0.0) < 1 else []),
            SEED,
        ],
        unprotected=[
            "Nothing is hidden from the server: a client's update can reveal its examples.",
            *_listed(stage),
            *LIMITS,
            *PUBLIC,
        ],
    )


def _without_privacy(title: str, stage: Json) -> Protection:
    if stage.get("sum") == "secure":
        return Protection(
            title=title,
            summary="No differential privacy, but a secure sum: single updates are hidden, their sum is not.",
            protected=[],
            trusted=[*_keys(stage), "Everybody who gets the network: it may remember examples."],
            unprotected=[
                "Private examples: what the sum of all updates, and the network made of it, give away has no bound.",
                *PUBLIC,
            ],
        )
    return Protection(
        title=title,
        summary="No differential privacy: raw data stays with the clients, but what updates give away has no bound.",
        protected=[],
        trusted=[
            "The server, which sees every client's update as it is.",
            "Everybody who gets the network: it may remember examples.",
        ],
        unprotected=[
            "Private examples: they can in part be rebuilt from updates, and traced in the final network.",
            *PUBLIC,
        ],
    )
