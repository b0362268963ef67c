"""One command and one Python call for each stage, on every kind of MODEL."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import prune as torch_prune

import fedpress
from fedpress import storage
from fedpress.errors import FedpressError, ModelError
from fedpress.models.weights import load_weights_
from fedpress.pipeline import recipe as recipes
from fedpress.pipeline import run as runs
from fedpress.pipeline.check import check_recipe
from fedpress.pipeline.commands import OneStage
from fedpress.pipeline.commands.subject import ChosenModel
from fedpress.pipeline.keys import settings_of
from fedpress.pipeline.recipe import Override
from fedpress.pipeline.start import load_data
from fedpress.stages.table import STAGES, commands
from fedpress.workspace.folder import RunFolder
from tests.harness import finish

SOURCE = """
from torch import nn

def net(width=8):
    conv = nn.Conv2d(1, width, 3)
    return nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten(), nn.Linear(width * 36, 10))
"""

NO_TEST_ROWS = """
from dataclasses import replace
from fedpress.data import DataSettings, load

def make():
    data = load(DataSettings(source="digits"), 0)
    return replace(data, test=data.test.take([]))
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny):
    """A run of one training, whose data are known."""
    path = tmp_path_factory.mktemp("trained") / "run"
    text = tiny.partition('[[stage]]\nkind = "prune"')[0]
    finish(text, path)
    return path


def test_every_kind_of_stage_is_a_command_and_a_call():
    stages = json.loads(recipes.schema())["properties"]["stage"]["items"]
    kinds = set(stages["discriminator"]["mapping"])
    assert kinds == {row.kind for row in STAGES}
    # Statistics are of the data that training comes after, so alone they would be of no use.
    assert kinds - {"measure", "statistics"} == set(commands()) <= set(fedpress.__all__)


@pytest.mark.recipe
def test_the_result_of_one_command_is_the_model_of_the_next(shell, trained):
    said = shell("prune", trained, "keep_params=0.5", "calibration=64", "--json")
    assert said.code == 0, said.err
    page = json.loads(said.out)
    assert page["after"]["parameters"] / page["before"]["parameters"] == pytest.approx(
        0.5, abs=0.02
    )
    first = json.loads((trained / "result.json").read_text())["final"]
    assert page["before"]["accuracy"] == first["accuracy"], (
        "the data of the run that left the model"
    )
    assert page["after"]["whole_layers"]
    said = shell("pack", page["model"])
    assert said.code == 0, said.err
    assert "Accuracy" in said.out
    packed = next(
        line.removeprefix("file: ") for line in said.out.splitlines() if line.startswith("file: ")
    )
    said = shell("export", packed, "--json")  # a packed file in a run knows the data too
    assert said.code == 0, said.err
    exported = json.loads(said.out)
    assert exported["after"]["accuracy"] == page["after"]["accuracy"]
    assert Path(exported["file"]).is_file()
    assert "before" in Path("runs/export/report.html").read_text()


@pytest.mark.recipe
def test_the_recipe_of_a_command_runs_again_to_the_same_numbers(shell, trained):
    assert (
        shell(
            "prune", trained, "keep_params=0.6", "calibration=64", "score=taylor", "--out", "a"
        ).code
        == 0
    )
    assert shell("run", "a/recipe.toml", "--out", "b").code == 0
    a, b = (json.loads(Path(x, "result.json").read_text())["final"] for x in "ab")
    assert [a[k] for k in ("accuracy", "loss", "parameters")] == [
        b[k] for k in ("accuracy", "loss", "parameters")
    ]


@pytest.mark.recipe
def test_without_data_a_command_says_what_it_could_not_do(shell, trained, tmp_path):
    alone = tmp_path / "model"
    shutil.copytree(trained / "stages" / "0-train", alone)
    said = shell("prune", alone, "keep_params=0.5")
    assert said.code == 0, said.err
    assert "no metrics, since no data were given; give --data SOURCE" in said.out
    said = shell("export", alone, "--json")
    assert json.loads(said.out)["after"]["accuracy"] is None
    assert json.loads(said.out)["after"]["parity"]["max_abs_error"] < 1e-3
    said = shell("prune", alone, "score=taylor")
    assert said.code == 2
    assert (
        "score: 'taylor' needs the loss on public examples; give calibration=256, and public examples by --data SOURCE"
        in said.err
    )
    said = shell("train", alone, "epochs=1")
    assert said.code == 2
    assert "no examples" in said.err
    Path("no_test_rows.py").write_text(NO_TEST_ROWS)
    said = shell(
        "prune", alone, "keep_params=0.5", "--data", "no_test_rows:make", "--out", "no-test"
    )
    assert "no metrics, since the data have no test examples\n" in said.out, said.err
    said = shell("prune", alone, "keep_params=0.5", "--data", "digits", "--json", "--out", "with")
    assert json.loads(said.out)["after"]["accuracy"] > 0.05


@pytest.mark.recipe
def test_a_batch_norm_without_data_keeps_its_statistics_and_that_is_said():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)
    )
    result = fedpress.prune(net, input_shape=(1, 8, 8), keep_params=0.5, round_to=2)
    assert "there was no data" in result.after["left"]["batch norms"]
    assert result.after["restored_examples"] == 0
    assert result.model[0].out_channels == 4
    assert result.folder is None
    assert result.spec is not None, "another process can build it"
    assert net[0].out_channels == 8, "the module that was given is not changed"
    again = fedpress.prune(result.model, input_shape=(1, 8, 8), keep_params=0.5, round_to=2)
    assert again.model[0].out_channels == 2


def test_a_function_takes_an_input_shape_and_weights_also_masked_ones(shell, tmp_path, monkeypatch):
    (tmp_path / "own_nets.py").write_text(SOURCE)
    said = shell("prune", "own_nets:net", "keep_params=0.5", "round_to=2")
    assert (said.code, "--input 3,32,32" in said.err) == (2, True)
    namespace: dict = {}
    exec(SOURCE, namespace)
    torch.manual_seed(1)
    net = namespace["net"]()
    torch_prune.l1_unstructured(net[4], "weight", 0.5)
    torch.save({"state_dict": net.state_dict()}, tmp_path / "masked.pt")
    command = [
        "prune",
        "own_nets:net",
        "keep_params=0.5",
        "round_to=2",
        "--input",
        "1,8,8",
        "--checkpoint",
        "masked.pt",
    ]
    said = shell(*command, "--json")
    assert said.code == 0, said.err
    spec, model = storage.load(Path(json.loads(said.out)["model"]))
    assert spec.sparse == ("4.weight",)
    assert (model[4].weight == 0).any()
    said = shell(*command[:-1], "nowhere.pt")
    assert (said.code, "nowhere.pt: no such file" in said.err) == (2, True)


def test_weights_of_every_kind_of_file_go_in_and_others_are_refused(tmp_path):
    net = nn.Linear(3, 2)
    other = nn.Linear(3, 2)
    save_file(net.state_dict(), tmp_path / "a.safetensors")
    assert load_weights_(other, tmp_path / "a.safetensors") == ()
    assert torch.equal(net.weight, other.weight)
    torch.save(net, tmp_path / "pickled.pt")
    (tmp_path / "broken.safetensors").write_bytes(b"12345678")
    torch.save([1, 2], tmp_path / "list.pt")
    save_file({"weight": torch.zeros(5, 5), "bias": torch.zeros(5)}, tmp_path / "big.safetensors")
    for name, words in {
        "pickled.pt": "cannot be read as plain tensors",
        "broken.safetensors": "cannot be read as plain tensors",
        "list.pt": "this is no state dict",
        "big.safetensors": "do not fit the model",
    }.items():
        with pytest.raises(ModelError, match=words):
            load_weights_(other, tmp_path / name)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["prune"], "MODEL: no model was given; give the folder"),
        (["prune", "nowhere"], "there is no 'nowhere'"),
        (["prune", "resnet81"], "did you mean 'resnet18'?"),
        (["prune", "mlp", "--input", "3,x"], "--input: got '3,x'"),
        (
            ["prune", "TRAINED", "keep_parms=0.5"],
            "error: keep_parms: no such key; did you mean 'keep_params'?",
        ),
        (
            ["prune", "TRAINED", "keep_params=1.5"],
            "error: keep_params: input should be less than or equal to 1",
        ),
        (["prune", "TRAINED", "keep_params"], "expected key=value"),
        (["prune", "TRAINED", "--checkpoint", "x.pt"], "has weights of its own"),
        (
            ["prune", "TRAINED", "data.sorce=digits"],
            "error: data.sorce: no such key; did you mean 'source'?",
        ),
        (["pack", "TRAINED", "--resume"], "there is no run to resume"),
        (["distill", "TRAINED", "epochs=1"], "distill needs a teacher"),
        (["measure", "nowhere"], "there is no 'nowhere'"),
        (["measure", "TRAINED", "--formats", "onyx"], "no format 'onyx'; did you mean 'onnx'?"),
        (["measure", "TRAINED", "--threads", "0"], "--threads: got '0'"),
        (["sweep", "digits", "stage.1.keep_params"], "expected key=value,value"),
        (["sweep", "digit", "seed=1,2"], "did you mean 'digits'"),
        (["sweep", "digits", "--seeds", "a"], "--seeds: got 'a'"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence_by_the_names_of_the_command(
    shell, trained, words, said
):
    found = shell(*[str(trained) if word == "TRAINED" else word for word in words])
    assert found.code == 2
    assert found.err.count("\n") == 1, found.err
    assert said in found.err


def test_a_killed_command_goes_on_where_it_was(shell, trained, left, tmp_path):
    chosen_model = ChosenModel.find(trained)
    order = OneStage.bind(
        "train", chosen_model, [Override.parse("epochs=3"), Override.parse("batch_size=32")]
    )
    data = order.load_data()
    for place, stop in (("whole", None), ("killed", 9)):
        folder = RunFolder.create(tmp_path / place, order.text, settings_of(order.recipe))
        events = order.execute(folder, data)
        for _ in events if stop is None else range(stop):
            next(events) if stop is not None else None
        events.close()
    folder = RunFolder.resume(tmp_path / "killed", settings_of(order.recipe))
    for _ in order.execute(folder, data):
        pass
    assert left(tmp_path / "killed") == left(tmp_path / "whole")


def test_keys_are_listed_with_their_meaning(shell):
    said = shell("prune", "--keys")
    assert said.code == 0
    assert "keep_params" in said.out
    assert "share of the dense" in said.out


@pytest.mark.recipe
@pytest.mark.usefixtures("memory_unmeasured")
def test_models_and_files_are_measured_side_by_side(shell, trained):
    words = ["--formats", "onnx", "--batches", "1", "--threads", "1", "--seconds", "0.01"]
    said = shell("measure", trained, *words, "--out", "m.json")
    assert said.code == 0, said.err
    assert "onnxruntime" in said.out
    records = json.loads(Path("m.json").read_text())["records"]
    assert [record["runtime"] for record in records] == ["torch", "onnxruntime", "onnxruntime"]
    assert records[2]["name"].endswith("as onnx int8")
    assert records[2]["file_bytes"] < records[1]["file_bytes"]
    result = json.loads((trained / "result.json").read_text())["final"]
    assert all(
        (r["parameters"], r["macs"]) == (result["parameters"], result["macs"]) for r in records
    )


def test_models_of_other_inputs_are_measured_apart(trained):
    with pytest.raises(FedpressError, match="measure each in a call of its own"):
        fedpress.measure(
            [trained, Path(__file__).parents[3] / "benchmarks/checkpoints/cifar10-cpu"], formats=[]
        )


@pytest.mark.recipe
def test_the_shipped_chain_loses_little_and_ends_small(tmp_path):
    text = recipes.find("compress")
    recipe = recipes.load(text)
    assert (
        recipe.stage[-1].kind == "measure"
    )  # has tests of its own, and takes as long as all the others
    recipe = recipe.model_copy(update={"stage": recipe.stage[:-1]})
    folder, data = (
        RunFolder.create(tmp_path / "run", text, settings_of(recipe)),
        load_data(recipe),
    )
    check_recipe(recipe, data)
    for _ in runs.execute(recipe, folder, data):
        pass
    stages = {s["name"]: s for s in json.loads((folder.path / "result.json").read_text())["stages"]}
    assert stages["export"]["accuracy"] > stages["dense"]["accuracy"] - 0.03
    assert stages["export"]["file_bytes"] < stages["dense"]["file_bytes"] / 4
    assert stages["pack"]["file_bytes"] < stages["dense"]["file_bytes"] / 4


def test_the_kind_of_weights_reaches_quantize_and_a_state_dict_is_a_checkpoint():
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 10)
    )
    with pytest.warns(UserWarning, match="brings its own weights"):
        made = fedpress.quantize(model, weights="binary", data="digits", calibration=64)
    assert all(len(row.abs().unique()) == 1 for row in made.model[3].weight)
    with pytest.raises(FedpressError, match=r"model: got int"):
        fedpress.prune(3)


@pytest.mark.parametrize(
    "wrong", [{"models": []}, {"seconds": -1}, {"batches": [0]}, {"threads": []}]
)
def test_what_cannot_be_measured_is_said_at_once(wrong):
    with pytest.raises(FedpressError, match=f"^{next(iter(wrong))}: "):
        fedpress.measure(**{"models": ["resnet18"], **wrong})


def test_a_call_leaves_the_random_numbers_of_its_caller_alone():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    torch.manual_seed(3)
    wanted = torch.rand(2)
    torch.manual_seed(3)
    fedpress.prune(model, keep_params=0.5, input_shape=(1, 8, 8))
    assert torch.equal(torch.rand(2), wanted)


def test_a_frozen_model_takes_zeros_without_training():
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10)
    )
    made = fedpress.sparsify(model.requires_grad_(False), density=0.5, input_shape=(1, 8, 8))
    assert int((made.model[3].weight == 0).sum()) == 512
    with pytest.raises(FedpressError, match="nothing to train"):
        fedpress.sparsify(model, density=0.5, data="digits", mean="none", epochs=1)


def test_a_model_that_torch_cannot_copy_is_cut():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(model[1])
    model(torch.zeros(1, 64))
    made = fedpress.prune(model, keep_params=0.5, round_to=1, input_shape=(1, 8, 8))
    assert made.after["parameters"] < made.before["parameters"]


@pytest.mark.recipe
@pytest.mark.usefixtures("memory_unmeasured")
def test_a_model_has_one_size_in_every_command(trained, tmp_path):
    small = fedpress.quantize(trained, bits=4, out=tmp_path / "quantized")
    packed = fedpress.pack(small.folder, out=tmp_path / "packed")
    found = fedpress.measure(
        [small.folder, packed.artifact],
        formats=[],
        int8=False,
        batches=(1,),
        threads=(1,),
        seconds=0.01,
    )
    sizes = {record["file_bytes"] for record in found["records"]}
    assert (
        sizes
        == {small.after["file_bytes"]}
        == {packed.before["file_bytes"]}
        == {packed.artifact.stat().st_size}
    )
    kept = fedpress.measure(
        small.model, formats=[], int8=False, batches=(1,), threads=(1,), seconds=0.01
    )["records"][0]
    assert kept["file_bytes"] == small.after["file_bytes"], "also as a module in memory"
    again = fedpress.measure(
        [trained], formats=[], int8=False, batches=(1,), threads=(1,), seconds=0.01
    )["records"][0]
    assert again["file_bytes"] == small.before["file_bytes"]


@pytest.mark.recipe
def test_what_zeros_are_worth_is_shown_as_non_zeros_and_packed_bytes(shell, trained, tmp_path):
    said = shell("sparsify", trained, "density=0.2", "--out", tmp_path / "sparse")
    assert said.code == 0, said.err
    assert "Non-zeros" in said.out
    assert "Packed" in said.out
    facts = json.loads((tmp_path / "sparse" / "result.json").read_text())["final"]
    model = storage.load(tmp_path / "sparse")[1]
    assert facts["nonzero_parameters"] == sum(int(p.count_nonzero()) for p in model.parameters())
    packed = fedpress.pack(tmp_path / "sparse", out=tmp_path / "packed")
    assert facts["packed_file_bytes"] == packed.artifact.stat().st_size < facts["file_bytes"]
    gated = fedpress.l0(trained, density=0.5, epochs=1, out=tmp_path / "gated")
    assert gated.after["nonzero_parameters"] < gated.after["parameters"]
    assert gated.after["packed_file_bytes"] < gated.after["file_bytes"]


@pytest.mark.recipe
def test_a_share_of_a_cut_model_says_of_what(shell, trained, tmp_path):
    once = fedpress.prune(trained, keep_params=0.6, calibration=64, out=tmp_path / "once")
    assert "dense" not in json.dumps(once.after.get("told", {}))
    twice = fedpress.prune(once.folder, keep_params=0.3, calibration=64, out=tmp_path / "twice")
    dense, had, has = (facts["parameters"] for facts in (once.before, twice.before, twice.after))
    expected = f"{has / dense:.4g} of the {dense:,} dense parameters, {has / had:.4g} of the {had:,} that the model had"
    assert twice.after["told"]["keep_params"].endswith(expected)
    said = shell("prune", twice.folder, "keep_params=0.5", "calibration=64")
    assert said.code == 2
    assert "share of the dense network: give less than" in said.err
