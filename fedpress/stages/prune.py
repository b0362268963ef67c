"""The prune stage: scores every channel, orders, removes, and restores the batch-norm statistics, once or in steps."""

from __future__ import annotations

import contextlib
import copy
import io
import tempfile
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator
from torch import Tensor, nn

from fedpress import compress, deploy, training
from fedpress.arrays import Arrays
from fedpress.compress import SCORES, ChannelGraph, Point, PruningPlan, Target
from fedpress.compress.derivatives import differentiable
from fedpress.compress.planning import allowed_widths
from fedpress.compress.sensitivity import DENSITIES
from fedpress.compress.targets import Cost, bytes_of, next_share, whole
from fedpress.errors import RecipeError
from fedpress.folder import StageFolder, write_json
from fedpress.models import what_pruning_changed
from fedpress.seeds import derive, generator
from fedpress.stages.public import calibration
from fedpress.state import Name, State, Tick
from fedpress.training import Fit, Step, TrainSettings, evaluate

BATCH = 256
AIMS = ("keep_params", "keep_macs", "keep_latency", "max_bytes")


class PruneStage(BaseModel):
    """`[[stage]] kind = "prune"`: removes whole channels until `keep_params` of the parameters are left.

    Or until `keep_macs` of the multiply-adds, `keep_latency` of the milliseconds in onnxruntime on this machine, or
    `max_bytes` are. In `steps` cuts the network is trained between them as `finetune` says, and with `rewind` before
    each; it then takes the surviving weights back to what they were when the stage began (Frankle & Carbin 2019).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["prune"]
    name: Name = "prune"
    keep_params: float | None = Field(
        None, gt=0, le=1, description="share of the dense parameters that stays; 0.3 if no target is given"
    )
    keep_macs: float | None = Field(None, gt=0, le=1, description="share of the dense multiply-adds that stays")
    keep_latency: float | None = Field(
        None, gt=0, le=1, description="share of the dense network's time in onnxruntime, measured on this machine"
    )
    max_bytes: int | None = Field(None, ge=1, description="bytes that parameters and buffers may take, as float32")
    score: Literal["l1", "l2", "fpgm", "bn_scale", "taylor", "fisher", "obd", "snip", "grasp", "random"] = "l1"
    strategy: Literal["one-shot", "single-channel"] = "one-shot"
    scope: Literal["global", "layer", "sensitivity"] = Field(
        "global", description="one ranking for all layers, one ratio for each, or the same growth of the loss by each"
    )
    round_to: int = Field(8, ge=1, description="widths become multiples of this")
    min_keep: float = Field(0.1, ge=0, le=1, description="share of its channels that every layer keeps")
    calibration: int = Field(
        2048, ge=0, description="public examples for scores and batch-norm statistics; 0 leaves those as they were"
    )
    densities: tuple[float, ...] = Field(
        DENSITIES, min_length=1, description="sensitivity: shares of its channels that each layer is tried with"
    )
    sensitivity_examples: int = Field(512, ge=2, description="sensitivity: public validation examples to measure on")
    steps: int = Field(1, ge=1, description="number of cuts, each by the same factor")
    finetune: TrainSettings | None = Field(None, description="training between the cuts")
    rewind: bool = Field(False, description="train before each cut, then take the surviving weights back")

    @model_validator(mode="before")
    @classmethod
    def _one_target(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        given = [key for key in AIMS if data.get(key) is not None]
        if len(given) > 1:
            raise ValueError(f"prune has one target, but {' and '.join(given)} are given; leave all but one out")
        return data if given else {**data, "keep_params": 0.3}

    @model_validator(mode="after")
    def _fits_together(self) -> PruneStage:
        if self.scope != "global" and self.strategy == "single-channel":
            raise ValueError(f"strategy 'single-channel' ranks all layers together; leave scope = '{self.scope}' out")
        if not self.calibration and SCORES[self.score].needs == "losses":
            raise ValueError(
                f"score '{self.score}' looks at public examples; give calibration, and data (a command: --data SOURCE)"
            )
        if any(not 0 < density < 1 for density in self.densities):
            raise ValueError(f"densities lie between 0 and 1; try {list(DENSITIES)}")
        if (self.steps > 1 or self.rewind) != (self.finetune is not None):
            raise ValueError(
                "finetune = { epochs = ... } is what happens between several cuts or before a rewind; "
                "give it together with steps or rewind, and to train after one cut add a stage 'train'"
            )
        return self

    @property
    def aim(self) -> tuple[str, float]:
        """The setting that is the target, and its value."""
        return next((key, value) for key in AIMS if (value := getattr(self, key)) is not None)

    def check(self, state: State) -> tuple[State, dict[str, Any]]:
        """Plans the cut on the untrained model: the widths may come out otherwise, the sizes not by much.

        Raises:
            RecipeError: if the target cannot be reached.
            ModelError: if the model cannot be traced, or its layers lack what the score looks at.
            DataError: if there are no public examples to score or to restore the batch norm with.
            ExportError: if a latency is wanted of what cannot be exported.
        """
        if state.spec.quantized:
            raise RecipeError("prune: the model is quantized already; put this stage before the quantization")
        self._public(state, 0)
        if self.finetune is not None:
            data = state.data
            training.check(state.model, self.finetune, data.public, data.validation, data.preprocess)
        model = copy.deepcopy(state.model)
        graph = _trace(model.eval(), state)
        row = SCORES[self.score]
        if row.scales:
            compress.score(model, graph, self.score)
        scores = compress.score(model, graph, "l2" if row.needs == "losses" or row.scales else self.score,
                                generator=torch.Generator().manual_seed(0))  # fmt: skip
        # What is measured in a trained network, or by the clock, is guessed here.
        scope = "global" if self.scope == "sensitivity" else self.scope
        how: dict[str, Any] = {"scope": scope, "round_to": self.round_to, "min_keep": self.min_keep}
        if self.keep_latency is not None:
            guess = self._nearest(graph, graph.macs, self.keep_latency)
            plan = compress.plan(model, graph, scores, target=guess, **how)
        else:
            plan = compress.plan(model, graph, scores, target=self._target(state, model, graph, 1.0), **how)
        compress.remove_(model, plan)
        if self.keep_latency is not None:
            _milliseconds(model, state, seconds=0.0)
        facts = {"kept_parameters": plan.parameters_after / state.dense, "channels": _widths(plan)}
        return replace(state, spec=_spec(state, model), model=model.train()), facts

    def run(self, state: State, folder: StageFolder) -> Generator[Tick, None, State]:
        """Prunes; yields a tick for every part of the work. What takes long is saved after each part."""
        work = _Work.begin(self, state, folder)
        while work.step < self.steps:
            if (work.step or self.rewind) and not work.tuned:
                yield from work.tune_()
            yield work.tick(0, "tracing and scoring channels")
            plan = yield from work.plan()
            yield work.tick(1, "removing channels")
            dense, pruned = work.model, copy.deepcopy(work.model)
            compress.remove_(pruned, plan)
            error = compress.check_parity(dense, pruned, plan, _example(state))
            work.plans.append(plan)
            compress.remove_(work.early, plan)
            work.model = copy.deepcopy(work.early) if self.rewind else pruned
            yield work.tick(2, "restoring batch-norm statistics")
            before = _accuracy(work.model, state)
            restored = work.restore_()
            yield work.tick(3, "measuring")
            folder.record(**({"step": work.step + 1} if self.steps > 1 else {}), layers=_changes(work.plans),
                          accuracy_cut=before, accuracy_restored=_accuracy(work.model, state))  # fmt: skip
            work.step, work.tuned, work.points, work.tried = work.step + 1, False, [], []
            if work.step < self.steps:
                work.save()
        for number, plan in enumerate(work.plans, 1):
            name = "plan.json" if self.steps == 1 else f"plan-{number}.json"
            write_json(folder.path / name, plan.model_dump(mode="json"))
        yield work.tick(0)
        facts: dict[str, Any] = {
            "kept_parameters": work.plans[-1].parameters_after / state.dense,
            "parity_error": error,
            "whole_layers": dict(work.plans[0].whole),
            "restored_examples": restored,
        }
        if not restored and _has_batch_norm(work.model):
            facts["left"] = {"batch norms": "their statistics are those of the uncut network: there was no data"}
        return replace(state, spec=_spec(state, work.model), model=work.model, facts=facts)

    def _public(self, state: State, seed: int) -> Arrays | None:
        """Draws the public examples; None where no score, norm or curve looks at any."""
        measured = self.scope == "sensitivity" and not len(state.data.validation)
        norms = _has_batch_norm(state.model) and self.calibration > 0
        if SCORES[self.score].needs == "losses" or norms or measured:
            return calibration(state, self.calibration, seed)
        return None

    def _target(
        self, state: State, model: nn.Module, graph: ChannelGraph, part: float, start: float | None = None
    ) -> Target:
        """Returns the target of the cut that goes `part` of the way from the cost `start` (now) to the aim.

        Raises:
            RecipeError: if there is less left of the dense network than should stay.
        """
        key, value = self.aim
        cost: Cost
        dense: float | None = None
        if key == "max_bytes":
            cost, wanted = bytes_of(model, graph), value
        elif key == "keep_macs":
            cost, dense = graph.macs, compress.macs(state.spec.build_dense(), _example(state)[:1])
            wanted = value * dense
        else:
            cost, dense = graph.parameters, state.dense
            wanted = value * dense
        now = start or cost(whole(graph))
        if key != "max_bytes":
            _check_left(key, value, now * value / wanted)
        return Target(key, cost, now ** (1 - part) * wanted**part, limit=key == "max_bytes", whole=dense)

    def _nearest(self, graph: ChannelGraph, cost: Cost, share: float) -> Target:
        """Returns the target to come as near as the widths allow to `share` of the cost now, from below."""
        least = cost([allowed_widths(layer, self.round_to, self.min_keep)[0] for layer in graph.layers])
        return Target("keep_latency", cost, max(least, share * cost(whole(graph))), limit=True)


@dataclass
class _Work:
    """A stage at work. `early` is what the model was when the stage began, with the same channels gone.

    `tuned` says that the training before the present cut is done; `points` and `tried` are the sensitivities and the
    latencies measured for it so far; `start` is the cost from which the steps go down.
    """

    stage: PruneStage
    state: State
    folder: StageFolder
    public: Arrays | None
    model: nn.Module
    early: nn.Module
    fit: Mapping[str, Tensor]
    plans: list[PruningPlan]
    step: int
    tuned: bool
    points: list[Point]
    tried: list[tuple[float, float]]
    start: float | None
    began: float

    @classmethod
    def begin(cls, stage: PruneStage, state: State, folder: StageFolder) -> _Work:
        """Starts, or goes on from the last checkpoint in `folder`: cuts are made again from their plans."""
        tensors, saved = folder.load_progress()
        public = stage._public(state, derive(state.seed, "stage", folder.index))
        model = copy.deepcopy(state.model).to("cpu").eval()
        plans = [PruningPlan.model_validate(plan) for plan in saved.get("plans", [])]
        for plan in plans:
            compress.remove_(model, plan)
        early, fit = copy.deepcopy(model), {}
        if saved.get("fitting"):
            fit = tensors
        elif saved:
            model.load_state_dict({name.removeprefix("model/"): value for name, value in tensors.items()})
        return cls(
            stage, state, folder, public, model, early, fit, plans, saved.get("step", 0), saved.get("tuned", False),
            [Point(**point) for point in saved.get("points", [])], [(s, ms) for s, ms in saved.get("tried", [])],
            saved.get("start"), time.perf_counter() - saved.get("seconds", 0.0),
        )  # fmt: skip

    def save(self, tensors: Mapping[str, Tensor] | None = None, *, fitting: bool = False) -> None:
        """Saves where the work stands, with the model or the training of it."""
        self.folder.save_progress(
            tensors or {f"model/{name}": value for name, value in self.model.state_dict().items()},
            {
                "fitting": fitting,
                "plans": [plan.model_dump(mode="json") for plan in self.plans],
                "step": self.step,
                "tuned": self.tuned,
                "points": [asdict(point) for point in self.points],
                "tried": [list(pair) for pair in self.tried],
                "start": self.start,
                "seconds": time.perf_counter() - self.began,
            },
        )

    @property
    def _tuning(self) -> int:
        """Steps of one training."""
        s = self.stage.finetune
        return s.epochs * max(1, len(self.state.data.public) // s.batch_size) if s else 0

    def tick(self, part: int, note: str = "") -> Tick:
        """Tells of the present cut; one has four parts beside its training."""
        return Tick(self.step * (4 + self._tuning) + part + (self._tuning if self.step < self.stage.steps else 0),
                    self.stage.steps * (4 + self._tuning), note)  # fmt: skip

    def tune_(self) -> Iterator[Tick]:
        """Trains the model as `finetune` says, from the last checkpoint."""
        assert self.stage.finetune is not None
        data, seed = self.state.data, derive(self.state.seed, "stage", self.folder.index, "step", self.step)
        fit = Fit(self.model, self.stage.finetune, seed=seed, sparse=self.state.spec.sparse)
        if self.fit:
            fit.load_(dict(self.fit))
            self.fit = {}
        note = ""
        for event in fit.epochs(data.public, data.validation, data.preprocess):
            if isinstance(event, Step):
                yield replace(self.tick(event.done - self._tuning), note=note)
                continue
            self.folder.record(step=self.step + 1, epoch=event.epoch, epochs=event.epochs, loss=event.loss,
                               accuracy=event.accuracy)  # fmt: skip
            self.save(fit.state(), fitting=True)
            note = f"training before cut {self.step + 1}, epoch {event.epoch}/{event.epochs}, loss {event.loss:.3f}"
        self.model = fit.result_().to("cpu").eval()
        for tensor in (*self.model.parameters(), *self.model.buffers()):  # laid out as after a checkpoint
            tensor.data = tensor.data.contiguous()
        self.tuned = True

    def plan(self) -> Generator[Tick, None, PruningPlan]:
        """Scores the channels and plans the present cut, with what has to be measured for it."""
        stage, state, model = self.stage, self.state, self.model
        graph, chance = _trace(model, state), generator(state.seed, "prune", "random")
        how: dict[str, Any] = {"round_to": stage.round_to, "min_keep": stage.min_keep}
        scores: list[Tensor] = []
        if stage.strategy == "one-shot":
            scores = compress.score(model, graph, stage.score, losses=self.losses, generator=chance)
        if stage.scope == "sensitivity":
            yield from self._measure_sensitivity_(graph, scores)
        part = (self.step + 1) / stage.steps

        def cut(target: Target) -> PruningPlan:
            if stage.strategy == "single-channel":
                return compress.prune_single_channel(model, graph, stage.score, target=target, losses=self.losses,
                                                     generator=chance, **how)  # fmt: skip
            return compress.plan(model, graph, scores, target=target, scope=stage.scope, points=self.points, **how)

        if stage.keep_latency is None:
            if self.start is None:
                here = stage._target(state, model, graph, 0.0)
                self.start = here.wanted
            return cut(stage._target(state, model, graph, part, self.start))
        wanted = yield from self._wanted_latency(stage.keep_latency)
        while (share := next_share(self.tried, wanted)) is not None:
            target = stage._nearest(graph, graph.parameters, share)
            share = target.wanted / graph.parameters(whole(graph))
            if any(share == before for before, _ in self.tried):
                break
            yield self.tick(0, f"measuring the latency at {share:.1%} of the parameters")
            small = copy.deepcopy(model)
            compress.remove_(small, cut(target))
            self.tried.append((share, _milliseconds(small, state)))
            self.folder.record(latency={"share": share, "ms": self.tried[-1][1]})
            self.save()
        fast = [share for share, ms in self.tried if ms <= wanted]
        if not fast:
            share, ms = min(self.tried, key=lambda pair: pair[1])
            raise RecipeError(
                f"prune.keep_latency: got {stage.keep_latency:g}, that is {wanted:.3g} ms now, but the fastest cut "
                f"measured, {share:.1%} of the parameters, takes {ms:.3g} ms; raise keep_latency"
            )
        return cut(stage._nearest(graph, graph.parameters, max(fast)))

    def _wanted_latency(self, keep: float) -> Generator[Tick, None, float]:
        """Measures the dense network, and the present one; returns the milliseconds that the present cut may take."""
        yield self.tick(0, "measuring the latency of the uncut network")
        if not self.tried:
            self.tried = [(1.0, _milliseconds(self.model, self.state))]
        if self.start is None:
            cut = self.plans or self.state.spec.resized
            self.start = _milliseconds(self.state.spec.build_dense(), self.state) if cut else self.tried[0][1]
        if not self.plans:
            _check_left("keep_latency", keep, self.tried[0][1] / self.start)
        # Down from the network as the last cut left it, whose share of the way lies behind already.
        left = self.stage.steps - self.step
        now, aim = self.tried[0][1], keep * self.start
        return now ** (1 - 1 / left) * aim ** (1 / left)

    def _measure_sensitivity_(self, graph: ChannelGraph, scores: Sequence[Tensor]) -> Iterator[Tick]:
        """Measures each layer alone; what is saved already is not measured again."""
        data, model = self.state.data, self.model.to(training.device())
        public = data.validation if len(data.validation) else self.public
        assert public is not None
        some = public.take(torch.arange(len(public))[: self.stage.sensitivity_examples])
        units, known = compress.channel_units(model, graph, scores), list(self.points)
        for point in compress.sensitivity(
            units, lambda: _loss_and_accuracy(model, some, data.preprocess), self.stage.densities, known=known
        ):
            if point in known:
                continue
            self.points.append(point)
            self.folder.record(sensitivity=asdict(point))
            if point.density == min(self.stage.densities):
                self.save()
            yield self.tick(0, f"sensitivity of '{point.layer}' at {point.density:.0%}: loss {point.loss:.3f}")
        self.model = model.to("cpu")

    def losses(self) -> Iterator[Tensor]:
        """Runs the model over the public examples; one by one where the score wants the information of each."""
        assert self.public is not None
        for x, y in self.public.batches(1 if SCORES[self.stage.score].single else BATCH):
            yield F.cross_entropy(self.model(self.state.data.preprocess(x)), y)

    def restore_(self) -> int:
        """Restores the batch-norm statistics, and returns from how many examples; 0 where there is no batch norm."""
        if not _has_batch_norm(self.model) or self.public is None:
            return 0
        compress.restore_batch_norm_(self.model, (self.state.data.preprocess(x) for x, _ in self.public.batches(BATCH)))
        return len(self.public)


def _check_left(key: str, value: float, left: float) -> None:
    if value > left * (1 + 1e-9):
        what = {"keep_params": "parameters", "keep_macs": "multiply-adds", "keep_latency": "time"}[key]
        raise RecipeError(
            f"prune.{key}: got {value:g}, but an earlier stage has left {left:.4g} of the dense {what}; "
            "give a smaller share"
        )


def _loss_and_accuracy(model: nn.Module, examples: Arrays, preprocess: Any) -> tuple[float, float]:
    """Measures `model` while its norms take the statistics of each batch: as if they were restored, for one pass."""
    loss, right, at = 0.0, 0, training.device()
    with differentiable(model, (), batch_statistics=True), torch.no_grad():
        for x, y in examples.batches(BATCH):
            logits, labels = model(preprocess(x.to(at))).float(), y.to(at)
            loss += float(F.cross_entropy(logits, labels, reduction="sum"))
            right += int((logits.argmax(1) == labels).sum())
    return loss / len(examples), right / len(examples)


def _milliseconds(model: nn.Module, state: State, *, seconds: float = 0.5) -> float:
    """Times `model` in onnxruntime, on one example and one thread: the median."""
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "model.onnx"
        shape = state.spec.input_shape
        deploy.export_onnx(model, path, deploy.Job(shape, state.data.preprocess))
        return deploy.latency(path, shape, seconds=seconds).median_ms


def _example(state: State) -> Tensor:
    # Two examples: torch.export takes a batch of one for a constant.
    return torch.zeros(2, *state.spec.input_shape)


def _trace(model: nn.Module, state: State) -> ChannelGraph:
    with contextlib.redirect_stderr(io.StringIO()):  # torch.export prints its graph before it fails
        return compress.trace(model, _example(state))


def _accuracy(model: nn.Module, state: State) -> float | None:
    validation = state.data.validation
    return evaluate(model, validation, state.data.preprocess).accuracy if len(validation) else None


def _has_batch_norm(model: nn.Module) -> bool:
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats for m in model.modules())


def _spec(state: State, model: nn.Module) -> Any:
    return state.spec.model_copy(update=what_pruning_changed(model, state.spec.build_dense()))


def _changes(plans: Sequence[PruningPlan]) -> list[JsonValue]:
    """The width of each layer when the stage began, and now."""
    first = {change.name: change.before for change in plans[0].layers}
    return [{"name": c.name, "before": first.get(c.name, c.before), "after": c.after} for c in plans[-1].layers]


def _widths(plan: PruningPlan) -> str:
    return ", ".join(f"{c.before}→{c.after}" for c in plan.layers)
