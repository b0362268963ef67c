import hashlib
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from fedpress.data import download
from fedpress.errors import DataError

CONTENT = bytes(range(256)) * 4000
MD5 = hashlib.md5(CONTENT).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Serves CONTENT; breaks off `breaks` times after `gives` bytes; honours Range unless told not to."""

    def __init__(self, plan: SimpleNamespace, *args) -> None:
        self.plan = plan
        super().__init__(*args)

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.plan.ranges.append(wanted)
        if self.plan.status != 200:
            self.send_error(self.plan.status)
            return
        start = int(wanted[6:-1]) if wanted and self.plan.knows_range else 0
        if start >= len(CONTENT):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.end_headers()
        stop = len(CONTENT)
        if self.plan.breaks > 0:
            self.plan.breaks -= 1
            stop = start + self.plan.gives
        self.wfile.write(CONTENT[start:stop])

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def server() -> Iterator[SimpleNamespace]:
    plan = SimpleNamespace(ranges=[], status=200, knows_range=True, breaks=0, gives=300_000)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, plan)) as served:
        threading.Thread(target=served.serve_forever, args=(0.01,), daemon=True).start()
        plan.url = f"http://127.0.0.1:{served.server_port}/data.bin"
        yield plan
        served.shutdown()


def fetch(server, target, **keys):
    return download.fetch(server.url, target, **{"md5": MD5, "wait": 0.0, **keys})


def test_a_download_arrives_whole_with_progress(server, tmp_path):
    told = []
    got = fetch(server, tmp_path / "new" / "data.bin", progress=lambda *now: told.append(now))
    assert got.read_bytes() == CONTENT
    assert told[-1] == ("downloading data.bin", len(CONTENT), len(CONTENT))
    assert [path.name for path in got.parent.iterdir()] == ["data.bin"]


def test_a_broken_connection_is_continued_where_it_broke(server, tmp_path):
    server.breaks = 2
    assert fetch(server, tmp_path / "data.bin").read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=300000-", "bytes=600000-"]


def test_a_half_file_of_an_earlier_run_is_continued(server, tmp_path):
    (tmp_path / "data.bin.part").write_bytes(CONTENT[:1000])
    assert fetch(server, tmp_path / "data.bin").read_bytes() == CONTENT
    assert server.ranges == ["bytes=1000-"]


def test_a_whole_part_file_is_taken_as_it_is(server, tmp_path):
    (tmp_path / "data.bin.part").write_bytes(CONTENT)
    assert fetch(server, tmp_path / "data.bin").read_bytes() == CONTENT


def test_a_server_that_ignores_ranges_sends_all_again(server, tmp_path):
    server.knows_range = False
    (tmp_path / "data.bin.part").write_bytes(b"x" * 1000)
    assert fetch(server, tmp_path / "data.bin").read_bytes() == CONTENT


def test_a_wrong_checksum_is_refused_and_nothing_is_left(server, tmp_path):
    with pytest.raises(DataError, match=f"has md5 {MD5}, expected 0000; try again"):
        fetch(server, tmp_path / "data.bin", md5="0000")
    assert list(tmp_path.iterdir()) == []


def test_a_connection_that_brings_nothing_is_given_up_after_some_attempts(server, tmp_path):
    server.breaks, server.gives = 99, 0
    with pytest.raises(
        DataError, match=r"cannot be downloaded .*ended after 0 of 1024000 bytes.*check the network"
    ):
        fetch(server, tmp_path / "data.bin")
    assert len(server.ranges) == download.ATTEMPTS


def test_without_a_network_the_error_says_so(tmp_path):
    with pytest.raises(
        DataError,
        match=r"'http://127.0.0.1:9/x': cannot be downloaded .*refused.*check the network, or set path",
    ):
        download.fetch("http://127.0.0.1:9/x", tmp_path / "x", md5=MD5, wait=0.0)


@pytest.mark.parametrize(("status", "requests"), [(404, 1), (503, download.ATTEMPTS)])
def test_a_server_error_is_told_with_its_number(server, tmp_path, status, requests):
    server.status = status
    with pytest.raises(DataError, match=f"the server says {status}"):
        fetch(server, tmp_path / "data.bin")
    assert len(server.ranges) == requests


def test_a_folder_that_cannot_be_written_is_named(server, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match=r"data.bin.part: cannot be written .* set FEDPRESS_CACHE"):
        fetch(server, tmp_path / "file" / "data.bin")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_told(server, tmp_path):
    (tmp_path / "data.bin.part").symlink_to("/dev/full")
    with pytest.raises(
        DataError, match=r"cannot be written .*No space left on device.*; free some space"
    ):
        fetch(server, tmp_path / "data.bin")
