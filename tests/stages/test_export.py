"""The export and measure stages on small runs: files on integers, refusals before the run, facts afterwards."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from fedpress.compress.cost import state_bytes
from fedpress.errors import DataError, ExportError, ModelError, RecipeError
from fedpress.nn.quant_scheme import QuantizationScheme, WeightQuantization
from fedpress.nn.quantized import quantize_layers_
from fedpress.pipeline import recipe as recipes
from fedpress.pipeline.measure import measure
from fedpress.pipeline.result import replace_simulated_metrics_
from fedpress.pipeline.start import first_state, load_data
from fedpress.stages.export import ExportStage, difference_in_words
from fedpress.stages.measure import measure_model
from fedpress.stages.pack import PackStage
from fedpress.stages.quantize import QuantizeStage
from fedpress.stages.train import TrainStage
from fedpress.storage import sizes
from fedpress.tasks import Classification
from tests.harness import checked, finish, stages

RECIPE = """
name = "small"
[data]
source = "digits"
num_clients = 2
examples_per_client = 60
[model]
architecture = "cnn"
arguments = { in_channels = 1, image_size = 8 }
[[stage]]
kind = "train"
epochs = 2
batch_size = 64
lr = 0.05
"""
EXPORT = '[[stage]]\nkind = "export"\nint8 = true\n'


@pytest.mark.recipe
@pytest.mark.usefixtures("memory_unmeasured")
def test_an_integer_export_is_compared_and_measured(tmp_path):
    text = (
        RECIPE
        + EXPORT
        + 'observer = "percentile"\n[[stage]]\nkind = "measure"\nbatches = [1]\nthreads = [1]\nseconds = 0.01\n'
    )
    train, export, measure = stages(text, tmp_path / "run")
    assert export["left_float"] == {}
    assert export["int8"] is True
    assert (tmp_path / "run" / export["artifact"]).stat().st_size == export["file_bytes"]
    assert export["file_bytes"] < 0.5 * train["file_bytes"]
    assert abs(export["accuracy"] - train["accuracy"]) < 0.03
    assert export["parity"]["same_argmax_share"] > 0.98
    assert export["parity"]["same_argmax_as_model"] > 0.95
    names = [r["name"] for r in measure["measure"]["runtimes"]]
    assert {"torch", "onnx float32", "onnx int8"} <= set(names)
    assert measure["measure"]["parameters"] == train["parameters"]
    kept = (*Classification.keys, "file_bytes", "latency_ms", "runtime")
    assert [measure[key] for key in kept] == [export[key] for key in kept], (
        "who only measures changes no worth"
    )
    assert (
        json.loads(next((tmp_path / "run").rglob("measure.json")).read_text()) == measure["measure"]
    )


@pytest.mark.recipe
def test_clients_begin_with_the_model_and_not_with_its_file(tmp_path):
    text = RECIPE + EXPORT + '[[stage]]\nkind = "federate"\nnum_rounds = 1\nepochs = 1\nlr = 0.01\n'
    train, _, federate = stages(text, tmp_path / "run", "stage.1.weight_bits=7")
    assert federate["accuracy_before"] == train["accuracy"]


def test_what_cannot_be_packed_is_measured_as_torch_holds_it(monkeypatch):
    recipe = recipes.load(RECIPE, ())
    state = first_state(recipe, load_data(recipe))
    grids = {"head": QuantizationScheme(weights=WeightQuantization())}
    quantize_layers_(state.model, grids)
    state = replace(state, spec=state.spec.model_copy(update={"quantized": grids}))

    def refuse(*_):
        raise ModelError("a buffer is of type complex64", place="pack", cure="turn it into float32")

    packed = measure(state, latency=False)["file_bytes"]
    monkeypatch.setattr(sizes, "to_bytes", refuse)
    assert measure(state, latency=False)["file_bytes"] == state_bytes(state.model) != packed


def test_check_refuses_what_cannot_be_exported_and_ranges_from_nothing():
    with pytest.raises(RecipeError, match="no format 'onx'; did you mean 'onnx'"):
        checked(RECIPE + '[[stage]]\nkind = "export"\nformat = "onx"\n')
    with pytest.raises(RecipeError, match=r"weight_bits: 7 .* give recipe.stage\[\d\].int8 = true"):
        checked(RECIPE + '[[stage]]\nkind = "export"\nweight_bits = 7\n')
    recipe = recipes.load(RECIPE + EXPORT, ())
    data = load_data(recipe)
    state = first_state(recipe, data)
    empty = replace(data, public=data.public.take(torch.arange(0)))
    with pytest.raises(DataError, match=r"int8.*public"):
        recipe.stage[1].check(replace(state, data=empty))
    branch = nn.Sequential(Branch(), nn.Flatten(), nn.Linear(64, 10))
    with pytest.raises(ExportError, match=r"'0' \(Branch\)"):
        recipe.stage[1].check(replace(state, model=branch))


class Branch(nn.Module):
    def forward(self, x):
        return x * 2 if x.sum() > 0 else x


def test_a_format_that_cannot_take_the_model_is_told_and_the_rest_measured():
    found = measure_model(
        nn.Sequential(Branch(), nn.Linear(4, 2)), (4,), batches=[1], threads=[1], seconds=0.001
    )
    assert [r["name"] for r in found["runtimes"]] == ["torch"]
    assert "Branch" in found["left_out"]["onnx float32"]
    assert found["macs"] == 8


@pytest.mark.recipe
def test_a_quantized_network_is_worth_what_its_file_is(tmp_path):
    text = (
        RECIPE
        + '[[stage]]\nkind = "quantize"\nweights = "binary"\nkeep = []\ninputs = "static"\ncalibration = 64\n'
        + EXPORT
    )
    result = finish(text, tmp_path / "run")
    _, quantize, export = result["stages"]
    assert quantize["accuracy"] == export["accuracy"] == result["final"]["accuracy"]
    assert "accuracy_simulated" in quantize
    assert [quantize[key] for key in Classification.keys] == [
        export[key] for key in Classification.keys
    ]
    assert 0 < export["balanced_accuracy"] <= 1
    for found in (export["conditions"], export["parity"]["conditions"]):
        assert found["runtime"] == "onnxruntime"
        assert found["version"]
        assert found["processor"]
        assert set(found["options"]) <= {"session.x64quantprecision"}
    assert export["parity"]["relative_error_of_model"] < 0.2


def test_the_accuracy_of_a_file_goes_to_the_quantize_stage_before_it_alone():
    stages = [
        QuantizeStage(kind="quantize"),
        PackStage(kind="pack"),
        ExportStage(kind="export"),
        TrainStage(kind="train", epochs=1),
        ExportStage(kind="export"),
    ]
    lines = [{"accuracy": accuracy} for accuracy in (0.9, 0.9, 0.8, 0.7, 0.6)]
    replace_simulated_metrics_(stages, lines)
    assert [line["accuracy"] for line in lines] == [0.8, 0.9, 0.8, 0.7, 0.6]
    assert lines[0]["accuracy_simulated"] == 0.9
    assert "accuracy_simulated" not in lines[3]


def test_a_file_that_is_off_is_told_in_words():
    assert difference_in_words(0.01, Classification(()), 0.9, 0.904, simulated=True) == ""
    told = difference_in_words(0.072, Classification(()), 0.9, 0.92, simulated=True)
    assert (
        told
        == "its outputs are 7.2% off those of the network simulated in torch; accuracy 90.00% against 92.00%"
    )
    assert (
        difference_in_words(0.03, Classification(()), None, None, simulated=False)
        == "its outputs are 3.0% off those of the network in torch"
    )
    assert difference_in_words(0.001, Classification(()), 0.8, 0.9, simulated=True)
