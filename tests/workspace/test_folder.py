import json

import pytest

from fedpress.core.random import STREAMS
from fedpress.errors import RunError
from fedpress.workspace.folder import RunFolder, first_difference


def test_a_run_never_replaces_what_somebody_else_has_put_into_its_folder(tmp_path):
    RunFolder.create(tmp_path / "new", "x", {})
    with pytest.raises(RunError, match=r"already holds a run; give another out=$"):
        RunFolder.create(tmp_path / "new", "x", {})
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RunError, match="this is a file"):
        RunFolder.create(tmp_path / "file", "x", {})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "recipe.toml").write_text("mine")
    with pytest.raises(RunError, match="holds other files"):
        RunFolder.create(tmp_path / "full", "x", {})
    assert (tmp_path / "full" / "recipe.toml").read_text() == "mine"
    RunFolder.create(tmp_path / "full", "mine", {})  # left by a run that was killed at once


def test_there_must_be_a_run_to_resume_or_to_take_over(tmp_path):
    with pytest.raises(RunError, match="no run to resume"):
        RunFolder.resume(tmp_path, {})
    with pytest.raises(RunError, match="no run in this folder"):
        RunFolder.open(tmp_path / "nowhere")


def edited(place, streams):
    """A run whose settings were edited, with nothing that tells of it."""
    RunFolder.create(place, "x", {"stage": [{}]})
    (place / "settings.json").write_text(json.dumps({"stage": [{}], "streams": streams}))
    (place / "checksums").unlink()
    return {"stage": [{}]}


@pytest.mark.parametrize("streams", [None, "2", -1, 0, 2.0, True, [2]])
def test_a_version_of_streams_that_is_none_is_refused_with_its_place(tmp_path, streams):
    settings = edited(tmp_path / "run", streams)
    with pytest.raises(
        RunError, match=r"settings\.json: streams: got .*; start a new run with --out"
    ):
        RunFolder.resume(tmp_path / "run", settings)


def test_a_run_of_later_streams_is_refused_until_all_its_stages_are_done(tmp_path):
    settings = edited(tmp_path / "run", STREAMS + 1)
    (tmp_path / "run" / "result.json").write_text('{"finished": true}')
    with pytest.raises(RunError, match=f"random streams of version {STREAMS + 1}"):
        RunFolder.resume(tmp_path / "run", settings)
    (tmp_path / "run" / "stages" / "0-train").mkdir(parents=True)
    (tmp_path / "run" / "stages" / "0-train" / "result.json").write_text("{}")
    assert RunFolder.resume(tmp_path / "run", settings).streams == STREAMS + 1


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ({"a": 1}, {"a": 2}, "recipe.a was 1, now 2"),
        ({"a": {"b": [1, {"c": 2}]}}, {"a": {"b": [1, {"c": 3}]}}, "recipe.a.b[1].c was 2, now 3"),
        ({"a": [1]}, {"a": [1, 2]}, "recipe.a had 1 entries, now 2"),
        ({}, {"a": 1}, "recipe.a was null, now 1"),
        ({"a": {"b": 1}}, {"a": 5}, 'recipe.a was {"b": 1}, now 5'),
    ],
)
def test_the_first_difference_is_said_in_words(old, new, said):
    assert first_difference(old, new) == said
