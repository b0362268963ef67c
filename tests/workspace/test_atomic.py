import errno
import json
import math
import os
from pathlib import Path

import pytest

from fedpress.errors import RunError
from fedpress.workspace.atomic import read_json, replacing, write_json, writing


def half_written(path: Path, error: Exception) -> None:
    with replacing(path) as temporary:
        temporary.write_text("half")
        raise error


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_one_sentence_and_leaves_the_old_file(tmp_path, number):
    path = tmp_path / "x"
    path.write_text("old")
    with pytest.raises(
        RunError,
        match=r"x: cannot be written \(.*\).*free some space \(finished stages are kept\)$",
    ):
        half_written(path, OSError(number, os.strerror(number)))
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOTDIR])
def test_a_place_that_cannot_be_written_says_where_else_to_go(tmp_path, number):
    with (
        pytest.raises(RunError, match=f"{os.strerror(number)}.*choose another place with out="),
        writing(tmp_path),
    ):
        raise OSError(number, os.strerror(number))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_json_holds_null_for_what_it_cannot_say(tmp_path, value):
    write_json(tmp_path / "x.json", {"a": [value, {"b": (value, 1)}], "c": 0.5})
    assert json.loads((tmp_path / "x.json").read_text()) == {
        "a": [None, {"b": [None, 1]}],
        "c": 0.5,
    }


@pytest.mark.parametrize(
    ("text", "said"), [("{", "not valid JSON"), ("[1]", "expected a JSON object"), ("", "JSON")]
)
def test_damaged_json_is_named_with_its_cure(tmp_path, text, said):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(RunError, match=f"x.json: .*{said}.*burn it"):
        read_json(path, cure="burn it")
    with pytest.raises(RunError, match="no such file"):
        read_json(tmp_path / "y.json")
