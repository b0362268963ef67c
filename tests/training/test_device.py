"""The device, precision and the memory layout of images."""

import pytest
import torch
from torch import nn

from fedpress.errors import FedpressError
from fedpress.models.resnet import resnet_small
from fedpress.training.device import (
    devices,
    find,
    memory_format,
    place_,
    takes_channels_last,
    uses_bf16,
)
from tests.training.trainings import fit_all, fitting, images, network, settings


@pytest.mark.parametrize("fast", [True, False])
def test_bf16_is_used_where_it_is_asked_for_or_faster(monkeypatch, fast):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: fast)
    large, small = nn.Conv2d(500, 1000, 1), nn.Conv2d(499, 1000, 1, bias=False)
    assert uses_bf16(large, "auto") is fast
    assert not uses_bf16(small, "auto")
    assert not uses_bf16(nn.Linear(500, 1000), "auto")  # no convolution
    assert uses_bf16(small, "bf16")
    assert not uses_bf16(large, "float32")


def test_bf16_computes_in_bf16_and_keeps_weights_in_float32():
    model, seen = network("resnet"), set()
    model.head.register_forward_hook(lambda module, inputs, out: seen.add(out.dtype))
    records = fit_all(
        fitting(model, settings(precision="bf16", epochs=1), seed=0), images(), images(4)
    )
    assert seen == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in model.parameters())
    reference = network("resnet")
    plain = fit_all(fitting(reference, settings(epochs=1), seed=0), images())
    assert records[0].loss == pytest.approx(plain[0].loss, rel=0.02)


def test_images_and_filters_lie_channels_last():
    model, seen = network("cnn"), []
    fit = fitting(model, settings(epochs=1), seed=0)
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    fit_all(fit, images(), images(4))
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in seen)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert all(m.weight.is_contiguous(memory_format=torch.channels_last) for m in convolutions)
    assert memory_format(torch.zeros(2, 1, 4, 4)) is torch.contiguous_format
    assert memory_format(torch.zeros(2, 5)) is torch.contiguous_format


@pytest.mark.parametrize(
    ("width", "capability", "fast"), [(4, "AVX2", False), (8, "AVX2", True), (4, "AVX512", True)]
)
def test_a_format_in_which_torch_writes_beyond_its_memory_is_not_used(
    width, capability, fast, monkeypatch
):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    model = place_(resnet_small(width=width), torch.device("cpu"))
    assert takes_channels_last(model) is fast
    wanted = torch.channels_last if fast else torch.contiguous_format
    assert memory_format(torch.zeros(2, 3, 8, 8), model) is wanted
    assert model.stem.weight.is_contiguous(memory_format=wanted)


def test_the_cpu_is_chosen_where_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find() == find("auto") == find("cpu") == torch.device("cpu")


def test_the_first_gpu_is_chosen_where_there_are_two(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert find() == find("cuda") == torch.device("cuda")
    assert find("cuda:1") == torch.device("cuda", 1)
    assert devices()[:2] == ("cuda:0", "cuda:1")
    assert devices()[-1] == "cpu"


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:7", "mps"])
def test_a_device_that_is_missing_is_refused_with_those_that_are_here(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    said = f"device: there is no '{name}' on this machine, which has cpu; give device=\"cpu\""
    with pytest.raises(FedpressError, match=said):
        find(name)


@pytest.mark.parametrize("name", ["meta", "gpu", "cuda:", "cuda:x", "CPU", "", "cpu:0", "cuda:1\n"])
def test_a_name_of_no_device_is_refused(name):
    with pytest.raises(FedpressError, match="device: no device is called"):
        find(name)


def test_a_training_on_the_cpu_gives_the_bits_of_one_that_chose_by_itself(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    first, second = network("cnn"), network("cnn")
    fit_all(fitting(first, settings(epochs=1), seed=0), images(), images(4))
    fit_all(fitting(second, settings(epochs=1), seed=0, device=find("cpu")), images(), images(4))
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)
