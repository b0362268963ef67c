"""Lets a data owner approve a recipe in advance, before a server asks for training.

An offer is the message in which a server asks a client to take part in a run. The client accepts an
offer whose terms have the same fingerprint (a hash) as an approved recipe.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import JsonValue

from fedpress.api import begin
from fedpress.api.begin import Overrides, Source
from fedpress.errors import Argument, RecipeError
from fedpress.network.ledger import OwnerLedger, default_path
from fedpress.network.words import words_of
from fedpress.pipeline.recipe import Recipe
from fedpress.pipeline.start import saved_model


@dataclass(frozen=True)
class Approval:
    """What one stage of a recipe asks of clients, which a data owner may approve.

    Attributes:
        stage: name of the stage.
        fingerprint: hash of the stage's terms: its settings, model and label columns. A server's
            offer of this stage has the same fingerprint.
        words: one sentence for each thing that the stage asks the owner for.
    """

    stage: str
    fingerprint: str
    words: tuple[str, ...]


def asked_for(recipe: Source, overrides: Overrides = ()) -> list[Approval]:
    """Returns what the stages of a recipe ask of clients; nothing is approved.

    Loads neither the recipe's data nor its code.

    Raises:
        RecipeError: if there is no such recipe, a setting is wrong, or no stage asks clients.
    """
    settings = begin.load(recipe, overrides)[1]
    architecture, arguments = _model_of(settings)
    found = []
    for stage in settings.stage:
        terms = stage.terms(architecture, arguments, settings.data)
        if terms is None:
            continue
        # Only tables have columns. For other sources the words leave out
        # `data.label_columns`.
        shown = terms if settings.data.reads_table else replace(terms, labels=())
        found.append(Approval(stage.name, terms.fingerprint, tuple(words_of(shown))))
    if not found:
        raise RecipeError(
            "no stage asks clients for anything",
            place="stage",
            cure=("give a recipe that has a stage with ", Argument("kind", "federate")),
        )
    return found


def approve(
    recipe: Source,
    overrides: Overrides = (),
    *,
    ledger: Path | None = None,
    withdraw: bool = False,
) -> list[Approval]:
    """Writes to the owner's ledger that the owner approves a recipe.

    The ledger is a file with the owner's approvals and the privacy that runs have spent.

    Args:
        recipe: name or file of the recipe, a dictionary of tables, or a `Recipe`.
        overrides: the overrides with which the server runs the recipe. Other overrides give another
            fingerprint, so the approval would not match the server's offer.
        ledger: file of the ledger; None: the default file of this user.
        withdraw: if True, an earlier approval is withdrawn instead.

    Returns:
        The terms that were approved or withdrawn, one entry for each such stage.

    Raises:
        RecipeError: see `asked_for`.
        PrivacyError: if the ledger cannot be written.
    """
    found = asked_for(recipe, overrides)
    book = OwnerLedger(ledger or default_path())
    # Each stage separately: a server sends one offer for each.
    try:
        for one in found:
            book.approve(one.fingerprint, " ".join(one.words), approved=not withdraw)
    finally:
        book.close()
    return found


def _model_of(settings: Recipe) -> tuple[str, dict[str, JsonValue]]:
    """Returns the architecture and its arguments, as in a server's offer."""
    model = settings.model
    # An offer names the architecture that is stored in the checkpoint, not the checkpoint file,
    # which clients do not have.
    if model.checkpoint is not None:
        spec = saved_model(model.checkpoint)[0]
        return spec.architecture, dict(spec.arguments)
    assert model.architecture is not None
    return model.architecture, dict(model.arguments)
