"""The settings of a prune stage, and its target, such as the number of parameters to keep."""

from __future__ import annotations

import contextlib
import io
import tempfile
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, model_validator
from torch import nn

from fedpress import compress, deploy
from fedpress.compress import SCORES, ChannelGraph, Target
from fedpress.compress.prune.plan import allowed_widths
from fedpress.compress.prune.sensitivity import DENSITIES
from fedpress.compress.prune.targets import Cost, bytes_of, full_widths
from fedpress.core.examples import Arrays
from fedpress.core.inputs import Inputs
from fedpress.core.settings import SETTINGS
from fedpress.errors import Argument, RecipeError, SettingError
from fedpress.nn.batch_norm import has_batch_norm
from fedpress.stages.public import draw_calibration
from fedpress.training.settings import TrainSettings
from fedpress.workspace.state import Name, State

TARGET_KEYS = ("keep_params", "keep_macs", "keep_latency", "max_bytes")
"""Keys that set the target of a prune stage; a stage has exactly one target."""


class PruneSettings(BaseModel):
    """The keys of a prune stage."""

    model_config = SETTINGS

    kind: Literal["prune"]
    name: Name = "prune"
    keep_params: float | None = Field(
        None,
        gt=0,
        le=1,
        description="target: share of the dense network's parameters to keep; 0.3 if no target is "
        "given",
    )
    keep_macs: float | None = Field(
        None,
        gt=0,
        le=1,
        description="target: share of the dense network's multiply-adds to keep",
    )
    keep_latency: float | None = Field(
        None,
        gt=0,
        le=1,
        description="target: share of the dense network's latency in onnxruntime, on this machine",
    )
    max_bytes: int | None = Field(
        None, ge=1, description="target: largest size of parameters and buffers in float32, bytes"
    )
    score: Literal[
        "l1", "l2", "fpgm", "bn_scale", "taylor", "fisher", "obd", "snip", "grasp", "random"
    ] = Field(
        "l1",
        description="importance of a channel; the lowest are removed; taylor, fisher, obd, snip "
        "and grasp use the loss on public examples",
    )
    strategy: Literal["one-shot", "single-channel"] = Field(
        "one-shot",
        description="one-shot: all channels by one ranking; single-channel: one channel at a time, "
        "then new scores",
    )
    scope: Literal["global", "layer", "sensitivity"] = Field(
        "global",
        description="global: one ranking over all layers; layer: the same share of each layer; "
        "sensitivity: shares at which the pruning of each layer raises the loss by the same amount",
    )
    # Processors are fast with widths that are multiples of 8.
    round_to: int = Field(8, ge=1, description="numbers of channels become multiples of this")
    # A layer without channels would cut the network in two.
    min_keep: float = Field(
        0.1, ge=0, le=1, description="smallest share of its channels that a layer keeps"
    )
    ignore: tuple[str, ...] = Field(
        (), description="modules or weights that are not changed: names, * for anything"
    )
    approximate: tuple[compress.NormKind, ...] = Field(
        (),
        description="kinds of norms whose channels may be removed although outputs change; their "
        "scales are then fitted on public examples",
    )
    exact: bool = Field(
        False,
        description="raise an error if no numbers of channels meet the target exactly; by default "
        "the nearest are taken",
    )
    calibration: int = Field(
        2048,
        ge=0,
        description="public examples for scores and batch-norm statistics; 0 keeps the old "
        "statistics",
    )
    densities: tuple[float, ...] = Field(
        DENSITIES,
        min_length=1,
        description="sensitivity: shares of channels at which the loss is measured for each layer; "
        "by default down to min_keep",
    )
    # The loss is measured for each layer and density, so few examples keep this fast.
    sensitivity_examples: int = Field(
        512, ge=2, description="sensitivity: public validation examples to measure the loss on"
    )
    steps: int = Field(
        1, ge=1, description="number of cuts; each one reduces the cost by the same factor"
    )
    # No training after the last cut: a later `train` stage does that.
    finetune: TrainSettings | None = Field(
        None, description="training between the cuts; with rewind before each cut"
    )
    rewind: bool = Field(
        False,
        description="train before each cut; after it, reset the remaining weights to their values "
        "at the beginning of the stage",
    )

    @model_validator(mode="before")
    @classmethod
    def _one_target(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        # Checked before defaults are set, so that a default does not count as a second target.
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
        # "single-channel" always removes the channel with the lowest score of all layers, so it has
        # no scope.
        if self.scope != "global" and self.strategy == "single-channel":
            raise SettingError(
                f"got '{self.scope}', but strategy 'single-channel' ranks all layers together",
                place="scope",
                cure=("leave scope out, or give ", Argument("strategy", "one-shot")),
            )
        # `calibration = 0` means that no public examples are read.
        if not self.calibration and SCORES[self.score].needs == "losses":
            raise SettingError(
                f"'{self.score}' needs the loss on public examples",
                place="score",
                cure=(
                    "give ",
                    Argument("calibration", 256),
                    ", and public examples by ",
                    Argument("data.public_share", 0.1),
                ),
            )
        # At density 0 a layer has no channel, and at density 1 nothing is pruned.
        if any(not 0 < density < 1 for density in self.densities):
            raise SettingError(
                f"got {list(self.densities)}, expected numbers between 0 and 1",
                place="densities",
                cure=("try ", Argument("densities", DENSITIES)),
            )
        if (self.steps > 1 or self.rewind) and self.finetune is None:
            if self.rewind:
                place = "rewind"
                problem = "there is no training before the cut, so there is nothing to undo"
            else:
                place = "steps"
                problem = f"there is no training between the {self.steps} cuts"
            raise SettingError(problem, place=place, cure=("give ", Argument("finetune.epochs", 5)))
        if self.finetune is not None and self.steps == 1 and not self.rewind:
            raise SettingError(
                (
                    "it is the training between several cuts or before a rewind, and there is only "
                    "one cut without a rewind"
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
        # There is exactly one: `_one_target` refuses several targets, and sets a default if none is
        # given.
        value: float = getattr(self, given[0])
        return given[0], value


def public_examples(settings: PruneSettings, state: State, seed: int) -> Arrays | None:
    """Draws public examples for scores, batch norms and sensitivity; None if none are needed."""
    # The sensitivity uses the validation set instead, if there is one.
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

    Each cut reduces the cost by the same factor. Example: from 1,000,000 to 250,000 parameters in
    two cuts, the first target is 500,000 (part = 0.5).

    Args:
        settings: settings of the stage.
        state: the state before the stage.
        model: the present model.
        graph: channels of the model.
        part: share of all cuts that is done after this cut: 0.5 for the first of two cuts, 1 for
            the last cut.
        start: the cost before the first cut; by default the present cost.

    Raises:
        RecipeError: if earlier stages have already pruned below the target.
    """
    key, value = settings.target_setting
    cost: Cost
    dense: float | None = None
    if key == "max_bytes":
        cost = bytes_of(model, graph)
        wanted = value
    elif key == "keep_macs":
        cost = graph.macs
        # A share of the dense network's multiply-adds: an earlier stage may have pruned the model.
        dense = compress.macs(state.dense_network(), example_input(state)[:1])
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
    """Returns the target for one trial of a cut to a latency.

    The target is `share` * the present cost, but at least the smallest cost that `round_to` and
    `min_keep` allow. The pruned model must not exceed the target, so numbers of channels are
    rounded down.

    Args:
        settings: settings of the stage.
        graph: channels of the model.
        cost: computes the cost, such as multiply-adds, from the number of channels of each layer.
        share: share of the present cost.
    """
    narrowest = []
    for layer in graph.groups:
        narrowest.append(allowed_widths(layer, settings.round_to, settings.min_keep)[0])
    wanted = max(cost(narrowest), share * cost(full_widths(graph)))
    return Target("keep_latency", cost, wanted, limit=True)


def check_share_left(key: str, value: float, left: float) -> None:
    """Refuses a target that is larger than the model, if earlier stages have pruned the model.

    Args:
        key: key of the target, such as "keep_params".
        value: the target, as a share of the dense network.
        left: the model's present share of the dense network.

    Raises:
        RecipeError: if `value` is larger than `left`.
    """
    # The margin allows for rounding: a target equal to the present share is valid.
    if value > left * (1 + 1e-9):
        names = {"keep_params": "parameters", "keep_macs": "multiply-adds", "keep_latency": "time"}
        what = names[key]
        raise RecipeError(
            f"got {value:g}, but the model has {left:.4g} of the dense network's {what}",
            place=key,
            cure=(
                f"{key} is a share of the dense network: give less than {left:.4g}, such as "
                f"{left / 2:.2g} for half of what is left"
            ),
        )


def share_in_words(dense: int, before: int, after: int) -> str:
    """Returns a sentence with the remaining share of the dense network and of the present network.

    Args:
        dense: number of parameters of the dense network, as it was before any pruning.
        before: number of parameters before this stage.
        after: number of parameters after this stage.

    >>> share_in_words(4000, 1200, 600)
    '0.15 of the 4,000 dense parameters, 0.5 of the 1,200 that the model had'
    """
    of_dense = f"{after / dense:.4g} of the {dense:,} dense parameters"
    return f"{of_dense}, {after / before:.4g} of the {before:,} that the model had"


def latency_ms(model: nn.Module, state: State, *, seconds: float = 0.5) -> float:
    """Measures the median latency of `model` in onnxruntime, in ms, for one example."""
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "model.onnx"
        given = state.input_spec
        deploy.export_onnx(model, path, deploy.Job.of(given, preprocess=state.data.preprocess))
        return deploy.latency(path, given, seconds=seconds).median_ms


def example_input(state: State) -> Inputs:
    """Returns an input of two examples, for tracing the model."""
    # Two, because torch.export would treat a batch size of 1 as a constant.
    return state.example(2)


def trace_channels(model: nn.Module, state: State, settings: PruneSettings) -> ChannelGraph:
    """Returns the channels of `model` that can be pruned, and which layers depend on each other."""
    # If torch.export fails, it first prints its graph, hundreds of lines. The error is enough.
    with contextlib.redirect_stderr(io.StringIO()):
        return compress.trace(
            model, example_input(state), ignore=settings.ignore, approximate=settings.approximate
        )
