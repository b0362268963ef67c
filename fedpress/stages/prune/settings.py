"""What a prune stage is told, and the targets and measurements that follow from it."""

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
    """What the table of a prune stage holds."""

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
        description="how much a channel matters; all from taylor on but random look at public examples",
    )
    strategy: Literal["one-shot", "single-channel"] = Field(
        "one-shot",
        description="all channels by one ranking, or one channel after the other with new scores each"
        " time",
    )
    scope: Literal["global", "layer", "sensitivity"] = Field(
        "global",
        description="one ranking for all layers, one ratio for each, or the same growth of the loss "
        "by each",
    )
    round_to: int = Field(8, ge=1, description="widths become multiples of this")
    min_keep: float = Field(
        0.1, ge=0, le=1, description="share of its channels that every layer keeps"
    )
    ignore: tuple[str, ...] = Field(
        (), description="modules or weights that stay as they are: names, * for anything"
    )
    approximate: tuple[compress.Norm, ...] = Field(
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
            raise SettingError(
                "there is no training before the cut whose weights could be taken back"
                if self.rewind
                else f"there is no training between the {self.steps} cuts",
                place="rewind" if self.rewind else "steps",
                cure=("give ", Argument("finetune.epochs", 5)),
            )
        if self.finetune is not None and self.steps == 1 and not self.rewind:
            raise SettingError(
                "it is the training between several cuts or before a rewind, and there is one cut alone",
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
        """The setting that is the target, and its value."""
        return next(
            (key, value) for key in TARGET_KEYS if (value := getattr(self, key)) is not None
        )


def public_examples(how: PruneSettings, state: State, seed: int) -> Arrays | None:
    """Draws the public examples; None where no score, norm or curve looks at any."""
    measured = how.scope == "sensitivity" and not len(state.data.validation)
    norms = has_batch_norm(state.model) and how.calibration > 0
    fitted = bool(how.approximate) and how.calibration > 0
    if SCORES[how.score].needs == "losses" or norms or measured or fitted:
        return draw_calibration(state, how.calibration, seed)
    return None


def cut_target(
    how: PruneSettings,
    state: State,
    model: nn.Module,
    graph: ChannelGraph,
    part: float,
    start: float | None = None,
) -> Target:
    """Returns the target of the cut that goes `part` of the way from the cost `start` (now) to the aim.

    Raises:
        RecipeError: if there is less left of the dense network than should stay.
    """
    key, value = how.target_setting
    cost: Cost
    dense: float | None = None
    if key == "max_bytes":
        cost, wanted = bytes_of(model, graph), value
    elif key == "keep_macs":
        cost, dense = graph.macs, compress.macs(state.spec.build_dense(), example_input(state)[:1])
        wanted = value * dense
    else:
        cost, dense = graph.parameters, state.dense
        wanted = value * dense
    now = start or cost(full_widths(graph))
    if key != "max_bytes":
        check_share_left(key, value, now * value / wanted)
    return Target(
        key, cost, now ** (1 - part) * wanted**part, limit=key == "max_bytes", full_cost=dense
    )


def latency_target(how: PruneSettings, graph: ChannelGraph, cost: Cost, share: float) -> Target:
    """Returns the target to come as near as the widths allow to `share` of the cost now, from below."""
    least = cost([allowed_widths(layer, how.round_to, how.min_keep)[0] for layer in graph.groups])
    return Target("keep_latency", cost, max(least, share * cost(full_widths(graph))), limit=True)


def check_share_left(key: str, value: float, left: float) -> None:
    """Refuses the target `key` = `value` where earlier stages have left only the share `left` of the dense network.

    Raises:
        RecipeError: if so.
    """
    if value > left * (1 + 1e-9):
        what = {"keep_params": "parameters", "keep_macs": "multiply-adds", "keep_latency": "time"}[
            key
        ]
        raise RecipeError(
            f"got {value:g}, but an earlier stage has left {left:.4g} of the dense {what}",
            place=key,
            cure=(
                f"{key} is a share of the dense network: give less than {left:.4g}, such as "
                f"{left / 2:.2g} for half of what is left"
            ),
        )


def share_in_words(dense: int, before: int, after: int) -> str:
    """Says of what a share is, for a network that an earlier stage has cut.

    >>> share_in_words(4000, 1200, 600)
    '0.15 of the 4,000 dense parameters, 0.5 of the 1,200 that the model had'
    """
    of_dense = f"{after / dense:.4g} of the {dense:,} dense parameters"
    return f"{of_dense}, {after / before:.4g} of the {before:,} that the model had"


def latency_ms(model: nn.Module, state: State, *, seconds: float = 0.5) -> float:
    """Times `model` in onnxruntime, on one example and one thread: the median."""
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "model.onnx"
        given = state.input_spec
        deploy.export_onnx(model, path, deploy.Job.of(given, preprocess=state.data.preprocess))
        return deploy.latency(path, given, seconds=seconds).median_ms


def example_input(state: State) -> Inputs:
    """Returns an input of zeros; of two examples, since torch.export takes a batch of one for a constant."""
    return state.example(2)


def trace_channels(model: nn.Module, state: State, how: PruneSettings) -> ChannelGraph:
    """Returns the channels of `model` that may go."""
    with contextlib.redirect_stderr(io.StringIO()):  # torch.export prints its graph before it fails
        return compress.trace(
            model, example_input(state), ignore=how.ignore, approximate=how.approximate
        )
