"""The eight mixes go through the same check and the same loop, and a killed run of each goes on to the same bits."""

import itertools
import json
import shutil
from pathlib import Path

import pytest

from fedpress.errors import TrainingError
from fedpress.federation import Client
from fedpress.pipeline import recipe as recipes
from fedpress.pipeline.check import check_recipe
from fedpress.pipeline.start import load_data
from fedpress.workspace.folder import RunFolder
from tests.harness import begun, finish, tiered, told
from tests.mixes import MIXES


@pytest.fixture(scope="module")
def base(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "run"
    finish(tiny, path, "stage.2.num_rounds=0")
    return RunFolder.open(path)


@pytest.fixture(scope="module", params=MIXES)
def mix(request, base, tiny, tmp_path_factory):
    """A whole run of one mix: its name, overrides and folder."""
    path = tmp_path_factory.mktemp("mix") / "run"
    finish(tiny, path, *MIXES[request.param], reuse=base)
    return request.param, MIXES[request.param], path


def test_check_tells_bits_bytes_and_epsilon(mix, tiny):
    name, overrides, path = mix
    recipe = recipes.load(tiny, overrides)
    told = check_recipe(recipe, load_data(recipe))[2]
    done = json.loads((path / "result.json").read_text())["stages"][2]
    assert told["bits_per_value_up"] > 0
    assert told["bits_per_value_down"] > 0
    assert (told.get("epsilon") is None) == (
        name in ("nothing", "int8", "top-k and ANS both ways", "secure sum")
    )
    # What was sent: three updates a round, and for a secure sum what opens it.
    up = done["bytes_up"] - 3 * told["bytes_up_per_round"]
    assert abs(up) < 0.25 * done["bytes_up"] + 12_000 * ("secure" in name)
    set_up = done["set_up_bytes_up"] + done["set_up_bytes_down"]
    assert told["bytes_set_up"] == pytest.approx(set_up, rel=0.01)
    if told.get("epsilon") is not None:
        assert done["epsilon"] <= told["epsilon"] * (1 + 1e-9)


def test_every_update_counted(mix):
    _, _, path = mix
    records = told(path)
    rounds = [r for r in records if r["kind"] == "federate"]
    assert [r["round"] for r in rounds] == [1, 2, 3]
    assert all(not r["refused"] for r in rounds)


def test_a_run_that_is_killed_in_a_round_goes_on_to_the_same_bits(mix, base, tiny, tmp_path, left):
    _, overrides, path = mix
    running = begun(tiny, tmp_path / "run", *overrides, reuse=base)
    seen = 0
    for event in running:
        seen += type(event).__name__ == "Tick" and "round 3" in event.note
        if seen:
            break
    running.close()
    assert seen
    finish(tiny, tmp_path / "run", *overrides, resume=True)
    whole, again = left(path), left(tmp_path / "run")
    assert {n: v for n, v in again.items() if "memory" not in n} == {
        n: v for n, v in whole.items() if "memory" not in n
    }


def test_a_round_that_is_asked_twice_has_one_answer(tiny, base, tmp_path, left):
    """The server dies after the clients answered: they remember the round, and give the same bytes again."""
    overrides = [*MIXES["top-k and ANS both ways"], "stage.2.num_rounds=2"]
    running = begun(tiny, tmp_path / "one", *overrides, reuse=base)
    stage = tmp_path / "one" / "stages" / "2-federate"
    kept = None
    for event in running:
        saved = stage / "progress.safetensors"
        if type(event).__name__ == "Tick" and "round 2" in event.note:
            kept = saved.read_bytes()
            next(itertools.islice(running, 1), None)
            break
    running.close()
    saved.write_bytes(kept)  # round 2 was answered, but the server does not know
    for _ in begun(tiny, tmp_path / "one", *overrides, resume=True):
        pass
    for _ in begun(tiny, tmp_path / "two", *overrides, reuse=base):
        pass
    one, two = left(tmp_path / "one"), left(tmp_path / "two")
    assert one["result.json"] == two["result.json"]


PRIVATE = "stage.2.privacy={ epsilon = 8.0, delta = 1e-3, secure_noise = true, %s }"
SECURE_NOISE = {
    "sample": PRIVATE % 'unit = "sample"',
    "client": PRIVATE % 'unit = "client"',
    "joint": PRIVATE % 'unit = "sample", trust = "distributed"',
    "correlated": PRIVATE % 'unit = "client", correlated = {}',
}


@pytest.mark.recipe
@pytest.mark.parametrize("mode", tiered(SECURE_NOISE, quick=("joint", "correlated")))
def test_secure_noise_differs_between_runs_and_not_between_a_run_and_its_resumption(
    mode, tiny, base, tmp_path
):
    overrides = [SECURE_NOISE[mode]]
    saved = {}
    for name in ("one", "two"):
        stage = tmp_path / name / "stages" / "2-federate"
        for event in begun(tiny, tmp_path / name, *overrides, reuse=base):
            if type(event).__name__ == "Tick" and "round 3" in event.note:
                saved[name] = (stage / "progress.safetensors").read_bytes()
            elif (stage / "memory").exists():
                shutil.copytree(stage / "memory", tmp_path / f"memory-{name}", dirs_exist_ok=True)
    weights = [
        (tmp_path / n / "stages/2-federate/model.safetensors").read_bytes() for n in ("one", "two")
    ]
    assert weights[0] != weights[1]
    stage = tmp_path / "one" / "stages" / "2-federate"
    (
        stage / "result.json"
    ).unlink()  # as if it had been killed in the last round, after the clients answered
    (stage / "progress.safetensors").write_bytes(saved["one"])
    assert not (stage / "memory").exists()  # secrets and private numbers go when the stage is done
    shutil.copytree(tmp_path / "memory-one", stage / "memory")
    for _ in begun(tiny, tmp_path / "one", *overrides, resume=True):
        pass
    assert (stage / "model.safetensors").read_bytes() == weights[0]


def finished(tiny, path, base, *overrides):
    for _ in begun(tiny, path, *overrides, reuse=base):
        pass
    records = told(path)
    result = json.loads((path / "result.json").read_text())["stages"][2]
    return (
        result,
        [r for r in records if r["kind"] == "federate"],
        json.loads((path / "ledger.json").read_text()),
    )


def client_privacy(more=""):
    return (
        f'stage.2.privacy={{ unit = "client", epsilon = 8.0, delta = 1e-3, clip_norm = 1.0{more} }}'
    )


@pytest.mark.parametrize("trust", ["local", "distributed", "central"])
def test_clients_that_take_turns_are_charged_for_their_turns(trust, tiny, base, tmp_path):
    cohort = 1 if trust != "distributed" else 3
    overrides = [
        client_privacy(f', trust = "{trust}"'),
        "stage.2.sampling=cyclic",
        f"stage.2.cohort={cohort}",
    ]
    told = check_recipe(recipes.load(tiny, overrides), load_data(recipes.load(tiny, overrides)))[2]
    result, _, book = finished(tiny, tmp_path / "run", base, *overrides)
    assert 7.9 <= result["epsilon"] <= told["epsilon"] * (1 + 1e-9) <= 8.0001
    assert sum(c["steps"] for c in book["charges"] if c["who"] in ("c0", "population")) == (
        1 if cohort == 1 else 3
    )


def test_correlated_noise_is_charged_once_for_all_rounds(tiny, base, tmp_path):
    overrides = [client_privacy(", correlated = {}"), "stage.2.sampling=cyclic", "stage.2.cohort=1"]
    result, records, book = finished(tiny, tmp_path / "run", base, *overrides)
    assert [c["steps"] for c in book["charges"]] == [1]
    assert all(r["epsilon"] == result["epsilon"] for r in records)
    assert 7.9 <= result["epsilon"] <= 8.0001


@pytest.mark.recipe
def test_where_the_server_is_trusted_records_tell_neither_who_took_part_nor_what_was_sent(
    tiny, base, tmp_path
):
    overrides = [
        client_privacy(),
        "stage.2.sampling=poisson",
        "stage.2.cohort=2",
        "stage.2.num_rounds=6",
    ]
    coded = 'stage.2.uplink=[{ kind = "topk" }, { kind = "quantize", bits = 4 }]'
    result, records, _ = finished(tiny, tmp_path / "run", base, *overrides, coded)
    assert len({(r["bytes_up"], r["bytes_down"]) for r in records}) == 1
    assert all((r["refused"], r["clients"]) == ({}, []) for r in records)
    assert result["bytes"] == "planned"


def test_a_secure_sum_that_stays_closed_is_a_lost_round_and_not_the_end(
    tiny, base, tmp_path, monkeypatch
):
    answer = Client.answer

    def sometimes(self, message):
        if message.kind == "fit" and message.header["round"] == 2 and self.name != "c0":
            raise ConnectionError("gone")
        return answer(self, message)

    monkeypatch.setattr(Client, "answer", sometimes)
    overrides = [client_privacy(', trust = "distributed"'), "stage.2.num_rounds=4"]
    _, records, book = finished(tiny, tmp_path / "run", base, *overrides)
    assert [len(r["refused"]) for r in records] == [0, 3, 0, 0]
    assert records[1]["loss"] == records[0]["loss"] != records[2]["loss"]
    assert {c["steps"] for c in book["charges"]} == {4}


def test_three_closed_sums_in_a_row_end_the_run_with_the_reason(tiny, base, tmp_path, monkeypatch):
    answer = Client.answer

    def gone(self, message):
        if message.kind == "fit" and self.name != "c0":
            raise ConnectionError("gone")
        return answer(self, message)

    monkeypatch.setattr(Client, "answer", gone)
    with pytest.raises(TrainingError, match="no update was used in round 3"):
        finished(
            tiny,
            tmp_path / "run",
            base,
            client_privacy(', trust = "distributed"'),
            "stage.2.num_rounds=9",
        )


@pytest.mark.recipe
@pytest.mark.parametrize("secure", [False, True])
def test_digits_stay_accurate_under_codes_both_ways_and_under_a_jointly_noised_secure_sum(
    secure, tmp_path
):
    """On real digits a thirtieth of the bytes, or a server that sees only a noised sum, costs next to nothing."""
    text = (Path(__file__).parent / "data" / "v0_1_0" / "digits.toml").read_text("utf-8")
    text = text[: text.index('[[stage]]\nkind = "export"')]
    coded = [
        "stage.federate.privacy=none",
        'stage.federate.trainable=["*"]',
        'stage.federate.uplink=[{ kind = "quantize", rate = 0.5 }]',
        'stage.federate.downlink=[{ kind = "quantize", rate = 0.5 }]',
        "stage.federate.error_feedback=true",
        "stage.federate.num_rounds=20",
    ]
    joint = [
        'stage.federate.privacy={ unit = "sample", trust = "distributed", epsilon = 2.0, delta = 1e-4 }',
        "stage.federate.num_rounds=20",
        "stage.federate.lr=0.5",
    ]
    for _ in begun(text, tmp_path / "run", *(joint if secure else coded)):
        pass
    result = json.loads((tmp_path / "run" / "result.json").read_text())["stages"][-1]
    assert result["accuracy"] >= result["accuracy_before"] - 0.015
    dense = 20 * 4 * 2 * 4 * result["trained_values"]
    if secure:
        assert result["epsilon"] <= 2.0001
        assert result["sum"] == "secure"
    else:
        assert result["bytes_up"] + result["bytes_down"] < dense / 30
