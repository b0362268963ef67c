"""The training of an l0 stage: it trains weights and gates, and adapts the penalty lambda."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from pydantic import JsonValue
from torch import Tensor, nn

from fedpress.compress.sparse import geometric_density
from fedpress.compress.sparse.l0 import DensityController, Gates, balance
from fedpress.core.inputs import Inputs
from fedpress.core.parameters import tensors_under
from fedpress.core.random_source import public_stream
from fedpress.stages.epochs import epoch_milestone, total_steps, train_epochs
from fedpress.stages.l0.settings import L0Settings
from fedpress.training.fit import Fit, Step
from fedpress.workspace.drive import Milestone, Snapshot
from fedpress.workspace.state import State, Tick

LOG_ALPHA_DISTANCE = 20.0
"""How far log alpha, the trained parameter of a gate, can move until the density must be reached.
Half of this distance closes an open gate."""
MAX_GATE_LR = 0.5
"""Largest default of the gates' learning rate: with larger steps gates would oscillate."""
ADAM_BETAS = (0.9, 0.99)
"""Adam's decay rates for the averages of the gates' gradients and squared gradients."""
ADAM_EPSILON = 1e-16
"""The usual 1e-8 is larger than the gradient of a single gate among ten million, so Adam would
hardly move it."""


class GatedTraining:
    """A training of weights and gates.

    `fedpress.workspace.drive` runs it, and resumes it from checkpoints.

    Attributes:
        steps: number of training steps until the density must be reached.
        done: number of finished training steps.
        begin: expected density at the beginning.
        controller: adapts lambda, the weight of the density in the loss; None before the first
            loss.
        penalty: the present lambda.
    """

    def __init__(self, stage: L0Settings, state: State, gates: Gates, seed: int) -> None:
        self.stage = stage
        self.source = state
        self.gates = gates
        self.seed = seed
        self.fit = Fit(
            state.model,
            stage,
            task=state.data.task,
            seed=seed,
            objective=self.loss,
            sparse=state.spec.sparse,
            device=state.device,
        )
        whole_training = total_steps(stage.epochs, stage.batch_size, state)
        self.steps = max(1, round(stage.until * whole_training))
        self.done = 0
        # Adam moves a gate by about the learning rate in each step. So with fewer steps the rate
        # must be higher, or no gate could close in time.
        rate = stage.gate_lr or min(LOG_ALPHA_DISTANCE / self.steps, MAX_GATE_LR)
        self.optimizer = torch.optim.Adam(gates.parameters(), rate, ADAM_BETAS, ADAM_EPSILON)
        self.begin = float(gates.density().detach())
        self.controller: DensityController | None = None
        self.penalty = 0.0

    def events(self) -> Iterator[Tick | Milestone]:
        """Trains to the last epoch; after each step of the weights the gates take a step."""
        with self.gates.applied_to(self.fit.model):
            # Each epoch has its own random stream, so that a run that is resumed after an epoch
            # draws the same gates.
            self.gates.generator = public_stream(self.seed, "gates", self.fit.epoch)
            for event in train_epochs(self.fit, self.source):
                if isinstance(event, Step):
                    self.done = event.done
                    self.optimizer.step()
                    self.optimizer.zero_grad()
                    yield Tick(event.done, event.total)
                    continue
                self.gates.generator = public_stream(self.seed, "gates", event.epoch)
                density = float(self.gates.density().detach())
                more = f", expected density {density:.1%}"
                yield epoch_milestone(
                    event, more=more, expected_density=density, lambda_=self.penalty
                )

    def loss(self, model: nn.Module, x: Inputs, logits: Tensor, y: Tensor) -> Tensor:
        """Returns the task's loss plus lambda times the expected density."""
        loss = self.fit.task.loss(logits, y)
        density = self.gates.density()
        if self.controller is None:
            # Scaled by the first loss and density, because losses differ in size between tasks.
            self.controller = DensityController(balance(loss, density, self.gates))
        # The gates may begin below the wanted density. Then the target is the density at the
        # beginning.
        end = min(self.stage.density, self.begin)
        # The target falls by the same factor in every step.
        target = geometric_density(self.done / self.steps, start=self.begin, end=end)
        self.penalty = self.controller.step_(float(density.detach()), target)
        return loss + self.penalty * density

    def state(self) -> Snapshot:
        """Returns the state of training, gates and controller, for a checkpoint."""
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
            "pull": self.penalty,
            "done": self.done,
        }
        return Snapshot(tensors, facts)

    def load_(self, saved: Snapshot) -> None:
        """Continues from a checkpoint of the same model, gates and settings."""
        tensors = saved.tensors
        facts = dict[str, Any](saved.facts)
        self.fit.load_(dict(tensors))
        with torch.no_grad():
            for i, alpha in enumerate(self.gates.log_alphas):
                alpha.copy_(tensors[f"gates/{i}"])
        slots: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors_under(tensors, "adam/").items():
            key, leaf = name.split("/")
            slots.setdefault(int(key), {})[leaf] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": slots})
        self.controller = DensityController(facts["scale"], facts["lambda"])
        self.penalty = facts["pull"]
        self.done = facts["done"]
