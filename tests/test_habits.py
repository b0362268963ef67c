"""The files around the code agree: versions, tools and what is run for every commit."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def text(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


def test_the_version_is_the_same_in_the_package_the_changelog_and_the_citation():
    version = PROJECT["project"]["version"]
    newest, day = re.findall(
        r"^## \[(\d+\.\d+\.\d+)\] - (\d{4}-\d\d-\d\d)$", text("CHANGELOG.md"), re.M
    )[0]
    assert newest == version
    assert re.search(r"^version: (.*)$", text("CITATION.cff"), re.M)[1] == version
    assert re.search(r"^date-released: (.*)$", text("CITATION.cff"), re.M)[1] == day


def test_ruff_is_the_same_before_a_commit_and_in_the_tests():
    hook = re.search(r"ruff-pre-commit\n    rev: v(\S+)", text(".pre-commit-config.yaml"))[1]
    assert f"ruff=={hook}" in text("constraints.txt").splitlines()


def test_the_workflow_runs_what_must_pass_for_every_commit():
    assert re.search(r"run: \.ci/run$", text(".github/workflows/checks.yml"), re.M)
    steps = re.findall(r'^step "\$root/(\S+)" ?(.*)$', text(".ci/run"), re.M)
    assert steps == [
        ("scripts/test", ""),
        ("scripts/run", "digits"),
        ("scripts/test", "-m recipe"),
        ("scripts/test", "-n 0 -m deploy tests/deploy/test_network.py"),
        (
            "scripts/test",
            '-n 0 -m deploy tests/deploy/test_engines_agree.py -k "not deployment"',
        ),
    ]


def test_types_are_checked_strictly_and_warnings_are_errors():
    assert PROJECT["tool"]["mypy"]["strict"]
    assert PROJECT["tool"]["pytest"]["ini_options"]["filterwarnings"][0] == "error"
