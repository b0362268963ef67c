"""The schedules of a recipe: what is planned, charged and recorded, and what is the same after a kill."""

import json
from collections import Counter

import pytest

from fedpress.errors import RecipeError
from fedpress.federation import Client
from fedpress.pipeline import recipe as recipes
from fedpress.pipeline.check import check_recipe
from fedpress.pipeline.keys import settings_of
from fedpress.pipeline.start import first_state, load_data
from fedpress.stages.federate.binding import bind
from tests.harness import Killed, checked, finish, tiered, told

HEAD = """
name = "uneven"
[data]
source = "digits"
num_clients = 8
examples_per_client = 40
public_share = 0.3
validation = 60
[model]
architecture = "mlp"
arguments = { in_features = 64, hidden = [16] }
"""
DELAYS = 'delays = { kind = "lognormal", median = 10.0 }\n'
BUFFERED = 'schedule = { kind = "buffered", buffer = 3, concurrency = 5 }\n' + DELAYS
CENTRAL = "[stage.privacy]\nunit = 'client'\ntrust = 'central'\nepsilon = 20.0\ndelta = 1e-3\n"
LOCAL = CENTRAL.replace("central", "local")
SAMPLE = "[stage.privacy]\nunit = 'sample'\nepsilon = 20.0\ndelta = 1e-4\n"
JOINT = "[stage.privacy]\nunit = 'sample'\ntrust = 'central'\nepsilon = 20.0\ndelta = 1e-4\n"
PRIVACY = {"open": "", "central": CENTRAL, "local": LOCAL, "sample": SAMPLE, "joint": JOINT}


def stage(keys="", privacy="", *, rounds=6):
    return f'{HEAD}[[stage]]\nkind = "federate"\nnum_rounds = {rounds}\nbatch_size = 16\n{keys}{privacy}'


def server_of(text):
    loaded = recipes.load(text, ())
    data = load_data(loaded)
    return bind(loaded.stage[0], first_state(loaded, data)).server


def tell(path):
    """Returns the records without what two equal runs may differ in."""
    return [{k: v for k, v in line.items() if k != "seconds"} for line in told(path)]


@pytest.mark.recipe
@pytest.mark.parametrize("kind", tiered(PRIVACY, quick=("central", "joint")))
def test_a_buffered_stage_spends_what_check_said_and_charges_every_task(kind, tmp_path):
    text = stage(BUFFERED, PRIVACY[kind])
    result, (facts,) = finish(text, tmp_path / "run"), checked(text)
    records = tell(tmp_path / "run")
    clock = [line["simulated_seconds"] for line in records]
    assert clock == sorted(clock)
    assert clock[0] > 0
    assert all(len(line["staleness"]) == 3 for line in records)
    assert any(any(line["staleness"]) for line in records)
    assert facts["schedule"] == "buffered"
    if kind == "open":
        return
    server, charged = server_of(text), Counter()
    asked = Counter(name for step in range(1, 7) for name in server.participation.asked(step))
    assert facts["most_tasks"] == max(asked.values())
    for charge in json.loads((tmp_path / "run" / "ledger.json").read_text())["charges"]:
        charged[charge["who"]] += charge["steps"]
    one_task = {name: cost.steps for name, cost in server.protection.costs.items()}
    assert charged == Counter({name: count * one_task[name] for name, count in asked.items()})
    assert result["final"]["epsilon"] == pytest.approx(facts["epsilon"], rel=1e-9)
    assert 0.9 * 20 < facts["epsilon"] <= 20 * (1 + 1e-9)


def test_no_task_of_a_buffered_stage_is_amplified_by_a_draw():
    for privacy in (CENTRAL, LOCAL):
        server = server_of(stage(BUFFERED, privacy))
        assert {cost.sampling_prob for cost in server.protection.costs.values()} == {1.0}
        assert server.uplink.divisor == 3


CODED = "error_feedback = true\nuplink = [{ kind = 'topk' }]\n"


@pytest.mark.recipe
@pytest.mark.parametrize(("kind", "keys"), [("open", ""), ("open", CODED), ("sample", "")])
def test_a_buffered_stage_that_is_killed_goes_on_to_the_same_bits(
    kind, keys, tmp_path, monkeypatch
):
    text, work = stage(BUFFERED + keys, PRIVACY[kind]), Client.answer
    finish(text, tmp_path / "whole")
    for answers in (8, 5):  # the kill comes in the middle of a step, after so many answers
        left = iter(range(answers))

        def dying(client, message, left=left):
            if message.kind == "fit" and next(left, None) is None:
                raise Killed
            return work(client, message)

        monkeypatch.setattr(Client, "answer", dying)
        with pytest.raises(Killed):
            finish(text, tmp_path / "killed", resume=(tmp_path / "killed").exists())
    monkeypatch.setattr(Client, "answer", work)
    finish(text, tmp_path / "killed", resume=True)
    assert tell(tmp_path / "killed") == tell(tmp_path / "whole")


def test_late_clients_are_told_by_name_with_the_seconds_that_they_needed(tmp_path):
    keys = "schedule = { kind = 'synchronous', deadline = 12.0 }\n" + DELAYS
    finish(stage(keys), tmp_path / "run")
    for line in tell(tmp_path / "run"):
        assert line["simulated_seconds"] == 12.0 * line["round"]
        assert line["refused"]
        assert all(why.startswith("late: its answer") for why in line["refused"].values())
        assert "staleness" not in line


def test_a_deadline_that_nobody_meets_ends_the_run_with_the_cure(tmp_path):
    keys = "schedule = { kind = 'synchronous', deadline = 0.001 }\n" + DELAYS
    with pytest.raises(
        Exception, match=r"in round 3.*late: .*raise stage\.federate\.schedule\.dead"
    ):
        finish(stage(keys), tmp_path / "run")


def test_clients_that_over_selection_does_not_need_are_no_failures(tmp_path):
    keys = "cohort = 4\nschedule = { kind = 'synchronous', over_selection = 2.0 }\n" + DELAYS
    result = finish(stage(keys), tmp_path / "run")
    assert result["final"]["failures"]["refused"] == 0
    assert result["final"]["failures"]["asked"] == 6 * 4
    assert all(len(line["spare"]) == 4 for line in tell(tmp_path / "run"))


@pytest.mark.recipe
def test_the_time_of_a_round_does_not_tell_whom_a_secret_draw_took(tmp_path):
    keys = "cohort = 4\nsampling = 'poisson'\n" + DELAYS
    finish(stage(keys, CENTRAL), tmp_path / "run")
    assert not any("simulated_seconds" in line for line in tell(tmp_path / "run"))


def test_plain_rounds_have_the_settings_and_records_of_runs_before_there_were_schedules(tmp_path):
    settings = settings_of(recipes.load(stage(), ()))["stage"][0]
    assert "schedule" not in settings
    assert "delays" not in settings
    finish(stage(rounds=1), tmp_path / "run")
    (line,) = told(tmp_path / "run")
    assert not line.keys() & {"simulated_seconds", "staleness", "spare"}


FIRST = "schedule = { kind = 'synchronous', over_selection = 1.5 }\n"
ADAPTIVE = CENTRAL + "adaptive = {}\n"
CORRELATED = CENTRAL + "correlated = { bands = 2 }\n"


@pytest.mark.parametrize(
    ("keys", "privacy", "words"),
    [
        (BUFFERED + 'sum = "secure"\n', "", "masks cancel only among clients"),
        (BUFFERED, CENTRAL.replace("central", "distributed"), "masks cancel only among clients"),
        (BUFFERED, ADAPTIVE, "were sent an older clip norm"),
        (BUFFERED, CORRELATED, "a fast client may be in every step"),
        (BUFFERED + "downlink = [{ kind = 'quantize', bits = 8 }]\n", "", "one model for each"),
        (BUFFERED + "cohort = 3\n", "", "leave cohort out"),
        (BUFFERED + "sampling = 'poisson'\n", "", "leave sampling out"),
        (BUFFERED.replace("buffer = 3", "buffer = 9"), "", "there are 8 clients"),
        (
            "schedule = { kind = 'synchronous', deadline = 2.0 }\n",
            "",
            "without simulated delays no client",
        ),
        (
            "cohort = 4\nsampling = 'poisson'\n" + FIRST + DELAYS,
            CENTRAL,
            "pushes another one out",
        ),
        ("sum = 'secure'\n" + FIRST, "", "plans noise and bits"),
    ],
)
def test_what_a_schedule_cannot_give_is_refused_before_the_run(keys, privacy, words):
    loaded = recipes.load(stage(keys, privacy), ())
    with pytest.raises(RecipeError, match=words):
        check_recipe(loaded, load_data(loaded))
