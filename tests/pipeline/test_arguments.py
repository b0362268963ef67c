"""One table of arguments: Python, the recipe and the command line each are told their own words."""

import inspect

import pytest
import torch
import typer
from torch import nn

import fedpress
from fedpress.api.calls import call
from fedpress.cli import app
from fedpress.core import consent
from fedpress.errors import (
    Argument,
    DataError,
    FedpressError,
    ModelError,
    RecipeError,
    RunError,
    Shell,
)
from fedpress.pipeline import recipe as recipes
from fedpress.pipeline.arguments import (
    ROWS,
    command_place,
    errors_of_command,
    shell_place,
    shell_text,
)
from fedpress.pipeline.commands.subject import ChosenModel
from fedpress.pipeline.recipe import Override
from fedpress.stages.table import commands as rows_of_commands
from fedpress.workspace.folder import RunFolder

DATA = '[data]\nsource = "digits"\n[model]\narchitecture = "mlp"\n'


def in_the_shell(error):
    return error.sentence(shell_text, place=shell_place(error.place))


def options():
    """Flags and words in capitals of every command."""
    found = set()
    for name, command in typer.main.get_command(app).commands.items():
        for option in command.params:
            own = option.opts if option.param_type_name == "option" else [option.metavar or ""]
            found |= {(name, word.rstrip(".")) for word in own}
    return found


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_row_is_an_argument_a_flag_and_a_key_that_are_there(row):
    calls: set[str] = set()
    for function in (call, fedpress.measure, fedpress.predict, fedpress.run):
        calls |= inspect.signature(function).parameters.keys()
    # `engine.actors` is a key of the table that the argument `engine` takes.
    name = row.name.partition(".")[0]
    assert name in calls or name == "seeds"  # sweeps are begun on the command line alone
    assert row.flag in {flag for _, flag in options()}
    for key in row.keys:
        table, dot, word = key.partition(".")
        settings = recipes.Recipe.model_fields[table].annotation
        assert not dot or word in settings.model_fields


def test_no_command_has_a_setting_that_is_called_like_an_argument_of_all_commands():
    """An error that names one would be told as a flag."""
    for kind, row in rows_of_commands().items():
        assert not {row.name for row in ROWS} & set(row.load().model_fields), kind


def test_a_command_takes_every_flag_that_its_errors_may_name():
    of_one_model = {"--data", "--path", "--checkpoint", "--input", "--mean", "--std", "--out"}
    for kind in rows_of_commands():
        assert {(kind, flag) for flag in of_one_model | {"MODEL", "--allow-code"}} <= options()


@pytest.mark.parametrize(
    ("argument", "python", "shell"),
    [
        (Argument("input_shape", (3, 8, 8)), "input_shape=(3, 8, 8)", "--input 3,8,8"),
        (Argument("data", "cifar10"), 'data="cifar10"', "--data cifar10"),
        (Argument("data", "SOURCE"), "data=SOURCE", "--data SOURCE"),
        (Argument("checkpoint", "my w.pt"), 'checkpoint="my w.pt"', "--checkpoint 'my w.pt'"),
        (Argument("out"), "out=", "--out"),
        (Argument("model", "nets:net"), 'model="nets:net"', "nets:net"),
        (
            Argument("allow_code", ("a:f", "b:g")),
            'allow_code=("a:f", "b:g")',
            "--allow-code a:f --allow-code b:g",
        ),
        (Argument("keep_params", 0.5), "keep_params=0.5", "keep_params=0.5"),
        (Argument("int8", False), "int8=False", "int8=false"),
        (Argument("data.validation", 9), '**{"data.validation": 9}', "data.validation=9"),
        (Argument("recipe.data.path", "a b"), 'recipe.data.path = "a b"', "'data.path=a b'"),
        (Argument("recipe.stage[1].lr", 0.1), "recipe.stage[1].lr = 0.1", "stage.1.lr=0.1"),
        (Argument("recipe.stage[1].lr"), "recipe.stage[1].lr", "stage.1.lr"),
        (Shell("go on with --resume, or "), "", "go on with --resume, or "),
    ],
)
def test_an_argument_is_written_as_each_reader_writes_it(argument, python, shell):
    assert str(argument) == python
    assert shell_text(argument) == shell


def test_what_a_shell_is_told_can_be_read_back_as_an_override():
    for value in (0.5, True, 3, [1, 2], "a b"):
        argument = Argument("recipe.stage[0].x", value)
        word = shell_text(argument).strip("'")
        assert Override.parse(word) == Override("stage.0.x", value, word)


@pytest.mark.parametrize(
    ("place", "python"),
    [
        ("recipe.stage[0].privacy.delta", "privacy.delta"),
        ("recipe.stage[0]", "prune"),
        ("recipe.stage[0] (prune)", "prune"),
        ("recipe.stage[0] (prune): model", "prune: model"),
        ("recipe.data.source", "data"),
        ("recipe.data.mean[1]", "mean[1]"),
        ("recipe.data.validation", "data.validation"),
        ("recipe.model.weights", "checkpoint"),
        ("recipe.model.arguments.n", "model.arguments.n"),
        ("recipe.seed", "seed"),
        ("runs/a/result.json", "runs/a/result.json"),
    ],
)
def test_a_place_of_the_recipe_is_an_argument_of_the_command(place, python):
    assert command_place(place, "prune") == python


def test_where_all_data_are_public_more_data_take_the_place_of_a_share():
    cure = ("give public examples by ", Argument("recipe.data.public_share", 0.1))
    said = {}
    for all_public in (True, False):
        with pytest.raises(DataError) as caught, errors_of_command("prune", all_public=all_public):
            raise DataError("none", place="recipe.stage[0].calibration", cure=cure)
        said[all_public] = str(caught.value), in_the_shell(caught.value)
    assert said[True] == (
        "calibration: none; give public examples by data=SOURCE",
        "calibration: none; give public examples by --data SOURCE",
    )
    assert said[False] == (
        'calibration: none; give public examples by **{"data.public_share": 0.1}',
        "calibration: none; give public examples by data.public_share=0.1",
    )


def test_patience_asks_for_data_that_bring_a_validation_set():
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    pair = torch.rand(2, 1, 8, 8), torch.arange(2)
    with pytest.raises(FedpressError, match=r"^patience: .* give data=SOURCE, or leave patience"):
        fedpress.train(net, epochs=1, patience=3, data=pair)
    assert fedpress.train(net, epochs=1, patience=3, data="digits").model is not None


def test_damaged_settings_of_a_run_ask_for_the_data_by_argument_or_flag(tmp_path):
    run = RunFolder.create(tmp_path / "run", "", {"seed": 0})
    (run.path / "settings.json").write_text('{"seed": 1}')
    with pytest.raises(RunError) as caught:
        ChosenModel({}, run=run.path).data()
    assert "; give data=SOURCE, or if you have changed it yourself, delete" in str(caught.value)
    assert "; give --data SOURCE, or if you have" in in_the_shell(caught.value)


def test_one_mistake_is_told_to_each_reader_in_its_own_words(tmp_path):
    """A table without its path: in a recipe, in a Python call, and on the command line."""
    wrong = DATA.replace("digits", "csv") + '[[stage]]\nkind = "pack"\n'
    with pytest.raises(RecipeError) as of_recipe:
        recipes.load(wrong)
    assert str(of_recipe.value) == (
        "recipe.data.path: source 'csv' needs a path; give recipe.data.path = PATH"
    )
    with pytest.raises(RecipeError) as of_call:
        fedpress.prune(nn.Linear(8, 3), keep_params=0.5, data="csv")
    assert str(of_call.value) == "path: source 'csv' needs a path; give path=PATH"
    assert in_the_shell(of_call.value) == "--path: source 'csv' needs a path; give --path PATH"


def test_the_way_in_for_another_programs_file_is_keys_in_a_recipe(tmp_path, shell):
    torch.save(nn.Linear(8, 3).state_dict(), tmp_path / "w.pt")
    toml = f'[data]\nsource = "digits"\n[model]\ncheckpoint = "{tmp_path / "w.pt"}"\n'
    (tmp_path / "own.toml").write_text(toml + '[[stage]]\nkind = "pack"\n')
    said = shell("check", tmp_path / "own.toml")
    assert said.code == 2
    assert said.err.startswith("error: recipe.model.checkpoint: ")
    assert f"model.architecture=package.module:function and model.weights={tmp_path}" in said.err


def test_the_function_of_a_file_is_allowed_by_argument_or_by_flag():
    with pytest.raises(ModelError) as caught:
        consent.check("nets:Net", (), "spec.architecture")
    assert str(caught.value).endswith('add allow_code=("nets:Net",)')
    assert in_the_shell(caught.value).endswith("add --allow-code nets:Net")


def test_the_python_cure_can_be_followed_as_it_is_written():
    """The shape that the error names is that of the data: with it the call goes through."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    with pytest.raises(ModelError) as caught:
        fedpress.prune(net, keep_params=0.5)
    argument = next(part for part in caught.value.cure if isinstance(part, Argument))
    followed = eval(f"dict({argument})")
    assert fedpress.prune(net, keep_params=0.5, round_to=1, **followed).model is not None
    with pytest.raises(FedpressError) as caught:
        fedpress.sparsify(net, **followed)
    argument = next(part for part in caught.value.cure if isinstance(part, Argument))
    made = fedpress.sparsify(net, keep_first=False, **followed, **eval(f"dict({argument})"))
    assert made.model is not None
