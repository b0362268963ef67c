"""The settings of an l0 stage, and checks that they fit together."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from fedpress.errors import Argument, SettingError
from fedpress.training.settings import TrainSettings
from fedpress.workspace.state import Name


class L0Settings(TrainSettings):
    """The keys of an l0 stage, which learns a gate (a factor from 0 to 1) per weight or channel."""

    kind: Literal["l0"]
    name: Name = "l0"
    unit: Literal["weights", "channels"] = Field(
        "weights", description="what gets gates: single weights, or whole channels"
    )
    density: float = Field(
        gt=0,
        le=1,
        description="share to keep: of the weights, or of all parameters if unit is channels",
    )
    # In the rest of the training, weights and gates adapt at the final density.
    until: float = Field(
        0.6, gt=0, le=1, description="share of the training after which the density is reached"
    )
    gate_lr: float | None = Field(
        None,
        gt=0,
        description="learning rate of the gates (Adam); by default it follows from the number of "
        "steps: the fewer, the higher",
    )
    keep_first: bool = Field(True, description="weights: leave the first layer dense")
    keep_last: bool = Field(True, description="weights: leave the last layer dense")
    keep: tuple[str, ...] = Field(
        (), description="weights: names of weights to leave dense, * for anything"
    )
    ignore: tuple[str, ...] = Field(
        (), description="modules or weights that are not changed: names, * for anything"
    )
    exact: bool = Field(
        False,
        description="channels: raise an error if no numbers of channels meet the density exactly; "
        "by default the nearest are taken",
    )
    round_to: int = Field(
        8, ge=1, description="channels: numbers of channels become multiples of this"
    )
    min_keep: float = Field(
        0.1, ge=0, le=1, description="channels: smallest share of its channels that a layer keeps"
    )
    # The gates are random during the training, so batch-norm statistics from it are wrong.
    calibration: int = Field(
        2048, ge=1, description="public examples for the batch-norm statistics at the end"
    )

    @model_validator(mode="after")
    def _trains(self) -> L0Settings:
        # Training with 0 epochs is allowed by the base class.
        if not self.epochs:
            raise SettingError(
                "got 0, but the gates are learned in a training",
                place="epochs",
                cure=("give ", Argument("epochs", 10)),
            )
        # With `patience` or `ema` the training returns other weights than those of the last step.
        # The gates are returned as they are after the last step, and fit no other weights.
        if self.patience:
            raise SettingError(
                "early stopping could return weights from before the density is reached",
                place="patience",
                cure="leave patience out",
            )
        if self.ema:
            raise SettingError(
                "it would average weights that were trained with different gates",
                place="ema",
                cure="leave ema out",
            )
        return self
