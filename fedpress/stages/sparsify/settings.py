"""The settings of a sparsify stage, and checks that they fit together."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from fedpress.compress.sparse import Pattern, Weights
from fedpress.errors import Argument, RecipeError, SettingError
from fedpress.training.settings import TrainSettings
from fedpress.workspace.state import Name

FROM_DATA = ("taylor", "fisher", "snip", "grasp")
"""Scores that need the loss on public examples."""


class SparsifySettings(TrainSettings):
    """The keys of a sparsify stage."""

    kind: Literal["sparsify"]
    name: Name = "sparsify"
    epochs: int = Field(0, ge=0, description="passes over the public part; 0 = no training")
    density: float | None = Field(
        None,
        gt=0,
        le=1,
        description="share of the weights to keep; with a pattern N:M it is N / M",
    )
    pattern: str = Field(
        "unstructured",
        description="'unstructured', N:M such as '2:4', a block such as '4x1', 'filter' or "
        "'channel'",
    )
    score: Literal[
        "magnitude", "lamp", "taylor", "fisher", "snip", "grasp", "movement", "random"
    ] = Field("magnitude", description="importance of a weight; the lowest are set to zero")
    scope: Literal["global", "uniform", "erk", "sensitivity"] = Field(
        "global",
        description="global: one ranking over all layers; uniform: the same density for each; erk: "
        "higher densities for small layers; sensitivity: densities at which the pruning of each "
        "weight raises the loss by the same amount",
    )
    densities: dict[str, float] = Field(
        {}, description="density of each weight by name, in place of a scope"
    )
    schedule: Literal["one-shot", "gradual", "rewind", "rigl"] = Field(
        "one-shot",
        description="one-shot: prune, then train; gradual: prune in steps during the training; "
        "rewind: reset to early weights after each cut; rigl: move the zeros during the training",
    )
    begin: float = Field(
        0.0, ge=0, lt=1, description="gradual: share of the training before the first cut"
    )
    # The last quarter of the training adapts the remaining weights.
    until: float = Field(
        0.75,
        gt=0,
        le=1,
        description="gradual, rigl: share of the training after which zeros no longer change",
    )
    # After each change the network needs some steps to recover.
    every: int = Field(
        100, ge=1, description="gradual, rigl: training steps between two changes of the zeros"
    )
    rounds: int = Field(3, ge=1, description="rewind: number of cuts")
    rewind_to: int = Field(
        0, ge=0, description="rewind: epoch to whose weights the network is reset after each cut"
    )
    drop: float = Field(
        0.3,
        gt=0,
        lt=1,
        description="rigl: share of each layer's kept weights that the first change replaces",
    )
    # These two layers have few weights, and the network is sensitive to zeros in them.
    keep_first: bool = Field(True, description="leave the first layer dense")
    keep_last: bool = Field(True, description="leave the last layer dense")
    keep: tuple[str, ...] = Field((), description="weights to leave dense: names, * for anything")
    ignore: tuple[str, ...] = Field(
        (), description="modules or weights that are not changed: names, * for anything"
    )
    calibration: int = Field(
        2048, ge=1, description="public examples for scores that need the loss"
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
                    "sparsify needs the share of the weights to keep",
                    place="density",
                    cure=("try ", Argument("density", 0.1)),
                )
            return self
        # A pattern N:M fixes the density, so another density contradicts it.
        if self.density not in (None, own):
            raise SettingError(
                f"got {self.density:g}, but pattern '{self.pattern}' keeps {own:g}",
                place="density",
                cure="leave density out",
            )
        keeps = f"pattern '{self.pattern}' keeps the same number in every group"
        if self.schedule == "rigl":
            raise SettingError(
                f"{keeps}, and 'rigl' moves kept weights between groups",
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
        # Movement measures how far a weight moves away from zero in training.
        if self.score == "movement" and self.schedule not in ("gradual", "rewind"):
            raise SettingError(
                "'movement' is measured during a training",
                place="score",
                cure=("give ", Argument("schedule", "gradual")),
            )
        if self.schedule != "one-shot" and not self.epochs:
            raise SettingError(
                f"got 0, but schedule '{self.schedule}' works while the network trains",
                place="epochs",
                cure=("give ", Argument("epochs", 10)),
            )
        # Early stopping returns the weights of the best epoch. This epoch may be before the end of
        # the schedule.
        if self.schedule in ("gradual", "rigl") and self.patience:
            raise SettingError(
                f"early stopping could return weights from before the end of '{self.schedule}'",
                place="patience",
                cure="leave patience out",
            )
        if self.schedule == "gradual" and self.begin >= self.until:
            raise SettingError(
                f"got {self.begin:g}, expected less than until = {self.until:g}",
                place="begin",
                cure="leave begin out, or lower it",
            )
        # The first cut comes after `epochs` epochs. The weights to reset to must be from an earlier
        # epoch.
        if self.schedule == "rewind" and self.rewind_to >= self.epochs:
            raise SettingError(
                f"got {self.rewind_to}, expected less than epochs = {self.epochs}",
                place="rewind_to",
                cure="leave rewind_to out, or lower it",
            )
        return self

    def target(self, weights: Weights) -> float:
        """Returns the final density: the share of all entries of `weights` that are kept.

        It follows from the first of these that is given: `density`, a pattern such as "2:4", or
        `densities` of single weights.
        """
        if self.density is not None:
            return self.density
        own = Pattern.parse(self.pattern).density
        if own is not None:
            return own
        # Weights that `densities` does not name stay dense.
        kept = sum(self.densities.get(w.name, 1.0) * w.size for w in weights.chosen)
        return kept / weights.size
