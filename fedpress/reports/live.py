"""Collects what the page of a run in progress shows: its stages, rounds, clients and curves."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import TypeVar

from fedpress.reports import units
from fedpress.reports.detail_tables import failure_table
from fedpress.reports.federated import bytes_over_rounds, score_over_rounds
from fedpress.reports.figures import training_curve
from fedpress.reports.headline import Tile, tiles
from fedpress.reports.metrics import MetricFormat
from fedpress.reports.outcome import outcome, progress
from fedpress.reports.plot import Figure
from fedpress.reports.reading import Json, Run, name_of, read_what_can_be, records_by_stage
from fedpress.reports.table import Table
from fedpress.workspace import lock
from fedpress.workspace.presence import ClientNow, PresenceNow, RefusedNow, read_presence

MOST_ROWS = 40
"""Clients in one table; those in trouble come first."""
LATE_FROM = 10.0
"""A connected client is called late after this many seconds, or after three times the median time
of all clients if that is longer."""
RECENT = 5
"""Number of latest rounds from which the remaining time is estimated."""

T = TypeVar("T")


@dataclass(frozen=True)
class Live:
    """The content of the page.

    Attributes:
        name: name of the run.
        state: "working", "stopped" (no process works on the run) or "ended".
        said: the state in one sentence.
        path: name of each stage, with "done", "now" or "later".
        facts: small print below the title, such as the folder and the command.
        tiles: the most important numbers, shown large.
        stages: a row for each stage that has begun.
        clients: a row for each client; None if clients must not be named or are not known.
        about_clients: sentences about all clients together.
        refused: a row for each client that refused or failed, with the reason; None: there is none.
        figures: the curves, those of the newest stage first.
        notes: sentences about damaged files, and about parts of the page that cannot be made.
        report: link to the report; "" if there is no report yet.
        drawn: time of day at which the run folder was read.
    """

    name: str
    state: str
    said: str
    path: list[tuple[str, str]] = field(default_factory=list)
    facts: list[str] = field(default_factory=list)
    tiles: list[Tile] = field(default_factory=list)
    stages: Table = field(default_factory=lambda: Table([], []))
    clients: Table | None = None
    about_clients: list[str] = field(default_factory=list)
    refused: Table | None = None
    figures: list[Figure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    report: str = ""
    drawn: str = ""

    @property
    def ended(self) -> bool:
        """Whether the page will not change any more."""
        return self.state == "ended"


def live(folder: Path, *, report: str = "", now: float | None = None) -> Live:
    """Reads a run folder and returns the content of its page.

    If a file is missing, damaged or half written, its part of the page is left out.

    Args:
        folder: the run folder; nothing else is read.
        report: link to the report, shown after the end of the run.
        now: present time in seconds since 1970; None: the time of the machine.
    """
    now = time.time() if now is None else now
    run, notes = read_what_can_be(folder)
    presence = read_presence(folder)
    drawn = time.strftime("%H:%M:%S", time.localtime(now))
    # One list of records for each stage that has begun.
    steps = list(records_by_stage(run.records))
    state = _state(run)
    page = Live(run.name, state, _said(run, state), drawn=drawn)
    # Damaged files may have any JSON value in any place, so checks could not find all damage. A
    # part of the page that cannot be made is left out; the other parts stay.
    draw = _Careful(notes)
    return replace(
        page,
        path=draw.part("path of stages", lambda: _path(run), []),
        facts=draw.part("facts", lambda: _facts(run, folder, now), []),
        tiles=draw.part("numbers", lambda: _tiles(run, steps, presence), []),
        stages=draw.part("table of stages", lambda: _stages(run, steps, state), Table([], [])),
        clients=draw.part("table of clients", lambda: _clients(run, presence, state, now), None),
        about_clients=draw.part("clients", lambda: _about_clients(run, presence, state, now), []),
        refused=draw.part("table of refusals", lambda: _refused(run, presence), None),
        figures=draw.figures(steps),
        notes=notes,
        report=report if state == "ended" else "",
    )


@dataclass(frozen=True)
class _Careful:
    """Makes parts of the page, and notes which parts cannot be made from the files.

    Attributes:
        notes: a sentence for each part that cannot be made.
    """

    notes: list[str]

    def part(self, what: str, make: Callable[[], T], nothing: T) -> T:
        """Returns the result of `make`; if it raises an error, notes this and returns `nothing`."""
        try:
            return make()
        except Exception as problem:
            self.notes.append(f"The {what} cannot be drawn: {type(problem).__name__}.")
            return nothing

    def figures(self, steps: list[list[Json]]) -> list[Figure]:
        """Returns the figures of all stages, the newest stage first."""
        found: list[Figure] = []
        for of_stage in reversed(steps):
            name = name_of(of_stage[-1])
            found += self.part(f"curves of {name}", partial(_figures, of_stage), [])
        return found


def _figures(steps: list[Json]) -> list[Figure]:
    name = name_of(steps[-1])
    rounds = [step for step in steps if "round" in step]
    found = [
        training_curve(name, [step for step in steps if "epoch" in step]),
        score_over_rounds(name, rounds),
        bytes_over_rounds(name, rounds),
    ]
    return [figure for figure in found if figure]


def _state(run: Run) -> str:
    if run.finished:
        return "ended"
    # A process holds the lock of the folder as long as it works on the run.
    return "working" if lock.holder(run.path) else "stopped"


def _said(run: Run, state: str) -> str:
    """Returns the state of the run in one sentence."""
    say = outcome if state == "ended" else progress
    try:
        sentence = say(run)
    except Exception:
        # See `live`: the result may be damaged.
        sentence = ""
    if state == "ended":
        return f"The run has ended. {sentence}".strip()
    if state == "working":
        return sentence or "The run goes on."
    return f"No process works on this run, and it has not ended. {sentence}".strip()


def _planned(run: Run) -> list[Json]:
    """Returns the settings of all stages of the recipe."""
    stages = run.settings.get("stage")
    return [one for one in stages if isinstance(one, dict)] if isinstance(stages, list) else []


def _path(run: Run) -> list[tuple[str, str]]:
    done = len(run.stages)
    path = []
    for at, stage in enumerate(_planned(run) or run.stages):
        look = "done" if at < done else "now" if at == done else "later"
        path.append((name_of(stage), look))
    return path


def _facts(run: Run, folder: Path, now: float) -> list[str]:
    facts = [f"folder {folder}"]
    command = run.environment.get("command")
    if command:
        facts.append(str(command))
    changed = _last_change(run.path)
    # The page of a finished run does not change, so an age would soon be wrong.
    if changed is not None and not run.finished:
        facts.append(f"last written {units.seconds(max(now - changed, 0.0))} ago")
    return facts


def _last_change(folder: Path) -> float | None:
    """Returns the time of the last change of records, result, settings or a file of a stage.

    None if there is no such file.
    """
    found = []
    own = [folder / "records.jsonl", folder / "result.json", folder / "settings.json"]
    for path in (*own, *folder.glob("stages/*/*")):
        try:
            found.append(path.stat().st_mtime)
        except OSError:
            # Files come and go while the run works.
            continue
    return max(found, default=None)


def _tiles(run: Run, steps: list[list[Json]], presence: PresenceNow | None) -> list[Tile]:
    if run.finished:
        return tiles(run.stages)
    found: list[Tile | None] = []
    begun = steps[-1] if steps else []
    last: Json = begun[-1] if begun else {}
    # The newest records may belong to a stage that has ended.
    if last and last.get("stage") == len(run.stages):
        found.append(_step_tile(begun))
    shown = MetricFormat.of(run.records)
    found += [_score_tile(shown, begun), _epsilon_tile(run), _bytes_tile(run.records)]
    if presence is not None:
        of = f"of {presence.known} that the server knows"
        found.append(Tile(str(presence.online), "clients online", of))
    return [tile for tile in found if tile]


def _step_tile(steps: list[Json]) -> Tile | None:
    """Returns the present round or epoch, with an estimate of the time that is left."""
    last = steps[-1]
    for word, most in (("round", "num_rounds"), ("epoch", "epochs")):
        if word in last:
            planned = units.number(last.get(most))
            of = "" if planned is None else f" of {planned:.0f}"
            left = _seconds_left(steps, word, planned)
            note = "" if left is None else f"about {units.seconds(left)} left in {name_of(last)}"
            return Tile(f"{last[word]}{of}", word, note)
    return None


def _seconds_left(steps: list[Json], word: str, planned: float | None) -> float | None:
    done = units.number(steps[-1].get(word))
    # Only the latest rounds, because the speed may change, for example when clients leave.
    seconds = units.numbers(steps[-RECENT:], "seconds")
    if done is None or planned is None or not seconds or done <= 0 or done >= planned:
        return None
    # The record of an epoch has the time since the stage began. The record of a round has the time
    # of this round.
    each = seconds[-1] / done if word == "epoch" else sum(seconds) / len(seconds)
    return each * (planned - done)


def _score_tile(shown: MetricFormat, steps: list[Json]) -> Tile | None:
    known = units.numbers(steps, shown.key)
    if not known:
        return None
    best = shown.best(known)
    note = "" if len(known) < 2 else f"best so far {shown.formatted(best)}"
    return Tile(shown.formatted(known[-1]), f"validation {shown.name}", note)


def _epsilon_tile(run: Run) -> Tile | None:
    spent = units.numbers(run.records, "epsilon")
    if not spent:
        return None
    budgets = []
    for stage in _planned(run):
        private = stage.get("privacy")
        if isinstance(private, dict) and units.number(private.get("epsilon")) is not None:
            budgets.append(private["epsilon"])
    # Budgets of several stages are not added: the ledger counts all stages together.
    note = f"of at most {units.compact(budgets[-1])}" if budgets else ""
    return Tile(units.epsilon(spent[-1]), "privacy spent, ε", note)


def _bytes_tile(records: list[Json]) -> Tile | None:
    up = sum(units.numbers(records, "bytes_up"))
    down = sum(units.numbers(records, "bytes_down"))
    if not up + down:
        return None
    return Tile(
        units.size(up + down), "bytes sent", f"{units.size(up)} up, {units.size(down)} down"
    )


def _stages(run: Run, steps: list[list[Json]], state: str) -> Table:
    """Returns a row for each stage that has ended or begun."""
    shown = MetricFormat.of([*run.records, *run.stages])
    by_stage = {of_stage[-1].get("stage"): of_stage for of_stage in steps}
    # Without settings.json (missing or damaged), the finished stages are all that is known.
    planned = _planned(run) or run.stages
    done = len(run.stages)
    rows = []
    for at, stage in enumerate(planned):
        of_stage = by_stage.get(at, [])
        result: Json = run.stages[at] if at < done else {}
        # Stages after the present one are only shown in the path.
        if not of_stage and not result and at > done:
            break
        last: Json = of_stage[-1] if of_stage else {}
        # A stage has no result before its end, so its state follows from the lock of the folder.
        begun = "at work" if state == "working" else "not done"
        epsilon = result.get("epsilon", last.get("epsilon"))
        rows.append(
            [
                name_of(stage),
                "done" if result else begun,
                _far(last),
                shown.formatted(last.get(shown.key)),
                shown.formatted(result.get(shown.key)),
                units.epsilon(epsilon),
                units.seconds(result.get("seconds")),
            ]
        )
    name = shown.name
    return Table(
        ["Stage", "State", "Came to", f"Validation {name}", f"Test {name}", "ε", "Time"], rows
    )


def _far(last: Json) -> str:
    for word, most in (("round", "num_rounds"), ("epoch", "epochs")):
        if word in last:
            of = f" of {last[most]}" if most in last else ""
            return f"{word} {last[word]}{of}"
    return units.DASH


def _about_clients(run: Run, presence: PresenceNow | None, state: str, now: float) -> list[str]:
    """Returns sentences about all clients together, such as how many are online."""
    said = []
    if presence is not None:
        age = units.seconds(max(now - presence.at, 0.0))
        when = f"when the server last looked, {age} ago" if state != "ended" else "at the end"
        said.append(f"{presence.online} of {presence.known} clients were online {when}.")
        if presence.hidden:
            said.append(
                "Only the server may know which clients take part in a round, so nobody is named."
            )
        return said
    last = _last_round(run)
    if last and not _named(last):
        said.append("The records of this run do not name clients, for their privacy.")
    return said


def _last_round(run: Run) -> Json:
    for record in reversed(run.records):
        if "round" in record:
            return record
    return {}


def _named(record: Json) -> list[str]:
    """Returns the names of the clients whose answers were used in a round."""
    rows = record.get("clients")
    found = []
    for row in rows if isinstance(rows, list) else ():
        if isinstance(row, dict) and "client" in row:
            found.append(str(row["client"]))
    return found


def _clients(run: Run, presence: PresenceNow | None, state: str, now: float) -> Table | None:
    """Returns a row for each client, clients with problems first.

    None if no client may be named, or none is known.
    """
    if presence is not None:
        return _present(presence, state, now)
    last = _last_round(run)
    refused = last.get("refused")
    problems = refused if isinstance(refused, dict) else {}
    # Clients with problems first: the table may be cut.
    rows = [[str(name), "its answer did not count"] for name in problems]
    rows += [[name, "answered"] for name in _named(last)]
    if not rows:
        return None
    return _shortened(Table(["Client", f"In round {last['round']}"], rows))


def _present(presence: PresenceNow, state: str, now: float) -> Table | None:
    usual = [one.seconds for one in presence.clients if one.seconds is not None]
    # The median: one client that hangs must not make all others look fast.
    late_after = max(LATE_FROM, 3 * median(usual)) if usual else LATE_FROM
    # If the server has stopped, times are counted up to its last look, and not up to now.
    age = now if state == "working" else presence.at
    rows = []
    for one in presence.clients:
        heard = "not yet" if one.heard is None else f"{units.seconds(max(age - one.heard, 0))} ago"
        took = units.DASH if one.seconds is None else units.seconds(one.seconds)
        connected = "online" if one.online else "offline"
        rows.append([one.name, connected, _doing(one, age, late_after), heard, took])
    if not rows:
        return None
    header = ["Client", "Connection", "Now", "Last answer", "It took"]
    return _shortened(Table(header, rows), presence.known)


def _doing(one: ClientNow, now: float, late_after: float) -> str:
    if one.asked is None:
        return "not asked"
    waits = max(now - one.asked, 0.0)
    since = units.seconds(waits)
    # The server has gone on without this client.
    if not one.awaited:
        return f"too late: asked {since} ago, nobody waits any more"
    if not one.online or waits > late_after:
        return f"late: asked {since} ago"
    return f"at work for {since}"


def _shortened(table: Table, known: int | None = None) -> Table:
    """Returns the first `MOST_ROWS` rows, and one more row that says how many rows are left out.

    Args:
        table: the table.
        known: number of all clients, if the table does not list all of them.
    """
    rows = table.rows[:MOST_ROWS]
    more = max(len(table.rows), known or 0) - len(rows)
    if more > 0:
        blank = [""] * (len(table.header) - 1)
        rows = [*rows, [f"and {more} more", *blank]]
    return Table(table.header, rows)


def _refused(run: Run, presence: PresenceNow | None) -> Table | None:
    """Returns a row for each client that refused or failed; None if there is none.

    First come clients whose owner's policy refuses the present stage. Then come clients whose
    answers did not count in some round.
    """
    rows: list[list[str]] = []
    counts: dict[RefusedNow, int] = {}
    for one in presence.refused if presence is not None else ():
        counts[one] = counts.get(one, 0) + 1
    for one, count in counts.items():
        who = one.name or (f"{count} clients" if count > 1 else "1 client")
        rows.append([who, f"policy: {one.rule}" if one.rule else "policy", one.reason])
    failed = failure_table(run.stages, run.records)
    for stage, who, times, why in failed.rows:
        rows.append([who, f"{stage}: {times}", why])
    return _shortened(Table(["Who", "What", "Why"], rows)) if rows else None
