"""Programs that train: gradients and steps are torch's, and a federated client that trains on a device fits in."""

import copy
import json

import pytest
import torch
from torch import nn

from fedpress.core import parameters
from fedpress.core.examples import Arrays
from fedpress.errors import ExportError, RecipeError
from fedpress.nn.compact import compact_, expand_

pytest.importorskip("executorch.extension.training")

from fedpress.codecs import Key
from fedpress.deploy import Job, export, open_file
from fedpress.deploy.device_model import DeviceModel
from fedpress.deploy.ondevice import export_training
from fedpress.federation import (
    Client,
    ClientPlan,
    Cohort,
    FedAvg,
    FedProx,
    LocalPlan,
    LocalSettings,
    LocalWork,
    Payload,
    Start,
    Terms,
    Uplink,
)
from fedpress.federation.ondevice import device_steps
from fedpress.federation.server import rounds
from fedpress.models.plain import MLP
from fedpress.tasks import Binary, Classification, Multilabel, Poisson, Regression
from fedpress.transport import LocalTransport
from tests.federation.federation import train, with_source

pytestmark = pytest.mark.deploy
SHAPE = (1, 8, 8)


class Small(nn.Module):
    """A convolution with group norm, max pooling, a second convolution with a shortcut, a mean and a head."""

    def __init__(self, norm: str = "group") -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4) if norm == "group" else nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = nn.functional.max_pool2d(torch.relu(self.norm(self.stem(x))), 2)
        return self.head(torch.relu(self.conv(x) + x).mean((2, 3)))


class Unreached(nn.Module):
    """A linear classifier with a layer that its forward never uses."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.spare = nn.Linear(64, 3), nn.Linear(3, 3)

    def forward(self, x):
        return self.head(x.flatten(1))


class Twins(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 3)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.head(torch.relu(self.second(self.first(x.flatten(1)))))


class Drops(nn.Module):
    """Draws at random without a module of its own for it."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 3)

    def forward(self, x):
        return self.head(nn.functional.dropout(x.flatten(1), 0.5, self.training))


def head() -> list[nn.Module]:
    return [nn.Linear(128, 3)]


def filled(value: float) -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    nn.init.constant_(model[1].weight, value)
    return model


def examples(n: int, seed: int) -> Arrays:
    chance = torch.Generator().manual_seed(seed)
    return Arrays(
        torch.randn(n, *SHAPE, generator=chance), torch.randint(0, 3, (n,), generator=chance)
    )


GOAL = Classification(("a", "b", "c"))


def untouched(x, generator):
    return x


def network(norm: str = "group") -> Small:
    torch.manual_seed(0)
    return Small(norm)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return export_training(
        network(), tmp_path_factory.mktemp("p") / "train.pte", input_shape=SHAPE, batch_size=4
    ).path


def test_parameters_have_the_names_shapes_and_values_of_the_model(program):
    model, device = network(), DeviceModel(program)
    assert parameters.Layout.of(device) == parameters.Layout.of(model)
    assert torch.equal(parameters.flatten(device), parameters.flatten(model))


@pytest.mark.parametrize("n", [1, 3, 4, 9])
def test_loss_gradients_and_logits_of_a_batch_of_any_size_are_those_of_torch(program, n):
    model, device, batch = network(), DeviceModel(program), examples(n, n)
    loss, gradients = device.mean_gradient(batch.x, batch.y)
    logits = model(batch.x)
    expected = nn.functional.cross_entropy(logits, batch.y)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(device.logits(batch.x), logits.detach(), rtol=1e-5, atol=1e-5)
    for name, p in model.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, rtol=1e-4, atol=1e-6)


def test_what_is_written_to_the_parameters_is_what_the_program_computes_with(program):
    device, model, batch = DeviceModel(program), network(), examples(4, 1)
    torch.manual_seed(5)
    vector = torch.randn(parameters.Layout.of(model).size)
    parameters.assign_(device, vector)
    parameters.assign_(model, vector)
    torch.testing.assert_close(
        device.logits(batch.x), model(batch.x).detach(), rtol=1e-4, atol=1e-4
    )


def test_a_copy_has_the_same_parameters_in_memory_of_its_own(program):
    device = DeviceModel(program)
    next(device.parameters()).requires_grad_(False)
    with torch.no_grad():
        next(device.parameters()).add_(1)
    twin, x = copy.deepcopy(device), examples(4, 1).x
    assert torch.equal(twin.logits(x), device.logits(x))
    assert [p.requires_grad for p in twin.parameters()] == [
        p.requires_grad for p in device.parameters()
    ]
    before = device.logits(x)
    with torch.no_grad():
        next(twin.parameters()).mul_(-1)
    assert torch.equal(device.logits(x), before)
    assert not torch.equal(twin.logits(x), before)


@pytest.mark.parametrize(
    ("settings", "algorithm"),
    [
        (LocalSettings(epochs=3, batch_size=6, lr=0.1, momentum=0.9, weight_decay=0.01), FedAvg()),
        (LocalSettings(epochs=2, batch_size=3, lr=0.1, lr_decay=0.5), FedAvg()),
        (LocalSettings(epochs=2, batch_size=4, lr=0.1), FedProx(proximal_mu=0.5)),
    ],
    ids=["momentum and decay", "small batches", "proximal"],
)
def test_local_training_agrees_with_torch_sgd(program, settings, algorithm):
    model, device = network(), DeviceModel(program)
    work = LocalWork(examples(14, 3), Key(7, 2, "c0"), LocalPlan(settings, untouched, GOAL))
    expected = algorithm.client_update(model, work, {}, {})[2]
    got = algorithm.client_update(device, with_source(work, device_steps), {}, {})[2]
    assert got["steps"] == expected["steps"]
    assert got["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    moved = (parameters.flatten(model) - parameters.flatten(network())).abs().max()
    assert moved > 0.01
    assert (parameters.flatten(device) - parameters.flatten(model)).abs().max() < 1e-4 * moved


def federation(program, device: bool):
    """Three clients, the first on a device if asked; rounds of averaging over messages as bytes."""
    model, settings = network(), LocalSettings(epochs=2, batch_size=4, lr=0.1, momentum=0.5)
    params, layout = parameters.flatten(model), parameters.Layout.of(model)
    uplink = Uplink.bind(Payload(len(params)), Cohort(3, 3))
    terms = Terms(layout, settings, uplink, 7, untouched, GOAL, num_rounds=3)
    kinds = {
        "c0": (DeviceModel(program), device_steps) if device else (model, None),
        "c1": (model, None),
        "c2": (model, None),
    }
    clients = [
        Client(
            name,
            examples(10 + 3 * i, i),
            one,
            ClientPlan.bind(terms, one, source=source),
        )
        for i, (name, (one, source)) in enumerate(kinds.items())
    ]
    transport = LocalTransport({client.name: client.handle for client in clients})
    return list(rounds(terms, transport, Start(params)))


def test_a_client_on_a_device_takes_part_in_rounds_among_ordinary_ones(program):
    expected, got = federation(program, False), federation(program, True)
    for a, b in zip(expected, got, strict=True):
        assert not b.refused
        assert [row["client"] for row in b.clients] == ["c0", "c1", "c2"]
        assert b.bytes_down == a.bytes_down
        assert abs(b.bytes_up - a.bytes_up) < 64  # a loss is written with as many digits as it has
        assert (a.params - b.params).abs().max() < 1e-5
    assert (got[-1].params - got[0].params).abs().max() > 0.01


def test_batch_norm_keeps_its_statistics(tmp_path):
    model = network("batch")
    model.train()(examples(32, 9).x * 2)
    path = export_training(model, tmp_path / "b.pte", input_shape=SHAPE, batch_size=4).path
    device, batch = DeviceModel(path), examples(4, 2)
    assert model.training
    device.mean_gradient(batch.x * 5, batch.y)
    torch.testing.assert_close(
        device.logits(batch.x), model.eval()(batch.x).detach(), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("pool", [nn.AvgPool2d(2), nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1)], ids=str)
def test_gradients_of_pooling_are_those_of_torch(tmp_path, pool):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(1, 2, 1), pool, nn.Flatten(), nn.Linear(32, 3))
    device = DeviceModel(
        export_training(model, tmp_path / "p.pte", input_shape=SHAPE, batch_size=4).path
    )
    batch = examples(4, 3)
    _, gradients = device.mean_gradient(batch.x, batch.y)
    nn.functional.cross_entropy(model(batch.x), batch.y).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, rtol=1e-4, atol=1e-6)


def test_a_batch_size_of_one_works(tmp_path):
    path = export_training(
        MLP(in_features=64, hidden=(5,), num_classes=3),
        tmp_path / "m.pte",
        input_shape=SHAPE,
        batch_size=1,
    )
    assert DeviceModel(path.path).logits(examples(3, 0).x).shape == (3, 3)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (
            nn.Sequential(nn.Flatten(), nn.Dropout(0.1), nn.Linear(64, 3)),
            ["'1' (Dropout)", "p to 0"],
        ),
        (
            nn.Sequential(nn.Conv2d(1, 2, 1), nn.AvgPool2d(3, 2), nn.Flatten(), nn.Linear(18, 3)),
            ["'aten::avg_pool2d_"],
        ),
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).double(), ["'1.weight'", "float64"]),
        (nn.Sequential(nn.Flatten(), nn.Linear(7, 3)), ["[4, 1, 8, 8]", "input_shape"]),
        (nn.Conv2d(1, 3, 3), ["outputs [n, k]"]),
        (filled(float("nan")), ["'1.weight'", "NaN", "checkpoint"]),
        (Unreached(), ["'spare.weight'", "requires_grad = False"]),
        (Unreached().requires_grad_(False), ["no parameter", "requires_grad = True"]),
        (Twins(), ["'first.weight' and 'second.weight'", "its own"]),
        (Drops(), ["differently in training and in evaluation", "dropout"]),
        (
            nn.Sequential(
                nn.Conv2d(1, 2, 1),
                nn.BatchNorm2d(2, track_running_stats=False),
                nn.Flatten(),
                *head(),
            ),
            ["depend on the others", "group norm"],
        ),
    ],
    ids=[
        *(
            "dropout",
            "no kernel",
            "double",
            "shape",
            "outputs of an image",
            "nan",
            "unreached",
            "all frozen",
            "shared",
        ),
        *("functional dropout", "batch norm without statistics"),
    ],
)
def test_what_cannot_train_on_a_device_is_named_with_a_cure(tmp_path, capfd, model, words):
    with pytest.raises(ExportError) as caught:
        export_training(model, tmp_path / "t.pte", input_shape=SHAPE, batch_size=4)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")


def test_a_damaged_file_and_other_shapes_are_refused(program, tmp_path):
    (tmp_path / "half.pte").write_bytes(program.read_bytes()[:3000])
    with pytest.raises(ExportError, match="no program that trains"):
        DeviceModel(tmp_path / "half.pte")
    with pytest.raises(ExportError, match="cannot read"):
        DeviceModel(tmp_path / "none.pte")
    inference = export(Unreached(), tmp_path / "logits.pte", "executorch", Job(SHAPE)).path
    with pytest.raises(ExportError, match=r"no batch size; write one with export_training"):
        DeviceModel(inference)
    with pytest.raises(ExportError, match=r"3 tensors.*open it with deploy\.DeviceModel"):
        open_file(program)
    with pytest.raises(ExportError, match=r"takes examples \[4, 1, 8, 8\]"):
        DeviceModel(program).backward(
            torch.zeros(2, 1, 8, 8), torch.zeros(2, dtype=torch.int64), torch.ones(2)
        )


@pytest.mark.parametrize("label", [-100, -1, 3, 10**9])
def test_a_label_that_is_no_class_is_refused(program, label):
    batch = examples(4, 0)
    batch.y[2] = label
    with pytest.raises(ExportError, match=r"no class number; give class numbers from 0 to 2"):
        DeviceModel(program).mean_gradient(batch.x, batch.y)


TASKS = {
    "classification": (Classification(("a", "b", "c"), label_smoothing=0.1), torch.arange(9) % 3),
    "binary": (Binary(("no", "yes")), torch.arange(9) % 2),
    "multilabel": (Multilabel(("a", "b", "c")), (torch.arange(27) % 2).float().view(9, 3)),
    "regression": (Regression(("a", "b"), (1.0, 2.0), (3.0, 0.5)), torch.randn(9, 2)),
    "one number": (Regression(("a",)), torch.randn(9)),
    "poisson": (Poisson(("a", "b"), (1.0, 2.0)), (torch.arange(18) % 4).float().view(9, 2)),
}


@pytest.mark.parametrize("name", TASKS)
def test_every_task_trains_on_a_device_as_in_torch(name, tmp_path):
    task, targets = TASKS[name]
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, task.outputs))
    path = tmp_path / "train.pte"
    export_training(model, path, input_shape=SHAPE, task=task, batch_size=4)
    device, x = DeviceModel(path), examples(9, 2).x
    assert (device.task.kind, device.task.names) == (task.kind, task.names)
    loss, gradients = device.mean_gradient(x, targets)
    wanted = task.loss(model(x), targets)
    assert torch.allclose(loss, wanted, rtol=1e-4)
    for key, gradient in zip(
        gradients, torch.autograd.grad(wanted, [*model.parameters()]), strict=True
    ):
        assert torch.allclose(gradients[key], gradient, atol=1e-5), key
    assert torch.allclose(device.logits(x), model(x), atol=1e-5)
    with pytest.raises(ExportError, match=r"^y: "):
        device.mean_gradient(x, torch.full((9, 7), 0.5))


def test_outputs_that_do_not_fit_the_task_are_refused(tmp_path):
    with pytest.raises(ExportError, match="make it return 2 numbers"):
        export_training(
            network(), tmp_path / "t.pte", input_shape=SHAPE, task=Regression(("a", "b"))
        )


def test_a_program_that_names_no_task_is_a_classifier(program, monkeypatch):
    # Such are those of version 0.1.0.
    read = json.loads
    monkeypatch.setattr(
        "fedpress.deploy.device_model.json.loads",
        lambda text: (
            {k: v for k, v in found.items() if k != "task"}
            if isinstance(found := read(text), dict)
            else found
        ),
    )
    assert DeviceModel(program).task == Classification(("0", "1", "2"))


def test_no_examples_have_no_gradient_and_no_logits(program):
    none = examples(0, 0)
    with pytest.raises(ExportError, match="0 examples and 0 targets"):
        DeviceModel(program).mean_gradient(none.x, none.y)
    with pytest.raises(ExportError, match="3 examples and 2 targets"):
        DeviceModel(program).mean_gradient(examples(3, 0).x, examples(2, 0).y)
    assert DeviceModel(program).logits(none.x).shape == (0, 3)
    with pytest.raises(ExportError, match="batch_size is 0"):
        export_training(Unreached(), "never.pte", input_shape=SHAPE, batch_size=0)


def test_frozen_parameters_stay_out_of_the_layout(tmp_path):
    model = network()
    model.stem.requires_grad_(False)
    device = DeviceModel(
        export_training(model, tmp_path / "f.pte", input_shape=SHAPE, batch_size=4).path
    )
    assert parameters.Layout.of(device) == parameters.Layout.of(model)


def test_device_steps_want_a_program_and_float32(program):
    settings = LocalSettings(precision="bf16", batch_size=4)
    work = LocalWork(examples(4, 0), Key(7, 1, "c0"), LocalPlan(settings, untouched, GOAL))
    with pytest.raises(RecipeError, match="DeviceModel"):
        train(network(), with_source(work, device_steps))
    with pytest.raises(RecipeError, match=r"^precision: devices train in float32, got 'bf16'"):
        train(DeviceModel(program), with_source(work, device_steps))
    settings = LocalSettings(optimizer="adamw", batch_size=4)
    work = LocalWork(examples(4, 0), Key(7, 1, "c0"), LocalPlan(settings, untouched, GOAL))
    with pytest.raises(RecipeError, match=r"^optimizer: got 'adamw', but the runtime of a device"):
        train(DeviceModel(program), with_source(work, device_steps))


@pytest.mark.parametrize("named", [True, False])
def test_zeros_of_a_sparse_model_stay_and_the_kept_values_train_as_in_torch(tmp_path, named):
    """Three steps of a program that trained every entry made 13,350 zeros into 258."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))
    names = ["0.weight", "3.weight"]
    with torch.no_grad():
        for name in names:
            weight = model.get_parameter(name)
            weight.masked_fill_(torch.rand_like(weight) < 0.9, 0)
    before = copy.deepcopy(model)
    sparse = names if named else None
    export_training(model, tmp_path / "p.pte", input_shape=(1, 8, 8), batch_size=4, sparse=sparse)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True)
    )
    device, twin = DeviceModel(tmp_path / "p.pte"), compact_(copy.deepcopy(model), names)
    assert parameters.Layout.of(device) == parameters.Layout.of(twin)
    ours = device.optimizer(0.1, momentum=0.9, weight_decay=0.01)
    theirs = torch.optim.SGD(twin.parameters(), 0.1, 0.9, weight_decay=0.01)
    for _ in range(3):
        x, y = torch.randn(4, 1, 8, 8), torch.randint(0, 10, (4,))
        ours.step(device.mean_gradient(x, y)[1])
        theirs.zero_grad()
        nn.functional.cross_entropy(twin(x), y).backward()
        theirs.step()
    torch.testing.assert_close(
        parameters.flatten(device), parameters.flatten(twin), rtol=1e-4, atol=1e-5
    )
    twin.load_state_dict(device.state_dict())
    after = expand_(twin)
    for name in names:
        assert torch.equal(after.get_parameter(name) == 0, model.get_parameter(name) == 0)
        assert not torch.equal(after.get_parameter(name), model.get_parameter(name))


def test_a_zero_by_chance_is_trained(tmp_path):
    """The shipped CNN starts with one zero among 18,432 weights: its programs lacked that weight."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 50), nn.ReLU(), nn.Linear(50, 3))
    with torch.no_grad():
        model[1].weight[3, 4] = 0
    export_training(model, tmp_path / "p.pte", input_shape=SHAPE, batch_size=4)
    assert parameters.Layout.of(DeviceModel(tmp_path / "p.pte")) == parameters.Layout.of(model)


def test_a_sparse_name_that_the_model_lacks_is_refused(tmp_path):
    with pytest.raises(ExportError, match="no parameter 'other'"):
        export_training(nn.Linear(4, 3), tmp_path / "p.pte", input_shape=(4,), sparse=["other"])
