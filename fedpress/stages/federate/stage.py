"""The federate stage: rounds of local training on private data, with the promised privacy, evaluated as they go."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Generator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from fedpress.codecs import Clip, Settings
from fedpress.core import parameters
from fedpress.errors import PrivacyError, RecipeError, TrainingError
from fedpress.federation import RoundRecord
from fedpress.federation.local import too_large
from fedpress.nn.compact import expand_
from fedpress.privacy.accounting.accountant import Spent
from fedpress.privacy.ledger import Ledger, LedgerEntry
from fedpress.stages.base import Stage
from fedpress.stages.federate.binding import bind
from fedpress.stages.federate.contract import algorithm_of, local_settings
from fedpress.stages.federate.failures import PRIVATE, Failures, in_words, told
from fedpress.stages.federate.privacy import is_secure, secure_list, steps_per_round
from fedpress.stages.federate.rehearsal import rehearse
from fedpress.stages.federate.server import PROMISE, ServerPlan
from fedpress.stages.federate.settings import FederateSettings
from fedpress.tasks import Task
from fedpress.tasks.base import number
from fedpress.training.evaluate import Evaluation, evaluate
from fedpress.workspace.stage_folder import StageFolder
from fedpress.workspace.state import State, Tick

CLOSED = 3
"""Secure sums in a row that may stay closed before a run stops."""


class FederateStage(FederateSettings, Stage):
    """`[[stage]] kind = "federate"`: FedAvg over the clients of the data set."""

    places: ClassVar[Mapping[str, str]] = {
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
        "steps_per_round": "privacy.steps_per_round",
        "trust": "privacy.trust",
        "unit": "privacy.unit",
    }

    @property
    def private(self) -> bool:
        """Whether it promises something about the clients' rows."""
        return self.privacy is not None

    def check(self, state: State) -> tuple[State, dict[str, Any]]:
        """Binds model, clients, uplink and privacy: says bytes, noise and epsilon before anything is trained.

        Raises:
            RecipeError: if the parts do not fit together.
            PrivacyError: if the budget cannot be kept, also together with what earlier stages spend.
        """
        word = state.data.task.words[0]
        if self.target_accuracy is not None and not word.share:
            raise RecipeError(
                f"got {self.target_accuracy}, but the task {state.data.task.kind} goes by {word.name}",
                place="target_accuracy",
                cure="take target_metric",
            )
        federation = bind(self, state)
        server = federation.server
        facts: dict[str, Any] = {
            "clients": len(server.population),
            **self._counts(server),
            "cohort": server.uplink.cohort.size,
            "num_rounds": self.num_rounds,
            **server.foreseen(),
            "trained_values": server.uplink.size,
            "batch_size": self.batch_size,
            **{name: value for name, value in server.sizes().items() if value is not None},
            **server.grid(),
        }
        if is_secure(self) and not self.uplink:
            facts["uplink"] = (
                f"by default: {', '.join(_short(one) for one in secure_list(self.privacy is not None))}"
            )
        if self.warnings:
            facts["warning"] = "; ".join(self.warnings)
        ledger = server.ledger
        if self.privacy is not None:
            charges = (
                server.charges(server.planned_tasks(), 1, self.num_rounds)
                if self.num_rounds
                else []
            )
            ledger = self._spend(ledger, charges)
            spent = ledger.spent(delta=self.privacy.delta)
            facts |= server.promise() | {"epsilon": spent.epsilon}
            facts |= {"epsilon_is": spent.note} if spent.note else {}
            if self.num_rounds:
                data = state.data
                parts = (data.public, data.validation, data.test)
                rehearse(list(federation.clients.values()), parts, data.task)
        return replace(state, ledger=ledger), facts

    def _counts(self, server: ServerPlan) -> dict[str, Any]:
        """Returns what follows from the clients' numbers of examples, where these are public."""
        if server.population.examples is None:
            return {}
        counts = server.population.counts.values()
        return {
            "examples_per_client": [min(counts), max(counts)],
            "steps_per_round": steps_per_round(self, max(counts)),
        }

    def run(self, state: State, folder: StageFolder) -> Generator[Tick, None, State]:
        """Runs the rounds; yields a tick for each, and saves a checkpoint after each."""
        for warning in self.warnings:
            yield Tick(0, self.num_rounds, "", f"warning: stage.{self.name}.{warning}")
        saved = folder.load_progress()
        if not saved[1]:
            folder.forget()  # what clients remember of a beginning that was lost has nothing to go on from
        server, data = bind(self, state, folder.memory).server, state.data
        now = Progress.load(*saved) if saved[1] else Progress.begin(server)
        if state.score is None and len(data.test):
            before = evaluate(state.model, data.test, data.preprocess, data.task)
            state = replace(state, score=before.score)
        if server.hides:
            _ = server.planned_bytes  # of the model as it is bound: a later one may hold anything
        began = time.perf_counter() - now.seconds
        running = server.rounds(now.params, start=now.round, server_state=now.server_state)
        said = ""
        while not self._enough(now, data.task):
            # The round is charged before it touches data. One that is killed and done again draws the same noise
            # from the same seeds, so it gives the same reply and costs nothing more.
            try:
                ledger = self._charge(now, server)
            except PrivacyError:
                now = replace(now, stopped="the next round would pass the privacy budget")
                break
            at = f"round {now.round + 1}/{self.num_rounds}"  # it may take minutes: say so before it begins
            yield Tick(now.round, self.num_rounds, f"{at}, {now.note}" if now.note else at)
            record = next(running)
            waited = record.timing.answered
            closed = self._closed(record, now, server)
            record = self._public(record, server)
            parameters.assign_(server.model, record.params)
            seen = self._look(server.model, state)
            known, failures = now.failures.sure, now.failures.after(record, waited, server)
            now = replace(
                now.after(record, ledger, seen, time.perf_counter() - began, data.task),
                closed=closed,
                failures=failures,
            )
            folder.record(**self._line(record, now, seen, server))
            folder.save_progress(now.tensors(), now.facts())
            self._stop_if_everything_fails(now)
            warning = in_words(told(record.refused, server), waited, record.round)
            if warning and warning.partition(":")[2] != said.partition(":")[2]:
                yield Tick(now.round, self.num_rounds, now.note, warning)
            said = warning
            if failures.sure and not known:
                yield Tick(now.round, self.num_rounds, now.note, self._last_warning(now))
        last = self._last_warning(now)
        yield Tick(
            now.round, self.num_rounds, now.stopped or now.note, f"warning: {last}" if last else ""
        )
        parameters.assign_(server.model, now.params)
        facts = self._facts(state, server, now)
        model = expand_(server.model)
        for p in model.parameters():
            p.requires_grad_(True)
        return replace(state, model=model, ledger=now.ledger, facts=facts)

    @property
    def target(self) -> float | None:
        """The value of the task's primary metric at which it is enough."""
        return self.target_metric if self.target_metric is not None else self.target_accuracy

    def _look(self, model: nn.Module, state: State) -> Evaluation | None:
        """Measures on the public validation set; private data is never looked at without a charge."""
        if not len(state.data.validation):
            return None
        return evaluate(
            model,
            state.data.validation,
            state.data.preprocess,
            state.data.task,
            precision=self.precision,
        )

    def _enough(self, now: Progress, task: Task) -> bool:
        if now.round >= self.num_rounds or now.stopped:
            return True
        reached = now.best == self.target or task.better(now.best, self.target)
        if self.target is not None and reached:
            return True
        waited = now.round - now.best_round
        return bool(self.patience and waited >= self.patience and now.best is not None)

    def _charge(self, now: Progress, server: ServerPlan) -> Ledger:
        """Returns the ledger with the next round in it; PrivacyError if that would pass the budget."""
        if self.privacy is None:
            return now.ledger
        number = now.round + 1
        tasks = Counter(server.participation.asked(number))
        return self._spend(now.ledger, server.charges(tasks, number, number))

    def _closed(self, record: RoundRecord, now: Progress, server: ServerPlan) -> int:
        """Returns how many rounds in a row nothing came of, and refuses to go on in vain.

        A secure sum may stay closed because clients vanished: that round is over, for its questions were answered, and
        the next one may fare better. So it is where all were late. Otherwise the rounds would run to their end and
        learn nothing.

        Raises:
            TrainingError: if no client has done its work; under a secure sum, or if they were late, in three rounds one
                after another.
        """
        waited, late = record.timing.answered, record.timing.late
        if not waited or set(waited) != set(record.refused):
            return 0
        closed = now.closed + 1
        may_fare_better = server.protection.grid is not None or len(late) == len(waited)
        if not may_fare_better or closed >= CLOSED:
            reason = told(record.refused, server)[waited[0]]
            # Where the cohort is secret, no name may fall.
            why = (
                f", for instance {waited[0]}: {reason}"
                if reason != PRIVATE and not server.hides
                else ""
            )
            if late:
                why += f"; raise stage.{self.name}.schedule.deadline"
            lr = algorithm_of(self).optimizer.lr
            if why and reason.startswith("DivergedError: ") and lr > 1:
                why += f", or stage.{self.name}.server.lr (now {lr:g})"
            raise TrainingError(
                f"no update counted in round {record.round}{why}",
                place="federate",
                cure=(
                    "see whether the clients are running and work with the same recipe; the rounds "
                    "before it are kept"
                ),
            )
        return closed

    def _stop_if_everything_fails(self, now: Progress) -> None:
        """Does not spend more on noise: the round that was counted is saved and charged.

        Raises:
            TrainingError: if the noised count says that every protected unit fails.
        """
        if now.failures.everything:
            assert self.privacy is not None
            many = (
                f"{now.failures.estimate(self.privacy.unit)} gave nothing up to round {now.round}"
            )
            cause = now.failures.cause(self._rates())
            raise TrainingError(
                f"{many}, and nearly all in the last of them: {cause}",
                place="federate",
                cure="the rounds so far are charged",
            )

    def _rates(self) -> str:
        """Names the settings that make training diverge if they are too large."""
        algorithm = algorithm_of(self)
        place, lr = f"stage.{self.name}.", algorithm.optimizer.lr
        rates = too_large(local_settings(self), self.lr, pulls=algorithm.pulls, place=place)
        return rates if lr <= 1 else f"{rates} or {place}server.lr (now {lr:g})"

    def _last_warning(self, now: Progress) -> str:
        unit = self.privacy.unit if self.privacy is not None else None
        warning = now.failures.warning(unit)
        if now.failures.sure and not warning.startswith("about"):
            estimate = f"{now.failures.estimate(unit)} gave nothing"
            warning = f"{warning}; {estimate}" if warning else estimate
        if now.failures.sure:
            warning += f": {now.failures.cause(self._rates())}"
        return warning

    def _public(self, record: RoundRecord, server: ServerPlan) -> RoundRecord:
        """Returns what may be written down of a round.

        Where the server is trusted with updates that no noise covers, it must not tell who took part or was refused,
        nor bytes that depend on what they sent: then those of the plan stand in their place.
        """
        if not server.hides:
            return record
        planned, timing = (
            server.planned_bytes,
            replace(record.timing, answered=(), spare=(), late=()),
        )
        if self.sampling == "poisson":  # how long a round took tells which clients were drawn
            timing = replace(timing, simulated_seconds=None)
        return replace(
            record, bytes_up=planned[0], bytes_down=planned[1], refused={}, timing=timing
        )

    def _spend(self, ledger: Ledger, charges: list[LedgerEntry]) -> Ledger:
        assert self.privacy is not None
        if self.privacy.epsilon is None or not charges:
            return ledger.add(*charges)
        return ledger.spend(
            *charges, epsilon=self.privacy.epsilon * (1 + 1e-9), delta=self.privacy.delta
        )

    def _epsilon(self, now: Progress) -> float | None:
        return None if self.privacy is None else self._spent(now).epsilon

    def _spent(self, now: Progress) -> Spent:
        assert self.privacy is not None
        return now.ledger.spent(delta=self.privacy.delta)

    def _line(
        self, record: RoundRecord, now: Progress, seen: Evaluation | None, server: ServerPlan
    ) -> dict[str, Any]:
        failures = {} if record.failures is None else {"failures": asdict(record.failures)}
        return {
            "round": record.round,
            "num_rounds": self.num_rounds,
            server.beginning.task.primary: number(seen.score) if seen else None,
            "loss": seen.loss if seen else None,
            "bytes_up": record.bytes_up,
            "bytes_down": record.bytes_down,
            "epsilon": self._epsilon(now),
            "clients": record.clients,
            "refused": told(record.refused, server),
            **failures,
            "seconds": round(record.seconds, 2),
            **self._times(record),
        }

    def _times(self, record: RoundRecord) -> dict[str, Any]:
        """Returns what a record says of the clock and of clients at different speeds; nothing of plain rounds."""
        timing = record.timing
        told: dict[str, Any] = {}
        if timing.simulated_seconds is not None:
            told["simulated_seconds"] = timing.simulated_seconds
        if not self.schedule.one_model:
            told["staleness"] = list(timing.staleness)
        if timing.spare:
            told["spare"] = list(timing.spare)
        return told

    def _facts(self, state: State, server: ServerPlan, now: Progress) -> dict[str, Any]:
        """Every key is given also without privacy, so that no promise of an earlier stage outlives an open one."""
        metric = state.data.task.primary
        promise = server.promise() if self.privacy is not None else dict.fromkeys(PROMISE)
        return {
            "rounds": now.round,
            "clients": len(server.population),
            "cohort": server.uplink.cohort.size,
            "schedule": self.schedule.kind,
            "trained_values": server.uplink.size,
            f"{metric}_before": state.score,
            "bytes_up": now.bytes_up,
            "bytes_down": now.bytes_down,
            **promise,
            **server.grid(),
            "bytes": "planned" if server.hides else "counted",
            "sum": "secure" if server.protection.grid is not None else "plain",
            "keys": server.keys,
            "epsilon": self._epsilon(now),
            "epsilon_is": self._spent(now).note or None if self.privacy is not None else None,
            f"client_{metric}": server.client_scores(now.params),
            "stopped": now.stopped or None,
            "failures": now.failures.facts(self.privacy.unit if self.privacy is not None else None),
            "warning": self._last_warning(now) or None,
        }


def _short(transform: Settings) -> str:
    return (
        f"{transform.kind} {transform.clip_norm:g}"
        if isinstance(transform, Clip)
        else transform.kind
    )


@dataclass(frozen=True, eq=False)
class Progress:
    """Where the rounds stand: all that is needed to go on, and to stop early."""

    params: Tensor
    ledger: Ledger
    server_state: dict[str, Tensor] | None = None
    round: int = 0
    best: float | None = None
    best_round: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float = 0.0
    note: str = ""
    stopped: str = ""
    closed: int = 0
    failures: Failures = field(default_factory=Failures)

    @classmethod
    def begin(cls, server: ServerPlan) -> Progress:
        """Stands before the first round."""
        return cls(parameters.flatten(server.model), server.ledger)

    def after(
        self,
        record: RoundRecord,
        ledger: Ledger,
        seen: Evaluation | None,
        seconds: float,
        task: Task,
    ) -> Progress:
        """Stands after the round of `record`, whose validation was `seen`."""
        score = number(seen.score) if seen else None
        better = task.better(score, self.best)
        return Progress(
            params=record.params,
            ledger=ledger,
            server_state=record.server_state,
            round=record.round,
            best=score if better else self.best,
            best_round=record.round if better else self.best_round,
            bytes_up=self.bytes_up + record.bytes_up,
            bytes_down=self.bytes_down + record.bytes_down,
            seconds=seconds,
            note=f"validation {task.formatted(score)}" if seen else "",
        )

    def tensors(self) -> dict[str, Tensor]:
        """Returns the tensors of a checkpoint."""
        return {
            "params": self.params,
            **{f"server/{k}": v for k, v in (self.server_state or {}).items()},
        }

    def facts(self) -> dict[str, Any]:
        """Returns the JSON part of a checkpoint."""
        plain = {f: getattr(self, f) for f in PLAIN}
        return {**plain, "ledger": self.ledger.to_json(), "failures": self.failures.to_json()}

    @classmethod
    def load(cls, tensors: dict[str, Tensor], facts: dict[str, Any]) -> Progress:
        """Reads what `tensors` and `facts` gave."""
        server = {
            k.removeprefix("server/"): v for k, v in tensors.items() if k.startswith("server/")
        }
        plain = {f: facts[f] for f in PLAIN}
        failures = Failures.from_json(facts.get("failures", {}))
        return cls(
            tensors["params"], Ledger.from_json(facts["ledger"]), server, **plain, failures=failures
        )


PLAIN = (
    "round",
    "best",
    "best_round",
    "bytes_up",
    "bytes_down",
    "seconds",
    "note",
    "stopped",
    "closed",
)
