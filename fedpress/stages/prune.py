"""The prune stage: scores every channel, orders, removes, and restores the batch-norm statistics."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Generator, Iterator
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, JsonValue
from torch import Tensor, nn

from fedpress import compress
from fedpress.arrays import Arrays
from fedpress.compress import ChannelGraph, PruningPlan
from fedpress.errors import DataError, RecipeError
from fedpress.folder import StageFolder, write_json
from fedpress.models import what_pruning_changed
from fedpress.seeds import derive, generator
from fedpress.state import Name, State, Tick
from fedpress.training import evaluate

BATCH = 256


class PruneStage(BaseModel):
    """`[[stage]] kind = "prune"`: removes whole channels until `keep_params` of the parameters are left."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["prune"]
    name: Name = "prune"
    keep_params: float = Field(0.3, gt=0, le=1, description="share of the dense parameters that stays")
    score: Literal["l1", "l2", "taylor", "bn_scale", "random"] = "l1"
    strategy: Literal["one-shot", "single-channel"] = "one-shot"
    scope: Literal["global", "layer"] = Field("global", description="one ranking for all layers, or one ratio for each")
    round_to: int = Field(8, ge=1, description="widths become multiples of this")
    min_keep: float = Field(0.1, ge=0, le=1, description="share of its channels that every layer keeps")
    calibration: int = Field(2048, ge=1, description="public examples for Taylor scores and batch-norm statistics")

    def check(self, state: State) -> tuple[State, dict[str, Any]]:
        """Plans the cut on the untrained model: the widths may come out otherwise, the sizes not by much.

        Raises:
            RecipeError: if the target cannot be reached.
            ModelError: if the model cannot be traced.
            DataError: if there are no public examples to restore the batch norm with.
        """
        self._calibration(state, 0)
        model = copy.deepcopy(state.model)
        graph = _trace(model.eval(), state)
        scores = compress.score(model, graph, "l2" if self.score in ("taylor", "bn_scale") else self.score,
                                generator=torch.Generator().manual_seed(0))  # fmt: skip
        plan = compress.plan(model, graph, scores, keep_params=self._share(model, state), round_to=self.round_to,
                             scope=self.scope, min_keep=self.min_keep)  # fmt: skip
        compress.remove_(model, plan)
        spec = state.spec.model_copy(update=what_pruning_changed(model, state.spec.build_dense()))
        facts = {"kept_parameters": plan.parameters_after / state.dense, "channels": _widths(plan)}
        return replace(state, spec=spec, model=model.train()), facts

    def run(self, state: State, folder: StageFolder) -> Generator[Tick, None, State]:
        """Prunes; yields a tick for every part of the work."""
        yield Tick(0, 4, "tracing and scoring channels")
        public = self._calibration(state, derive(state.seed, "stage", folder.index))
        plan = self._plan(state.model.to("cpu").eval(), state, public)
        yield Tick(1, 4, "removing channels")
        dense, pruned = state.model, copy.deepcopy(state.model)
        compress.remove_(pruned, plan)
        error = compress.check_parity(dense, pruned, plan, _example(state))
        write_json(folder.path / "plan.json", plan.model_dump(mode="json"))
        yield Tick(2, 4, "restoring batch-norm statistics")
        before = _accuracy(pruned, state)
        if _has_batch_norm(pruned):
            compress.restore_batch_norm_(pruned, _inputs(public, state))
        yield Tick(3, 4, "measuring")
        after = _accuracy(pruned, state)
        widths: list[JsonValue] = [{"name": c.name, "before": c.before, "after": c.after} for c in plan.layers]
        folder.record(layers=widths, accuracy_cut=before, accuracy_restored=after)
        spec = state.spec.model_copy(update=what_pruning_changed(pruned, state.spec.build_dense()))
        yield Tick(4, 4)
        facts: dict[str, Any] = {
            "kept_parameters": plan.parameters_after / state.dense,
            "parity_error": error,
            "whole_layers": dict(plan.whole),
        }
        return replace(state, spec=spec, model=pruned, facts=facts)

    def _plan(self, model: nn.Module, state: State, public: Arrays) -> PruningPlan:
        graph = _trace(model, state)
        chance = generator(state.seed, "prune", "random")

        def losses() -> Iterator[Tensor]:
            for x, y in zip(_inputs(public, state), public.y.split(BATCH), strict=True):
                yield F.cross_entropy(model(x), y)

        share = self._share(model, state)
        how: dict[str, Any] = {"keep_params": share, "round_to": self.round_to, "min_keep": self.min_keep}
        if self.strategy == "single-channel":
            return compress.prune_single_channel(model, graph, self.score, losses=losses, generator=chance, **how)
        scores = compress.score(model, graph, self.score, losses=losses, generator=chance)
        return compress.plan(model, graph, scores, scope=self.scope, **how)

    def _share(self, model: nn.Module, state: State) -> float:
        """Returns the share of what is left now that is `keep_params` of the dense network: cuts may come in steps."""
        left = compress.parameters(model) / state.dense
        if self.keep_params > left:
            raise RecipeError(
                f"prune.keep_params: got {self.keep_params:g}, but an earlier stage has left {left:.4g} of the dense "
                "parameters; give a smaller share"
            )
        return self.keep_params / left

    def _calibration(self, state: State, seed: int) -> Arrays:
        """Draws public examples: scores and statistics of private ones would have to be charged to the ledger."""
        public = state.data.public
        if not len(public):
            raise DataError(
                "prune: it needs public examples for scores and batch-norm statistics, but the "
                "public part is empty; set data.public_share"
            )
        chance = torch.Generator().manual_seed(seed)
        return public.take(torch.randperm(len(public), generator=chance)[: self.calibration])


def _example(state: State) -> Tensor:
    # Two examples: torch.export takes a batch of one for a constant.
    return torch.zeros(2, *state.spec.input_shape)


def _trace(model: nn.Module, state: State) -> ChannelGraph:
    with contextlib.redirect_stderr(io.StringIO()):  # torch.export prints its graph before it fails
        return compress.trace(model, _example(state))


def _inputs(public: Arrays, state: State) -> Iterator[Tensor]:
    return (state.data.preprocess(x) for x in public.x.split(BATCH))


def _accuracy(model: nn.Module, state: State) -> float | None:
    validation = state.data.validation
    return evaluate(model, validation, state.data.preprocess).accuracy if len(validation) else None


def _has_batch_norm(model: nn.Module) -> bool:
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())


def _widths(plan: PruningPlan) -> str:
    return ", ".join(f"{c.before}→{c.after}" for c in plan.layers)
