"""Every architecture: any choice of channels is exact, and half goes by every score and comes back from a file."""

import warnings
from copy import deepcopy

import onnxruntime
import pytest
import torch
from zoo import ZOO, make, outputs, repeated

from fedpress.compress import (
    SCORES,
    PruningPlan,
    check_parity,
    macs,
    parameters,
    plan,
    remove_,
    score,
    trace,
)
from fedpress.compress.prune.plan import make_plan
from fedpress.errors import ModelError
from fedpress.models import ModelSpec, load_model, save_model, what_pruning_changed
from tests.harness import tiered

EVERY = sorted(ZOO)
QUICK = ("parts", "vit-fused")
"""An export takes seconds: of these with each change, of all in the deploy tier."""


def build(name):
    return make(name, seed=1)[0]


def spec_of(name, model):
    base = ModelSpec(
        architecture=f"{__name__}:build", arguments={"name": name}, input_shape=(3, 8, 8)
    )
    return base.model_copy(update=what_pruning_changed(model, base.build_dense()))


def first(x):
    return tuple(each[:1] for each in x) if isinstance(x, tuple) else x[:1]


def halved(model, graph, name, x):
    def losses():
        return (
            sum(y.square().mean() for y in outputs(model, each)) for each in (first(x), first(x))
        )

    scores = score(model, graph, name, losses=losses, generator=torch.Generator().manual_seed(0))
    return plan(model, graph, scores, keep_params=0.5, round_to=1, tolerance=0.05)


def trains(model, x):
    """Runs forward and backward in training mode; every parameter that is used gets a finite gradient."""
    sum(y.square().sum() for y in outputs(model.train(), repeated(x, 2))).backward()
    model.eval()
    return all(
        p.grad is not None and p.grad.shape == p.shape and p.grad.isfinite().all()
        for p in model.parameters()
    )


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("seed", tiered(range(3), quick=[0]))
def test_any_choice_of_channels_can_be_removed_and_is_counted_exactly(traced, name, seed):
    model, x, graph = traced(name)
    draw = torch.Generator().manual_seed(seed)
    kept = [int(torch.randint(1, layer.channels + 1, (), generator=draw)) for layer in graph.groups]
    choice = make_plan(
        model, graph, [torch.rand(layer.channels, generator=draw) for layer in graph.groups], kept
    )
    small = deepcopy(model)
    remove_(small, choice)
    assert check_parity(model, small, choice, x) <= 1e-5
    assert parameters(small) == choice.parameters_after == graph.parameters(kept)
    assert macs(small, first(x)) == graph.macs(kept)
    assert trains(small, x)


@pytest.mark.parametrize("name", EVERY)
def test_half_of_every_architecture_goes_by_every_score(traced, name):
    model, x, graph = traced(name)
    for by in SCORES:
        if by == "bn_scale" and not all(layer.slices_with_role("scale") for layer in graph.groups):
            with pytest.raises(ModelError, match="needs a batch norm after"):
                halved(model, graph, by, x)
            continue
        small = deepcopy(model)
        remove_(small, halved(model, graph, by, x))
        assert 0.45 <= parameters(small) / parameters(model) <= 0.55
        with torch.no_grad():
            assert all(y.isfinite().all() for y in outputs(small, x))


@pytest.mark.parametrize("name", EVERY)
def test_half_of_every_architecture_is_exact_trains_and_comes_back_from_a_file(
    traced, name, tmp_path
):
    model, x, graph = traced(name)
    choice = PruningPlan.model_validate_json(halved(model, graph, "taylor", x).model_dump_json())
    small = build(name)  # another copy: the plan is enough
    small.load_state_dict(model.state_dict())
    remove_(small, choice)
    assert check_parity(model, small, choice, x) <= 1e-5
    assert trains(small, x)
    save_model(tmp_path, spec_of(name, small), small)
    again = load_model(tmp_path, allow_code=f"{__name__}:build")[1].eval()
    with torch.no_grad():
        assert all(
            torch.equal(a, b) for a, b in zip(outputs(small, x), outputs(again, x), strict=True)
        )


@pytest.mark.recipe
@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.deploy) for n in EVERY]
)
def test_a_pruned_network_runs_in_onnxruntime_with_a_free_batch(traced, name, tmp_path):
    model, x, graph = traced(name)
    small = deepcopy(model)
    remove_(small, halved(model, graph, "l1", x))
    arguments = x if isinstance(x, tuple) else (x,)
    free = tuple({0: torch.export.Dim("batch")} for _ in arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            small.eval(),
            arguments,
            tmp_path / "m.onnx",
            dynamo=True,
            dynamic_shapes=free,
            verbose=False,
            optimize=False,
        )
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    batch = tuple(repeated(each, 2)[:3] for each in arguments)
    feeds = {i.name: value.numpy() for i, value in zip(session.get_inputs(), batch, strict=True)}
    with torch.no_grad():
        for ours, theirs in zip(outputs(small, batch), session.run(None, feeds), strict=True):
            torch.testing.assert_close(torch.from_numpy(theirs), ours, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["vit-fused", "parts", "lstm", "normed", "vit-torch"])
def test_a_pruned_network_can_be_pruned_again(traced, name):
    model, x, graph = traced(name)
    small = deepcopy(model)
    remove_(
        small,
        plan(model, graph, score(model, graph, "l1"), keep_params=0.75, round_to=1, tolerance=0.1),
    )
    again = trace(small, x)
    smaller = deepcopy(small)
    choice = plan(
        small, again, score(small, again, "l1"), keep_params=0.75, round_to=1, tolerance=0.1
    )
    remove_(smaller, choice)
    assert check_parity(small, smaller, choice, x) <= 1e-5


def test_numbers_of_another_model_are_refused():
    model = build("parts")
    spec = spec_of("parts", model).model_copy(update={"numbers": {"blocks.7": {0: {0: 3}}}})
    with pytest.raises(ModelError, match=r"spec\.numbers: .*blocks.*load the spec that was saved"):
        spec.build()
