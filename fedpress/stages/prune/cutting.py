"""The work of a prune stage: removes channels in one or several cuts, and trains between cuts."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
from pydantic import JsonValue
from torch import Tensor, nn

from fedpress import compress
from fedpress.compress import SCORES, ChannelGraph, PruningPlan, SensitivityPoint, Target
from fedpress.compress.prune.derivatives import differentiable
from fedpress.compress.prune.sensitivity import densities_down_to
from fedpress.compress.prune.targets import full_widths, next_share
from fedpress.core.examples import Arrays
from fedpress.core.inputs import call
from fedpress.core.outputs import as_float32
from fedpress.core.parameters import tensors_under
from fedpress.core.random import derive
from fedpress.core.random_source import public_stream
from fedpress.data import FederatedData
from fedpress.errors import RecipeError
from fedpress.nn.resize import copied
from fedpress.stages.base import DIFFERENCES
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
from fedpress.tasks.base import json_number
from fedpress.training.device import device_of
from fedpress.training.evaluate import evaluate
from fedpress.training.fit import Fit, Step
from fedpress.workspace.drive import Milestone, Snapshot
from fedpress.workspace.state import State, Tick

BATCH = 256
REFIT = 512
"""Largest number of public examples on which norms are fitted. So few are enough, because a channel
has only two parameters."""


class PruneWork:
    """The work of a prune stage.

    `fedpress.workspace.drive` runs it, and resumes it from checkpoints.

    Attributes:
        model: the present network, on the CPU.
        early: a copy of the network with the weights from the beginning of the stage, but without
            the channels removed so far. With the setting `rewind`, each cut resets the model to
            this copy.
        plans: the plans of all cuts so far.
        step: number of finished cuts.
        tuned: whether the training before the next cut is done.
        points: sensitivities measured so far for the next cut.
        tried: latencies measured so far for the next cut: (share of the parameters, milliseconds).
        start: cost before the first cut, such as the number of parameters; None until it is known.
        error: largest difference between the outputs before and after the last cut.
        restored: number of examples from which batch-norm statistics were recomputed.
        inexact: facts about the last cut if it was approximate (removed channels although outputs
            change); else empty.
    """

    def __init__(self, stage: PruneSettings, state: State, index: int) -> None:
        self.stage = stage
        self.source = state
        self.index = index
        self.public = public_examples(stage, state, derive(state.seed, "stage", index))
        self.model: nn.Module = copied(state.model).to("cpu").eval()
        self.early = copied(self.model)
        # `fit` is set during a training; `fit_state` holds an interrupted one from a checkpoint.
        self.fit: Fit | None = None
        self.fit_state: dict[str, Tensor] = {}
        self.plans: list[PruningPlan] = []
        self.step = 0
        self.tuned = False
        self.points: list[SensitivityPoint] = []
        self.tried: list[tuple[float, float]] = []
        self.start: float | None = None
        self.error = 0.0
        self.restored = 0
        self.inexact: dict[str, Any] = {}

    def state(self) -> Snapshot:
        """Returns a checkpoint: the model (or its present training), and the plans of all cuts."""
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
        """Continues from a checkpoint of the same stage and model."""
        facts = dict[str, Any](saved.facts)
        self.plans = [PruningPlan.model_validate(plan) for plan in facts["plans"]]
        # Repeating the cuts gives the model its shapes; the weights come from the checkpoint.
        for plan in self.plans:
            compress.remove_(self.model, plan)
        self.early = copied(self.model)
        if facts["fitting"]:
            self.fit_state = dict(saved.tensors)
        else:
            self.model.load_state_dict(tensors_under(saved.tensors, "model/"))
        self.step = facts["step"]
        self.tuned = facts["tuned"]
        self.start = facts["start"]
        self.points = [SensitivityPoint.from_json(point) for point in facts["points"]]
        self.tried = [(share, ms) for share, ms in facts["tried"]]

    def events(self) -> Iterator[Tick | Milestone]:
        """Cuts until the target is reached; trains between the cuts if the settings say so."""
        while self.step < self.stage.steps:
            # Without a rewind, the first cut is made on the model as it comes: it is trained
            # already.
            if (self.step or self.stage.rewind) and not self.tuned:
                yield from self.tune_()
            yield self.tick(0, "tracing and scoring channels")
            plan = yield from self.plan()
            yield self.tick(1, "removing channels")
            yield from self.cut_(plan)
        yield self.tick(0)

    def cut_(self, plan: PruningPlan) -> Iterator[Tick | Milestone]:
        """Removes the channels of `plan`, recomputes batch-norm statistics, measures the model."""
        # The original stays for the comparison of outputs below.
        dense = self.model
        pruned = copied(self.model)
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
        metric = self.source.data.task.primary
        before = self.score()
        self.restored = restore_norms_(self.model, self.source, self.public, batch=BATCH)
        yield self.tick(3, "measuring")
        record: dict[str, JsonValue] = {"step": self.step + 1} if self.stage.steps > 1 else {}
        record["layers"] = _changes(self.plans)
        record |= {f"{metric}_cut": before, f"{metric}_restored": self.score()}

        self.step += 1
        self.tuned = False
        self.points = []
        self.tried = []
        # After the last cut no checkpoint is needed: the finished stage is saved.
        yield Milestone(record, saves=self.step < self.stage.steps)

    def score(self) -> float | None:
        """Measures the task's main metric on the validation set; None without a validation set."""
        data = self.source.data
        if not len(data.validation):
            return None
        return json_number(evaluate(self.model, data.validation, data.preprocess, data.task).score)

    @property
    def _training_steps(self) -> int:
        """Optimizer steps of one training between two cuts."""
        settings = self.stage.finetune
        if settings is None:
            return 0
        return total_steps(settings.epochs, settings.batch_size, self.source)

    def tick(self, part: int, note: str = "") -> Tick:
        """Returns the progress: each cut counts as its training steps and four more steps.

        Args:
            part: how many of these four steps are done, 0 to 4. During the training, which comes
                before them: minus the number of training steps that remain.
            note: text beside the progress bar.
        """
        per_cut = 4 + self._training_steps
        trained = self._training_steps if self.step < self.stage.steps else 0
        return Tick(self.step * per_cut + trained + part, self.stage.steps * per_cut, note)

    def tune_(self) -> Iterator[Tick | Milestone]:
        """Trains the model with the settings `finetune`; continues an interrupted training."""
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
                # Negative, because the parts after the training count from 0.
                yield self.tick(event.done - self._training_steps)
                continue
            before = f"training before cut {self.step + 1}, "
            yield epoch_milestone(event, before=before, step=self.step + 1)
        self.fit = None
        self.model = fit.result_().to("cpu").eval()
        # A checkpoint stores contiguous tensors, and rounding depends on the memory layout. Without
        # this line an uninterrupted run would differ from a resumed run in the last bits.
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            tensor.data = tensor.data.contiguous()
        self.tuned = True

    def plan(self) -> Generator[Tick | Milestone, None, PruningPlan]:
        """Scores the channels and plans the next cut; measures sensitivity or latency if needed."""
        stage = self.stage
        state = self.source
        model = self.model
        graph = trace_channels(model, state, stage)
        chance = public_stream(state.seed, "prune", "random")
        widths: dict[str, Any] = {
            "round_to": stage.round_to,
            "min_keep": stage.min_keep,
            "exact": stage.exact,
        }
        scores: list[Tensor] = []
        if stage.strategy == "one-shot":
            scores = compress.score(model, graph, stage.score, losses=self.losses, generator=chance)
        if stage.scope == "sensitivity":
            yield from self._measure_sensitivity_(graph, scores)

        def plan_for(target: Target) -> PruningPlan:
            if stage.strategy == "single-channel":
                return compress.prune_single_channel(
                    model,
                    graph,
                    stage.score,
                    target=target,
                    losses=self.losses,
                    generator=chance,
                    **widths,
                )
            return compress.plan(
                model, graph, scores, target=target, scope=stage.scope, points=self.points, **widths
            )

        if stage.keep_latency is not None:
            return (yield from self._plan_latency(stage.keep_latency, graph, plan_for))
        if self.start is None:
            self.start = cut_target(stage, state, model, graph, 0.0).wanted
        part = (self.step + 1) / stage.steps
        return plan_for(cut_target(stage, state, model, graph, part, self.start))

    def _plan_latency(
        self, keep: float, graph: ChannelGraph, plan_for: Callable[[Target], PruningPlan]
    ) -> Generator[Tick | Milestone, None, PruningPlan]:
        """Plans a cut to a target latency; measures cuts to several shares of the parameters."""
        # Latency is not a sum over layers, so it cannot be computed from a plan.
        stage = self.stage
        wanted = yield from self._wanted_latency(keep)
        while (share := next_share(self.tried, wanted)) is not None:
            target = latency_target(stage, graph, graph.parameters, share)
            # The nearest share that the allowed numbers of channels give. It may have been measured
            # already.
            share = target.wanted / graph.parameters(full_widths(graph))
            if any(share == before for before, _ in self.tried):
                break
            yield self.tick(0, f"measuring the latency at {share:.1%} of the parameters")
            small = copied(self.model)
            compress.remove_(small, plan_for(target))
            self.tried.append((share, latency_ms(small, self.source)))
            # Saved, because a second measurement would differ, and a resumed run must not.
            yield Milestone({"latency": {"share": share, "ms": self.tried[-1][1]}})

        fast = [share for share, ms in self.tried if ms <= wanted]
        if not fast:
            share, ms = min(self.tried, key=lambda pair: pair[1])
            raise RecipeError(
                (
                    f"got {keep:g}, which is {wanted:.3g} ms in this cut, but the fastest "
                    f"network measured ({share:.1%} of the parameters) takes {ms:.3g} ms"
                ),
                place="keep_latency",
                cure="raise keep_latency",
            )
        return plan_for(latency_target(stage, graph, graph.parameters, max(fast)))

    def _wanted_latency(self, keep: float) -> Generator[Tick, None, float]:
        """Returns the target latency of this cut, in ms, from measured latencies.

        The dense network (as it was before any pruning) and the present network are measured.
        """
        yield self.tick(0, "measuring the latency before the cut")
        if not self.tried:
            self.tried = [(1.0, latency_ms(self.model, self.source))]
        now = self.tried[0][1]
        if self.start is None:
            smaller_than_dense = self.plans or self.source.spec.resized
            if smaller_than_dense:
                self.start = latency_ms(self.source.dense_network(), self.source)
            else:
                self.start = now
        if not self.plans:
            check_share_left("keep_latency", keep, now / self.start)
        # From the present latency on, each remaining cut reduces the latency by the same factor.
        left = self.stage.steps - self.step
        final = keep * self.start
        wanted: float = now ** (1 - 1 / left) * final ** (1 / left)
        return wanted

    def _measure_sensitivity_(
        self, graph: ChannelGraph, scores: Sequence[Tensor]
    ) -> Iterator[Tick | Milestone]:
        """Measures the loss of the model with one layer pruned at a time, at several densities.

        Points that a checkpoint contains are not measured again.
        """
        data = self.source.data
        model = self.model.to(self.source.device)
        public = data.validation if len(data.validation) else self.public
        assert public is not None
        some = public.take(torch.arange(len(public))[: self.stage.sensitivity_examples])
        units = compress.channel_units(model, graph, scores)
        known = list(self.points)
        densities = self.stage.densities
        # The default densities stop at `min_keep`, and where even the widest layer has only one
        # channel. Densities that the recipe gives are all measured.
        if "densities" not in self.stage.model_fields_set:
            one_channel = 1 / max(layer.channels for layer in graph.groups)
            densities = densities_down_to(max(self.stage.min_keep, one_channel), densities)
        points = compress.sensitivity(
            units, lambda: _loss_and_score(model, some, data), densities, known=known
        )
        for point in points:
            if point in known:
                continue
            self.points.append(point)
            # Saved only once per layer: a save takes as long as measuring a point.
            last_of_layer = point.density == min(densities)
            yield Milestone({"sensitivity": point.to_json(data.task.primary)}, saves=last_of_layer)
            note = f"'{point.layer}' at {point.density:.0%}: loss {point.loss:.3f}"
            yield self.tick(0, f"sensitivity of {note}")
        self.model = model.to("cpu")

    def losses(self) -> Iterator[Tensor]:
        """Yields losses of public examples, from which scores are computed.

        Usually there is one loss for each batch. Some scores need one loss for each example: the
        Fisher information is a sum of squared gradients of single examples.
        """
        assert self.public is not None
        # The gradient of a batch is a sum, from which gradients of single examples cannot be found.
        batch = 1 if SCORES[self.stage.score].per_example else BATCH
        for x, y in self.public.batches(batch):
            outputs = call(self.model, self.source.data.preprocess(x))
            yield self.source.data.task.loss(outputs, y)

    def refit_(
        self, dense: nn.Module, plan: PruningPlan
    ) -> Generator[Milestone, None, dict[str, Any]]:
        """Fits the scales of norms after an approximate cut, so that outputs change less.

        Args:
            dense: the network before the cut.
            plan: the plan of the cut; `plan.approximate` lists the norms whose channels were
                removed although this changes outputs.

        Yields:
            A milestone with the differences of the outputs.

        Returns:
            Entries of the result about the remaining difference to the outputs of `dense`; empty
            after an exact cut.
        """
        if not plan.approximate:
            return {}
        if self.public is None:
            batches = [self.source.spec.example(BATCH, torch.Generator().manual_seed(0))]
        else:
            some = self.public.take(torch.arange(min(len(self.public), REFIT)))
            batches = [self.source.data.preprocess(x) for x, _ in some.batches(BATCH)]
        cut = compress.output_difference(dense, self.model, batches)
        left = dict.fromkeys(plan.approximate, "its scale was not fitted: there was no data")
        if self.public is not None:
            left = compress.refit_norms_(dense, self.model, plan, batches)
        found = compress.output_difference(dense, self.model, batches)
        examples = sum(len(batch) for batch in batches)
        what = "public examples" if self.public is not None else "examples of noise"
        words = (
            f"outputs differ by {found.relative:.1%} from those before the cut on {examples} {what}"
        )
        if found.agreement is not None:
            words += f", with the same answer for {found.agreement:.1%}"
        fitted = len(plan.approximate) - len(left)
        if fitted:
            words += f"; {cut.relative:.1%} before the scales of {fitted} norms were fitted"
        norms: list[JsonValue] = list(plan.approximate)
        record: dict[str, JsonValue] = {
            "cut": cut.relative,
            "fitted": found.relative,
            "agreement": found.agreement,
            "norms": norms,
        }
        yield Milestone({"approximate": record}, saves=False)
        facts: dict[str, Any] = {
            "parity_error": found.relative,
            DIFFERENCES: {"approximate": words},
        }
        if left:
            facts["left"] = left
        return facts


def _loss_and_score(model: nn.Module, examples: Arrays, data: FederatedData) -> tuple[float, float]:
    """Returns the mean loss and the metric of `model` on `examples`."""
    loss = 0.0
    at = device_of(model)
    task = data.task
    sums: list[Sums] = []
    # Batch norms use the statistics of each batch. That imitates recomputed statistics, which would
    # need a second pass over the examples for every point.
    with differentiable(model, (), batch_statistics=True), torch.no_grad():
        for x, y in examples.batches(BATCH):
            outputs = as_float32(call(model, data.preprocess(x.to(at))))
            targets = y.to(at)
            loss += float(task.loss(outputs, targets, reduction="sum"))
            sums.append(task.score_sums(outputs, targets))
    return loss / len(examples), task.score(merged(*sums))


def _changes(plans: Sequence[PruningPlan]) -> list[JsonValue]:
    """Returns the number of channels of each layer, before the stage and now."""
    first = {layer.name: layer.before for layer in plans[0].layers}
    changes: list[JsonValue] = []
    for layer in plans[-1].layers:
        # A layer that only the last plan prunes is not in the first plan.
        before = first.get(layer.name, layer.before)
        changes.append({"name": layer.name, "before": before, "after": layer.after})
    return changes
