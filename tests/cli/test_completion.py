"""What a shell is offered, asked as a shell asks: by its variables, in a process of its own."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedpress.cli import completion

ROOT = Path(__file__).parents[2]
COMMAND = "import sys; sys.argv[0] = 'fedpress'; from fedpress.cli import main; main()"


def offered(line, tmp_path, shell="bash"):
    """Returns the words that `shell` gets where the cursor stands at the end of the line."""
    words = line.split(" ")
    asked = {
        "_FEDPRESS_COMPLETE": f"complete_{shell}",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(words) - 1),
        "_TYPER_COMPLETE_ARGS": line,
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }
    done = subprocess.run(
        [sys.executable, "-c", COMMAND],
        env={**os.environ, **asked, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert not done.stderr
    return done.stdout.splitlines()


CASES = {
    "commands": ("fedpress spar", ["sparsify"]),
    "recipes": ("fedpress run dig", ["digits"]),
    "recipes here": ("fedpress check mi", ["mine.toml"]),
    "tables": ("fedpress run digits stage.fed", ["stage.federate."]),
    "keys": ("fedpress run mine.toml stage.warm.lr", [
        "stage.warm.lr=", "stage.warm.lr_schedule=", "stage.warm.lr_milestones=", "stage.warm.lr_gamma="]),
    "keys of any recipe": ("fedpress run none.toml stage.l0.den", ["stage.l0.density="]),
    "keys inside": ("fedpress sweep digits stage.federate.privacy.eps", ["stage.federate.privacy.epsilon="]),
    "keys of a command": ("fedpress prune mlp keep_", ["keep_params=", "keep_macs=", "keep_latency="]),
    "keys of the data": ("fedpress prune mlp data.test_", ["data.test_share=", "data.test_clients="]),
    "sources": ("fedpress train mlp --data c", ["cifar10", "csv"]),
    "devices": ("fedpress run digits --device cu", ["cuda", "cuda:1"]),
    "architectures": ("fedpress train resnet", ["resnet18", "resnet-small"]),
    "values": ("fedpress train mlp optimizer = ada", ["adamw", "adam"]),
    "all values": ("fedpress run digits seed = 1 device =", ["auto", "cpu", "cuda", "cuda:1", "mps"]),
    "tables to list": ("fedpress run --keys feder", ["federate"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_shell_is_offered_what_fits(case, tmp_path):
    (tmp_path / "mine.toml").write_text('[[stage]]\nkind = "train"\nname = "warm"\n')
    line, wanted = CASES[case]
    assert sorted(offered(line, tmp_path)) == sorted(wanted)


def test_a_shell_that_shows_meanings_gets_them_and_values(tmp_path):
    [line] = offered("fedpress train mlp bn_pen", tmp_path, "fish")
    assert line.startswith("bn_penalty=\tstrength of the L1 penalty")
    found = offered("fedpress train mlp optimizer=ad", tmp_path, "fish")
    assert [line.split("\t")[0] for line in found] == ["optimizer=adamw", "optimizer=adam"]
    [line] = offered("fedpress prune mlp data.class_weights=", tmp_path, "fish")
    assert line.startswith("data.class_weights=balanced")


def test_the_command_writes_the_script_that_a_shell_loads(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, "--show-completion", "bash"],
        env={**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1",
             "PYTHONPATH": str(ROOT)},
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "_FEDPRESS_COMPLETE=complete_bash" in done.stdout
    assert "complete -o default" in done.stdout


def test_the_keys_that_are_offered_are_those_of_recipes():
    spec = importlib.util.spec_from_file_location("keys", ROOT / "scripts" / "keys.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    lines = [line.split("\t") for line in module.text().splitlines()]
    wanted = [(name, tuple(filter(None, words.split(",")))) for name, words, _ in lines]
    known = completion.keys()
    found = [(key.name, key.choices) for key in known]
    assert found == wanted, "fedpress/cli/keys.txt is old; run: python scripts/keys.py"
    assert all(key.meaning for key in known if not key.choices)


def test_completing_loads_no_torch():
    code = "import sys, fedpress.cli; from fedpress.cli import completion; completion.keys(); "
    loaded = "print([m for m in ('torch', 'pydantic', 'tomllib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code + loaded], capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
