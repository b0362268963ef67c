"""A model that does not fit the data is refused with the arguments, or the shape, that do."""

import pytest
import torch
from torch import nn

import fedpress
from fedpress.errors import FedpressError, RecipeError
from fedpress.pipeline import recipe as recipes
from fedpress.pipeline.start import first_state, load_data

TABLE = """
name = "table"
[data]
source = "csv"
path = "{path}"
public_share = 0.5
[model]
architecture = "mlp"
arguments = {arguments}
[[stage]]
kind = "train"
epochs = 1
batch_size = 8
"""


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "visits.csv"
    rows = [f"{age},{'cook' if age % 3 else 'nurse'},{age % 2}" for age in range(20, 80)]
    path.write_text("\n".join(["age,job,label", *rows]))

    def recipe(arguments):
        return recipes.load(TABLE.format(path=path, arguments=arguments))

    return recipe


def test_a_table_that_does_not_fit_an_mlp_names_both_numbers(table):
    recipe = table("{ in_features = 2, num_classes = 2 }")
    with pytest.raises(RecipeError) as error:
        first_state(recipe, load_data(recipe))
    assert str(error.value) == (
        "recipe.model.arguments.in_features: got 2 inputs, but an example of the data has 3 "
        "(shape [3]); set recipe.model.arguments.in_features = 3 and "
        "recipe.model.arguments.num_classes = 2"
    )


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ("{}", {"in_features": 3, "num_classes": 2}),
        ("{ hidden = [4] }", {"hidden": [4], "in_features": 3, "num_classes": 2}),
        ("{ in_features = 3, num_classes = 2 }", {"in_features": 3, "num_classes": 2}),
    ],
)
def test_sizes_that_a_recipe_leaves_out_follow_from_the_data(table, arguments, wanted):
    recipe = table(arguments)
    state = first_state(recipe, load_data(recipe))
    assert state.spec.arguments == wanted
    widths = [tuple(p.shape) for p in state.model.parameters() if p.dim() == 2]
    assert (widths[0][1], widths[-1][0]) == (3, 2)


@pytest.mark.parametrize("architecture", ["cnn", "resnet-small", "resnet18", "mlp"])
def test_channels_and_sides_of_an_image_follow_from_the_data(architecture):
    tables = {
        "data": {"source": "digits"},
        "model": {"architecture": architecture},
        "stage": [{"kind": "train", "epochs": 1}],
    }
    recipe = fedpress.Recipe(**tables)
    state = first_state(recipe, load_data(recipe))
    wanted = {
        "cnn": {"in_channels": 1, "image_size": 8},
        "mlp": {"in_features": 64},
    }
    # Ten classes are the default, which specs of older versions leave out.
    assert state.spec.arguments == wanted.get(architecture, {"in_channels": 1})


def test_what_the_error_of_an_mlp_says_to_set_fits(table):
    recipe = table("{ in_features = 3, num_classes = 2 }")
    assert first_state(recipe, load_data(recipe)).spec.input_shape == (3,)


class Watch(nn.Module):
    """A network whose class the user has written, and which no file can build."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 2)])

    def forward(self, x):
        return self.layers[0](x)


class Words(nn.Module):
    """A network of one input with a name."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, tokens):
        return self.head(self.embed(tokens).mean(1))


def test_a_module_in_memory_goes_by_the_name_of_its_class():
    x = torch.randn(40, 5)
    with pytest.raises(FedpressError, match=r"'Watch' does not take examples of shape \[5\]") as e:
        fedpress.train(Watch(), data=(x, x.argmax(1) % 2), epochs=1, batch_size=8)
    assert "memory" not in str(e.value)


def test_an_embedding_smaller_than_the_vocabulary_is_told_its_size(tmp_path, monkeypatch):
    (tmp_path / "open.txt").write_text("a brown fox jumps " * 20)
    (tmp_path / "tiny.py").write_text(
        "from torch import nn\n\n\nclass Net(nn.Module):\n"
        "    def __init__(self, num_classes=2):\n"
        "        super().__init__()\n"
        "        self.embed = nn.Embedding(num_classes, num_classes)\n\n"
        "    def forward(self, x):\n        return self.embed(x).transpose(1, 2)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    recipe = recipes.load(
        f'name = "t"\n[data]\nsource = "text"\npath = "{tmp_path}/open.txt"\nnum_clients = 2\n'
        "examples_per_client = 10\n"
        'text = { length = 5 }\n[model]\narchitecture = "tiny:Net"\n[[stage]]\nkind = "train"\nepochs = 1\n'
    )
    data = load_data(recipe)
    with pytest.raises(RecipeError) as error:
        first_state(recipe, data)
    assert f"arguments.num_classes = {data.task.outputs}" in str(error.value)


def test_other_names_of_inputs_are_told_with_the_names_that_fit():
    ids = torch.randint(10, (40, 6))
    with pytest.raises(FedpressError) as error:
        fedpress.train(Words(), data=({"ids": ids}, ids[:, 0] % 2), epochs=1, batch_size=8)
    assert "tokens" in str(error.value)
    assert str(error.value).endswith("; name the inputs as forward names its arguments")


@pytest.mark.parametrize("do", [fedpress.prune, fedpress.measure])
def test_a_shape_with_the_number_of_examples_is_told_to_leave_it_out(do):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.LazyLinear(2))
    net(torch.zeros(1, 3, 16, 16))
    settings = {"keep_params": 0.5} if do is fedpress.prune else {}
    with pytest.raises(
        FedpressError,
        match=r"leave out the number of examples: give input_shape=\(3, 16, 16\)$",
    ):
        do(net, input_shape=(1, 3, 16, 16), **settings)
