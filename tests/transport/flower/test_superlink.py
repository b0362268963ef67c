"""How the process of the SuperLink starts, with a small program in its place."""

import socket
import sys
import threading

import pytest

pytest.importorskip("flwr")

from fedpress.errors import NetworkError
from fedpress.transport.flower import Address, SuperLink, superlink

# Kills itself the first times that it is started; then it answers on the port.
PROGRAM = """#!{python}
import os, sys
from pathlib import Path
count = Path({count!r})
started = int(count.read_text()) if count.exists() else 0
count.write_text(str(started + 1))
if started < {kills}:
    os.kill(os.getpid(), 9)
if {fails}:
    print("no such option")
    sys.exit(2)
from http.server import HTTPServer, SimpleHTTPRequestHandler
HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), SimpleHTTPRequestHandler).serve_forever()
"""


@pytest.fixture
def port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Puts a program in the place of Python; returns the file with the count of its starts."""

    def put(kills=0, fails=False):
        count = tmp_path / "count"
        path = tmp_path / "program"
        path.write_text(
            PROGRAM.format(python=sys.executable, count=str(count), kills=kills, fails=fails)
        )
        path.chmod(0o755)
        monkeypatch.setattr(superlink.sys, "executable", str(path))
        return count

    return put


def test_one_that_is_killed_while_it_starts_is_started_again(tmp_path, program, port):
    count = program(kills=2)
    made = SuperLink(Address("127.0.0.1", port), tmp_path / "run")
    assert made.running
    # Its log tells who answers.
    assert (tmp_path / "run").stat().st_mode & 0o077 == 0
    assert count.read_text() == "3"
    made.close()
    assert not made.running


def test_one_that_is_killed_every_time_is_an_error(tmp_path, program, port):
    count = program(kills=100)
    with pytest.raises(NetworkError, match="did not start"):
        SuperLink(Address("127.0.0.1", port), tmp_path / "run")
    assert count.read_text() == str(superlink.STARTS)


def test_a_fault_of_its_own_is_told_at_once_in_its_own_words(tmp_path, program, port):
    count = program(fails=True)
    with pytest.raises(NetworkError, match="no such option"):
        SuperLink(Address("127.0.0.1", port), tmp_path / "run")
    assert count.read_text() == "1"


def test_the_port_of_an_earlier_one_may_take_a_moment_to_get_free(
    tmp_path, program, port, monkeypatch
):
    program()
    address, folder = Address("127.0.0.1", port), tmp_path / "run"
    SuperLink(address, folder).close()
    other = socket.create_server(("127.0.0.1", port))
    # Nobody was in this folder before: an error at once.
    with pytest.raises(NetworkError, match="cannot listen"):
        SuperLink(address, tmp_path / "new")
    threading.Timer(0.5, other.close).start()
    SuperLink(address, folder).close()
    with socket.create_server(("127.0.0.1", port)):
        monkeypatch.setattr(superlink, "LET_GO", 0.3)
        with pytest.raises(NetworkError, match="cannot listen"):
            SuperLink(address, folder)
