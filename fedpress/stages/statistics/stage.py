"""The statistics stage: asks clients for noised sums, which scale, fill and select the inputs.

The query is one round of a federate stage on the network `ColumnSums`, whose gradient is the vector
of sums. So messages, noise, secure sums, charges and the policies of data owners are those of
federated training.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from dataclasses import replace
from typing import Any, ClassVar, cast

from pydantic import JsonValue

from fedpress.core.canonical import JSON
from fedpress.data.preparation import Preparation
from fedpress.data.settings import DataSettings
from fedpress.data.statistics import settled, with_few_words
from fedpress.errors import RecipeError, TrainingError
from fedpress.models import ModelSpec
from fedpress.models.column_sums import ColumnSums
from fedpress.models.spec import COLUMN_SUMS
from fedpress.stages.base import Stage
from fedpress.stages.federate.binding import bind
from fedpress.stages.federate.records import stage_facts
from fedpress.stages.federate.server import ServerSide
from fedpress.stages.federate.settings import SecureSumSettings
from fedpress.stages.federate.stage import FederateStage
from fedpress.stages.federate.terms import Terms, query_arguments
from fedpress.stages.statistics.query import Query
from fedpress.stages.statistics.settings import StatisticsSettings
from fedpress.stages.statistics.vocabulary import VocabularyQuery
from fedpress.tasks import ColumnSums as SumsTask
from fedpress.tasks import Language
from fedpress.workspace.stage_folder import StageFolder
from fedpress.workspace.state import State, Tick

ALL = 2**31
"""A batch size above every number of examples: each row counts in the one batch."""
FACTS = (
    "clients", "bytes_up", "bytes_down", "unit", "trust", "delta", "noise_multiplier", "clip_norm",
    "sampling_prob", "sum", "keys", "noise_source", "epsilon", "epsilon_is",
)  # fmt: skip
"""Facts of the round that describe the query, too."""


class StatisticsStage(StatisticsSettings, Stage):
    """`[[stage]] kind = "statistics"`: makes the statistics of private columns, with noise."""

    changes_model: ClassVar[bool] = False
    needs_clients: ClassVar[bool] = True
    gives_statistics: ClassVar[bool] = True

    @property
    def private(self) -> bool:
        """A query always has noise."""
        return True

    def prepared_shape(self, about: Preparation) -> Preparation:
        """Returns the columns with as many words as they keep."""
        return with_few_words(about, self.words)

    def terms(self, architecture: str, arguments: Mapping[str, JSON], data: DataSettings) -> Terms:
        """See `Stage.terms`."""
        # Missing cells are filled by the query's answer, so it counts them.
        gaps = data.missing == "mean"
        texts = data.source == "text"
        asked = query_arguments(self.bounds, self.bins, tuple(self.words), gaps, tokens=texts)
        return Terms(self._round(), COLUMN_SUMS, asked, data.label_columns)

    def check(self, state: State) -> tuple[State, dict[str, Any]]:
        """Plans the query; asks for nothing.

        Returns:
            The state after the stage, whose inputs have the right number and no statistics yet; and
            facts, such as what the noise does to each mean.
        """
        query = self.query(state)
        asking, stage = self.as_round(state, query)
        after, facts = stage.check(asking)
        server = bind(stage, asking).server
        network = cast(ColumnSums, asking.model)
        about = self.prepared_shape(query.about)
        told: dict[str, Any] = {key: facts[key] for key in FACTS if key in facts}
        told["sums"] = network.sums.in_features
        told |= query.planned(network, noise_std(server))
        return self._after(state, about, after), told

    def run(self, state: State, folder: StageFolder) -> Generator[Tick, None, State]:
        """Asks the query in one round, which is charged before any row is read."""
        query = self.query(state)
        asking, stage = self.as_round(state, query)
        work = yield from stage.rounds(asking, folder)
        server = work.server
        if work.now.closed:
            raise TrainingError(
                "no client's sums were used, so there are no statistics",
                place="",
                cure="see refused in records.jsonl, and begin a new run",
            )
        facts = stage_facts(server, work.now, None)
        network = cast(ColumnSums, asking.model)
        answer = query.answer(network, work.now.params, noise_std(server))
        told: dict[str, JsonValue] = {key: facts[key] for key in FACTS if key in facts}
        told |= {"sums": server.uplink.size, "columns": answer.columns}
        told["words"] = answer.words
        if answer.warning:
            told["warning"] = answer.warning
            yield Tick(1, 1, "", f"warning: {answer.warning}")
        after = replace(asking, ledger=work.now.ledger)
        return replace(self._after(state, answer.preparation, after), facts=told)

    def query(self, state: State) -> Query | VocabularyQuery:
        """Returns the query, after checking that it fits the data.

        Raises:
            RecipeError: if a column has no bounds, or is of another kind than the recipe says.
        """
        about = state.data.preparation
        if about is None or not state.data.awaits_statistics:
            raise RecipeError(
                "the data have their statistics already",
                place="",
                cure='set data.statistics = "private", for a table or texts',
            )
        if about.of_rows:
            return Query(self, about)
        if state.data.task.kind != Language.kind:
            raise RecipeError(
                f"a private vocabulary is for the task language, not {state.data.task.kind}",
                place="recipe.data.task",
                cure="leave it out, or leave this stage and data.statistics out",
            )
        return VocabularyQuery(self, about)

    def as_round(self, state: State, query: Query | VocabularyQuery) -> tuple[State, FederateStage]:
        """Returns the state and the stage whose one round is the query."""
        data = state.data
        task = SumsTask(tuple(map(str, data.task.names)), data.task.targets)
        spec = ModelSpec(
            architecture=COLUMN_SUMS,
            arguments=query.arguments,
            input_shape=query.about.shape,
            input_dtype=state.spec.input_dtype,
            class_names=data.class_names,
            task=task.to_json(),
        )
        network = spec.build()
        assert isinstance(network, ColumnSums)
        # A query has no score.
        empty = data.validation.take(data.validation.y.new_zeros(0).long())
        asking = replace(
            state,
            spec=spec,
            model=network,
            data=replace(data, task=task, validation=empty),
            score=0.0,
            given=None,
        )
        return asking, self._round(clip_norm=network.norm)

    def _round(self, **privacy: float) -> FederateStage:
        """Returns the stage of the one round; `privacy` adds keys to its privacy."""
        return FederateStage.model_validate(
            {
                "kind": "federate",
                "name": self.name,
                "num_rounds": 1,
                "batch_size": ALL,
                "lr": 1.0,
                "scored_clients": 0,
                "privacy": {**self.privacy.model_dump(), **privacy},
                **self.model_dump(include=set(SecureSumSettings.model_fields)),
            }
        )

    def _after(self, state: State, about: Preparation, asked: State) -> State:
        """Returns the state with the statistics in `about`, and the charges of `asked`."""
        data = settled(state.data, about)
        assert data.preparation is not None
        told = {
            "mean": data.preprocess.mean,
            "std": data.preprocess.std,
            "class_names": data.class_names,
            "task": data.task.to_json(),
            "preparation": data.preparation.to_json(),
        }
        return replace(
            state,
            data=data,
            spec=state.spec.model_copy(update=told),
            ledger=asked.ledger,
        )


def noise_std(server: ServerSide) -> float:
    """Returns the standard deviation of the noise on the mean of each sum, if all clients answer."""
    plan = next(iter(server.protection.plans.values()))
    clients = len(server.population)
    noise = server.uplink.trust.noise
    grid = server.protection.grid
    # The clients' noise adds up; each noises its own mean, or its own vector.
    if noise == "step":
        return plan.noise_std * math.sqrt(clients) / server.population.total
    if noise == "vector":
        return plan.noise_std / math.sqrt(clients)
    divisor = server.protection.divisor or clients
    if grid is not None:
        assert grid.noise is not None
        return math.sqrt(clients * grid.noise.variance) / grid.scale / divisor
    return plan.noise_std / divisor
