"""What a federate stage writes down: a line for each round, and the facts of its end."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from fedpress.federation import RoundRecord
from fedpress.privacy.accounting.accountant import Spent
from fedpress.stages.federate.failures import told
from fedpress.stages.federate.progress import Progress
from fedpress.stages.federate.server import PRIVACY_KEYS, ServerHalf
from fedpress.stages.federate.stopping import last_warning
from fedpress.tasks.base import number
from fedpress.training.evaluate import Evaluation


def public_part(record: RoundRecord, server: ServerHalf) -> RoundRecord:
    """Returns what may be written down of a round.

    Where the server is trusted with updates that no noise covers, it must not tell who took part or
    was refused, nor bytes that depend on what they sent: then those of the plan stand in their
    place.
    """
    if not server.hides_cohort:
        return record
    up, down = server.planned_bytes
    timing = replace(record.timing, answered=(), spare=(), late=())
    if server.stage.sampling == "poisson":  # how long a round took tells which clients were drawn
        timing = replace(timing, simulated_seconds=None)
    return replace(record, bytes_up=up, bytes_down=down, refused={}, timing=timing)


def line(
    record: RoundRecord, now: Progress, seen: Evaluation | None, server: ServerHalf
) -> dict[str, Any]:
    """Returns the line of the round of `record`, whose validation was `seen`, after which the rounds stand at `now`."""
    failures = {} if record.failures is None else {"failures": asdict(record.failures)}
    return {
        "round": record.round,
        "num_rounds": server.stage.num_rounds,
        server.common.task.primary: number(seen.score) if seen else None,
        "loss": seen.loss if seen else None,
        "bytes_up": record.bytes_up,
        "bytes_down": record.bytes_down,
        **(_set_up(now) if record.round == 1 else {}),
        "epsilon": _epsilon(server, now),
        "clients": record.clients,
        "refused": told(record.refused, server),
        **failures,
        "seconds": round(record.seconds, 2),
        **_times(record, server),
    }


def _set_up(now: Progress) -> dict[str, int]:
    """Returns the bytes of the messages before the first round, which stand in the count of no round."""
    if now.set_up is None:
        return {}
    up, down = now.set_up
    return {"set_up_bytes_up": up, "set_up_bytes_down": down}


def _times(record: RoundRecord, server: ServerHalf) -> dict[str, Any]:
    """Returns what a line says of the clock and of clients at different speeds; nothing of plain rounds."""
    timing = record.timing
    said: dict[str, Any] = {}
    if timing.simulated_seconds is not None:
        said["simulated_seconds"] = timing.simulated_seconds
    if not server.stage.schedule.one_model:
        said["staleness"] = list(timing.staleness)
    if timing.spare:
        said["spare"] = list(timing.spare)
    return said


def stage_facts(server: ServerHalf, now: Progress, score_before: float | None) -> dict[str, Any]:
    """Returns the facts of the stage's end; every key also without privacy, so that no promise outlives an open stage.

    Args:
        server: the server's half.
        now: where the rounds stand.
        score_before: the task's metric on the test set before the stage.
    """
    metric = server.common.task.primary
    spent = _spent(server, now)
    promise = dict.fromkeys(PRIVACY_KEYS) if spent is None else server.privacy_facts()
    return {
        "rounds": now.round,
        "clients": len(server.population),
        "cohort": server.uplink.cohort.size,
        "schedule": server.stage.schedule.kind,
        "trained_values": server.uplink.size,
        f"{metric}_before": score_before,
        "bytes_up": now.bytes_up,
        "bytes_down": now.bytes_down,
        **_set_up(now),
        **promise,
        **server.grid_facts(),
        "bytes": "planned" if server.hides_cohort else "counted",
        "sum": "secure" if server.protection.grid is not None else "plain",
        "keys": server.keys,
        "epsilon": None if spent is None else spent.epsilon,
        "epsilon_is": None if spent is None else spent.note or None,
        f"client_{metric}": server.client_scores(now.params),
        "stopped": now.stopped or None,
        "failures": now.failures.facts(server.unit),
        "warning": last_warning(server, now.failures) or None,
    }


def _epsilon(server: ServerHalf, now: Progress) -> float | None:
    spent = _spent(server, now)
    return None if spent is None else spent.epsilon


def _spent(server: ServerHalf, now: Progress) -> Spent | None:
    """Returns what was spent so far, None without privacy."""
    private = server.stage.privacy
    return None if private is None else now.ledger.spent(delta=private.delta)
