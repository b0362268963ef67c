"""What one client knows of a run before it begins: the agreed terms and its own local plan."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from fedpress.core import parameters
from fedpress.errors import RecipeError
from fedpress.federation.agreement import Terms
from fedpress.federation.local import GradientSource, LocalPlan
from fedpress.federation.private import check_private
from fedpress.federation.sources import GRADIENT_SOURCES
from fedpress.privacy.plan import PrivacyPlan


def check_norm(norm: str, model: nn.Module, *, sample: bool) -> None:
    """Refuses batch statistics under sample privacy; server and clients call it before training.

    Args:
        norm: the recipe's key, "frozen" or "batch".
        model: the model to be trained.
        sample: whether single examples are protected.

    Raises:
        RecipeError: if a batch norm of `model` would mix examples that are protected one by one.
    """
    mixes = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    # Through batch statistics one example changes the gradients of all others in its batch, so
    # clipping each gradient bounds nothing.
    if sample and mixes and norm != "frozen":
        raise RecipeError(
            "batch norm in training mode mixes examples, which breaks sample privacy",
            place="norm",
            cure="use 'frozen'",
        )


@dataclass(frozen=True, eq=False)
class ClientPlan:
    """What one client knows of a run.

    Attributes:
        terms: what was agreed; the server's are the same.
        local: how the client trains, which follows from the terms; under unit "sample" with a
            privacy plan of its own.
    """

    terms: Terms
    local: LocalPlan

    @classmethod
    def bind(
        cls,
        terms: Terms,
        model: nn.Module,
        *,
        source: GradientSource | None = None,
        privacy: PrivacyPlan | None = None,
    ) -> ClientPlan:
        """Fits a client's local training to the terms and to its model.

        Args:
            terms: what was agreed.
            model: the model to train.
            source: of the gradients, such as `device_steps`; that of the trust if None.
            privacy: this client's own plan, under unit "sample".

        Raises:
            RecipeError: if the parts do not fit together.
        """
        uplink = terms.uplink
        trust = uplink.trust
        _check_fit(terms, model, source, privacy)
        # Compared by names and shapes too: two models of equal size may order parameters otherwise.
        layout = parameters.Layout.of(model)
        if layout.size != uplink.size or layout != terms.layout:
            raise RecipeError(
                f"the model trains {layout.size} values but the uplink is for {uplink.size}",
                place="model",
                cure="take the model and the patterns of trainable that were agreed",
            )
        local = LocalPlan(
            settings=terms.settings,
            prepare=terms.prepare,
            task=terms.task,
            privacy=privacy,
            source=source or GRADIENT_SOURCES[trust.steps],
            penalties=terms.algorithm.penalties,
        )
        return cls(terms, local)


def _check_fit(
    terms: Terms, model: nn.Module, source: GradientSource | None, privacy: PrivacyPlan | None
) -> None:
    """Checks that a client's parts fit the terms; see `ClientPlan.bind`."""
    trust = terms.uplink.trust
    check_norm(terms.norm, model, sample=privacy is not None)
    if (trust.unit == "sample") != (privacy is not None):
        raise RecipeError(
            (
                "unit 'sample' needs an uplink that knows it and a plan for each client, both "
                "or none"
            ),
            place="privacy",
            cure="bind the uplink with a plan of unit 'sample' too, or leave privacy out",
        )
    # Another source would return gradients that were neither clipped nor noised.
    if trust.steps != "plain" and source is not None:
        raise RecipeError(
            "private steps are taken in torch and run no other source of gradients",
            place="source",
            cure="leave source out",
        )
    if privacy is not None:
        check_private(terms.settings, privacy)
    if terms.error_feedback and not trust.keeps_residual:
        raise RecipeError(
            "a client that adds noise would take it away again in the next round",
            place="error_feedback",
            cure="set error_feedback = false",
        )
