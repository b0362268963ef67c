from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test has its own cache folder, so that none reads or fills the user's."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("FEDPRESS_CACHE", str(folder))
    return folder
