"""The sparsify stage: sets the least important weights to zero, and can train the other weights."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from typing import Any, ClassVar

from pydantic import JsonValue
from torch import nn

from fedpress.compress.prune.ignoring import ignored_names
from fedpress.compress.sparse import Masks, Pattern, Weights, apply_masks_, density_of
from fedpress.core.random import derive
from fedpress.errors import RecipeError
from fedpress.nn.resize import copied
from fedpress.stages.base import Stage
from fedpress.stages.public import check_public_training, draw_calibration
from fedpress.stages.sparsify.masks import choose_masks, weights_to_prune
from fedpress.stages.sparsify.settings import FROM_DATA, SparsifySettings
from fedpress.stages.sparsify.training import MaskedTraining
from fedpress.stages.zeros import allowed_masks, with_sparse_weights
from fedpress.workspace.drive import drive
from fedpress.workspace.stage_folder import StageFolder
from fedpress.workspace.state import State, Tick


class SparsifyStage(SparsifySettings, Stage):
    """`[[stage]] kind = "sparsify"`: keeps `density` of the weights and sets the others to zero.

    Later stages keep the zeros. Schedules:

    - "one-shot" prunes before the first epoch.
    - "gradual" prunes in steps from `begin` to `until` of the training; the density follows a cubic
      function (Zhu & Gupta 2017, arXiv:1710.01878).
    - "rewind" repeats three steps `rounds` times: train until epoch `epochs`; prune; reset the
      remaining weights to their values at epoch `rewind_to`, from which the next training goes on.
      Then it trains a last time (lottery tickets, Frankle et al. 2020, arXiv:1912.05671).
    - "rigl" prunes before the first epoch. In the first part of the training (until the share
      `until`), it replaces the smallest weights by pruned weights with large gradients (Evci et al.
      2020, arXiv:1911.11134).
    """

    several_inputs: ClassVar = True

    def setting_reading_labels(self) -> str:
        """Returns the first setting that needs labels: training, sensitivity or score; else ""."""
        if self.epochs:
            return "epochs"
        if self.scope == "sensitivity":
            return 'scope = "sensitivity"'
        return f'score = "{self.score}"' if self.score in FROM_DATA else ""

    def check(self, state: State) -> tuple[State, dict[str, Any]]:
        """Prunes a copy of the model by magnitude, to find errors before the run.

        `run` prunes the same number of entries, but may choose others.

        Raises:
            RecipeError: if no weight fits the pattern, or the density cannot be reached.
            ModelError: if the model has no weight that can be pruned.
            DataError: if public examples are needed (for scores, sensitivity or training) and there
                are none.
        """
        ignored_names(state.model, self.ignore)
        check_public_training(state, self)
        if self.score in FROM_DATA or self.scope == "sensitivity":
            draw_calibration(state, self.calibration, 0)
        model = copied(state.model)
        weights = weights_to_prune(self, model, state)
        scores = {w.name: w.value.detach().abs() for w in weights.chosen}
        within = allowed_masks(model, state, weights)
        masks = choose_masks(self, weights.chosen, scores, self.target(weights), within)
        reached = density_of(masks)
        wanted = self.target(weights)
        # With large blocks in small layers only few densities are possible, so the nearest possible
        # density may be far from the wanted density.
        fixed = Pattern.parse(self.pattern).density is not None
        if not fixed and abs(reached - wanted) > 0.01 + 0.1 * wanted:
            raise RecipeError(
                (
                    f"{wanted:g} cannot be reached with pattern '{self.pattern}', the nearest is "
                    f"{reached:.4g}"
                ),
                place="density",
                cure="give the nearest density, or a pattern of smaller blocks",
            )
        apply_masks_(weights.chosen, masks)
        epochs = self.epochs
        if self.schedule == "rewind":
            # After each cut the training goes on from epoch `rewind_to`.
            epochs += self.rounds * (self.epochs - self.rewind_to)
        facts = {**_facts(model, weights, masks), "epochs": epochs}
        return replace(state, spec=with_sparse_weights(state.spec, masks), model=model), facts

    def run(self, state: State, folder: StageFolder) -> Generator[Tick, None, State]:
        """Prunes and trains; yields a tick for each step, saves a checkpoint after each epoch."""
        work = MaskedTraining(self, state, derive(state.seed, "stage", folder.index))
        yield from drive(work, folder)
        model = work.fit.result_()
        apply_masks_(work.weights.chosen, work.masks)
        # Usually the training has updated the batch-norm statistics. Without training it has not.
        # And with `ema` the averaged statistics do not belong to the averaged weights.
        if self.ema or not self.epochs:
            work.restore_norms_()
        layers: list[JsonValue] = []
        for weight in work.weights.chosen:
            kept = int(work.masks[weight.name].sum())
            layers.append({"name": weight.name, "entries": weight.size, "kept": kept})
        folder.record(layers=layers)
        for point in work.points:
            folder.record(sensitivity=point.to_json(state.data.task.primary))
        facts = _facts(model, work.weights, work.masks)
        return replace(
            state, spec=with_sparse_weights(state.spec, work.masks), model=model, facts=facts
        )


def _facts(model: nn.Module, weights: Weights, masks: Masks) -> dict[str, Any]:
    """Returns the entries of the stage's result, such as the density."""
    zeros = sum(int((~m).sum()) for m in masks.values())
    return {
        "density": density_of(masks),
        "nonzero_parameters": sum(p.numel() for p in model.parameters()) - zeros,
        "dense_weights": dict(weights.dense),
    }
