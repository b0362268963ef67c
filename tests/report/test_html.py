from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from browser import CHROMIUM, chromium
from folders import CLIENTS, federate, prune, result, train, write_json, write_run

from fedpress.errors import RunError
from fedpress.report import write_report

HOSTILE = """</script><script>alert(1)</script><img src=x onerror="alert(2)">'"&{{ 7*7 }}<!--"""


class Tags(HTMLParser):
    """Collects tags, attributes, texts and scripts of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self.inside: str = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.inside = tag
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside == "script":
            self.scripts[-1] += data
        else:
            self.texts.append(data)


def draw(folder: Path) -> Tags:
    return Tags(write_report(folder).read_text(encoding="utf-8"))


def test_the_page_holds_headline_table_words_and_figures(tmp_path):
    page = draw(write_run(tmp_path / "x"))
    text = " ".join(" ".join(page.texts).split())
    headline = [
        "cifar10-cpu",
        "93.12%",
        "3.35 M",
        "30.0% of 11.2 M",
        "13.5 MB",
        "2.1 ms",
        "15.9% of 13.2 ms in torch",
        "7.90",
        "at δ = 1e-5",
    ]
    words = ["Every private example is protected", "Must be trusted", "Not protected", "Channels kept: prune"]
    made = [
        "fedpress run cifar10-cpu --data data --out runs/x",
        "commit b7e1e51c0f",
        "seed 1",
        "stage.0.epochs",
        "10 clients",
    ]
    for expected in headline + words + made:
        assert expected in text
    assert [tag for tag, _ in page.tags].count("figcaption") == 7
    assert "This run has not ended" not in text


def test_the_page_loads_nothing(tmp_path):
    page = draw(write_run(tmp_path / "x"))
    for tag, attributes in page.tags:
        assert tag not in ("link", "img", "iframe", "base", "object", "embed")
        assert not {"src", "href", "srcset", "action", "background"} & set(attributes)
    style = next(text for text in page.texts if ":root" in text)
    assert "url(" not in style
    assert "@import" not in style


def test_the_policy_allows_the_two_scripts_of_the_page_and_no_other(tmp_path):
    page = draw(write_run(tmp_path / "x"))
    policy = next(
        a["content"] for t, a in page.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    digests = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in page.scripts[1:]]
    assert re.findall(r"'sha256-([^']+)'", policy) == digests
    assert len(digests) == 2


def test_hostile_names_stay_text(tmp_path):
    folder = write_run(tmp_path / "x", name=HOSTILE, client=HOSTILE, clients=3)
    stages = [{**stage, "name": HOSTILE} for stage in result(HOSTILE, CLIENTS, True)["stages"]]
    write_json(folder / "result.json", {**result(HOSTILE, CLIENTS, True), "stages": stages, "seed": HOSTILE})
    write_json(folder / "environment.json", {HOSTILE: HOSTILE, "command": HOSTILE, "commit": HOSTILE})
    write_json(folder / "ledger.json", {"charges": [{"who": HOSTILE, "what": HOSTILE}]})
    page = draw(folder)
    assert [tag for tag, _ in page.tags].count("script") == 3
    assert not any(tag == "img" or "onerror" in attributes for tag, attributes in page.tags)
    assert any(HOSTILE in text for text in page.texts)
    figures = json.loads(page.scripts[0])
    assert any(HOSTILE in figure["caption"] for figure in figures)


@pytest.mark.parametrize(
    ("records", "far"),
    [
        ([], None),
        (train(0, "train", 7, 0.94)[:3], "epoch 3 of 7"),
        ([*train(0, "train", 7, 0.94), prune(1), *federate(3, CLIENTS, True)[:5]], "round 5 of 20"),
    ],
)
def test_an_unfinished_run_is_drawn_as_far_as_it_came(tmp_path, records, far):
    folder = write_run(tmp_path / "x")
    (folder / "result.json").unlink()
    (folder / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    text = " ".join(draw(folder).texts)
    assert "This run has not ended" in text
    assert far is None or far in text


def test_a_run_with_some_stages_measured_shows_them_and_says_that_it_has_not_ended(tmp_path):
    folder = write_run(tmp_path / "x")
    whole = result("x", CLIENTS, True)
    stages = [*whole["stages"][:1], {**whole["stages"][1], "stopped": "no better for 3 rounds"}]
    write_json(folder / "result.json", {"stages": stages, "finished": False, "final": stages[-1]})
    text = " ".join(draw(folder).texts)
    assert "This run has not ended" in text
    assert "74.31% (-19.54)" in text
    assert "prune stopped early: no better for 3 rounds." in text


def test_a_stage_of_unknown_kind_is_no_reason_to_fail(tmp_path):
    folder = write_run(tmp_path / "x")
    whole = result("x", CLIENTS, True)
    write_json(folder / "result.json", {**whole, "stages": [*whole["stages"], {"kind": "teleport", "accuracy": 0.9}]})
    with (folder / "records.jsonl").open("a") as file:
        file.write(json.dumps({"stage": 9, "kind": "teleport", "layers": 3, "clients": None}) + "\n")
    assert "teleport" in " ".join(draw(folder).texts)


def test_the_smallest_run_has_a_page(tmp_path):
    (tmp_path / "recipe.toml").write_text("name = 'x'")
    assert "This run has not ended" in " ".join(draw(tmp_path).texts)


def test_the_report_replaces_the_old_one_whole_and_leaves_nothing_else(tmp_path):
    folder = write_run(tmp_path / "x")
    before = set(folder.iterdir())
    out = write_report(folder)
    assert write_report(folder) == out == folder / "report.html"
    assert set(folder.iterdir()) - before == {out}
    assert write_report(folder, tmp_path / "new" / "page.html").is_file()


def test_a_report_that_cannot_be_written_says_where_and_leaves_nothing(tmp_path):
    folder = write_run(tmp_path / "x")
    (tmp_path / "page.html").mkdir()
    with pytest.raises(RunError, match=r"page\.html: the report cannot be written"):
        write_report(folder, tmp_path / "page.html")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["page.html", "x"]


@pytest.mark.deploy
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_a_browser_draws_every_plot_without_overflow_errors_or_requests(tmp_path):
    drawn = write_report(write_run(tmp_path / "x"))
    hostile = write_report(
        write_run(tmp_path / "y", name=HOSTILE + "x" * 300, client=HOSTILE + "y" * 90, private=False)
    )
    looks = [
        (drawn, 390, False),
        (drawn, 390, True),
        (drawn, 1280, False),
        (hostile, 320, False),
        (hostile, 1280, True),
    ]
    with chromium(tmp_path / "profile") as page:
        for file, width, dark in looks:
            page.open(file, width=width, dark=dark)
            assert page.ask("[innerWidth, document.documentElement.scrollWidth]") == [width, width]
            assert page.ask("[...document.querySelectorAll('.plot')].every(p => p.querySelector('.main-svg'))")
            told = [event["method"] for event in page.events]
            assert told.count("Network.requestWillBeSent") == 1  # the page itself
            assert not {"Log.entryAdded", "Runtime.exceptionThrown"} & set(told)
