import json

import pytest
import torch
from torch import nn

from fedpress.errors import ModelError
from fedpress.models import (
    ARCHITECTURES,
    ModelSpec,
    load_model,
    resize_,
    save_model,
    shapes_that_differ,
)
from fedpress.nn.quant_scheme import InputQuantization, QuantizationScheme, WeightQuantization
from fedpress.nn.quantized import materialize_, quantize_layers_, quantized_layers

SMALL = {"width": 8, "num_classes": 3}
SPECS = [
    ModelSpec(
        architecture="resnet-small",
        arguments=SMALL,
        input_shape=(3, 8, 8),
        mean=(0.5,),
        std=(0.25,),
    ),
    ModelSpec(
        architecture="resnet-small", arguments={**SMALL, "norm": "group"}, input_shape=(3, 8, 8)
    ),
    ModelSpec(
        architecture="cnn",
        arguments={"image_size": 8, "dropout": [0.1, 0.2]},
        input_shape=(3, 8, 8),
    ),
    ModelSpec(
        architecture="mlp", arguments={"in_features": 6, "hidden": [5, 4]}, input_shape=(2, 3)
    ),
]
MLP = SPECS[3]


class Tied(nn.Module):
    """A network of the user's own: two layers share a weight, one is depthwise, one has no parameters."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.stem, self.deep = nn.Conv2d(3, width, 1), nn.Conv2d(width, width, 3, groups=width)
        self.norm, self.drop = nn.BatchNorm2d(width, affine=False), nn.Dropout(0.1)
        self.one, self.two = (
            nn.Linear(width, width, bias=False),
            nn.Linear(width, width, bias=False),
        )
        self.two.weight = self.one.weight

    def forward(self, x):
        return self.two(self.one(self.drop(self.norm(self.deep(self.stem(x)))).mean((2, 3))))


def not_a_network():
    return "a string"


def broken(kind: str = "KeyError"):
    raise {"KeyError": KeyError, "RuntimeError": RuntimeError}[kind]("inside the function")


def own(name):
    return f"{__name__}:{name}"


def halved(model):
    """Halves every dimension of every tensor that has more than 3 entries there."""
    return {
        n: tuple(max(1, s // 2) if s > 3 else s for s in t.shape)
        for n, t in model.state_dict().items()
    }


def filled_(model):
    """Gives every tensor values of its own; variances are positive."""
    for at, (name, tensor) in enumerate(model.state_dict().items()):
        if tensor.is_floating_point():
            values = torch.rand(tensor.shape, generator=torch.Generator().manual_seed(at)) - 0.3
            tensor.copy_(values.abs() if name.endswith("_var") else values)
    return model.eval()


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.architecture)
def test_a_model_comes_back_from_its_folder_to_the_same_bits(spec, tmp_path):
    model = filled_(spec.build())
    save_model(tmp_path / "m", spec, model)
    again_spec, again = load_model(tmp_path / "m")
    assert again_spec == spec
    x = torch.randn(2, *spec.input_shape)
    assert torch.equal(again.eval()(x), model(x))
    for (name, old), (_, new) in zip(
        model.state_dict().items(), again.state_dict().items(), strict=True
    ):
        assert torch.equal(old, new), name
    assert {p.name for p in (tmp_path / "m").iterdir()} == {"model.safetensors", "spec.json"}


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_a_cut_network_is_rebuilt_from_its_spec(norm, tmp_path):
    dense = ModelSpec(
        architecture="resnet-small", arguments={"width": 16, "norm": norm}, input_shape=(3, 8, 8)
    )
    model = dense.build()
    shapes = {
        "stages.1.0.conv1.weight": (24, 16, 3, 3),
        "stages.1.0.conv2.weight": (32, 24, 3, 3),
        **{
            n: (24,)
            for n in model.state_dict()
            if n.startswith("stages.1.0.norm1.") and "num_batches" not in n
        },
    }
    resize_(model, shapes)
    filled_(model)
    assert shapes_that_differ(model, dense.build()) == shapes
    spec = dense.model_copy(update={"resized": shapes_that_differ(model, dense.build())})
    save_model(tmp_path, spec, model.to(memory_format=torch.channels_last))
    _, again = load_model(tmp_path)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(again.eval()(x), model.to(memory_format=torch.contiguous_format)(x))
    assert again.stages[1][0].conv1.out_channels == again.stages[1][0].conv2.in_channels == 24
    if norm == "group":
        assert (again.stages[1][0].norm1.num_groups, again.stages[1][0].norm1.num_channels) == (
            24,
            24,
        )
    else:
        assert again.stages[1][0].norm1.num_features == 24


def test_a_network_of_ones_own_keeps_what_it_shares(tmp_path):
    dense = ModelSpec(architecture=own("Tied"), arguments={"width": 8}, input_shape=(3, 4, 4))
    shapes = halved(dense.build())
    spec = dense.model_copy(update={"resized": shapes})
    model = filled_(spec.build())
    assert model.one.weight is model.two.weight
    assert model.deep.groups == model.norm.num_features == model.one.in_features == 4
    save_model(tmp_path, spec, model)
    _, again = load_model(tmp_path, allow_code=own("Tied"))
    assert again.one.weight is again.two.weight
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(again.eval()(x), model(x))


def test_resizing_keeps_what_trains_and_what_is_a_buffer():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model[0].weight.requires_grad_(False)
    resize_(model, {"0.weight": (2, 4), "0.bias": (2,), "1.weight": (2,), "1.running_mean": (2,)})
    assert not model[0].weight.requires_grad
    assert model[0].bias.requires_grad
    assert "1.running_mean" in dict(model.named_buffers())
    assert model[0].out_features == model[1].num_features == 2


def test_every_architecture_is_built_by_its_name():
    arguments = {"mlp": {"in_features": 12}, "cnn": {"image_size": 8}}
    arguments["torch-layers"] = {
        "layers": {"": {"layer": "Linear", "in_features": 4, "out_features": 2}}
    }
    for name in ARCHITECTURES:
        model = ModelSpec(
            architecture=name, arguments=arguments.get(name, {}), input_shape=(3, 2, 2)
        ).build()
        assert isinstance(model, nn.Module)


@pytest.mark.parametrize(
    ("architecture", "arguments", "message"),
    [
        (
            "resnet-18",
            {},
            r"no architecture 'resnet-18'; did you mean 'resnet18'\? If not, use one of resnet18, .*:function",
        ),
        ("vgg", {}, "no architecture 'vgg'; use one of"),
        ("", {}, "no architecture ''"),
        (
            "resnet18",
            {"num_clases": 3},
            "'resnet18' cannot be built: .*unexpected keyword argument 'num_clases'",
        ),
        ("mlp", {}, "'mlp' cannot be built: .*missing 1 required"),
        ("mlp", {"in_features": -1}, "'mlp' cannot be built"),
        ("cnn", {"num_classes": "ten"}, "'cnn' cannot be built"),
        (
            "no_such_module:net",
            {},
            "cannot load 'no_such_module:net': no module 'no_such_module'; put its folder on PYTHONPATH$",
        ),
        (
            "json:no_such_function",
            {},
            "cannot load 'json:no_such_function': the module has no function 'no_such_function'; name one",
        ),
        ("json:dmps", {}, "has no function 'dmps'; did you mean 'dumps'"),
        (":f", {}, "cannot load ':f'"),
        ("json:decoder", {}, "cannot be built: 'module' object is not callable"),
        (own("not_a_network"), {}, "returned str; return a torch.nn.Module"),
        (own("broken"), {}, "cannot be built: .*inside the function"),
        (own("broken"), {"kind": "RuntimeError"}, "cannot be built: inside the function"),
    ],
)
def test_a_model_that_cannot_be_built_says_why(architecture, arguments, message):
    with pytest.raises(ModelError, match=message):
        ModelSpec(architecture=architecture, arguments=arguments, input_shape=(3, 32, 32)).build()


def test_a_user_file_that_imports_what_is_missing_says_so(tmp_path, monkeypatch):
    (tmp_path / "my_needy_nets.py").write_text("import no_such_package\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModelError, match="no module 'no_such_package'; install what it imports"):
        ModelSpec(architecture="my_needy_nets:net", input_shape=(1,)).build()


def test_a_user_file_with_an_error_in_it_says_so(tmp_path, monkeypatch):
    (tmp_path / "my_broken_nets.py").write_text("def net(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        ModelError,
        match=r"cannot load 'my_broken_nets:net': importing it failed with SyntaxError.*; correct it",
    ):
        ModelSpec(architecture="my_broken_nets:net", input_shape=(1,)).build()


@pytest.mark.parametrize(
    "resized",
    [
        {"layers.9.weight": (1, 1)},
        {"layers.0.weigth": (1, 1)},
        {"layers.0.weight": (5,)},
        {"layers.0.weight": (0, 6)},
        {"layers.0.weight": (-1, 6)},
        {"layers.0.weight": (6, 6)},
        {"layers.0": (1,)},
        {"layers.0.in_features": ()},
        {"": ()},
    ],
)
def test_a_spec_of_another_model_is_refused(resized):
    with pytest.raises(ModelError, match="load the spec that was saved with this model"):
        MLP.model_copy(update={"resized": resized}).build()


@pytest.fixture
def saved(tmp_path):
    save_model(tmp_path, MLP, MLP.build())
    return tmp_path


@pytest.mark.parametrize("name", ["spec.json", "model.safetensors"])
def test_a_missing_file_is_named(saved, name):
    (saved / name).unlink()
    with pytest.raises(ModelError, match=rf"no model here \({name} is missing\)"):
        load_model(saved)


def test_a_folder_that_is_none_has_no_model(tmp_path):
    (tmp_path / "file").touch()
    for folder, says in (("nowhere", "there is no '.*nowhere'"), ("file", "no model here")):
        with pytest.raises(ModelError, match=says):
            load_model(tmp_path / folder)


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.999])
@pytest.mark.parametrize("name", ["spec.json", "model.safetensors"])
def test_a_truncated_file_is_corrupt(saved, name, share):
    whole = (saved / name).read_bytes()
    (saved / name).write_bytes(whole[: int((len(whole) - 1) * share)])
    with pytest.raises(ModelError, match=rf"{name}: corrupt \(.+\); run the stage again"):
        load_model(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": None}, "spec.json: corrupt .architecture"),
        ({"colour": "red"}, "spec.json: corrupt .colour Extra inputs"),
        ({"resized": {"layers.0.weight": ["x"]}}, "spec.json: corrupt .resized.layers.0.weight.0"),
        (
            {"arguments": {"in_features": 7, "hidden": [5, 4]}},
            "does not fit spec.json .*size mismatch",
        ),
        ({"arguments": {"in_features": 6, "hidden": [5]}}, "does not fit spec.json"),
        ({"resized": {"layers.0.bias": [4]}}, "does not fit spec.json .*layers.0.bias"),
    ],
)
def test_a_changed_spec_does_not_fit(saved, change, message):
    spec = json.loads((saved / "spec.json").read_text())
    (saved / "spec.json").write_text(json.dumps({**spec, **change}))
    with pytest.raises(ModelError, match=message):
        load_model(saved)


def test_bytes_that_are_no_text_are_corrupt(saved):
    (saved / "spec.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ModelError, match=r"spec.json: corrupt"):
        load_model(saved)


def test_a_spec_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        MLP.architecture = "cnn"


def test_networks_of_one_shape_do_not_differ():
    assert shapes_that_differ(MLP.build(), MLP.build()) == {}


def on_grids():
    """A spec with folded batch norms, layers on grids of every kind, and a cut, and its model."""
    dense = ModelSpec(architecture="resnet-small", arguments=SMALL, input_shape=(3, 8, 8))
    grids = [
        QuantizationScheme(weights=WeightQuantization(bits=4), inputs=InputQuantization()),
        QuantizationScheme(weights=WeightQuantization(bits=3, group=10)),
        QuantizationScheme(
            weights=WeightQuantization(kind="ternary"), inputs=InputQuantization(dynamic=True)
        ),
        QuantizationScheme(
            weights=WeightQuantization(kind="binary"), inputs=InputQuantization(bits=1)
        ),
        QuantizationScheme(weights=WeightQuantization(kind="codebook", centroid_bits=8)),
    ]
    spec = dense.model_copy(
        update={
            "folded": {"norm": "stem", "stages.1.0.norm1": "stages.1.0.conv1"},
            "resized": {
                "stages.1.0.conv1.weight": (9, 8, 3, 3),
                "stages.1.0.conv2.weight": (16, 9, 3, 3),
                **{
                    f"stages.1.0.norm1.{n}": (9,)
                    for n in ("weight", "bias", "running_mean", "running_var")
                },
            },
            "quantized": dict(
                zip(
                    ["stem", "stages.1.0.conv1", "stages.1.0.conv2", "stages.0.0.conv1", "head"],
                    grids,
                    strict=True,
                )
            ),
        }
    )
    model = spec.build()
    for layer in model.modules():
        if isinstance(getattr(layer, "weight", None), nn.Parameter):
            nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(0))
    quantize_layers_(model, spec.quantized)
    return spec, materialize_(model).eval()


def test_a_folded_and_quantized_network_comes_back_to_the_same_bits(tmp_path):
    spec, model = on_grids()
    save_model(tmp_path, spec, model)
    again_spec, again = load_model(tmp_path)
    assert again_spec == spec
    x = torch.randn(3, 3, 8, 8)
    assert torch.equal(again.eval()(x), model(x))
    assert isinstance(again.norm, nn.Identity)
    assert again.stages[1][0].conv1.bias.shape == (9,)
    assert {n: m.scheme for n, m in quantized_layers(again)} == spec.quantized


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"folded": {"norm": "head.2"}}, "spec.folded: the model has no module 'norm' or 'head.2'"),
        ({"folded": {"head": "stem"}}, "spec.folded: 'head' cannot be folded into 'stem'"),
        (
            {"quantized": {"hed": QuantizationScheme()}},
            "spec.quantized: the model has no layer 'hed'",
        ),
        (
            {"quantized": {"norm": QuantizationScheme()}},
            "spec.quantized: 'norm' cannot be quantized",
        ),
        (
            {
                "quantized": {
                    "head": QuantizationScheme(weights=WeightQuantization(kind="binary"))
                },
                "sparse": ("head.weight",),
            },
            "'head.weight' is sparse, but binary weights cannot be 0",
        ),
    ],
)
def test_folds_and_grids_of_another_model_are_refused(change, says):
    spec = ModelSpec(architecture="resnet-small", arguments=SMALL, input_shape=(3, 8, 8))
    with pytest.raises(ModelError, match=says):
        spec.model_copy(update=change).build()


def test_scales_of_another_grid_do_not_fit(tmp_path):
    spec, model = on_grids()
    save_model(tmp_path, spec, model)
    other = spec.model_copy(
        update={
            "quantized": spec.quantized
            | {"stem": QuantizationScheme(weights=WeightQuantization(group=2))}
        }
    )
    (tmp_path / "spec.json").write_text(other.model_dump_json())
    with pytest.raises(ModelError, match=r"does not fit spec.json"):
        load_model(tmp_path)


def named_by_a_file(folder, architecture, arguments=None, allow_code=()):
    """What loading a file does that names `architecture`."""
    save_model(folder, MLP, MLP.build())
    described = json.loads((folder / "spec.json").read_text())
    described |= {"architecture": architecture, "arguments": arguments or {}}
    (folder / "spec.json").write_text(json.dumps(described))
    return load_model(folder, allow_code)


@pytest.mark.parametrize(
    "name",
    ["os:system", "torch:load", "builtins:exec", "json:dumps", "torch.nn:Identity", "torch.hub:load",
     "torch.fx.graph_module:reduce_graph_module", "fedpress.models.plain:MLP", "models_of_a_stranger:net"],
)  # fmt: skip
def test_a_file_has_no_function_called_that_the_user_did_not_name(tmp_path, name):
    mark = tmp_path / "called"
    with pytest.raises(ModelError, match=rf'spec.json: .*\'{name}\'.*allow_code=\("{name}",\)'):
        named_by_a_file(tmp_path, name, {"command": f"touch {mark}"})
    assert not mark.exists()


@pytest.mark.parametrize(
    "name",
    ["torch.nn:Module.to", "os:", ":system", "os.:system", "..os:system", "os :system", "os:sys tem", "a:b:c", "a:b\n",
     "nets:Net\x1b[2K", "1a:b", "mlp:", "a/b:c", "a;b:c"],
)  # fmt: skip
def test_what_is_no_name_of_a_function_is_refused_without_an_offer(tmp_path, name):
    with pytest.raises(
        ModelError, match="neither a name of fedpress nor module:function"
    ) as caught:
        named_by_a_file(tmp_path, name)
    assert "allow_code" not in str(caught.value)
    assert "\x1b" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_nothing_is_imported_before_the_user_agrees(tmp_path, monkeypatch):
    (tmp_path / "mine_of_spec.py").write_text(
        "import pathlib; pathlib.Path(__file__).with_name('ran').touch()\n"
        "from torch import nn\n"
        "def build(): return nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 10))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    name = "mine_of_spec:build"
    with pytest.raises(ModelError, match="allow_code"):
        named_by_a_file(tmp_path, name)
    with pytest.raises(ModelError, match="allow_code"):
        named_by_a_file(tmp_path, name, allow_code=("mine_of_spec:other", "mine_of_spe:build"))
    assert not (tmp_path / "ran").exists()
    for agreed in ((name,), name, ["os:system", name]):
        with pytest.raises(
            ModelError, match="does not fit"
        ):  # it was built: the numbers are of another one
            named_by_a_file(tmp_path, name, allow_code=agreed)
    with pytest.raises(ModelError, match="allow_code"):  # one call was allowed it, not the next
        named_by_a_file(tmp_path, name)


def test_what_the_user_named_as_a_model_may_be_called_by_its_files(tmp_path):
    name = "fractions:Fraction"  # of the standard library; returns no network
    with pytest.raises(ModelError, match="returned Fraction"):
        ModelSpec(architecture=name, input_shape=(1,)).build_for_user()
    with pytest.raises(ModelError, match="returned Fraction"):
        named_by_a_file(tmp_path, name)


HUGE = {
    "a wide layer": (
        "mlp",
        {"in_features": 6, "hidden": [10**9]},
        r"spec.arguments: 17,000,000,010 values",
    ),
    "a number": (
        "resnet-small",
        {"width": 10**12},
        "spec.arguments.width: 1,000,000,000,000 values",
    ),
    "a wide network": ("resnet-small", {"width": 10**5}, "spec.arguments: .* values"),
    "a large image": ("cnn", {"image_size": 10**6}, "spec.arguments: .* values"),
    "many layers": (
        "mlp",
        {"in_features": 6, "hidden": [1] * 20_000},
        "spec.arguments.hidden: 20,000 .*",
    ),
    "many recurrent layers": (
        "torch-layers",
        {"layers": {"": {"layer": "RNN", "input_size": 1, "hidden_size": 1, "num_layers": 10**9}}},
        r"spec.arguments.layers..num_layers: 1,000,000,000 ",
    ),
    "many classes": ("resnet18", {"num_classes": 10**8}, "spec.arguments: .* values"),
}


@pytest.mark.parametrize(("name", "arguments", "says"), HUGE.values(), ids=HUGE)
def test_declared_sizes_are_refused_before_anything_is_built(
    tmp_path, monkeypatch, name, arguments, says
):
    built = []
    monkeypatch.setattr(ModelSpec, "build", lambda self: built.append(self))
    with pytest.raises(ModelError, match=rf"spec.json: {says}.*set FEDPRESS_MAX_\w+=\d+"):
        named_by_a_file_unbuilt(tmp_path, name, arguments)
    assert not built


def named_by_a_file_unbuilt(folder, architecture, arguments, **more):
    (folder / "model.safetensors").write_bytes(b"")
    page = {"architecture": architecture, "arguments": arguments, "input_shape": [2, 3], **more}
    (folder / "spec.json").write_text(json.dumps(page))
    return load_model(folder)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (
            {"input_shape": [10**5, 10**5]},
            r"spec.input_shape: 10,000,000,000 values of one example.*MAX_INPUT",
        ),
        ({"resized": {"layers.0.weight": [10**11, 6]}}, "spec.resized"),
        ({"groups": {"layers.0": 10**12}}, "spec.groups"),
        (
            {"arguments": {"in_features": json.loads("[" * 40 + "6" + "]" * 40)}},
            "spec.arguments: 41 lists and tables",
        ),
    ],
)
def test_every_number_of_a_spec_has_a_limit(tmp_path, more, says):
    with pytest.raises(ModelError, match=says):
        named_by_a_file_unbuilt(tmp_path, "mlp", more.pop("arguments", {"in_features": 6}), **more)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"input_shape": [2, -3]}, "spec.input_shape: got .*above 0"),
        ({"input_shape": [0]}, "spec.input_shape: got .*above 0"),
        ({"mean": [0.5], "std": [0.0]}, "spec.std: expected"),
        ({"mean": [0.5], "std": []}, "spec.std: expected"),
    ],
)
def test_numbers_that_no_spec_has_are_refused_when_it_is_read(tmp_path, more, says):
    with pytest.raises(ModelError, match=rf"spec.json: {says}"):
        named_by_a_file_unbuilt(tmp_path, "mlp", {"in_features": 6}, **more)


def test_a_limit_can_be_raised_as_the_error_says(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDPRESS_MAX_VALUES", "100")
    spec = ModelSpec(
        architecture="mlp", arguments={"in_features": 6, "hidden": [20]}, input_shape=(2, 3)
    )
    save_model(tmp_path, spec, spec.build())
    with pytest.raises(ModelError, match=r"350 values of a network.* set FEDPRESS_MAX_VALUES=350$"):
        load_model(tmp_path)
    monkeypatch.setenv("FEDPRESS_MAX_VALUES", "350")
    load_model(tmp_path)


class Wide(nn.Module):
    """A network of the user's own, whose size is said by the file."""

    def __init__(self, width: int = 4, depth: int = 1) -> None:
        super().__init__()
        self.body = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [({"width": 60_000}, "3,600,000,000 values"), ({"depth": 201}, "201 modules")],
)
def test_a_function_that_was_allowed_is_watched_while_it_builds(
    tmp_path, monkeypatch, arguments, says
):
    monkeypatch.setenv("FEDPRESS_MAX_LAYERS", "200")
    with pytest.raises(ModelError, match=says):
        named_by_a_file(tmp_path, own("Wide"), arguments, allow_code=own("Wide"))


class Lazy(nn.Module):
    """A network whose sizes come from its first input."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.LazyLinear(4))


class Secretive(nn.Module):
    """A network that saves more than tensors."""

    def get_extra_state(self):
        return {"seen": 3}


@pytest.mark.parametrize(("kind", "says"), [(Lazy, r"'body.0' is a LazyLinear.* run the model once"),
                                            (Secretive, "Secretive has an extra state")])  # fmt: skip
def test_what_no_file_could_hold_is_refused_when_it_is_built(kind, says):
    with pytest.raises(ModelError, match=says):
        ModelSpec(architecture=f"{__name__}:{kind.__name__}", input_shape=(3,)).build_dense()


def test_a_file_from_before_one_bit_had_a_middle_opens_with_the_sign_alone(tmp_path):
    grids = {
        "0": {"weights": {"kind": "binary", "bits": 1}, "inputs": {"bits": 1, "dynamic": False}}
    }
    old = {
        "architecture": "mlp",
        "arguments": {"in_features": 3, "num_classes": 2},
        "input_shape": [3],
    }
    spec = ModelSpec.of_file(json.dumps({**old, "quantized": grids}))
    assert spec.quantized["0"].inputs == InputQuantization(bits=1, middle=False)
    new = spec.model_copy(
        update={"quantized": {"0": QuantizationScheme(inputs=InputQuantization(bits=1))}}
    )
    for text in (new.model_dump_json(), new.model_dump_json(exclude_defaults=True)):
        assert ModelSpec.of_file(text).quantized["0"].inputs.middle
