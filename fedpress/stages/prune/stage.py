"""The prune stage: removes the least important channels, and recomputes batch-norm statistics."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import nn

from fedpress import compress
from fedpress.compress import SCORES, ChannelGraph, PruningPlan
from fedpress.compress.prune.ignoring import ignored_names
from fedpress.errors import RecipeError, renaming
from fedpress.models import what_pruning_changed
from fedpress.nn.batch_norm import has_batch_norm
from fedpress.nn.resize import copied
from fedpress.stages.base import DIFFERENCES, Stage
from fedpress.stages.prune.cutting import PruneWork
from fedpress.stages.prune.settings import (
    TARGET_KEYS,
    PruneSettings,
    cut_target,
    latency_ms,
    latency_target,
    public_examples,
    share_in_words,
    trace_channels,
)
from fedpress.stages.public import check_public_training
from fedpress.workspace.atomic import write_json
from fedpress.workspace.drive import drive
from fedpress.workspace.stage_folder import StageFolder
from fedpress.workspace.state import State, Tick


class PruneStage(PruneSettings, Stage):
    """`[[stage]] kind = "prune"`: removes whole channels until a target is met.

    The target is one of four: the share to keep of the parameters (`keep_params`), of the
    multiply-adds (`keep_macs`) or of the latency in onnxruntime on this machine (`keep_latency`);
    or the largest size in bytes (`max_bytes`).

    With several `steps` the channels are removed in several cuts, with a training (`finetune`)
    between two cuts. With `rewind` there is a training before each cut. After the cut, the
    remaining weights are reset to their values at the beginning of the stage (Frankle & Carbin
    2019, arXiv:1803.03635).
    """

    several_inputs: ClassVar = True
    requires_one_of: ClassVar = TARGET_KEYS
    defaults_without_data: ClassVar = {"calibration": 0}

    def setting_reading_labels(self) -> str:
        """Returns the first setting that needs labels: training, sensitivity or score; else ""."""
        if self.finetune is not None:
            return "finetune"
        if self.scope == "sensitivity":
            return 'scope = "sensitivity"'
        return f'score = "{self.score}"' if SCORES[self.score].needs == "losses" else ""

    def check(self, state: State) -> tuple[State, dict[str, Any]]:
        """Prunes a copy of the model. The run may prune other channels, to about the same size.

        Raises:
            RecipeError: if the target cannot be reached.
            ModelError: if the model cannot be traced, or has no scales for the score "bn_scale".
            DataError: if public examples are needed (for scores or batch norms) and there are none.
            ExportError: if `keep_latency` is set and the model cannot be exported to measure it.
        """
        if state.spec.quantized:
            raise RecipeError(
                "the model is quantized already",
                place="prune",
                cure="put this stage before the quantization",
            )
        ignored_names(state.model, self.ignore)
        # Called only for its error: there may be no public examples.
        public_examples(self, state, 0)
        if self.finetune is not None:
            with renaming({key: f"finetune.{key}" for key in type(self.finetune).model_fields}):
                check_public_training(state, self.finetune)
        model = copied(state.model)
        graph = trace_channels(model.eval(), state, self)
        row = SCORES[self.score]
        # Called only for its error: a layer may have no scales for the score to read.
        if row.needs_scales:
            compress.score(model, graph, self.score)
        plan = self._trial_plan(state, model, graph)
        compress.remove_(model, plan)
        # Called only for its error: measuring the latency needs an export, which may fail.
        if self.keep_latency is not None:
            latency_ms(model, state, seconds=0.0)
        facts: dict[str, Any] = {
            "kept_parameters": plan.parameters_after / state.dense,
            "channels": _widths(plan),
        }
        notes = _notes(state, [plan])
        if notes:
            facts[DIFFERENCES] = notes
        return replace(state, spec=_spec(state, model), model=model.train()), facts

    def _trial_plan(self, state: State, model: nn.Module, graph: ChannelGraph) -> PruningPlan:
        """Plans the cut for `check`, which must be fast and must not train or measure.

        The L2 norm stands in for scores that need a loss or the scales of norms, a global ranking
        for the sensitivity, and multiply-adds for the latency.
        """
        row = SCORES[self.score]
        score = "l2" if row.needs == "losses" or row.needs_scales else self.score
        scores = compress.score(model, graph, score, generator=torch.Generator().manual_seed(0))
        if self.keep_latency is not None:
            target = latency_target(self, graph, graph.macs, self.keep_latency)
        else:
            target = cut_target(self, state, model, graph, 1.0)
        return compress.plan(
            model,
            graph,
            scores,
            target=target,
            scope="global" if self.scope == "sensitivity" else self.scope,
            round_to=self.round_to,
            min_keep=self.min_keep,
            exact=self.exact,
        )

    def run(self, state: State, folder: StageFolder) -> Generator[Tick, None, State]:
        """Prunes; saves checkpoints after training epochs, measurements and cuts."""
        work = PruneWork(self, state, folder.index)
        yield from drive(work, folder)
        for number, plan in enumerate(work.plans, 1):
            name = "plan.json" if self.steps == 1 else f"plan-{number}.json"
            write_json(folder.path / name, plan.model_dump(mode="json"))
        facts: dict[str, Any] = {
            "kept_parameters": work.plans[-1].parameters_after / state.dense,
            "parity_error": work.error,
            # From the first plan, because later plans list the same layers.
            "whole_layers": dict(work.plans[0].unprunable),
            "restored_examples": work.restored,
        }
        # An approximate cut (which changes outputs) adds results, such as a larger parity error.
        inexact = dict(work.inexact)
        notes = {**_notes(state, work.plans), **inexact.pop(DIFFERENCES, {})}
        left = inexact.pop("left", {})
        if not work.restored and has_batch_norm(work.model):
            left["batch norms"] = (
                "their statistics are those from before the cut: there was no data"
            )
        facts |= inexact
        if notes:
            facts[DIFFERENCES] = notes
        if left:
            facts["left"] = left
        return replace(state, spec=_spec(state, work.model), model=work.model, facts=facts)


def _notes(state: State, plans: Sequence[PruningPlan]) -> dict[str, str]:
    """Returns notes for the result, such as how near the last cut came to its target.

    Returns:
        Key of the target -> sentence. If an earlier stage has pruned the model, the sentence also
        says which network a share refers to.
    """
    notes = dict(plans[-1].notes)
    before = plans[0].parameters_before
    after = plans[-1].parameters_after
    # If an earlier stage has pruned, a reader cannot know which network a share refers to.
    if before < state.dense:
        words = [notes["keep_params"]] if "keep_params" in notes else []
        notes["keep_params"] = "; ".join([*words, share_in_words(state.dense, before, after)])
    return notes


def _spec(state: State, model: nn.Module) -> Any:
    return state.spec.model_copy(update=what_pruning_changed(model, state.spec.build_dense()))


def _widths(plan: PruningPlan) -> str:
    return ", ".join(f"{c.before}→{c.after}" for c in plan.layers)
