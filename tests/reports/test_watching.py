"""The page of a run is served to this machine alone, asks for nothing else, and follows the run."""

import html
import http.client
import json
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest
from browser import CHROMIUM, chromium
from folders import CLIENTS, federate, train, write_json

from fedpress.errors import NetworkError
from fedpress.reports.watching import serve

ROUND = "document.querySelector('#tiles .value').textContent"


@pytest.fixture
def folder(tmp_path):
    """A run that is in its first round."""
    run = tmp_path / "run"
    run.mkdir()
    settings = {"name": "tiny", "stage": [{"kind": "train"}, {"kind": "federate"}]}
    write_json(run / "settings.json", settings)
    write_json(run / "result.json", {"stages": [train(0, "train", 1, 0.5)[0]], "finished": False})
    for record in [*train(0, "train", 7, 0.94), *federate(1, CLIENTS, True)[:1]]:
        append(run, record)
    return run


def append(run, record):
    with open(run / "records.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def end(run):
    write_json(
        run / "result.json", json.loads((run / "result.json").read_text()) | {"finished": True}
    )


@contextmanager
def served(folder):
    with serve(folder) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def ask(port, path="/", method="GET", **headers):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer, text


def test_only_this_machine_is_served(folder):
    with serve(folder) as server:
        assert server.server_address[0] == "127.0.0.1"


def test_page_part_and_report_are_served_and_nothing_else(folder):
    with served(folder) as port:
        answer, text = ask(port)
        assert (answer.status, answer.headers["Content-Type"]) == (200, "text/html; charset=utf-8")
        assert text.startswith("<!doctype html>")
        assert "1 of 20" in text
        assert ask(port, "/main")[1].strip().startswith("<main")
        assert "fedpress report" in ask(port, "/report")[1]
        head, nothing = ask(port, method="HEAD")
        assert (head.status, nothing) == (200, "")
        for path in ("/records.jsonl", "/../run/settings.json", "/main/"):
            assert ask(port, path)[0].status == 404
        assert ask(port, method="POST")[0].status == 501


def test_other_names_for_this_machine_are_refused(folder):
    with served(folder) as port:
        for host in ("evil.example", f"evil.example:{port}", "127.0.0.1", "127.0.0.1:1", ""):
            answer, text = ask(port, Host=host)
            assert (answer.status, text) == (403, "ask for 127.0.0.1")
        assert ask(port, Host=f"localhost:{port}")[0].status == 200


def test_the_page_may_load_nothing_and_run_no_other_script(folder):
    with served(folder) as port:
        answer, text = ask(port)
    text = html.unescape(text)
    policy = text.partition('http-equiv="Content-Security-Policy" content="')[2].partition('"')[0]
    rules = dict(rule.strip().partition(" ")[::2] for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["connect-src"] == "'self'"
    assert rules["script-src"].count("sha256-") == 2
    assert "unsafe" not in rules["script-src"]
    assert answer.headers["Content-Security-Policy"] == "frame-ancestors 'none'"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Cache-Control"] == "no-store"
    assert '<noscript><meta http-equiv="refresh" content="5"></noscript>' in text
    assert "http://" not in text.replace("http://www.w3.org", "")


def test_a_damaged_run_is_still_served(folder):
    (folder / "result.json").write_text("{")
    with served(folder) as port:
        answer, text = ask(port)
        assert answer.status == 200
        assert "result.json is damaged" in text
        assert "result.json" in ask(port, "/report")[1]


def test_a_port_that_is_taken_is_told(folder):
    with serve(folder) as server, pytest.raises(NetworkError, match=r"cannot be opened .*--port"):
        serve(folder, server.server_port)


@pytest.mark.recipe
def test_the_command_prints_the_address_and_ends_quietly_with_ctrl_c(folder):
    words = ["-c", "from fedpress.cli import main; main()", "watch", str(folder)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}

    # A shell that starts the tests in the background makes its children deaf to Ctrl-C.
    def listen():
        signal.signal(signal.SIGINT, signal.default_int_handler)

    with subprocess.Popen([sys.executable, *words], **pipes, preexec_fn=listen) as command:
        address = command.stdout.readline().split()[0]
        port = int(address.removeprefix("http://127.0.0.1:").rstrip("/"))
        assert ask(port)[0].status == 200
        command.send_signal(signal.SIGINT)
        said = command.communicate(timeout=60)
    assert (command.returncode, said) == (0, ("\n", ""))


def wait_for(page, expression, value):
    limit = time.monotonic() + 60
    while (found := page.ask(expression)) != value:
        assert time.monotonic() < limit, (found, page.events)
        time.sleep(0.2)


@pytest.mark.deploy
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_a_browser_follows_the_run_to_its_end(folder, tmp_path):
    rounds = federate(1, CLIENTS, True)
    with served(folder) as port, chromium(tmp_path / "profile") as page:
        address = f"http://127.0.0.1:{port}/"
        page.visit(address, width=1280)
        assert page.ask(ROUND) == "1 of 20"
        page.ask("document.querySelector('#figures details').open = true")
        append(folder, rounds[1])
        # First by the script, in the same page, which keeps what was unfolded.
        wait_for(page, ROUND, "2 of 20")
        assert page.ask("document.querySelector('#figures details').open")
        append(folder, rounds[2])
        page.visit(address, width=390, dark=True)
        assert page.ask(ROUND) == "3 of 20"
        assert page.ask("[innerWidth, document.documentElement.scrollWidth]") == [390, 390]
        assert page.ask("document.getElementById('gone').hidden")
        end(folder)
        wait_for(
            page,
            "document.querySelector('main[data-ended] a')?.textContent",
            "The report of this run",
        )
        told = {event["method"] for event in page.events}
        assert not {"Log.entryAdded", "Runtime.exceptionThrown"} & told
        asked = [
            e["params"]["request"]["url"]
            for e in page.events
            if e["method"] == "Network.requestWillBeSent"
        ]
        assert set(asked) == {address, f"{address}main"}


@pytest.mark.deploy
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_a_browser_tells_that_the_command_has_ended(folder, tmp_path):
    with chromium(tmp_path / "profile") as page:
        with served(folder) as port:
            page.visit(f"http://127.0.0.1:{port}/", width=1280)
        wait_for(page, "document.getElementById('gone').hidden", False)
        assert page.ask(ROUND) == "1 of 20"
