"""The log: silent unless somebody asks, and silent about what is private."""

import json
import logging
import subprocess
import sys

import pytest

from tests.harness import finish

PRIVATE_ROWS = 61  # of each client: a number that nothing else in the recipe has
PRIVATE = """
name = "quiet"
[data]
source = "digits"
num_clients = 3
examples_per_client = 61
public_share = 0.2
validation = 30
[model]
architecture = "mlp"
arguments = { in_features = 64, hidden = [12] }
[[stage]]
kind = "train"
epochs = 1
batch_size = 64
[[stage]]
kind = "federate"
num_rounds = 2
privacy = { unit = "client", noise_multiplier = 1.0 }
"""


def lines(caplog):
    return [r.getMessage() for r in caplog.records if r.name.startswith("fedpress")]


@pytest.mark.recipe
def test_a_run_tells_what_somebody_needs_who_looks_for_a_fault(tiny, tmp_path, caplog):
    with caplog.at_level(logging.DEBUG, "fedpress"):
        finish(tiny, tmp_path / "a")
        finish(tiny, tmp_path / "b", reuse=tmp_path / "a")
    said = lines(caplog)
    for words in (
        "device cpu (auto in the recipe)",
        "data come from digits",
        "stage train (train) begins on cpu",
        "training on cpu in float32 with sgd",
        "stage federate has ended after",
        "stage prune is taken over from",
    ):
        assert any(words in line for line in said), words
    assert sum("checkpoint written" in line for line in said) >= 2 + 3  # epochs and rounds


def test_the_log_holds_no_number_of_private_rows_and_no_secret(tmp_path, caplog):
    with caplog.at_level(logging.DEBUG, "fedpress"):
        finish(PRIVATE, tmp_path / "a")
    said = " ".join(lines(caplog)).replace(str(tmp_path), "")
    assert "federate" in said
    for word in (str(PRIVATE_ROWS), str(3 * PRIVATE_ROWS), "secret", "seed"):
        assert word not in said


@pytest.mark.recipe
def test_nothing_is_said_unless_somebody_asks(tiny_file):
    code = (
        "import sys; sys.path.insert(0, '.')\n"
        "from tests.harness import finish\n"
        f"finish(open({str(tiny_file)!r}).read(), __import__('pathlib').Path({str(tiny_file.parent / 'a')!r}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.parametrize("word", ["-v", "--verbose"])
@pytest.mark.parametrize("first", [True, False])
def test_verbose_shows_the_log_on_the_error_stream(shell, tiny_file, word, first):
    words = ["check", tiny_file, "--json"]
    said = shell(word, *words) if first else shell(*words, word)
    assert said.code == 0
    assert "fedpress.pipeline.start: device cpu (auto in the recipe)" in said.err
    json.loads(said.out)
    assert "device" not in shell(*words).err


def test_a_command_leaves_the_log_of_the_process_as_it_was(shell, tiny_file):
    log = logging.getLogger("fedpress")
    before = (log.level, list(log.handlers), logging.root.level, logging.root.manager.disable)
    shell("check", tiny_file, "-v")
    shell("check", tiny_file)
    after = (log.level, list(log.handlers), logging.root.level, logging.root.manager.disable)
    assert after == before
