"""Explains the privacy guarantee of a run: what is protected, and who must be trusted."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from fedpress.reports import units
from fedpress.reports.metrics import MetricFormat
from fedpress.reports.reading import Json, name_of

# The constants in this file are sentences that several kinds of guarantees share.
OTHERS = (
    "The other clients: as many of them as the plan assumes must stay in the round and be honest, "
    "for the noise and the keys."
)


@dataclass(frozen=True)
class Protection:
    """The privacy guarantee of one stage, as sentences.

    Attributes:
        title: the stage's name.
        summary: the guarantee in one sentence.
        protected: what is protected; empty without differential privacy.
        trusted: who must be honest for the guarantee to hold.
        unprotected: what the guarantee does not cover.
    """

    title: str
    summary: str
    protected: list[str]
    trusted: list[str]
    unprotected: list[str]


PUBLIC = [
    "The public part of the data, on which the network was trained first: nothing in it is "
    "protected.",
    "Validation and test sets: they are public. They choose settings and measure the model, "
    "without any noise.",
    "Who the clients are, and how much each of them sends, is not hidden.",
]
GROUPS = (
    "Persons with several examples, and whole clients: for k examples of one person, or one "
    "example that k clients have, ε is about k times as large."
)
COUNTS = "How many examples each client has."
ONE_STEP = (
    "Each example of each client: a round is one step on the sum of all clients' gradients. Each "
    "example's gradient is clipped, and noise is added to the sum."
)
CLIENT_SOFTWARE = "Each client's own software, which clips and adds noise."
TAKES_PART = "That a client takes part, and in which rounds."
OWN_SCORES = (
    "What the model is worth to each client is measured on the client's own examples; it is an "
    "exact number that no ε covers."
)
SECRET_COHORTS = [
    "Secret cohorts: ε holds only while nobody but the server knows who took part in which round."
]
SEED = (
    "Whoever knows the seed, for instance from the recipe. So that a run can be repeated, all its "
    "noise follows from the seed: who has the seed can compute the noise and subtract it. With "
    "truly private data set secure_noise; or choose your own seed, and keep it and this page to "
    "yourself."
)
LISTED = (
    "That a client is on the list, and when it was asked: a buffered schedule asks next whoever "
    "has finished. On real devices the duration of a task may reveal how much data there is."
)
SECURE_SUM = (
    "The server learned only the sum of the updates of those who reported (a secure sum), unless "
    "it colluded with more clients than the plan allows for."
)
SEED_KEYS = (
    "Whoever knows the seed: the keys of the secure sum follow from it. With "
    "truly private data set secure_keys or secure_noise."
)
HIDDEN_UPDATES = (
    "No differential privacy, but a secure sum: single updates are hidden, their sum is not."
)
NO_BOUND = (
    "No differential privacy: raw data stays with the clients, but there is no bound on what "
    "updates reveal about it."
)
OTHER_RUNS = (
    "Other runs on the same data, also those of a sweep or of a search for good settings: their ε "
    "must be added to the ε of this run."
)
ROUNDING = (
    "Attacks on rounding: the noise is drawn in floating point, whose rounding may reveal digits "
    "of the number under the noise (Mironov 2012). secure_noise rounds it to a grid."
)


QUERY = {
    "sample": "Each example of each client: what it adds to the sums that were asked is bounded, and "
    "the sums have noise. So the statistics are covered, and with them every model that has them.",
    "client": "All data of a client together: the mean of its sums is bounded, and the sums have "
    "noise. So the statistics are covered, and with them every model that has them.",
}
"""Unit of a query -> what it protects, whoever adds the noise."""


def asks_clients(stages: list[Json]) -> list[Json]:
    """Returns the stages that compute something from the clients' private data."""
    return [stage for stage in stages if stage.get("kind") in ("federate", "statistics")]


def protections(stages: list[Json]) -> list[Protection]:
    """Returns the guarantee of each stage that asks clients.

    If one stage used private data without privacy, the summaries of the other stages say so.
    """
    found = [protection(stage) for stage in asks_clients(stages)]
    found = [_without_repetition(it, found[at + 1 :]) for at, it in enumerate(found)]
    open_stages = [it.title for it in found if not it.protected]
    # One stage without privacy voids the guarantee of the whole run.
    if not open_stages:
        return found
    return [_contradicted(it, open_stages) if it.protected else it for it in found]


def _without_repetition(it: Protection, later: list[Protection]) -> Protection:
    """Returns the guarantee with a reference in place of lists that a later one has, too."""
    for other in later:
        if (it.trusted, it.unprotected) == (other.trusted, other.unprotected):
            same = [f"The same as in “{other.title}”, below."]
            return replace(it, trusted=same, unprotected=same)
    return it


def all_private(stages: list[Json]) -> bool:
    """Returns whether every stage that asks clients has a finite epsilon.

    Only then does the last stage's epsilon hold for the network. This epsilon includes all earlier
    stages.
    """
    return all(units.number(stage.get("epsilon")) is not None for stage in asks_clients(stages))


def _contradicted(it: Protection, open_stages: list[str]) -> Protection:
    names = ", ".join(f"“{name}”" for name in open_stages)
    but = f"But not in the run as a whole: {names} used private data without a guarantee."
    return replace(it, summary=f"{it.summary} {but}")


def protection(stage: Json) -> Protection:
    """Returns the guarantee of one stage that asks clients.

    Args:
        stage: the stage's entry in `result.json`. Its "unit" says what is protected, its "trust"
            who adds the noise, and its "epsilon" how strong the guarantee is.
    """
    it = _by_unit(name_of(stage), stage)
    it = replace(it, summary=" ".join([it.summary, *_query(stage), *_left(stage)]))
    if stage.get("kind") == "statistics" and it.protected:
        covered = QUERY.get(str(stage.get("unit")), it.protected[0])
        it = replace(it, protected=[covered, *it.protected[1:]])
    if stage.get(f"client_{MetricFormat.of([stage]).key}"):
        return replace(it, unprotected=[*it.unprotected, OWN_SCORES])
    return it


def _query(stage: Json) -> list[str]:
    """Returns a sentence on what a query has asked for; none for other stages."""
    if stage.get("kind") != "statistics":
        return []
    columns: dict[str, Json] = stage.get("columns") or {}
    asked = []
    for key, what in (("mean", "mean and standard deviation"), ("median", "median and quartiles")):
        if names := [name for name, found in columns.items() if key in found]:
            asked.append(f"{what} of {', '.join(names)}")
    words = list(stage.get("words") or ())
    if words == ["vocabulary"]:
        asked.append("the tokens of the vocabulary")
    elif words:
        asked.append(f"the most frequent words of {', '.join(words)}")
    if not asked:
        asked = ["what fills missing cells"]
    return [f"Asked once, by {stage.get('sums')} sums over all examples: {'; '.join(asked)}."]


def _left(stage: Json) -> list[str]:
    """Returns a sentence on what earlier stages had left of the budget, if they spent any."""
    budget, left = (units.number(stage.get(f"epsilon_{key}")) for key in ("budget", "left"))
    if budget is None or left is None:
        return []
    return [
        f"That includes earlier stages: of the budget of ε = {units.epsilon(budget)} they had left "
        f"ε = {units.epsilon(left)} to this one."
    ]


def _by_unit(title: str, stage: Json) -> Protection:
    # `number` returns None for a missing epsilon and also for an infinite one.
    if units.number(stage.get("epsilon")) is None:
        return _without_privacy(title, stage)
    if stage.get("unit") == "sample":
        return _sample(title, stage)
    if stage.get("unit") == "client":
        return _client(title, stage)
    # A result of a newer version may have a unit that this one does not know.
    unknown = f"the unit “{stage.get('unit')}”, which this version cannot explain"
    return Protection(
        title=title,
        summary=f"{budget(stage)} was spent for {unknown}.",
        protected=[],
        trusted=_seed(stage),
        unprotected=PUBLIC,
    )


def budget(stage: Json) -> str:
    """Returns epsilon and delta as text, such as "ε = 2.00 at δ = 1e-5".

    The sign is "≤" where the stage computed only an upper bound of epsilon.
    """
    sign = "≤" if stage.get("epsilon_is") else "="
    delta = units.compact(stage.get("delta"))
    return f"ε {sign} {units.epsilon(stage.get('epsilon'))} at δ = {delta}"


def _odds(stage: Json, what: str) -> str:
    """Returns the definition of differential privacy with this run's epsilon and delta.

    Dwork and Roth 2014, definition 2.4. `what` names the neighbouring data sets, such as "Adding
    or removing one example".
    """
    epsilon = units.number(stage.get("epsilon")) or 0.0
    # From 14 on e^epsilon is above a million: the power is easier to read than its digits.
    if epsilon < 3:
        factor = f"{math.exp(epsilon):,.2f}"
    elif epsilon < 14:
        factor = f"{math.exp(epsilon):,.0f}"
    else:
        factor = f"e^{epsilon:.0f}"
    return (
        f"{what} makes any conclusion from it at most {factor} times (e^ε) likelier or less "
        f"likely, up to a failure probability of δ = {units.compact(stage.get('delta'))}. That is "
        "the worst case; smaller ε is stronger."
    )


def _one_client(stage: Json) -> str:
    """Returns the two data sets that are compared when a whole client is protected."""
    # Under a buffered schedule one more client on the list would change which others are asked. So
    # the list is fixed, and what is compared is whether the client sends its update or zeros.
    if stage.get("schedule") == "buffered":
        return "Whether one client sends its updates, or nothing in their place,"
    return "Adding or removing one client"


def _listed(stage: Json) -> list[str]:
    return [LISTED] if stage.get("schedule") == "buffered" else []


def _trust(stage: Json) -> str:
    """Returns who adds the noise: "local" (each client), "central" or "distributed"."""
    trust = str(stage.get("trust"))
    # Version 0.1 called distributed noise "secure".
    return "distributed" if trust == "secure" else trust


def _sample(title: str, stage: Json) -> Protection:
    trust = _trust(stage)
    if trust == "distributed":
        return _sample_distributed(title, stage)
    if trust == "central":
        return _sample_central(title, stage)
    return Protection(
        title=title,
        summary=f"{_example(stage)}, against {_everybody(stage)}.",
        protected=[
            "Each example of each client: gradients are clipped per example and noise is added "
            "inside the client, so the updates that the server sees are covered, and with them "
            "every network that is made of them.",
            _odds(stage, "Adding or removing one example"),
        ],
        trusted=[
            "Each client's own software, which clips and adds the noise before anything leaves "
            "the client.",
            *_seed(stage),
        ],
        unprotected=[
            GROUPS,
            "Updates were summed without a secure sum: the server sees each client's noisy "
            "update by itself.",
            COUNTS,
            *_limits(stage),
            *PUBLIC,
        ],
    )


def _sample_distributed(title: str, stage: Json) -> Protection:
    """Returns the guarantee if each client adds a share of the noise, in a secure sum."""
    summary = f"{_example(stage)}, against {_everybody(stage)}, the server too."
    clips = (
        "Each client's own software, which clips its gradients, adds its share of the noise and "
        "hides the result."
    )
    return Protection(
        title=title,
        summary=summary,
        protected=[ONE_STEP, _odds(stage, "Adding or removing one example"), SECURE_SUM],
        trusted=[*_keys(stage), clips, OTHERS, *_seed(stage)],
        unprotected=[GROUPS, COUNTS, *_limits(stage), *PUBLIC],
    )


def _sample_central(title: str, stage: Json) -> Protection:
    """Returns the guarantee if the server adds the noise."""
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
            *_seed(stage),
        ],
        unprotected=[GROUPS, COUNTS, *_limits(stage), *PUBLIC],
    )


def _seed(stage: Json) -> list[str]:
    """Returns a warning if the noise follows from the seed. Version 0.2.0 does not say whether."""
    return [] if stage.get("noise_source") == "system" else [SEED]


def _everybody(stage: Json) -> str:
    return "everybody" if not _seed(stage) else "all who lack the noise's seed"


def _limits(stage: Json) -> list[str]:
    # Secret noise is rounded to a grid, where rounding reveals nothing.
    return [OTHER_RUNS, *([ROUNDING] if _seed(stage) else [])]


def _keys(stage: Json) -> list[str]:
    """Returns a warning if the keys of the secure sum follow from the seed.

    Whoever has the recipe can then compute the keys and decrypt every single update.
    """
    return [SEED_KEYS] if stage.get("keys") == "seed" else []


def _client(title: str, stage: Json) -> Protection:
    trust = _trust(stage)
    if trust == "distributed":
        return _client_distributed(title, stage)
    if trust == "local":
        return _client_local(title, stage)
    # Epsilon is smaller where a random part of the clients is drawn for each round (amplification
    # by sampling), but only while nobody knows who was drawn.
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
            "adds the noise, and must not keep or show the updates.",
            *(SECRET_COHORTS if sampled else []),
            *_seed(stage),
        ],
        unprotected=[
            "Nothing is hidden from the server: a client's update can reveal its examples.",
            *_listed(stage),
            *_limits(stage),
            *PUBLIC,
        ],
    )


def _client_local(title: str, stage: Json) -> Protection:
    """Returns the guarantee if each client adds the full noise to its own update."""
    own_noise = (
        "All data of a client together: its update is clipped and noise of its own is added "
        "inside the client."
    )
    return Protection(
        title=title,
        summary=f"{_whole_client(stage)}, against {_everybody(stage)}, the server too.",
        protected=[own_noise, _odds(stage, _one_client(stage))],
        trusted=[*_keys(stage), CLIENT_SOFTWARE, *_seed(stage)],
        unprotected=[TAKES_PART, *_listed(stage), *_limits(stage), *PUBLIC],
    )


def _client_distributed(title: str, stage: Json) -> Protection:
    """Returns the guarantee if each client adds a share of the noise, in a secure sum."""
    joint_noise = (
        "All data of a client together: its update is clipped, and each client adds a share of "
        "the noise. The server can decrypt only the noisy sum."
    )
    return Protection(
        title=title,
        summary=f"{_whole_client(stage)}, against {_everybody(stage)}, the server too.",
        protected=[joint_noise, _odds(stage, _one_client(stage)), SECURE_SUM],
        trusted=[*_keys(stage), CLIENT_SOFTWARE, OTHERS, *_seed(stage)],
        unprotected=[TAKES_PART, *_listed(stage), *_limits(stage), *PUBLIC],
    )


def _example(stage: Json) -> str:
    return f"Every private example is protected with {budget(stage)}"


def _whole_client(stage: Json) -> str:
    return f"Each client as a whole is protected with {budget(stage)}"


def _without_privacy(title: str, stage: Json) -> Protection:
    # A secure sum hides single updates, but without noise it gives no bound.
    if stage.get("sum") == "secure":
        return Protection(
            title=title,
            summary=HIDDEN_UPDATES,
            protected=[],
            trusted=[*_keys(stage), "Everybody who gets the network: it may remember examples."],
            unprotected=[
                "Private examples: there is no bound on what the sum of all updates, and the "
                "network made of it, reveal about them.",
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
            "Private examples: updates allow to reconstruct some of them, and the final network "
            "may show that an example was in its training data.",
            *PUBLIC,
        ],
    )
