"""The sparsify stage: weights become zero by score, pattern and schedule, while the others train on the public part."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, JsonValue, model_validator
from torch import Tensor, nn

from fedpress.compress.prune.derivatives import differentiable
from fedpress.compress.prune.ignoring import ignored
from fedpress.compress.prune.sensitivity import Point, densities_down_to, sensitivity, weight_unit
from fedpress.compress.sparse import (
    Masks,
    Movement,
    Pattern,
    Weight,
    WeightEvidence,
    Weights,
    apply_,
    choose,
    cubic,
    density_of,
    drop_share,
    find_weights,
    masks_of,
    regrow,
    score_weights,
    steps_down,
)
from fedpress.compress.sparse.levels import level_densities, lowest_densities
from fedpress.compress.sparse.masks import Scope
from fedpress.compress.sparse.scores import gradients
from fedpress.core.examples import Arrays, Preprocess
from fedpress.core.parameters import part_of
from fedpress.core.random import derive
from fedpress.core.random_source import public_stream
from fedpress.errors import RecipeError, did_you_mean, renaming
from fedpress.nn.batch_norm import has_batch_norm
from fedpress.nn.resize import copied
from fedpress.stages.base import Stage
from fedpress.stages.epochs import epochs_of, milestone, steps_of
from fedpress.stages.public import calibration, restore_norms_
from fedpress.training.checks import check_training
from fedpress.training.device import device
from fedpress.training.evaluate import evaluate
from fedpress.training.fit import Fit, Step
from fedpress.training.settings import TrainSettings
from fedpress.workspace.drive import Milestone, Snapshot, drive
from fedpress.workspace.folder import StageFolder
from fedpress.workspace.state import Name, State, Tick

BATCH = 128
SENSITIVITY = 512  # public examples on which each layer's sensitivity is measured
FROM_DATA = ("taylor", "fisher", "snip", "grasp")


class SparsifyStage(TrainSettings, Stage):
    """`[[stage]] kind = "sparsify"`: keeps `density` of the weights, sets the others to zero, and trains what is left.

    The zeros stay through every later stage. Schedules: "one-shot" cuts before the first epoch; "gradual" from `begin`
    to `until` of the training by a cubic (Zhu & Gupta 2017); "rewind" trains, cuts, takes the weights back to epoch
    `rewind_to`, in `rounds` rounds of `epochs` each (lottery tickets, Frankle et al. 2020); "rigl" cuts first and then
    moves weights until `until` (Evci et al. 2020).
    """

    several_inputs: ClassVar = True

    kind: Literal["sparsify"]
    name: Name = "sparsify"
    epochs: int = Field(0, ge=0)
    density: float | None = Field(
        None, gt=0, le=1, description="share of the weights that stays; N:M brings its own"
    )
    pattern: str = Field(
        "unstructured",
        description="'unstructured', N:M such as '2:4', a block such as '4x1', 'filter' or 'channel'",
    )
    score: Literal[
        "magnitude", "lamp", "taylor", "fisher", "snip", "grasp", "movement", "random"
    ] = "magnitude"
    scope: Literal["global", "uniform", "erk", "sensitivity"] = Field(
        "global",
        description="one ranking for all layers, one share for each, larger shares for small layers, or the shares at "
        "which every layer costs the same loss",
    )
    densities: dict[str, float] = Field(
        {}, description="instead of a scope: the density of each weight by name"
    )
    schedule: Literal["one-shot", "gradual", "rewind", "rigl"] = "one-shot"
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
    def _density_fits_pattern(self) -> SparsifyStage:
        try:
            own = Pattern.parse(self.pattern).density
        except RecipeError as error:
            raise ValueError(str(error).removeprefix("sparsify.pattern: ")) from error
        if own is None:
            if self.density is None and not self.densities:
                raise ValueError(
                    "sparsify needs a density, the share of the weights that stays; try density = 0.1"
                )
            return self
        if self.density not in (None, own):
            raise ValueError(
                f"pattern '{self.pattern}' keeps {own:g}, not density = {self.density:g}; leave density out"
            )
        if self.schedule == "rigl" or self.densities:
            raise ValueError(
                "N:M keeps as many in every group: leave densities out and use another schedule than 'rigl'"
            )
        if self.scope == "sensitivity":
            raise ValueError("N:M keeps as many in every group: leave scope = 'sensitivity' out")
        return self

    @model_validator(mode="after")
    def _schedule_fits(self) -> SparsifyStage:
        if self.score == "movement" and self.schedule not in ("gradual", "rewind"):
            raise ValueError(
                "the score 'movement' is summed up while the network trains; use schedule = 'gradual'"
            )
        if self.schedule != "one-shot" and not self.epochs:
            raise ValueError(
                f"schedule '{self.schedule}' works while the network trains; give epochs"
            )
        if self.schedule in ("gradual", "rigl") and self.patience:
            raise ValueError(
                f"patience would take weights from before the end of schedule '{self.schedule}'; leave it out"
            )
        if self.schedule == "gradual" and self.begin >= self.until:
            raise ValueError(f"begin = {self.begin:g} must be below until = {self.until:g}")
        if self.schedule == "rewind" and self.rewind_to >= self.epochs:
            raise ValueError(f"rewind_to = {self.rewind_to} must be below epochs = {self.epochs}")
        return self

    def looks_at_labels(self) -> str:
        """By training, or by what it measures."""
        if self.epochs:
            return "epochs"
        if self.scope == "sensitivity":
            return 'scope = "sensitivity"'
        return f'score = "{self.score}"' if self.score in FROM_DATA else ""

    def check(self, state: State) -> tuple[State, dict[str, Any]]:
        """Cuts by magnitude without training: the zeros will lie elsewhere, their number will be this one.

        Raises:
            RecipeError: if no weight can take the pattern, or the density cannot be reached.
            ModelError: if the model has no weight that may get zeros.
            DataError: if there are no public examples to score or train with.
        """
        ignored(state.model, self.ignore)
        check_training(
            state.model,
            self,
            state.data.public,
            state.data.validation,
            state.data.preprocess,
            state.data.task,
        )
        if self.score in FROM_DATA or self.scope == "sensitivity":
            calibration(state, self.calibration, 0)
        model = copied(state.model)
        weights = self.weights(model, state)
        scores = {w.name: w.value.detach().abs() for w in weights.chosen}
        within = _within(model, state, weights)
        masks = self.choose(weights.chosen, scores, self.target(weights), within)
        reached, wanted = density_of(masks), self.target(weights)
        if (
            Pattern.parse(self.pattern).density is None
            and abs(reached - wanted) > 0.01 + 0.1 * wanted
        ):
            raise RecipeError(
                (
                    f"{wanted:g} cannot be reached with pattern '{self.pattern}', the nearest is "
                    f"{reached:.4g}"
                ),
                place="density",
                cure="take that, or finer blocks",
            )
        apply_(weights.chosen, masks)
        rounds = 1 + self.rounds if self.schedule == "rewind" else 1
        facts = {**_facts(model, weights, masks), "epochs": self.epochs * rounds}
        return replace(state, spec=_spec(state, masks), model=model), facts

    def run(self, state: State, folder: StageFolder) -> Generator[Tick, None, State]:
        """Cuts and trains; yields a tick for every step, saves after every epoch."""
        work = MaskedTraining(self, state, derive(state.seed, "stage", folder.index))
        yield from drive(work, folder)
        model = work.fit.result_()
        apply_(work.weights.chosen, work.masks)
        if self.ema or not self.epochs:
            work.restore_norms_()
        layers: list[JsonValue] = [
            {"name": w.name, "entries": w.size, "kept": int(work.masks[w.name].sum())}
            for w in work.weights.chosen
        ]
        folder.record(layers=layers)
        for point in work.points:
            folder.record(sensitivity=point.line(state.data.task.primary))
        facts = _facts(model, work.weights, work.masks)
        return replace(state, spec=_spec(state, work.masks), model=model, facts=facts)

    def weights(self, model: nn.Module, state: State) -> Weights:
        """Returns the weights that get zeros; those that the pattern does not fit are among the dense ones.

        Raises:
            RecipeError: if none fits.
        """
        if state.spec.quantized:
            raise RecipeError(
                "the model is quantized already",
                place="sparsify",
                cure="put this stage before the quantization",
            )
        weights = find_weights(
            model,
            keep_first=self.keep_first,
            keep_last=self.keep_last,
            keep=self.keep,
            ignore=self.ignore,
        )
        pattern = Pattern.parse(self.pattern)
        misfits = {w.name: why for w in weights.chosen if (why := pattern.misfit(w)) is not None}
        known = [w.name for w in weights.chosen]
        for name in self.densities:
            if name not in known:
                why = weights.dense.get(name)
                hint = f" ({why})" if why else did_you_mean(name, known)
                some = ", ".join(known[:3])
                raise RecipeError(
                    f"no weight '{name}' gets zeros here{hint}",
                    place="densities",
                    cure=f"use such as {some}",
                )
        chosen = tuple(w for w in weights.chosen if w.name not in misfits)
        if not chosen:
            name, why = next(iter(misfits.items()))
            raise RecipeError(
                f"no weight can be '{self.pattern}' ('{name}': {why})",
                place="pattern",
                cure="use another pattern",
            )
        return Weights(chosen, {**weights.dense, **misfits})

    def target(self, weights: Weights) -> float:
        """Returns the density of all `weights` at the end."""
        if self.density is not None:
            return self.density
        if (own := Pattern.parse(self.pattern).density) is not None:
            return own
        return sum(self.densities.get(w.name, 1.0) * w.size for w in weights.chosen) / weights.size

    def choose(
        self,
        weights: tuple[Weight, ...],
        scores: dict[str, Tensor],
        density: float,
        within: Masks,
        points: Sequence[Point] = (),
    ) -> Masks:
        """Returns the masks of `density` by these settings; `points` of the sensitivity, or one ranking without."""
        if self.densities:
            scope: Scope | dict[str, float] = self.densities
        elif self.scope == "sensitivity":
            scope = level_densities(weights, points, density) if points else "global"
        else:
            scope = self.scope
        pattern = Pattern.parse(self.pattern)
        with renaming({"scope": "densities"} if self.densities else {}):
            return choose(weights, scores, pattern, density=density, scope=scope, within=within)


class MaskedTraining:
    """A training, the masks that it keeps, and what the schedule has to remember."""

    def __init__(self, stage: SparsifyStage, state: State, seed: int) -> None:
        self.stage, self.source, self.data, self.seed = stage, state, state.data, seed
        self.fit = Fit(
            state.model, stage, task=state.data.task, seed=seed, sparse=state.spec.sparse
        )
        self.weights = stage.weights(self.fit.model, state)
        self.density = stage.target(self.weights)
        self.within = _within(self.fit.model, state, self.weights)
        self.masks = self.within
        chosen = {id(w.value) for w in self.weights.chosen}
        self.others = [pair for pair in self.fit.zeros if id(pair[0]) not in chosen]
        self.movement = Movement(self.weights.chosen) if stage.score == "movement" else None
        self.rounds = 1 + stage.rounds if stage.schedule == "rewind" else 1
        self.round = 0
        self.taken_up = False  # from a checkpoint, so that what comes before the first step is done
        self.early: dict[str, Tensor] = {}
        self.points: list[Point] = []  # the sensitivity, measured at the first cut

    @property
    def steps(self) -> int:
        """Steps of a whole training."""
        return steps_of(self.stage.epochs, self.stage.batch_size, self.source)

    def events(self) -> Iterator[Tick | Milestone]:
        """Trains; under "rewind" one training after the other, each from the early weights."""
        if not self.taken_up:
            self.schedule_(0)
        with self.movement.watching() if self.movement else nullcontext():
            self.note_epoch_()
            while True:
                yield from self.train_()
                if self.round + 1 >= self.rounds:
                    return
                self.round += 1
                last, full = self.rounds - 1, density_of(self.within)
                self.cut_(steps_down(self.round, last, start=full, end=self.density))
                self.fit.load_(self.early)
                self.keep_(self.masks)

    def train_(self) -> Iterator[Tick | Milestone]:
        """Trains to the last epoch, with what the schedule does after each step."""
        for event in epochs_of(self.fit, self.source):
            if isinstance(event, Step):
                self.schedule_(event.done)
                yield Tick(event.done + self.round * event.total, event.total * self.rounds)
                continue
            density = density_of(self.masks)
            self.note_epoch_()
            more = f", density {density:.1%}"
            yield milestone(event, more=more, cut=self.round, density=density)

    def schedule_(self, step: int) -> None:
        """Does what the schedule wants before the first step (0), or after that many."""
        SCHEDULES[self.stage.schedule](self, step)

    def note_epoch_(self) -> None:
        """Keeps the weights of the epoch to rewind to, with their momentum, when it comes by."""
        if self.rounds > 1 and not self.early and self.fit.epoch == self.stage.rewind_to:
            self.early = {name: value.detach().clone() for name, value in self.fit.state().items()}

    def cut_(self, density: float) -> None:
        """Scores what is left and keeps `density` of all."""
        evidence = WeightEvidence(
            self.fit.model,
            self.weights.chosen,
            self.losses if self.stage.score in FROM_DATA else None,
            public_stream(self.seed, "score"),
            self.movement.sums if self.movement else None,
        )
        scores = score_weights(self.stage.score, evidence)
        if self.stage.scope == "sensitivity" and not self.points:
            units = [weight_unit(w.name, w.value, scores[w.name]) for w in self.weights.chosen]
            lowest = min(lowest_densities(self.weights.chosen, self.density).values())
            self.points = list(sensitivity(units, self.measure, densities_down_to(lowest)))
        self.keep_(self.stage.choose(self.weights.chosen, scores, density, self.masks, self.points))

    def measure(self) -> tuple[float, float]:
        """Returns the loss and the primary metric on public examples."""
        some = calibration(self.source, min(self.stage.calibration, SENSITIVITY), self.seed)
        found = evaluate(self.fit.model, some, self.data.preprocess, self.data.task)
        return found.loss, found.score

    def regrow_(self, share: float, step: int) -> None:
        """Moves `share` of each layer's weights to where a fresh batch wants them; they start at 0 without momentum."""
        chance = public_stream(self.seed, "regrow", step)
        index = chance.integers(len(self.data.public), self.stage.batch_size)
        with differentiable(
            self.fit.model, [w.value for w in self.weights.chosen], batch_statistics=True
        ):
            steep = gradients(
                self._losses(self.data.public.take(index), len(index)), self.weights.chosen
            )
        pattern = Pattern.parse(self.stage.pattern)
        masks = regrow(
            self.weights.chosen, self.masks, steep, pattern, share=share, within=self.within
        )
        for w in self.weights.chosen:
            self.fit.optimizers.forget_(w.value, masks[w.name] & ~self.masks[w.name])
        self.keep_(masks)

    def keep_(self, masks: Masks) -> None:
        """Makes `masks` those that the training keeps."""
        self.masks = masks
        apply_(self.weights.chosen, masks)
        self.fit.zeros = [*self.others, *((w.value, ~masks[w.name]) for w in self.weights.chosen)]

    def losses(self) -> Iterator[Tensor]:
        """Runs the model over public examples; one by one where the score wants the Fisher information of each."""
        drawn = calibration(self.source, self.stage.calibration, self.seed)
        return self._losses(drawn, 1 if self.stage.score == "fisher" else BATCH)

    def _losses(self, examples: Arrays, batch: int) -> Iterator[Tensor]:
        prepare: Preprocess = self.data.preprocess
        for x, y in examples.batches(batch):
            at = device()
            yield self.data.task.loss(self.fit.model(prepare(x.to(at))), y.to(at))

    def restore_norms_(self) -> None:
        """Takes the statistics of batch norms anew: averaged ones (`ema`) are those of a network with fewer zeros.

        Without training nothing else would make up for the cut.
        """
        if has_batch_norm(self.fit.model) and len(self.data.public):
            drawn = calibration(self.source, self.stage.calibration, self.seed)
            restore_norms_(self.fit.model, self.source, drawn, batch=BATCH)

    def state(self) -> Snapshot:
        """Returns where the training stands, with its masks."""
        tensors = self.fit.state()
        tensors |= {f"mask/{name}": mask for name, mask in self.masks.items()}
        tensors |= {f"early/{name}": value for name, value in self.early.items()}
        if self.movement:
            tensors |= {f"moved/{name}": value for name, value in self.movement.sums.items()}
        points: list[JsonValue] = [asdict(point) for point in self.points]
        return Snapshot(tensors, {"round": self.round, "points": points})

    def load_(self, saved: Snapshot) -> None:
        """Takes up a training of the same model and settings."""
        tensors, facts = saved.tensors, dict[str, Any](saved.facts)
        self.fit.load_(dict(tensors))
        self.taken_up = True
        self.round, self.early = facts["round"], part_of(tensors, "early/")
        self.points = [Point.of(point) for point in facts["points"]]
        masks = part_of(tensors, "mask/")
        self.keep_({name: mask.to(device()) for name, mask in masks.items()})
        if self.movement:
            for name, value in part_of(tensors, "moved/").items():
                self.movement.sums[name].copy_(value)


def _one_shot(work: MaskedTraining, step: int) -> None:
    if step == 0:
        work.cut_(work.density)


def _gradual(work: MaskedTraining, step: int) -> None:
    first, last = round(work.stage.begin * work.steps), max(1, round(work.stage.until * work.steps))
    if first <= step <= last and ((step - first) % work.stage.every == 0 or step == last):
        start, progress = density_of(work.within), (step - first) / max(1, last - first)
        density = cubic(progress, start=start, end=work.density)
        if density < start:
            work.cut_(density)


def _rewind(work: MaskedTraining, step: int) -> None:
    """Cuts come between the trainings (see `MaskedTraining.events`)."""


def _rigl(work: MaskedTraining, step: int) -> None:
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
"""What each schedule does before the first step (0) and after each."""


def _within(model: nn.Module, state: State, weights: Weights) -> Masks:
    """Returns what earlier stages left of the weights."""
    old = masks_of(model, state.spec.sparse)
    full = {w.name: torch.ones_like(w.value, dtype=torch.bool) for w in weights.chosen}
    return {name: old.get(name, mask) for name, mask in full.items()}


def _spec(state: State, masks: Masks) -> Any:
    names = [
        *state.spec.sparse,
        *(n for n, m in masks.items() if not m.all() and n not in state.spec.sparse),
    ]
    return state.spec.model_copy(update={"sparse": tuple(names)})


def _facts(model: nn.Module, weights: Weights, masks: Masks) -> dict[str, Any]:
    zeros = sum(int((~m).sum()) for m in masks.values())
    return {
        "density": density_of(masks),
        "nonzero_parameters": sum(p.numel() for p in model.parameters()) - zeros,
        "dense_weights": dict(weights.dense),
    }
