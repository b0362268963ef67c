import json
import os

import pytest

from fedpress.errors import RecipeError
from fedpress.transport.engine import engine_settings
from fedpress.transport.processes import settings
from fedpress.transport.processes.settings import ProcessSettings, cores


@pytest.fixture
def group(tmp_path, monkeypatch):
    monkeypatch.setattr(settings, "GROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    return tmp_path


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (None, 8),
        ("max 100000\n", 8),
        ("200000 100000\n", 2),
        ("250000 100000\n", 2),
        ("20000 100000\n", 1),
        ("6400000 100000\n", 8),
        ("", 8),
        ("100000 0\n", 8),
    ],
)
def test_a_container_may_have_fewer_cores_than_the_machine(group, limit, expected):
    if limit is not None:
        (group / "cpu.max").write_text(limit)
    assert cores() == expected


@pytest.mark.parametrize(("quota", "expected"), [("-1", 8), ("300000", 3)])
def test_the_older_files_of_a_container_are_read(group, quota, expected):
    (group / "cpu").mkdir()
    (group / "cpu/cpu.cfs_quota_us").write_text(quota + "\n")
    (group / "cpu/cpu.cfs_period_us").write_text("100000\n")
    assert cores() == expected


def test_more_workers_than_the_container_has_cores_are_refused_with_a_cure_that_works(group):
    (group / "cpu.max").write_text("300000 100000")
    with pytest.raises(RecipeError, match="got 4, but this process may use 3 cores") as error:
        engine_settings({"workers": 4})
    cure = str(error.value).partition("engine=")[2]
    assert engine_settings(json.loads(cure)) == ProcessSettings(workers=3)
