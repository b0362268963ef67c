"""The settings of an l0 stage: its keys, and which of them fit together."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from fedpress.errors import Argument, SettingError
from fedpress.training.settings import TrainSettings
from fedpress.workspace.state import Name


class L0Settings(TrainSettings):
    """The keys of an l0 stage."""

    kind: Literal["l0"]
    name: Name = "l0"
    unit: Literal["weights", "channels"] = Field(
        "weights", description="what a gate opens and shuts"
    )
    density: float = Field(
        gt=0,
        le=1,
        description="share that stays: of the weights, or with channels of all parameters",
    )
    until: float = Field(
        0.6, gt=0, le=1, description="share of the training in which the density falls"
    )
    gate_lr: float | None = Field(
        None, gt=0, description="Adam's rate for the gates; by default by the number of steps"
    )
    keep_first: bool = Field(True, description="weights: leave the first layer dense")
    keep_last: bool = Field(True, description="weights: leave the last layer dense")
    keep: tuple[str, ...] = Field(
        (), description="weights: names to leave dense, with * for anything"
    )
    ignore: tuple[str, ...] = Field(
        (), description="modules or weights that stay as they are: names, * for anything"
    )
    exact: bool = Field(
        False,
        description="channels: refuse a density that no widths meet, in place of the nearest that "
        "they do",
    )
    round_to: int = Field(8, ge=1, description="channels: widths become multiples of this")
    min_keep: float = Field(
        0.1, ge=0, le=1, description="channels: share of its channels that every layer keeps"
    )
    calibration: int = Field(
        2048, ge=1, description="public examples for the batch-norm statistics at the end"
    )

    @model_validator(mode="after")
    def _trains(self) -> L0Settings:
        if not self.epochs:
            raise SettingError(
                "got 0, but l0 learns its gates in training",
                place="epochs",
                cure=("give ", Argument("epochs", 10)),
            )
        if self.patience:
            raise SettingError(
                "it would take weights from before the density is reached",
                place="patience",
                cure="leave patience out",
            )
        if self.ema:
            raise SettingError(
                "it would average weights that belong to other gates",
                place="ema",
                cure="leave ema out",
            )
        return self
