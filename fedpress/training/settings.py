"""`TrainSettings`: the settings of a training on the public part of the data.

They are keys of the recipe, the TOML file with the settings of a run. A stage is one step of a run;
each stage that trains has these keys, such as `epochs`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, Field, model_validator

from fedpress.core.settings import SETTINGS
from fedpress.errors import Argument, SettingError
from fedpress.training.augment import Augment
from fedpress.training.device import Precision

BETAS = (0.9, 0.999)
"""Default `betas` of AdamW and Adam."""
Betas = tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]]
"""Shares of the old value in the running means of the gradient and of its square."""

DEFAULTS = {"adamw": {"lr": 1e-3, "weight_decay": 1e-2}, "adam": {"lr": 1e-3, "weight_decay": 0.0}}
"""Optimizer -> key -> default, where it differs from the default of SGD. The values are torch's."""


def fit_to_optimizer_(settings: BaseModel, optimizer: str, defaults: Mapping[str, float]) -> None:
    """Sets the keys in `defaults` that the user did not give.

    Args:
        settings: settings with `momentum` and `betas`; changed in place during validation.
        optimizer: name of the optimizer, such as "adamw".
        defaults: key -> default of this optimizer, where it differs from the default of the class.

    Raises:
        SettingError: if the user gave a key that this optimizer does not have, such as `momentum`
            for "adam", with another value than the default of the class.
    """
    foreign, own = ("momentum", "betas") if optimizer in DEFAULTS else ("betas", "momentum")
    # A key with its default value has no effect, so it is no error.
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
    for hidden weights, with SGD at `head_lr` for all other parameters. During the share `warmup` of
    the steps the learning rate rises, then it follows `lr_schedule`. It rises linearly, or with
    "onecycle" along a cosine. Weight decay acts on weights, never on biases, norms and step sizes
    of quantizers. See `docs/training.md`.
    """

    model_config = SETTINGS

    # 0 is allowed: the stage then does only its other work, such as rounding weights.
    epochs: int = Field(ge=0, description="passes over the public part")
    batch_size: int = Field(default=256, ge=1, description="examples in a step")
    optimizer: Literal["sgd", "adamw", "adam", "muon"] = Field(
        default="sgd", description="the rule that turns gradients into steps"
    )
    lr: float = Field(
        default=0.1, gt=0, description="peak learning rate; default of adamw and adam: 0.001"
    )
    lr_schedule: Literal["linear", "cosine", "constant", "step", "onecycle"] = Field(
        default="linear",
        description="course of the learning rate after the warm-up: linear and cosine fall to 0; "
        "step falls at lr_milestones; onecycle rises and falls along cosines",
    )
    # Shares of the training, not epochs: they also fit if the user changes the number of epochs.
    lr_milestones: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field(
        default=(0.5, 0.75), description="step only: the rate falls after these shares of training"
    )
    lr_gamma: float = Field(
        default=0.1, gt=0, le=1, description="step only: factor on the learning rate at a milestone"
    )
    head_lr: float = Field(
        default=0.05,
        gt=0,
        description="muon only: learning rate of biases, norms, first and last layer",
    )
    momentum: float = Field(
        default=0.9, ge=0, lt=1, description="sgd, muon: share of the old velocity in the new one"
    )
    betas: Betas = Field(
        default=BETAS,
        description="adamw, adam: share of the old value in the means of the gradient and of "
        "its square",
    )
    weight_decay: float = Field(
        default=5e-4,
        ge=0,
        description="weight decay; biases, norms and step sizes have none; default of adamw 0.01, "
        "of adam 0",
    )
    bn_penalty: float = Field(
        default=0.0,
        ge=0,
        description="strength of the L1 penalty on batch-norm scales, for the pruning score "
        "'bn_scale'",
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
        description="decay per step of the moving average of the weights; 0 = no average",
    )
    augment: Augment = Field(default=Augment(), description="random changes of training images")
    image_sizes: tuple[tuple[int, int], ...] = Field(
        default=(), description="[[side, epochs], ...]: smaller image sizes for the first epochs"
    )
    # Full-size epochs only: scores at smaller image sizes cannot be compared with them.
    patience: int = Field(
        default=0,
        ge=0,
        description="stop after this many full-size epochs without a better validation metric; "
        "0 = never",
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
                f"these sizes take {taken} epochs, but the training has only {self.epochs}",
                place="image_sizes",
                cure=("give ", Argument("epochs", taken), " or more, or shorten the sizes' epochs"),
            )
        return self

    def side(self, epoch: int) -> int | None:
        """Returns the side of the images in `epoch` (from 0), in pixels; None for full size."""
        # `epoch` is reduced to the position within the current entry.
        for side, epochs in self.image_sizes:
            if epoch < epochs:
                return side
            epoch -= epochs
        return None
