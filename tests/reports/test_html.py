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
from fedpress.reports import html
from fedpress.reports.html import write_report

HOSTILE = """</script><script>alert(1)</script><img src=x onerror="alert(2)">'"&{{ 7*7 }}<!--"""


PLAIN_TAGS = re.compile(
    "html|head|meta|title|style|body|main|header|footer|section|p|h[123]|span|code|pre|strong|ul|li|div|d[ldt]"
    "|table|thead|tbody|t[rhd]|figure|figcaption|details|summary|svg|desc|text|path|circle|rect|script"
)
ONE_PICTURE = """[...document.querySelectorAll('.plot')].every(plot =>
  [...plot.querySelectorAll('svg')].filter(one => one.getBoundingClientRect().width > 200).length === 1)"""
POINT_AT_A_MARK = """(() => {
  const shown = [...document.querySelectorAll('svg[data-together]')].find(one => one.getBoundingClientRect().width);
  shown.scrollIntoView();
  const box = shown.querySelector('.mark').getBoundingClientRect();
  const place = { clientX: box.x + 2, clientY: box.y + 2, bubbles: true };
  shown.dispatchEvent(new PointerEvent('pointerenter', place));
  shown.dispatchEvent(new PointerEvent('pointermove', place));
})()"""


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
        "in onnxruntime; in torch 4.6 ms, 34.8% of 13.2 ms",
        "Latencies compare within one runtime only: ",
        "7.90",
        "at δ = 1e-5",
    ]
    words = [
        "Every private example is protected",
        "Must be trusted",
        "Not protected",
        "Channels kept: prune",
    ]
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


def test_the_policy_allows_the_script_of_the_page_and_no_other(tmp_path):
    page = draw(write_run(tmp_path / "x"))
    policy = next(
        a["content"]
        for t, a in page.tags
        if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    digests = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in page.scripts]
    assert re.findall(r"'sha256-([^']+)'", policy) == digests
    assert len(digests) == 1


@pytest.mark.recipe
def test_a_large_run_stays_below_a_megabyte(tmp_path):
    folder = write_run(tmp_path / "x", clients=30, private=False)
    layers = [{"name": f"block.{i}.conv", "before": 512, "after": 100 + i} for i in range(150)]
    records = [
        *train(0, "train", 1000, 0.94),
        {**prune(1), "layers": layers},
        *train(2, "fine-tune", 1000, 0.94),
    ]
    records += federate(3, CLIENTS, False, rounds=3000)
    for at in range(60):
        points = [
            {"layer": f"block.{at}", "density": d / 10, "accuracy": 0.9 - 0.1 / d}
            for d in range(1, 11)
        ]
        records += [
            {"stage": 1, "kind": "prune", "name": "prune", "sensitivity": point} for point in points
        ]
    (folder / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    whole = result("x", CLIENTS, False)
    whole["stages"][3]["client_accuracy"] = {f"client-{i}": i / 500 for i in range(500)}
    write_json(folder / "result.json", whole)
    assert write_report(folder).stat().st_size < 1_000_000
    assert write_report(write_run(tmp_path / "y")).stat().st_size < 200_000


def test_figures_have_names_and_numbers_for_those_who_cannot_see_them(tmp_path):
    page = draw(write_run(tmp_path / "x"))
    ids = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    pictures = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(pictures) > 7
    for picture in pictures:
        assert picture["role"] == "img"
        assert set(picture["aria-labelledby"].split()) <= ids
    assert " ".join(page.texts).count("Numbers") == 7
    regions = [
        attributes["aria-label"]
        for _, attributes in page.tags
        if attributes.get("role") == "region"
    ]
    assert all(regions)
    assert len(set(regions)) == len(regions)


def luminance(color):
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one, other):
    """The contrast ratio of WCAG 2.2, section 1.4.3."""
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_words_have_contrast_enough_in_both_themes():
    style = (Path(html.__file__).parent / "page.css").read_text()
    light, dark = (
        dict(re.findall(r"--(\w+): (#\w{6})", block)) for block in style.split(":root {")[1:3]
    )
    for colors in (light, dark):
        for word in ("text", "muted", "blue", "orange", "green", "red"):
            assert contrast(colors[word], colors["card"]) >= 4.5, word


def test_hostile_names_stay_text(tmp_path):
    folder = write_run(tmp_path / "x", name=HOSTILE, client=HOSTILE, clients=3)
    stages = [{**stage, "name": HOSTILE} for stage in result(HOSTILE, CLIENTS, True)["stages"]]
    write_json(
        folder / "result.json",
        {**result(HOSTILE, CLIENTS, True), "stages": stages, "seed": HOSTILE},
    )
    write_json(
        folder / "environment.json", {HOSTILE: HOSTILE, "command": HOSTILE, "commit": HOSTILE}
    )
    write_json(folder / "ledger.json", {"charges": [{"who": HOSTILE, "what": HOSTILE}]})
    page = draw(folder)
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert not any(tag == "img" or "onerror" in attributes for tag, attributes in page.tags)
    assert any(HOSTILE in text for text in page.texts)
    assert all(PLAIN_TAGS.fullmatch(tag) for tag, _ in page.tags)


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


def test_the_page_warns_of_a_model_that_guesses(tmp_path):
    folder = write_run(tmp_path / "x")
    warning = "it is no better than always answering '<b>x</b>' (91.0% of the test examples)"
    line = {
        "kind": "train",
        "name": "train",
        "accuracy": 0.91,
        "majority_share": 0.91,
        "balanced_accuracy": 0.5,
    }
    line |= {"auc": 0.4871, "accuracy_warning": warning}
    write_json(folder / "result.json", {"stages": [line], "finished": True, "final": line})
    text = " ".join(draw(folder).texts)
    assert f"accuracy: {warning}." in text
    assert "What the accuracy is worth" in text
    assert "0.487" in text
    mended = line | {"accuracy_warning": None}
    write_json(
        folder / "result.json", {"stages": [line, mended], "finished": True, "final": mended}
    )
    assert "no better than" not in " ".join(draw(folder).texts)


def test_a_stage_of_unknown_kind_is_no_reason_to_fail(tmp_path):
    folder = write_run(tmp_path / "x")
    whole = result("x", CLIENTS, True)
    write_json(
        folder / "result.json",
        {**whole, "stages": [*whole["stages"], {"kind": "teleport", "accuracy": 0.9}]},
    )
    with (folder / "records.jsonl").open("a") as file:
        file.write(
            json.dumps({"stage": 9, "kind": "teleport", "layers": 3, "clients": None}) + "\n"
        )
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
    with pytest.raises(RunError, match=r"page\.html: cannot be written"):
        write_report(folder, tmp_path / "page.html")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["page.html", "x"]


@pytest.mark.deploy
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_a_browser_draws_every_plot_without_overflow_errors_or_requests(tmp_path):
    drawn = write_report(write_run(tmp_path / "x"))
    hostile = write_report(
        write_run(
            tmp_path / "y", name=HOSTILE + "x" * 300, client=HOSTILE + "y" * 90, private=False
        )
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
            assert page.ask(ONE_PICTURE)
            page.ask(POINT_AT_A_MARK)
            assert "epoch 1: accuracy" in page.ask("document.querySelector('.tip').textContent")
            told = [event["method"] for event in page.events]
            assert told.count("Network.requestWillBeSent") == 1  # the page itself
            assert not {"Log.entryAdded", "Runtime.exceptionThrown"} & set(told)
