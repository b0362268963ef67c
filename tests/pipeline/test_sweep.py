"""Sweeps: values are split, combined, run once where equal; the front is that of a brute search."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpress.errors import RecipeError
from fedpress.pipeline import sweep

costs = st.one_of(st.integers(0, 5).map(float), st.floats(allow_nan=True, allow_infinity=True))


def brute(points):
    """Every point that no other beats, by looking at all pairs."""
    sound = [at for at, pair in enumerate(points) if not any(math.isnan(x) for x in pair)]
    return {
        a
        for a in sound
        if not any(
            points[b][0] <= points[a][0] and points[b][1] >= points[a][1] and points[b] != points[a]
            for b in sound
        )
    }


@given(st.lists(st.tuples(costs, costs), max_size=30))
def test_the_front_is_that_of_a_brute_search_by_rising_cost(points):
    found = sweep.pareto(points)
    assert set(found) == brute(points)
    assert len(found) == len(set(found))
    assert [points[at][0] for at in found] == sorted(points[at][0] for at in found)


@given(
    st.lists(
        st.sampled_from(["0.5", "[1, 2]", "{a = 1, b = [2, 3]}", '"x,y"', "'a]'", "l2"]),
        min_size=1,
        max_size=6,
    )
)
def test_values_that_are_joined_by_commas_are_split_again(values):
    assert sweep.split_values(",".join(values)) == values


@pytest.mark.parametrize("text", ["", "1,,2", "[1,2", "1]", '"x'])
def test_lists_that_are_none_are_refused(text):
    with pytest.raises(RecipeError, match="is no list of values"):
        sweep.split_values(text)


def test_variants_are_all_combinations_named_by_what_moves():
    found = sweep.variants(
        ["stage.1.keep_params=0.5,0.3", "stage.q.bits=8", "stage.0.lr=1,2"], seeds=(0, 1)
    )
    assert len(found) == len({v.name for v in found}) == 8
    assert found[0].name == "keep_params=0.5 lr=1 seed=0"
    assert found[-1].overrides == (
        "stage.1.keep_params=0.3",
        "stage.q.bits=8",
        "stage.0.lr=2",
        "seed=1",
    )
    assert sweep.variants(["a.lr=1,2", "b.lr=1,2"])[0].name == "a.lr=1 b.lr=1"
    with pytest.raises(RecipeError, match="given twice"):
        sweep.variants(["seed=1,2"], seeds=(3,))


def test_a_sweep_is_checked_with_what_all_its_variants_say(shell, tiny_file):
    text = tiny_file.read_text().partition('[[stage]]\nkind = "federate"')[0]
    tiny_file.write_text(text.replace('source = "digits"', 'source = "csv"'))
    words = ["sweep", tiny_file, "stage.prune.keep_params=0.6,0.4", "--out", "s"]
    said = shell(*words)
    assert said.err == ("error: recipe.data.path: source 'csv' needs a path; give data.path=PATH\n")
    for followed in (["data.path=nowhere.csv"], ["--data", "nowhere.csv"]):
        said = shell(*words, *followed)
        assert "needs a path" not in said.err
        assert "2 of 2 variants failed" in said.err


@pytest.mark.recipe
def test_a_sweep_trains_once_lists_what_fails_draws_and_goes_on(shell, tiny_file):
    text = tiny_file.read_text().partition('[[stage]]\nkind = "federate"')[0]
    tiny_file.write_text(text)
    words = ["sweep", tiny_file, "stage.prune.keep_params=0.6,0.001,0.4", "--out", "s"]
    said = shell(*words, "--json")
    assert said.code == 2
    assert "1 of 3 variants failed (keep_params=0.001)" in said.err
    page = json.loads(said.out)
    assert page == json.loads(Path("s/sweep.json").read_text())
    assert [bool(v["error"]) for v in page["variants"]] == [False, True, False]
    first, _, last = (Path("s", v["folder"]) for v in page["variants"])
    weights = [(path / "stages/0-train/model.safetensors").read_bytes() for path in (first, last)]
    assert weights[0] == weights[1]
    assert said.err.count("train: already done") == 1
    ends = {v["name"]: v["stages"][-1] for v in page["variants"] if not v["error"]}
    names = list(ends)
    assert all(end["accuracy_error"] > 0 and end["test_examples"] > 0 for end in ends.values())
    for cost in ("file_bytes", "latency_ms"):
        points = [(ends[n][cost], ends[n]["accuracy"]) for n in names]
        assert set(page[f"front_{cost}"]) == {names[at] for at in brute(points)}
    html = Path("s/sweep.html").read_text()
    assert "Pareto front" in html
    assert "keep_params=0.001" in html
    again = shell(*words)
    assert again.out.count("already done") == 4, "everything that was finished is taken as it is"
    assert "keep_params = 0.6" in (first / "recipe.toml").read_text()


def test_a_variant_may_be_unreadable_and_the_others_go_on(shell, tiny_file):
    tiny_file.write_text(tiny_file.read_text().partition('[[stage]]\nkind = "prune"')[0])
    said = shell("sweep", tiny_file, "stage.0.optimizer=sgb,sgd", "stage.0.epochs=1", "--out", "s")
    assert said.code == 2
    page = json.loads(Path("s/sweep.json").read_text())
    assert [v["error"] is None for v in page["variants"]] == [False, True]
    assert "did you mean 'sgd'" in page["variants"][0]["error"]
