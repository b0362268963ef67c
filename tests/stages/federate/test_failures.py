import json
from dataclasses import replace

import pytest

from fedpress.core import parameters
from fedpress.errors import TrainingError
from fedpress.federation import Start
from fedpress.federation.client_state import InMemoryState
from fedpress.federation.failures import Tally
from fedpress.pipeline import recipe as recipes
from fedpress.pipeline import run as runs
from fedpress.pipeline.keys import settings_of
from fedpress.pipeline.start import first_state, load_data
from fedpress.reports.detail_tables import failure_table
from fedpress.reports.html import write_report
from fedpress.reports.stage_table import stage_table
from fedpress.stages.federate.binding import bind
from fedpress.stages.federate.failures import PRIVATE, Failures, public_reasons, refusal_line
from fedpress.workspace.folder import RunFolder
from fedpress.workspace.state import Tick
from tests.harness import finish, told
from tests.stages.own_data import privacy, recipe

TRUSTS = [
    (unit, trust) for unit in ("sample", "client") for trust in ("local", "distributed", "central")
]


def warned(text, path):
    """Runs to the end; returns the result and every warning on the way."""
    loaded = recipes.load(text, ())
    folder = RunFolder.create(path, text, settings_of(loaded))
    events = list(runs.execute(loaded, folder, load_data(loaded)))
    warnings = [event.warning for event in events if isinstance(event, Tick) and event.warning]
    return json.loads((path / "result.json").read_text()), warnings


def test_who_is_refused_is_told_after_the_round_counted_in_the_table_and_listed_in_the_report(
    tmp_path,
):
    result, warnings = warned(recipe("some_bad"), tmp_path / "run")
    first, last = warnings
    assert first.startswith(
        "round 1: 2 of 4 clients refused: c3 (IndexError: index out of range in self), c4 ("
    )
    assert last.startswith("warning: 6 of 12 answers of clients did not count")
    assert result["final"]["failures"]["clients"]["c3"] == {
        "rounds": 3,
        "reason": "IndexError: index out of range in self",
    }
    table = stage_table(result)
    assert dict(zip(table.header, table.rows[0], strict=True))["Failed"] == "6 of 12"
    page = write_report(tmp_path / "run").read_text()
    assert "Who failed" in page
    assert page.count("IndexError: index out of range in self") >= 2
    assert "6 of 12 answers of clients did not count" in page
    assert "c3" not in result["final"]["client_accuracy"]
    assert result["final"]["client_accuracy"]["c2"] > 0.9


def test_a_report_lists_the_refused_of_a_run_that_has_no_result_yet(tmp_path):
    warned(recipe("some_bad"), tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    assert "IndexError: index out of range in self" in write_report(tmp_path / "run").read_text()


def test_a_run_in_which_all_is_well_warns_of_nothing(tmp_path):
    result, warnings = warned(recipe(), tmp_path / "run")
    assert warnings == []
    assert "Failed" not in stage_table(result).header
    assert failure_table(result["stages"]).rows == []
    assert "Who failed" not in write_report(tmp_path / "run").read_text()


@pytest.mark.recipe
@pytest.mark.parametrize(("unit", "trust"), TRUSTS)
def test_under_privacy_failures_are_counted_with_noise_and_a_third_of_them_warns(
    unit, trust, tmp_path
):
    # Twelve counts, each with noise of 0.1: six standard deviations lie within 35% of 6.
    private = privacy(unit, trust, noise=0.1)
    result, warnings = warned(recipe("some_bad", stage=private), tmp_path / "run")
    counted = result["final"]["failures"]["counted"]
    assert counted["failed"] == pytest.approx(counted["of"] / 2, rel=0.35)
    assert counted["failed"] != round(counted["failed"])
    assert counted["sure"]
    assert all(
        "contributed nothing: the model could not run on them" in warning for warning in warnings
    )
    assert len(warnings) == 2  # as soon as it is sure, and at the end
    assert warnings[-1].startswith("warning: about")
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert not any(b"index out of range" in path.read_bytes() for path in files)
    assert "≈" in stage_table(result).rows[0][-2]
    assert result["final"]["accuracy"] > 0.6


@pytest.mark.parametrize(("unit", "trust"), TRUSTS)
def test_under_privacy_a_run_in_which_everything_fails_stops_and_says_so(unit, trust, tmp_path):
    with pytest.raises(
        TrainingError,
        match=r"contributed nothing up to round \d, .*: the model could not run on them",
    ):
        warned(recipe("all_bad", stage=privacy(unit, trust), rounds=9), tmp_path / "run")
    assert 1 <= len(told(tmp_path / "run")) <= 6


@pytest.mark.parametrize("trust", ["local", "central"])
def test_too_large_a_rate_under_client_privacy_names_its_setting(trust, tmp_path):
    text = recipe(stage=privacy("client", trust), lr=1e30, rounds=9)
    with pytest.raises(
        TrainingError, match=r"numbers were not finite; lower stage\.federate\.lr \(now 1e\+30\)"
    ):
        warned(text, tmp_path / "run")


@pytest.mark.parametrize(
    ("unit", "trust"), [("sample", "local"), ("sample", "central"), ("client", "central")]
)
def test_a_run_that_diverges_after_a_good_round_stops(unit, trust, tmp_path):
    words = r"numbers were not finite; lower stage\.federate\.lr \(now 0\.5\) or stage\.federate\.server\.lr"
    text = recipe(
        stage=f'{privacy(unit, trust)}\nserver = {{ kind = "average", lr = 1e38 }}', rounds=9
    )
    with pytest.raises(TrainingError, match=words):
        warned(text, tmp_path / "run")
    assert len(told(tmp_path / "run")) < 9


def test_too_large_a_rate_without_privacy_names_client_steps_and_setting(tmp_path):
    words = r"client c2: DivergedError: local update: after \d steps .* lower lr \(now 1e\+30\)"
    with pytest.raises(TrainingError, match=words):
        warned(recipe(lr=1e30), tmp_path / "run")


@pytest.mark.parametrize("trust", [None, "local", "central"])
@pytest.mark.parametrize("setting", ["proximal_mu", "weight_decay"])
def test_a_pull_that_is_too_strong_for_the_rate_is_named_too(setting, trust, tmp_path):
    stage = f"{setting} = 1e30\n" + (privacy("client", trust) if trust else "")
    words = rf"lower (stage\.federate\.)?lr \(now 0\.5\) or (stage\.federate\.)?{setting} \(now 1e\+30\)"
    with pytest.raises(TrainingError, match=words):
        warned(recipe(stage=stage, rounds=9, batch=5), tmp_path / "run")


@pytest.mark.recipe
def test_counts_survive_a_kill_to_the_bit(tmp_path):
    text = recipe("some_bad", stage=privacy("sample", "local"), rounds=4)
    whole, _ = warned(text, tmp_path / "whole")
    loaded = recipes.load(text, ())
    folder = RunFolder.create(tmp_path / "killed", text, settings_of(loaded))
    going = runs.execute(loaded, folder, load_data(loaded))
    next(event for event in going if isinstance(event, Tick) and event.done == 2)
    going.close()
    resumed = finish(text, tmp_path / "killed", resume=True)
    assert resumed["final"]["failures"] == whole["final"]["failures"]
    assert resumed["final"]["accuracy"] == whole["final"]["accuracy"]
    counts = [
        [record["failures"] for record in told(tmp_path / name)] for name in ("whole", "killed")
    ]
    assert counts[0] == counts[1]


def test_a_last_batch_of_one_drops_no_client(tmp_path):
    result, warnings = warned(
        recipe("odd", "normed", 'norm = "batch"', batch=8, lr=0.01), tmp_path / "run"
    )
    assert warnings == []
    assert result["final"]["failures"]["refused"] == 0


@pytest.mark.recipe
@pytest.mark.parametrize("model", ["Squeezes", "InPairs"])
@pytest.mark.parametrize("stage", ["", privacy("sample", "central")])
def test_a_network_that_takes_no_batch_of_one_trains_and_is_measured(model, stage, tmp_path):
    result, warnings = warned(recipe("odd", model, stage, batch=8, lr=0.2), tmp_path / "run")
    assert warnings == []
    assert result["final"]["failures"]["refused"] == 0
    assert result["final"]["macs"] == 6 * 8 + 8 * 2
    assert result["final"]["latency_ms"] > 0


def test_a_client_with_one_example_under_batch_norm_is_told(tmp_path):
    _, warnings = warned(recipe("lone", "normed", 'norm = "batch"', batch=8), tmp_path / "run")
    assert (
        "c3 (TrainingError: local update: a batch norm in training mode cannot average over a batch of one example"
        in warnings[0]
    )
    assert "norm = 'frozen'" in warnings[0]
    _, warnings = warned(
        recipe("lone", "normed", 'norm = "frozen"', batch=8, lr=0.01), tmp_path / "frozen"
    )
    assert warnings == []


def test_noise_alone_is_not_taken_for_failures():
    noise = Failures(counted=Tally(2.0, -1.5), of=4.0, variance=1.0)
    assert not noise.significant
    assert not noise.all_failing
    assert not replace(noise, recent=((2.0, -1.5, 4.0, 1.0),)).all_failing
    assert noise.warning("client") == ""
    assert Failures(counted=Tally(0, 60.0), of=100.0, variance=4.0).significant


def test_a_run_stops_when_its_last_rounds_fail_also_if_the_first_went_well():
    good, bad, half = (0.3, -0.2, 100.0, 4.0), (99.0, 1.5, 100.0, 4.0), (50.0, 0.0, 100.0, 4.0)
    assert Failures(recent=(bad,)).all_failing
    assert Failures(recent=(*[good] * 9, bad)).all_failing
    assert not Failures(recent=(bad, good)).all_failing
    assert not Failures(recent=(half,) * 9).all_failing
    faint = (4.1, 0.5, 4.0, 4.0)  # 4 clients, noise of 2: no single round says is_finished
    assert not Failures(recent=(faint,)).all_failing
    assert Failures(recent=(faint,) * 30).all_failing


def test_failures_are_read_back_as_they_were_written():
    full = Failures(5, {"a": (2, "why")}, Tally(0.5, 1.5), 7.0, 2.0, ((0.5, 1.5, 7.0, 2.0),))
    assert Failures.from_json(json.loads(json.dumps(full.to_json()))) == full
    assert Failures.from_json({}) == Failures()


def test_a_line_names_a_few_clients_and_counts_the_rest():
    refused = {f"c{i}": "why" for i in range(5)}
    assert refusal_line(refused, 6, 2) == (
        "round 2: 5 of 6 clients refused: c0 (why), c1 (why), c2 (why), and 2 more"
    )
    assert refusal_line({}, 1, 1) == ""


def test_a_secret_cohort_is_not_counted_out(tmp_path):
    stage = 'cohort = 2\nsampling = "poisson"\n' + privacy("client", "central")
    result, _ = warned(recipe("some_bad", stage=stage, rounds=7), tmp_path / "run")
    assert result["final"]["failures"]["asked"] == 14
    assert result["final"]["failures"]["counted"]["of"] == 14
    for line in told(tmp_path / "run"):
        assert line["failures"]["failed"] != round(line["failures"]["failed"])


class Full(InMemoryState):
    """A disk without room."""

    def save_entry(self, name, tensors):
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize(("unit", "trust"), [case for case in TRUSTS if case[1] != "central"])
def test_a_fault_of_a_client_that_says_nothing_of_its_examples_is_told_also_under_privacy(
    unit, trust
):
    loaded = recipes.load(recipe(stage=privacy(unit, trust)), ())
    state = first_state(loaded, load_data(loaded))
    federation = bind(loaded.stage[0], state)
    server, broken = federation.server, federation.clients["c3"]
    broken.client = replace(broken.client, memory=Full())
    going = server.rounds(Start(parameters.flatten(server.model)))
    reasons = public_reasons(next(going).refused, server)
    assert "No space left on device" in reasons["c3"]


def test_what_went_wrong_on_private_examples_stays_private():
    loaded = recipes.load(recipe(stage=privacy("sample", "local")), ())
    server = bind(loaded.stage[0], first_state(loaded, load_data(loaded))).server
    reasons = {
        "a": "TrainingError: local update: failed with ValueError; what on stays private",
        "b": "ValueError: 17 is no label",
        "c": "no reply came; see whether the client is still running",
        "d": "WireError: fit.agreement: the server works with other settings",
        "e": "update.round: got 3, expected 2",
    }
    assert public_reasons(reasons, server) == reasons | {"a": PRIVATE, "b": PRIVATE}
