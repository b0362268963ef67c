import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fedpress.errors import FedpressError, ModelError, RecipeError, RunError, TrainingError
from fedpress.models import load_model
from fedpress.pipeline import recipe as recipes
from fedpress.pipeline.check import check_recipe
from fedpress.pipeline.environment import write_environment
from fedpress.pipeline.keys import settings_of
from fedpress.pipeline.start import first_state, load_data
from fedpress.tasks import Classification
from fedpress.workspace.folder import RunFolder
from fedpress.workspace.records import Records
from fedpress.workspace.stage_folder import StageFolder
from fedpress.workspace.state import StageFinished, StageStarted, Tick
from tests.harness import Killed, begun, finish, tiered, told

LINE_KEYS = {
    "kind",
    "name",
    "seconds",
    "accuracy",
    "loss",
    "parameters",
    "macs",
    "file_bytes",
    "latency_ms",
}
FEDERATE_KEYS = {
    "rounds",
    "clients",
    "accuracy_before",
    "bytes_up",
    "bytes_down",
    "unit",
    "epsilon",
    "delta",
}
FEDERATE_KEYS |= {"noise_multiplier", "clip_norm", "client_accuracy"}


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory) -> Path:
    """A run that nobody stopped."""
    path = tmp_path_factory.mktemp("runs") / "whole"
    finish(tiny, path)
    return path


@pytest.fixture(scope="module")
def exported(tiny_export, whole, tmp_path_factory) -> Path:
    """The same run with an export at its end."""
    path = tmp_path_factory.mktemp("runs") / "exported"
    finish(tiny_export, path, reuse=whole)
    return path


def test_a_run_leaves_everything_that_the_report_needs(exported):
    names = {str(p.relative_to(exported)) for p in exported.rglob("*") if p.is_file()}
    stages = ("0-train", "1-prune", "2-federate", "3-export")
    assert names == {
        "recipe.toml",
        "checksums",
        "settings.json",
        "records.jsonl",
        "result.json",
        "ledger.json",
        "artifacts/model.onnx",
        "stages/1-prune/plan.json",
        *(
            f"stages/{stage}/{name}"
            for stage in stages
            for name in ("model.safetensors", "spec.json", "result.json")
        ),
    }


def test_the_result_has_a_line_per_stage_and_the_same_keys_at_the_end(exported):
    result = json.loads((exported / "result.json").read_text())
    assert {
        "recipe",
        "version",
        "seed",
        "seconds",
        "stages",
        "final",
        "finished",
        "data",
    } == result.keys()
    assert [line["kind"] for line in result["stages"]] == ["train", "prune", "federate", "export"]
    for line in result["stages"]:
        assert line.keys() >= LINE_KEYS
        assert 0 < line["accuracy"] <= 1
        assert line.keys() >= set(Classification.keys)
        assert 0 < line["majority_share"] < 0.3
        assert 0 < line["balanced_accuracy"] <= 1
        assert 0 < line["auc"] <= 1
    assert result["stages"][2].keys() >= FEDERATE_KEYS
    assert result["stages"][3]["parity"]["same_argmax_share"] == 1.0
    assert result["final"].keys() >= LINE_KEYS | FEDERATE_KEYS | {"artifact", "parity"}
    assert result["final"]["accuracy"] == result["stages"][3]["accuracy"]
    assert result["final"]["seconds"] == result["seconds"]
    assert result["finished"] is True


def test_pruning_halves_the_parameters_and_the_numbers_agree(whole):
    train, prune, federate = json.loads((whole / "result.json").read_text())["stages"]
    assert prune["parameters"] / train["parameters"] == pytest.approx(0.5, abs=0.005)
    assert prune["macs"] < train["macs"]
    assert prune["file_bytes"] == 4 * prune["parameters"]
    assert federate["accuracy_before"] == prune["accuracy"]
    spec, model = load_model(whole / "stages" / "2-federate")
    assert sum(p.numel() for p in model.parameters()) == federate["parameters"]
    assert model.eval()(torch.zeros(2, *spec.input_shape)).shape == (2, 10)


def test_records_tell_of_every_epoch_cut_and_round(whole):
    records = told(whole)
    assert [(r["stage"], r["kind"], r.get("epoch"), r.get("round")) for r in records] == [
        (0, "train", 1, None),
        (0, "train", 2, None),
        (1, "prune", None, None),
        (2, "federate", None, 1),
        (2, "federate", None, 2),
        (2, "federate", None, 3),
    ]
    assert [client["client"] for client in records[3]["clients"]] == ["c0", "c1", "c2"]
    assert 0 < records[3]["epsilon"] < records[4]["epsilon"] < records[5]["epsilon"] <= 8


def test_the_ledger_charges_every_step_of_every_client(whole):
    page = json.loads((whole / "ledger.json").read_text())
    assert page["unit"] == "sample"
    charged = {
        c["who"]: (c["steps"], c["sampling_prob"], c["first_round"], c["last_round"])
        for c in page["charges"]
    }
    assert charged == dict.fromkeys(("c0", "c1", "c2"), (3 * 2, 0.5, 1, 3))


def test_the_same_seed_gives_the_same_bits_twice(tiny, tmp_path, whole, left):
    finish(tiny, tmp_path / "again")
    assert left(tmp_path / "again") == left(whole)


def test_another_seed_gives_other_bits(tiny, tmp_path, whole, left):
    finish(tiny, tmp_path / "other", "seed=1", "stage=[{kind='train', epochs=1}]")
    path = "stages/0-train/model.safetensors"
    assert left(tmp_path / "other")[path] != left(whole)[path]


def kill_after(events: int, text: str, path: Path, *overrides: str) -> bool:
    """Runs so many events and stops there, as if the process were killed; False if the run ended before."""
    running = begun(text, path, *overrides)
    seen = list(itertools.islice(running, events))
    running.close()
    return len(seen) == events


# Events of the tiny run: 0 start, 1-8 training (4 steps and an epoch's end, twice), then pruning, then federation.
@pytest.mark.recipe
@pytest.mark.parametrize("events", tiered([1, 7, 11, 16, 22], quick=(7, 16)))
def test_a_run_killed_at_any_event_ends_in_the_same_bits(tiny, tmp_path, whole, left, events):
    assert kill_after(events, tiny, tmp_path / "killed")
    finish(tiny, tmp_path / "killed", resume=True)
    assert left(tmp_path / "killed") == left(whole)


@pytest.mark.recipe
@pytest.mark.parametrize(
    ("place", "time"),
    [("save_progress", 2), ("save_progress", 4), ("finish", 2), ("finish", 3), ("record", 2)],
)
def test_a_run_killed_while_it_writes_ends_in_the_same_bits(
    tiny, tmp_path, whole, left, monkeypatch, place, time
):
    """Killed before the checkpoint that belongs to a record, before a stage is marked as done, and in a record."""
    path, calls, real = tmp_path / "killed", itertools.count(1), getattr(StageFolder, place)

    def dying(self, *args, **facts):
        if next(calls) == time:
            if place == "record":
                with open(self.records.path, "a") as file:
                    file.write('{"stage": 0, "kind": "tr')
            raise Killed
        return real(self, *args, **facts)

    with monkeypatch.context() as patch:
        patch.setattr(StageFolder, place, dying)
        with pytest.raises(Killed):
            finish(tiny, path)
    finish(tiny, path, resume=True)
    assert left(path) == left(whole)


def test_a_finished_run_that_is_resumed_changes_nothing(tiny, tmp_path, whole, left):
    before = left(whole)
    events = list(begun(tiny, whole, resume=True))
    assert left(whole) == before
    assert all(event.reused for event in events if isinstance(event, StageStarted))
    assert not any(isinstance(event, Tick) for event in events)


def test_every_stage_tells_of_its_start_its_progress_and_its_end(tiny, tmp_path):
    events = list(begun(tiny, tmp_path / "told"))
    assert [e.name for e in events if isinstance(e, StageStarted)] == ["train", "prune", "federate"]
    assert [e.index for e in events if isinstance(e, StageFinished)] == [0, 1, 2]
    ticks = [e for e in events if isinstance(e, Tick)]
    assert all(0 <= tick.done <= tick.total for tick in ticks)
    notes = " ".join(tick.note for tick in ticks)
    assert "epoch 2/2" in notes
    # A score stands with its round, so a line of a log can be read by itself.
    scores = [tick.note for tick in ticks if tick.note.startswith("round")]
    assert all("/3, validation" in note for note in scores[1:])
    assert sum(note.startswith("round 2/3, validation") for note in scores) == 2
    assert next(note for note in scores if note.endswith("before it")).startswith("round 2/3")
    assert "measuring on 359 test examples" in notes


@pytest.mark.recipe
def test_seconds_of_a_stopped_stage_are_counted_once(tiny, tmp_path):
    path = tmp_path / "timed"
    kill_after(7, tiny, path)
    place = RunFolder(path).stage(0, "train", "train")
    tensors, facts = place.load_progress()
    assert 0 < facts["seconds"] < 60
    place.save_progress(tensors, {**facts, "seconds": 1000.0})
    result = finish(tiny, path, resume=True)
    assert 1000 <= result["stages"][0]["seconds"] < 1060
    assert result["stages"][1]["seconds"] < 60
    assert result["seconds"] == pytest.approx(
        sum(line["seconds"] for line in result["stages"]), abs=0.01
    )
    assert [r["seconds"] > 1000 for r in told(path) if r["stage"] == 0] == [False, True]


@pytest.mark.recipe
def test_a_corrupt_checkpoint_is_named_and_can_be_deleted(tiny, tmp_path, whole, left):
    path = tmp_path / "corrupt"
    kill_after(7, tiny, path)
    checkpoint = path / "stages" / "0-train" / "progress.safetensors"
    for damage in (b"", b"x" * 100, checkpoint.read_bytes()[:-10]):
        checkpoint.write_bytes(damage)
        with pytest.raises(
            RunError, match=r"progress.safetensors: corrupt checkpoint .* delete this file"
        ):
            finish(tiny, path, resume=True)
    checkpoint.unlink()
    finish(tiny, path, resume=True)
    assert left(path) == left(whole)


def test_a_corrupt_model_of_a_finished_stage_is_named(tiny, tmp_path):
    path = tmp_path / "corrupt"
    finish(tiny, path, "stage=[{kind='train', epochs=1}]")
    (path / "stages" / "0-train" / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(ModelError, match=r"0-train/model\.safetensors: corrupt"):
        finish(tiny, path, "stage=[{kind='train', epochs=1}]", resume=True)


def test_a_run_of_another_recipe_is_refused_with_the_difference(tiny, whole):
    with pytest.raises(
        RunError, match=r"another recipe \(recipe.stage\[0\].lr was 0.05, now 0.1\).*--from"
    ):
        begun(tiny, whole, "stage.0.lr=0.1", resume=True)
    with pytest.raises(RunError, match=r"recipe.stage had 3 entries, now 1"):
        begun(tiny, whole, "stage=[{kind='train', epochs=1}]", resume=True)


def test_equal_stages_are_taken_over_from_another_run(tiny, tmp_path, whole, left):
    events = list(begun(tiny, tmp_path / "more", "stage.2.num_rounds=1", reuse=whole))
    assert [e.reused for e in events if isinstance(e, StageStarted)] == [True, True, False]
    mine, theirs = left(tmp_path / "more"), left(whole)
    for name in (
        "stages/0-train/model.safetensors",
        "stages/1-prune/model.safetensors",
        "stages/1-prune/plan.json",
    ):
        assert mine[name] == theirs[name]
    assert told(tmp_path / "more")[:3] == told(whole)[:3]
    assert len(told(tmp_path / "more")) == 4


def test_a_run_taken_over_whole_is_the_same_run(tiny_export, tmp_path, exported, left):
    list(begun(tiny_export, tmp_path / "copy", reuse=exported))
    assert left(tmp_path / "copy") == left(exported)


def test_a_stage_after_a_different_one_is_not_taken_over(tiny, tmp_path, whole):
    stages = "stage=[{kind='train', epochs=1, batch_size=64}, {kind='prune', keep_params=0.5, calibration=64}]"
    events = list(begun(tiny, tmp_path / "changed", stages, reuse=whole))
    assert [e.reused for e in events if isinstance(e, StageStarted)] == [False, False]


def test_a_kill_while_stages_are_taken_over_does_no_harm(tiny, tmp_path, whole, left, monkeypatch):
    path, calls, real = tmp_path / "copy", itertools.count(1), Records.add

    def dying(self, facts):
        if next(calls) == 2:
            raise Killed
        real(self, facts)

    with monkeypatch.context() as patch:
        patch.setattr(Records, "add", dying)
        with pytest.raises(Killed):
            finish(tiny, path, reuse=whole)
    finish(tiny, path, resume=True)
    assert left(path) == left(whole)


SECOND = (
    "[[stage]]\nkind='federate'\nname='second'\nnum_rounds=6\nbatch_size=30\ntrainable=['head.*']\n"
)
OPEN = (
    "[[stage]]\nkind='federate'\nname='open'\nnum_rounds=1\nbatch_size=30\ntrainable=['head.*']\n"
)
PRIVATE = "privacy={unit='sample', epsilon=12.0, delta=1e-3}\n"


@pytest.mark.recipe
def test_a_second_budget_that_the_first_stage_has_spent_is_refused_before_the_run(tiny):
    recipe = recipes.load(tiny + SECOND + PRIVATE.replace("12.0", "8.0"))
    with pytest.raises(
        FedpressError, match=r"recipe.stage\[3\] \(second\): ledger: .* beyond the budget 8"
    ):
        check_recipe(recipe, load_data(recipe))


@pytest.mark.recipe
def test_a_second_budget_is_that_of_both_stages_together(tiny):
    recipe = recipes.load(tiny + SECOND + PRIVATE)
    first, second = check_recipe(recipe, load_data(recipe))[2:]
    assert first["epsilon"] <= 8
    assert 0.97 * 12 <= second["epsilon"] <= 12


def test_rounds_stop_before_the_budget_is_passed(tiny, tmp_path, whole, monkeypatch):
    # Planned as if no stage were before it.
    monkeypatch.setattr("fedpress.stages.federate.server.epsilon_left", lambda *_: None)
    result = finish(
        tiny + SECOND + PRIVATE, tmp_path / "stopped", reuse=whole
    )  # not checked: the ledger must stop it
    first, second = result["stages"][2:]
    assert second["rounds"] < 6
    assert second["stopped"] == "the next round would exceed the privacy budget"
    assert first["epsilon"] <= second["epsilon"] <= 12
    steps = {
        c["what"]: c["steps"]
        for c in json.loads((tmp_path / "stopped" / "ledger.json").read_text())["charges"]
    }
    assert steps == {
        "federate": 6,
        **({"second": 2 * second["rounds"]} if second["rounds"] else {}),
    }


def test_no_promise_can_follow_an_open_stage(tiny, tmp_path, whole):
    recipe = recipes.load(tiny + OPEN + SECOND + PRIVATE)
    with pytest.raises(
        RecipeError, match=r"the earlier stage 'open' uses the same clients without privacy"
    ):
        check_recipe(recipe, load_data(recipe))
    open_stage = finish(tiny + OPEN, tmp_path / "open", reuse=whole)["stages"][3]
    assert open_stage["epsilon"] is None
    assert set(open_stage["client_accuracy"]) == {"c0", "c1", "c2"}
    charges = json.loads((tmp_path / "open" / "ledger.json").read_text())["charges"]
    assert charges[-1]["what"] == "open"
    assert charges[-1]["noise_multiplier"] == 0


@pytest.mark.parametrize(
    ("privacy", "words"),
    [
        (
            "cohort=2\nprivacy={unit='client', epsilon=8.0, delta=1e-3}\n",
            "a fixed cohort of 2 in 3 clients",
        ),
        (
            "privacy={unit='sample', epsilon=8.0, delta=0.1}\n",
            "delta: got 0.1, which would allow publishing one of the",
        ),
    ],
)
def test_a_promise_that_means_little_is_refused(tiny, privacy, words):
    recipe = recipes.load(tiny.partition('[[stage]]\nkind = "federate"')[0] + SECOND + privacy)
    with pytest.raises(RecipeError, match=words):
        check_recipe(recipe, load_data(recipe))


def test_two_stages_never_share_their_noise(tiny):
    recipe = recipes.load(tiny + "[[stage]]\nkind='federate'\nnum_rounds=3\n" + PRIVATE)
    assert recipe.stage[2].name != recipe.stage[3].name
    with pytest.raises(RecipeError, match="two stages are named 'federate'"):
        recipes.load(tiny + OPEN, ["stage.open.name=federate"])


def test_a_second_cut_counts_from_the_dense_network(tiny, tmp_path, whole):
    text = tiny.partition('[[stage]]\nkind = "federate"')[0]
    more = text + "[[stage]]\nkind='prune'\nname='again'\nkeep_params=0.3\ncalibration=64\n"
    dense, _, cut = finish(more, tmp_path / "twice", reuse=whole)["stages"]
    assert cut["parameters"] / dense["parameters"] == pytest.approx(0.3, abs=0.005)
    wrong = recipes.load(more, ["stage.again.keep_params=0.6"])
    with pytest.raises(
        RecipeError,
        match=r"recipe.stage\[2\].keep_params: got 0.6, but the model has 0.5",
    ):
        check_recipe(wrong, load_data(wrong))


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_epoch(tiny, tmp_path):
    path = tmp_path / "wild"
    kill_after(7, tiny, path)
    before = (path / "stages/0-train/progress.safetensors").read_bytes()
    wild = tiny.replace("lr = 0.05", "lr = 1e30")
    with pytest.raises(TrainingError, match=r"recipe.stage\[0\]: the loss is .* lower lr"):
        finish(wild, tmp_path / "wilder")
    assert (path / "stages/0-train/progress.safetensors").read_bytes() == before
    assert not (tmp_path / "wilder" / "result.json").exists()


def test_rounds_in_which_nobody_counts_stop_the_run(tiny, tmp_path, whole):
    stage = "[[stage]]\nkind='federate'\nname='wild'\nlr=1e30\nmomentum=0.9\n"
    with pytest.raises(
        TrainingError, match=r"recipe.stage\[3\]: no update was used in round 2.*c0.*lower"
    ):
        finish(tiny + stage, tmp_path / "wild", reuse=whole)


def test_a_model_of_other_outputs_is_refused(tiny):
    wrong = recipes.load(tiny, ["model.arguments.num_classes=7"])
    with pytest.raises(
        RecipeError, match=r"gives outputs \[7\] for one example but the data has 10 classes"
    ):
        check_recipe(wrong, load_data(wrong))
    wrong = recipes.load(tiny, ["model.arguments.image_size=32"])
    with pytest.raises(RecipeError, match=r"does not take examples of shape \[1, 8, 8\]"):
        check_recipe(wrong, load_data(wrong))


def test_a_check_says_sizes_bytes_noise_and_epsilon(tiny):
    recipe = recipes.load(tiny)
    train, prune, federate = check_recipe(recipe, load_data(recipe))
    assert train["steps"] == 2 * 3
    assert prune["parameters"] < train["parameters"]
    assert federate["clients"] == 3
    assert federate["steps_per_round"] == 2
    assert federate["bytes_up_per_round"] > 3 * 4 * federate["trained_values"]
    assert 7.9 < federate["epsilon"] <= 8
    assert federate["noise_multiplier"] > 0.3


def test_the_environment_keeps_the_first_command_and_those_that_resumed(tmp_path):
    folder = RunFolder(tmp_path)
    write_environment(folder, "fedpress run x")
    write_environment(folder, "fedpress run x --resume")
    page = json.loads((tmp_path / "environment.json").read_text())
    assert page["command"] == "fedpress run x"
    assert page["resumed"] == [{"command": "fedpress run x --resume"}]
    assert {"fedpress", "python", "torch", "machine", "threads", "commit"} <= page.keys()


RESNET = (
    "model={architecture='resnet-small', arguments={in_channels=1, width=8}}",
    "stage.0.ema=0.9",
    "stage.0.optimizer=muon",
    "stage.1.score=taylor",
    "stage.1.round_to=2",
    "stage.2.server={kind='momentum'}",
)


@pytest.mark.recipe
def test_a_residual_network_killed_at_every_event_ends_in_the_same_bits(tiny, tmp_path, left):
    finish(tiny, tmp_path / "whole", *RESNET)
    expected = left(tmp_path / "whole")
    for events in itertools.count():
        path = tmp_path / f"killed-{events}"
        if not kill_after(events, tiny, path, *RESNET):
            break
        finish(tiny, path, *RESNET, resume=True)
        assert left(path) == expected, f"killed after event {events}"
    assert events > 20


@pytest.mark.recipe
def test_processes_killed_at_random_moments_end_in_the_same_bits(tmp_path, left, tiny_file):
    words = [
        "-c",
        "from fedpress.cli import main; main()",
        "run",
        str(tiny_file),
        "stage.0.epochs=60",
    ]
    words += ["stage.2.num_rounds=20", "stage.2.batch_size=10"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(out: Path, *more: str) -> subprocess.Popen:
        command = [sys.executable, *words, "--out", str(out), *more]
        with open(tmp_path / "errors", "ab") as errors:
            return subprocess.Popen(
                command, env=environment, stdout=subprocess.DEVNULL, stderr=errors
            )

    began = time.monotonic()
    whole = start(tmp_path / "whole")
    assert whole.wait() == 0, (tmp_path / "errors").read_text()
    length, chance, kills = time.monotonic() - began, random.Random(0), 0
    for _ in range(4):
        resume = ["--resume"] if (tmp_path / "killed" / "settings.json").exists() else []
        process = start(tmp_path / "killed", *resume)
        try:
            assert process.wait(chance.uniform(0.3, 0.8) * length) == 0
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
    assert kills > 0
    resume = ["--resume"] if (tmp_path / "killed" / "settings.json").exists() else []
    assert start(tmp_path / "killed", *resume).wait() == 0
    assert left(tmp_path / "killed") == left(tmp_path / "whole")


@pytest.mark.recipe
def test_a_run_may_begin_with_a_saved_model_wherever_it_lies(tiny, tmp_path, whole):
    stage = whole / "stages" / "1-prune"
    copy = tmp_path / "elsewhere"
    shutil.copytree(stage, copy)
    text = (
        tiny[: tiny.index("[model]")]
        + '[model]\ncheckpoint = "%s"\n'
        + tiny[tiny.rindex("[[stage]]") :]
    )
    results = [
        finish(text % place, tmp_path / f"run{at}") for at, place in enumerate((stage, copy))
    ]
    pruned = json.loads((stage / "result.json").read_text())["result"]
    assert results[0]["stages"][0]["accuracy_before"] == pruned["accuracy"]
    recipes_ = [recipes.load(text % place) for place in (stage, copy)]
    assert settings_of(recipes_[0]) == settings_of(recipes_[1])  # the content counts, not the place
    assert (
        first_state(recipes_[0], load_data(recipes_[0])).dense
        > results[0]["stages"][0]["parameters"]
    )


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        ("", "neither architecture nor checkpoint is given"),
        ('architecture = "cnn"\ncheckpoint = "x"', "architecture and checkpoint are both given"),
        ('checkpoint = "nowhere"', "there is no .*nowhere"),
    ],
)
def test_a_model_comes_from_one_place(tiny, model, problem):
    text = tiny[: tiny.index("[model]")] + f"[model]\n{model}\n" + tiny[tiny.index("[[stage]]") :]

    def started():
        recipe = recipes.load(text)
        return first_state(recipe, load_data(recipe))

    with pytest.raises(FedpressError, match=problem):
        started()


PATIENTS = """
name = "patients"
seed = 1
[data]
source = "csv"
path = "PATH"
label_column = "diag"
client_column = "site"
test_clients = ["s0"]
public_clients = ["s1"]
[model]
architecture = "mlp"
arguments = { in_features = 3, num_classes = 2, hidden = [4] }
[[stage]]
kind = "federate"
num_rounds = 1
batch_size = 80
privacy = { unit = "sample", epsilon = 1.0, delta = 1e-4 }
"""


def test_nothing_that_only_a_private_row_says_is_in_the_run_folder(tmp_path):
    rows = [
        f"{40 + i % 30},{('nurse', 'cook')[i % 3 > 1]},{('healthy', 'ill')[i % 2]},s{i % 5}"
        for i in range(300)
    ]
    (tmp_path / "t.csv").write_text(
        "\n".join(["age,job,diag,site", *rows, "44,spy,rare-disease,s3"])
    )
    text = PATIENTS.replace("PATH", str(tmp_path / "t.csv"))
    finish(text, tmp_path / "run")
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) > 5
    assert not [
        path
        for path in files
        if b"rare-disease" in path.read_bytes() or b"spy" in path.read_bytes()
    ]


def test_a_folder_of_an_older_version_without_newer_data_keys_still_resumes(tiny):
    settings = settings_of(recipes.load(tiny))
    assert (
        not {"classes", "words", "public_words", "unknown", "encoding", "decimal"}
        & settings["data"].keys()
    )
    named = settings_of(recipes.load(tiny, ["data.unknown=other", "data.encoding=latin-1"]))
    assert (named["data"]["unknown"], named["data"]["encoding"]) == ("other", "latin-1")
