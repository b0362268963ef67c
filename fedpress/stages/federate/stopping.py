"""Decides when the rounds of a federate stage end: target, patience, or too many failures."""

from __future__ import annotations

from fedpress.errors import TrainingError
from fedpress.federation import RoundRecord
from fedpress.federation.local import too_large
from fedpress.stages.federate.contract import algorithm_of, local_settings
from fedpress.stages.federate.failures import PRIVATE, Failures, public_reasons
from fedpress.stages.federate.progress import Progress
from fedpress.stages.federate.server import ServerSide

MAX_CLOSED_ROUNDS = 3
"""The run stops after this many rounds in a row in which no update was used."""


def is_finished(server: ServerSide, now: Progress) -> bool:
    """Whether no further round follows.

    There are four reasons: the last round is done; the next round would exceed the privacy budget;
    the metric has reached its target; the metric has not improved for `patience` rounds.
    """
    stage = server.stage
    task = server.common.task
    if now.round >= stage.num_rounds or now.stopped:
        return True
    # `better` is strict, but a metric equal to its target has also reached the target.
    reached = now.best == stage.target or task.better(now.best, stage.target)
    if stage.target is not None and reached:
        return True
    waited = now.round - now.best_round
    return bool(stage.patience and waited >= stage.patience and now.best is not None)


def count_closed_rounds(server: ServerSide, record: RoundRecord, before: int) -> int:
    """Counts the latest rounds in a row in which no update was used, including the present round.

    If too many clients dropped out of a secure sum, or all clients missed the deadline, the next
    round may succeed. For other causes the next round would fail too, so the run stops at once.

    Args:
        server: the server's side of the stage.
        record: the record of this round.
        before: the count before this round.

    Raises:
        TrainingError: if no update was used and the next round would fail too, or if no update was
            used in three rounds in a row.
    """
    answered = record.timing.answered
    if not answered or set(answered) != set(record.refused):
        return 0
    closed = before + 1
    all_late = len(record.timing.late) == len(answered)
    may_succeed_next = server.protection.grid is not None or all_late
    if not may_succeed_next or closed >= MAX_CLOSED_ROUNDS:
        raise TrainingError(
            f"no update was used in round {record.round}{_why(server, record)}",
            place="federate",
            cure=(
                "see whether the clients are running and have the same recipe (the rounds before "
                "are kept)"
            ),
        )
    return closed


def _why(server: ServerSide, record: RoundRecord) -> str:
    """Returns why no update was used: the first client's error, and a setting that may cause it."""
    first = record.timing.answered[0]
    reason = public_reasons(record.refused, server)[first]
    why = ""
    # No client is named if only the server may know who took part.
    if reason != PRIVATE and not server.hides_cohort:
        why = f" (client {first}: {reason})"
    if record.timing.late:
        why += f"; raise stage.{server.stage.name}.schedule.deadline"
    lr = algorithm_of(server.stage).optimizer.lr
    if why and reason.startswith("DivergedError: ") and lr > 1:
        why += f", or stage.{server.stage.name}.server.lr (now {lr:g})"
    return why


def check_failures(server: ServerSide, now: Progress) -> None:
    """Stops a run in which nearly all protected units (examples or clients) fail.

    The run would go on to spend epsilon, but its updates would only be noise.

    Raises:
        TrainingError: if the noised counts of failures show that nearly all units fail.
    """
    # The counts have noise. `all_failing` is true only if noise can hardly be the reason.
    if now.failures.all_failing:
        many = f"{now.failures.estimate(server.unit)} contributed nothing up to round {now.round}"
        cause = now.failures.cause(_rates(server))
        raise TrainingError(
            f"{many}, and nearly all failed in the latest rounds: {cause}",
            place="federate",
            cure="correct this and start a new run (the epsilon of the rounds so far is spent)",
        )


def last_warning(server: ServerSide, failures: Failures) -> str:
    """Returns the warning about failures at the end of the stage; "" if there is none."""
    warning = failures.warning(server.unit)
    # The warning may already contain the estimate.
    if failures.significant and not warning.startswith("about"):
        estimate = f"{failures.estimate(server.unit)} contributed nothing"
        warning = f"{warning}; {estimate}" if warning else estimate
    if failures.significant:
        warning += f": {failures.cause(_rates(server))}"
    return warning


def _rates(server: ServerSide) -> str:
    """Returns the learning rates and other settings that may have made training diverge."""
    stage = server.stage
    algorithm = algorithm_of(stage)
    place = f"stage.{stage.name}."
    server_lr = algorithm.optimizer.lr
    rates = too_large(local_settings(stage), stage.lr, penalties=algorithm.penalties, place=place)
    return rates if server_lr <= 1 else f"{rates} or {place}server.lr (now {server_lr:g})"
