"""The transport of the page "To add something": the text of the page runs, over files, with clients in a thread."""

import re
import threading
import time
from pathlib import Path

import pytest

from fedpress.federation.exchange import exchange
from fedpress.wire.message import Message
from tests.federation.federation import Federation, run_rounds

PAGE = Path(__file__).parents[2] / "docs" / "adding.md"


@pytest.fixture(scope="module")
def page():
    """What the page defines."""
    (text,) = re.findall(
        r"^```python\n(.*?)^```", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL
    )
    names = {"__name__": "page"}
    exec(compile(text, str(PAGE), "exec"), names)
    return names


@pytest.fixture
def served(page, tmp_path):
    """Returns a transport over `tmp_path` whose clients answer in a thread."""
    stop, threads = threading.Event(), []

    def serve(handlers):
        def work():
            while not stop.is_set():
                for name, handle in handlers.items():
                    page["answer_all"](tmp_path, name, handle)
                time.sleep(0.01)

        threads.append(threading.Thread(target=work))
        threads[0].start()
        return page["FolderTransport"](tmp_path, list(handlers), poll=0.01)

    yield serve
    stop.set()
    for thread in threads:
        thread.join()


def run(federation, transport):
    """Returns the records of two rounds."""
    return list(run_rounds(federation, 2, transport=transport))


def test_rounds_over_files_give_the_bits_of_the_local_transport(served):
    local, other = Federation(2), Federation(2)
    wanted = run(local, local.transport)
    handlers = {name: client.handle for name, client in other.clients.items()}
    found = run(other, served(handlers))
    for got, want in zip(found, wanted, strict=True):
        assert got.params.equal(want.params)
        assert (got.bytes_up, got.bytes_down) == (want.bytes_up, want.bytes_down)


def test_a_client_that_fails_answers_with_an_error(served):
    def fails(request):
        raise RuntimeError("no power")

    transport = served({"a": fails})
    ((client, reply),) = exchange(transport, {"a": Message("fit", {"round": 1}, {})})
    assert (client, reply.kind) == ("a", "error")
    assert "no power" in reply.header["reason"]


def test_a_silent_client_is_not_waited_for_longer_than_asked(page, tmp_path):
    transport = page["FolderTransport"](tmp_path, ["a"])
    request = transport.send("a", Message("fit", {"round": 1}, {}))
    assert transport.receive([request], timeout=0.02) is None
    transport.cancel([request])
    assert not list(tmp_path.rglob("*.request"))
