"""Runs the rounds of a federate stage: charges each round to the ledger, runs and evaluates it.

The ledger is the list of all privacy costs of a run. Epsilon is computed from it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from fedpress.core import parameters
from fedpress.core.log import logger
from fedpress.errors import PrivacyError
from fedpress.federation import RoundRecord
from fedpress.privacy.ledger import Ledger
from fedpress.stages.federate.failures import public_reasons, refusal_line
from fedpress.stages.federate.progress import Progress
from fedpress.stages.federate.records import public_part, round_line
from fedpress.stages.federate.server import ServerSide
from fedpress.stages.federate.stopping import (
    check_failures,
    count_closed_rounds,
    is_finished,
    last_warning,
)
from fedpress.training.evaluate import Evaluation, evaluate
from fedpress.workspace.drive import Milestone, Snapshot
from fedpress.workspace.state import State, Tick

log = logger(__name__)


class FederatedRounds:
    """The rounds of a federate stage.

    `fedpress.workspace.drive` runs them, and resumes them from checkpoints.

    Attributes:
        server: the server's side of the stage.
        source: the state before the stage; only the public parts of its data are used.
        now: the results of the rounds so far.
    """

    def __init__(self, server: ServerSide, source: State) -> None:
        self.server = server
        self.source = source
        self.now = Progress.begin(server)
        self._warned = ""
        # Computed and cached now, from the initial model. Later the model depends on private data,
        # and so would the planned bytes.
        if server.hides_cohort:
            _ = server.planned_bytes

    def events(self) -> Iterator[Tick | Milestone]:
        """Runs the rounds; yields a tick before each one and a milestone after it."""
        server = self.server
        running = server.rounds(self.now.start)
        while not is_finished(server, self.now):
            try:
                ledger = self._charged()
            except PrivacyError:
                why = "the next round would exceed the privacy budget"
                self.now = replace(self.now, stopped=why)
                break
            at = f"round {self.now.round + 1}/{server.stage.num_rounds}"
            # The last validation score stays visible while the round runs.
            yield self._tick(f"{at}, {self.now.note} before it" if self.now.note else at)
            warned = self.now.failures.significant
            record = next(running)
            shown = public_part(record, server)
            yield self._take(record, shown, ledger)
            # This check comes after the milestone, which saves the round. The epsilon of the round
            # is spent, even if the run stops here.
            check_failures(server, self.now)
            yield from self._warnings(shown, len(record.timing.answered), warned=warned)
        last = last_warning(server, self.now.failures)
        yield self._tick(self.now.stopped or self._note, f"warning: {last}" if last else "")

    def state(self) -> Snapshot:
        """Returns the progress as a checkpoint."""
        return self.now.snapshot()

    def load_(self, saved: Snapshot) -> None:
        """Continues from a checkpoint."""
        self.now = Progress.load(saved)

    def _charged(self) -> Ledger:
        """Returns the ledger with the privacy cost of the next round added.

        A round is charged before it reads any data. If the round is killed and repeated, it draws
        the same noise from the same seeds. So clients send the same replies, which reveal nothing
        new.

        Raises:
            PrivacyError: if the round would exceed the budget.
        """
        server = self.server
        number = self.now.round + 1
        if server.unit is None:
            return self.now.ledger
        tasks = Counter(server.participation.asked(number))
        return server.spend(self.now.ledger, tasks, number, number)

    def _take(self, record: RoundRecord, shown: RoundRecord, ledger: Ledger) -> Milestone:
        """Evaluates the model after a round, and updates the progress.

        Args:
            record: the full record of the round.
            shown: the part of the record that is public and may be stored.
            ledger: the ledger after this round.

        Returns:
            A milestone with the stored record.
        """
        server = self.server
        closed = count_closed_rounds(server, record, self.now.closed)
        parameters.assign_(server.model, record.params)
        validation = self._validate()
        failures = self.now.failures.with_round(shown, record.timing.answered, server)
        more = {"ledger": ledger, "closed": closed, "failures": failures}
        self.now = self.now.with_round(shown, validation, server.common.task, **more)
        line = round_line(shown, self.now, validation, server, self.source.rounding)
        return Milestone(line, self._note)

    def _validate(self) -> Evaluation | None:
        """Evaluates the model on the public validation set; returns None without such a set."""
        # Private data are not used here: each metric would cost privacy.
        data = self.source.data
        precision = self.server.stage.precision
        if not len(data.validation):
            return None
        return evaluate(
            self.server.model, data.validation, data.preprocess, data.task, precision=precision
        )

    def _warnings(self, shown: RoundRecord, answered: int, *, warned: bool) -> Iterator[Tick]:
        """Yields a tick for each new warning.

        Args:
            shown: the public part of the round's record.
            answered: number of clients whose answers the round waited for.
            warned: whether an earlier round has already warned of failures.
        """
        reasons = public_reasons(shown.refused, self.server)
        warning = refusal_line(reasons, answered, shown.round)
        # Compared without the number of the round, so that the same refusals in the next round are
        # not reported again.
        if warning and warning.partition(":")[2] != self._warned.partition(":")[2]:
            # Safe to log: `public_reasons` has removed private text.
            log.warning("%s", warning)
            yield self._tick(self._note, warning)
        self._warned = warning
        if self.now.failures.significant and not warned:
            yield self._tick(self._note, last_warning(self.server, self.now.failures))

    @property
    def _note(self) -> str:
        """The last finished round and its score: "round 3/20, validation 97.2%"."""
        at = f"round {self.now.round}/{self.server.stage.num_rounds}"
        return f"{at}, {self.now.note}" if self.now.note else at

    def _tick(self, note: str, warning: str = "") -> Tick:
        return Tick(self.now.round, self.server.stage.num_rounds, note, warning)
