"""A data owner's private ledger: an append-only SQLite file of what was asked, answered and spent.

Every charge is on the disk before the answer leaves. Charges belong to the data, not to a recipe,
a server or a folder: all clients that use one ledger share the budget of the same data.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedpress.errors import FedpressError, PrivacyError
from fedpress.network.spending import OWNER, Charge
from fedpress.privacy.ledger import LedgerEntry

VERSION = 1
APPLICATION = 0x66656470
"""Marks the file as a ledger ("fedp"), so that no other database is taken for one."""
PATIENCE = 30.0
"""Seconds to wait for another process that writes."""
DAY = 86_400.0

TABLES: dict[str, tuple[str, str]] = {
    # Paths and contents that were seen together. Data are recognised later by either of them.
    "data": ("path TEXT NOT NULL, digest TEXT NOT NULL", "path, digest"),
    # What was decided about a question, once for each kind of decision.
    "decisions": (
        "data INTEGER NOT NULL, session TEXT NOT NULL, server TEXT NOT NULL, "
        "recipe TEXT NOT NULL, stage TEXT NOT NULL, kind TEXT NOT NULL, rule TEXT NOT NULL, "
        "reason TEXT NOT NULL",
        "data, session, recipe, kind, rule",
    ),
    # Rounds that are answered. A run is named by the client's memory (see `Asked.memory`) and by
    # the agreement of all clients.
    "rounds": (
        "data INTEGER NOT NULL, run TEXT NOT NULL, session TEXT NOT NULL, server TEXT NOT NULL, "
        "recipe TEXT NOT NULL, stage TEXT NOT NULL, round INTEGER NOT NULL",
        "run, round",
    ),
    # The entries of `fedpress.privacy.ledger` that the answer to a round costs.
    "charges": (
        "data INTEGER NOT NULL, run TEXT NOT NULL, recipe TEXT NOT NULL, round INTEGER NOT NULL, "
        "part INTEGER NOT NULL, unit TEXT NOT NULL, what TEXT NOT NULL, "
        "sampling_prob REAL NOT NULL, noise_multiplier REAL NOT NULL, steps INTEGER NOT NULL, "
        "first_round INTEGER NOT NULL, last_round INTEGER NOT NULL, l2 REAL NOT NULL, "
        "l1 REAL NOT NULL, variance REAL NOT NULL, failure REAL NOT NULL",
        "run, round, part",
    ),
    # The newest row of a recipe counts: what was approved can be withdrawn.
    "approvals": ("recipe TEXT NOT NULL, approved INTEGER NOT NULL, words TEXT NOT NULL", ""),
}
"""Table -> its columns beside `id` and `time`, and those whose values only one row may have."""
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
"""Columns of an entry; the party is always the owner."""


def default_path() -> Path:
    """Returns where the ledger lies if nobody says otherwise."""
    base = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(base).expanduser() / "fedpress" / "ledger.sqlite"


@dataclass(frozen=True)
class DataKey:
    """Path and content of data; data are recognised by either of them.

    Attributes:
        path: absolute path without links, so that links and relative names make no difference.
        digest: SHA-256 of the content; for a folder, of the names and contents of its files.
    """

    path: str
    digest: str

    @classmethod
    def of(cls, path: Path) -> DataKey:
        """Reads a file, a folder, or the files that a name with `*` stands for.

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
    """Which server has asked what about which data; rows of the ledger refer to it.

    Attributes:
        data: number of the data, see `OwnerLedger.data`.
        session: name of the session, which the server has drawn.
        server: fingerprint of the server's certificate; empty without TLS.
        recipe: fingerprint of the terms.
        stage: name of the stage.
    """

    data: int
    session: str
    server: str
    recipe: str
    stage: str


class OwnerLedger:
    """The ledger; a process keeps it open, and several processes may use it at the same time.

    Attributes:
        path: of the file.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        """Opens a ledger, or makes an empty one that only its owner can read.

        Args:
            path: of the file.
            clock: returns the time in seconds since 1970.

        Raises:
            PrivacyError: if it is damaged, of a newer version, or cannot be read.
        """
        self.path = path
        self._clock = clock
        with self._telling():
            self._open(path)

    def _open(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        # Made here, since SQLite would let others read it. Its side files copy this mode.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        os.chmod(path, 0o600)
        found = path.stat()
        self._place = (found.st_dev, found.st_ino)
        self._base = sqlite3.connect(path, timeout=PATIENCE, check_same_thread=False)
        # Transactions are begun and ended by hand, see `changing`.
        self._base.isolation_level = None
        self._base.execute("PRAGMA journal_mode = WAL")
        # A committed charge must outlive a power failure: the answer may have left.
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
        (state,) = self._base.execute("PRAGMA quick_check(1)").fetchone()
        if state != "ok":
            raise sqlite3.DatabaseError(str(state))

    def close(self) -> None:
        """Closes the file."""
        self._base.close()

    def _make(self) -> None:
        """Creates the tables, and triggers by which rows can be added only."""
        self._base.execute("BEGIN IMMEDIATE")
        # Another process may have created the tables meanwhile.
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
            # INSERT OR REPLACE would delete a row without calling the trigger above.
            self._base.execute(
                f"CREATE TRIGGER {name}_insert BEFORE INSERT ON {name} WHEN EXISTS "
                f"(SELECT 1 FROM {name} WHERE id = NEW.id{_also(key)}) {stop}"
            )
        self._base.execute(f"PRAGMA application_id = {APPLICATION}")
        self._base.execute(f"PRAGMA user_version = {VERSION}")
        self._base.execute("COMMIT")

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Makes all changes inside the block at once, and on the disk, or none of them.

        No other process can write meanwhile, so what was read inside still holds at the end.

        Raises:
            PrivacyError: if the ledger cannot be written: another process keeps it, the disk is
                full, or the file is damaged.
        """
        with self._telling():
            self._check_place()
            self._base.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._base.execute("COMMIT")
            except BaseException:
                if self._base.in_transaction:
                    self._base.execute("ROLLBACK")
                raise

    def _check_place(self) -> None:
        """Refuses to write into a file that is no longer at its path.

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
        """Turns errors of SQLite and of files into a `PrivacyError` with a place and a cure."""
        try:
            yield
        except FedpressError:
            raise
        except sqlite3.OperationalError as error:
            # The file is locked, read-only or gone, or the disk is full.
            raise PrivacyError(
                f"cannot be written ({error})",
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
        """Returns the time, or the latest time in the ledger if the clock was set back since."""
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
        """Adds a row; must be called inside of `changing`."""
        values = {"time": self.now(), **values}
        names = ", ".join(values)
        marks = ", ".join("?" for _ in values)
        self._base.execute(
            f"INSERT INTO {table} ({names}) VALUES ({marks})", tuple(values.values())
        )

    def data(self, key: DataKey) -> int:
        """Returns the number of the data with this path and content, which are noted together."""
        with self.changing():
            query = "SELECT id FROM data WHERE path = ? AND digest = ?"
            found = self._read(query, (key.path, key.digest))
            if not found:
                self._insert("data", path=key.path, digest=key.digest)
                found = self._read(query, (key.path, key.digest))
        return int(found[0][0])

    def same_data(self, data: int) -> set[int]:
        """Returns the numbers of all data that share a path or a content with these.

        This includes data that share one only with other data of the result: a file that was
        changed, and then copied, stays the same data.
        """
        query = """
            WITH RECURSIVE same(id, path, digest) AS (
                SELECT id, path, digest FROM data WHERE id = ?
                UNION
                SELECT d.id, d.path, d.digest FROM data d
                JOIN same s ON d.path = s.path OR d.digest = s.digest
            ) SELECT id FROM same"""
        return {row[0] for row in self._read(query, (data,))}

    def decide(self, question: Question, kind: str, rule: str = "", reason: str = "") -> None:
        """Notes a decision, once for each rule; an empty `rule` is a yes.

        Raises:
            PrivacyError: if the ledger cannot be written.
        """
        asked = vars(question)
        names = {"data", "session", "recipe"}
        key = {name: asked[name] for name in names} | {"kind": kind, "rule": rule}
        where = " AND ".join(f"{name} = ?" for name in key)
        with self.changing():
            # A server that asks again and again must not fill the disk.
            if not self._read(f"SELECT 1 FROM decisions WHERE {where}", (*key.values(),)):
                self._insert("decisions", **asked, kind=kind, rule=rule, reason=reason[:500])

    def answered(self, run: str) -> set[int]:
        """Returns the rounds of a run that are answered."""
        rows = self._read("SELECT round FROM rounds WHERE run = ?", (run,))
        return {row[0] for row in rows}

    def rounds_of_today(self, data: int) -> int:
        """Returns how many rounds were answered on the same data in the last 24 hours."""
        query = f"SELECT count(*) FROM rounds WHERE time > ? AND data IN {self._same(data)}"
        return int(self._read(query, (self.now() - DAY,))[0][0])

    def charges(
        self, data: int, *, recipe: str | None = None, besides: str | None = None
    ) -> list[Charge]:
        """Returns what was charged for the same data.

        Args:
            data: number of the data.
            recipe: only the charges of this recipe; None: of all.
            besides: a run whose own charges are left out.
        """
        query = f"SELECT unit, {', '.join(ENTRY)} FROM charges WHERE data IN {self._same(data)}"
        values: list[str] = []
        if recipe is not None:
            query += " AND recipe = ?"
            values.append(recipe)
        if besides is not None:
            query += " AND run != ?"
            values.append(besides)
        found = []
        for unit, *fields in self._read(query, values):
            found.append(Charge(unit, LedgerEntry(OWNER, *fields)))
        return found

    def latest_charge(self, data: int, *, besides: str) -> int:
        """Returns the number of the latest charge for the same data by another run; 0 for none."""
        query = f"SELECT max(id) FROM charges WHERE run != ? AND data IN {self._same(data)}"
        return int(self._read(query, (besides,))[0][0] or 0)

    def _same(self, data: int) -> str:
        return f"({', '.join(map(str, sorted(self.same_data(data))))})"

    def write_round(self, question: Question, run: str, round: int, charges: list[Charge]) -> None:
        """Notes that a round is answered, and what the answer costs; call it inside `changing`."""
        self._insert("rounds", **vars(question), run=run, round=round)
        for part, charge in enumerate(charges):
            fields = {name: getattr(charge.entry, name) for name in ENTRY}
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
        """Notes that the owner approves a recipe, or withdraws the approval.

        Raises:
            PrivacyError: if the ledger cannot be written.
        """
        with self.changing():
            self._insert("approvals", recipe=recipe, approved=int(approved), words=words)

    def approved(self, recipe: str) -> bool:
        """Says whether the owner has approved a recipe, by its fingerprint."""
        query = "SELECT approved FROM approvals WHERE recipe = ? ORDER BY id DESC LIMIT 1"
        found = self._read(query, (recipe,))
        return bool(found and found[0][0])

    def rows(self, table: str) -> list[dict[str, Any]]:
        """Returns all rows of a table, oldest first."""
        names = [row[1] for row in self._read(f"PRAGMA table_info({table})")]
        found = self._read(f"SELECT * FROM {table} ORDER BY id")
        return [dict(zip(names, row, strict=True)) for row in found]


def _also(key: str) -> str:
    """Returns the SQL condition that a row with the same values in the columns `key` exists."""
    if not key:
        return ""
    return " OR (" + " AND ".join(f"{one} = NEW.{one}" for one in key.split(", ")) + ")"
