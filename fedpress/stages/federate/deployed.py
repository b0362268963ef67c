"""Starts a federate stage whose clients are on other machines; the server runs in this process."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from pathlib import Path

from fedpress.core.canonical import JSON
from fedpress.core.names import ClientId
from fedpress.data.labelled import KINDS
from fedpress.data.population import Population
from fedpress.errors import RecipeError, TrainingError, WireError
from fedpress.federation import Transport
from fedpress.federation.client_state import load_json, save_json
from fedpress.federation.exchange import exchange
from fedpress.federation.protocol import refusal_of
from fedpress.stages.federate.client import secret_of
from fedpress.stages.federate.contract import CommonInputs
from fedpress.stages.federate.memories import memories_of
from fedpress.stages.federate.offer import Offer
from fedpress.stages.federate.protection import is_secure
from fedpress.stages.federate.refusals import WithoutRefusers
from fedpress.stages.federate.server import ServerSide, register
from fedpress.stages.federate.settings import FederateSettings
from fedpress.wire.message import Message
from fedpress.workspace.state import Network, State

SILENT = "no reply came; see whether it is running"
"""Why a client that has not answered the offer does not take part."""
POPULATION = "population"
"""Entry of the server's storage: the clients with which the stage began."""


def bind_deployed(
    stage: FederateSettings, state: State, network: Network, folder: Path | None
) -> ServerSide:
    """Offers the stage to all clients, and builds the server's side for those that accept.

    A resumed stage keeps the clients with which it began, even those that are offline, because the
    noise is planned for exactly these. A client that returns takes part in the next round.

    Args:
        stage: the settings.
        state: the state of the run; it has no client's data.
        network: connects to the clients.
        folder: where the server stores its secret and the list of clients. None for `check`: then
            neither server nor clients store anything.

    Raises:
        TrainingError: if no client accepts or registers; the error contains the first reason.
        RecipeError: if a setting does not fit.
        PrivacyError: if the budget cannot be kept.
    """
    stage = _in_real_time(stage)
    data = state.data
    common = CommonInputs.of(
        stage,
        state.spec,
        state.model,
        preprocess=data.preprocess,
        task=data.task,
        seed=state.seed,
        device=state.device,
    )
    offer = offer_of(stage, state, network)
    # Names are left out ([]): the name of the storage folder is a hash of settings and client
    # names, and the names are not known before the folder is read.
    memory = memories_of(common, [], folder)[1]
    stored = load_json(memory, POPULATION)
    population = Population.from_json(stored["json"]) if stored else None
    # The session is random, and stored with the population. A stage that starts again from the
    # first round gets another session, so that clients do not confuse its requests with earlier
    # requests.
    session = str(stored.get("session") or secrets.token_hex(8))
    transport = network.open(session, None if population is None else population.names)
    header: dict[str, JSON] = {"stage": stage.name, "trial": folder is None}
    accepted = offer_to_all(transport, offer.to_message(header), network.told)
    earlier = transport.traffic
    if population is None:
        # Clients that refuse are not in the population: the stage is planned without them.
        transport = network.open(session, accepted)
        population = register(transport, network.told)
        earlier += transport.traffic
        transport = network.open(session, population.names)
        save_json(memory, POPULATION, {"json": population.to_json(), "session": session})
    secure_noise = stage.privacy is not None and stage.privacy.secure_noise
    # The keys of a secure sum are exchanged before the first round, so a client that refuses then
    # cannot come in later: it never counts as changed.
    mark = _unchanged if is_secure(stage) else transport.mark
    return ServerSide.bind(
        common,
        WithoutRefusers(transport, mark),
        ledger=state.ledger,
        secret=secret_of(memory) if secure_noise else None,
        population=population,
        earlier=earlier,
    )


def offer_of(stage: FederateSettings, state: State, network: Network) -> Offer:
    """Returns the offer of a stage to the clients of `network`."""
    data = state.data
    inputs = None
    # Clients read their own data by it.
    if data.preparation is not None and data.preparation.kind in KINDS:
        inputs = data.preparation.to_json()
    return Offer.of(
        stage,
        state.spec,
        state.model,
        preprocess=data.preprocess,
        task=data.task,
        seed=state.seed,
        inputs=inputs,
        labels=network.labels,
        reading=network.reading,
    )


def _unchanged(client: ClientId) -> str:
    return ""


def _in_real_time(stage: FederateSettings) -> FederateSettings:
    """Returns the settings without simulated delays, since clients over a network take real time.

    Raises:
        RecipeError: if the stage has privacy and a buffered schedule. The noise depends on the
            order in which clients answer, which is unknown over a network.
    """
    if stage.privacy is not None and stage.schedule.kind == "buffered":
        raise RecipeError(
            "the order of the answers determines which client is asked next; over a network this "
            "order is not known in advance, so the noise cannot be planned",
            place="schedule",
            cure="leave out schedule (then rounds are synchronous) or privacy",
        )
    return stage.model_copy(update={"delays": None})


def offer_to_all(
    transport: Transport, offer: Message, told: Callable[[str], None]
) -> list[ClientId]:
    """Sends the offer to every client and returns those that accept.

    Args:
        transport: reaches the clients.
        offer: the message.
        told: a function that is called with a sentence for each client that does not accept.

    Raises:
        TrainingError: if no client accepts.
    """
    names = transport.clients()
    answers: dict[ClientId, str] = dict.fromkeys(names, SILENT)
    for name, reply in exchange(transport, dict.fromkeys(names, offer)):
        try:
            answers[name] = refusal_of(reply) or f"it sent {reply.kind!r}"
        # One client's message must not end the run for all.
        except WireError as problem:
            answers[name] = str(problem)
        if reply.kind == "offered":
            del answers[name]
    accepted = [name for name in names if name not in answers]
    if accepted:
        for name, why in answers.items():
            told(f"client '{name}' does not take part ({why})")
        return accepted
    name, why = next(iter(answers.items()), ("", "there is no client"))
    raise TrainingError(
        f"no client accepts the offer ({why})",
        place=f"client '{name}'",
        cure="change the recipe, or ask the owner of the data",
    )
