"""The settings of a sparsify stage: its keys, which fit together, and the wanted density."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from fedpress.compress.sparse import Pattern, Weights
from fedpress.errors import Argument, RecipeError, SettingError
from fedpress.training.settings import TrainSettings
from fedpress.workspace.state import Name

FROM_DATA = ("taylor", "fisher", "snip", "grasp")
"""Scores that look at the loss on public examples."""


class SparsifySettings(TrainSettings):
    """The keys of a sparsify stage."""

    kind: Literal["sparsify"]
    name: Name = "sparsify"
    epochs: int = Field(0, ge=0, description="passes over the public part; 0 = no training")
    density: float | None = Field(
        None, gt=0, le=1, description="share of the weights that stays; N:M brings its own"
    )
    pattern: str = Field(
        "unstructured",
        description="'unstructured', N:M such as '2:4', a block such as '4x1', 'filter' or "
        "'channel'",
    )
    score: Literal[
        "magnitude", "lamp", "taylor", "fisher", "snip", "grasp", "movement", "random"
    ] = Field("magnitude", description="how much a weight matters; the lowest are set to zero")
    scope: Literal["global", "uniform", "erk", "sensitivity"] = Field(
        "global",
        description="one ranking for all layers, one share for each, larger shares for small "
        "layers, "
        "or the shares at "
        "which every layer costs the same loss",
    )
    densities: dict[str, float] = Field(
        {}, description="instead of a scope: the density of each weight by name"
    )
    schedule: Literal["one-shot", "gradual", "rewind", "rigl"] = Field(
        "one-shot",
        description="when weights are cut: at once, in steps while the network trains, with early "
        "weights back after each cut, or moved about",
    )
    begin: float = Field(
        0.0, ge=0, lt=1, description="gradual: share of the training before the first cut"
    )
    until: float = Field(
        0.75, gt=0, le=1, description="gradual, rigl: share of the training after which masks stay"
    )
    every: int = Field(
        100, ge=1, description="gradual, rigl: steps from one change of the masks to the next"
    )
    rounds: int = Field(3, ge=1, description="rewind: number of cuts")
    rewind_to: int = Field(
        0, ge=0, description="rewind: epoch whose weights come back after each cut"
    )
    drop: float = Field(
        0.3, gt=0, lt=1, description="rigl: share of each layer's weights that moves at first"
    )
    keep_first: bool = Field(True, description="leave the first layer dense")
    keep_last: bool = Field(True, description="leave the last layer dense")
    keep: tuple[str, ...] = Field(
        (), description="names of weights to leave dense, with * for anything"
    )
    ignore: tuple[str, ...] = Field(
        (), description="modules or weights that stay as they are: names, * for anything"
    )
    calibration: int = Field(
        2048, ge=1, description="public examples for scores that look at the loss"
    )

    @model_validator(mode="after")
    def _density_fits_pattern(self) -> SparsifySettings:
        try:
            own = Pattern.parse(self.pattern).density
        except RecipeError as error:
            raise SettingError.of(error, place="pattern") from error
        if own is None:
            if self.density is None and not self.densities:
                raise SettingError(
                    "sparsify needs the share of the weights that stays",
                    place="density",
                    cure=("try ", Argument("density", 0.1)),
                )
            return self
        if self.density not in (None, own):
            raise SettingError(
                f"got {self.density:g}, but pattern '{self.pattern}' keeps {own:g}",
                place="density",
                cure="leave density out",
            )
        keeps = f"pattern '{self.pattern}' keeps as many in every group"
        if self.schedule == "rigl":
            raise SettingError(
                f"{keeps}, and 'rigl' moves them to others",
                place="schedule",
                cure=("give ", Argument("schedule", "gradual")),
            )
        if self.densities:
            raise SettingError(keeps, place="densities", cure="leave densities out")
        if self.scope == "sensitivity":
            raise SettingError(keeps, place="scope", cure="leave scope out")
        return self

    @model_validator(mode="after")
    def _schedule_fits(self) -> SparsifySettings:
        # Movement is how far a weight moved from zero in training, so there must be one.
        if self.score == "movement" and self.schedule not in ("gradual", "rewind"):
            raise SettingError(
                "'movement' is summed up while the network trains",
                place="score",
                cure=("give ", Argument("schedule", "gradual")),
            )
        if self.schedule != "one-shot" and not self.epochs:
            raise SettingError(
                f"got 0, but schedule '{self.schedule}' works while the network trains",
                place="epochs",
                cure=("give ", Argument("epochs", 10)),
            )
        if self.schedule in ("gradual", "rigl") and self.patience:
            raise SettingError(
                f"it would take weights from before the end of schedule '{self.schedule}'",
                place="patience",
                cure="leave patience out",
            )
        if self.schedule == "gradual" and self.begin >= self.until:
            raise SettingError(
                f"got {self.begin:g}, expected less than until = {self.until:g}",
                place="begin",
                cure="leave begin out, or lower it",
            )
        if self.schedule == "rewind" and self.rewind_to >= self.epochs:
            raise SettingError(
                f"got {self.rewind_to}, expected less than epochs = {self.epochs}",
                place="rewind_to",
                cure="leave rewind_to out, or lower it",
            )
        return self

    def target(self, weights: Weights) -> float:
        """Returns the share of all entries of `weights` that is kept at the end."""
        if self.density is not None:
            return self.density
        own = Pattern.parse(self.pattern).density
        if own is not None:
            return own
        kept = sum(self.densities.get(w.name, 1.0) * w.size for w in weights.chosen)
        return kept / weights.size
