"""The federate stage: federated learning, in rounds of local training on private data."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

from fedpress.codecs import Clip, Settings
from fedpress.core import parameters
from fedpress.core.canonical import JSON
from fedpress.data.settings import DataSettings
from fedpress.errors import RecipeError
from fedpress.nn.compact import expand_
from fedpress.stages.base import Stage
from fedpress.stages.federate.binding import bind
from fedpress.stages.federate.grid import default_secure_chain
from fedpress.stages.federate.protection import is_secure, steps_per_round
from fedpress.stages.federate.records import stage_facts
from fedpress.stages.federate.rehearsal import rehearse
from fedpress.stages.federate.rounds import FederatedRounds
from fedpress.stages.federate.server import ServerSide
from fedpress.stages.federate.settings import FederateSettings
from fedpress.stages.federate.terms import Terms
from fedpress.training.evaluate import evaluate
from fedpress.workspace.drive import drive
from fedpress.workspace.stage_folder import StageFolder
from fedpress.workspace.state import State, Tick


class FederateStage(FederateSettings, Stage):
    """`[[stage]] kind = "federate"`: trains the model in federated rounds over the clients."""

    needs_clients: ClassVar[bool] = True
    places: ClassVar[Mapping[str, str]] = {
        # Functions that the stage calls name their own arguments in errors (left). The user sees
        # the keys of the recipe instead (right).
        "adaptive": "privacy.adaptive",
        "bands": "privacy.correlated.bands",
        "bits": "uplink.discretize.bits",
        "buffer": "schedule.buffer",
        "chain": "uplink",
        "clip_norm": "privacy.clip_norm",
        "count_noise": "privacy.adaptive.count_noise",
        "delta": "privacy.delta",
        "epsilon": "privacy.epsilon",
        "noise_multiplier": "privacy.noise_multiplier",
        "quantile": "privacy.adaptive.quantile",
        "sampling_prob": "sampling",
        "size": "cohort",
        "trust": "privacy.trust",
        "unit": "privacy.unit",
    }

    @property
    def private(self) -> bool:
        """Whether the stage guarantees differential privacy to the clients."""
        return self.privacy is not None

    @property
    def hides_clients(self) -> bool:
        """Whether nobody may learn what a single client holds: by privacy, or by a secure sum."""
        return self.private or is_secure(self)

    def terms(self, architecture: str, arguments: Mapping[str, JSON], data: DataSettings) -> Terms:
        """See `Stage.terms`."""
        return Terms(self, architecture, arguments, data.label_columns)

    def check(self, state: State) -> tuple[State, dict[str, Any]]:
        """Plans codecs, privacy and schedule; trains nothing.

        Returns:
            The state after the stage, with all rounds charged to the ledger; and facts for the
            user, such as bytes, noise and epsilon.

        Raises:
            RecipeError: if settings do not fit together, or a private step fails on trial examples.
            PrivacyError: if this stage and earlier stages together would exceed the budget.
        """
        word = state.data.task.shown_metrics[0]
        if self.target_accuracy is not None and not word.share:
            kind = state.data.task.kind
            raise RecipeError(
                f"got {self.target_accuracy}, but the primary metric of {kind} is {word.name}",
                place="target_accuracy",
                cure="take target_metric",
            )
        federation = bind(self, state)
        server = federation.server
        sizes = {name: value for name, value in server.sizes().items() if value is not None}
        facts: dict[str, Any] = {
            "clients": len(server.population),
            **self._counts(server),
            "cohort": server.uplink.cohort.size,
            "num_rounds": self.num_rounds,
            **server.schedule_facts(),
            "trained_values": server.uplink.size,
            "batch_size": self.batch_size,
            **sizes,
            **server.grid_facts(),
        }
        if is_secure(self) and not self.uplink:
            chain = default_secure_chain(self.privacy is not None)
            facts["uplink"] = f"by default: {', '.join(_short(one) for one in chain)}"
        if self.warnings:
            facts["warning"] = "; ".join(self.warnings)
        ledger = server.ledger
        if self.privacy is not None:
            # All rounds are charged at once, so a budget that is too small fails now and not after
            # hours of training.
            if self.num_rounds:
                ledger = server.spend(ledger, server.planned_tasks(), 1, self.num_rounds)
            spent = ledger.spent(delta=self.privacy.delta)
            facts |= server.privacy_facts()
            facts["epsilon"] = spent.epsilon
            if spent.note:
                facts["epsilon_is"] = spent.note
            if self.num_rounds:
                data = state.data
                parts = (data.public, data.validation, data.test)
                rehearse(list(federation.clients.values()), parts, data.task)
        return replace(state, ledger=ledger), facts

    def _counts(self, server: ServerSide) -> dict[str, Any]:
        """Returns the range of the clients' numbers of examples, if these numbers are public."""
        if server.population.examples is None:
            return {}
        counts = server.population.counts.values()
        return {
            "examples_per_client": [min(counts), max(counts)],
            "steps_per_round": steps_per_round(self, max(counts)),
        }

    def run(self, state: State, folder: StageFolder) -> Generator[Tick, None, State]:
        """Runs the rounds; yields a tick for each, and saves a checkpoint after each."""
        data = state.data
        if state.score is None and len(data.test):
            before = evaluate(state.model, data.test, data.preprocess, data.task)
            state = replace(state, score=before.score)
        work = yield from self.rounds(state, folder)
        server = work.server
        parameters.assign_(server.model, work.now.params)
        facts = stage_facts(server, work.now, state.score, state.rounding)
        # Sparse weights were trained as vectors of their nonzero values; now they get their shapes
        # back.
        model = expand_(server.model)
        # `trainable` freezes parameters for this stage only.
        for p in model.parameters():
            p.requires_grad_(True)
        return replace(state, model=model, ledger=work.now.ledger, facts=facts)

    def rounds(self, state: State, folder: StageFolder) -> Generator[Tick, None, FederatedRounds]:
        """Runs the rounds, and returns them with their result."""
        for warning in self.warnings:
            yield Tick(0, self.num_rounds, "", f"warning: stage.{self.name}.{warning}")
        # Without a checkpoint the stage starts from the first round. Simulated clients must forget
        # what they answered before the restart, or they would refuse to answer the same rounds
        # again. Clients over a network do not forget: they send the same bytes again, since new
        # answers would cost privacy again.
        if not folder.begun and state.network is None:
            folder.forget()
        work = FederatedRounds(bind(self, state, folder.memory).server, state)
        yield from drive(work, folder)
        return work


def _short(transform: Settings) -> str:
    if isinstance(transform, Clip):
        return f"{transform.kind} {transform.clip_norm:g}"
    return transform.kind
