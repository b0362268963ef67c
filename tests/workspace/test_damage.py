"""Run folders that a disk has damaged: every file is noticed, refused by name, and the cure that is said works."""

import json
import shutil
import threading

import pytest

from fedpress import storage
from fedpress.errors import FedpressError, RunError
from fedpress.pipeline import recipe as recipes
from fedpress.pipeline import run as runs
from fedpress.pipeline.environment import environment, write_environment
from fedpress.pipeline.keys import settings_of
from fedpress.pipeline.start import load_data
from fedpress.reports.html import write_report
from fedpress.workspace.folder import RunFolder
from fedpress.workspace.state import Tick

KILLED = ["recipe.toml", "settings.json", "environment.json", "records.jsonl", "result.json"]
KILLED += [
    "stages/2-federate/progress.safetensors",
    "stages/0-train/model.safetensors",
    "stages/0-train/spec.json",
]
KILLED += ["stages/0-train/result.json", "stages/1-prune/plan.json"]
SLOW = [name for at, name in enumerate(KILLED) if at not in (3, 5)]
DONE = [
    "ledger.json",
    "artifacts/model.onnx",
    "stages/2-federate/result.json",
    "stages/3-export/model.safetensors",
]


def begun(text, path, *, resume=False, reuse=None):
    recipe = recipes.load(text)
    settings = settings_of(recipe)
    folder = RunFolder.resume(path, settings) if resume else RunFolder.create(path, text, settings)
    write_environment(folder, "test")
    return runs.execute(recipe, folder, load_data(recipe), reuse=reuse)


def finish(text, path, **how):
    for _ in begun(text, path, **how):
        pass


@pytest.fixture(scope="module")
def plain(tiny_export):
    """The recipe without privacy, so that nothing but a checksum can notice changed weights."""
    return tiny_export.replace('privacy = { unit = "sample", epsilon = 8.0, delta = 1e-3 }', "")


@pytest.fixture(scope="module")
def whole(plain, tmp_path_factory):
    path = tmp_path_factory.mktemp("damage") / "whole"
    finish(plain, path)
    return path


@pytest.fixture(scope="module")
def killed(plain, whole, tmp_path_factory):
    """The same run, stopped after its second round."""
    path = tmp_path_factory.mktemp("damage") / "killed"
    for event in begun(plain, path):
        if isinstance(event, Tick) and event.note.startswith("round 3/3"):
            break
    assert (path / KILLED[5]).exists()
    return path


@pytest.fixture(scope="module")
def private(tiny_export, tmp_path_factory):
    path = tmp_path_factory.mktemp("damage") / "private"
    finish(tiny_export, path)
    return path


def flip(path, where=0.9):
    raw = bytearray(path.read_bytes())
    raw[int(len(raw) * where)] ^= 0x01
    path.write_bytes(raw)


def refused(text, path, name):
    with pytest.raises(FedpressError) as caught:
        finish(text, path, resume=True)
    said = str(caught.value)
    assert f"/{name}: corrupt" in said
    return said


def copied(run, tmp_path):
    return shutil.copytree(run, tmp_path / "run")


@pytest.mark.parametrize("where", [pytest.param(0.3, marks=pytest.mark.recipe), 0.9999])
@pytest.mark.parametrize(
    "name", [KILLED[3], KILLED[5], *(pytest.param(x, marks=pytest.mark.recipe) for x in SLOW)]
)
def test_a_flipped_bit_is_refused_by_name_and_the_cure_works(
    plain, killed, whole, tmp_path, left, name, where
):
    path = copied(killed, tmp_path)
    flip(path / name, where)
    said = refused(plain, path, name)
    if name == "settings.json":
        assert "start a new run with --out NEW (it can copy the finished" in said
        assert f"fedpress run RECIPE --from {path})" in said
        finish(plain, tmp_path / "new", reuse=RunFolder.open(path))
        assert left(tmp_path / "new") == left(whole)
        return
    if "delete this file" in said or "move it away" in said:
        (path / name).unlink()
    else:
        assert f"delete '{(path / name).parent / 'result.json'}' to do the stage again" in said
        ((path / name).parent / "result.json").unlink()
    finish(plain, path, resume=True)
    mine, right = left(path), left(whole)
    for gone in ("recipe.toml", "records.jsonl", *(n for n in right if n.endswith("result.json"))):
        (
            mine.pop(gone, None),
            right.pop(gone, None),
        )  # records begin again; results say how many there are
    assert mine == right
    finish(plain, path, resume=True)


@pytest.mark.recipe
@pytest.mark.parametrize("name", DONE)
def test_a_flipped_bit_of_a_finished_run_is_refused_too(tiny_export, private, tmp_path, name):
    path = copied(private, tmp_path)
    flip(path / name)
    said = refused(tiny_export, path, name)
    if "delete this file" in said:
        (path / name).unlink()
        finish(tiny_export, path, resume=True)
        assert (path / name).exists()


@pytest.mark.recipe
def test_whoever_reads_a_damaged_file_says_so(private, tmp_path):
    path = copied(private, tmp_path)
    flip(path / "stages/3-export/model.safetensors")
    with pytest.raises(
        FedpressError, match=r"3-export/model.safetensors: corrupt \(its content is not"
    ):
        storage.load(path)
    for name in ("records.jsonl", "result.json", "ledger.json", "settings.json"):
        path = shutil.copytree(private, tmp_path / name)
        flip(path / name)
        with pytest.raises(RunError, match=f"{name}: corrupt .* move it away"):
            write_report(path)
        (path / name).unlink()
        write_report(path)


@pytest.mark.parametrize(
    "listed",
    [
        pytest.param(True, id="with checksums"),
        pytest.param(False, id="of an older fedpress", marks=pytest.mark.recipe),
    ],
)
def test_lost_records_are_noticed_and_ones_too_many_are_not(
    plain, killed, whole, tmp_path, left, listed
):
    path = copied(killed, tmp_path)
    if not listed:
        (path / "checksums").unlink()
    records = path / "records.jsonl"
    lines = records.read_bytes().splitlines(keepends=True)
    for less in (lines[:-1], lines[:1], []):
        records.write_bytes(b"".join(less))
        said = refused(plain, path, "records.jsonl")
        assert "delete this file to go on without the records so far" in said
    records.write_bytes(b"".join([*lines, lines[-1], b'{"stage": 2, "rou']))
    finish(plain, path, resume=True)
    assert left(path) == left(whole)


@pytest.mark.parametrize(
    "key", ["key", "records", "result", "kind", "name", "seconds", "accuracy", "parameters"]
)
def test_a_result_without_a_key_is_refused_also_of_an_older_fedpress(plain, killed, tmp_path, key):
    path = copied(killed, tmp_path)
    result = path / "stages/0-train/result.json"
    page = json.loads(result.read_text())
    (page if key in page else page["result"]).pop(key)
    result.write_text(json.dumps(page))
    refused(plain, path, "stages/0-train/result.json")
    (path / "checksums").unlink()
    with pytest.raises(
        RunError,
        match=rf"0-train/result.json: damaged: (result\.)?{key}.* is missing; delete this file",
    ):
        finish(plain, path, resume=True)


@pytest.mark.recipe
def test_a_run_of_an_older_fedpress_goes_on(plain, killed, whole, tmp_path, left):
    path = copied(killed, tmp_path)
    (path / "checksums").unlink()
    finish(plain, path, resume=True)
    mine, right = left(path), left(whole)
    assert mine.pop("checksums") == right.pop("checksums") == "there"
    assert mine == right


@pytest.mark.recipe
def test_a_damaged_list_is_told_and_can_be_deleted(plain, killed, tmp_path):
    path = copied(killed, tmp_path)
    log = path / "checksums"
    log.write_bytes(b"damage\n" + log.read_bytes())
    assert "delete this list; then the files are accepted" in refused(plain, path, "checksums")
    log.unlink()
    finish(plain, path, resume=True)


@pytest.mark.recipe
@pytest.mark.parametrize(
    "name", ["../../outside", "/etc/hostname", "../other/artifacts/model.onnx"]
)
def test_a_run_that_is_taken_over_writes_nothing_outside_of_the_new_one(
    tiny_export, private, tmp_path, name
):
    path = copied(private, tmp_path)
    (path / "checksums").unlink()
    result = path / "stages/3-export/result.json"
    page = json.loads(result.read_text())
    page["result"]["artifact"] = name
    result.write_text(json.dumps(page))
    with pytest.raises(RunError, match="lies outside of the run; leave out --from"):
        finish(tiny_export, tmp_path / "deep" / "new", reuse=RunFolder.open(path))
    assert not (tmp_path / "outside").exists()


def test_whoever_goes_on_elsewhere_is_told_that_bits_will_differ(
    plain, killed, tmp_path, monkeypatch
):
    path = copied(killed, tmp_path)
    folder = RunFolder.open(path)
    assert write_environment(folder, "again") == []
    now = environment("x")
    for key, value in {
        "threads": 97,
        "processor": "Z80",
        "torch": "1.0",
        "numpy": "0",
        "fedpress": "0",
    }.items():
        monkeypatch.setattr(
            "fedpress.pipeline.environment.environment",
            lambda command, device=None, k=key, v=value: now | {k: v, "command": command},
        )
        [said] = write_environment(folder, "again")
        was = now[key]["name"] if key == "processor" else now[key]
        assert f"{key} {was} before, {value} now" in said
        assert "its bits will differ" in said
        monkeypatch.setattr(
            "fedpress.pipeline.environment.environment", lambda command, device=None: now
        )
        [said] = write_environment(folder, "again")  # a part of it was done elsewhere
        assert f"{key} {was}, {value} before, {was} now" in said
        shutil.copyfile(killed / "environment.json", path / "environment.json")
    first = json.loads((path / "environment.json").read_text())
    (path / "environment.json").write_text(
        json.dumps({k: v for k, v in first.items() if k != "processor"})
    )
    (path / "checksums").unlink()
    assert write_environment(folder, "again") == []
    (path / "records.jsonl").unlink()
    [said] = write_environment(folder, "again")
    assert "records.jsonl is missing" in said


@pytest.mark.recipe
def test_a_second_process_on_a_run_is_refused(plain, killed, tmp_path):
    path = copied(killed, tmp_path)
    running = begun(plain, path, resume=True)
    next(running)
    said = []

    def second():
        for way in ({"resume": True}, {}):
            try:
                finish(plain, path, **way)
            except RunError as error:
                said.append(str(error))

    thread = threading.Thread(target=second)
    thread.start()
    thread.join()
    assert len(said) == 2
    assert all(f"{path}: process " in words and "works in this folder" in words for words in said)
    running.close()
    finish(plain, path, resume=True)
