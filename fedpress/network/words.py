"""Describes in English sentences what a stage of a recipe asks of a data owner.

A stage trains on the clients' rows, or asks for sums over them. The owner reads the sentences
before approving the recipe (the TOML file that describes a run).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fedpress.models.spec import COLUMN_SUMS
from fedpress.stages.federate.contract import algorithm_of, counts_are_public, owns_keys
from fedpress.stages.federate.protection import is_secure, trust_of_stage
from fedpress.stages.federate.settings import FederateSettings
from fedpress.stages.federate.terms import Terms

NOISE = {
    "local": "this client adds the noise itself, so the server need not be trusted",
    "distributed": "the clients make the noise together; the server learns the noised sum alone",
    "central": "the server adds the noise: it sees this client's update without noise",
}
"""Kind of trust -> who adds the noise, in words for the owner."""
UNITS = {"sample": "single rows", "client": "all rows of this client together"}
"""Unit of privacy -> what is protected, in words for the owner."""


def words_of(terms: Terms) -> list[str]:
    """Returns sentences that describe a stage: what is asked, privacy, and what is sent."""
    stage = terms.settings
    found = ASKED.get(terms.architecture, _training)(terms)
    if is_secure(stage):
        # In capitals: a server that knows the seed can compute the keys and unmask single updates.
        keys = "drawn on this machine" if owns_keys(stage) else "THAT FOLLOW FROM THE SEED"
        found.append(f"The server learns only the sum of all updates; keys {keys}.")
    else:
        found.append("The server sees this client's update by itself.")
    found += _promise(stage)
    found.append(f"Leaves besides: {', '.join(_measures(stage)) or 'nothing'}.")
    if stage.uplink:
        coded = ", ".join(codec.kind for codec in stage.uplink)
        found.append(f"Updates are coded by {coded}.")
    return found


def _training(terms: Terms) -> list[str]:
    """Returns sentences about a training: model and rounds."""
    stage = terms.settings
    # ("*",) matches all parameters, which is the usual case and needs no words.
    trains = "" if stage.trainable == ("*",) else f" (only {', '.join(stage.trainable)})"
    given = ", ".join(f"{name} = {value}" for name, value in terms.arguments.items())
    model = f"'{terms.architecture}'{f' with {given}' if given else ''}{trains}"
    found = [f"Trains the model {model}."]
    if terms.labels:
        found.append(f"Predicts the columns {', '.join(terms.labels)}.")
    who = "all clients" if stage.cohort is None else f"{stage.cohort} clients"
    found.append(
        f"Asks {who} in each of {stage.num_rounds} rounds; {stage.epochs} epochs of the rows in "
        f"batches of {stage.batch_size}, by the algorithm {algorithm_of(stage).kind}."
    )
    return found


def _query(terms: Terms) -> list[str]:
    """Returns sentences about a query: the columns of which sums are asked."""
    asked: Mapping[str, Any] = terms.arguments
    found = [
        "Trains nothing: asks all clients once for one update, which is sums over their examples."
    ]
    if asked["bounds"]:
        what = "mean and standard deviation" if not asked["bins"] else "median and quartiles"
        shown = [f"{name} ({low:g} to {high:g})" for name, (low, high) in asked["bounds"].items()]
        found.append(f"Asks for {what} of {', '.join(shown)}; values beyond count as the bound.")
    if asked["gaps"]:
        found.append("Counts how many rows have a value, for each column.")
    if asked["words"]:
        every = asked["words"] == "all"
        where = "every column of words" if every else ", ".join(asked["words"])
        found.append(f"Counts how often each word of a list that the server sends is in {where}.")
    if asked["tokens"]:
        found.append(
            "Counts in how many parts of the texts each token of a list is, which the server sends."
        )
    elif terms.labels:
        found.append(f"Leaves out rows without a known value of {', '.join(terms.labels)}.")
    return found


ASKED: dict[str, Callable[[Terms], list[str]]] = {COLUMN_SUMS: _query}
"""Architecture -> what a stage asks for, in words; any other one is trained."""


def _promise(stage: FederateSettings) -> list[str]:
    """Returns sentences about the privacy guarantee; warnings are in capitals."""
    private = stage.privacy
    if private is None:
        return ["PROMISES NO DIFFERENTIAL PRIVACY: rows may be recognised in what leaves."]
    strength = f"epsilon {private.epsilon:g}" if private.epsilon is not None else "an epsilon"
    if private.noise_multiplier is not None:
        strength += f" that follows from noise of {private.noise_multiplier:g} clip norms"
    protected = f"Protects {UNITS[private.unit]}: {strength} at delta {private.delta:g}"
    found = [f"{protected}; {NOISE[trust_of_stage(stage).kind]}."]
    if not private.secure_noise:
        found.append("THE NOISE FOLLOWS FROM THE SEED: whoever knows the seed can subtract it.")
    return found


def _measures(stage: FederateSettings) -> list[str]:
    """Returns phrases for all values that a client sends besides its updates."""
    trust = trust_of_stage(stage)
    found = ["the number of rows"] if counts_are_public(stage) else []
    if stage.privacy is None:
        found.append("the score of the final model on this client's rows")
    # In a secure sum single measures are not sent: they would describe one client.
    if not is_secure(stage):
        found += [f"the {name} of its training" for name in trust.reported_measures]
    if stage.privacy is not None:
        found.append("how many failed, with noise")
    return found
