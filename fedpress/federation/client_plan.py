"""What one client holds of a run before it begins: the agreed terms, and what follows from them for its own work."""

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
    """Refuses statistics over private batches; server and clients ask before anybody trains.

    Args:
        norm: of the recipe.
        model: that is to be trained.
        sample: whether single examples are protected.

    Raises:
        RecipeError: if a batch norm of `model` would mix examples that are protected one by one.
    """
    mixes = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    if sample and mixes and norm != "frozen":
        raise RecipeError(
            "batch norm in training mode mixes examples, which breaks sample privacy",
            place="norm",
            cure="use 'frozen'",
        )


@dataclass(frozen=True, eq=False)
class ClientPlan:
    """What one client holds of a run: the terms, which are the server's too, and what follows for its own work.

    Attributes:
        terms: what was agreed.
        local: how it works, which follows from them; under unit "sample" with a privacy plan of its
            own.
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
        """Fits a client's work to the terms and to the model in which it is done.

        `source` is that of a device, in place of torch; the one that the trust asks for if None.

        Raises:
            RecipeError: if the parts do not fit together.
        """
        uplink = terms.uplink
        check_norm(terms.norm, model, sample=privacy is not None)
        trust = uplink.trust
        if (trust.unit == "sample") != (privacy is not None):
            raise RecipeError(
                (
                    "unit 'sample' needs an uplink that knows it and a plan for each client, both "
                    "or none"
                ),
                place="privacy",
                cure="bind the uplink with a plan of unit 'sample' too, or leave privacy out",
            )
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
