import copy
import hashlib
import json
from contextlib import suppress

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedpress import storage
from fedpress.compress.quantize import quantizable, quantize_
from fedpress.errors import ModelError
from fedpress.models import ARCHITECTURES, ModelSpec, load_model, save_model
from fedpress.nn.folded import apply_folds_
from fedpress.nn.quant_scheme import InputQuantization, QuantizationScheme, WeightQuantization
from fedpress.nn.quantized import materialize_, quantize_layers_
from fedpress.storage import container
from fedpress.storage.packed import from_bytes, to_bytes

IMAGE = (3, 8, 8)
SMALL = {
    "architecture": "resnet-small",
    "arguments": {"width": 6, "num_classes": 3},
    "input_shape": IMAGE,
}
GRIDS = {
    "int8": WeightQuantization(bits=8),
    "int4": WeightQuantization(bits=4),
    "int4 in groups": WeightQuantization(bits=4, group=32),
    "ternary": WeightQuantization(kind="ternary"),
    "binary": WeightQuantization(kind="binary"),
    "codebook": WeightQuantization(kind="codebook", bits=3),
    "codebook of 4 bits": WeightQuantization(kind="codebook", bits=3, centroid_bits=4),
}


def bits(model):
    return {
        n: (t.dtype, tuple(t.shape), t.contiguous().reshape(-1).view(torch.uint8))
        for n, t in model.state_dict().items()
    }


def assert_same_bits(one, two):
    one, two = bits(one), bits(two)
    assert one.keys() == two.keys()
    for name, (kind, shape, raw) in one.items():
        assert two[name][:2] == (kind, shape), name
        assert torch.equal(two[name][2], raw), name


def built(**changes):
    torch.manual_seed(0)
    spec = ModelSpec(**{**SMALL, **changes})
    model = spec.build()
    with torch.no_grad():  # statistics and scales as after training
        for name, value in model.state_dict().items():
            if name.endswith(("running_mean", "running_var", "norm.weight", "norm1.bias")):
                value.uniform_(0.5, 1.5)
    return spec, model


def convolutions(model):
    return [
        name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)
    ]


def quantized(kind, inputs=None, **changes):
    spec, model = built(**changes)
    table = {
        name: QuantizationScheme(weights=GRIDS[kind], inputs=inputs) for name in convolutions(model)
    }
    quantize_layers_(model, table)
    return spec.model_copy(update={"quantized": table}), materialize_(model)


def pruned():
    spec, _ = built()
    channels = (
        "conv1.weight",
        "norm1.weight",
        "norm1.bias",
        "norm1.running_mean",
        "norm1.running_var",
    )
    shapes = {f"stages.0.0.{name}": (4,) for name in channels}
    shapes |= {"stages.0.0.conv1.weight": (4, 6, 3, 3), "stages.0.0.conv2.weight": (6, 4, 3, 3)}
    spec = spec.model_copy(update={"resized": shapes})
    return spec, spec.build()


def sparse():
    spec, model = built()
    names = tuple(f"{name}.weight" for name in convolutions(model))
    with torch.no_grad():
        for name in names:
            weight = model.get_parameter(name)
            weight[torch.rand_like(weight) < 0.9] = 0
    return spec.model_copy(update={"sparse": names}), model


def folded():
    spec, model = quantized("int8", InputQuantization())
    apply_folds_(model, {"norm": "stem"})
    return spec.model_copy(update={"folded": {"norm": "stem"}}), model


MODELS = {
    "float": built,
    "group norm": lambda: built(arguments={"width": 8, "norm": "group", "num_classes": 3}),
    "mlp": lambda: built(
        architecture="mlp", arguments={"in_features": 12, "hidden": [5], "num_classes": 2}
    ),
    "pruned": pruned,
    "sparse": sparse,
    "folded": folded,
    "inputs too": lambda: quantized("int8", InputQuantization()),
    **{kind: lambda kind=kind: quantized(kind) for kind in GRIDS},
}


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_model_comes_back_to_the_bit(name, tmp_path):
    spec, model = MODELS[name]()
    packed = storage.pack(spec, model, tmp_path / "m.safetensors")
    back, twin = storage.unpack(tmp_path / "m.safetensors")
    assert back == spec
    assert_same_bits(model, twin)
    assert packed.float_layers == {}
    assert (
        packed.file_bytes
        == (tmp_path / "m.safetensors").stat().st_size
        == sum(packed.kinds.values())
    )
    x = torch.randn(2, *((12,) if name == "mlp" else IMAGE))
    assert torch.equal(model.eval()(x), twin.eval()(x))


@pytest.mark.parametrize("name", ["float", "int4"])
def test_the_same_model_gives_the_same_file(name):
    assert to_bytes(*MODELS[name]())[0] == to_bytes(*MODELS[name]())[0]


def test_nan_infinity_and_minus_zero_come_back():
    spec, model = built()
    with torch.no_grad():
        model.head.weight[0, :4] = torch.tensor([float("nan"), float("-inf"), -0.0, 1e-44])
    assert_same_bits(model, from_bytes(to_bytes(spec, model)[0], "x")[1])


@pytest.mark.parametrize("wrong", ["latent", "nan"])
def test_weights_off_their_grid_are_stored_as_floats_and_named(wrong):
    spec, model = quantized("int8")
    with torch.no_grad():
        model.head.weight[0, 0] = float("nan") if wrong == "nan" else model.head.weight[0, 0] + 1e-6
    data, packed = to_bytes(spec, model)
    assert packed.float_layers.keys() == {"head"}
    assert {"latent": "materialize_", "nan": "NaN"}[wrong] in packed.float_layers["head"]
    assert_same_bits(model, from_bytes(data, "x")[1])


def test_codes_take_about_a_quarter_of_floats_and_four_bits_half_of_that():
    wide = {"arguments": {"width": 20, "num_classes": 3}}
    sizes = [
        to_bytes(*model)[1].kinds
        for model in (built(**wide), quantized("int8", **wide), quantized("int4", **wide))
    ]
    assert (
        sizes[1]["codes"] < 0.31 * sizes[0]["weights"]
    )  # the codes of uniform weights are uniform
    assert sizes[2]["codes"] < 0.55 * sizes[1]["codes"]


def test_sparse_weights_take_less_than_a_fifth():
    assert to_bytes(*sparse())[1].kinds["weights"] < 0.2 * to_bytes(*built())[1].kinds["weights"]


class Tied(nn.Module):
    """Two layers with one weight, and numbers of every type."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.b.weight = self.a.weight
        for kind in (
            torch.float64,
            torch.bfloat16,
            torch.int32,
            torch.int16,
            torch.int8,
            torch.uint8,
        ):
            self.register_buffer(
                f"of_{kind.itemsize}_{kind.is_floating_point}_{kind.is_signed}",
                torch.arange(5).to(kind),
            )
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("nothing", torch.zeros(0))

    def forward(self, x):
        return self.b(self.a(x))


@pytest.fixture
def tied(monkeypatch):
    monkeypatch.setattr("fedpress.models.spec.ARCHITECTURES", {"tied": Tied})
    return ModelSpec(architecture="tied", input_shape=(6,))


def test_a_shared_weight_is_stored_once_and_stays_shared(tied):
    model = tied.build()
    data = to_bytes(tied, model)[0]
    assert json.loads(container.from_bytes(data, "x")[2])["same"] == {"b.weight": "a.weight"}
    twin = from_bytes(data, "x")[1]
    assert twin.a.weight is twin.b.weight
    assert_same_bits(model, twin)


def test_a_shared_weight_on_a_grid_stays_shared(tied):
    table = {"a": QuantizationScheme(weights=WeightQuantization(bits=4))}
    spec = tied.model_copy(update={"quantized": table})
    model = materialize_(spec.build())
    twin = from_bytes(to_bytes(spec, model)[0], "x")[1]
    assert_same_bits(model, twin)


def test_a_model_of_another_spec_is_refused(tmp_path):
    spec, model = built()
    other = spec.model_copy(update={"arguments": {"width": 4, "num_classes": 3}})
    with pytest.raises(
        ModelError, match=r"spec: the spec builds another network \('.*' differs\); give the spec"
    ):
        storage.pack(other, model, tmp_path / "m")
    assert not any(tmp_path.iterdir())


def test_weights_that_only_seem_shared_are_refused_instead_of_lost(tmp_path):
    spec, model = built()
    model.stages[0][0].norm2.weight = model.stages[0][
        0
    ].norm1.weight  # not shared in what the spec builds
    storage.pack(spec, model, tmp_path / "m")
    assert_same_bits(model, storage.unpack(tmp_path / "m")[1])


def test_a_type_that_has_no_name_is_refused():
    spec, model = built()
    model.register_buffer("odd", torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(ModelError, match=r"'odd' has the type complex64"):
        to_bytes(spec, model)


@pytest.mark.parametrize("place", ["missing.safetensors", "."])
def test_a_file_that_cannot_be_read_is_named(tmp_path, place):
    with pytest.raises(ModelError, match=r"cannot be read .*; give the path of a packed model"):
        storage.unpack(tmp_path / place)


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match=r"cannot be written"):
        storage.pack(*built(), tmp_path / "file" / "m.safetensors")


def test_an_architecture_that_changed_since_is_named(tied, monkeypatch):
    data = to_bytes(tied, tied.build())[0]
    monkeypatch.setattr("fedpress.models.spec.ARCHITECTURES", {"tied": lambda: nn.Linear(6, 6)})
    with pytest.raises(
        ModelError, match=r"x: its tensors do not fit its spec .* changed since packing"
    ):
        from_bytes(data, "x")
    monkeypatch.setattr("fedpress.models.spec.ARCHITECTURES", {})
    with pytest.raises(ModelError, match=r"x: .*no architecture 'tied'"):
        from_bytes(data, "x")


TINY = to_bytes(*MODELS["mlp"]())[0]
CODED = to_bytes(
    *quantized(
        "int4", architecture="mlp", arguments={"in_features": 12, "hidden": [5], "num_classes": 2}
    )
)[0]


@settings(deadline=None, max_examples=30)
@given(at=st.integers(0, 1 << 20), byte=st.integers(0, 255), cut=st.booleans(), coded=st.booleans())
def test_damage_is_a_model_error_that_names_the_file(at, byte, cut, coded):
    good = CODED if coded else TINY
    at %= len(good)
    bad = good[:at] + (b"" if cut else bytes([byte]) + good[at + 1 :])
    if bad != good:
        with pytest.raises(ModelError, match=r"^the file: "):
            from_bytes(bad, "the file")


@settings(deadline=None, max_examples=30)
@given(data=st.data(), coded=st.booleans())
def test_damage_under_a_right_checksum_is_a_model_error_or_another_model(data, coded):
    blobs, spec, table = container.from_bytes(CODED if coded else TINY, "x")
    name = data.draw(st.sampled_from(sorted(blobs)))
    blob = bytearray(blobs[name])
    blob[data.draw(st.integers(0, len(blob) - 1))] = data.draw(st.integers(0, 255))
    blobs[name] = bytes(
        blob[: data.draw(st.integers(0, len(blob)))] if data.draw(st.booleans()) else blob
    )
    with suppress(ModelError):
        assert (
            from_bytes(container.to_bytes(blobs, spec, table), "the file")[0].architecture == "mlp"
        )


WRONG_TABLES = [
    "",
    "[]",
    '{"blobs": []}',
    '{"blobs": {"a": {"dtype": "float32", "tensors": {}}}}',
    '{"blobs": {"a": {"dtype": "float31", "tensors": {"x": [1]}}}}',
    '{"blobs": {"a": {"dtype": "float32", "tensors": {"x": [-1]}}}}',
    '{"blobs": {"a": {"dtype": "float32", "tensors": {"x": [99999999999999999999999]}}}}',
    '{"blobs": {"a": {"dtype": "float32", "tensors": {"x": [281474976710655, 281474976710655]}}}}',
    '{"blobs": {}, "same": {"x": "y"}}',
    '{"blobs": {"a": {"dtype": "float32", "tensors": {"x": [1]}}}, "same": {"x": "x"}}',
]


@pytest.mark.parametrize("table", WRONG_TABLES)
def test_a_wrong_table_under_a_right_checksum_is_a_model_error(table):
    spec = container.from_bytes(TINY, "x")[1]
    for blobs in ({}, {"a": b"\x00"}):
        with pytest.raises(ModelError, match=r"^the file: "):
            from_bytes(container.to_bytes(blobs, spec, table), "the file")


@pytest.mark.parametrize(
    "spec", ["", "{}", '{"architecture": "mlp", "input_shape": [12], "later": 1}']
)
def test_a_wrong_spec_under_a_right_checksum_is_a_model_error(spec):
    blobs, _, table = container.from_bytes(TINY, "x")
    with pytest.raises(ModelError, match=r"^the file: "):
        from_bytes(container.to_bytes(blobs, spec, table), "the file")


def test_codes_of_a_layer_that_is_not_quantized_are_refused():
    blobs, spec, table = container.from_bytes(CODED, "x")
    plain = json.loads(spec)
    del plain["quantized"]
    wrong = json.loads(table)
    for name in [n for n in wrong["blobs"] if n.startswith("scales")]:
        del wrong["blobs"][name], blobs[name]
    with pytest.raises(ModelError, match=r"the codes of 'layers.0.weight'"):
        from_bytes(container.to_bytes(blobs, json.dumps(plain), json.dumps(wrong)), "the file")


def test_load_takes_a_file_a_folder_and_a_run(tmp_path):
    spec, model = built()
    storage.pack(spec, model, tmp_path / "m.safetensors")
    save_model(tmp_path / "folder", spec, model)
    for number, width in ((2, 6), (10, 6), (11, 4)):
        stage = tmp_path / "run" / "stages" / f"{number}-train"
        if number == 10:
            save_model(stage, spec, model)
        else:
            save_model(
                stage, *built(arguments={"width": width, "num_classes": 3}, mean=(0.5,), std=(1.0,))
            )
        if number != 11:  # the last one is not finished
            (stage / "result.json").write_text("{}")
    for place in ("m.safetensors", "folder", "run"):
        back, twin = storage.load(tmp_path / place)
        assert back == spec
        assert_same_bits(model, twin)


def test_a_run_without_a_finished_stage_is_named(tmp_path):
    (tmp_path / "stages" / "0-train").mkdir(parents=True)
    with pytest.raises(ModelError, match=r"no stage of this run is finished"):
        storage.load(tmp_path)


def test_what_is_packed_is_not_changed():
    spec, model = quantized("int4")
    before = copy.deepcopy(model)
    to_bytes(spec, model)
    assert_same_bits(model, before)


def test_the_checksum_is_blake2b_of_the_parts():
    blobs, spec, table = container.from_bytes(TINY, "x")
    digest = hashlib.blake2b(digest_size=16)
    for part in [
        spec.encode(),
        table.encode(),
        *(x for n in sorted(blobs) for x in (n.encode(), blobs[n])),
    ]:
        digest.update(len(part).to_bytes(8, "little") + part)
    assert digest.hexdigest().encode() in TINY


class Noisy(nn.Module):
    """A network that draws a buffer when it is built, and saves it or not."""

    def __init__(self, persistent):
        super().__init__()
        self.head = nn.Linear(3, 2)
        self.register_buffer("noise", torch.randn(3), persistent=persistent)

    def forward(self, x):
        return self.head(x + self.noise)


def test_a_packed_file_has_no_function_called_that_the_user_did_not_name(tmp_path):
    spec = ModelSpec(
        architecture=f"{__name__}:Noisy", arguments={"persistent": True}, input_shape=(3,)
    )
    path = tmp_path / "m.packed.safetensors"
    storage.pack(spec, spec.build(), path)
    for load in (storage.load, storage.unpack):
        with pytest.raises(ModelError, match=rf'm.packed.*allow_code=\("{spec.architecture}",\)'):
            load(path)
        assert load(path, allow_code=(spec.architecture,))[0] == spec


def test_a_packed_file_declares_no_sizes_above_the_limits():
    blobs = {"rest:bias:float32": b""}
    table = (
        '{"blobs": {"rest:bias:float32": {"dtype": "float32", "tensors": {"x": [1000000000000]}}}}'
    )
    spec = ModelSpec(
        architecture="mlp", arguments={"in_features": 10**7, "hidden": [10**7]}, input_shape=(3,)
    )
    with pytest.raises(ModelError, match=r"x: spec.arguments: .*set FEDPRESS_MAX_VALUES="):
        from_bytes(container.to_bytes(blobs, spec.model_dump_json(), table), "x")
    spec = ModelSpec(architecture="mlp", arguments={"in_features": 3}, input_shape=(3,))
    with pytest.raises(ModelError, match="its tensors do not fit its spec"):
        from_bytes(container.to_bytes(blobs, spec.model_dump_json(), table), "x")


def test_a_buffer_that_would_come_back_as_another_is_refused(tmp_path):
    for persistent in (True, False):
        spec = ModelSpec(
            architecture=f"{__name__}:Noisy", arguments={"persistent": persistent}, input_shape=(3,)
        )
        model = spec.build()
        if persistent:
            storage.pack(spec, model, tmp_path / "m.packed.safetensors")
            back = storage.unpack(tmp_path / "m.packed.safetensors", spec.architecture)[1]
            assert torch.equal(back.noise, model.noise)
        else:
            with pytest.raises(ModelError, match="the buffer 'noise' is not saved"):
                storage.pack(spec, model, tmp_path / "m.packed.safetensors")


class _Same(nn.Conv1d):
    def forward(self, x):
        return super().forward(nn.functional.pad(x, (1, 1)))


class _Everything(nn.Module):
    """A layer of each kind that grids know beside plain ones."""

    def __init__(self):
        super().__init__()
        self.same, self.up = _Same(3, 8, 3), nn.ConvTranspose1d(8, 6, 2, stride=2, groups=2)
        self.lstm, self.gru = (
            nn.LSTM(6, 5, bidirectional=True, batch_first=True),
            nn.GRU(10, 8, batch_first=True),
        )
        self.cell, self.words = nn.GRUCell(8, 8), nn.Embedding(12, 8)
        self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        x = self.up(self.same(x)).transpose(1, 2)
        x = self.gru(self.lstm(x)[0])[0] + self.words(
            torch.arange(x.shape[1], device=x.device) % 12
        )
        x = self.attention(x, x, x, need_weights=False)[0].mean(1)
        return self.head(self.cell(x))


@pytest.mark.recipe
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_every_kind_of_layer_on_a_grid_comes_back_from_a_packed_file_and_from_a_folder(
    grid, tmp_path, monkeypatch
):
    monkeypatch.setitem(ARCHITECTURES, "everything", _Everything)
    torch.manual_seed(0)
    model, x = _Everything().eval(), torch.randn(4, 3, 7)
    table, left = quantizable(
        model, QuantizationScheme(weights=grid, inputs=InputQuantization(bits=1))
    )
    assert not left
    quantize_(model, table, [x])
    spec = ModelSpec(architecture="everything", input_shape=(3, 7), quantized=table)
    data, packed = to_bytes(spec, model)
    assert not packed.float_layers
    assert (
        packed.kinds["codes"]
        < sum(p.numel() for n, p in model.named_parameters() if p.dim() > 1) * 1.3
    )
    _, twin = from_bytes(data, "here")
    assert_same_bits(twin, model)
    assert torch.equal(twin.eval()(x), model(x))
    save_model(tmp_path / "m", spec, model)
    assert_same_bits(load_model(tmp_path / "m")[1], model)


def test_a_model_that_is_itself_a_quantized_layer_is_packed_as_integers():
    table = {"": QuantizationScheme(weights=GRIDS["int4"])}
    spec = ModelSpec(
        architecture="torch.nn:Linear",
        arguments={"in_features": 64, "out_features": 32},
        input_shape=(64,),
        quantized=table,
    )
    model = nn.Linear(64, 32)
    quantize_layers_(model, table)
    data, packed = to_bytes(spec, materialize_(model))
    assert packed.kinds["codes"] < 64 * 32 * 4 / 8 * 1.1
    assert_same_bits(model, from_bytes(data, "model", allow_code=("torch.nn:Linear",))[1])
