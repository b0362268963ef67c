"""The Python calls: modules and data in memory, models that are no classifiers, and folders that open again."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import fedpress
from fedpress import storage
from fedpress.core.examples import Arrays, Preprocess
from fedpress.data import FederatedData
from fedpress.errors import DataError, FedpressError, ModelError, RunError
from fedpress.models import layer_list, memory
from fedpress.stages.measure import measure_model

X = torch.rand(100, 1, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(100) % 10

OWN = """
import torch
from torch import nn


class Tokens(nn.Module):
    def __init__(self, vocab=30, width=24):
        super().__init__()
        self.vocab, self.width = vocab, width
        self.e, self.a, self.b = nn.Embedding(vocab, width), nn.Linear(width, 32), nn.Linear(32, 2)

    def forward(self, x):
        return self.b(torch.relu(self.a(self.e(x).mean(1))))


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 32), nn.Linear(32, 3), nn.Linear(32, 1)

    def forward(self, x):
        h = torch.relu(self.a(x))
        return {"logits": self.b(h), "value": self.c(h)}


class Hidden(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.a, self.b = nn.Linear(8, size), nn.Linear(size, 3)

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))
"""


class Several(nn.Module):
    """Two inputs of different shapes, two outputs."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 16, 3), nn.Linear(5, 16)
        self.c, self.d = nn.Linear(16, 3), nn.Linear(16, 1)

    def forward(self, image, row):
        h = torch.relu(self.a(image)).mean((2, 3)) + self.b(row)
        return self.c(torch.relu(h)), self.d(h).flatten()


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module of the user's own networks, in a folder on the path."""
    name = f"own_networks_{abs(hash(tmp_path.name))}"
    (tmp_path / f"{name}.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    return __import__(name)


def net(classes: int = 10) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, classes)).eval()


def segmentation() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 2, 1)).eval()


def regression() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1), nn.Flatten(0)).eval()


class Items(Dataset):
    """A Dataset of arrays, as many data sets give them."""

    def __len__(self):
        return 50

    def __getitem__(self, i):
        return X[i].numpy(), int(Y[i])


PAIRS = {
    "tensors": (X, Y),
    "arrays": (X.numpy(), Y.numpy()),
    "bytes": ((X * 255).byte(), Y),
    "dataset": TensorDataset(X, Y),
    "own dataset": Items(),
    "loader": DataLoader(TensorDataset(X, Y), batch_size=32),
}


@pytest.mark.recipe
@pytest.mark.parametrize("kind", PAIRS)
def test_pairs_in_memory_are_learned_from_and_measured_on(kind):
    made = fedpress.prune(net(), data=PAIRS[kind], keep_params=0.5, round_to=1, score="taylor")
    assert made.before["accuracy"] is not None
    count = 50 if kind == "own dataset" else 100
    assert made.before["accuracy"] * count / 5 == pytest.approx(
        round(made.before["accuracy"] * count / 5)
    )


def test_scores_see_the_data_that_were_given():
    """Inputs that are zero in half of the pixels take the taylor scores of those weights to zero."""
    half = X.clone()
    half[..., 4:] = 0
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 10))
    a, b = (
        fedpress.quantize(model, data=x[:, 0, 0], bits=8, inputs="static") for x in (X, half + 3)
    )
    grids = [made.model[0].state_dict() for made in (a, b)]
    assert any(not torch.equal(grids[0][name], grids[1][name]) for name in grids[0])


@pytest.mark.parametrize(
    "inputs", [X, X.numpy(), TensorDataset(X), DataLoader(TensorDataset(X), batch_size=8)]
)
def test_inputs_alone_calibrate_and_do_not_score(inputs):
    made = fedpress.quantize(net(), data=inputs)
    assert made.before["accuracy"] is None


@pytest.mark.recipe
def test_what_needs_no_labels_takes_inputs_alone_and_the_rest_says_so():
    inputs = X
    assert fedpress.export(net(), data=inputs, int8=True).after["int8"]
    for call, settings, who in (
        (fedpress.prune, {"keep_params": 0.5, "score": "taylor"}, 'prune with score = "taylor"'),
        (fedpress.train, {"epochs": 1}, "train"),
        (fedpress.quantize, {"epochs": 1}, "quantize with epochs"),
        (
            fedpress.sparsify,
            {"density": 0.5, "score": "snip", "keep_first": False},
            "sparsify with .*",
        ),
    ):
        with pytest.raises(
            DataError, match=rf"data: {who} learns from labels, .* give data=\(INPUTS, LABELS\)"
        ):
            call(net(), data=inputs, **settings)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (12345, "got int, expected a source such as"),
        ([1, 2], "got list, expected a source"),
        ({1, 2}, "got set, expected a source"),
        ((X,), "got tuple, expected a source"),
        ((X, Y, Y), "got tuple, expected a source"),
        (nn.Linear(2, 2), "got Linear, expected a source"),
        (torch.zeros(3), r"inputs of shape \[3\]; the first dimension counts examples"),
        ((X, Y[:5]), "100 inputs but 5 labels"),
        ((X, Y - 5), "some labels are negative"),
        ((X[:0], Y[:0]), "it has no examples"),
        (DataLoader(TensorDataset(X, Y, Y)), "an item has 3 parts"),
        (DataLoader([{"x": 1.0}]), "its items are dictionaries"),
    ],
)
def test_what_is_no_data_is_refused_by_the_name_of_the_argument(data, message):
    with pytest.raises(DataError, match=message):
        fedpress.quantize(net(), data=data, input_shape=(1, 8, 8))


def test_a_data_set_in_memory_is_used():
    part = Arrays(X, Y)
    names = tuple("abcdefghij")
    data = FederatedData("mine", {"a": part}, part, part, part, 10, names, Preprocess())
    made = fedpress.prune(net(), data=data, keep_params=0.5, round_to=1, score="taylor")
    assert made.before["accuracy"] is not None


NO_CLASSIFIERS = {"segmentation": (segmentation, (3, 16, 16)), "regression": (regression, (8,))}


@pytest.mark.recipe
@pytest.mark.parametrize("name", NO_CLASSIFIERS)
def test_models_that_are_no_classifiers_are_cut_quantized_and_packed(name, tmp_path):
    build, shape = NO_CLASSIFIERS[name]
    made = fedpress.prune(
        build(), keep_params=0.5, score="l1", round_to=1, input_shape=shape, out=tmp_path / "cut"
    )
    assert made.after["parameters"] < made.before["parameters"]
    again = fedpress.quantize(tmp_path / "cut", out=tmp_path / "small")
    assert again.after["accuracy"] is None
    assert fedpress.pack(tmp_path / "small").files
    inputs = torch.rand(32, *shape)
    assert fedpress.quantize(build(), data=(inputs, torch.rand(32))).after["accuracy"] is None
    with pytest.raises(
        FedpressError, match=r"classifier does, and accuracy needs a classifier|gives outputs"
    ):
        fedpress.prune(build(), data=(inputs, torch.arange(32) % 2), keep_params=0.5)


@pytest.mark.recipe
def test_token_ids_and_dictionaries_are_cut_and_quantized(own, tmp_path):
    for model, data in (
        (own.Tokens(), torch.randint(0, 30, (64, 6))),
        (own.Two(), torch.rand(64, 8)),
    ):
        shape = tuple(data.shape[1:])
        made = fedpress.prune(model, keep_params=0.5, score="l1", round_to=1, input_shape=shape)
        assert made.after["parameters"] < made.before["parameters"]
        place = tmp_path / type(model).__name__
        fedpress.quantize(model, data=data, out=place)
        name = f"{own.__name__}:{type(model).__name__}"
        assert fedpress.pack(place, allow_code=name).files
        assert type(storage.load(place, name)[1]).__name__ == type(model).__name__
    labels = torch.randint(0, 2, (64,))
    made = fedpress.prune(
        own.Tokens(), data=(torch.randint(0, 30, (64, 6)), labels), keep_params=0.5, score="taylor"
    )
    assert made.before["accuracy"] is not None


LAYERS = [
    nn.Conv2d(1, 8, 3, padding="same", padding_mode="circular", bias=False),
    nn.BatchNorm2d(8, momentum=None),
    nn.Sequential(nn.ReLU(True), nn.MaxPool2d(2, stride=1)),
    nn.Upsample(scale_factor=2.0),
    nn.AdaptiveAvgPool2d((1, None)),
    nn.LayerNorm(8, bias=False),
    nn.LSTM(8, 4, bidirectional=True, num_layers=2, dropout=0.1, batch_first=True),
    nn.LSTM(8, 4, proj_size=2, bias=False),
    nn.RNN(3, 4, nonlinearity="relu"),
    nn.GRU(3, 3),
    nn.PReLU(8),
    nn.GELU("tanh"),
    nn.Hardtanh(-2, 3),
    nn.Unflatten(1, (2, 4)),
    nn.Embedding(5, 6, padding_idx=1),
    nn.RMSNorm(4),
    nn.ConvTranspose2d(4, 6, 2, groups=2, output_padding=0, dilation=2),
    nn.ConstantPad1d(2, 1.5),
    nn.Bilinear(2, 3, 4),
]


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
def test_layers_of_torch_are_built_again_from_what_they_keep(layer):
    about = layer_list.describe(nn.Sequential(layer))
    again = layer_list.build(about["layers"])
    assert repr(again) == repr(nn.Sequential(layer))
    again.load_state_dict(nn.Sequential(layer).state_dict())


def test_every_layer_on_the_list_is_one_of_torch():
    for name in layer_list.LAYERS:
        assert issubclass(getattr(nn, name), nn.Module)
        assert getattr(nn, name).__module__.startswith("torch.nn.modules")


def test_what_a_list_of_layers_cannot_say_is_not_described():
    shared = nn.Linear(4, 4)
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    hooked = nn.Sequential(nn.Linear(4, 4))
    hooked[0].register_forward_hook(lambda *_: None)
    changed = nn.Sequential(nn.Linear(4, 4))
    changed[0].forward = lambda x: x
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    own = type("Own", (nn.Linear,), {})(4, 4)
    for model in (nn.Sequential(shared, shared), tied, hooked, changed, normed, nn.Sequential(own),
                  nn.ModuleList([shared]), nn.Sequential(nn.Threshold(float("inf"), 0))):  # fmt: skip
        assert layer_list.describe(model) is None


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({}, "expected a table of layers by name"),
        ({"": {"layer": "Module"}}, "'Module' is no layer of torch.nn that a file may name"),
        ({"": {"layer": "__builtins__"}}, "is no layer of torch.nn"),
        ({"": {"layer": "Linear", "in_features": 2}}, "Linear cannot be built"),
        (
            {"": {"layer": "Linear", "in_features": 2, "out_features": 2}, "0": {"layer": "ReLU"}},
            "not inside a Sequential",
        ),
        (
            {"": {"layer": "Sequential"}, "0.weight": {"layer": "ReLU"}},
            "not inside a Sequential",
        ),
        ({"": 3}, "expected a table with the key 'layer'"),
    ],
)
def test_a_list_of_layers_from_a_file_is_checked(layers, message):
    with pytest.raises(ModelError, match=message):
        layer_list.build(layers)


@pytest.mark.recipe
def test_a_folder_written_from_memory_opens_in_another_process_to_the_same_outputs(tmp_path):
    made = fedpress.prune(
        net(), keep_params=0.5, round_to=1, score="l1", input_shape=(1, 8, 8), out=tmp_path / "r"
    )
    torch.save((X, made.model.eval()(X)), tmp_path / "wanted.pt")
    code = (
        "import torch; from fedpress import storage\n"
        f"x, wanted = torch.load({str(tmp_path / 'wanted.pt')!r})\n"
        f"assert torch.equal(storage.load({str(tmp_path / 'r')!r})[1].eval()(x), wanted)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.recipe
def test_a_class_of_ones_own_opens_with_consent_or_is_refused_before_any_work(own, tmp_path):
    fedpress.prune(
        own.Two(), keep_params=0.5, round_to=1, score="l1", input_shape=(8,), out=tmp_path / "two"
    )
    code = f"from fedpress import storage; storage.load({str(tmp_path / 'two')!r}"
    path = {"PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[3]}", "PATH": ""}
    refused = subprocess.run(
        [sys.executable, "-c", f"{code})"], capture_output=True, text=True, env=path
    )
    assert f'add allow_code=("{own.__name__}:Two",)' in refused.stderr
    subprocess.run([sys.executable, "-c", f"{code}, '{own.__name__}:Two')"], check=True, env=path)
    for call in (fedpress.prune, fedpress.pack):
        settings = {"keep_params": 0.5} if call is fedpress.prune else {}
        with pytest.raises(
            ModelError, match=r'could not be opened again.*give model="package.module:function"'
        ):
            call(own.Hidden(32), input_shape=(8,), out=tmp_path / "hidden", **settings)
    assert not (tmp_path / "hidden").exists()
    assert (
        fedpress.prune(own.Hidden(32), input_shape=(8,), keep_params=0.5, round_to=1).model
        is not None
    )


def test_a_class_that_does_not_build_the_same_network_is_not_named(own):
    assert memory.find_buildable(own.Two()) == memory.Buildable(f"{own.__name__}:Two", {})
    other = own.Two()
    other.c = nn.Linear(32, 2)
    assert memory.find_buildable(other) is None
    other = own.Tokens(vocab=12)
    assert memory.find_buildable(other) == memory.Buildable(
        f"{own.__name__}:Tokens", {"vocab": 12, "width": 24}
    )
    other.b = nn.Sequential(nn.Linear(32, 2))
    assert memory.find_buildable(other) is None


class Chosen(nn.Module):
    """Computes what its constructor was told in a way that it does not keep under the argument's name."""

    def __init__(self, how=None, way=None):
        super().__init__()
        self.how = self.way = None
        self.a, self.b = nn.Linear(8, 32), nn.Linear(32, 3)
        self.act = {"f": how or torch.relu}
        self.steps = way or Way()

    def forward(self, x):
        return self.b(self.act["f"](self.a(x))) * self.steps.factor


class Way:
    factor = 1.0


def test_a_class_that_computes_something_else_is_not_named(tmp_path):
    assert memory.find_buildable(Chosen()) is not None
    assert memory.find_buildable(Chosen(how=torch.tanh)) is None
    hooked = Chosen()
    hooked.a.register_forward_hook(lambda module, inputs, out: out * 2)
    assert memory.find_buildable(hooked) is None
    forwarded = Chosen()
    forwarded.forward = lambda x: forwarded.b(x[:, :1].expand(-1, 32))
    assert memory.find_buildable(forwarded) is None
    # What no comparison of attributes can see is seen in the outputs, before any work.
    way = Way()
    way.factor = 3.0
    odd = Chosen(way=way).eval()
    assert memory.find_buildable(odd) is not None
    with pytest.raises(ModelError, match="could not be opened again"):
        fedpress.quantize(odd, input_shape=(8,), out=tmp_path / "odd")
    assert not (tmp_path / "odd").exists()
    x = torch.rand(5, 8)
    kept = fedpress.quantize(odd, input_shape=(8,)).model.eval()
    assert torch.allclose(kept(x), odd(x), atol=0.1)


@pytest.mark.recipe
def test_export_and_pack_without_out_return_what_they_made(tmp_path):
    made = fedpress.export(net(), input_shape=(1, 8, 8))
    assert (made.artifact, made.folder, list(made.files)) == (None, None, ["model.onnx"])
    assert len(made.files["model.onnx"]) == made.after["file_bytes"]
    made = fedpress.pack(net(), input_shape=(1, 8, 8))
    (tmp_path / "m.packed.safetensors").write_bytes(made.files["model.packed.safetensors"])
    assert torch.equal(storage.load(tmp_path / "m.packed.safetensors")[1].eval()(X), net()(X))


@pytest.mark.recipe
@pytest.mark.usefixtures("memory_unmeasured")
def test_modules_in_memory_teach_and_are_measured():
    model = net()
    made = fedpress.distill(model, data=(X, Y), teacher=model, epochs=1)
    assert made.after["accuracy"] is not None
    found = fedpress.measure(
        [model, net(5)], input_shape=(1, 8, 8), formats=[], seconds=0.01, batches=[1], threads=[1]
    )
    assert [row["name"] for row in found["records"]] == ["Sequential", "Sequential (2)"]
    one = fedpress.measure(
        model, input_shape=(1, 8, 8), formats=[], seconds=0.01, batches=[1], threads=[1]
    )
    assert one["records"][0]["parameters"] == sum(p.numel() for p in model.parameters())


def test_a_few_examples_need_not_have_every_class(own):
    few = (X[:5], Y[:5].clamp(max=3))
    assert fedpress.quantize(net(), data=few).after["accuracy"] is not None
    assert fedpress.quantize(f"{own.__name__}:Hidden", data=(X[:5, 0, 0], Y[:5] % 2), **{
        "model.arguments.size": 16,
    }).after["accuracy"] is not None  # fmt: skip
    with pytest.raises(
        DataError, match=r"^data: its labels go up to 12, but the model has 10 classes; .* 0 to 9"
    ):
        fedpress.quantize(net(), data=(X[:5], Y[:5] + 8))


def test_examples_of_other_kinds_are_taken_as_the_model_takes_them(own):
    whole = torch.randint(3, (30, 8))
    module = own.Hidden(16).train()
    assert (
        fedpress.quantize(module, data=whole).model is not None
    )  # numbers of a table, no token ids
    assert fedpress.quantize(own.Tokens(), data=whole).model is not None
    assert fedpress.quantize(module, data=whole.float().to_sparse()).model is not None
    assert module.training
    with pytest.raises(
        FedpressError,
        match=r"does not take examples of shape \[9\].*; its first layer, Linear, takes",
    ) as got:
        fedpress.quantize(module, data=torch.rand(5, 9))
    assert "arguments" not in str(got.value)
    with pytest.raises(FedpressError, match=r"^path: source 'csv' needs a path; give path=PATH$"):
        fedpress.quantize(module, data="csv")


@pytest.mark.recipe
@pytest.mark.usefixtures("memory_unmeasured")
def test_token_ids_and_several_inputs_are_measured(own, tmp_path):
    """In memory, saved, exported, and by the stage."""
    quick: dict = {"seconds": 0.01, "batches": (1, 3), "threads": (1,), "formats": ["onnx"]}
    ids = torch.randint(30, (40, 6), generator=torch.Generator().manual_seed(0))
    fedpress.export(own.Tokens(), data=(ids, ids[:, 0] % 2), out=tmp_path / "ids")
    kept = [tmp_path / "ids/stages/0-export", tmp_path / "ids/artifacts/model.onnx"]
    for models in (own.Tokens(), kept):
        found = fedpress.measure(
            models, input_shape=(6,), allow_code=f"{own.__name__}:Tokens", **quick
        )
        assert {record["macs"] for record in found["records"]} == {24 * 32 + 32 * 2}
        assert all(len(record["timings"]) == 2 for record in found["records"])
    found = fedpress.measure(Several(), input_shape=[(1, 8, 8), (5,)], **quick)
    assert [record["runtime"] for record in found["records"]][:2] == ["torch", "onnxruntime"]
    assert (
        len(measure_model(own.Tokens(), ids, batches=(1,), threads=(1,), seconds=0.01)["runtimes"])
        >= 2
    )


@pytest.mark.parametrize(
    ("models", "settings", "message"),
    [
        (5, {}, "^models: got int, expected a torch.nn.Module"),
        ([nn.Linear], {}, "^models: got type, expected a torch.nn.Module"),
        (nn.Linear(8, 3), {"checkpoint": "w.pt"}, "^checkpoint: a module has weights of its own"),
        (
            nn.Linear(8, 3),
            {"input_shape": (9,)},
            r"^input_shape: the model does not take examples of shape \[9\]",
        ),
        (
            nn.Linear(8, 3),
            {"input_shape": 8},
            r"^input_shape: got 8, expected .* give for instance input_shape=\(3, 32, 32\)",
        ),
        (
            nn.Linear(8, 3),
            {"input_shape": [(8,), (8,)]},
            "^input_shape: Linear does not take inputs of .* and .*",
        ),
        (nn.Linear(8, 3).half(), {}, "^model: it holds torch.float16"),
    ],
)
def test_what_cannot_be_measured_is_refused(models, settings, message):
    with pytest.raises(ModelError, match=message):
        fedpress.measure(models, seconds=0.01, **{"input_shape": (8,), **settings})


@pytest.mark.parametrize("shape", [8, "8", (0,), (8.0,), (), {"x": 8}])
def test_what_is_no_shape_is_refused(shape):
    with pytest.raises(
        ModelError,
        match=r"^input_shape: got .*, expected .* for instance input_shape=\(3, 32, 32\)",
    ):
        fedpress.quantize(nn.Linear(8, 3), input_shape=shape)


def test_errors_name_arguments_in_python():
    with pytest.raises(
        ModelError, match=r"^input_shape: .* input_shape=\(3, 32, 32\), or data with data=SOURCE"
    ):
        fedpress.prune(net(), keep_params=0.5)
    with pytest.raises(ModelError, match=r"^input_shape: .* such as input_shape=\(3, 32, 32\)"):
        fedpress.measure(net())
    with pytest.raises(
        DataError, match=r'^path: a path needs a source that reads it; .* such as data="cifar10"'
    ):
        fedpress.prune(net(), keep_params=0.5, input_shape=(1, 8, 8), path="x")


def test_no_error_of_a_call_names_a_flag(tmp_path):
    fedpress.sparsify(
        net(), density=0.5, keep_first=False, input_shape=(1, 8, 8), out=tmp_path / "a"
    )
    with pytest.raises(RunError) as caught:
        fedpress.sparsify(
            net(), density=0.5, keep_first=False, input_shape=(1, 8, 8), out=tmp_path / "a"
        )
    assert "--" not in str(caught.value)
    torch.save(net().state_dict(), tmp_path / "w.pt")
    with pytest.raises(ModelError, match='and checkpoint="') as told:
        fedpress.prune(tmp_path / "w.pt", keep_params=0.5)
    assert "--" not in str(told.value)


def test_the_preprocessing_of_a_model_from_elsewhere_is_asked_for_and_used():
    model = net()
    with pytest.warns(
        UserWarning, match=r"mean: 'Sequential' brings its own weights.*mean=\"none\""
    ):
        fitted = fedpress.quantize(model, data="digits", calibration=32)
    plain = fedpress.quantize(model, data="digits", calibration=32, mean="none")
    given = fedpress.quantize(model, data="digits", calibration=32, mean=[0.5], std=[0.25])
    assert len({made.before["loss"] for made in (fitted, plain, given)}) == 3
    assert (
        fedpress.quantize(model, data="digits", calibration=32, mean="data").before["loss"]
        == fitted.before["loss"]
    )
    with torch.no_grad():
        from sklearn.datasets import load_digits

        x = torch.from_numpy(np.float32(load_digits().images) / 16)[:, None]
    assert plain.before["accuracy"] == pytest.approx(
        float((model(x).argmax(1) == torch.from_numpy(load_digits().target)).float().mean()),
        abs=0.15,
    )
    for settings, message in (
        ({"mean": "non"}, "mean: got 'non'"),
        ({"mean": [0.5]}, "^std: not given; .* such as std=.*"),
        ({"mean": [0.5], "std": [0.0]}, "^std: got .*above 0"),
        ({"mean": [0.5, 0.5], "std": [1.0]}, "std: 1 values of std for 2 of mean"),
        ({"mean": "none", "std": [1.0]}, "^std: .* leave it out"),
    ):
        with pytest.raises(DataError, match=message):
            fedpress.quantize(model, data="digits", **settings)


@pytest.mark.recipe
def test_the_commands_take_preprocessing_too(shell, tmp_path):
    (tmp_path / "elsewhere.py").write_text(
        "from torch import nn\n\n\ndef build():\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))\n"
    )
    torch.save(net().state_dict(), tmp_path / "w.pt")
    words = [
        "quantize",
        "elsewhere:build",
        "--checkpoint",
        "w.pt",
        "--data",
        "digits",
        "calibration=32",
    ]
    said = shell(*words)
    assert said.code == 0, said.err
    assert "--mean: 'elsewhere:build' brings its own weights" in said.out
    for more in (["--mean", "none"], ["--mean", "0.5", "--std", "0.25"], ["--mean", "data"]):
        said = shell(*words, *more)
        assert said.code == 0, said.err
        assert "brings its own weights" not in said.out
    said = shell(*words, "--mean", "0.5")
    assert said.code == 2
    assert (
        "--std: not given; give one number for each channel, such as --std 0.5,0.5,0.5" in said.err
    )


@pytest.mark.recipe
def test_models_of_several_inputs_are_cut_quantized_and_exported(tmp_path):
    model, shapes = Several().eval(), [(1, 8, 8), (5,)]
    inputs = [torch.rand(3, *shape) for shape in shapes]
    made = fedpress.prune(model, keep_params=0.5, score="l1", round_to=1, input_shape=shapes)
    assert made.after["parameters"] < made.before["parameters"]
    assert [out.shape for out in made.model(*inputs)] == [(3, 3), (3,)]
    rounded = fedpress.quantize(made.model.eval(), input_shape=shapes)
    assert rounded.model(*inputs)[0].shape == (3, 3)
    files = fedpress.export(made.model.eval(), input_shape=shapes).files
    (tmp_path / "m.onnx").write_bytes(files["model.onnx"])
    import onnxruntime

    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"))
    got = session.run(
        None,
        dict(zip([i.name for i in session.get_inputs()], (x.numpy() for x in inputs), strict=True)),
    )
    for a, b in zip(got, made.model.eval()(*inputs), strict=True):
        assert np.allclose(a, b.detach().numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("call", "settings", "message"),
    [
        (fedpress.train, {"epochs": 1}, "takes models of one input"),
        (fedpress.prune, {"keep_params": 0.5, "data": X}, "data: models of several inputs"),
        (fedpress.prune, {"keep_params": 0.5, "out": "x"}, "out: a model of several inputs"),
        (
            fedpress.export,
            {"int8": True},
            "int8: export of a model of several inputs takes only the setting format",
        ),
    ],
)
def test_what_models_of_several_inputs_cannot_have_is_refused(call, settings, message):
    with pytest.raises(ModelError, match=message):
        call(Several(), input_shape=[(1, 8, 8), (5,)], **settings)


def test_float_targets_of_a_regression_are_measured_in_their_own_units():
    torch.manual_seed(0)
    x = torch.randn(200, 8)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))
    with torch.no_grad():
        y = model(x)[:, 0]
    found = fedpress.prune(model, keep_params=0.5, data=(x, y))
    assert found.before["task"] == "regression"
    assert found.before["mae"] < 1e-5
    assert found.after["mae"] > found.before["mae"]
    assert "accuracy" not in found.after
    maps = fedpress.prune(model, keep_params=0.5, data=(x, torch.randn(200, 3)))
    assert maps.before["accuracy"] is None, "targets of another width measure nothing"


@pytest.mark.parametrize("mend", [lambda y: y.argmax(1), lambda y: y.argmax(1).to(torch.uint8)])
def test_labels_of_another_kind_are_refused_with_a_cure_that_works(mend):
    inputs = torch.rand(40, 20)
    one_hot = torch.nn.functional.one_hot(torch.arange(40) % 3, 3)
    module = torch.nn.Sequential(torch.nn.Linear(20, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    for wrong in (one_hot, one_hot.argmax(1).float()):
        with pytest.raises(
            DataError,
            match=r"no labels that fit a task; give .*, where LABELS are whole numbers \[n\]",
        ):
            fedpress.train(module, data=(inputs, wrong), epochs=1)
    assert fedpress.train(module, data=(inputs, mend(one_hot)), epochs=1).after["epochs"] == 1


def test_a_target_that_was_met_only_nearly_is_shown_with_the_result():
    shown = fedpress.prune(net(), input_shape=(1, 8, 8), keep_params=0.43, round_to=8)
    for text in (str(shown), shown._repr_html_()):
        assert "the nearest to 0.43 that the widths allow" in text
