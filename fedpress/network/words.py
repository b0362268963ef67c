"""Describes in English sentences what a federate stage asks of a data owner.

A federate stage is one training stage of a recipe (the TOML file that describes a run). The owner
reads the sentences before approving the recipe.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedpress.core.canonical import JSON
from fedpress.stages.federate.contract import algorithm_of, counts_are_public, owns_keys
from fedpress.stages.federate.protection import is_secure, trust_of_stage
from fedpress.stages.federate.settings import FederateSettings

NOISE = {
    "local": "this client adds the noise itself, so the server need not be trusted",
    "distributed": "the clients make the noise together; the server learns the noised sum alone",
    "central": "the server adds the noise: it sees this client's update without noise",
}
"""Kind of trust -> who adds the noise, in words for the owner."""
UNITS = {"sample": "single rows", "client": "all rows of this client together"}
"""Unit of privacy -> what is protected, in words for the owner."""


def words_of(
    stage: FederateSettings,
    architecture: str,
    arguments: Mapping[str, JSON],
    labels: Sequence[str],
) -> list[str]:
    """Returns sentences that describe a federate stage: model, rounds, privacy and what is sent.

    Args:
        stage: settings of the stage.
        architecture: name of the model's architecture, such as "cnn".
        arguments: arguments of the architecture, such as `{"width": 8}`.
        labels: columns that the model predicts; empty if the data are not a table.
    """
    # ("*",) matches all parameters, which is the usual case and needs no words.
    trains = "" if stage.trainable == ("*",) else f" (only {', '.join(stage.trainable)})"
    given = ", ".join(f"{name} = {value}" for name, value in arguments.items())
    found = [f"Trains the model '{architecture}'{f' with {given}' if given else ''}{trains}."]
    if labels:
        found.append(f"Predicts the columns {', '.join(labels)}.")
    who = "all clients" if stage.cohort is None else f"{stage.cohort} clients"
    found.append(
        f"Asks {who} in each of {stage.num_rounds} rounds; {stage.epochs} epochs of the rows in "
        f"batches of {stage.batch_size}, by the algorithm {algorithm_of(stage).kind}."
    )
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
