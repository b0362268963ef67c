"""The l0 stage: trains with a gate on every weight or channel, until a density is reached."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import Any

from pydantic import JsonValue
from torch import Tensor, nn

from fedpress import compress
from fedpress.compress import ChannelGraph, PruningPlan
from fedpress.compress.prune.ignoring import ignored_names
from fedpress.compress.prune.targets import full_widths
from fedpress.compress.sparse import (
    Masks,
    Pattern,
    Weights,
    apply_masks_,
    density_of,
    find_weights,
    masks_from_scores,
)
from fedpress.compress.sparse.l0 import (
    Gates,
    channel_gates,
    open_probability,
    weight_gates,
)
from fedpress.core.random import derive
from fedpress.core.random_source import public_stream
from fedpress.errors import RecipeError
from fedpress.models import what_pruning_changed
from fedpress.nn.batch_norm import has_batch_norm
from fedpress.nn.resize import copied
from fedpress.stages.base import DIFFERENCES, Stage
from fedpress.stages.l0.settings import L0Settings
from fedpress.stages.l0.training import GatedTraining
from fedpress.stages.prune.settings import share_in_words
from fedpress.stages.public import check_public_training, draw_calibration, restore_norms_
from fedpress.stages.zeros import allowed_masks, with_sparse_weights
from fedpress.training.device import place_
from fedpress.workspace.atomic import write_json
from fedpress.workspace.drive import drive
from fedpress.workspace.stage_folder import StageFolder
from fedpress.workspace.state import State, Tick

BATCH = 256


class L0Stage(L0Settings, Stage):
    """`[[stage]] kind = "l0"`: minimises L(w; D) + lambda ||w||_0 by hard-concrete gates.

    Each weight w (or channel) is multiplied by a random gate between 0 and 1, whose distribution is
    learned (Louizos, Welling & Kingma 2018, arXiv:1712.01312). A controller adapts lambda: the
    expected density falls to `density` in the first part of the training (`until`) and then stays
    there. At the end the gates are ranked, and the share `density` with the highest gates is kept:
    exactly this share of weights, but only about this share with channels, whose numbers become
    multiples of `round_to`.
    Pruned weights become zeros, which later stages keep; pruned channels are removed. A stage
    `kind = "train"` should follow, to train the remaining weights without gates.
    """

    def setting_reading_labels(self) -> str:
        """Returns "l0", because the training of gates always reads labels."""
        return self.kind

    def check(self, state: State) -> tuple[State, dict[str, Any]]:
        """Prunes a copy of the model by magnitude, to find errors before the run.

        `run` chooses by gates what to prune. It prunes the same number of weights, or about the
        same number of parameters in channels.

        Raises:
            RecipeError: if the density cannot be reached.
            ModelError: if the model has no weight or channel for a gate, or cannot be traced.
            DataError: if there are no public examples for the batch-norm statistics.
        """
        ignored_names(state.model, self.ignore)
        check_public_training(state, self)
        if state.spec.quantized:
            raise RecipeError(
                "the model is quantized already",
                place="l0",
                cure="put this stage before the quantization",
            )
        # Called only for its error: there may be no public examples.
        draw_calibration(state, self.calibration, 0)
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
        apply_masks_(weights.chosen, masks)
        facts = {"density": density_of(masks), "dense_weights": dict(weights.dense)}
        return replace(state, spec=with_sparse_weights(state.spec, masks), model=model), facts

    def run(self, state: State, folder: StageFolder) -> Generator[Tick, None, State]:
        """Trains weights and gates; yields a tick for each step, saves a checkpoint every epoch."""
        seed = derive(state.seed, "stage", folder.index)
        place_(state.model, state.device)
        weights = within = graph = None
        chance = public_stream(seed, "gates")
        if self.unit == "channels":
            # Traced on the CPU, where the example input is.
            graph = _trace(state.model.to("cpu"), state, self.ignore)
            place_(state.model, state.device)
            gates = channel_gates(state.model, graph, generator=chance)
        else:
            weights, within = self.weights(state.model, state)
            gates = weight_gates(weights.chosen, generator=chance, within=within)
        work = GatedTraining(self, state, gates, seed)
        yield from drive(work, folder)
        model = work.fit.result_()
        gates.materialize_(model)
        facts: dict[str, Any] = {
            "expected_density": float(gates.density().detach()),
            "lambda": work.penalty,
        }
        if graph is not None:
            return self._removed(state, model, graph, gates, folder, facts)
        assert weights is not None
        assert within is not None
        # Entries are ranked by their gates and not by magnitude, because the gates have learned
        # which entries are needed.
        masks = self.choose(weights, [a.detach() for a in gates.log_alphas], within)
        apply_masks_(weights.chosen, masks)
        _restore_norms_(self, model, state)
        layers: list[JsonValue] = []
        for weight in weights.chosen:
            kept = int(masks[weight.name].sum())
            layers.append({"name": weight.name, "entries": weight.size, "kept": kept})
        folder.record(layers=layers)
        facts |= {"density": density_of(masks), "dense_weights": dict(weights.dense)}
        return replace(state, spec=with_sparse_weights(state.spec, masks), model=model, facts=facts)

    def _removed(
        self,
        state: State,
        model: nn.Module,
        graph: ChannelGraph,
        gates: Gates,
        folder: StageFolder,
        facts: dict[str, Any],
    ) -> State:
        """Removes the channels whose gates are most likely closed, and returns the new state."""
        dense = model.to("cpu").eval()
        scores = [open_probability(a.detach()).cpu() for a in gates.log_alphas]
        plan = self.plan(dense, graph, scores)
        pruned = copied(dense)
        compress.remove_(pruned, plan)
        # Removing channels must give the same outputs as setting them to zero.
        facts["parity_error"] = compress.check_parity(dense, pruned, plan, state.example(2))
        write_json(folder.path / "plan.json", plan.model_dump(mode="json"))
        _restore_norms_(self, pruned, state)
        widths: list[JsonValue] = []
        for layer in plan.layers:
            widths.append({"name": layer.name, "before": layer.before, "after": layer.after})
        folder.record(layers=widths)
        facts |= {
            "density": plan.parameters_after / plan.parameters_before,
            "whole_layers": dict(plan.unprunable),
        }
        notes = dict(plan.notes)
        # If an earlier stage has pruned, the density could refer to the network before this stage
        # or to the dense network. The note gives both shares.
        if plan.parameters_before < state.dense:
            words = [notes["density"]] if "density" in notes else []
            share = share_in_words(state.dense, plan.parameters_before, plan.parameters_after)
            notes["density"] = "; ".join([*words, share])
        if notes:
            facts[DIFFERENCES] = notes
        spec = state.spec.model_copy(update=what_pruning_changed(pruned, state.spec.build_dense()))
        return replace(state, spec=spec, model=pruned, facts=facts)

    def weights(self, model: nn.Module, state: State) -> tuple[Weights, Masks]:
        """Returns the weights that get gates, and the masks of earlier stages."""
        weights = find_weights(
            model,
            keep_first=self.keep_first,
            keep_last=self.keep_last,
            keep=self.keep,
            ignore=self.ignore,
        )
        return weights, allowed_masks(model, state, weights)

    def choose(self, weights: Weights, scores: list[Tensor], within: Masks) -> Masks:
        """Returns masks that keep exactly `density` of the entries: those with the highest scores.

        Args:
            weights: the weights with gates.
            scores: for each weight the scores of its entries.
            within: masks of earlier stages; only entries that these keep can be kept.
        """
        by_name = {w.name: s for w, s in zip(weights.chosen, scores, strict=True)}
        return masks_from_scores(
            weights.chosen, by_name, Pattern("unstructured"), density=self.density, within=within
        )

    def plan(self, model: nn.Module, graph: ChannelGraph, scores: list[Tensor]) -> PruningPlan:
        """Plans which channels are removed, so that `density` of the parameters remain."""
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


def _restore_norms_(stage: L0Stage, model: nn.Module, state: State) -> None:
    """Recomputes batch-norm statistics: those from training were taken with random gates."""
    # Only batch norms need examples; other models need no public part here.
    if has_batch_norm(model):
        seed = derive(state.seed, "l0", stage.name)
        restore_norms_(model, state, draw_calibration(state, stage.calibration, seed), batch=BATCH)


def _trace(model: nn.Module, state: State, ignore: Sequence[str]) -> ChannelGraph:
    """Returns the channels of `model` that can be pruned."""
    # If torch.export fails, it first prints its graph, hundreds of lines. The error is enough.
    with contextlib.redirect_stderr(io.StringIO()):
        return compress.trace(model, state.example(2), ignore=ignore)
