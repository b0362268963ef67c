"""The settings of a prune stage, and the targets and measurements that follow from them."""

from __future__ import annotations

import contextlib
import io
import tempfile
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import nn

from fedpress import compress, deploy
from fedpress.compress import SCORES, ChannelGraph, Target
from fedpress.compress.prune.plan import allowed_widths
from fedpress.compress.prune.sensitivity import DENSITIES
from fedpress.compress.prune.targets import Cost, bytes_of, full_widths
from fedpress.core.examples import Arrays
from fedpress.core.inputs import Inputs
from fedpress.errors import Argument, RecipeError, SettingError
from fedpress.nn.batch_norm import has_batch_norm
from fedpress.stages.public import draw_calibration
from fedpress.training.settings import TrainSettings
from fedpress.workspace.state import Name, State

TARGET_KEYS = ("keep_params", "keep_macs", "keep_latency", "max_bytes")


class PruneSettings(BaseModel):
    """The keys of a prune stage."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["prune"]
    name: Name = "prune"
    keep_params: float | None = Field(
        None,
        gt=0,
        le=1,
        description="share of the dense parameters that stays; 0.3 if no target is given",
    )
    keep_macs: float | None = Field(
        None, gt=0, le=1, description="share of the dense multiply-adds that stays"
    )
    keep_latency: float | None = Field(
        None,
        gt=0,
        le=1,
        description="share of the dense network's time in onnxruntime, measured on this machine",
    )
    max_bytes: int | None = Field(
        None, ge=1, description="bytes that parameters and buffers may take, as float32"
    )
    score: Literal[
        "l1", "l2", "fpgm", "bn_scale", "taylor", "fisher", "obd", "snip", "grasp", "random"
    ] = Field(
        "l1",
        description="how much a channel matters; all from taylor on but random look at public "
        "examples",
    )
    strategy: Literal["one-shot", "single-channel"] = Field(
        "one-shot",
        description="all channels by one ranking, or one channel after the other with new scores "
        "each"
        " time",
    )
    scope: Literal["global", "layer", "sensitivity"] = Field(
        "global",
        description="one ranking for all layers, one ratio for each, or the same growth of the "
        "loss "
        "by each",
    )
    round_to: int = Field(8, ge=1, description="widths become multiples of this")
    min_keep: float = Field(
        0.1, ge=0, le=1, description="share of its channels that every layer keeps"
    )
    ignore: tuple[str, ...] = Field(
        (), description="modules or weights that stay as they are: names, * for anything"
    )
    approximate: tuple[compress.NormKind, ...] = Field(
        (),
        description="norms to cut through though it is not exact; their scales are then fitted on "
        "public examples",
    )
    exact: bool = Field(
        False,
        description="refuse a target that no widths meet, in place of the nearest that they do",
    )
    calibration: int = Field(
        2048,
        ge=0,
        description="public examples for scores and batch-norm statistics; 0 leaves those as they "
        "were",
    )
    densities: tuple[float, ...] = Field(
        DENSITIES,
        min_length=1,
        description="sensitivity: shares of its channels that each layer is tried with, by default "
        "down to min_keep",
    )
    sensitivity_examples: int = Field(
        512, ge=2, description="sensitivity: public validation examples to measure on"
    )
    steps: int = Field(1, ge=1, description="number of cuts, each by the same factor")
    finetune: TrainSettings | None = Field(None, description="training between the cuts")
    rewind: bool = Field(
        False, description="train before each cut, then take the surviving weights back"
    )

    @model_validator(mode="before")
    @classmethod
    def _one_target(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        # Before the defaults are set, so that a default is no second target.
        given = [key for key in TARGET_KEYS if data.get(key) is not None]
        if len(given) > 1:
            raise SettingError(
                f"prune has one target, but {' and '.join(given)} are given",
                place=given[1],
                cure="leave all but one out",
            )
        return data if given else {**data, "keep_params": 0.3}

    @model_validator(mode="after")
    def _fits_together(self) -> PruneSettings:
        # After each removed channel all are scored again, so there is no plan for each layer.
        if self.scope != "global" and self.strategy == "single-channel":
            raise SettingError(
                f"got '{self.scope}', but strategy 'single-channel' ranks all layers together",
                place="scope",
                cure=("leave scope out, or give ", Argument("strategy", "one-shot")),
            )
        if not self.calibration and SCORES[self.score].needs == "losses":
            raise SettingError(
                f"'{self.score}' looks at public examples",
                place="score",
                cure=(
                    "give ",
                    Argument("calibration", 256),
                    ", and public examples by ",
                    Argument("data.public_share", 0.1),
                ),
            )
        if any(not 0 < density < 1 for density in self.densities):
            raise SettingError(
                f"got {list(self.densities)}, expected numbers between 0 and 1",
                place="densities",
                cure=("try ", Argument("densities", DENSITIES)),
            )
        if (self.steps > 1 or self.rewind) and self.finetune is None:
            if self.rewind:
                place = "rewind"
                problem = "there is no training before the cut whose weights could be taken back"
            else:
                place = "steps"
                problem = f"there is no training between the {self.steps} cuts"
            raise SettingError(problem, place=place, cure=("give ", Argument("finetune.epochs", 5)))
        if self.finetune is not None and self.steps == 1 and not self.rewind:
            raise SettingError(
                (
                    "it is the training between several cuts or before a rewind, and there is one "
                    "cut alone"
                ),
                place="finetune",
                cure=(
                    "give ",
                    Argument("steps", 3),
                    " or ",
                    Argument("rewind", True),
                    "; to train after one cut, leave finetune out and let 'train' follow",
                ),
            )
        return self

    @property
    def target_setting(self) -> tuple[str, float]:
        """The key that sets the target, and its value."""
        given = [key for key in TARGET_KEYS if getattr(self, key) is not None]
        # Exactly one: `_one_target` has refused more, and set a default for none.
        value: float = getattr(self, given[0])
        return given[0], value


def public_examples(settings: PruneSettings, state: State, seed: int) -> Arrays | None:
    """Draws the public examples; None if neither score, norms nor sensitivity need any."""
    # The sensitivity is measured on the validation set, if there is one.
    sensitivity = settings.scope == "sensitivity" and not len(state.data.validation)
    norms = has_batch_norm(state.model) and settings.calibration > 0
    fitted = bool(settings.approximate) and settings.calibration > 0
    if SCORES[settings.score].needs == "losses" or norms or sensitivity or fitted:
        return draw_calibration(state, settings.calibration, seed)
    return None


def cut_target(
    settings: PruneSettings,
    state: State,
    model: nn.Module,
    graph: ChannelGraph,
    part: float,
    start: float | None = None,
) -> Target:
    """Returns the target of one of several cuts.

    Each cut keeps the same share of the cost before it, so the target is a geometric mean of the
    first cost and the wanted one.

    Args:
        settings: of the stage.
        state: before the stage.
        model: as it is now.
        graph: its channels.
        part: progress of the cuts after this one, from 0 to 1; 1 is the last cut.
        start: the cost before the first cut; the present one if None.

    Raises:
        RecipeError: if there is less left of the dense network than should be kept.
    """
    key, value = settings.target_setting
    cost: Cost
    dense: float | None = None
    if key == "max_bytes":
        cost = bytes_of(model, graph)
        wanted = value
    elif key == "keep_macs":
        cost = graph.macs
        # Of the dense network: an earlier stage may have pruned this one.
        dense = compress.macs(state.spec.build_dense(), example_input(state)[:1])
        wanted = value * dense
    else:
        cost = graph.parameters
        dense = state.dense
        wanted = value * dense
    now = start or cost(full_widths(graph))
    if key != "max_bytes":
        check_share_left(key, value, now * value / wanted)
    target: float = now ** (1 - part) * wanted**part
    return Target(key, cost, target, limit=key == "max_bytes", full_cost=dense)


def latency_target(
    settings: PruneSettings, graph: ChannelGraph, cost: Cost, share: float
) -> Target:
    """Returns the target of `share` of the present cost, or of the least cost that is allowed.

    The cost may come out below the target, but not above: widths are rounded down.
    """
    narrowest = []
    for layer in graph.groups:
        narrowest.append(allowed_widths(layer, settings.round_to, settings.min_keep)[0])
    wanted = max(cost(narrowest), share * cost(full_widths(graph)))
    return Target("keep_latency", cost, wanted, limit=True)


def check_share_left(key: str, value: float, left: float) -> None:
    """Refuses a target above what earlier stages have left of the dense network.

    Args:
        key: of the target.
        value: its share of the dense network.
        left: share of the dense network that the model still has.

    Raises:
        RecipeError: if `value` is larger than `left`.
    """
    # The margin is for rounding: a share that was just reached is no error.
    if value > left * (1 + 1e-9):
        names = {"keep_params": "parameters", "keep_macs": "multiply-adds", "keep_latency": "time"}
        what = names[key]
        raise RecipeError(
            f"got {value:g}, but an earlier stage has left {left:.4g} of the dense {what}",
            place=key,
            cure=(
                f"{key} is a share of the dense network: give less than {left:.4g}, such as "
                f"{left / 2:.2g} for half of what is left"
            ),
        )


def share_in_words(dense: int, before: int, after: int) -> str:
    """Returns what is left as a share of the dense network and of the network before this stage.

    >>> share_in_words(4000, 1200, 600)
    '0.15 of the 4,000 dense parameters, 0.5 of the 1,200 that the model had'
    """
    of_dense = f"{after / dense:.4g} of the {dense:,} dense parameters"
    return f"{of_dense}, {after / before:.4g} of the {before:,} that the model had"


def latency_ms(model: nn.Module, state: State, *, seconds: float = 0.5) -> float:
    """Returns the median latency of `model` in onnxruntime, in ms: one example, one thread."""
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "model.onnx"
        given = state.input_spec
        deploy.export_onnx(model, path, deploy.Job.of(given, preprocess=state.data.preprocess))
        return deploy.latency(path, given, seconds=seconds).median_ms


def example_input(state: State) -> Inputs:
    """Returns an input of two examples of zeros."""
    # torch.export takes a batch size of 1 for a constant of the model.
    return state.example(2)


def trace_channels(model: nn.Module, state: State, settings: PruneSettings) -> ChannelGraph:
    """Returns the channels of `model` that can be pruned."""
    # torch.export prints its whole graph before it fails; the error says what matters.
    with contextlib.redirect_stderr(io.StringIO()):
        return compress.trace(
            model, example_input(state), ignore=settings.ignore, approximate=settings.approximate
        )
