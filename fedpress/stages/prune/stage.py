"""The prune stage: scores every channel, orders, removes, and restores the batch-norm statistics, once or in steps."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import nn

from fedpress import compress
from fedpress.compress import SCORES, PruningPlan
from fedpress.compress.prune.ignoring import ignored
from fedpress.errors import RecipeError, renaming
from fedpress.models import what_pruning_changed
from fedpress.nn.batch_norm import has_batch_norm
from fedpress.nn.resize import copied
from fedpress.stages.base import Stage
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
    """`[[stage]] kind = "prune"`: removes whole channels until `keep_params` of the parameters are left.

    Or until `keep_macs` of the multiply-adds, `keep_latency` of the milliseconds in onnxruntime on
    this machine, or `max_bytes` are. In `steps` cuts the network is trained between them as
    `finetune` says, and with `rewind` before each; it then takes the surviving weights back to what
    they were when the stage began (Frankle & Carbin 2019).
    """

    several_inputs: ClassVar = True
    requires_one_of: ClassVar = TARGET_KEYS
    defaults_without_data: ClassVar = {"calibration": 0}

    def setting_reading_labels(self) -> str:
        """By training between the cuts, or by what it measures."""
        if self.finetune is not None:
            return "finetune"
        if self.scope == "sensitivity":
            return 'scope = "sensitivity"'
        return f'score = "{self.score}"' if SCORES[self.score].needs == "losses" else ""

    def check(self, state: State) -> tuple[State, dict[str, Any]]:
        """Plans the cut on the untrained model: the widths may come out otherwise, the sizes not by much.

        Raises:
            RecipeError: if the target cannot be reached.
            ModelError: if the model cannot be traced, or its layers lack what the score looks at.
            DataError: if there are no public examples to score or to restore the batch norm with.
            ExportError: if a latency is wanted of what cannot be exported.
        """
        if state.spec.quantized:
            raise RecipeError(
                "the model is quantized already",
                place="prune",
                cure="put this stage before the quantization",
            )
        ignored(state.model, self.ignore)
        public_examples(self, state, 0)
        if self.finetune is not None:
            with renaming({key: f"finetune.{key}" for key in type(self.finetune).model_fields}):
                check_public_training(state, self.finetune)
        model = copied(state.model)
        graph = trace_channels(model.eval(), state, self)
        row = SCORES[self.score]
        if row.needs_scales:
            compress.score(model, graph, self.score)
        scores = compress.score(model, graph, "l2" if row.needs == "losses" or row.needs_scales else self.score,
                                generator=torch.Generator().manual_seed(0))  # fmt: skip
        # What is measured in a trained network, or by the clock, is guessed here.
        scope = "global" if self.scope == "sensitivity" else self.scope
        how: dict[str, Any] = {"scope": scope, "round_to": self.round_to, "min_keep": self.min_keep,
                               "exact": self.exact}  # fmt: skip
        if self.keep_latency is not None:
            guess = latency_target(self, graph, graph.macs, self.keep_latency)
            plan = compress.plan(model, graph, scores, target=guess, **how)
        else:
            plan = compress.plan(
                model, graph, scores, target=cut_target(self, state, model, graph, 1.0), **how
            )
        compress.remove_(model, plan)
        if self.keep_latency is not None:
            latency_ms(model, state, seconds=0.0)
        facts: dict[str, Any] = {
            "kept_parameters": plan.parameters_after / state.dense,
            "channels": _widths(plan),
        }
        if told := _told(state, [plan]):
            facts["told"] = told
        return replace(state, spec=_spec(state, model), model=model.train()), facts

    def run(self, state: State, folder: StageFolder) -> Generator[Tick, None, State]:
        """Prunes; yields a tick for every part of the work. What takes long is saved after each part."""
        work = PruneWork(self, state, folder.index)
        yield from drive(work, folder)
        for number, plan in enumerate(work.plans, 1):
            name = "plan.json" if self.steps == 1 else f"plan-{number}.json"
            write_json(folder.path / name, plan.model_dump(mode="json"))
        facts: dict[str, Any] = {
            "kept_parameters": work.plans[-1].parameters_after / state.dense,
            "parity_error": work.error,
            "whole_layers": dict(work.plans[0].unprunable),
            "restored_examples": work.restored,
        }
        inexact = dict(work.inexact)
        told = {**_told(state, work.plans), **inexact.pop("told", {})}
        left = inexact.pop("left", {})
        if not work.restored and has_batch_norm(work.model):
            left["batch norms"] = (
                "their statistics are those of the uncut network: there was no data"
            )
        facts |= {**inexact, **({"told": told} if told else {}), **({"left": left} if left else {})}
        return replace(state, spec=_spec(state, work.model), model=work.model, facts=facts)


def _told(state: State, plans: Sequence[PruningPlan]) -> dict[str, str]:
    """Returns what whoever asked for the cuts should know: how near they came, and of what a share is."""
    told = dict(plans[-1].notes)
    before, after = plans[0].parameters_before, plans[-1].parameters_after
    if before < state.dense:
        words = [told["keep_params"]] if "keep_params" in told else []
        told["keep_params"] = "; ".join([*words, share_in_words(state.dense, before, after)])
    return told


def _spec(state: State, model: nn.Module) -> Any:
    return state.spec.model_copy(update=what_pruning_changed(model, state.spec.build_dense()))


def _widths(plan: PruningPlan) -> str:
    return ", ".join(f"{c.before}→{c.after}" for c in plan.layers)
