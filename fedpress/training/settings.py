"""How to train on the public part: the keys that every training stage has."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fedpress.errors import Argument, SettingError
from fedpress.training.augment import Augment
from fedpress.training.device import Precision


class TrainSettings(BaseModel):
    """How to train on the public part.

    Optimizers: "sgd" with Nesterov momentum, or "muon" (orthogonalised momentum, Jordan 2024) for the hidden weights
    with SGD at `head_lr` for the rest. The learning rate rises linearly over `warmup` of the steps, then falls linearly
    to 0. Weight decay acts on weights, never on biases, norms and step sizes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: int = Field(ge=0, description="passes over the public part")
    batch_size: int = Field(default=256, ge=1, description="examples in a step")
    optimizer: Literal["sgd", "muon"] = Field(
        default="sgd", description="who turns gradients into steps"
    )
    lr: float = Field(default=0.1, gt=0, description="peak learning rate")
    head_lr: float = Field(
        default=0.05,
        gt=0,
        description="muon only: learning rate of biases, norms, first and last layer",
    )
    momentum: float = Field(
        default=0.9, ge=0, lt=1, description="share of the old velocity in the new one"
    )
    weight_decay: float = Field(
        default=5e-4,
        ge=0,
        description="pull of the weights towards 0; never on biases, norms and step sizes",
    )
    bn_penalty: float = Field(
        default=0.0,
        ge=0,
        description="strength of the L1 penalty on batch-norm scales, for the score 'bn_scale'",
    )
    warmup: float = Field(
        default=0.2, ge=0, lt=1, description="share of the steps over which the learning rate rises"
    )
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=1, description="share of the target that is spread over all classes"
    )
    ema: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="decay per step of the averaged weights; 0 = the last weights",
    )
    augment: Augment = Field(default=Augment(), description="random changes of training images")
    image_sizes: tuple[tuple[int, int], ...] = Field(
        default=(), description="[[side, epochs], ...]; later epochs at full size"
    )
    patience: int = Field(
        default=0,
        ge=0,
        description="stop after so many full-size epochs without a better metric on the validation "
        "set; 0 = never",
    )
    precision: Precision = Field(
        default="auto",
        description="number format of forward passes; auto: bf16 for large convolutional networks "
        "where it is faster",
    )

    @model_validator(mode="after")
    def _sizes_fit(self) -> TrainSettings:
        for side, epochs in self.image_sizes:
            if side < 4 or epochs < 1:
                raise SettingError(
                    f"got {[side, epochs]}, expected [side, epochs] with side >= 4 and epochs >= 1",
                    place="image_sizes",
                )
        taken = sum(epochs for _, epochs in self.image_sizes)
        if taken > self.epochs:
            raise SettingError(
                f"they take {taken} epochs, more than the {self.epochs} epochs of the training",
                place="image_sizes",
                cure=("give ", Argument("epochs", taken), " or more, or fewer epochs to the sizes"),
            )
        return self

    def side(self, epoch: int) -> int | None:
        """Returns the image side of `epoch` (from 0), or None for full size."""
        for side, epochs in self.image_sizes:
            if epoch < epochs:
                return side
            epoch -= epochs
        return None
