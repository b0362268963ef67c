"""A prune stage at work: trains, scores, measures and plans each cut, and saves where it stands."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
from pydantic import JsonValue
from torch import Tensor, nn

from fedpress import compress
from fedpress.compress import SCORES, ChannelGraph, Point, PruningPlan, Target
from fedpress.compress.prune.derivatives import differentiable
from fedpress.compress.prune.sensitivity import densities_down_to
from fedpress.compress.prune.targets import full_widths, next_share
from fedpress.core.examples import Arrays
from fedpress.core.inputs import call
from fedpress.core.parameters import part_of
from fedpress.core.random import derive
from fedpress.core.random_source import public_stream
from fedpress.data import FederatedData
from fedpress.errors import RecipeError
from fedpress.nn.resize import copied
from fedpress.stages.epochs import epoch_milestone, total_steps, train_epochs
from fedpress.stages.prune.settings import (
    PruneSettings,
    check_share_left,
    cut_target,
    example_input,
    latency_ms,
    latency_target,
    public_examples,
    trace_channels,
)
from fedpress.stages.public import restore_norms_
from fedpress.tasks import Sums, merged
from fedpress.tasks.base import number
from fedpress.training.device import device_of
from fedpress.training.evaluate import evaluate
from fedpress.training.fit import Fit, Step
from fedpress.workspace.drive import Milestone, Snapshot
from fedpress.workspace.state import State, Tick

BATCH = 256
REFIT = 512  # public examples that norms are fitted on: two numbers for each channel need no more


class PruneWork:
    """A prune stage at work.

    Attributes:
        model: the network as it is now, on the CPU.
        early: what it was when the stage began, with the same channels gone.
        plans: what was cut so far.
        step: how many cuts are done.
        tuned: whether the training before the present cut is done.
        points: the sensitivities that were measured for the present cut so far.
        tried: shares of the parameters and the milliseconds that they took, likewise.
        start: the cost from which the steps go down; None until it is known.
        error: the largest difference between the outputs before and after the last cut.
        restored: from how many examples the batch norms have their statistics.
        inexact: what has to be said of a last cut that was not exact.
    """

    def __init__(self, stage: PruneSettings, state: State, index: int) -> None:
        self.stage, self.source, self.index = stage, state, index
        self.public = public_examples(stage, state, derive(state.seed, "stage", index))
        self.model: nn.Module = copied(state.model).to("cpu").eval()
        self.early = copied(self.model)
        self.fit: Fit | None = None  # while it trains
        self.fit_state: dict[str, Tensor] = {}  # of an interrupted training
        self.plans: list[PruningPlan] = []
        self.step, self.tuned = 0, False
        self.points: list[Point] = []
        self.tried: list[tuple[float, float]] = []
        self.start: float | None = None
        self.error, self.restored = 0.0, 0
        self.inexact: dict[str, Any] = {}

    def state(self) -> Snapshot:
        """Returns where the work stands, with the model or the training of it; cuts are made again from their plans."""
        tensors = {f"model/{name}": value for name, value in self.model.state_dict().items()}
        facts: dict[str, Any] = {
            "fitting": self.fit is not None,
            "plans": [plan.model_dump(mode="json") for plan in self.plans],
            "step": self.step,
            "tuned": self.tuned,
            "points": [asdict(point) for point in self.points],
            "tried": [list(pair) for pair in self.tried],
            "start": self.start,
        }
        return Snapshot(self.fit.state() if self.fit else tensors, facts)

    def load_(self, saved: Snapshot) -> None:
        """Takes up the work of the same stage on the same model."""
        facts = dict[str, Any](saved.facts)
        self.plans = [PruningPlan.model_validate(plan) for plan in facts["plans"]]
        for plan in self.plans:
            compress.remove_(self.model, plan)
        self.early = copied(self.model)
        if facts["fitting"]:
            self.fit_state = dict(saved.tensors)
        else:
            self.model.load_state_dict(part_of(saved.tensors, "model/"))
        self.step, self.tuned, self.start = facts["step"], facts["tuned"], facts["start"]
        self.points = [Point.of(point) for point in facts["points"]]
        self.tried = [(share, ms) for share, ms in facts["tried"]]

    def events(self) -> Iterator[Tick | Milestone]:
        """Cuts until the target is reached, and trains between the cuts as the settings say."""
        while self.step < self.stage.steps:
            if (self.step or self.stage.rewind) and not self.tuned:
                yield from self.tune_()
            yield self.tick(0, "tracing and scoring channels")
            plan = yield from self.plan()
            yield self.tick(1, "removing channels")
            yield from self.cut_(plan)
        yield self.tick(0)

    def cut_(self, plan: PruningPlan) -> Iterator[Tick | Milestone]:
        """Removes the channels of `plan`, restores what statistics the norms hold, and measures."""
        dense, pruned = self.model, copied(self.model)
        compress.remove_(pruned, plan)
        self.error = compress.check_parity(dense, pruned, plan, example_input(self.source))
        self.plans.append(plan)
        compress.remove_(self.early, plan)
        self.inexact = {}
        if self.stage.rewind:
            self.model = copied(self.early)
        else:
            self.model = pruned
            self.inexact = yield from self.refit_(dense, plan)

        yield self.tick(2, "restoring batch-norm statistics")
        before, metric = self.score(), self.source.data.task.primary
        self.restored = restore_norms_(self.model, self.source, self.public, batch=BATCH)
        yield self.tick(3, "measuring")
        record: dict[str, JsonValue] = {"step": self.step + 1} if self.stage.steps > 1 else {}
        record["layers"] = _changes(self.plans)
        record |= {f"{metric}_cut": before, f"{metric}_restored": self.score()}

        self.step, self.tuned, self.points, self.tried = self.step + 1, False, [], []
        yield Milestone(record, saves=self.step < self.stage.steps)

    def score(self) -> float | None:
        """Measures the primary metric of the model on the validation set; None without one."""
        data = self.source.data
        if not len(data.validation):
            return None
        return number(evaluate(self.model, data.validation, data.preprocess, data.task).score)

    @property
    def _tuning(self) -> int:
        """Steps of one training."""
        s = self.stage.finetune
        return total_steps(s.epochs, s.batch_size, self.source) if s else 0

    def tick(self, part: int, note: str = "") -> Tick:
        """Tells of the present cut; one has four parts beside its training."""
        of_one = 4 + self._tuning
        trained = self._tuning if self.step < self.stage.steps else 0
        return Tick(self.step * of_one + trained + part, self.stage.steps * of_one, note)

    def tune_(self) -> Iterator[Tick | Milestone]:
        """Trains the model as `finetune` says, from where an interrupted training stood."""
        assert self.stage.finetune is not None
        seed = derive(self.source.seed, "stage", self.index, "step", self.step)
        fit = Fit(
            self.model,
            self.stage.finetune,
            task=self.source.data.task,
            seed=seed,
            sparse=self.source.spec.sparse,
            device=self.source.device,
        )
        self.fit = fit
        if self.fit_state:
            fit.load_(self.fit_state)
            self.fit_state = {}
        for event in train_epochs(fit, self.source):
            if isinstance(event, Step):
                yield self.tick(event.done - self._tuning)
                continue
            before = f"training before cut {self.step + 1}, "
            yield epoch_milestone(event, before=before, step=self.step + 1)
        self.fit = None
        self.model = fit.result_().to("cpu").eval()
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            tensor.data = tensor.data.contiguous()  # laid out as after a checkpoint
        self.tuned = True

    def plan(self) -> Generator[Tick | Milestone, None, PruningPlan]:
        """Scores the channels and plans the present cut, with what has to be measured for it."""
        stage, state, model = self.stage, self.source, self.model
        graph, chance = (
            trace_channels(model, state, stage),
            public_stream(state.seed, "prune", "random"),
        )
        how: dict[str, Any] = {
            "round_to": stage.round_to,
            "min_keep": stage.min_keep,
            "exact": stage.exact,
        }
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
            return compress.plan(
                model, graph, scores, target=target, scope=stage.scope, points=self.points, **how
            )

        if stage.keep_latency is None:
            if self.start is None:
                here = cut_target(stage, state, model, graph, 0.0)
                self.start = here.wanted
            return cut(cut_target(stage, state, model, graph, part, self.start))
        wanted = yield from self._wanted_latency(stage.keep_latency)
        while (share := next_share(self.tried, wanted)) is not None:
            target = latency_target(stage, graph, graph.parameters, share)
            share = target.wanted / graph.parameters(full_widths(graph))
            if any(share == before for before, _ in self.tried):
                break
            yield self.tick(0, f"measuring the latency at {share:.1%} of the parameters")
            small = copied(model)
            compress.remove_(small, cut(target))
            self.tried.append((share, latency_ms(small, state)))
            yield Milestone({"latency": {"share": share, "ms": self.tried[-1][1]}})
        fast = [share for share, ms in self.tried if ms <= wanted]
        if not fast:
            share, ms = min(self.tried, key=lambda pair: pair[1])
            raise RecipeError(
                (
                    f"got {stage.keep_latency:g}, that is {wanted:.3g} ms now, but the fastest cut "
                    f"measured, {share:.1%} of the parameters, takes {ms:.3g} ms"
                ),
                place="keep_latency",
                cure="raise keep_latency",
            )
        return cut(latency_target(stage, graph, graph.parameters, max(fast)))

    def _wanted_latency(self, keep: float) -> Generator[Tick, None, float]:
        """Measures the dense network, and the present one; returns the milliseconds that the present cut may take."""
        yield self.tick(0, "measuring the latency of the uncut network")
        if not self.tried:
            self.tried = [(1.0, latency_ms(self.model, self.source))]
        if self.start is None:
            cut = self.plans or self.source.spec.resized
            self.start = (
                latency_ms(self.source.spec.build_dense(), self.source) if cut else self.tried[0][1]
            )
        if not self.plans:
            check_share_left("keep_latency", keep, self.tried[0][1] / self.start)
        # Down from the network as the last cut left it, whose share of the way lies behind already.
        left = self.stage.steps - self.step
        now, aim = self.tried[0][1], keep * self.start
        size: float = now ** (1 - 1 / left) * aim ** (1 / left)
        return size

    def _measure_sensitivity_(
        self, graph: ChannelGraph, scores: Sequence[Tensor]
    ) -> Iterator[Tick | Milestone]:
        """Measures each layer alone; what is saved already is not measured again."""
        data, model = self.source.data, self.model.to(self.source.device)
        public = data.validation if len(data.validation) else self.public
        assert public is not None
        some = public.take(torch.arange(len(public))[: self.stage.sensitivity_examples])
        units, known = compress.channel_units(model, graph, scores), list(self.points)
        densities = self.stage.densities
        if (
            "densities" not in self.stage.model_fields_set
        ):  # those that a user names are measured as they are
            one_channel = 1 / max(layer.channels for layer in graph.groups)
            densities = densities_down_to(max(self.stage.min_keep, one_channel), densities)
        for point in compress.sensitivity(
            units, lambda: _loss_and_score(model, some, data), densities, known=known
        ):
            if point in known:
                continue
            self.points.append(point)
            yield Milestone(
                {"sensitivity": point.line(data.task.primary)},
                saves=point.density == min(densities),
            )
            yield self.tick(
                0, f"sensitivity of '{point.layer}' at {point.density:.0%}: loss {point.loss:.3f}"
            )
        self.model = model.to("cpu")

    def losses(self) -> Iterator[Tensor]:
        """Runs the model over the public examples; one by one where the score wants the information of each."""
        assert self.public is not None
        for x, y in self.public.batches(1 if SCORES[self.stage.score].per_example else BATCH):
            outputs = call(self.model, self.source.data.preprocess(x))
            yield self.source.data.task.loss(outputs, y)

    def refit_(
        self, dense: nn.Module, plan: PruningPlan
    ) -> Generator[Milestone, None, dict[str, Any]]:
        """Fits the norms that were cut through, and returns how far the outputs are from those of `dense`."""
        if not plan.approximate:
            return {}
        if self.public is None:
            batches = [self.source.spec.example(BATCH, torch.Generator().manual_seed(0))]
        else:
            some = self.public.take(torch.arange(min(len(self.public), REFIT)))
            batches = [self.source.data.preprocess(x) for x, _ in some.batches(BATCH)]
        cut = compress.difference(dense, self.model, batches)
        left = dict.fromkeys(plan.approximate, "its scale was not fitted: there was no data")
        if self.public is not None:
            left = compress.refit_norms_(dense, self.model, plan, batches)
        found = compress.difference(dense, self.model, batches)
        examples = sum(len(batch) for batch in batches)
        what = "public examples" if self.public is not None else "examples of noise"
        agreeing = (
            "" if found.agreement is None else f", with the same answer for {found.agreement:.1%}"
        )
        fitted = len(plan.approximate) - len(left)
        told = f"{found.relative:.1%} off the outputs of the uncut network on {examples} {what}{agreeing}"
        if fitted:
            told += f"; {cut.relative:.1%} before the scales of {fitted} norms were fitted"
        record: dict[str, Any] = {
            "cut": cut.relative,
            "fitted": found.relative,
            "agreement": found.agreement,
        }
        norms: list[JsonValue] = list(plan.approximate)
        yield Milestone({"approximate": {**record, "norms": norms}}, saves=False)
        return {
            "parity_error": found.relative,
            "told": {"approximate": told},
            **({"left": left} if left else {}),
        }


def _loss_and_score(model: nn.Module, examples: Arrays, data: FederatedData) -> tuple[float, float]:
    """Measures `model` while its norms take the statistics of each batch: as if they were restored, for one pass."""
    loss, at, task = 0.0, device_of(model), data.task
    sums: list[Sums] = []
    with differentiable(model, (), batch_statistics=True), torch.no_grad():
        for x, y in examples.batches(BATCH):
            outputs, targets = call(model, data.preprocess(x.to(at))).float(), y.to(at)
            loss += float(task.loss(outputs, targets, reduction="sum"))
            sums.append(task.score_sums(outputs, targets))
    return loss / len(examples), task.score(merged(*sums))


def _changes(plans: Sequence[PruningPlan]) -> list[JsonValue]:
    """The width of each layer when the stage began, and now."""
    first = {change.name: change.before for change in plans[0].layers}
    return [
        {"name": c.name, "before": first.get(c.name, c.before), "after": c.after}
        for c in plans[-1].layers
    ]
