"""Token ids, several inputs and outputs, dictionaries: exported, run back, compared and measured."""

import json
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedpress import deploy
from fedpress.compress.quantize import quantizable, quantize_
from fedpress.deploy import Candidate, Job, export_onnx, measure, open_file, parity
from fedpress.deploy.examples import flatten, unflatten
from fedpress.errors import ExportError
from fedpress.nn.quant_scheme import InputQuantization, QuantizationScheme, WeightQuantization

onnx = pytest.importorskip("onnx")


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.body, self.head = nn.Embedding(50, 16), nn.Linear(16, 24), nn.Linear(24, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.relu(self.body(self.table(ids))).mean(1))


class Masked(Tokens):
    """Two inputs by name, as the models of the transformers library take them; a dictionary comes out."""

    def forward(
        self, ids: Tensor, mask: Tensor | None = None
    ) -> dict[str, Tensor | tuple[Tensor, ...] | None]:
        hidden = torch.relu(self.body(self.table(ids)))
        weight = torch.ones_like(ids) if mask is None else mask
        mean = (hidden * weight[..., None]).sum(1) / weight.sum(1, keepdim=True)
        return {"loss": None, "logits": self.head(mean), "hidden": (hidden, mean)}


class Pair(nn.Module):
    """An image and its features; both predictions come out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.side, self.head = nn.Conv2d(3, 8, 3), nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, image: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        a, b = torch.relu(self.conv(image)).mean((2, 3)), torch.relu(self.side(features))
        return self.head(a + b), b


class Named(NamedTuple):
    logits: Tensor
    energy: Tensor


class Energy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Named:
        out = self.head(x)
        return Named(out, torch.logsumexp(out, 1))


class ClassToken(nn.Module):
    """A small vision transformer whose class token is spread over the batch in one of the usual ways."""

    def __init__(self, how: str = "expand", depth: int = 2) -> None:
        super().__init__()
        self.how = how
        self.patches, self.token = nn.Conv2d(3, 16, 4, 4), nn.Parameter(torch.randn(1, 1, 16))
        self.place = nn.Parameter(torch.randn(1, 5, 16))
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True)
        self.body, self.head = (
            nn.TransformerEncoder(layer, depth, enable_nested_tensor=False),
            nn.Linear(16, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        token = {
            "expand": lambda: self.token.expand(x.shape[0], -1, -1),
            "len": lambda: self.token.expand(len(x), -1, -1),
            "sizes": lambda: self.token.expand(x.size(0), 1, x.size(2)),
            "repeat": lambda: self.token.repeat(x.shape[0], 1, 1),
            "as": lambda: self.token.expand_as(x[:, :1]),
            "tile": lambda: torch.tile(self.token, (x.shape[0], 1, 1)),
            "zeros": lambda: torch.zeros(x.shape[0], 1, 16) + self.token,
        }[self.how]()
        return self.head(self.body(torch.cat([token, x], 1) + self.place)[:, 0])


def ids(rows: int = 8, length: int = 12) -> Tensor:
    return torch.randint(0, 50, (rows, length), generator=torch.Generator().manual_seed(rows))


def masks(rows: int = 8, length: int = 12) -> Tensor:
    return (torch.arange(length) < 3 + torch.arange(rows)[:, None] % 9).long()


def pair(rows: int = 8) -> tuple[Tensor, Tensor]:
    chance = torch.Generator().manual_seed(rows)
    return torch.randn(rows, 3, 8, 8, generator=chance), torch.randn(rows, 6, generator=chance)


def sizes(values: list) -> list[list[int | str]]:
    return [[d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values]


@pytest.mark.recipe
def test_token_ids_are_whole_numbers_in_the_file(tmp_path):
    model = Tokens().eval()
    made = export_onnx(model, tmp_path / "m.onnx", Job(example=ids(1)))
    graph = onnx.load(made.path).graph
    assert graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.INT64
    assert sizes([*graph.input, *graph.output]) == [["batch", 12], ["batch", 4]]
    for rows in (1, 2, 5):
        assert parity(model, made.path, ids(rows)).examples == rows
    assert json.loads(made.metadata["input_shape"]) == [12]
    assert made.metadata["input"].startswith("int64")
    with pytest.raises(ExportError, match=r"'input' is float32, but .* takes int64"):
        open_file(made.path)(np.ones((1, 12), np.float32))
    assert open_file(made.path)(ids(2).int().numpy()).shape == (2, 4)


@pytest.mark.recipe
@pytest.mark.parametrize(
    "batches", [(), ({"mask": masks(), "ids": ids()},)], ids=["float", "integers"]
)
def test_inputs_by_name_and_a_dictionary_of_outputs_come_back_as_they_are(tmp_path, batches):
    torch.manual_seed(0)
    model = Masked().eval()
    example = {"mask": masks(1), "ids": ids(1)}  # not in the order of forward
    made = export_onnx(model, tmp_path / "m.onnx", Job(example=example, batches=batches))
    session = open_file(made.path, threads=1)
    assert [port.name for port in session.inputs] == ["ids", "mask"]
    assert session.outputs == ("logits", "hidden_0", "hidden_1")
    for rows in (1, 2, 7):
        wanted = model(ids(rows), masks(rows))
        for got in (
            session(ids(rows).numpy(), masks(rows).numpy()),
            session(mask=masks(rows).numpy(), ids=ids(rows).numpy()),
            session({"mask": masks(rows).numpy(), "ids": ids(rows).numpy()}),
        ):
            assert list(got) == ["loss", "logits", "hidden"]
            assert got["loss"] is None
            near = 0.05 if batches else 1e-5
            assert np.abs(got["logits"] - wanted["logits"].detach().numpy()).max() < near
            assert np.abs(got["hidden"][0] - wanted["hidden"][0].detach().numpy()).max() < 2 * near
        found = parity(
            made.program or model,
            made.path,
            {"ids": ids(rows), "mask": masks(rows)},
            tolerance=made.tolerance,
        )
        assert found.examples == rows
    with pytest.raises(ExportError, match=r"lacks mask.*takes ids, mask"):
        session(ids(2).numpy())
    with pytest.raises(ExportError, match=r"has extra types.*takes ids, mask"):
        session(ids(2).numpy(), masks(2).numpy(), types=ids(2).numpy())


@pytest.mark.recipe
@pytest.mark.parametrize("batches", [(), (pair(32),)], ids=["float", "integers"])
def test_two_inputs_and_two_outputs_by_position(tmp_path, batches):
    torch.manual_seed(0)
    model = Pair().eval()
    made = export_onnx(model, tmp_path / "m.onnx", Job(example=pair(2), batches=batches))
    graph = onnx.load(made.path).graph
    assert [v.name for v in graph.input] == ["image", "features"]
    assert [v.name for v in graph.output] == ["output_0", "output_1"]
    assert {size[0] for size in sizes([*graph.input, *graph.output])} == {"batch"}
    for rows in (1, 6, 300):
        parity(made.program or model, made.path, pair(rows), tolerance=made.tolerance)
    first, second = open_file(made.path)(*(t.numpy() for t in pair(3)))
    assert first.shape == (3, 5)
    assert second.shape == (3, 8)
    other = Pair().eval()
    with pytest.raises(ExportError, match=r"the output 'output_0' of .* differs"):
        parity(other, made.path, pair(3))


def test_a_named_tuple_comes_back_by_its_names(tmp_path):
    model = Energy().eval()
    made = export_onnx(model, tmp_path / "m.onnx", Job((6,)))
    got = open_file(made.path)(np.ones((2, 6), np.float32))
    assert {name: value.shape for name, value in got.items()} == {"logits": (2, 3), "energy": (2,)}
    assert parity(model, made.path, torch.randn(5, 6)).same_argmax_share == 1.0
    assert deploy.file_logits(made.path, torch.randn(5, 6)).shape == (5, 3)


@pytest.mark.parametrize(
    "how",
    [
        "expand",
        "sizes",
        "zeros",
        *(pytest.param(how, marks=pytest.mark.recipe) for how in ("len", "repeat", "as", "tile")),
    ],
)
def test_the_batch_of_a_spread_class_token_is_free(tmp_path, how):
    torch.manual_seed(0)
    model, x = ClassToken(how, depth=1).eval(), torch.randn(9, 3, 8, 8)
    made = export_onnx(model, tmp_path / "m.onnx", Job((3, 8, 8)))
    for rows in (1, 2, 9):
        parity(model, made.path, x[:rows])


@pytest.mark.recipe
def test_the_batch_of_a_class_token_is_free_on_integers(tmp_path):
    torch.manual_seed(0)
    model, x = ClassToken().eval(), torch.randn(32, 3, 8, 8)
    table, _ = quantizable(
        model, QuantizationScheme(weights=WeightQuantization(), inputs=InputQuantization())
    )
    quantize_(model, table, [x])
    made = export_onnx(model, tmp_path / "m.onnx", Job((3, 8, 8), batches=(x,)))
    for rows in (1, 2, 9):
        parity(made.program, made.path, x[:rows], tolerance=made.tolerance)


@pytest.mark.recipe
def test_models_of_token_ids_and_of_pairs_are_measured(tmp_path):
    model = Masked().eval()
    example = {"ids": ids(2), "mask": masks(2)}
    path = export_onnx(model, tmp_path / "m.onnx", Job(example=example)).path
    candidates = {
        "torch": Candidate(model, macs=10**6, activations=10**4),
        "file": Candidate(path, macs=10**6, activations=10**4),
    }
    found = measure(candidates, example, batches=(1, 3), threads=(1,), seconds=0.01)
    assert [record["peak_memory"] > 0 for record in found] == [True, True]
    assert [t["batch"] for t in found[1]["timings"]] == [1, 3]
    assert found[1]["conditions"]["runtime"] == "onnxruntime"
    assert deploy.latency(path, example, seconds=0.01).conditions["threads"] == 1


class Decides(nn.Module):
    """Names that meet each other in the file, and outputs of whole numbers and of yes and no."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 3)

    def forward(self, logits: Tensor, more: Tensor) -> dict[str, object]:
        y = self.head(logits) - self.head(more)
        return {"logits": y, "a": {"b": y.argmax(1)}, "a_b": y > 0}


def test_outputs_of_any_name_and_type_are_exported_and_compared(tmp_path):
    torch.manual_seed(0)
    model, x = Decides().eval(), (torch.randn(8, 6), torch.randn(8, 6).half().float())
    made = export_onnx(model, tmp_path / "m.onnx", Job(example=x))
    assert parity(model, made.path, x).examples == 8
    with torch.no_grad():
        wanted = model(*x)
    got = open_file(made.path)(*(t.numpy() for t in x))
    assert torch.equal(torch.as_tensor(got["a"]["b"]), wanted["a"]["b"])
    assert torch.equal(torch.as_tensor(got["a_b"]), wanted["a_b"])
    model.head.weight.data.neg_()
    model.forward = lambda *x: {**wanted, "a_b": ~wanted["a_b"]}
    with pytest.raises(ExportError, match=r"'a_b' of .* differs from that of the model in 100%"):
        parity(model, made.path, x)


@dataclass
class Answer:
    logits: Tensor
    more: Tensor | None = None


class Answers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Answer:
        return Answer(self.head(x))


def test_a_dataclass_is_exported_once_torch_knows_it(tmp_path):
    model, job = Answers().eval(), Job((6,))
    with pytest.raises(ExportError, match=r"torch\.export\.register_dataclass"):
        export_onnx(model, tmp_path / "m.onnx", job)
    torch.export.register_dataclass(Answer)
    made = export_onnx(model, tmp_path / "m.onnx", job)
    assert parity(model, made.path, torch.randn(5, 6)).examples == 5


class Cached(nn.Module):
    def forward(self, x: Tensor) -> dict:
        return {"logits": x, "past": object()}


def test_what_is_no_tensor_is_named_with_its_place(tmp_path):
    with pytest.raises(ExportError, match=r"returns a object under 'past'.*leave it out"):
        export_onnx(Cached(), tmp_path / "m.onnx", Job((4,)))
    with pytest.raises(ExportError, match="neither input_shape nor example"):
        Job()
    with pytest.raises(ExportError, match=r"shapes \[2, 12\], \[3, 12\].*same batch size"):
        Job(example=(ids(2), ids(3)))
    with pytest.raises(ExportError, match="a list inside"):
        Job(example={"ids": [1, 2]})


def test_what_was_taken_apart_is_put_together_again():
    one, two, three = torch.ones(1), torch.ones(2), torch.ones(3)
    structure, tensors, names = flatten({"a": one, "b": [two, None, {"c": three}]})
    assert names == ["a", "b_0", "b_2_c"]
    assert unflatten(json.loads(json.dumps(structure)), tensors) == {
        "a": one,
        "b": (two, None, {"c": three}),
    }


@pytest.mark.deploy
@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "t5", "vit"])
def test_models_of_the_transformers_library_are_exported(tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    small = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"input_ids": ids(2), "attention_mask": masks(2)}
    if kind == "bert":
        config = transformers.BertConfig(**small, intermediate_size=64, num_labels=3)
        model, example = transformers.BertForSequenceClassification(config), tokens
    elif kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=50, n_embd=32, n_layer=2, n_head=4, use_cache=False
        )
        model, example = transformers.GPT2LMHeadModel(config), tokens
    elif kind == "llama":
        config = transformers.LlamaConfig(
            **small, intermediate_size=64, num_key_value_heads=2, use_cache=False
        )
        model, example = transformers.LlamaForCausalLM(config), tokens
    elif kind == "t5":
        config = transformers.T5Config(
            vocab_size=50, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, use_cache=False
        )
        model = transformers.T5ForConditionalGeneration(config)
        example = tokens | {"decoder_input_ids": ids(2, 5)}
    else:
        config = transformers.ViTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            image_size=16,
            patch_size=4,
        )
        model, example = (
            transformers.ViTForImageClassification(config),
            {"pixel_values": torch.randn(2, 3, 16, 16)},
        )
    model = model.eval()
    made = export_onnx(model, tmp_path / "m.onnx", Job(example=example))
    session = open_file(made.path)
    for rows in (1, 3):
        wanted = deploy.examples.take_rows(example, rows)
        parity(model, made.path, wanted)
        got = session(**{name: t.numpy() for name, t in wanted.items()})
        assert got["logits"].shape == tuple(model(**wanted).logits.shape)


@pytest.mark.parametrize("batches", [torch.zeros(4, 3), {"input_ids": torch.zeros(4, 3).long()}])
def test_one_batch_is_not_taken_for_several(batches):
    with pytest.raises(ExportError, match="batches: got one batch, expected a tuple of them"):
        Job(input_shape=(3,), batches=batches)
