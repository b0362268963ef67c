"""What the pages show is done from top to bottom, as a reader would type it, or at least read."""

import re
import tomllib

import pytest

from fedpress.network import policy as policies
from fedpress.network.folders import ClientConfig
from fedpress.pipeline import recipe as recipes
from tests import pages

SECTIONS = ("docs/models.md",)
"""Pages whose sections stand on their own; tests/data/test_page.py does those of docs/data.md."""
DONE_ELSEWHERE = {
    "README.md": "tests/test_readme.py",
    "docs/adding-a-stage.md": "tests/stages/test_table.py",
    "docs/adding.md": "tests/transport/test_page.py",
    "docs/algorithms.md": "tests/federation/algorithms/test_page.py",
    "docs/data.md": "tests/data/test_page.py",
    "docs/inputs.md": "tests/test_inputs_page.py",
    "docs/tasks.md": "tests/tasks/test_page.py",
    "docs/training.md": "tests/training/test_page.py",
}
"""Page -> the test that runs its Python."""
SESSIONS = (
    "docs/devices.md",
    "docs/pruning.md",
    "docs/python.md",
    "docs/quantization.md",
    "docs/sparsity.md",
)
"""Pages whose Python is one session."""
BEFORE = {
    "name": 'name = "shown"\n',
    "data": '[data]\nsource = "digits"\n',
    "model": '[model]\narchitecture = "cnn"\narguments = { in_channels = 1, image_size = 8 }\n',
    "stage": '[[stage]]\nkind = "federate"\n',
}
"""What a part of a recipe needs before it to be a whole one."""


@pytest.mark.recipe
def test_the_session_of_the_page_on_python_runs(shell, tmp_path, capsys):
    made = pages.do(pages.blocks("docs/python.md"), shell)
    assert (tmp_path / "model.onnx").stat().st_size > 1000
    assert made["together"].after["accuracy"] > 0.6
    assert made["run"].finished
    assert capsys.readouterr().out.endswith(
        "keep_param: no such key; did you mean 'keep_params'?\n"
    )


@pytest.mark.recipe
@pytest.mark.parametrize("page", [page for page in SESSIONS if page != "docs/python.md"])
def test_the_python_of_the_page_is_one_session(page, shell):
    pages.do([block for block in pages.blocks(page) if block.language == "python"], shell)


def sections():
    found = []
    for page in SECTIONS:
        for block in pages.blocks(page):
            if block.language and (page, block.section) not in found:
                found.append((page, block.section))
    return found


@pytest.mark.recipe
@pytest.mark.parametrize(("page", "section"), sections())
def test_each_section_of_the_page_runs_on_its_own(page, section, shell, capsys):
    found = [block for block in pages.blocks(page) if block.section == section]
    pages.do(found, shell)


@pytest.mark.parametrize("block", pages.all_blocks("python"), ids=str)
def test_python_is_run_by_a_test_or_says_that_it_is_a_sketch(block):
    compile(block.body, str(block), "exec")
    here = block.page in (*SECTIONS, *SESSIONS)
    assert here or block.page in DONE_ELSEWHERE or block.body.startswith(pages.SKETCH)


def test_what_is_quoted_from_the_source_stands_there():
    quoted = [b for b in pages.all_blocks("python") if b.body.startswith(pages.QUOTE)]
    assert quoted
    for block in quoted:
        first, _, body = block.body.partition("\n")
        source = (pages.ROOT / first.removeprefix("# ")).read_text("utf-8")
        lines = {*source.splitlines()}
        assert [line for line in body.splitlines() if line not in lines] == []


@pytest.mark.parametrize("block", pages.all_blocks("toml"), ids=str)
def test_every_recipe_has_keys_that_are_known(block):
    given = tomllib.loads(block.body)
    text = block.body
    if text.startswith("# policy.toml"):
        policies.parse(text)
        return
    if text.startswith("# client.toml"):
        ClientConfig.model_validate(given)
        return
    if not {"stage", "data", "model"} & {*given}:
        text = BEFORE["stage"] + text  # keys of a stage alone
        given["stage"] = []
    if "stage" not in given:
        text = text + BEFORE["stage"]
    # Top-level keys come first in TOML, so tables that are missing go behind those that are there.
    whole = ("" if "name" in given else BEFORE["name"]) + text
    for table in ("data", "model"):
        if table not in given:
            whole += BEFORE[table]
    assert recipes.load(whole).stage


def options(command):
    found = set()
    for parameter in command.params:
        found.update(parameter.opts, parameter.secondary_opts)
    return found


def shown_commands():
    """Returns page and words of each command of the pages, in blocks and in lines of text."""
    found = []
    for path in pages.PAGES:
        text = path.read_text("utf-8")
        lines = [block.body for block in pages.blocks(str(path.relative_to(pages.ROOT)))]
        for line in re.findall(r"`(fedpress [^`\n]+)`", text):
            # A word of the format, in the header of its files.
            if line != "fedpress packed model":
                lines.append(f"{line}\n")
        for words in pages.commands("\n".join(lines)):
            found.append((path.name, words))
    return found


@pytest.mark.recipe
def test_every_command_and_option_of_the_pages_exists():
    from typer.main import get_command

    from fedpress.cli import app

    wrong = []
    for page, (_, *words) in shown_commands():
        command = get_command(app)
        while words and words[0] in options(command):
            words.pop(0)
        # `fedpress client --data PATH` has options of its own beside its commands.
        while words and hasattr(command, "commands") and not words[0].startswith("--"):
            name = words.pop(0)
            if name not in command.commands:
                wrong.append(f"{page}: no command {name}")
                break
            command = command.commands[name]
        else:
            given = [word.strip("[]").partition("=")[0] for word in words]
            known = {*options(command), "--help"}
            wrong += [
                f"{page}: {command.name} {w}" for w in given if w[:2] == "--" if w not in known
            ]
    assert not wrong


def test_the_pages_that_run_exist():
    assert all((pages.ROOT / page).is_file() for page in [*SECTIONS, *SESSIONS, *DONE_ELSEWHERE])
    assert all((pages.ROOT / test).is_file() for test in DONE_ELSEWHERE.values())
