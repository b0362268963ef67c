"""The rounds of a federate stage as long work: each is charged, run, looked at and written down."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from fedpress.core import parameters
from fedpress.errors import PrivacyError
from fedpress.federation import RoundRecord
from fedpress.privacy.ledger import Ledger
from fedpress.stages.federate.failures import refusal_line, told
from fedpress.stages.federate.progress import Progress
from fedpress.stages.federate.records import line, public_part
from fedpress.stages.federate.server import ServerHalf
from fedpress.stages.federate.stopping import (
    check_failures,
    count_closed_rounds,
    is_finished,
    last_warning,
)
from fedpress.training.evaluate import Evaluation, evaluate
from fedpress.workspace.drive import Milestone, Snapshot
from fedpress.workspace.state import State, Tick

log = logging.getLogger(__name__)


class FederatedRounds:
    """Rounds of local training on private data, one after another, until `enough`; see `drive`.

    Attributes:
        server: the server's half of the stage.
        source: the state before the stage; of its data only the public parts are looked at.
        now: where the rounds stand.
    """

    def __init__(self, server: ServerHalf, source: State) -> None:
        self.server, self.source = server, source
        self.now = Progress.begin(server)
        self._warned = ""
        if server.hides_cohort:
            _ = server.planned_bytes  # of the model as it is bound: a later one may hold anything

    def events(self) -> Iterator[Tick | Milestone]:
        """Runs the rounds; yields a tick before each, since it may take minutes, and a milestone after it."""
        server = self.server
        running = server.rounds(self.now.start)
        while not is_finished(server, self.now):
            try:
                ledger = self._charged()
            except PrivacyError:
                why = "the next round would pass the privacy budget"
                self.now = replace(self.now, stopped=why)
                break
            at, note = f"round {self.now.round + 1}/{server.stage.num_rounds}", self.now.note
            yield self._tick(f"{at}, {note}" if note else at)
            sure = self.now.failures.significant
            record = next(running)
            shown = public_part(record, server)
            yield self._take(record, shown, ledger)
            check_failures(server, self.now)
            yield from self._warnings(shown, len(record.timing.answered), was_sure=sure)
        last = last_warning(server, self.now.failures)
        yield self._tick(self.now.stopped or self.now.note, f"warning: {last}" if last else "")

    def state(self) -> Snapshot:
        """Returns where the rounds stand."""
        return self.now.snapshot()

    def load_(self, saved: Snapshot) -> None:
        """Goes on from a `state`."""
        self.now = Progress.load(saved)

    def _charged(self) -> Ledger:
        """Returns the ledger with the next round in it.

        A round is charged before it touches data. One that is killed and done again draws the same
        noise from the same seeds, so it gives the same reply and costs nothing more.

        Raises:
            PrivacyError: if the round would pass the budget.
        """
        server, number = self.server, self.now.round + 1
        if server.unit is None:
            return self.now.ledger
        tasks = Counter(server.participation.asked(number))
        return server.spend(self.now.ledger, tasks, number, number)

    def _take(self, record: RoundRecord, shown: RoundRecord, ledger: Ledger) -> Milestone:
        """Moves on behind the round of `record`: the model is looked at, and what may be `shown` is written down."""
        server = self.server
        closed = count_closed_rounds(server, record, self.now.closed)
        parameters.assign_(server.model, record.params)
        seen = self._look()
        failures = self.now.failures.after(shown, record.timing.answered, server)
        more = {"ledger": ledger, "closed": closed, "failures": failures}
        self.now = self.now.after(shown, seen, server.common.task, **more)
        return Milestone(line(shown, self.now, seen, server), self.now.note)

    def _look(self) -> Evaluation | None:
        """Measures on the public validation set; private data is never looked at without a charge."""
        data, precision = self.source.data, self.server.stage.precision
        if not len(data.validation):
            return None
        return evaluate(
            self.server.model, data.validation, data.preprocess, data.task, precision=precision
        )

    def _warnings(self, shown: RoundRecord, answered: int, *, was_sure: bool) -> Iterator[Tick]:
        """Yields a tick for what has gone wrong in a round, unless that was said of the round before."""
        warning = refusal_line(told(shown.refused, self.server), answered, shown.round)
        if warning and warning.partition(":")[2] != self._warned.partition(":")[2]:
            # What a person may be told: under privacy no name and no number of a single client.
            log.warning("%s", warning)
            yield self._tick(self.now.note, warning)
        self._warned = warning
        if self.now.failures.significant and not was_sure:
            yield self._tick(self.now.note, last_warning(self.server, self.now.failures))

    def _tick(self, note: str, warning: str = "") -> Tick:
        return Tick(self.now.round, self.server.stage.num_rounds, note, warning)
