"""What a run notes about its machine and source; asking for it changes nothing."""

import subprocess

import fedpress
from fedpress.pipeline.environment import environment


def git(folder, *words):
    who = ("-c", "user.name=a", "-c", "user.email=a@b")
    return subprocess.run(
        ["git", *who, "-C", str(folder), *words], check=True, capture_output=True, text=True
    ).stdout.strip()


def test_the_commit_is_named_and_a_full_disk_leaves_no_lock(tmp_path, monkeypatch, small_files):
    source = tmp_path / "fedpress" / "__init__.py"
    source.parent.mkdir()
    source.write_text("")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "first")
    commit = git(tmp_path, "rev-parse", "--short=10", "HEAD")
    monkeypatch.setattr(fedpress, "__file__", str(source))
    # Written again: git has to look whether its content has changed.
    source.write_text("")
    small_files(50)
    found = environment("fedpress run")["commit"]
    small_files(-1)
    assert found == commit
    assert not (tmp_path / ".git" / "index.lock").exists()
    source.write_text("x = 1\n")
    assert environment("fedpress run")["commit"] == f"{commit}-dirty"
