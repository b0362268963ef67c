import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fedpress.errors import RunError
from fedpress.workspace import lock

HOLD = """
import sys, time
from pathlib import Path
from fedpress.workspace import lock
with lock.locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def other(tmp_path):
    """Another process that holds the folder."""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True, env=env
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_process_is_told_who_holds_the_folder(tmp_path, other):
    for ask in (lambda: lock.locked(tmp_path).__enter__(), lambda: lock.check_unlocked(tmp_path)):
        with pytest.raises(RunError) as caught:
            ask()
        said = str(caught.value)
        assert said.startswith(f"{tmp_path}: process {other.pid} on ")
        assert re.search(r"since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d", said)
        assert "wait for its end, or give another out=" in said
    assert str(other.pid) in lock.holder(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_lock_of_a_dead_process_is_taken_over(tmp_path, other, number):
    other.send_signal(number)
    other.wait()
    assert (tmp_path / "lock").exists(), "nobody could remove it"
    assert lock.holder(tmp_path) is None
    lock.check_unlocked(tmp_path)
    with lock.locked(tmp_path):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
    assert not (tmp_path / "lock").exists()


def test_the_thread_that_holds_it_may_take_it_again_and_another_may_not(tmp_path):
    said = []

    def try_it():
        try:
            with lock.locked(tmp_path):
                said.append("taken")
        except RunError as error:
            said.append(str(error))

    with lock.locked(tmp_path):
        with lock.locked(tmp_path):
            lock.check_unlocked(tmp_path)
        thread = threading.Thread(target=try_it)
        thread.start()
        thread.join()
        assert f"process {os.getpid()}" in said[0]
    try_it()
    assert said[1] == "taken"


def test_it_is_given_back_when_the_work_fails(tmp_path):
    with pytest.raises(ZeroDivisionError), lock.locked(tmp_path):
        raise ZeroDivisionError
    assert lock.holder(tmp_path) is None


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff", b"[" * 100_000, b'{"pid": "x"}'])
def test_a_damaged_note_of_nobody_is_written_over(tmp_path, content):
    (tmp_path / "lock").write_bytes(content)
    with lock.locked(tmp_path):
        pass


class TestWithoutLocksOfTheSystem:
    """Where the file system knows none, the note alone counts."""

    @pytest.fixture(autouse=True)
    def _without(self, monkeypatch):
        monkeypatch.setattr(lock, "fcntl", None)

    def note(self, folder, **changes):
        (folder / "lock").write_text(json.dumps(lock.own_note() | changes))

    def test_a_living_process_holds_it(self, tmp_path):
        self.note(tmp_path, pid=os.getppid(), started=lock.process_start(os.getppid()))
        with pytest.raises(RunError, match=f"process {os.getppid()}"), lock.locked(tmp_path):
            pass

    def test_a_dead_process_and_a_number_that_was_given_again_do_not(self, tmp_path):
        process = subprocess.Popen([sys.executable, "-c", ""])
        process.wait()
        self.note(tmp_path, pid=process.pid)
        with lock.locked(tmp_path):
            pass
        self.note(tmp_path, pid=os.getppid(), started="1")
        with lock.locked(tmp_path):
            pass

    @pytest.mark.parametrize("content", [b"", b"{"])
    def test_a_file_that_names_nobody_holds_nothing(self, tmp_path, content):
        (tmp_path / "lock").write_bytes(content)
        assert lock.holder(tmp_path) is None
        lock.check_unlocked(tmp_path)
        with lock.locked(tmp_path):
            pass

    def test_of_another_machine_nothing_is_known(self, tmp_path):
        self.note(tmp_path, host="elsewhere", pid=1)
        with pytest.raises(RunError, match="process 1 on elsewhere"), lock.locked(tmp_path):
            pass
