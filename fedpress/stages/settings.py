"""The `[[stage]] kind = "federate"` table of a recipe: its keys, their ranges and defaults."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fedpress.augment import Augment
from fedpress.federate import Average, LocalSettings
from fedpress.federate.algorithms import Server
from fedpress.state import Name


class PrivacySettings(BaseModel):
    """`[stage.privacy]`: what is protected and how well.

    Give `epsilon` and the noise is calibrated before the run; or give `noise_multiplier` and epsilon is what comes out.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    unit: Literal["sample", "client"]
    delta: float = Field(1e-5, gt=0, lt=1)
    clip_norm: float = Field(1.0, gt=0)
    epsilon: float | None = Field(None, gt=0)
    noise_multiplier: float | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _one_of_two(self) -> PrivacySettings:
        if (self.epsilon is None) == (self.noise_multiplier is None):
            raise ValueError("give either epsilon (the noise is calibrated) or noise_multiplier, one of the two")
        return self


class FederateSettings(LocalSettings):
    """How clients train together; the keys of local training stand beside.

    `trainable` holds patterns of parameter names; only these train and travel (all by default).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["federate"]
    name: Name = "federate"
    num_rounds: int = Field(10, ge=0)
    cohort: int | None = Field(None, ge=1, description="clients in a round; all by default")
    sampling: Literal["fixed", "poisson"] = "fixed"
    weights: Literal["examples", "equal"] | None = Field(
        None, description="of the mean; examples by default, equal under client privacy"
    )
    server: Server = Average()
    trainable: tuple[str, ...] = ("*",)
    norm: Literal["frozen", "batch"] = "frozen"
    augment: Augment = Augment()
    privacy: PrivacySettings | None = None
    target_accuracy: float | None = Field(None, gt=0, le=1, description="stop when validation accuracy reaches this")
    patience: int = Field(0, ge=0, description="stop after so many rounds without a better one; 0 = never")
