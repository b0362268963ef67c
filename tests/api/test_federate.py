"""`fedpress.federate` on a user's own module and data sets in memory."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fedpress
from fedpress.errors import DataError, FedpressError, RecipeError

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(600, 6, generator=GENERATOR)
Y = X[:, :3].argmax(1)


def net(outputs=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, outputs))


def three(y=Y):
    """Three clients, each given in another way."""
    return {
        "north": TensorDataset(X[:200], y[:200]),
        "south": (X[200:400].numpy(), y[200:400].numpy()),
        "west": DataLoader(TensorDataset(X[400:], y[400:]), batch_size=32),
    }


def test_clients_with_data_of_their_own_train_a_module_together():
    before = net()
    result = fedpress.federate(before, clients=three(), num_rounds=8, lr=0.3)
    assert result.after["accuracy"] > 0.8 > result.before["accuracy"] + 0.2
    assert result.after["bytes_up"] > 0
    assert [record["round"] for record in result.records] == list(range(1, 9))
    assert torch.equal(before[0].weight, net()[0].weight), "the caller's module stays as it was"


def test_a_fifth_of_each_client_is_put_aside_unless_a_test_set_is_given():
    rounds = {"num_rounds": 1}
    put_aside = fedpress.federate(net(), clients=three(), **rounds)
    assert sum(map(sum, put_aside.after["confusion"])) == 120
    assert put_aside.after["test_clients"] == ["north", "south", "west"]
    assert len(put_aside.after["accuracy_by_client"]) == 3
    own = fedpress.federate(net(), clients=three(), test=(X[:50], Y[:50]), **rounds)
    assert sum(map(sum, own.after["confusion"])) == 50
    assert "accuracy_by_client" not in own.after


def test_one_output_is_binary_and_floats_are_a_regression():
    binary = fedpress.federate(net(1), clients=three((Y > 0).long()), num_rounds=6, lr=0.3)
    assert binary.after["task"] == "binary"
    assert binary.after["auc"] > 0.75
    numbers = X[:, 0] + X[:, 1]
    regression = fedpress.federate(net(1), clients=three(numbers), num_rounds=6, lr=0.05)
    assert regression.after["task"] == "regression"
    assert regression.after["mae"] < regression.before["mae"]


def test_the_number_of_classes_does_not_follow_from_private_labels():
    """A class that no client has is one nevertheless: otherwise its absence would show."""
    result = fedpress.federate(net(5), clients=three(), num_rounds=1)
    assert result.after["parameters"] == 6 * 16 + 16 + 16 * 5 + 5


@pytest.mark.recipe
def test_a_federation_with_privacy_says_what_it_spends():
    private = {"unit": "sample", "epsilon": 8.0}
    result = fedpress.federate(net(), clients=three(), num_rounds=3, privacy=private)
    assert 7 < result.after["epsilon"] <= 8


@pytest.mark.recipe
def test_a_result_is_the_model_of_the_next_call():
    together = fedpress.federate(net(), clients=three(), num_rounds=8, lr=0.3)
    small = fedpress.prune(together, data=(X, Y), keep_params=0.5, round_to=1)
    tiny = fedpress.quantize(small, data=(X, Y), bits=8)
    file = fedpress.export(tiny, data=(X, Y))
    assert list(file.files) == ["model.onnx"]
    assert file.after["parameters"] < 0.6 * together.after["parameters"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"clients": {}}, r"^clients: .*; give {\"north\""),
        ({"clients": [(X, Y)]}, "^clients: got list, expected a dictionary"),
        ({"clients": {"a": X}}, r"^clients\['a'\]: it has no labels"),
        ({"clients": {"a": (X, Y[:9])}}, r"^clients\['a'\]: 600 inputs but 9 labels"),
        ({"clients": {"a": (X, Y), "b": (X[:, :2], Y)}}, r"^clients\['b'\]: examples of"),
        ({"clients": {"a": (X, X)}}, "^clients: the label of one .* torch.float32.*regression"),
        (
            {"clients": {"a": (X, Y), "b": (X, Y + 7)}},
            r"^clients\['b'\]: some labels are no class number; give class numbers from 0 to 2",
        ),
        ({"clients": three(), "test": (X, Y - 1)}, "^test: some labels.*; give class numbers"),
        ({"clients": three(), "public": (X, Y + 9)}, "^public: some labels.*; give class"),
        (
            {"clients": {"a": (X[:, :, None], Y)}},
            r"^clients\['a'\]: the model.*torch.as_tensor\(x\).permute\(0, 2, 1\)",
        ),
        ({"clients": three(), "data": "digits"}, "^data: clients are given too"),
        ({"clients": three(), "classes": ["a", "b"]}, "^classes: 2 names, .* 3 outputs"),
        ({"test": (X, Y), "data": "digits"}, "^test: this argument needs clients"),
        ({}, "^clients: no clients are given"),
        ({"clients": three(), "num_round": 3}, "^num_round: no such key; did you mean"),
        (
            {"clients": three(), "privacy": {"unit": "sample"}},
            r'^privacy: .*give privacy={"epsilon": 8.0}',
        ),
    ],
)
def test_what_does_not_fit_is_told_with_its_place_and_a_cure(given, said):
    with pytest.raises(FedpressError, match=said):
        fedpress.federate(net(), **given)


def test_the_command_deals_a_source_to_clients(shell, tmp_path):
    words = ["federate", "mlp", "--data", "digits", "--out", "run", "num_rounds=2", "lr=0.3"]
    words += ["model.arguments={in_features=64, hidden=[16], num_classes=10}"]
    said = shell(*words, "data.num_clients=3", "data.examples_per_client=100")
    assert said.code == 0, said.err
    assert len(fedpress.Run.open(tmp_path / "run").records) == 2
    said = shell("federate", "mlp", "--input", "64", words[-1])
    assert said.code == 2
    assert "there are no clients" in said.err
    assert "--data SOURCE" in said.err


def test_a_run_of_data_in_memory_does_not_go_on_with_noise_in_their_place(tmp_path):
    fedpress.federate(net(), clients=three(), num_rounds=1, out=tmp_path / "run")
    with pytest.raises(DataError, match=r"^data: there are no clients.*; give data="):
        fedpress.Run.resume(tmp_path / "run")


def test_keys_of_a_recipe_are_refused_by_name():
    with pytest.raises(RecipeError, match=r"^aggregator"):
        fedpress.federate(net(), clients=three(), aggregator="medain")


def test_names_of_classes_come_back_with_predictions():
    flags = three((X[:, 0] > 0).long())
    result = fedpress.federate(net(1), clients=flags, num_rounds=1, classes=["no", "yes"])
    assert set(fedpress.predict(result, X).labels) <= {"no", "yes"}
    result = fedpress.federate(net(), clients=three(), num_rounds=1, classes=["a", "b", "c"])
    assert set(fedpress.predict(result, X).labels) <= {"a", "b", "c"}


def test_clients_too_small_to_put_anything_aside_are_told():
    tiny = {"a": (X[:4], Y[:4]), "b": (X[4:7], Y[4:7])}
    with pytest.warns(UserWarning, match="no client has five examples.*give test="):
        fedpress.federate(net(), clients=tiny, num_rounds=1)


def test_a_saved_model_and_a_run_are_models_too(tmp_path):
    fedpress.save(net(), tmp_path / "net", input_shape=(6,))
    together = fedpress.federate(tmp_path / "net", clients=three(), num_rounds=8, lr=0.3)
    assert together.after["accuracy"] > 0.8
    fedpress.federate(net(), clients=three(), num_rounds=8, lr=0.3, out=tmp_path / "run")
    again = fedpress.federate(tmp_path / "run", clients=three(), num_rounds=1, lr=0.3)
    assert again.before["accuracy"] > 0.8
    assert fedpress.evaluate(tmp_path / "run", (X, Y))["accuracy"] > 0.8


@pytest.mark.recipe
@pytest.mark.parametrize("private", [None, {"epsilon": 8.0, "unit": "sample"}])
def test_a_federation_shows_what_it_sent_and_what_it_spent(private):
    result = fedpress.federate(net(), clients=three(), num_rounds=1, lr=0.1, privacy=private)
    spent = "no guarantee" if private is None else "ε = 8.00 at δ = 1e-5"
    for shown in (str(result), repr(result), result._repr_html_()):
        assert "Sent by clients" in shown
        assert "Sent to clients" in shown
        assert spent in shown


def test_a_printed_result_says_what_was_spent_and_that_a_model_guesses():
    budget = {"unit": "sample", "noise_multiplier": 5.0, "delta": 1e-3}
    noise = torch.arange(600) % 7 // 3
    result = fedpress.federate(net(), clients=three(noise), num_rounds=1, lr=1e-6, privacy=budget)
    assert "ε = " in str(result)
    assert "warning: " in str(result)
    assert "no better than always answering" in str(result)
    assert "no better than always answering" in result._repr_html_()


def test_help_says_what_privacy_may_hold():
    told = fedpress.federate.__doc__
    table = told[told.index("    privacy: ") : told.index("    uplink: ")]
    for key in ("unit", "trust", "delta", "clip_norm", "epsilon", "noise_multiplier"):
        assert f"\n        {key}: " in table


def test_a_budget_of_nothing_is_refused_with_a_usual_one():
    with pytest.raises(RecipeError) as told:
        fedpress.federate(net(), clients=three(), privacy={"unit": "sample", "epsilon": 0})
    assert str(told.value) == (
        "privacy.epsilon: input should be greater than 0, got 0; give for instance 8.0"
    )
