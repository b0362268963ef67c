"""The page of a run that goes on, on folders that a small run left: midway, ended and damaged."""

import json
import shutil
import time

import pytest

import fedpress
from fedpress.errors import RunError
from fedpress.reports.live import live
from fedpress.reports.watching import main_html, page_html, write_live
from fedpress.workspace import lock
from fedpress.workspace.presence import NAME, ClientNow, PresenceNow, RefusedNow

RECIPE = """
name = "tiny"
[data]
source = "digits"
num_clients = 3
examples_per_client = 20
validation = 60
[model]
architecture = "cnn"
arguments = { in_channels = 1, image_size = 8 }
[[stage]]
kind = "train"
epochs = 1
[[stage]]
kind = "federate"
num_rounds = 4
batch_size = 10
privacy = { unit = "sample", noise_multiplier = 1.0, delta = 1e-3 }
[[stage]]
kind = "pack"
"""
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """The folder of a run that has ended."""
    place = tmp_path_factory.mktemp("live")
    (place / "tiny.toml").write_text(RECIPE)
    fedpress.run(place / "tiny.toml", out=place / "run", progress=False)
    return place / "run"


@pytest.fixture
def midway(ended, tmp_path):
    """The same folder as it was after round 2."""
    folder = tmp_path / "run"
    shutil.copytree(ended, folder)
    result = json.loads((folder / "result.json").read_text())
    result |= {"stages": result["stages"][:1], "finished": False, "final": None}
    (folder / "result.json").write_text(json.dumps(result))
    lines = (folder / "records.jsonl").read_text().splitlines(keepends=True)
    (folder / "records.jsonl").write_text("".join(lines[:3]))
    (folder / "report.html").unlink()
    return folder


def text_of(table):
    return "\n".join(" | ".join(row) for row in table.rows)


def tiles_of(page):
    return {tile.name: (tile.value, tile.note) for tile in page.tiles}


def test_midway_it_shows_stage_round_metric_epsilon_and_bytes(midway):
    with lock.locked(midway):
        # Its own thread is no other process, which the lock would name.
        stopped = live(midway)
    assert stopped.path == [("train", "done"), ("federate", "now"), ("pack", "later")]
    shown = tiles_of(stopped)
    assert shown["round"][0] == "2 of 4"
    assert "left in federate" in shown["round"][1]
    assert shown["validation accuracy"][0].endswith("%")
    assert float(shown["privacy spent, ε"][0]) > 1
    assert "up" in shown["bytes sent"][1]
    assert "round 2 of 4" in text_of(stopped.stages)
    assert {figure.title.partition(":")[0] for figure in stopped.figures} == {
        "Accuracy and privacy spent",
        "Bytes sent",
        "Training",
    }
    assert stopped.report == ""
    assert stopped.notes == []


def test_clients_of_a_simulation_come_from_the_last_round(midway):
    page = live(midway)
    assert [row[0] for row in page.clients.rows] == ["c0", "c1", "c2"]
    assert page.clients.header[1] == "In round 2"


def test_a_run_without_a_process_is_called_stopped_and_one_with_it_at_work(midway, monkeypatch):
    assert live(midway).state == "stopped"
    assert "No process works on this run" in live(midway).said
    monkeypatch.setattr(lock, "holder", lambda folder: "process 1")
    page = live(midway)
    assert page.state == "working"
    assert "came to round 2 of 4" in page.said
    assert "federate | at work" in text_of(page.stages)


def test_the_end_is_shown_with_a_link_to_the_report(ended):
    page = live(ended, report="report")
    assert page.ended
    assert page.said.startswith("The run has ended. A model of")
    assert {look for _, look in page.path} == {"done"}
    assert "test accuracy" in tiles_of(page)
    assert '<a href="report">' in main_html(ended, report="report")
    assert "data-ended" in page_html(ended, served=True)


def test_online_late_and_refusing_clients_are_named(midway, monkeypatch):
    monkeypatch.setattr(lock, "holder", lambda folder: "process 1")
    now = time.time()
    clients = (
        ClientNow("anna", True, heard=now - 3, seconds=1.0),
        ClientNow("bert", True, heard=now - 9, asked=now - 2, awaited=True, seconds=1.0),
        ClientNow("cleo", True, asked=now - 60, awaited=True),
        ClientNow("dora", False, asked=now - 5, awaited=True),
        ClientNow("emil", True, asked=now - 30, awaited=False),
    )
    refused = (RefusedNow("fred", "max_epsilon", "8 is more than 5"),)
    PresenceNow(now, 6, 4, False, clients, refused).write(midway)
    page = live(midway, now=now)
    found = {row[0]: row for row in page.clients.rows}
    assert found["anna"][1:4] == ["online", "not asked", "3.0 s ago"]
    assert found["bert"][2] == "at work for 2.0 s"
    assert found["cleo"][2] == "late: asked 1 min 0 s ago"
    assert found["dora"][1:3] == ["offline", "late: asked 5.0 s ago"]
    assert found["emil"][2].startswith("too late")
    assert page.clients.rows[-1][0] == "and 1 more"
    assert page.refused.rows[0] == ["fred", "policy: max_epsilon", "8 is more than 5"]
    assert tiles_of(page)["clients online"] == ("4", "of 6 that the server knows")
    old = live(midway, now=now + 100)
    assert any(
        "online when the server last looked, 1 min 40 s ago" in line for line in old.about_clients
    )


def test_a_hidden_cohort_is_only_counted(midway):
    now = time.time()
    clients = (ClientNow("anna", True, asked=now - 5, awaited=True),)
    refused = tuple(RefusedNow(name, "max_epsilon", "no") for name in ("fred", "gus"))
    PresenceNow(now, 4, 3, True, clients, refused).write(midway)
    page = live(midway)
    assert page.clients is None
    assert page.refused.rows == [["2 clients", "policy: max_epsilon", "no"]]
    assert any("nobody is named" in line for line in page.about_clients)
    text = main_html(midway)
    assert not any(name in text for name in ("anna", "fred", "gus"))


def test_answers_that_did_not_count_are_told_with_their_reason(midway):
    lines = (midway / "records.jsonl").read_text().splitlines()
    last = json.loads(lines[-1]) | {"refused": {"c1": "late: its answer would have come"}}
    (midway / "records.jsonl").write_text("\n".join([*lines[:-1], json.dumps(last)]) + "\n")
    page = live(midway)
    assert page.clients.rows[0] == ["c1", "its answer did not count"]
    assert page.refused.rows == [["c1", "federate: 1 refused", "late: its answer would have come"]]


@pytest.mark.parametrize("name", ["records.jsonl", "result.json", "settings.json", NAME])
@pytest.mark.parametrize("text", ["", "{", "[1]", '{"a"', "\x00\xff", "[" * 5000, '{"stages": 3}'])
def test_damaged_and_half_written_files_are_no_error(midway, name, text):
    (midway / name).write_text(text + "\n", "latin-1")
    assert "fedpress watch" in page_html(midway, served=True)


@pytest.mark.recipe
@pytest.mark.parametrize("value", ['"x"', "[]", "{}", "null", "1e400", "-1", "true"])
def test_wrong_values_in_records_and_result_are_no_error(midway, value):
    text = (midway / "records.jsonl").read_text()
    record = json.loads(text.splitlines()[-1])
    for key in record:
        changed = json.dumps(record | {key: "HERE"}).replace('"HERE"', value)
        (midway / "records.jsonl").write_text(text + changed + "\n")
        assert main_html(midway)
    result = json.loads((midway / "result.json").read_text())
    for finished in (False, True):
        for key in ("stages", "recipe", "seconds"):
            page = json.dumps(result | {"finished": finished, key: "HERE"})
            (midway / "result.json").write_text(page.replace('"HERE"', value))
            assert main_html(midway)


def test_a_line_that_is_being_written_is_left_out_and_a_damaged_one_is_told(midway):
    before = (midway / "records.jsonl").read_text()
    (midway / "records.jsonl").write_text(before + '{"stage": 1, "round": 3')
    assert live(midway).notes == []
    assert tiles_of(live(midway))["round"][0] == "2 of 4"
    (midway / "records.jsonl").write_text("damage\n" + before)
    assert live(midway).notes == ["records.jsonl: 1 line is damaged and left out."]


def test_a_folder_that_is_gone_is_told(midway):
    shutil.rmtree(midway)
    assert "not there any more" in live(midway).notes[-1]


def test_text_from_the_folder_is_escaped(midway):
    settings = json.loads((midway / "settings.json").read_text())
    (midway / "settings.json").write_text(json.dumps(settings | {"name": HOSTILE}))
    (midway / "result.json").unlink()
    refused = (RefusedNow(HOSTILE, HOSTILE, HOSTILE),)
    PresenceNow(1.0, 1, 1, False, (ClientNow(HOSTILE, True),), refused).write(midway)
    text = page_html(midway, served=True)
    assert HOSTILE not in text
    assert "<img" not in text
    assert text.count("<script>") == 2


def test_a_page_that_is_written_once_asks_for_no_news(midway, ended, tmp_path):
    text = write_live(midway, tmp_path / "deep" / "page.html").read_text("utf-8")
    assert "fetch(" not in text
    assert 'http-equiv="refresh"' not in text
    assert "connect-src" not in text
    assert 'href="' not in text
    link = write_live(ended, ended.parent / "page.html").read_text("utf-8")
    assert '<a href="run/report.html">' in link


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(RunError, match="no run has begun in this folder; give the folder that"):
        write_live(tmp_path, tmp_path / "page.html")
