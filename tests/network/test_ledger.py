"""The owner's ledger: append-only, private, durable, and of the data rather than of a run."""

import os
import resource
import signal
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from fedpress.errors import PrivacyError
from fedpress.network import ledger as ledgers
from fedpress.network.ledger import DataKey, OwnerLedger, Question
from fedpress.network.spending import Charge
from fedpress.privacy.ledger import LedgerEntry

ENTRY = Charge("sample", LedgerEntry("owner", "federate", 0.5, 4.0, 2, 1, 1))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "own" / "ledger.sqlite"


def question(data, session="1" * 16, server="s", recipe="r"):
    return Question(data, session, server, recipe, "federate")


def answer(ledger, about, run, round, charges=(ENTRY,)):
    with ledger.changing():
        ledger.write_round(about, run, round, list(charges))


def test_only_the_owner_can_read_it(path):
    ledger = OwnerLedger(path)
    ledger.data(DataKey("/a", "d"))
    for file in path.parent.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file.name
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_an_older_file_that_others_could_read_is_closed_to_them(path):
    OwnerLedger(path).close()
    path.chmod(0o644)
    OwnerLedger(path).close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_rows_can_neither_be_changed_nor_deleted_nor_replaced(path):
    ledger = OwnerLedger(path)
    data = ledger.data(DataKey("/a", "d"))
    answer(ledger, question(data), "run", 1)
    ledger.decide(question(data), "offer")
    ledger.approve("r", "words")
    ledger.close()
    raw = sqlite3.connect(path)
    for table in ledgers.TABLES:
        assert raw.execute(f"SELECT count(*) FROM {table}").fetchone() == (1,)
        names = [row[1] for row in raw.execute(f"PRAGMA table_info({table})")]
        row = raw.execute(f"SELECT * FROM {table}").fetchone()
        marks = ", ".join("?" for _ in names)
        for change in (f"UPDATE {table} SET time = 0", f"DELETE FROM {table}"):
            with pytest.raises(sqlite3.IntegrityError, match="append-only"):
                raw.execute(change)
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            raw.execute(f"INSERT OR REPLACE INTO {table} VALUES ({marks})", row)
        # The same row under another number.
        key = ledgers.TABLES[table][1]
        if key:
            with pytest.raises(sqlite3.IntegrityError, match="append-only"):
                raw.execute(f"INSERT OR REPLACE INTO {table} VALUES ({marks})", (99, *row[1:]))


def test_what_was_charged_is_there_after_a_restart(path):
    ledger = OwnerLedger(path)
    data = ledger.data(DataKey("/a", "d"))
    answer(ledger, question(data), "run", 1)
    ledger.close()
    again = OwnerLedger(path)
    assert again.data(DataKey("/a", "d")) == data
    assert again.charges(data) == [ENTRY]
    assert again.answered("run") == {1}


def test_a_charge_is_on_the_disk_before_the_answer_leaves(path):
    OwnerLedger(path).close()
    code = f"""
import os, signal
from fedpress.network.ledger import *
from fedpress.network.spending import Charge
from fedpress.privacy.ledger import LedgerEntry
ledger = OwnerLedger(Path({str(path)!r}))
about = Question(ledger.data(DataKey("/a", "d")), "1" * 16, "s", "r", "federate")
with ledger.changing():
    entry = LedgerEntry("owner", "federate", 0.5, 4.0, 2, 1, 1)
    ledger.write_round(about, "run", 1, [Charge("sample", entry)])
os.kill(os.getpid(), signal.SIGKILL)  # here the answer would be computed and sent
"""
    killed = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    assert killed.returncode == -signal.SIGKILL
    ledger = OwnerLedger(path)
    assert ledger.answered("run") == {1}
    assert ledger.charges(ledger.data(DataKey("/a", "d"))) == [ENTRY]


def test_data_are_recognised_by_path_or_content_also_by_way_of_others(path):
    ledger = OwnerLedger(path)
    first = ledger.data(DataKey("/a", "old"))
    answer(ledger, question(first), "run", 1)
    changed = ledger.data(DataKey("/a", "new"))
    copied = ledger.data(DataKey("/b", "new"))
    other = ledger.data(DataKey("/c", "other"))
    assert ledger.charges(changed) == ledger.charges(copied) == [ENTRY]
    assert ledger.charges(other) == []


def test_a_copy_and_a_link_are_the_same_data(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.csv").write_text("1,2")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    key = DataKey.of(tmp_path / "a")
    assert DataKey.of(tmp_path / "link") == key
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.csv").write_text("1,2")
    assert DataKey.of(tmp_path / "b").digest == key.digest
    assert DataKey.of(tmp_path / "a" / "*.csv").digest == key.digest
    (tmp_path / "b" / "x.csv").write_text("1,3")
    assert DataKey.of(tmp_path / "b").digest != key.digest
    with pytest.raises(PrivacyError, match="cannot be read"):
        DataKey.of(tmp_path / "absent")


def test_a_clock_that_is_set_back_does_not_give_new_rounds(path):
    now = [1e9]
    ledger = OwnerLedger(path, clock=lambda: now[0])
    data = ledger.data(DataKey("/a", "d"))
    answer(ledger, question(data), "run", 1)
    assert ledger.rounds_of_today(data) == 1
    now[0] -= 10 * ledgers.DAY
    answer(ledger, question(data), "run", 2)
    assert ledger.rounds_of_today(data) == 2
    now[0] += 10 * ledgers.DAY + ledgers.DAY - 1
    assert ledger.rounds_of_today(data) == 2
    now[0] += 2
    assert ledger.rounds_of_today(data) == 0


def test_the_default_place_follows_the_desktop_standard(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert ledgers.default_path() == tmp_path / "fedpress" / "ledger.sqlite"
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert ledgers.default_path() == tmp_path / ".local/share/fedpress/ledger.sqlite"


def test_a_damaged_ledger_is_refused(path):
    path.parent.mkdir()
    path.write_bytes(b"no database " * 100)
    with pytest.raises(PrivacyError, match=r"the ledger is damaged.*restore a backup"):
        OwnerLedger(path)


def test_another_database_and_a_newer_version_are_refused(path):
    path.parent.mkdir()
    raw = sqlite3.connect(path)
    raw.execute("CREATE TABLE other (x)")
    raw.close()
    with pytest.raises(PrivacyError, match="no ledger of fedpress"):
        OwnerLedger(path)
    path.unlink()
    OwnerLedger(path).close()
    raw = sqlite3.connect(path)
    raw.execute("PRAGMA user_version = 2")
    raw.close()
    with pytest.raises(PrivacyError, match="got version 2"):
        OwnerLedger(path)


def test_a_ledger_that_another_process_keeps_is_refused_and_nothing_is_written(path, monkeypatch):
    monkeypatch.setattr(ledgers, "PATIENCE", 0.1)
    ledger = OwnerLedger(path)
    data = ledger.data(DataKey("/a", "d"))
    raw = sqlite3.connect(path)
    raw.execute("BEGIN IMMEDIATE")
    with pytest.raises(PrivacyError, match="locked"):
        answer(ledger, question(data), "run", 1)
    raw.rollback()
    assert ledger.charges(data) == []
    answer(ledger, question(data), "run", 1)


def test_a_full_disk_is_told_and_nothing_is_half_written(path):
    ledger = OwnerLedger(path)
    data = ledger.data(DataKey("/a", "d"))

    def fill():
        for round in range(1000):
            answer(ledger, question(data), "run", round + 1)

    # No file may grow any more, as on a full disk.
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    try:
        with pytest.raises(PrivacyError, match=r"cannot be read or written.*free some space"):
            fill()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    rounds = ledger.answered("run")
    assert len(ledger.charges(data)) == len(rounds) < 1000
    answer(ledger, question(data), "run", 2000)


def test_a_decision_is_noted_once_for_each_rule(path):
    ledger = OwnerLedger(path)
    data = ledger.data(DataKey("/a", "d"))
    for _ in range(3):
        ledger.decide(question(data), "fit", "total_epsilon", "spent")
    ledger.decide(question(data), "fit")
    assert [row["rule"] for row in ledger.rows("decisions")] == ["total_epsilon", ""]


def test_an_approval_can_be_withdrawn(path):
    ledger = OwnerLedger(path)
    assert not ledger.approved("r")
    ledger.approve("r", "words")
    assert ledger.approved("r")
    ledger.approve("r", "words", approved=False)
    assert not ledger.approved("r")


def test_two_processes_can_make_the_same_ledger(path):
    first, second = OwnerLedger(path), OwnerLedger(path)
    assert first.data(DataKey("/a", "d")) == second.data(DataKey("/a", "d"))
    assert os.path.samefile(first.path, second.path)


def test_a_ledger_that_is_deleted_or_replaced_in_use_is_refused(path):
    ledger = OwnerLedger(path)
    data = ledger.data(DataKey("/a", "d"))
    path.rename(path.with_name("moved"))
    with pytest.raises(PrivacyError, match="deleted or replaced"):
        answer(ledger, question(data), "run", 1)
    path.write_bytes(b"")
    with pytest.raises(PrivacyError, match="deleted or replaced"):
        answer(ledger, question(data), "run", 1)
