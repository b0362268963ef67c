"""The user's own task: the detector of docs/tasks.md goes all ways, and is not imported unasked."""

import dataclasses
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import fedpress
from fedpress import tasks
from fedpress.compress.distill import Distillation, DistillSettings
from fedpress.compress.quantize import measure_choices, quantizable
from fedpress.core import consent, own_modules
from fedpress.core.outputs import joined_outputs, output_tensors, rows_of_outputs
from fedpress.errors import FedpressError, ModelError, RecipeError, TrainingError
from fedpress.models import ModelSpec
from fedpress.nn.quant_scheme import QuantizationScheme, WeightQuantization
from fedpress.nn.quantized import quantized_layers
from fedpress.privacy.per_example.gradients import choose_method, clipped_gradient_sum
from fedpress.tasks import Metric, Task
from fedpress.tasks.base import reduced
from fedpress.workspace import started

PAGE = Path(__file__).parents[2] / "docs" / "tasks.md"
BOXES, DETECTOR = "boxes:Boxes", "boxes:Detector"


def of_page(kind: str, wanted: str) -> str:
    """Returns the block of the page that contains the words `wanted`."""
    blocks = re.findall(rf"```{kind}\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (found,) = [block for block in blocks if wanted in block]
    return found


def forget(*names):
    for name in names:
        sys.modules.pop(name, None)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with boxes.py, from which this process may import."""
    (tmp_path / "boxes.py").write_text(of_page("python", "class Boxes(Task)"))
    before = list(sys.meta_path)
    allowed = consent.withdraw()
    monkeypatch.chdir(tmp_path)
    own_modules.set_folders(tmp_path)
    forget("boxes")
    yield tmp_path
    forget("boxes")
    sys.meta_path[:] = before
    consent.withdraw()
    consent.allow(*allowed)


@pytest.fixture
def boxes(folder):
    """The module of the page, whose code is allowed."""
    consent.allow(BOXES, DETECTOR)
    tasks.find(BOXES)
    return sys.modules["boxes"]


def batch(boxes, n=9):
    """Returns standardised images and their targets."""
    images, targets = boxes.scenes_of_one(np.random.default_rng(0), n)
    return torch.from_numpy(images).float() / 255, torch.from_numpy(targets)


@pytest.mark.parametrize("method", ["loop", "vmap", "ghost"])
def test_clipped_gradients_of_several_outputs_are_those_of_a_plain_loop(boxes, method):
    x, y = batch(boxes)
    torch.manual_seed(0)
    model, task = boxes.Detector(4), boxes.Boxes(("target",))
    found, raw = clipped_gradient_sum(
        model, task.loss, x, y, clip_norm=0.5, method=method, verify="gradients"
    )
    assert raw.refused == 0
    total = torch.zeros_like(found)
    for at in range(len(x)):
        model.zero_grad()
        task.loss(model(x[at : at + 1]), y[at : at + 1]).backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        total += gradient * min(1.0, 0.5 / float(gradient.norm()))
    torch.testing.assert_close(found, total, rtol=1e-4, atol=1e-5)


def test_a_fast_method_is_chosen_for_several_outputs(boxes):
    x, y = batch(boxes)
    assert choose_method(boxes.Detector(4), boxes.Boxes(("target",)).loss, x, y) != "loop"


def test_the_loss_of_an_example_does_not_depend_on_others(boxes):
    x, y = batch(boxes)
    outputs, task = boxes.Detector(4)(x), boxes.Boxes(("target",))
    each = task.loss(outputs, y, reduction="none")
    for at in range(len(x)):
        alone = task.loss(rows_of_outputs(outputs, slice(at, at + 1)), y[at : at + 1])
        torch.testing.assert_close(each[at], alone)


def test_a_perfect_answer_finds_all_objects(boxes):
    _, y = batch(boxes)
    at = boxes.in_cells(y)
    outputs = {
        "sure": at.amax(1) - 0.5,
        "boxes": at.transpose(1, 2) @ y[..., 1:],
        "classes": at.transpose(1, 2)
        @ torch.nn.functional.one_hot(y[..., 0].clamp_min(0).long(), 2).float(),
    }
    task = boxes.Boxes(("target",))
    assert task.summary(task.metrics(outputs, y))["found"] == 1
    # A plain loop over the objects of one image.
    assert int(task.metrics(outputs, y)["objects"]) == sum(
        int(box[0] >= 0) for image in y.tolist() for box in image
    )


def test_distillation_compares_every_output(boxes):
    x, y = batch(boxes)
    teacher, student = boxes.Detector(4), boxes.Detector(6)
    task = boxes.Boxes(("target",))
    distil = Distillation(teacher, student, DistillSettings(weight=1.0), x, task)
    outputs = student(x)
    expected = 0.0
    for name, theirs in teacher(x).items():
        variance = theirs.var(0, unbiased=False).mean()
        expected = expected + (outputs[name] - theirs).square().mean() / variance
    torch.testing.assert_close(distil(student, x, outputs, y), expected)


class Whole(nn.Module):
    """Returns whole numbers alone."""

    def forward(self, x):
        return (x.sum(1).long(), x.argmax(1))


def test_outputs_of_whole_numbers_alone_teach_nothing_and_choose_no_bits(boxes):
    task, x = boxes.Boxes(("target",)), torch.randn(4, 3)
    with pytest.raises(TrainingError, match=r"teacher.*gives integers alone, \(\[\], \[\]\)"):
        Distillation(Whole(), Whole(), DistillSettings(), x, task)
    with pytest.raises(ModelError, match="which are integers alone; so they cannot be compared"):
        measure_choices(Whole(), {}, (2, 4), [x], task=task)


@pytest.mark.recipe
def test_the_detector_of_the_page_is_trained_cut_quantized_federated_and_exported(folder, shell):
    text = of_page("toml", BOXES).replace("epochs = 40", "epochs = 25")
    (folder / "boxes.toml").write_text(text)
    done = shell("run", "boxes.toml", "--out", "run")
    assert done.code == 0, done.err
    result = json.loads((folder / "run" / "result.json").read_text())
    lines = {line["name"]: line for line in result["stages"]}
    for name in ("train", "fine-tune", "quantize", "federate", "export"):
        assert lines[name]["task"] == BOXES
        assert lines[name]["found"] > 0.6, name
    assert lines["prune"]["parameters"] < 0.7 * lines["train"]["parameters"]
    assert lines["prune"]["parity_error"] < 1e-5
    assert lines["federate"]["epsilon"] <= 8
    # The exported file has three outputs, and gives the same metric as the model.
    assert lines["export"]["found"] == pytest.approx(lines["federate"]["found"], abs=0.03)
    assert lines["export"]["parity"]["relative_error"] < 1e-3
    assert "objects found" in (folder / "run" / "report.html").read_text()

    np.save("images.npy", sys.modules["boxes"].scenes_of_one(np.random.default_rng(5), 7)[0])
    command = re.search(r"fedpress (predict .*)", PAGE.read_text())[1].replace(" boxes ", " run ")
    done = shell(*command.split())
    assert done.code == 0, done.err
    rows = (folder / "answers.csv").read_text().splitlines()
    assert len(rows) == 8
    assert rows[0] == "answer 0,answer 1,answer 2,answer 3,answer 4"
    assert {float(row.split(",")[0]) for row in rows[1:]} <= {0, 1}

    # The exported file predicts too, from all of its outputs.
    of_run = fedpress.predict("run", np.load("images.npy"))
    of_file = fedpress.predict("run/artifacts/model.onnx", np.load("images.npy"))
    assert {*of_file.outputs} == {"sure", "boxes", "classes"}
    torch.testing.assert_close(of_file.answers, of_run.answers, rtol=0.02, atol=0.02)


@pytest.mark.recipe
def test_mixed_bits_of_the_detector_are_chosen_by_all_its_outputs(folder, boxes):
    x, y = batch(boxes, 300)
    quick = {"batch_size": 16, "optimizer": "adamw", "lr": 0.003}
    data = (x.numpy(), y.numpy())
    trained = fedpress.train(boxes.Detector(8), data=data, task=BOXES, epochs=15, **quick)
    values = sum(p.numel() for p in trained.model.parameters())
    # On average 4 bits and the scales.
    most = {"mixed": [2, 3, 4, 8], "max_bytes": values // 2 + 4 * 8 * 6}
    made = fedpress.quantize(trained, data=data, **most)
    bits = {name: layer.scheme.weights.bits for name, layer in quantized_layers(made.model)}
    assert len(set(bits.values())) > 1
    assert made.after["found"] > made.before["found"] - 0.05
    # Inputs alone: the saved model says what its outputs mean.
    alone = fedpress.quantize(trained, data=x.numpy(), **most)
    assert {layer.scheme.weights.bits for _, layer in quantized_layers(alone.model)} > {8}


def test_a_soft_loss_of_the_user_s_own_chooses_the_mixed_bits(boxes):
    class Sure(boxes.Boxes):
        """A task in which only one of three outputs matters."""

        def soft_loss(self, outputs, teacher, temperature):
            return (outputs["sure"] - teacher["sure"]).abs().mean() + 3

    x, _ = batch(boxes)
    model = boxes.Detector(4)
    table, _ = quantizable(model, QuantizationScheme(weights=WeightQuantization()))
    with torch.no_grad():
        found = measure_choices(model, table, (2, 8), [x], Sure(("target",)))
    assert found["sure"][0].divergence > found["sure"][1].divergence > 0
    assert found["body.3"][0].divergence > 0
    assert [choice.divergence for choice in found["boxes"]] == [0, 0]


def test_a_soft_loss_that_fails_is_named_before_the_run(boxes):
    class Wrong(boxes.Boxes):
        def soft_loss(self, outputs, teacher, temperature):
            return outputs["sures"]

    x, _ = batch(boxes)
    with pytest.raises(ModelError, match=r"model: gives outputs on which .*Wrong fails: 'sures'; "):
        measure_choices(boxes.Detector(4), {}, (2, 8), [x], Wrong(("target",)))


def test_a_saved_model_names_its_task_which_is_refused_until_allowed(folder, boxes):
    x, y = batch(boxes, 60)
    model = boxes.Detector(4)
    fedpress.train(model, data=(x.numpy(), y.numpy()), task=BOXES, epochs=1, out="run")
    forget("boxes")
    consent.withdraw()
    with pytest.raises(ModelError, match=r"spec\.task\.kind: names the code 'boxes:Boxes'"):
        fedpress.predict("run", x, allow_code=DETECTOR)
    assert "boxes" not in sys.modules, "nothing is imported before it is allowed"
    found = fedpress.predict("run", x, allow_code=[DETECTOR, BOXES])
    assert found.answers.shape == (60, 5)
    assert found.task == BOXES
    assert {*found.outputs} == {"sure", "boxes", "classes"}


def test_a_recipe_of_a_stranger_s_run_names_its_task_among_its_code():
    text = 'data = {source = "csv", task = {kind = "boxes:Boxes"}}\nmodel = {architecture = "mlp"}'
    assert started.functions_of(text) == [BOXES]
    text = 'data = {source = "csv", task = "boxes:Boxes"}\nmodel = {architecture = "a:B"}'
    assert started.functions_of(text) == ["a:B", BOXES]


def test_a_file_s_task_is_not_imported(folder):
    spec = ModelSpec(architecture="mlp", input_shape=(4,), task={"kind": BOXES, "names": ["a"]})
    with pytest.raises(ModelError, match=r"spec\.task\.kind"):
        ModelSpec.of_file(spec.model_dump_json())
    with pytest.raises(ModelError, match="names the code 'boxes:Boxes'"):
        tasks.of_model({"kind": BOXES, "names": ["a"]}, ())
    assert "boxes" not in sys.modules


def test_a_report_shows_the_metrics_without_the_code(folder):
    line = {"task": "elsewhere:Boxes", "found": 0.5, "task_metrics": [
        {"key": "found", "name": "objects found", "share": True, "digits": 3, "better": "higher",
         "meaning": ""}]}  # fmt: skip
    row = tasks.task_of(line)
    assert (row.primary, row.formatted(0.5)) == ("found", "50.00%")
    assert "elsewhere" not in sys.modules
    assert tasks.task_of({"task": "elsewhere:Boxes"}).shown_metrics


WRONG = {
    "Missing": ("no function 'Missing'", ""),
    "Number": ("is int, which is no subclass", "Number = 3"),
    "Plain": ("is Plain, which is no subclass", "class Plain:\n    pass"),
    "Half": (
        "lacks loss, metrics, summary",
        "class Half(Task):\n    targets = 'numbers'\n    shown_metrics = (Metric('a', 'a'),)",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_class_that_is_no_task_is_refused_with_a_cure(name, folder):
    says, code = WRONG[name]
    (folder / "odd_task.py").write_text(f"from fedpress.tasks import Metric, Task\n{code}\n")
    forget("odd_task")
    consent.allow(f"odd_task:{name}")
    with pytest.raises(FedpressError, match=says) as caught:
        tasks.find(f"odd_task:{name}")
    assert caught.value.cure
    forget("odd_task")


def test_a_class_without_metrics_says_what_it_lacks():
    with pytest.raises(TypeError, match=r"Bare\(Task\) has no shown_metrics"):

        class Bare(Task):
            pass


def test_a_class_is_named_by_its_place_before_it_is_loaded(boxes):
    assert boxes.Boxes.kind == BOXES
    assert Free.kind == f"{__name__}:Free"


@dataclasses.dataclass(frozen=True)
class Free(Task):
    names: tuple[str, ...] = ("a",)

    targets = "arrays"
    several_outputs = True
    shown_metrics = (Metric("apart", "apart", "lower"),)

    def loss(self, outputs, targets, *, reduction="mean"):
        return reduced((outputs[0] - targets).flatten(1).square().mean(1), reduction)

    def metrics(self, outputs, targets):
        return {
            "apart": self.loss(outputs, targets, reduction="sum"),
            "n": torch.tensor(len(targets)),
        }

    def summary(self, sums):
        return {"apart": float(sums["apart"] / sums["n"])}


class Mean(Free):
    def loss(self, outputs, targets, *, reduction="mean"):
        return (outputs[0] - targets).square().mean()


ODD = {
    "a string": (Free(), lambda y: (y, "text"), r"gives outputs \(\[3, 4\], str\)"),
    "nothing": (Free(), lambda y: (), "expected tensors in tuples"),
    "a number": (Free(), lambda y: (y, y.sum()), "first dimension does not count the examples"),
    "another width": (Free(), lambda y: (y[..., :3],), "the loss of .* fails with RuntimeError"),
    "one loss for all": (Mean(), lambda y: (y, y), r"a loss \[\] for 2 examples"),
}


@pytest.mark.parametrize("case", ODD)
def test_outputs_that_the_loss_does_not_take_are_refused_before_a_run(case):
    task, outputs, says = ODD[case]
    y = torch.randn(2, 3, 4)
    task.check((y, y), y) if case != "one loss for all" else None
    with pytest.raises(ModelError, match=says) as caught:
        task.check(outputs(y), y)
    assert caught.value.cure


def test_a_task_of_fedpress_still_refuses_several_outputs():
    task = tasks.Regression(("a",))
    with pytest.raises(ModelError, match="gives outputs dict"):
        task.check({"a": torch.zeros(2, 1)}, torch.zeros(2, 1))


def test_outputs_of_batches_join_to_those_of_the_whole():
    whole = {"a": torch.randn(7, 2), "b": (torch.randn(7), torch.arange(7))}
    parts = [rows_of_outputs(whole, slice(at, at + 3)) for at in range(0, 7, 3)]
    found = joined_outputs(parts)
    assert found["b"][1].tolist() == list(range(7))
    for mine, theirs in zip(output_tensors(found), output_tensors(whole), strict=True):
        assert torch.equal(mine, theirs)


def test_settings_of_a_class_of_the_user_are_checked_when_it_is_allowed(folder):
    given = {"kind": BOXES, "threshold": 0.5}
    tasks.check_settings(given)  # nothing is known of it yet
    consent.allow(BOXES)
    with pytest.raises(RecipeError, match="has no option 'threshold'"):
        tasks.check_settings(given)
