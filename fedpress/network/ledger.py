"""A data owner's ledger: an append-only SQLite file of requests, answers and their privacy cost.

The privacy cost of an answer is on the disk before the answer leaves the machine. Costs belong to
the data, not to a recipe, a server or a folder. Example: two clients with one ledger and the same
data file share one privacy budget.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedpress.errors import FedpressError, PrivacyError
from fedpress.network.spending import OWNER, Charge
from fedpress.privacy.ledger import LedgerEntry

VERSION = 1
"""Version of the tables below. Files with a higher version are refused."""
APPLICATION = 0x66656470
"""Number in the header of the SQLite file ("fedp") that tells a ledger from other databases."""
PATIENCE = 30.0
"""Seconds to wait for another process that writes."""
DAY = 86_400.0
"""Seconds of a day."""
CHECK = "check"
"""Beginning of the kinds of decisions about a trial.

In a trial the server only asks before a run whether the client would accept.
"""

TABLES: dict[str, tuple[str, str]] = {
    # Each row is a path and the digest of the content found there. Data are recognised later by
    # an equal path or by an equal digest, so a copied or a changed file is still the same data.
    "data": ("path TEXT NOT NULL, digest TEXT NOT NULL", "path, digest"),
    # Decisions of the gate; the same decision is stored once, however often the server asks.
    "decisions": (
        "data INTEGER NOT NULL, session TEXT NOT NULL, server TEXT NOT NULL, "
        "recipe TEXT NOT NULL, stage TEXT NOT NULL, kind TEXT NOT NULL, rule TEXT NOT NULL, "
        "reason TEXT NOT NULL",
        "data, session, recipe, kind, rule",
    ),
    # Answered rounds. `run` is made of the id of the client's stored state (see `Asked.memory`)
    # and the digest of the agreement (the settings that server and clients have in common).
    "rounds": (
        "data INTEGER NOT NULL, run TEXT NOT NULL, session TEXT NOT NULL, server TEXT NOT NULL, "
        "recipe TEXT NOT NULL, stage TEXT NOT NULL, round INTEGER NOT NULL",
        "run, round",
    ),
    # Privacy cost of the answer to a round: fields of `fedpress.privacy.ledger.LedgerEntry`.
    "charges": (
        "data INTEGER NOT NULL, run TEXT NOT NULL, recipe TEXT NOT NULL, round INTEGER NOT NULL, "
        "part INTEGER NOT NULL, unit TEXT NOT NULL, what TEXT NOT NULL, "
        "sampling_prob REAL NOT NULL, noise_multiplier REAL NOT NULL, steps INTEGER NOT NULL, "
        "first_round INTEGER NOT NULL, last_round INTEGER NOT NULL, l2 REAL NOT NULL, "
        "l1 REAL NOT NULL, variance REAL NOT NULL, failure REAL NOT NULL",
        "run, round, part",
    ),
    # The newest row of a recipe counts, so an approval can be withdrawn by a further row.
    "approvals": ("recipe TEXT NOT NULL, approved INTEGER NOT NULL, words TEXT NOT NULL", ""),
}
"""Table -> its columns beside `id` and `time`, and the columns whose values together are unique.

Every row has an `id` and a `time`. An empty second text: rows may repeat.
"""
ENTRY = (
    "what",
    "sampling_prob",
    "noise_multiplier",
    "steps",
    "first_round",
    "last_round",
    "l2",
    "l1",
    "variance",
    "failure",
)
"""Columns of "charges" that are fields of a `LedgerEntry`, in the order of these fields.

Its first field, `who`, is not stored: it is always the owner.
"""


def default_path() -> Path:
    """Returns the path of this user's ledger, which is used if no other path is given."""
    # The XDG base directory specification: ~/.local/share if the variable is unset or empty.
    base = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(base).expanduser() / "fedpress" / "ledger.sqlite"


@dataclass(frozen=True)
class DataKey:
    """Path and content digest of data. Equal paths or equal digests mean the same data.

    Attributes:
        path: absolute path with all symbolic links resolved.
        digest: SHA-256 of the content; for a folder, of the names and contents of its files.
    """

    path: str
    digest: str

    @classmethod
    def of(cls, path: Path) -> DataKey:
        """Computes the key of a file, a folder, or all files that match a name with `*`.

        Args:
            path: such as `rows.csv`, `images` or `part-*.csv`.

        Raises:
            PrivacyError: if the data cannot be read.
        """
        found = path.expanduser().resolve()
        total = hashlib.sha256()
        try:
            if "*" in found.name:
                inside = [one for one in found.parent.glob(found.name) if one.is_file()]
            else:
                inside = [one for one in found.rglob("*") if one.is_file()]
            if not inside:
                total.update(_digest(found))
            else:
                # Digests have a fixed length, so a name cannot be confused with a content.
                for inner in sorted(inside):
                    name = inner.name if "*" in found.name else inner.relative_to(found).as_posix()
                    total.update(hashlib.sha256(name.encode(errors="surrogateescape")).digest())
                    total.update(_digest(inner))
        except OSError as error:
            raise PrivacyError(
                f"cannot be read ({error.strerror})", place=path, cure="name the client's data"
            ) from error
        return cls(str(found), total.hexdigest())


def _digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


@dataclass(frozen=True)
class Question:
    """Who asks for which stage on which data. The attributes are columns of the ledger's tables.

    Attributes:
        data: number of the data, see `OwnerLedger.data`.
        session: id of the session (one stage of one run), drawn by the server at random.
        server: fingerprint of the server's certificate; empty without TLS.
        recipe: fingerprint of the terms, that is, of the stage's settings, model and labels.
        stage: name of the stage.
    """

    data: int
    session: str
    server: str
    recipe: str
    stage: str


class OwnerLedger:
    """An open ledger. Several processes may use the same file at the same time.

    Attributes:
        path: path of the file.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        """Opens a ledger, or creates an empty one that only its owner can read.

        Args:
            path: path of the file.
            clock: returns the time in seconds since 1970.

        Raises:
            PrivacyError: if the file is not a ledger, is damaged, has a newer version, or cannot be
                opened.
        """
        self.path = path
        self._clock = clock
        with self._telling():
            self._open(path)

    def _open(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        # The file is created here, because SQLite would create it readable for other users. The
        # files that SQLite puts beside it (-wal, -shm) get the same mode.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        os.chmod(path, 0o600)
        # Device and inode identify the file, see `_check_place`.
        found = path.stat()
        self._place = (found.st_dev, found.st_ino)
        # A program may open the ledger in one thread and use it in another.
        self._base = sqlite3.connect(path, timeout=PATIENCE, check_same_thread=False)
        # None: Python's module begins no transactions by itself. `changing` begins and ends them.
        self._base.isolation_level = None
        # With a write-ahead log other processes can read while one writes.
        self._base.execute("PRAGMA journal_mode = WAL")
        # FULL waits for the disk. A charge must survive a power failure, because the answer that
        # it pays for may already have left.
        self._base.execute("PRAGMA synchronous = FULL")
        (version,) = self._base.execute("PRAGMA user_version").fetchone()
        (application,) = self._base.execute("PRAGMA application_id").fetchone()
        tables = self._base.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if not tables:
            self._make()
        elif application != APPLICATION:
            raise PrivacyError(
                "no ledger of fedpress", place=path, cure="name another file with --ledger"
            )
        elif version > VERSION:
            raise PrivacyError(
                f"got version {version}, this fedpress reads up to {VERSION}",
                place=path,
                cure="use the newest fedpress on this machine",
            )
        # Damage is found now, and not in the middle of a run. 1: stop at the first fault.
        (state,) = self._base.execute("PRAGMA quick_check(1)").fetchone()
        if state != "ok":
            raise sqlite3.DatabaseError(str(state))

    def close(self) -> None:
        """Closes the file."""
        self._base.close()

    def _make(self) -> None:
        """Creates the tables, and triggers that forbid to change or delete rows."""
        # IMMEDIATE locks the file at once, so that two processes cannot both create the tables.
        self._base.execute("BEGIN IMMEDIATE")
        # Another process may have created the tables before this one got the lock.
        if self._base.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            self._base.execute("COMMIT")
            return
        for name, (columns, key) in TABLES.items():
            unique = f", UNIQUE ({key})" if key else ""
            self._base.execute(
                f"CREATE TABLE {name} (id INTEGER PRIMARY KEY, time REAL NOT NULL, "
                f"{columns}{unique})"
            )
            stop = "BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END"
            for change in ("UPDATE", "DELETE"):
                self._base.execute(
                    f"CREATE TRIGGER {name}_{change.lower()} BEFORE {change} ON {name} {stop}"
                )
            # INSERT OR REPLACE deletes a row without calling the DELETE trigger above.
            self._base.execute(
                f"CREATE TRIGGER {name}_insert BEFORE INSERT ON {name} WHEN EXISTS "
                f"(SELECT 1 FROM {name} WHERE id = NEW.id{_also(key)}) {stop}"
            )
        self._base.execute(f"PRAGMA application_id = {APPLICATION}")
        self._base.execute(f"PRAGMA user_version = {VERSION}")
        self._base.execute("COMMIT")

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Runs the block as one transaction: all changes reach the disk at its end, or none does.

        No other process can write during the block, so values that were read inside it stay true
        until its end.

        Raises:
            PrivacyError: if the ledger cannot be written: another process has locked it, the disk
                is full, or the file is damaged, or was moved or replaced since it was opened.
        """
        with self._telling():
            # SQLite writes into a deleted file without an error, and the charges would be lost.
            self._check_place()
            self._base.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._base.execute("COMMIT")
            # Also for Ctrl-C: an open transaction would keep the file locked.
            except BaseException:
                # SQLite ends a transaction by itself after some errors, such as a full disk.
                if self._base.in_transaction:
                    self._base.execute("ROLLBACK")
                raise

    def _check_place(self) -> None:
        """Checks that the open file is still the file at `path`.

        Raises:
            PrivacyError: if the file was deleted, moved or replaced since it was opened.
        """
        try:
            found = self.path.stat()
        except FileNotFoundError:
            found = None
        if found is None or (found.st_dev, found.st_ino) != self._place:
            raise PrivacyError(
                "the ledger was deleted or replaced while it was in use",
                place=self.path,
                cure="put it back, and start the client again",
            )

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """Converts errors of SQLite and of the file system into a `PrivacyError` with a cure."""
        try:
            yield
        except FedpressError:
            raise
        # Before DatabaseError, which is its base class.
        except sqlite3.OperationalError as error:
            # The file is locked, read-only or gone, or the disk is full. Reading fails too while
            # another process has locked the file for itself.
            raise PrivacyError(
                f"cannot be read or written ({error})",
                place=self.path,
                cure="free some space, or stop the process that uses it; nothing is answered "
                "until then",
            ) from error
        except sqlite3.DatabaseError as error:
            raise PrivacyError(
                f"the ledger is damaged ({error})",
                place=self.path,
                cure="restore a backup; a new ledger would forget what was spent",
            ) from error
        except OSError as error:
            raise PrivacyError(
                f"cannot be opened ({error.strerror})",
                place=self.path,
                cure="name another file with --ledger",
            ) from error

    def now(self) -> float:
        """Returns the clock's time; if the clock was set back, the latest time in the ledger."""
        # Else a round answered while the clock is behind would look older than it is, and would
        # leave the count of `rounds_of_today` too early.
        latest = self._clock()
        for name in TABLES:
            for (seen,) in self._read(f"SELECT time FROM {name} ORDER BY id DESC LIMIT 1"):
                latest = max(latest, seen)
        return latest

    def _read(self, query: str, values: Sequence[Any] = ()) -> list[Any]:
        """Returns the rows of a query."""
        with self._telling():
            return self._base.execute(query, tuple(values)).fetchall()

    def _insert(self, table: str, **values: Any) -> None:
        """Adds a row; may be called only inside `changing`."""
        values = {"time": self.now(), **values}
        names = ", ".join(values)
        marks = ", ".join("?" for _ in values)
        self._base.execute(
            f"INSERT INTO {table} ({names}) VALUES ({marks})", tuple(values.values())
        )

    def data(self, key: DataKey) -> int:
        """Returns the number of the data with this path and digest; adds a row if they are new."""
        with self.changing():
            query = "SELECT id FROM data WHERE path = ? AND digest = ?"
            found = self._read(query, (key.path, key.digest))
            if not found:
                self._insert("data", path=key.path, digest=key.digest)
                found = self._read(query, (key.path, key.digest))
        return int(found[0][0])

    def same_data(self, data: int) -> set[int]:
        """Returns the numbers of all rows of the table "data" that mean the same data as `data`.

        Rows with an equal path or an equal digest mean the same data, also by way of a third row.
        Example: a file is changed (same path), and then copied (same digest as the changed file).
        The original and the copy share neither path nor digest, but count as the same data.
        """
        # UNION drops duplicates, so the recursion ends when no new row is found.
        query = """
            WITH RECURSIVE same(id, path, digest) AS (
                SELECT id, path, digest FROM data WHERE id = ?
                UNION
                SELECT d.id, d.path, d.digest FROM data d
                JOIN same s ON d.path = s.path OR d.digest = s.digest
            ) SELECT id FROM same"""
        return {row[0] for row in self._read(query, (data,))}

    def decide(self, question: Question, kind: str, rule: str = "", reason: str = "") -> None:
        """Stores a decision of the gate, unless the same decision is stored already.

        Args:
            question: what was asked.
            kind: kind of the decision, such as "offer", "run" or "fit".
            rule: key of the policy that forbids the answer; empty if it is allowed.
            reason: why the answer is forbidden; empty if it is allowed.

        Raises:
            PrivacyError: if the ledger cannot be written.
        """
        asked = vars(question)
        names = {"data", "session", "recipe"}
        key = {name: asked[name] for name in names} | {"kind": kind, "rule": rule}
        where = " AND ".join(f"{name} = ?" for name in key)
        with self.changing():
            # Stored once: a server that asks again and again must not fill the disk.
            if not self._read(f"SELECT 1 FROM decisions WHERE {where}", (*key.values(),)):
                self._insert("decisions", **asked, kind=kind, rule=rule, reason=reason[:500])

    def answered(self, run: str) -> set[int]:
        """Returns the numbers of the answered rounds of a run."""
        rows = self._read("SELECT round FROM rounds WHERE run = ?", (run,))
        return {row[0] for row in rows}

    def unfinished(self, data: int, *, recipe: str, rounds: int) -> set[str]:
        """Returns the runs of a recipe on these data with fewer than `rounds` answered rounds."""
        query = (
            "SELECT run FROM rounds WHERE recipe = ? AND round > 0 "
            f"AND data IN {self._same(data)} GROUP BY run HAVING count(*) < ?"
        )
        return {row[0] for row in self._read(query, (recipe, rounds))}

    def rounds_of_today(self, data: int) -> int:
        """Returns how many rounds of all runs were answered on these data in the last 24 hours.

        An evaluation of a model counts as a round.
        """
        query = f"SELECT count(*) FROM rounds WHERE time > ? AND data IN {self._same(data)}"
        return int(self._read(query, (self.now() - DAY,))[0][0])

    def charges(
        self, data: int, *, recipe: str | None = None, besides: Collection[str] = ()
    ) -> list[Charge]:
        """Returns the privacy costs of all answers about the same data.

        Args:
            data: number of the data.
            recipe: fingerprint of a recipe: only its charges are returned; None: those of all
                recipes.
            besides: runs whose charges are left out.
        """
        query = f"SELECT unit, {', '.join(ENTRY)} FROM charges WHERE data IN {self._same(data)}"
        values: list[str] = []
        if recipe is not None:
            query += " AND recipe = ?"
            values.append(recipe)
        if besides:
            query += f" AND run NOT IN ({', '.join('?' * len(besides))})"
            values += besides
        found = []
        for unit, *fields in self._read(query, values):
            # The party is not stored: every charge in this file is about the owner's data.
            found.append(Charge(unit, LedgerEntry(OWNER, *fields)))
        return found

    def latest_charge(self, data: int, *, besides: str) -> int:
        """Returns the number of the latest charge for the same data by any run except `besides`.

        The number is the row's id; 0 if there is none. If a later call returns the same number, no
        other run has spent since.
        """
        query = f"SELECT max(id) FROM charges WHERE run != ? AND data IN {self._same(data)}"
        return int(self._read(query, (besides,))[0][0] or 0)

    def _same(self, data: int) -> str:
        """Returns the numbers of the same data as a list for SQL's `IN`."""
        # Safe to insert into a query: the values are integers from the file's own key column.
        return f"({', '.join(map(str, sorted(self.same_data(data))))})"

    def write_round(self, question: Question, run: str, round: int, charges: list[Charge]) -> None:
        """Stores that a round is answered and what the answer costs; call it inside `changing`.

        `round` 0 stands for an evaluation.
        """
        self._insert("rounds", **vars(question), run=run, round=round)
        for part, charge in enumerate(charges):
            fields = {name: getattr(charge.entry, name) for name in ENTRY}
            # SQLite has no type for tensors or NumPy numbers: these fields become plain floats.
            for name in ("sampling_prob", "noise_multiplier", "l2", "l1", "variance", "failure"):
                fields[name] = float(fields[name])
            self._insert(
                "charges",
                data=question.data,
                run=run,
                recipe=question.recipe,
                round=round,
                part=part,
                unit=charge.unit,
                **fields,
            )

    def approve(self, recipe: str, words: str, *, approved: bool = True) -> None:
        """Stores that the owner approves a recipe, or withdraws the approval.

        Args:
            recipe: fingerprint of the recipe.
            words: the sentences about the recipe that the owner has read.
            approved: False withdraws an earlier approval.

        Raises:
            PrivacyError: if the ledger cannot be written.
        """
        with self.changing():
            self._insert("approvals", recipe=recipe, approved=int(approved), words=words)

    def approved(self, recipe: str) -> bool:
        """Returns whether the owner has approved the recipe with the fingerprint `recipe`."""
        query = "SELECT approved FROM approvals WHERE recipe = ? ORDER BY id DESC LIMIT 1"
        found = self._read(query, (recipe,))
        return bool(found and found[0][0])

    def latest_approval(self) -> int:
        """Returns the number of the latest approval or withdrawal of any recipe; 0 if none."""
        return int(self._read("SELECT max(id) FROM approvals")[0][0] or 0)

    def rows(self, table: str) -> list[dict[str, Any]]:
        """Returns all rows of a table, oldest first."""
        names = [row[1] for row in self._read(f"PRAGMA table_info({table})")]
        found = self._read(f"SELECT * FROM {table} ORDER BY id")
        return [dict(zip(names, row, strict=True)) for row in found]


def _also(key: str) -> str:
    """Returns the end of an SQL condition: "or the columns `key` have the values of the new row".

    Returns "" if `key` is empty.
    """
    if not key:
        return ""
    return " OR (" + " AND ".join(f"{one} = NEW.{one}" for one in key.split(", ")) + ")"
