"""The files that start server and clients at boot are accepted by the programs that read them."""

import re
import shutil
import subprocess

import pytest

from fedpress.network import folders, units


@pytest.fixture
def made(tmp_path):
    out = tmp_path / "network"
    folders.init(out, ["client-1"], "server.example", 9443)
    return out


def written(folder):
    return [path for path in folder.rglob("*") if path.suffix == ".service"]


@pytest.mark.deploy
@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd-analyze")
def test_systemd_accepts_the_units(made, tmp_path):
    assert len(written(made)) == 2
    for path in written(made):
        # The program that a unit names must exist; `true` stands for it.
        text = re.sub(r"ExecStart=\S+", "ExecStart=/bin/true", path.read_text())
        copy = tmp_path / path.name
        copy.write_text(text)
        words = ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(copy)]
        done = subprocess.run(words, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")


def test_a_unit_may_write_where_ledger_and_state_lie(made):
    for path in written(made):
        text = path.read_text()
        (home,) = re.findall(r"^ReadWritePaths=(.*)$", text, re.MULTILINE)
        places = re.findall(r"XDG_\w+=(\S+)", text)
        (folder,) = re.findall(r"^WorkingDirectory=(.*)$", text, re.MULTILINE)
        assert len(places) == 2
        assert all(place.startswith(f"{home}/") for place in [*places, folder])


def test_an_image_keeps_nothing_that_must_outlive_its_container():
    for text in (units.server_dockerfile(9443), units.client_dockerfile()):
        assert "XDG_DATA_HOME=/network/" in text
        assert "XDG_STATE_HOME=/network/" in text
        assert 'VOLUME ["/network"' in text
        assert "COPY" not in text
        # The last user is not root.
        assert re.findall(r"^USER (.*)$", text, re.MULTILINE)[-1] == "fedpress"
