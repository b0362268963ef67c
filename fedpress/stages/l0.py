"""The l0 stage: the network trains with a gate on every weight or channel, and lambda leads it to a wanted density."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field, JsonValue, model_validator
from torch import Tensor, nn

from fedpress import compress
from fedpress.compress import ChannelGraph, PruningPlan
from fedpress.compress.prune.ignoring import ignored
from fedpress.compress.prune.targets import full_widths
from fedpress.compress.sparse import (
    Masks,
    Pattern,
    Weights,
    apply_,
    choose,
    density_of,
    find_weights,
    geometric,
    masks_of,
)
from fedpress.compress.sparse.l0 import (
    Controller,
    Gates,
    balance,
    channel_gates,
    open_probability,
    weight_gates,
)
from fedpress.core.parameters import part_of
from fedpress.core.random import derive
from fedpress.core.random_source import public_stream
from fedpress.errors import RecipeError
from fedpress.models import what_pruning_changed
from fedpress.nn.batch_norm import has_batch_norm
from fedpress.nn.resize import copied
from fedpress.stages.base import Stage
from fedpress.stages.epochs import epochs_of, milestone, steps_of
from fedpress.stages.prune.settings import of_what
from fedpress.stages.public import calibration, restore_norms_
from fedpress.training.checks import check_training
from fedpress.training.device import place_
from fedpress.training.fit import Fit, Step
from fedpress.training.settings import TrainSettings
from fedpress.workspace.drive import Milestone, Snapshot, drive
from fedpress.workspace.folder import StageFolder, write_json
from fedpress.workspace.state import Name, State, Tick

BATCH = 256
TRAVEL = (
    20.0  # how far a gate can go until the target is reached: from wide open to shut is half of it
)
FASTEST = 0.5  # a larger step would throw gates from one end to the other
BETAS = (0.9, 0.99)
EPSILON = 1e-16  # a single gate of ten million has a small gradient


class L0Stage(TrainSettings, Stage):
    """`[[stage]] kind = "l0"`: minimises L(w; D) + lambda ||w||_0 by hard-concrete gates (Louizos et al. 2018).

    Lambda follows a controller, so that the expected density falls to `density` in the first `until` of the training
    and stays there; at the end the gates are ranked and the density is exact. Weights become zeros that every later
    stage keeps; channels are physically removed. Train afterwards without gates: `kind = "train"`.
    """

    kind: Literal["l0"]
    name: Name = "l0"
    unit: Literal["weights", "channels"] = "weights"
    density: float = Field(
        gt=0,
        le=1,
        description="share that stays: of the weights, or with channels of all parameters",
    )
    until: float = Field(
        0.6, gt=0, le=1, description="share of the training in which the density falls"
    )
    gate_lr: float | None = Field(
        None, gt=0, description="Adam's rate for the gates; by default by the number of steps"
    )
    keep_first: bool = Field(True, description="weights: leave the first layer dense")
    keep_last: bool = Field(True, description="weights: leave the last layer dense")
    keep: tuple[str, ...] = Field(
        (), description="weights: names to leave dense, with * for anything"
    )
    ignore: tuple[str, ...] = Field(
        (), description="modules or weights that stay as they are: names, * for anything"
    )
    exact: bool = Field(
        False,
        description="channels: refuse a density that no widths meet, in place of the nearest that they do",
    )
    round_to: int = Field(8, ge=1, description="channels: widths become multiples of this")
    min_keep: float = Field(
        0.1, ge=0, le=1, description="channels: share of its channels that every layer keeps"
    )
    calibration: int = Field(
        2048, ge=1, description="public examples for the batch-norm statistics at the end"
    )

    @model_validator(mode="after")
    def _trains(self) -> L0Stage:
        if not self.epochs:
            raise ValueError("l0 learns its gates in training; give epochs")
        if self.patience:
            raise ValueError(
                "patience would take weights from before the density is reached; leave it out"
            )
        if self.ema:
            raise ValueError("ema would average weights that belong to other gates; leave it out")
        return self

    def looks_at_labels(self) -> str:
        """It trains."""
        return "training"

    def check(self, state: State) -> tuple[State, dict[str, Any]]:
        """Cuts by magnitude without training: what stays will be other weights or channels, but as many.

        Raises:
            RecipeError: if the density cannot be reached.
            ModelError: if the model has nothing to put a gate on, or cannot be traced.
            DataError: if there are no public examples for the batch-norm statistics.
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
        if state.spec.quantized:
            raise RecipeError(
                "the model is quantized already",
                place="l0",
                cure="put this stage before the quantization",
            )
        calibration(state, self.calibration, 0)
        model = copied(state.model)
        if self.unit == "channels":
            graph = _trace(model, state, self.ignore)
            plan = self.plan(model, graph, compress.score(model, graph, "l2"))
            compress.remove_(model, plan)
            spec = state.spec.model_copy(
                update=what_pruning_changed(model, state.spec.build_dense())
            )
            return replace(state, spec=spec, model=model), {
                "density": plan.parameters_after / plan.parameters_before,
                "channels": ", ".join(f"{c.before}→{c.after}" for c in plan.layers),
            }
        weights, within = self.weights(model, state)
        masks = self.choose(weights, [w.value.detach().abs() for w in weights.chosen], within)
        apply_(weights.chosen, masks)
        facts = {"density": density_of(masks), "dense_weights": dict(weights.dense)}
        return replace(state, spec=_sparse(state, masks), model=model), facts

    def run(self, state: State, folder: StageFolder) -> Generator[Tick, None, State]:
        """Trains weights and gates; yields a tick for every step, saves after every epoch."""
        seed = derive(state.seed, "stage", folder.index)
        place_(state.model)
        weights = within = graph = None
        if self.unit == "channels":
            graph = _trace(state.model.to("cpu"), state, self.ignore)
            place_(state.model)
            gates = channel_gates(state.model, graph, generator=public_stream(seed, "gates"))
        else:
            weights, within = self.weights(state.model, state)
            gates = weight_gates(
                weights.chosen, generator=public_stream(seed, "gates"), within=within
            )
        work = GatedTraining(self, state, gates, seed)
        yield from drive(work, folder)
        model = work.fit.result_()
        gates.materialize_(model)
        facts: dict[str, Any] = {
            "expected_density": float(gates.density().detach()),
            "lambda": work.pull,
        }
        if graph is not None:
            return self._removed(state, model, graph, gates, folder, facts)
        assert weights is not None
        assert within is not None
        masks = self.choose(weights, [a.detach() for a in gates.log_alphas], within)
        apply_(weights.chosen, masks)
        _restore_norms_(self, model, state)
        layers: list[JsonValue] = [
            {"name": w.name, "entries": w.size, "kept": int(masks[w.name].sum())}
            for w in weights.chosen
        ]
        folder.record(layers=layers)
        facts |= {"density": density_of(masks), "dense_weights": dict(weights.dense)}
        return replace(state, spec=_sparse(state, masks), model=model, facts=facts)

    def _removed(
        self,
        state: State,
        model: nn.Module,
        graph: ChannelGraph,
        gates: Gates,
        folder: StageFolder,
        facts: dict[str, Any],
    ) -> State:
        """Removes the channels with the least open gates."""
        dense = model.to("cpu").eval()
        scores = [open_probability(a.detach()).cpu() for a in gates.log_alphas]
        plan = self.plan(dense, graph, scores)
        pruned = copied(dense)
        compress.remove_(pruned, plan)
        facts["parity_error"] = compress.check_parity(dense, pruned, plan, _example(state))
        write_json(folder.path / "plan.json", plan.model_dump(mode="json"))
        _restore_norms_(self, pruned, state)
        widths: list[JsonValue] = [
            {"name": c.name, "before": c.before, "after": c.after} for c in plan.layers
        ]
        folder.record(layers=widths)
        facts |= {
            "density": plan.parameters_after / plan.parameters_before,
            "whole_layers": dict(plan.unprunable),
        }
        told = dict(plan.notes)
        if plan.parameters_before < state.dense:
            share = of_what(state.dense, plan.parameters_before, plan.parameters_after)
            told["density"] = "; ".join([*([told["density"]] if "density" in told else []), share])
        if told:
            facts["told"] = told
        spec = state.spec.model_copy(update=what_pruning_changed(pruned, state.spec.build_dense()))
        return replace(state, spec=spec, model=pruned, facts=facts)

    def weights(self, model: nn.Module, state: State) -> tuple[Weights, Masks]:
        """Returns the weights that get gates, and what earlier stages left of them."""
        weights = find_weights(
            model,
            keep_first=self.keep_first,
            keep_last=self.keep_last,
            keep=self.keep,
            ignore=self.ignore,
        )
        old = masks_of(model, state.spec.sparse)
        full = {w.name: torch.ones_like(w.value, dtype=torch.bool) for w in weights.chosen}
        return weights, {name: old.get(name, mask) for name, mask in full.items()}

    def choose(self, weights: Weights, scores: list[Tensor], within: Masks) -> Masks:
        """Keeps the highest scores, exactly `density` of them."""
        by_name = {w.name: s for w, s in zip(weights.chosen, scores, strict=True)}
        return choose(
            weights.chosen, by_name, Pattern("unstructured"), density=self.density, within=within
        )

    def plan(self, model: nn.Module, graph: ChannelGraph, scores: list[Tensor]) -> PruningPlan:
        """Keeps the channels with the highest scores, until `density` of the parameters are left."""
        wanted = self.density * graph.parameters(full_widths(graph))
        target = compress.Target("density", graph.parameters, wanted)
        return compress.plan(
            model,
            graph,
            scores,
            target=target,
            round_to=self.round_to,
            min_keep=self.min_keep,
            exact=self.exact,
        )


class GatedTraining:
    """A training with gates on what it may do without: their own optimizer, and the controller of lambda."""

    def __init__(self, stage: L0Stage, state: State, gates: Gates, seed: int) -> None:
        self.stage, self.source, self.gates, self.seed = stage, state, gates, seed
        self.fit = Fit(
            state.model,
            stage,
            task=state.data.task,
            seed=seed,
            objective=self.loss,
            sparse=state.spec.sparse,
        )
        whole_training = steps_of(stage.epochs, stage.batch_size, state)
        steps = max(1, round(stage.until * whole_training))
        self.steps, self.done = steps, 0
        self.optimizer = torch.optim.Adam(
            gates.parameters(), stage.gate_lr or min(TRAVEL / steps, FASTEST), BETAS, EPSILON
        )
        self.begin = float(gates.density().detach())
        self.controller: Controller | None = None
        self.pull = 0.0

    def events(self) -> Iterator[Tick | Milestone]:
        """Trains; the gates step where the weights do."""
        with self.gates.on(self.fit.model):
            self.gates.generator = public_stream(self.seed, "gates", self.fit.epoch)
            for event in epochs_of(self.fit, self.source):
                if isinstance(event, Step):
                    self.done = event.done
                    self.optimizer.step()
                    self.optimizer.zero_grad()
                    yield Tick(event.done, event.total)
                    continue
                self.gates.generator = public_stream(self.seed, "gates", event.epoch)
                density = float(self.gates.density().detach())
                more = f", expected density {density:.1%}"
                yield milestone(event, more=more, expected_density=density, lambda_=self.pull)

    def loss(self, model: nn.Module, x: Tensor, logits: Tensor, y: Tensor) -> Tensor:
        """The task's loss and what the controller makes of the expected density."""
        loss, density = (
            self.fit.task.loss(logits, y),
            self.gates.density(),
        )
        if self.controller is None:
            self.controller = Controller(balance(loss, density, self.gates))
        end = min(self.stage.density, self.begin)
        target = geometric(self.done / self.steps, start=self.begin, end=end)
        self.pull = self.controller.pull_(float(density.detach()), target)
        return loss + self.pull * density

    def state(self) -> Snapshot:
        """Returns where the training, the gates and the controller stand."""
        assert self.controller is not None
        tensors = self.fit.state()
        for i, alpha in enumerate(self.gates.log_alphas):
            tensors[f"gates/{i}"] = alpha
        for key, slot in self.optimizer.state_dict()["state"].items():
            for leaf, value in slot.items():
                tensors[f"adam/{key}/{leaf}"] = value
        facts: dict[str, JsonValue] = {
            "scale": self.controller.scale,
            "lambda": self.controller.lambda_,
            "pull": self.pull,
            "done": self.done,
        }
        return Snapshot(tensors, facts)

    def load_(self, saved: Snapshot) -> None:
        """Takes up a training of the same model, gates and settings."""
        tensors, facts = saved.tensors, dict[str, Any](saved.facts)
        self.fit.load_(dict(tensors))
        with torch.no_grad():
            for i, alpha in enumerate(self.gates.log_alphas):
                alpha.copy_(tensors[f"gates/{i}"])
        slots: dict[int, dict[str, Tensor]] = {}
        for name, value in part_of(tensors, "adam/").items():
            key, leaf = name.split("/")
            slots.setdefault(int(key), {})[leaf] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": slots})
        self.controller = Controller(facts["scale"], facts["lambda"])
        self.pull, self.done = facts["pull"], facts["done"]


def _restore_norms_(stage: L0Stage, model: nn.Module, state: State) -> None:
    """Takes the statistics of batch norms without chance in the gates."""
    if has_batch_norm(model):
        seed = derive(state.seed, "l0", stage.name)
        restore_norms_(model, state, calibration(state, stage.calibration, seed), batch=BATCH)


def _sparse(state: State, masks: Masks) -> Any:
    names = [
        *state.spec.sparse,
        *(n for n, m in masks.items() if not m.all() and n not in state.spec.sparse),
    ]
    return state.spec.model_copy(update={"sparse": tuple(names)})


def _example(state: State) -> Tensor:
    return state.spec.example(2)


def _trace(model: nn.Module, state: State, ignore: Sequence[str]) -> ChannelGraph:
    with contextlib.redirect_stderr(io.StringIO()):  # torch.export prints its graph before it fails
        return compress.trace(model, _example(state), ignore=ignore)
