"""When the rounds of a federate stage end: enough is learned, or nothing comes of them, and why."""

from __future__ import annotations

from fedpress.errors import TrainingError
from fedpress.federation import RoundRecord
from fedpress.federation.local import too_large
from fedpress.stages.federate.contract import algorithm_of, local_settings
from fedpress.stages.federate.failures import PRIVATE, Failures, told
from fedpress.stages.federate.progress import Progress
from fedpress.stages.federate.server import ServerHalf

CLOSED = 3
"""Secure sums in a row that may stay closed before a run stops."""


def is_finished(server: ServerHalf, now: Progress) -> bool:
    """Says whether no further round is wanted: all are done, the target is reached, or patience is at its end."""
    stage, task = server.stage, server.common.task
    if now.round >= stage.num_rounds or now.stopped:
        return True
    reached = now.best == stage.target or task.better(now.best, stage.target)
    if stage.target is not None and reached:
        return True
    waited = now.round - now.best_round
    return bool(stage.patience and waited >= stage.patience and now.best is not None)


def count_closed_rounds(server: ServerHalf, record: RoundRecord, before: int) -> int:
    """Returns how many rounds in a row nothing came of, after `before` of them; refuses to go on in vain.

    A secure sum may stay closed because clients vanished: that round is over, for its questions
    were answered, and the next one may fare better. So it is where all were late. Otherwise the
    rounds would run to their end and learn nothing.

    Raises:
        TrainingError: if no client has done its work; under a secure sum, or if they were late, in
            three rounds one after another.
    """
    waited, late = record.timing.answered, record.timing.late
    if not waited or set(waited) != set(record.refused):
        return 0
    closed = before + 1
    may_fare_better = server.protection.grid is not None or len(late) == len(waited)
    if not may_fare_better or closed >= CLOSED:
        raise TrainingError(
            f"no update counted in round {record.round}{_why(server, record)}",
            place="federate",
            cure=(
                "see whether the clients are running and work with the same recipe; the rounds "
                "before it are kept"
            ),
        )
    return closed


def _why(server: ServerHalf, record: RoundRecord) -> str:
    """Says why no update counted, and which setting may be the cause; no name where the cohort is secret."""
    first = record.timing.answered[0]
    reason, why = told(record.refused, server)[first], ""
    if reason != PRIVATE and not server.hides_cohort:
        why = f", for instance {first}: {reason}"
    if record.timing.late:
        why += f"; raise stage.{server.stage.name}.schedule.deadline"
    lr = algorithm_of(server.stage).optimizer.lr
    if why and reason.startswith("DivergedError: ") and lr > 1:
        why += f", or stage.{server.stage.name}.server.lr (now {lr:g})"
    return why


def check_failures(server: ServerHalf, now: Progress) -> None:
    """Does not spend more on noise: the round that was counted is saved and charged.

    Raises:
        TrainingError: if the noised count says that every protected unit fails.
    """
    if now.failures.all_failing:
        many = f"{now.failures.estimate(server.unit)} gave nothing up to round {now.round}"
        cause = now.failures.cause(_rates(server))
        raise TrainingError(
            f"{many}, and nearly all in the last of them: {cause}",
            place="federate",
            cure="the rounds so far are charged",
        )


def last_warning(server: ServerHalf, failures: Failures) -> str:
    """Says what must be known of `failures` at the end; empty if nothing."""
    warning = failures.warning(server.unit)
    if failures.significant and not warning.startswith("about"):
        estimate = f"{failures.estimate(server.unit)} gave nothing"
        warning = f"{warning}; {estimate}" if warning else estimate
    if failures.significant:
        warning += f": {failures.cause(_rates(server))}"
    return warning


def _rates(server: ServerHalf) -> str:
    """Names the settings that make training diverge if they are too large."""
    stage, algorithm = server.stage, algorithm_of(server.stage)
    place, lr = f"stage.{stage.name}.", algorithm.optimizer.lr
    rates = too_large(local_settings(stage), stage.lr, penalties=algorithm.penalties, place=place)
    return rates if lr <= 1 else f"{rates} or {place}server.lr (now {lr:g})"
