"""A client's plan for a run: the settings agreed with the server, and how the client trains."""

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
    """Checks that no batch norm uses batch statistics under sample privacy.

    The server and the clients call this function before training.

    Args:
        norm: the recipe's key `norm`, "frozen" or "batch".
        model: the model to be trained.
        sample: whether single examples are protected (unit "sample").

    Raises:
        RecipeError: if a batch norm of `model` would use batch statistics under sample privacy.
    """
    mixes = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    # Batch statistics let one example change the gradients of all others in its batch. Clipping
    # each gradient then does not bound how far one example moves their sum.
    if sample and mixes and norm != "frozen":
        raise RecipeError(
            "batch norm in training mode mixes examples, which breaks sample privacy",
            place="norm",
            cure="use 'frozen'",
        )


@dataclass(frozen=True, eq=False)
class ClientPlan:
    """The settings of a run and of one client's local training, checked to fit each other.

    Attributes:
        terms: the settings that server and clients share.
        local: how the client trains. This follows from `terms`; under unit "sample" it also
            contains this client's own privacy plan.
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
        """Makes the plan of a client after checking that its model and privacy fit the terms.

        Args:
            terms: the settings agreed with the server.
            model: the model to train.
            source: function that computes the gradients, such as `device_steps`; None: the function
                that `GRADIENT_SOURCES` has for the privacy in `terms`.
            privacy: this client's own privacy plan under unit "sample", else None.

        Raises:
            RecipeError: if the parts do not fit together.
        """
        uplink = terms.uplink
        trust = uplink.trust
        # Mistakes are found here, before the run, and not in its first round.
        _check_fit(terms, model, source, privacy)
        # Two models of equal size may have their parameters in another order, so names and shapes
        # are compared as well.
        layout = parameters.Layout.of(model)
        if layout.size != uplink.size or layout != terms.layout:
            raise RecipeError(
                f"the model trains {layout.size} values but the uplink is for {uplink.size}, or "
                "names or shapes of parameters differ",
                place="model",
                cure="use the same model and the same `trainable` as the server",
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
    """Checks model, gradient source and privacy plan of a client; see `ClientPlan.bind`."""
    trust = terms.uplink.trust
    check_norm(terms.norm, model, sample=privacy is not None)
    if (trust.unit == "sample") != (privacy is not None):
        raise RecipeError(
            ("under unit 'sample', and only there, uplink and client both need a privacy plan"),
            place="privacy",
            cure="bind both with a plan of unit 'sample', or neither",
        )
    # Gradients of another source would be neither clipped nor noised.
    if trust.steps != "plain" and source is not None:
        raise RecipeError(
            "under unit 'sample' torch computes the gradients; another source is not possible",
            place="source",
            cure="leave source out",
        )
    if privacy is not None:
        check_private(terms.settings, privacy)
    if terms.error_feedback and not trust.keeps_residual:
        raise RecipeError(
            "the residual of a noised update contains the noise, and would remove it in the next "
            "round",
            place="error_feedback",
            cure="set error_feedback = false",
        )
