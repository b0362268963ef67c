import os
import re

import pytest

from fedpress.core import checksums
from fedpress.core.checksums import DamagedList, Line


def replaced(path, content):
    """Replaces a file as a run does: the list first, then the file."""
    part = path.with_name("part")
    part.write_bytes(content)
    checksums.add_line(path, part)
    os.replace(part, path)


def grown(path, more):
    start = path.stat().st_size if path.exists() else 0
    with open(path, "ab") as file:
        file.write(more)
    checksums.add_growth(path, start)


def test_every_flipped_bit_and_every_cut_of_a_replaced_file_is_noticed(tmp_path):
    path = tmp_path / "x"
    replaced(path, b"old, and longer than the new")
    replaced(path, content := bytes(range(40)))
    assert checksums.fault(path) is None
    for at in range(len(content)):
        for bit in range(8):
            path.write_bytes(content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :])
            assert "is not what was written" in checksums.fault(path)
        path.write_bytes(content[:at])
        assert f"it has {at} of 40 bytes" in checksums.fault(path)
    path.write_bytes(content + b"\n")
    assert checksums.fault(path)


def test_a_kill_between_the_list_and_the_file_is_no_damage(tmp_path):
    path = tmp_path / "x"
    replaced(path, b"first")
    part = tmp_path / "part"
    for number in range(3):  # each time killed before the file takes its place
        part.write_bytes(b"second %d" % number)
        checksums.add_line(path, part)
        assert checksums.fault(path) is None
    checksums.compact(tmp_path)
    assert [line.name for line in checksums.read_lines(tmp_path)] == ["x"]
    assert checksums.fault(path) is None


def test_every_change_of_a_growing_file_is_noticed_but_for_what_a_kill_has_added(tmp_path):
    path = tmp_path / "records.jsonl"
    for number in range(5):
        grown(path, b'{"n": %d}\n' % number)
    content = path.read_bytes()
    assert checksums.fault(path, grows=True) is None
    for at in range(len(content)):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        assert checksums.fault(path, grows=True)
        path.write_bytes(content[:at])
        assert checksums.fault(path, grows=True)
    lines = content.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2] + lines[3:]))
    assert checksums.fault(path, grows=True)
    path.write_bytes(
        content + b'{"n": 5}\n{"n"'
    )  # appended by a killed process, which could not list it any more
    assert checksums.fault(path, grows=True) is None
    replaced(path, content[:18])  # cut to the last checkpoint
    assert checksums.fault(path, grows=True) is None
    grown(path, b'{"n": 9}\n')
    assert checksums.fault(path, grows=True) is None
    path.write_bytes(content[:18])
    assert checksums.fault(path, grows=True)


def test_the_nearest_list_above_counts_and_files_without_a_line_pass(tmp_path):
    path = tmp_path / "stages" / "0-train" / "x"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"abc")
    assert checksums.fault(path) is None
    checksums.add_line(path, folder=tmp_path)
    assert checksums.read_lines(tmp_path)[0].name == "stages/0-train/x"
    assert checksums.fault(path) is None
    path.write_bytes(b"abd")
    assert checksums.fault(path)
    (path.parent / "y").write_bytes(b"abd")
    assert checksums.fault(path.parent / "y") is None


def test_a_torn_last_line_is_none_and_any_other_damage_of_the_list_is_told(tmp_path):
    path = tmp_path / "x"
    replaced(path, b"one")
    log = tmp_path / checksums.NAME
    whole = log.read_bytes()
    log.write_bytes(whole + whole[:20])
    assert checksums.fault(path) is None
    replaced(path, b"two")
    assert checksums.fault(path) is None
    assert len(checksums.read_lines(tmp_path)) == 2
    for damage in (b"", b"x" * 31, b"\xff" * 32 + b" 0 3", b"0" * 32 + b" 0 a x"):
        log.write_bytes(damage + b"\n" + whole)
        with pytest.raises(DamagedList, match="line 1"):
            checksums.read_lines(tmp_path)
        assert "is damaged (line 1)" in checksums.fault(path)


def test_tidying_forgets_what_is_gone_and_keeps_what_is_damaged(tmp_path):
    for name in ("a", "b", "c d"):
        for number in range(3):
            replaced(tmp_path / name, f"{name}{number}".encode())
    (tmp_path / "a").unlink()
    (tmp_path / "b").write_bytes(b"damage")
    checksums.compact(tmp_path)
    assert [line.name for line in checksums.read_lines(tmp_path)] == ["b", "b", "b", "c d"]
    assert checksums.fault(tmp_path / "b")
    assert checksums.fault(tmp_path / "c d") is None
    assert re.fullmatch(r"0{32}-[0-9a-f]{8} 0 3 c d\n", str(Line("0" * 32, 0, 3, "c d")))


def test_every_flipped_bit_of_the_list_itself_is_noticed(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("what it holds")
    checksums.add_line(path)
    whole = (tmp_path / "checksums").read_bytes()
    for at in range(8 * (len(whole) - 1)):
        damaged = bytearray(whole)
        damaged[at // 8] ^= 1 << at % 8
        (tmp_path / "checksums").write_bytes(damaged)
        with pytest.raises(checksums.DamagedList):
            checksums.read_lines(tmp_path)


def test_a_list_of_an_older_fedpress_has_lines_without_their_own_checksum(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("what it holds")
    line = Line.of(path, path.name)
    (tmp_path / "checksums").write_text(f"{line.digest} {line.start} {line.end} {line.name}\n")
    assert checksums.read_lines(tmp_path) == [line]
    assert checksums.fault(path) is None
    path.write_text("what it hold5")
    assert "is not what was written" in str(checksums.fault(path))
