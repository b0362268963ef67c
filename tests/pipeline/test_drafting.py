"""`fedpress init` writes a recipe that is checked and run at once, for each kind of data."""

import json
import random
import sqlite3
import subprocess
import sys
import wave
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fedpress
from fedpress.data.describe import describe_file
from fedpress.errors import FedpressError
from fedpress.pipeline import recipe as recipes
from fedpress.pipeline.drafting import draft


def visits(path, *, gaps=True, unlabelled=False, delimiter=",", decimal="."):
    chance = random.Random(0)
    lines = [["id", "hospital", "age", "job", "when", "cost", "outcome"]]
    for at in range(240):
        age = chance.randint(20, 90)
        lines.append(
            [
                str(at + 1),
                ["north", "south", "west"][at % 3],
                "" if gaps and at % 17 == 0 else str(age),
                chance.choice(["cook", "nurse"]),
                f"2024-01-{at % 28 + 1:02}",
                f"{2 * age + chance.random():.2f}".replace(".", decimal),
                "" if unlabelled and at % 9 == 0 else "ill" if age > 55 else "well",
            ]
        )
    path.write_text("\n".join(delimiter.join(line) for line in lines) + "\n")


def test_the_draft_of_a_table_names_label_client_and_what_is_left_out(tmp_path):
    visits(tmp_path / "visits.csv")
    found = draft(str(tmp_path / "visits.csv"), folder=tmp_path)
    data = recipes.load(found.text).data
    assert data.path == Path("visits.csv")
    assert data.label_column == "outcome"
    assert data.client_column == "hospital"
    assert data.drop_columns == ("id",)
    assert data.types == {"when": "date"}
    assert data.missing == "mean"
    assert data.classes == ("ill", "well")
    assert found.chosen[:3] == ("label: outcome", "client: hospital", "task: classification")


@pytest.mark.recipe
@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        ({"label": "cost"}, {"task": "regression", "client_column": "hospital"}),
        ({"client": ""}, {"client_column": None, "num_clients": 10}),
        ({"client": "job", "task": "classification"}, {"client_column": "job"}),
    ],
)
def test_flags_are_taken_and_the_recipe_is_checked(tmp_path, flags, wanted):
    visits(tmp_path / "visits.csv")
    found = draft(str(tmp_path / "visits.csv"), folder=tmp_path, **flags)
    (tmp_path / "r.toml").write_text(found.text)
    data = recipes.load(found.text).data
    assert {key: getattr(data, key) for key in wanted} == wanted
    assert [stage["kind"] for stage in fedpress.check(tmp_path / "r.toml")["stages"]][:2] == [
        "train",
        "federate",
    ]


def trial(path):
    rows = [f"{at % 7},{at % 30 + 1},{at % 2}" for at in range(60)]
    path.write_text("\n".join(["stage,months,died", *rows]) + "\n")


def test_a_survival_has_the_time_and_the_event_as_labels(tmp_path):
    trial(tmp_path / "t.csv")
    found = draft(str(tmp_path / "t.csv"), label="months, died", task="survival", folder=tmp_path)
    data = recipes.load(found.text).data
    assert data.label_column == ("months", "died")
    assert data.task == "survival"


def test_a_survival_without_its_time_is_refused_by_the_flag_that_cures(tmp_path):
    trial(tmp_path / "t.csv")
    with pytest.raises(FedpressError, match=r"needs a time and an event, got died.*months,died"):
        draft(str(tmp_path / "t.csv"), label="died", task="survival", folder=tmp_path)


@pytest.mark.recipe
@pytest.mark.parametrize(
    "how",
    [
        {"unlabelled": True},
        {"delimiter": ";"},
        {"delimiter": ";", "decimal": ","},
        {"gaps": False},
    ],
)
def test_tables_with_gaps_and_other_marks_are_checked(tmp_path, how):
    visits(tmp_path / "visits.csv", **how)
    (tmp_path / "r.toml").write_text(draft(str(tmp_path / "visits.csv"), folder=tmp_path).text)
    fedpress.check(tmp_path / "r.toml")


@pytest.mark.recipe
def test_from_a_file_to_predictions_in_four_commands(tmp_path, shell):
    visits(tmp_path / "visits.csv")
    said = shell("init", "--data", "visits.csv", "--yes")
    assert said.out.endswith("next: fedpress check recipe.toml, then: fedpress run recipe.toml\n")
    assert shell("check", "recipe.toml").code == 0
    assert shell("run", "recipe.toml", "--out", "run").code == 0
    said = shell("predict", "run", "visits.csv", "--out", "answers.csv")
    assert said.code == 0
    answers = (tmp_path / "answers.csv").read_text().splitlines()
    truth = (tmp_path / "visits.csv").read_text().splitlines()
    right = [
        a.split(",")[0] == t.split(",")[-1] for a, t in zip(answers[1:], truth[1:], strict=True)
    ]
    assert np.mean(right) > 0.8
    spec = json.loads((tmp_path / "run" / "stages" / "0-train" / "spec.json").read_text())
    # age, cost, and two words
    assert spec["arguments"] == {"in_features": 9, "num_classes": 2}


def hourly(path, stations=("north", "south"), hours=400, *, step="h", missing=True):
    """Writes a table of hourly values; each is near the one before."""
    chance = np.random.default_rng(0)
    lines = ["No,when,station,PM2.5,TEMP,wind"]
    for station in stations:
        level = 50.0
        for hour in range(hours):
            level = 0.95 * level + 2.5 + chance.normal(0, 3)
            when = np.datetime64("2024-01-01T00", "s") + np.timedelta64(hour, step)
            warm = "" if missing and hour % 97 == 5 else f"{chance.normal(10, 5):.2f}"
            cells = [len(lines), when, station, f"{level:.3f}", warm, chance.choice(["N", "S"])]
            lines.append(",".join(map(str, cells)))
    path.write_text("\n".join(lines) + "\n")


def test_hourly_rows_of_stations_become_a_forecast(tmp_path):
    hourly(tmp_path / "air.csv", hours=2000)
    found = draft(str(tmp_path / "air.csv"), folder=tmp_path)
    data = recipes.load(found.text).data
    assert (data.label_column, data.client_column, data.task) == ("PM2.5", "station", "forecast")
    assert (data.drop_columns, data.missing) == (("No",), "mean")
    assert data.series.window == 24
    assert data.series.horizon == (1, 6, 24)
    assert data.series.order_column == "when"
    assert data.series.max_gap == 5400
    assert data.series.calendar == ("hour", "weekday")
    assert found.chosen[:3] == ("label: PM2.5", "client: station", "task: forecast")


def test_a_number_with_a_new_value_in_each_row_is_a_candidate_for_the_label(tmp_path):
    hourly(tmp_path / "air.csv")
    found = describe_file(tmp_path / "air.csv")
    assert found.labels == ("PM2.5", "TEMP", "wind")
    assert (found.series.by, found.series.step, found.series.rows) == ("station", 3600, 400)
    # A label of words is no forecast.
    text = draft(str(tmp_path / "air.csv"), folder=tmp_path, label="wind").text
    assert recipes.load(text).data.series is None


@pytest.mark.parametrize(
    ("hours", "step", "window", "horizon"),
    [(2000, "D", 14, (1, 7)), (100, "h", 2, (1,)), (5000, "s", 50, (1, 10))],
)
def test_windows_follow_from_step_and_length(tmp_path, hours, step, window, horizon):
    hourly(tmp_path / "air.csv", hours=hours, step=step)
    series = recipes.load(draft(str(tmp_path / "air.csv"), folder=tmp_path).text).data.series
    assert (series.window, series.horizon) == (window, horizon)


def test_rows_at_irregular_times_or_twice_at_one_time_are_no_series(tmp_path):
    hourly(tmp_path / "air.csv", ("north",))
    lines = (tmp_path / "air.csv").read_text().splitlines()
    (tmp_path / "air.csv").write_text("\n".join([*lines, lines[9]]) + "\n")
    assert describe_file(tmp_path / "air.csv").series is None
    chance = random.Random(0)
    (tmp_path / "air.csv").write_text("\n".join([lines[0], *chance.sample(lines[1:], 90)]) + "\n")
    assert describe_file(tmp_path / "air.csv").series is None


def tones(folder):
    chance = np.random.default_rng(0)
    for client in ("anna", "ben"):
        for label, pitch in (("low", 300), ("high", 900)):
            (folder / client / label).mkdir(parents=True)
            for at in range(15):
                sound = 0.3 * np.sin(2 * np.pi * pitch * np.arange(4000) / 8000)
                sound += chance.normal(0, 0.05, 4000)
                with wave.open(str(folder / client / label / f"{at}.wav"), "wb") as file:
                    file.setparams((1, 2, 8000, 0, "NONE", ""))
                    file.writeframes((sound * 32767).astype("<i2").tobytes())


def plays(folder):
    folder.mkdir()
    chance = random.Random(0)
    for author in ("anna", "ben"):
        lines = [f"{chance.choice(['a king', 'a fool'])} sings." for _ in range(150)]
        (folder / f"{author}.txt").write_text("\n".join(lines))


def play(file):
    speeches = [f"{'ABC'[at % 3]}NN:\nsings a song of {at % 7}.\n" for at in range(120)]
    file.write_text("\n".join(speeches))


def waves(file):
    x = np.random.default_rng(0).normal(size=(240, 6)).astype(np.float32)
    y = np.where(x[:, 0] > 0, "up", "down")
    np.savez(file, x=x, y=y, client=np.array(["a", "b", "c"])[np.arange(240) % 3])


def loans(file):
    chance = random.Random(0)
    with sqlite3.connect(file) as database:
        database.execute("create table notes (text text)")
        database.execute("create table loans (bank text, income real, paid text)")
        for at in range(240):
            income = chance.random()
            row = ("abc"[at % 3], income, "yes" if income > 0.5 else "no")
            database.execute("insert into loans values (?, ?, ?)", row)
    database.close()


def parquet(file):
    import pyarrow.csv
    import pyarrow.parquet

    visits(file.with_suffix(".csv"))
    table = pyarrow.csv.read_csv(file.with_suffix(".csv"))
    pyarrow.parquet.write_table(table, file)


@pytest.mark.recipe
@pytest.mark.parametrize(
    ("name", "make", "said"),
    [
        ("air.csv", hourly, "task: forecast"),
        ("one.csv", lambda path: hourly(path, ("north",)), "all rows are one client's"),
        ("visits.parquet", parquet, "task: classification"),
        ("tones", tones, "60 recordings of 2 clients, 0.5 s at 8,000 Hz"),
        ("plays", plays, "plays_net.py: a small network, yours"),
        ("play.txt", play, "the clients are the speakers of the play"),
        ("waves.npz", waves, "240 examples of 3 clients, task: classification"),
        ("loans.db", loans, "table: loans, the largest; the others are notes"),
    ],
)
def test_a_draft_is_checked_and_run_unchanged(tmp_path, shell, name, make, said):
    make(tmp_path / name)
    done = shell("init", "--data", name, "--yes")
    assert (done.code, said in done.out) == (0, True), done.err
    done = shell("check", "recipe.toml")
    assert done.code == 0, done.err
    done = shell("run", "recipe.toml", "--out", "run")
    assert done.code == 0, done.err
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["finished"]


@pytest.mark.recipe
def test_a_folder_of_images_is_run(tmp_path, shell):
    chance = np.random.default_rng(0)
    for client in ("open", "north"):
        for label, most in (("bright", 255), ("dark", 100)):
            (tmp_path / "photos" / client / label).mkdir(parents=True)
            for at in range(20):
                pixels = chance.integers(most - 60, most, (16, 16, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / "photos" / client / label / f"{at}.png")
    assert shell("init", "--data", "photos", "--out", "photos.toml").code == 0
    assert shell("run", "photos.toml", "--out", "run").code == 0
    spec = json.loads((tmp_path / "run" / "stages" / "0-train" / "spec.json").read_text())
    assert spec["arguments"] == {"image_size": 16, "num_classes": 2}


@pytest.mark.recipe
def test_a_function_gets_a_stub_and_a_test_and_both_work_at_once(tmp_path, shell):
    assert shell("init", "--data", "mydata:load", "--out", "mine.toml").code == 0
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_mydata.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert shell("run", "mine.toml", "--out", "run").code == 0
    # A stub is never written over what the user made of it.
    (tmp_path / "mine.toml").unlink()
    said = shell("init", "--data", "mydata:load", "--out", "mine.toml")
    assert (said.code, "mydata.py: this file exists" in said.err) == (2, True)


@pytest.mark.parametrize(
    ("data", "flags", "said"),
    [
        ("visit.csv", {}, r"no such path .*did you mean 'visits\.csv'"),
        ("visits.csv", {"label": "outcom"}, "no column 'outcom'; did you mean 'outcome'"),
        ("visits.csv", {"client": "hospitl"}, "no column 'hospitl'; did you mean 'hospital'"),
        ("visits.csv", {"task": "clasification"}, "no task 'clasification'"),
        ("visits.csv", {"task": "forecast"}, "its rows are no series at regular times"),
        ("empty", {}, "has no images or recordings in folders client/label, no texts"),
        ("mydata:1", {}, "got 'mydata:1'; give a file, a folder, or module:function"),
    ],
)
def test_what_cannot_be_drafted_is_told_with_a_cure(tmp_path, monkeypatch, data, flags, said):
    visits(tmp_path / "visits.csv")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FedpressError, match=said):
        draft(data, folder=tmp_path, **flags)
