import os

import numpy as np

from fedpress.data import cache


def counting(calls: list[int]):
    def decode() -> dict[str, np.ndarray]:
        calls.append(1)
        return {"x": np.arange(3)}

    return decode


def test_files_are_decoded_once_and_again_when_they_change(tmp_path):
    file, calls = tmp_path / "a.bin", []
    file.write_bytes(b"1")
    for _ in range(3):
        assert cache.decoded("a", [file], counting(calls))["x"].tolist() == [0, 1, 2]
    assert len(calls) == 1
    os.utime(file, ns=(1, 1))
    cache.decoded("a", [file], counting(calls))
    assert len(calls) == 2


def test_a_corrupt_cache_is_decoded_again_and_repaired(tmp_path, cache_folder):
    file, calls = tmp_path / "a.bin", []
    file.write_bytes(b"1")
    cache.decoded("a", [file], counting(calls))
    (stored,) = (cache_folder / "decoded").iterdir()
    stored.write_bytes(stored.read_bytes()[:-30])
    for _ in range(2):
        assert cache.decoded("a", [file], counting(calls))["x"].tolist() == [0, 1, 2]
    assert len(calls) == 2


def test_a_cache_folder_that_cannot_be_written_is_no_failure(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("FEDPRESS_CACHE", str(tmp_path / "file"))  # a file where a folder is needed
    assert cache.decoded("a", [tmp_path / "file"], counting([]))["x"].tolist() == [0, 1, 2]


def test_a_failed_write_leaves_no_half_file(tmp_path, cache_folder, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    (tmp_path / "a").write_bytes(b"1")
    assert cache.decoded("a", [tmp_path / "a"], counting([]))["x"].tolist() == [0, 1, 2]
    assert list((cache_folder / "decoded").iterdir()) == []
