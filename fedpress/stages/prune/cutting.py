"""A prune stage at work: trains, scores, measures and plans each cut, and saves where it stands."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedpress import compress
from fedpress.compress import SCORES, ChannelGraph, Point, PruningPlan, Target
from fedpress.compress.prune.derivatives import differentiable
from fedpress.compress.prune.sensitivity import densities_down_to
from fedpress.compress.prune.targets import next_share, whole
from fedpress.core.examples import Arrays
from fedpress.core.random import derive, generator
from fedpress.errors import RecipeError
from fedpress.nn.resize import copied
from fedpress.stages.prune.settings import (
    PruneSettings,
    check_left,
    cut_target,
    has_batch_norm,
    latency_target,
    milliseconds,
    public_examples,
    traced,
)
from fedpress.training.device import device
from fedpress.training.fit import Fit, Step
from fedpress.workspace.folder import StageFolder
from fedpress.workspace.state import State, Tick

BATCH = 256
REFIT = 512  # public examples that norms are fitted on: two numbers for each channel need no more


@dataclass
class Cutting:
    """A stage at work. `early` is what the model was when the stage began, with the same channels gone.

    `tuned` says that the training before the present cut is done; `points` and `tried` are the sensitivities and the
    latencies measured for it so far; `start` is the cost from which the steps go down.
    """

    stage: PruneSettings
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
    def begin(cls, stage: PruneSettings, state: State, folder: StageFolder) -> Cutting:
        """Starts, or goes on from the last checkpoint in `folder`: cuts are made again from their plans."""
        tensors, saved = folder.load_progress()
        public = public_examples(stage, state, derive(state.seed, "stage", folder.index))
        model = copied(state.model).to("cpu").eval()
        plans = [PruningPlan.model_validate(plan) for plan in saved.get("plans", [])]
        for plan in plans:
            compress.remove_(model, plan)
        early, fit = copied(model), {}
        if saved.get("fitting"):
            fit = tensors
        elif saved:
            model.load_state_dict(
                {name.removeprefix("model/"): value for name, value in tensors.items()}
            )
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
        data, seed = (
            self.state.data,
            derive(self.state.seed, "stage", self.folder.index, "step", self.step),
        )
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
        for tensor in (
            *self.model.parameters(),
            *self.model.buffers(),
        ):  # laid out as after a checkpoint
            tensor.data = tensor.data.contiguous()
        self.tuned = True

    def plan(self) -> Generator[Tick, None, PruningPlan]:
        """Scores the channels and plans the present cut, with what has to be measured for it."""
        stage, state, model = self.stage, self.state, self.model
        graph, chance = traced(model, state, stage), generator(state.seed, "prune", "random")
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
            share = target.wanted / graph.parameters(whole(graph))
            if any(share == before for before, _ in self.tried):
                break
            yield self.tick(0, f"measuring the latency at {share:.1%} of the parameters")
            small = copied(model)
            compress.remove_(small, cut(target))
            self.tried.append((share, milliseconds(small, state)))
            self.folder.record(latency={"share": share, "ms": self.tried[-1][1]})
            self.save()
        fast = [share for share, ms in self.tried if ms <= wanted]
        if not fast:
            share, ms = min(self.tried, key=lambda pair: pair[1])
            raise RecipeError(
                f"prune.keep_latency: got {stage.keep_latency:g}, that is {wanted:.3g} ms now, but the fastest cut "
                f"measured, {share:.1%} of the parameters, takes {ms:.3g} ms; raise keep_latency"
            )
        return cut(latency_target(stage, graph, graph.parameters, max(fast)))

    def _wanted_latency(self, keep: float) -> Generator[Tick, None, float]:
        """Measures the dense network, and the present one; returns the milliseconds that the present cut may take."""
        yield self.tick(0, "measuring the latency of the uncut network")
        if not self.tried:
            self.tried = [(1.0, milliseconds(self.model, self.state))]
        if self.start is None:
            cut = self.plans or self.state.spec.resized
            self.start = (
                milliseconds(self.state.spec.build_dense(), self.state) if cut else self.tried[0][1]
            )
        if not self.plans:
            check_left("keep_latency", keep, self.tried[0][1] / self.start)
        # Down from the network as the last cut left it, whose share of the way lies behind already.
        left = self.stage.steps - self.step
        now, aim = self.tried[0][1], keep * self.start
        return now ** (1 - 1 / left) * aim ** (1 / left)

    def _measure_sensitivity_(
        self, graph: ChannelGraph, scores: Sequence[Tensor]
    ) -> Iterator[Tick]:
        """Measures each layer alone; what is saved already is not measured again."""
        data, model = self.state.data, self.model.to(device())
        public = data.validation if len(data.validation) else self.public
        assert public is not None
        some = public.take(torch.arange(len(public))[: self.stage.sensitivity_examples])
        units, known = compress.channel_units(model, graph, scores), list(self.points)
        densities = self.stage.densities
        if (
            "densities" not in self.stage.model_fields_set
        ):  # those that a user names are measured as they are
            one_channel = 1 / max(layer.channels for layer in graph.layers)
            densities = densities_down_to(max(self.stage.min_keep, one_channel), densities)
        for point in compress.sensitivity(
            units, lambda: _loss_and_accuracy(model, some, data.preprocess), densities, known=known
        ):
            if point in known:
                continue
            self.points.append(point)
            self.folder.record(sensitivity=asdict(point))
            if point.density == min(densities):
                self.save()
            yield self.tick(
                0, f"sensitivity of '{point.layer}' at {point.density:.0%}: loss {point.loss:.3f}"
            )
        self.model = model.to("cpu")

    def losses(self) -> Iterator[Tensor]:
        """Runs the model over the public examples; one by one where the score wants the information of each."""
        assert self.public is not None
        for x, y in self.public.batches(1 if SCORES[self.stage.score].single else BATCH):
            yield F.cross_entropy(self.model(self.state.data.preprocess(x)), y)

    def refit_(self, dense: nn.Module, plan: PruningPlan) -> dict[str, Any]:
        """Fits the norms that were cut through, and returns how far the outputs are from those of `dense`."""
        if not plan.approximate:
            return {}
        if self.public is None:
            shape = (BATCH, *self.state.spec.input_shape)
            batches = [torch.randn(shape, generator=torch.Generator().manual_seed(0))]
        else:
            some = self.public.take(torch.arange(min(len(self.public), REFIT)))
            batches = [self.state.data.preprocess(x) for x, _ in some.batches(BATCH)]
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
        self.folder.record(approximate={**record, "norms": list(plan.approximate)})
        return {
            "parity_error": found.relative,
            "told": {"approximate": told},
            **({"left": left} if left else {}),
        }

    def restore_(self) -> int:
        """Restores the batch-norm statistics, and returns from how many examples; 0 where there is no batch norm."""
        if not has_batch_norm(self.model) or self.public is None:
            return 0
        compress.restore_batch_norm_(
            self.model, (self.state.data.preprocess(x) for x, _ in self.public.batches(BATCH))
        )
        return len(self.public)


def _loss_and_accuracy(model: nn.Module, examples: Arrays, preprocess: Any) -> tuple[float, float]:
    """Measures `model` while its norms take the statistics of each batch: as if they were restored, for one pass."""
    loss, right, at = 0.0, 0, device()
    with differentiable(model, (), batch_statistics=True), torch.no_grad():
        for x, y in examples.batches(BATCH):
            logits, labels = model(preprocess(x.to(at))).float(), y.to(at)
            loss += float(F.cross_entropy(logits, labels, reduction="sum"))
            right += int((logits.argmax(1) == labels).sum())
    return loss / len(examples), right / len(examples)
