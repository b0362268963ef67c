import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from safetensors import SafetensorError

from fedpress.core import files
from fedpress.core.files import replacing, writing
from fedpress.errors import DataError, ModelError, RunError


def half_written(path: Path, error: Exception, **how: bool) -> None:
    with replacing(path, **how) as temporary:
        temporary.write_text("half")
        raise error


@pytest.mark.parametrize("how", [{}, {"durable": False}, {"shared": True}])
def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, how):
    path = tmp_path / "x"
    path.write_text("old")
    with pytest.raises(ValueError, match="stop"):
        half_written(path, ValueError("stop"), **how)
    assert path.read_text() == "old"
    with replacing(path, **how) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("durable", [True, False])
def test_only_what_must_survive_a_power_cut_waits_for_the_disk(tmp_path, monkeypatch, durable):
    synced = []
    monkeypatch.setattr(files, "sync", lambda path: synced.append(path.read_text()))
    with replacing(tmp_path / "x", durable=durable) as temporary:
        temporary.write_text("new")
    assert synced == (["new"] if durable else [])


def test_many_writers_of_a_shared_file_leave_one_whole(tmp_path):
    path, texts = tmp_path / "x", [f"{n}" * 100_000 for n in range(8)]

    def write(text):
        with replacing(path, shared=True) as temporary:
            temporary.write_text(text)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, texts * 5))
    assert path.read_text() in texts
    assert os.listdir(tmp_path) == ["x"]


def test_what_a_link_beside_the_file_leads_to_is_not_written(tmp_path):
    other = tmp_path / "other"
    other.write_text("somebody's")
    (tmp_path / ".x.part").symlink_to(other)
    with replacing(tmp_path / "x") as temporary:
        temporary.write_text("new")
    assert other.read_text() == "somebody's"
    assert (tmp_path / "x").read_text() == "new"


def fails(error: Exception, **how: object) -> None:
    with writing(Path("x"), **how):
        raise error


@pytest.mark.parametrize("number", files.FULL)
@pytest.mark.parametrize("raises", [RunError, DataError, ModelError])
def test_a_full_disk_is_one_sentence_with_its_own_cure(number, raises):
    with pytest.raises(raises) as caught:
        fails(OSError(number, "?"), raises=raises, full="tidy up", other="go away")
    assert str(caught.value) == f"x: cannot be written ({os.strerror(number)}); tidy up"


def test_a_place_that_cannot_be_written_has_another_cure():
    with pytest.raises(RunError, match=r"^x: cannot be written \(Permission denied\); go away$"):
        fails(PermissionError(errno.EACCES, "?"), full="tidy up", other="go away")


@pytest.mark.parametrize(
    "words", ["I/O error: No space left on device (os error 28)", 'Os { code: 28, kind: "Full" }']
)
def test_the_number_in_the_words_of_safetensors_is_understood(words):
    with pytest.raises(RunError, match=r"No space left on device\); free some space$"):
        fails(SafetensorError(words))


def test_other_errors_pass_as_they_are():
    with pytest.raises(KeyError, match="key"):
        fails(KeyError("key"))
