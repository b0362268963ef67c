"""The statistics stage in a run: noise, charges, kills, bad input, and what it is good for."""

from __future__ import annotations

import json
import math
from itertools import count

import pytest
from scipy import stats

import fedpress
from fedpress.core.examples import MISSING
from fedpress.data.preparation import Preparation
from fedpress.errors import FedpressError, RecipeError
from fedpress.pipeline import recipe as recipes
from fedpress.pipeline.check import check_recipe
from fedpress.pipeline.start import load_data
from fedpress.privacy.accounting import accountant
from fedpress.privacy.ledger import Ledger
from tests.harness import finish
from tests.stages.statistics.hospitals import FIRST, TRAINING, written
from tests.stages.statistics.noise import noise_of

TRUSTS = [
    (unit, trust) for unit in ("sample", "client") for trust in ("local", "distributed", "central")
]


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> str:
    return written(tmp_path_factory.mktemp("data") / "clients")


@pytest.fixture(scope="module")
def whole(table, tmp_path_factory):
    """A run that nobody stopped."""
    path = tmp_path_factory.mktemp("runs") / "whole"
    finish(table + FIRST + TRAINING, path)
    return path


@pytest.mark.recipe
def test_the_statistics_reach_inputs_model_and_preparation(whole):
    line = json.loads((whole / "result.json").read_text())["stages"][0]
    about = Preparation.read(whole / "preparation.json")
    assert about.mean[:2] == (line["columns"]["age"]["mean"], line["columns"]["income"]["mean"])
    assert about.columns[0].fill == (about.mean[0],)
    assert list(about.columns[2].words) == line["words"]["job"]
    assert len(about.columns[2].words) == 2
    for stage in ("0-statistics", "1-federate"):
        spec = json.loads((whole / "stages" / stage / "spec.json").read_text())
        spec = spec.get("spec", spec)
        assert spec["preparation"] == about.to_json()
        assert tuple(spec["mean"]) == about.mean


@pytest.mark.recipe
def test_epsilon_is_that_of_query_and_training_together(whole):
    first, second = json.loads((whole / "result.json").read_text())["stages"]
    ledger = Ledger.from_json((whole / "ledger.json").read_text())
    assert {entry.what for entry in ledger.entries} == {"statistics", "federate"}
    assert first["epsilon"] == pytest.approx(2.0)
    spent = max(
        accountant.epsilon(
            [entry.event for entry in ledger.entries if entry.who == name], delta=1e-3
        )
        for name in ("c0", "c1", "c2")
    )
    assert second["epsilon"] == pytest.approx(spent, rel=1e-3)
    assert 5.7 < second["epsilon"] <= 6.0


@pytest.mark.recipe
def test_a_training_budget_that_the_query_has_spent_is_refused(table):
    text = table + FIRST + TRAINING.replace("epsilon = 6.0", "epsilon = 2.0")
    recipe = recipes.load(text)
    with pytest.raises(FedpressError, match=r"ledger: federate would bring epsilon to"):
        check_recipe(recipe, load_data(recipe))


class Killed(BaseException):
    """The end of the process."""


@pytest.mark.recipe
@pytest.mark.parametrize("place", ["before the round", "after the round", "in the next stage"])
def test_a_run_that_was_killed_charges_the_query_once_and_draws_the_same_noise(
    table, tmp_path, whole, place, monkeypatch
):
    path = tmp_path / "run"
    calls = count()
    stage = "fedpress.stages.federate.rounds.FederatedRounds"
    method = {"before the round": "_charged", "after the round": "_warnings"}.get(place, "_charged")
    fatal = 1 if place == "in the next stage" else 0

    def dying(self, *args, **how):
        if next(calls) == fatal:
            raise Killed
        return real(self, *args, **how)

    with monkeypatch.context() as patch:
        from fedpress.stages.federate.rounds import FederatedRounds

        real = getattr(FederatedRounds, method)
        patch.setattr(f"{stage}.{method}", dying)
        with pytest.raises(Killed):
            finish(table + FIRST + TRAINING, path)
    found = finish(table + FIRST + TRAINING, path, resume=True)
    expected = json.loads((whole / "result.json").read_text())
    assert found["stages"][0]["columns"] == expected["stages"][0]["columns"]
    assert (path / "ledger.json").read_text() == (whole / "ledger.json").read_text()
    assert (path / "preparation.json").read_text() == (whole / "preparation.json").read_text()
    kept = [folder / "stages/1-federate/model.safetensors" for folder in (path, whole)]
    assert kept[0].read_bytes() == kept[1].read_bytes()


@pytest.mark.recipe
@pytest.mark.parametrize(("unit", "trust"), TRUSTS)
def test_the_noise_has_the_planned_standard_deviation(table, unit, trust):
    drawn = noise_of(table + FIRST, unit, trust, seeds=30)
    # At least 330 values; the sums of a row are noised independently.
    assert stats.kstest(drawn, "norm").pvalue > 1e-3
    assert math.sqrt(sum(one**2 for one in drawn) / len(drawn)) == pytest.approx(1, abs=0.15)


@pytest.mark.recipe
@pytest.mark.parametrize(("unit", "trust"), TRUSTS)
def test_every_trust_makes_statistics_within_its_budget(table, tmp_path, unit, trust):
    text = table + FIRST.replace('"sample"', f'"{unit}", trust = "{trust}"')
    found = finish(text, tmp_path / "run")["stages"][0]
    assert found["trust"] == trust
    assert 1.9 < found["epsilon"] <= 2.0 * (1 + 1e-9)
    assert set(found["columns"]) == {"age", "income"}
    # Nobody learns how many rows a protected client has, or which rows lack a value.
    shown = (tmp_path / "run" / "records.jsonl").read_text()
    if unit == "client":
        assert "examples" not in shown


BAD = {
    "no bounds": (
        {"stage.0.bounds": "{ age = [0, 110] }"},
        r"recipe.stage\[0\].bounds: 'income' have no bounds, and bounds from private rows would "
        r"tell about them; give what is known without the rows, such as { income = \[0, 100\] }",
    ),
    "low above high": (
        {"stage.0.bounds.age": "[110, 0]"},
        r"recipe.stage\[0\].bounds.age: got \[110, 0\], but the lower bound .*; write \[0, 110\]",
    ),
    "equal bounds": (
        {"stage.0.bounds.age": "[5, 5]"},
        r"recipe.stage\[0\].bounds.age: got \[5, 5\], .*; raise the second number",
    ),
    "bounds of words": (
        {"stage.0.bounds.job": "[0, 1]"},
        r"recipe.stage\[0\].bounds.job: this column holds words, not numbers; leave it out of "
        r"bounds; name it in words",
    ),
    "words of numbers": (
        {"stage.0.words.age": "3"},
        r"recipe.stage\[0\].words.age: this column holds numbers, not words",
    ),
    "an unknown column": (
        {"stage.0.bounds.ago": "[0, 1]"},
        r"recipe.stage\[0\].bounds.ago: the data have no feature column .*; did you mean 'age'",
    ),
    "epsilon 0": (
        {"stage.0.privacy.epsilon": "0"},
        r"recipe.stage\[0\].privacy.epsilon: .*greater than 0",
    ),
    "infinite bounds": (
        {"stage.0.bounds.age": "[0, inf]"},
        r"recipe.stage\[0\].bounds.age\[1\]: .*finite",
    ),
    "dropped words": (
        {"data.unknown": "drop"},
        r"recipe.stage\[0\].words.job: with data.unknown = \"drop\" a row with a rare word",
    ),
    "public statistics": (
        {"data.statistics": "public", "data.missing": "drop"},
        r"recipe.stage\[0\]: the data take their statistics from public rows; set "
        r"recipe.data.statistics = \"private\"",
    ),
    "a mean of the recipe": (
        {"data.mean": "[0.0]", "data.std": "[1.0]"},
        r"recipe.data.statistics: mean is given, too",
    ),
    "a source without columns": (
        {"data.source": "digits"},
        r"recipe.data.statistics: private statistics are for columns of a table, and 'digits' is",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_told_by_key_with_a_cure(table, case):
    overrides, words = BAD[case]

    def checked() -> None:
        recipe = recipes.load(table + FIRST, [f"{key}={value}" for key, value in overrides.items()])
        check_recipe(recipe, load_data(recipe))

    with pytest.raises(FedpressError, match=words):
        checked()


def test_the_stage_must_be_there_and_be_the_first(table):
    with pytest.raises(RecipeError, match=r"recipe.data.statistics: no stage makes private stat"):
        recipes.load(table + TRAINING)
    with pytest.raises(RecipeError, match=r"recipe.stage\[1\]: .*; make it the first stage"):
        recipes.load(table + TRAINING + FIRST)


def test_a_budget_that_cannot_bear_its_columns_is_a_warning_of_the_check(table):
    recipe = recipes.load(table + FIRST, ["stage.0.privacy.epsilon=0.01"])
    [facts] = check_recipe(recipe, load_data(recipe))
    assert facts["warning"].startswith("the noise moves the mean of 'age', 'income' by more than")


def test_before_the_query_no_statistic_of_private_rows_is_in_the_data(table):
    data = load_data(recipes.load(table + FIRST))
    assert data.preprocess.mean == ()
    assert data.preparation.columns[0].fill == (MISSING,)


@pytest.mark.recipe
def test_later_commands_prepare_rows_by_the_statistics_of_the_run(whole, tmp_path):
    last = json.loads((whole / "result.json").read_text())["final"]
    assert fedpress.evaluate(whole)["accuracy"] == pytest.approx(last["accuracy"])
    fedpress.pack(whole, out=tmp_path / "small")
    files = [folder / "preparation.json" for folder in (whole, tmp_path / "small")]
    first, second = (Preparation.read(file) for file in files)
    assert first == second


def separable(folder) -> str:
    """Returns the recipe of a training in which only the scale of the columns is hard."""
    return written(folder, clients=4, n=300).replace("{ hidden = [8] }", "{ hidden = [16] }")


@pytest.mark.recipe
def test_training_is_better_with_private_statistics_than_without_any(tmp_path):
    text = separable(tmp_path / "clients")
    stage = TRAINING.replace("num_rounds = 2", "num_rounds = 10").replace("6.0", "8.0")
    stage += "[stage.server]\nkind = 'average'\n"
    without = text.replace('statistics = "private"', "").replace('"mean"', '"drop"')
    scores = {"with": [], "without": []}
    for seed in range(3):
        for name, recipe in (("with", text + FIRST + stage), ("without", without + stage)):
            found = finish(recipe, tmp_path / f"{name} {seed}", f"seed={seed}")
            scores[name].append(found["final"]["auc"])
    assert min(scores["with"]) > max(scores["without"]), scores
