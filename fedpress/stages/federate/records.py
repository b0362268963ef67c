"""Makes the records of a federate stage that are stored: one per round, and one at the end."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from fedpress.federation import RoundRecord
from fedpress.privacy.accounting.accountant import Spent
from fedpress.stages.federate.failures import public_reasons
from fedpress.stages.federate.progress import Progress
from fedpress.stages.federate.server import PRIVACY_KEYS, ServerSide
from fedpress.stages.federate.stopping import last_warning
from fedpress.tasks.base import json_number
from fedpress.training.evaluate import Evaluation


def public_part(record: RoundRecord, server: ServerSide) -> RoundRecord:
    """Returns the part of a round's record that may be stored.

    If the server adds the noise, only the server may know which clients took part. Then the stored
    record names no client, and has the planned bytes instead of the real bytes, because the size of
    a packed update depends on private data.
    """
    if not server.hides_cohort:
        return record
    up, down = server.planned_bytes
    timing = replace(record.timing, answered=(), spare=(), late=())
    # The delay of each client is public, so the time of a round would reveal who was drawn.
    if server.stage.sampling == "poisson":
        timing = replace(timing, simulated_seconds=None)
    return replace(record, bytes_up=up, bytes_down=down, refused={}, timing=timing)


def round_line(
    record: RoundRecord,
    now: Progress,
    validation: Evaluation | None,
    server: ServerSide,
    rounding: str = "",
) -> dict[str, Any]:
    """Returns the record of one round as it is stored.

    Args:
        record: the public part of the round's record.
        now: the progress after the round.
        validation: evaluation of the new model; None without a validation set.
        server: the server's side of the stage.
        rounding: see `fedpress.workspace.state.Engine`.
    """
    failures = {} if record.failures is None else {"failures": asdict(record.failures)}
    return {
        "round": record.round,
        "num_rounds": server.stage.num_rounds,
        server.common.task.primary: json_number(validation.score) if validation else None,
        "loss": validation.loss if validation else None,
        "bytes_up": record.bytes_up,
        "bytes_down": record.bytes_down,
        **(_set_up(now) if record.round == 1 else {}),
        "epsilon": _epsilon(server, now),
        "clients": record.clients,
        "refused": public_reasons(record.refused, server),
        **failures,
        "seconds": round(record.seconds, 2),
        **_times(record, server),
        **_engine(rounding),
    }


def _engine(rounding: str) -> dict[str, str]:
    """Returns the name of the engine, if another one would give other bits."""
    return {"engine": rounding} if rounding else {}


def _set_up(now: Progress) -> dict[str, int]:
    """Returns the bytes of the messages before the first round, which no round's bytes include."""
    if now.set_up is None:
        return {}
    up, down = now.set_up
    return {"set_up_bytes_up": up, "set_up_bytes_down": down}


def _times(record: RoundRecord, server: ServerSide) -> dict[str, Any]:
    """Returns simulated time, staleness and spare clients, where the round has them.

    Staleness is the number of server steps since a client received its model. Spare clients were
    asked but not needed, because enough other clients were faster.
    """
    timing = record.timing
    entries: dict[str, Any] = {}
    if timing.simulated_seconds is not None:
        entries["simulated_seconds"] = timing.simulated_seconds
    if not server.stage.schedule.one_model:
        entries["staleness"] = list(timing.staleness)
    # More clients may be asked than are needed, in case some do not answer.
    if timing.spare:
        entries["spare"] = list(timing.spare)
    return entries


def stage_facts(
    server: ServerSide, now: Progress, score_before: float | None, rounding: str = ""
) -> dict[str, Any]:
    """Returns the results of the finished stage, as `result.json` has them.

    Args:
        server: the server's side of the stage.
        now: the progress after the last round.
        score_before: the task's metric on the test set before the stage.
        rounding: see `fedpress.workspace.state.Engine`.
    """
    metric = server.common.task.primary
    spent = _spent(server, now)
    # Without privacy the keys are present with the value None. Otherwise the result would still
    # show the epsilon of the previous stage.
    privacy: dict[str, Any] = dict.fromkeys(PRIVACY_KEYS)
    epsilon = note = None
    if spent is not None:
        privacy = server.privacy_facts()
        epsilon = spent.epsilon
        note = spent.note or None
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
        **privacy,
        **server.grid_facts(),
        # Says how the two numbers of bytes above were found.
        "bytes": "planned" if server.hides_cohort else "counted",
        "sum": "secure" if server.protection.grid is not None else "plain",
        "keys": server.keys,
        "noise_source": server.noise_source,
        "epsilon": epsilon,
        "epsilon_is": note,
        f"client_{metric}": server.client_scores(now.params),
        "stopped": now.stopped or None,
        "failures": now.failures.facts(server.unit),
        "warning": last_warning(server, now.failures) or None,
        **_engine(rounding),
    }


def _epsilon(server: ServerSide, now: Progress) -> float | None:
    spent = _spent(server, now)
    return None if spent is None else spent.epsilon


def _spent(server: ServerSide, now: Progress) -> Spent | None:
    """Returns the epsilon spent so far; None without privacy."""
    private = server.stage.privacy
    return None if private is None else now.ledger.spent(delta=private.delta)
