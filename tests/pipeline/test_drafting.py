"""`fedpress init` writes a recipe that is checked and run at once, for each kind of data."""

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fedpress
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
        ("empty", {}, "has no images in the folders client/label"),
        ("mydata:1", {}, "got 'mydata:1'; give a file, a folder, or module:function"),
    ],
)
def test_what_cannot_be_drafted_is_told_with_a_cure(tmp_path, monkeypatch, data, flags, said):
    visits(tmp_path / "visits.csv")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FedpressError, match=said):
        draft(data, folder=tmp_path, **flags)
