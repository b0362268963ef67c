"""A data owner's approval of a recipe, given before any server has asked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import JsonValue

from fedpress.api import begin
from fedpress.api.begin import Overrides, Source
from fedpress.errors import Argument, RecipeError
from fedpress.network.ledger import OwnerLedger, default_path
from fedpress.network.words import words_of
from fedpress.pipeline.recipe import Recipe
from fedpress.pipeline.start import saved_model
from fedpress.stages.federate.offer import fingerprint_of, terms_of
from fedpress.stages.federate.stage import FederateStage


@dataclass(frozen=True)
class Approval:
    """What one federate stage of a recipe asks a data owner to approve.

    Attributes:
        stage: name of the stage.
        fingerprint: fingerprint of the stage's terms; a server's offer has the same.
        words: a sentence for each thing that the stage asks for.
    """

    stage: str
    fingerprint: str
    words: tuple[str, ...]


def asked_for(recipe: Source, overrides: Overrides = ()) -> list[Approval]:
    """Returns what the federate stages of a recipe ask a data owner for; nothing is approved.

    Neither data nor code of the recipe are loaded.

    Raises:
        RecipeError: if there is no such recipe, a setting is wrong, or no stage is federated.
    """
    settings = begin.load(recipe, overrides)[1]
    architecture, arguments = _model_of(settings)
    found = []
    for stage in settings.stage:
        if not isinstance(stage, FederateStage):
            continue
        labels = settings.data.label_columns
        terms = terms_of(stage, architecture, arguments, labels)
        # Other sources have no columns, so the words do not mention `data.label_columns`.
        columns = labels if settings.data.source in ("csv", "parquet") else ()
        words = words_of(stage, architecture, arguments, columns)
        found.append(Approval(stage.name, fingerprint_of(terms), tuple(words)))
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
    """Notes in the owner's ledger that the owner approves a recipe.

    Args:
        recipe: as `begin.load` takes it.
        overrides: with which the server runs it; others give another fingerprint.
        ledger: the ledger's file; None: that of this user.
        withdraw: takes an earlier approval back.

    Returns:
        What was approved, or is no longer.

    Raises:
        RecipeError: see `asked_for`.
        PrivacyError: if the ledger cannot be written.
    """
    found = asked_for(recipe, overrides)
    book = OwnerLedger(ledger or default_path())
    try:
        for one in found:
            book.approve(one.fingerprint, " ".join(one.words), approved=not withdraw)
    finally:
        book.close()
    return found


def _model_of(settings: Recipe) -> tuple[str, dict[str, JsonValue]]:
    """Returns the architecture and its arguments as an offer names them."""
    model = settings.model
    if model.checkpoint is not None:
        spec = saved_model(model.checkpoint)[0]
        return spec.architecture, dict(spec.arguments)
    assert model.architecture is not None
    return model.architecture, dict(model.arguments)
