"""The training of a sparsify stage: pruned weights stay zero, and a schedule says when to prune."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

from pydantic import JsonValue
from torch import Tensor

from fedpress.compress.prune.derivatives import differentiable
from fedpress.compress.prune.sensitivity import (
    SensitivityPoint,
    densities_down_to,
    sensitivity,
    weight_unit,
)
from fedpress.compress.sparse import (
    Masks,
    Movement,
    Pattern,
    WeightScoreInputs,
    apply_masks_,
    cubic_density,
    density_of,
    drop_share,
    iterative_density,
    regrow,
    score_weights,
)
from fedpress.compress.sparse.levels import lowest_densities
from fedpress.compress.sparse.scores import gradients
from fedpress.core.examples import Arrays, Preprocess
from fedpress.core.inputs import call
from fedpress.core.parameters import tensors_under
from fedpress.core.random_source import public_stream
from fedpress.nn.batch_norm import has_batch_norm
from fedpress.stages.epochs import epoch_milestone, total_steps, train_epochs
from fedpress.stages.public import draw_calibration, restore_norms_
from fedpress.stages.sparsify.masks import choose_masks, weights_to_prune
from fedpress.stages.sparsify.settings import FROM_DATA, SparsifySettings
from fedpress.stages.zeros import allowed_masks
from fedpress.training.evaluate import evaluate
from fedpress.training.fit import Fit, Step
from fedpress.workspace.drive import Milestone, Snapshot
from fedpress.workspace.state import State, Tick

BATCH = 128
SENSITIVITY = 512
"""Largest number of public examples on which the sensitivity of the layers is measured."""


class MaskedTraining:
    """A training with masks; `fedpress.workspace.drive` runs it and resumes it from checkpoints.

    Attributes:
        weights: the weights that are pruned.
        density: share of the entries of these weights to keep at the end.
        allowed: masks of earlier stages; an entry that they prune stays pruned.
        masks: name of a weight -> mask of the entries that are kept now.
        rounds: number of trainings; more than one only for the schedule "rewind".
        round: number of the present training, from 0.
        resumed: whether a checkpoint was loaded. Then the schedule has already done its work before
            the first step.
        early: state of the training at epoch `rewind_to`; empty before this epoch.
        points: sensitivities, measured before the first cut.
    """

    def __init__(self, stage: SparsifySettings, state: State, seed: int) -> None:
        self.stage = stage
        self.source = state
        self.data = state.data
        self.seed = seed
        self.fit = Fit(
            state.model,
            stage,
            task=state.data.task,
            seed=seed,
            sparse=state.spec.sparse,
            device=state.device,
        )
        self.weights = weights_to_prune(stage, self.fit.model, state)
        self.density = stage.target(self.weights)
        self.allowed = allowed_masks(self.fit.model, state, self.weights)
        self.masks = self.allowed
        # Weights that this stage does not prune may have zeros of earlier stages, which stay.
        chosen = {id(w.value) for w in self.weights.chosen}
        self.others = [pair for pair in self.fit.zeros if id(pair[0]) not in chosen]
        self.movement = Movement(self.weights.chosen) if stage.score == "movement" else None
        self.rounds = 1 + stage.rounds if stage.schedule == "rewind" else 1
        self.round = 0
        self.resumed = False
        self.early: dict[str, Tensor] = {}
        self.points: list[SensitivityPoint] = []

    @property
    def steps(self) -> int:
        """Optimizer steps of one training."""
        return total_steps(self.stage.epochs, self.stage.batch_size, self.source)

    def events(self) -> Iterator[Tick | Milestone]:
        """Trains the model; with "rewind" several times, each time again from the early weights."""
        if not self.resumed:
            self.schedule_(0)
        watching = self.movement.recording() if self.movement else nullcontext()
        with watching:
            # If `rewind_to` is 0, the state before the training must be stored.
            self.note_epoch_()
            while True:
                yield from self.train_()
                if self.round + 1 >= self.rounds:
                    return
                self.round += 1
                last = self.rounds - 1
                start = density_of(self.allowed)
                # The trained weights are scored first. Then they are reset to the early weights.
                self.cut_(iterative_density(self.round, last, start=start, end=self.density))
                self.fit.load_(self.early)
                self.keep_(self.masks)

    def train_(self) -> Iterator[Tick | Milestone]:
        """Trains to the last epoch; after each step, the schedule may prune."""
        for event in train_epochs(self.fit, self.source):
            if isinstance(event, Step):
                self.schedule_(event.done)
                yield Tick(event.done + self.round * event.total, event.total * self.rounds)
                continue
            density = density_of(self.masks)
            self.note_epoch_()
            more = f", density {density:.1%}"
            yield epoch_milestone(event, more=more, cut=self.round, density=density)

    def schedule_(self, step: int) -> None:
        """Calls the schedule, before the first step (`step` = 0) or after step number `step`."""
        SCHEDULES[self.stage.schedule](self, step)

    def note_epoch_(self) -> None:
        """At epoch `rewind_to`, stores the state of the training: weights and momentum."""
        if self.rounds > 1 and not self.early and self.fit.epoch == self.stage.rewind_to:
            self.early = {name: value.detach().clone() for name, value in self.fit.state().items()}

    def cut_(self, density: float) -> None:
        """Scores the kept entries and prunes the lowest, so that the share `density` remains."""
        evidence = WeightScoreInputs(
            self.fit.model,
            self.weights.chosen,
            self.losses if self.stage.score in FROM_DATA else None,
            public_stream(self.seed, "score"),
            self.movement.sums if self.movement else None,
        )
        scores = score_weights(self.stage.score, evidence)
        # Measured only before the first cut: it takes a pass over the examples for each layer and
        # density.
        if self.stage.scope == "sensitivity" and not self.points:
            units = [weight_unit(w.name, w.value, scores[w.name]) for w in self.weights.chosen]
            lowest = min(lowest_densities(self.weights.chosen, self.density).values())
            self.points = list(sensitivity(units, self.measure, densities_down_to(lowest)))
        masks = choose_masks(
            self.stage, self.weights.chosen, scores, density, self.masks, self.points
        )
        self.keep_(masks)

    def measure(self) -> tuple[float, float]:
        """Returns the loss and the primary metric on public examples."""
        some = draw_calibration(self.source, min(self.stage.calibration, SENSITIVITY), self.seed)
        found = evaluate(self.fit.model, some, self.data.preprocess, self.data.task)
        return found.loss, found.score

    def regrow_(self, share: float, step: int) -> None:
        """Replaces some kept entries of each layer by pruned entries (RigL).

        The smallest kept entries are pruned. The same number of pruned entries with the largest
        gradients is kept instead. New entries start at 0 and without momentum (Evci et al. 2020,
        section 3).

        Args:
            share: share of each layer's kept entries to replace.
            step: number of the training step, for the random batch.
        """
        chance = public_stream(self.seed, "regrow", step)
        # A new batch, because the batch of the last training step is not known here.
        index = chance.integers(len(self.data.public), self.stage.batch_size)
        values = [w.value for w in self.weights.chosen]
        # The training computes no gradients for pruned entries, so all gradients are computed here.
        with differentiable(self.fit.model, values, batch_statistics=True):
            losses = self._losses(self.data.public.take(index), len(index))
            steep = gradients(losses, self.weights.chosen)
        pattern = Pattern.parse(self.stage.pattern)
        masks = regrow(
            self.weights.chosen, self.masks, steep, pattern, share=share, within=self.allowed
        )
        for w in self.weights.chosen:
            self.fit.optimizers.forget_(w.value, masks[w.name] & ~self.masks[w.name])
        self.keep_(masks)

    def keep_(self, masks: Masks) -> None:
        """Sets the entries that `masks` prunes to zero, now and after every training step."""
        self.masks = masks
        apply_masks_(self.weights.chosen, masks)
        own = [(w.value, ~masks[w.name]) for w in self.weights.chosen]
        self.fit.zeros = [*self.others, *own]

    def losses(self) -> Iterator[Tensor]:
        """Yields losses of public examples: of batches, or of single examples for "fisher"."""
        drawn = draw_calibration(self.source, self.stage.calibration, self.seed)
        return self._losses(drawn, 1 if self.stage.score == "fisher" else BATCH)

    def _losses(self, examples: Arrays, batch: int) -> Iterator[Tensor]:
        prepare: Preprocess = self.data.preprocess
        for x, y in examples.batches(batch):
            at = self.fit.device
            yield self.data.task.loss(call(self.fit.model, prepare(x.to(at))), y.to(at))

    def restore_norms_(self) -> None:
        """Recomputes the statistics of batch norms on public examples.

        With `ema` (averaged weights) the old statistics are partly from before the last cut.
        Without training they belong to the dense network.
        """
        if has_batch_norm(self.fit.model) and len(self.data.public):
            drawn = draw_calibration(self.source, self.stage.calibration, self.seed)
            restore_norms_(self.fit.model, self.source, drawn, batch=BATCH)

    def state(self) -> Snapshot:
        """Returns the training's state and masks, for a checkpoint."""
        tensors = self.fit.state()
        tensors |= {f"mask/{name}": mask for name, mask in self.masks.items()}
        tensors |= {f"early/{name}": value for name, value in self.early.items()}
        if self.movement:
            tensors |= {f"moved/{name}": value for name, value in self.movement.sums.items()}
        points: list[JsonValue] = [asdict(point) for point in self.points]
        return Snapshot(tensors, {"round": self.round, "points": points})

    def load_(self, saved: Snapshot) -> None:
        """Continues from a checkpoint of the same model and settings."""
        tensors = saved.tensors
        facts = dict[str, Any](saved.facts)
        self.fit.load_(dict(tensors))
        self.resumed = True
        self.round = facts["round"]
        self.early = tensors_under(tensors, "early/")
        self.points = [SensitivityPoint.from_json(point) for point in facts["points"]]
        # A checkpoint is loaded to the CPU, so its masks must be moved.
        masks = tensors_under(tensors, "mask/")
        self.keep_({name: mask.to(self.fit.device) for name, mask in masks.items()})
        if self.movement:
            for name, value in tensors_under(tensors, "moved/").items():
                self.movement.sums[name].copy_(value)


def _one_shot(work: MaskedTraining, step: int) -> None:
    """Prunes before the first step."""
    if step == 0:
        work.cut_(work.density)


def _gradual(work: MaskedTraining, step: int) -> None:
    """Prunes in steps from `begin` to `until`; at `until` the final density is reached."""
    first = round(work.stage.begin * work.steps)
    last = max(1, round(work.stage.until * work.steps))
    due = (step - first) % work.stage.every == 0 or step == last
    if not (first <= step <= last and due):
        return
    start = density_of(work.allowed)
    progress = (step - first) / max(1, last - first)
    density = cubic_density(progress, start=start, end=work.density)
    # At the first step the cubic function still has its initial value: nothing to prune.
    if density < start:
        work.cut_(density)


def _rewind(work: MaskedTraining, step: int) -> None:
    """Does nothing during a training: the cuts come between trainings, see `events`."""


def _rigl(work: MaskedTraining, step: int) -> None:
    """Prunes before the first step; then, before `until`, replaces fewer and fewer entries."""
    last = work.stage.until * work.steps
    if step == 0:
        work.cut_(work.density)
    elif step % work.stage.every == 0 and step < last:
        work.regrow_(drop_share(step / last, work.stage.drop), step)


SCHEDULES: dict[str, Callable[[MaskedTraining, int], None]] = {
    "one-shot": _one_shot,
    "gradual": _gradual,
    "rewind": _rewind,
    "rigl": _rigl,
}
"""The function of each schedule, called before the first step (0) and after each step."""
