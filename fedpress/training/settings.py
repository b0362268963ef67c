"""`TrainSettings`: the keys of every stage that trains on the public part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fedpress.errors import Argument, SettingError
from fedpress.training.augment import Augment
from fedpress.training.device import Precision

BETAS = (0.9, 0.999)
Betas = tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]]

DEFAULTS = {"adamw": {"lr": 1e-3, "weight_decay": 1e-2}, "adam": {"lr": 1e-3, "weight_decay": 0.0}}
"""Defaults of AdamW and Adam where they differ from those of SGD; the values are torch's."""


def fit_to_optimizer_(settings: BaseModel, optimizer: str, defaults: Mapping[str, float]) -> None:
    """Sets keys that were left out of `settings` to the defaults of the optimizer.

    Args:
        settings: has `momentum` and `betas`; changed in place during its validation.
        optimizer: name of the optimizer, such as "adamw".
        defaults: default of each key that differs for this optimizer.

    Raises:
        SettingError: if a key is given that this optimizer does not have.
    """
    foreign, own = ("momentum", "betas") if optimizer in DEFAULTS else ("betas", "momentum")
    usual = type(settings).model_fields[foreign].default
    if getattr(settings, foreign) != usual:
        raise SettingError(
            f"optimizer '{optimizer}' has no {foreign}",
            place=foreign,
            cure=f"leave {foreign} out, or set {own}",
        )
    for key, value in defaults.items():
        # The settings are frozen, but still under construction.
        if key not in settings.model_fields_set:
            object.__setattr__(settings, key, value)


class TrainSettings(BaseModel):
    """Settings of a training on the public part.

    Optimizers: "sgd" with Nesterov momentum; "adamw" (Loshchilov & Hutter 2019, arXiv:1711.05101)
    and "adam" (Kingma & Ba 2015, arXiv:1412.6980); "muon" (orthogonalised momentum, Jordan 2024)
    for hidden weights, with SGD at `head_lr` for the rest. The learning rate rises linearly over
    `warmup` of the steps, then follows `lr_schedule`. Weight decay acts on weights, never on
    biases, norms and step sizes. See `docs/training.md`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: int = Field(ge=0, description="passes over the public part")
    batch_size: int = Field(default=256, ge=1, description="examples in a step")
    optimizer: Literal["sgd", "adamw", "adam", "muon"] = Field(
        default="sgd", description="the rule that turns gradients into steps"
    )
    lr: float = Field(
        default=0.1, gt=0, description="peak learning rate; of adamw and adam 0.001 by default"
    )
    lr_schedule: Literal["linear", "cosine", "constant", "step", "onecycle"] = Field(
        default="linear",
        description="the rate after the warm-up: linear and cosine fall to 0, step falls at "
        "lr_milestones; onecycle rises and falls by cosines",
    )
    lr_milestones: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field(
        default=(0.5, 0.75), description="step only: shares of the training at which the rate falls"
    )
    lr_gamma: float = Field(
        default=0.1, gt=0, le=1, description="step only: factor on the rate at each milestone"
    )
    head_lr: float = Field(
        default=0.05,
        gt=0,
        description="muon only: learning rate of biases, norms, first and last layer",
    )
    momentum: float = Field(
        default=0.9, ge=0, lt=1, description="share of the old velocity in the new one (sgd, muon)"
    )
    betas: Betas = Field(
        default=BETAS,
        description="adamw, adam: shares of the old in the running means of the gradient and of "
        "its square",
    )
    weight_decay: float = Field(
        default=5e-4,
        ge=0,
        description="pull of the weights towards 0, never on biases, norms and step sizes; of "
        "adamw 0.01 and of adam 0 by default",
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
    def _fits_optimizer(self) -> TrainSettings:
        fit_to_optimizer_(self, self.optimizer, DEFAULTS.get(self.optimizer, {}))
        return self

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
