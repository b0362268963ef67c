"""When the rounds of a federate stage end: the target is reached, or no update counts any more."""

from __future__ import annotations

from fedpress.errors import TrainingError
from fedpress.federation import RoundRecord
from fedpress.federation.local import too_large
from fedpress.stages.federate.contract import algorithm_of, local_settings
from fedpress.stages.federate.failures import PRIVATE, Failures, public_reasons
from fedpress.stages.federate.progress import Progress
from fedpress.stages.federate.server import ServerSide

MAX_CLOSED_ROUNDS = 3
"""Rounds in a row without an aggregate after which a run stops."""


def is_finished(server: ServerSide, now: Progress) -> bool:
    """Says whether the rounds are over: all done, the target reached, or no better for long."""
    stage = server.stage
    task = server.common.task
    if now.round >= stage.num_rounds or now.stopped:
        return True
    # `better` alone would miss a metric that is exactly at its target.
    reached = now.best == stage.target or task.better(now.best, stage.target)
    if stage.target is not None and reached:
        return True
    waited = now.round - now.best_round
    return bool(stage.patience and waited >= stage.patience and now.best is not None)


def count_closed_rounds(server: ServerSide, record: RoundRecord, before: int) -> int:
    """Returns the number of rounds in a row in which no update counted, this one included.

    A secure sum may fail because too many clients dropped out, and a deadline because all were
    late: the next round may succeed. In any other case all rounds would run and learn nothing.

    Args:
        server: the server's half.
        record: of the round.
        before: the number before this round.

    Raises:
        TrainingError: if no update counted; with a secure sum, or if all were late, only after
            three such rounds in a row.
    """
    answered = record.timing.answered
    if not answered or set(answered) != set(record.refused):
        return 0
    closed = before + 1
    all_late = len(record.timing.late) == len(answered)
    may_succeed_next = server.protection.grid is not None or all_late
    if not may_succeed_next or closed >= MAX_CLOSED_ROUNDS:
        raise TrainingError(
            f"no update counted in round {record.round}{_why(server, record)}",
            place="federate",
            cure=(
                "see whether the clients are running and work with the same recipe; the rounds "
                "before it are kept"
            ),
        )
    return closed


def _why(server: ServerSide, record: RoundRecord) -> str:
    """Returns why no update counted, and which setting may be the cause."""
    first = record.timing.answered[0]
    reason = public_reasons(record.refused, server)[first]
    why = ""
    # No name where it is secret who took part.
    if reason != PRIVATE and not server.hides_cohort:
        why = f", for instance {first}: {reason}"
    if record.timing.late:
        why += f"; raise stage.{server.stage.name}.schedule.deadline"
    lr = algorithm_of(server.stage).optimizer.lr
    if why and reason.startswith("DivergedError: ") and lr > 1:
        why += f", or stage.{server.stage.name}.server.lr (now {lr:g})"
    return why


def check_failures(server: ServerSide, now: Progress) -> None:
    """Stops a run in which every unit fails, before it spends more epsilon on noise alone.

    Raises:
        TrainingError: if the noised counts say so.
    """
    if now.failures.all_failing:
        many = f"{now.failures.estimate(server.unit)} gave nothing up to round {now.round}"
        cause = now.failures.cause(_rates(server))
        raise TrainingError(
            f"{many}, and nearly all in the last of them: {cause}",
            place="federate",
            cure="the rounds so far are charged",
        )


def last_warning(server: ServerSide, failures: Failures) -> str:
    """Returns the warning about `failures` at the end of the rounds; empty if there is none."""
    warning = failures.warning(server.unit)
    # The warning may hold the estimate already.
    if failures.significant and not warning.startswith("about"):
        estimate = f"{failures.estimate(server.unit)} gave nothing"
        warning = f"{warning}; {estimate}" if warning else estimate
    if failures.significant:
        warning += f": {failures.cause(_rates(server))}"
    return warning


def _rates(server: ServerSide) -> str:
    """Names the settings that may have made training diverge."""
    stage = server.stage
    algorithm = algorithm_of(stage)
    place = f"stage.{stage.name}."
    server_lr = algorithm.optimizer.lr
    rates = too_large(local_settings(stage), stage.lr, penalties=algorithm.penalties, place=place)
    return rates if server_lr <= 1 else f"{rates} or {place}server.lr (now {server_lr:g})"
