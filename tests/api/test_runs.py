"""`fedpress.run` and `Run`: settings from keywords, events, stops and what lies in the folder."""

import pytest
import torch

import fedpress
from fedpress.errors import FedpressError, RecipeError, RunError

TABLES = {
    "name": "small",
    "data": {"source": "digits", "num_clients": 2, "examples_per_client": 100},
    "model": {"architecture": "mlp", "arguments": {"in_features": 64, "hidden": [16]}},
    "stage": [
        {"kind": "train", "epochs": 2, "batch_size": 64},
        {"kind": "federate", "num_rounds": 2, "lr": 0.1},
    ],
}


def test_tables_a_recipe_and_a_file_are_the_same_run(tmp_path):
    text = fedpress.run(TABLES, out=tmp_path / "tables")
    made = fedpress.run(fedpress.Recipe(**TABLES), out=tmp_path / "recipe")
    file = fedpress.run(tmp_path / "tables" / "recipe.toml", out=tmp_path / "file")
    losses = {run.result["final"]["loss"] for run in (text, made, file)}
    assert len(losses) == 1
    assert (tmp_path / "tables" / "report.html").exists()
    assert [record["round"] for record in text.records if "round" in record] == [1, 2]


def test_keywords_change_what_they_name_and_leave_the_rest(tmp_path):
    run = fedpress.Run.begin(
        TABLES,
        out=tmp_path / "run",
        seed=3,
        data={"num_clients": 4},
        stage={"train": {"epochs": 1}},
    )
    assert run.recipe.seed == 3
    assert (run.recipe.data.num_clients, run.recipe.data.examples_per_client) == (4, 100)
    assert (run.recipe.stage[0].epochs, run.recipe.stage[0].batch_size) == (1, 64)
    assert not (tmp_path / "run").exists(), "beginning checks, and does nothing yet"


@pytest.mark.recipe
def test_a_run_may_be_stopped_at_any_event_and_goes_on_to_the_same_bits(tmp_path):
    whole = fedpress.run(TABLES, out=tmp_path / "whole")
    for number, stop in enumerate((1, 4, 9)):
        run = fedpress.Run.begin(TABLES, out=tmp_path / f"stopped-{number}")
        events = run.events()
        for _ in range(stop):
            next(events)
            torch.rand(7)  # the caller's random numbers are no part of the run
        events.close()
        with pytest.raises(
            RunError, match=r"this run is not finished; iterate over run.events\(\)"
        ):
            _ = run.result
        again = fedpress.run(resume=run.path)
        assert again.result["final"]["loss"] == whole.result["final"]["loss"]
        for mine, other in zip(again.model.parameters(), whole.model.parameters(), strict=True):
            assert torch.equal(mine, other)


def test_the_events_of_one_object_go_on_where_they_stopped(tmp_path):
    run = fedpress.Run.begin(TABLES, out=tmp_path / "run")
    for event in run.events():
        if isinstance(event, fedpress.StageFinished):
            break
    names = [e.name for e in run.events() if isinstance(e, fedpress.StageStarted) and not e.reused]
    assert names == ["federate"]
    assert run.finished
    assert [e.reused for e in run.events() if isinstance(e, fedpress.StageStarted)] == [True, True]


def test_the_callers_random_numbers_stay_the_callers(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    fedpress.run(TABLES, out=tmp_path / "run")
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(5)
    fedpress.check(TABLES)
    assert torch.equal(torch.rand(3), expected)


def test_a_data_set_in_memory_takes_the_place_of_the_source(tmp_path):
    x = torch.randn(300, 6)
    y = x[:, :3].argmax(1)

    def part(a, b):
        from fedpress.core.examples import Arrays

        return Arrays(x[a:b], y[a:b])

    data = fedpress.FederatedData(
        "mine", {"a": part(0, 80), "b": part(80, 160)}, part(160, 220), part(220, 240), part(240, 300),
        num_classes=3, class_names=("0", "1", "2"),
    )  # fmt: skip
    model = {"architecture": "mlp", "arguments": {"in_features": 6, "num_classes": 3}}
    tables = {"model": model, "stage": TABLES["stage"]}
    run = fedpress.run(tables, data=data, out=tmp_path / "run")
    assert sum(map(sum, run.result["final"]["confusion"])) == 60
    assert fedpress.check(tables, data=data)["data"]["private"] == 160


def test_a_run_that_is_only_opened_is_looked_at(tmp_path):
    fedpress.run(TABLES, out=tmp_path / "run")
    run = fedpress.Run.open(tmp_path / "run")
    assert "federate" in str(run)
    assert "<td>federate</td>" in run._repr_html_()
    with pytest.raises(RunError, match="opened for reading only"):
        next(run.events())
    assert fedpress.report(run, tmp_path / "page.html").read_text().startswith("<!")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"recipe": "digit"}, "no recipe 'digit'"),
        ({"recipe": None}, "^recipe: no recipe was given"),
        ({"recipe": {**TABLES, "sede": 1}}, "sede.*did you mean 'seed'"),
        ({"recipe": TABLES, "sede": 1}, "sede.*did you mean 'seed'"),
        ({"recipe": TABLES, "stage": {"trian": {"epochs": 1}}}, "there is no stage.trian"),
        ({"recipe": TABLES, "device": "cuda:9"}, "there is no 'cuda:9'"),
        ({"resume": "nowhere"}, "there is no run to resume"),
        ({"resume": "nowhere", "out": "there"}, "^out: a resumed run continues in its own folder"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(given, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FedpressError, match=said):
        fedpress.run(**given)
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_made_in_python_says_mistakes_as_a_file_does():
    with pytest.raises(RecipeError, match=r"recipe.data.num_client: no such key"):
        fedpress.Recipe(data={"source": "digits", "num_client": 2}, model={}, stage=[])


def test_a_run_that_is_not_there_is_told_in_words_of_python(tmp_path):
    with pytest.raises(RunError, match=r"no run to resume; .*leave out resume= to start one"):
        fedpress.run(resume=tmp_path / "none")
