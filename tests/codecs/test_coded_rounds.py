import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from fedpress.codecs.base import Bound, Encoded, Key, bind_chain, decode_chain, encode_chain
from fedpress.codecs.quantize import Quantize, Sign, Ternary
from fedpress.errors import DivergedError, RecipeError, WireError
from fedpress.wire.message import Message, pack, unpack

KEY = Key(seed=1, round=2, client="c")
RATES = [0.1, 0.25, 0.5, 1.0, 2.0, 4.0]
EVERY = [
    Quantize(rate=1.0),
    Quantize(rate=0.1),
    Quantize(rate=6.0),
    Quantize(rate=1.0, unbiased=True),
    Quantize(rate=0.2, unbiased=True),
    Quantize(rate=6.0, unbiased=True),
    Quantize(bits=4),
    Quantize(bits=8, unbiased=True),
    Quantize(bits=16, block=16),
    Sign(),
    Ternary(),
    Ternary(unbiased=True, block=64),
]
UNBIASED = [s for s in EVERY if getattr(s, "unbiased", False)]


def gauss(n: int = 200_000, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def travelled(settings, x: torch.Tensor, key: Key = KEY) -> tuple[torch.Tensor, float]:
    """What arrives, and the true bits a value of the message."""
    chain, _ = bind_chain([settings], Bound(size=x.numel()))
    tensors = encode_chain(chain, x, key)
    data = pack(Message("update", {"round": 1}, tensors, frozenset(tensors)))
    return decode_chain(chain, unpack(data).tensors, key), 8 * len(data) / max(x.numel(), 1)


def error(x: torch.Tensor, y: torch.Tensor) -> float:
    return float((x.double() - y.double()).square().sum() / x.double().square().sum())


@pytest.mark.parametrize("unbiased", [False, True], ids=["biased", "unbiased"])
@pytest.mark.parametrize("rate", RATES)
def test_the_whole_message_keeps_to_the_rate(rate, unbiased):
    loud = torch.exp(1.5 * gauss(401, 1)).repeat_interleave(500)[:200_000]
    for x in (gauss(), gauss() * loud):
        bits = travelled(Quantize(rate=rate, unbiased=unbiased), x)[1]
        assert (
            0.97 * rate - 0.004 < bits <= 1.01 * rate + 640 / x.numel()
        )  # about 80 bytes of frame and header


def like_an_update(size: int, seed: int) -> torch.Tensor:
    """Returns values with few large ones, loud and quiet layers, and neighbours of one sign."""
    chance = np.random.default_rng(seed)
    means = np.repeat(chance.standard_normal(-(-size // 9)) ** 3, 9)[:size]
    layers = np.repeat(np.exp(1.5 * chance.standard_normal(40)), -(-size // 40))[:size]
    filters = np.repeat(np.exp(chance.standard_normal(-(-size // 700))), 700)[:size]
    x = (2 * means + 0.5 * chance.standard_normal(size)) * layers * filters
    return torch.from_numpy(x.astype(np.float32))


@pytest.mark.recipe
@pytest.mark.parametrize("rate", [0.25, 1.0, 2.0])
def test_a_large_update_of_which_a_sample_is_searched_keeps_to_the_rate(rate):
    x = like_an_update(1_000_000, 1)
    bits = travelled(Quantize(rate=rate), x)[1]
    assert 0.97 * rate < bits <= 1.01 * rate


@pytest.mark.parametrize(
    ("rate", "unbiased", "most"),
    [
        (1, False, 0.36),
        (2, False, 0.0905),
        (4, False, 0.0058),
        (1, True, 0.575),
        (2, True, 0.101),
        (4, True, 0.0058),
    ],
)
def test_a_gaussian_comes_close_to_the_scalar_quantizers_line(rate, unbiased, most):
    x = gauss(400_000)
    assert error(x, travelled(Quantize(rate=rate, unbiased=unbiased), x)[0]) <= most


def test_layers_of_different_loudness_gain():
    loud = torch.exp(1.5 * gauss(401, 1)).repeat_interleave(500)[:200_000]
    for unbiased in (False, True):
        settings = Quantize(rate=1.0, unbiased=unbiased)
        x = gauss() * loud
        assert error(x, travelled(settings, x)[0]) < 0.5 * error(
            gauss(), travelled(settings, gauss())[0]
        )


@pytest.mark.recipe
@pytest.mark.parametrize("settings", UNBIASED, ids=str)
def test_the_mean_over_many_keys_is_the_update(settings):
    x = torch.cat([gauss(1500), torch.full((500,), 0.01)])
    reads = [travelled(settings, x, Key(1, r, "c"))[0] for r in range(64)]
    single = sum(error(x, y) for y in reads) / len(reads)
    mean = error(x, torch.stack(reads).mean(0))
    assert mean < 2.5 * single / len(
        reads
    )  # half of the error hangs on the phase, of which there are few


@pytest.mark.parametrize("settings", EVERY, ids=str)
@pytest.mark.parametrize("size", [0, 1, 2, 7, 17, 256, 1000])
def test_every_size_comes_back_finite(settings, size):
    y, _ = travelled(settings, gauss(size))
    assert y.shape == (size,)
    assert y.dtype == torch.float32
    assert torch.isfinite(y).all()


@pytest.mark.parametrize("settings", EVERY, ids=str)
@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1.0, 1e30, 1e37])
def test_the_scale_does_not_matter(settings, scale):
    x = (gauss(5000).clamp(-3, 3) / 3).double()
    one, other = travelled(settings, x.float())[0], travelled(settings, (x * scale).float())[0]
    assert torch.isfinite(other).all()
    relative = ((one.double() * scale - other.double()).norm() / (x.norm() * scale)).item()
    assert relative < 0.1


@pytest.mark.parametrize("settings", EVERY, ids=str)
@pytest.mark.parametrize("scale", [1e-45, 3.4e38])
def test_the_smallest_and_largest_floats_are_read_finite(settings, scale):
    x = torch.full((3000,), scale) * gauss(3000).sign()
    assert torch.isfinite(travelled(settings, x)[0]).all()


@pytest.mark.parametrize("settings", EVERY, ids=str)
def test_zero_is_read_as_zero_and_costs_next_to_nothing(settings):
    y, bits = travelled(settings, torch.zeros(10_000))
    assert torch.equal(y, torch.zeros(10_000))
    assert bits < 0.12


@pytest.mark.parametrize("settings", EVERY, ids=str)
def test_constant_vectors_and_single_spikes_come_back(settings):
    spike = torch.zeros(3000)
    spike[17] = -2.5
    for x in (torch.full((3000,), 0.3), spike, spike * 1e-20 + 1e-30):
        assert torch.isfinite(travelled(settings, x)[0]).all()


@pytest.mark.parametrize("settings", [s for s in EVERY if not isinstance(s, Sign)], ids=str)
def test_zeros_of_a_sparse_update_stay_zero(settings):
    x = torch.where(
        torch.rand(50_000, generator=torch.Generator().manual_seed(3)) < 0.05, gauss(50_000), 0.0
    )
    y, _ = travelled(settings, x)
    assert (y[x == 0] == 0).all()
    assert (y != 0).any()


def test_the_rate_of_a_sparse_update_counts_against_its_whole_size():
    x = torch.where(
        torch.rand(50_000, generator=torch.Generator().manual_seed(3)) < 0.05, gauss(50_000), 0.0
    )
    for unbiased in (False, True):
        y, bits = travelled(Quantize(rate=0.5, unbiased=unbiased), x)
        assert bits <= 0.505 + 640 / x.numel()
        assert error(x, y) < 0.02


@pytest.mark.parametrize("settings", EVERY, ids=str)
def test_both_sides_need_only_the_key(settings):
    x = gauss(5000)
    chain, _ = bind_chain([settings], Bound(size=5000))
    sent = encode_chain(chain, x, KEY)
    assert torch.equal(sent["values"], encode_chain(chain, x, KEY)["values"])
    assert torch.equal(
        decode_chain(chain, sent, KEY), decode_chain(chain, sent, Key(1, 2, "c", secret=5))
    )


@pytest.mark.parametrize("settings", EVERY, ids=str)
def test_values_are_the_smallest_whole_numbers(settings):
    transform, bound = settings.bind(Bound(size=5000, l2=1.0, linf=1.0, shapes=((5000,),)))
    assert bound == Bound(size=5000, integer=True)
    assert not transform.additive
    sent = transform.encode(gauss(5000), KEY).values
    assert sent.dtype == (torch.int16 if settings in (Quantize(bits=16, block=16),) else torch.int8)


def test_four_bits_keep_to_half_a_step_of_each_block():
    x = gauss(1000) * torch.logspace(-3, 3, 1000)
    y, _ = travelled(Quantize(bits=4, block=100), x)
    steps = x.abs().view(10, 100).amax(1) / 7
    assert ((x - y).view(10, 100).abs().amax(1) <= 0.5001 * steps).all()


def test_sign_keeps_signs_and_mean_sizes():
    x = gauss(10_000)
    y, bits = travelled(Sign(block=1000), x)
    assert torch.equal(y.sign(), torch.where(x >= 0, 1.0, -1.0))
    assert torch.allclose(y.view(10, -1).abs().mean(1), x.view(10, -1).abs().mean(1), rtol=1e-5)
    assert bits < 1.12


@pytest.mark.parametrize("settings", EVERY, ids=str)
def test_whole_numbers_are_refused_before_the_run(settings):
    with pytest.raises(RecipeError, match=rf"kind: .*leave '{settings.kind}' or"):
        settings.bind(Bound(size=3, integer=True))


@pytest.mark.parametrize(
    "bad", [{}, {"rate": 1.0, "bits": 4}, {"rate": 0.01}, {"rate": math.nan}, {"bits": 1}, {"x": 1}]
)
def test_settings_that_say_nothing_or_too_much_are_refused(bad):
    with pytest.raises(ValidationError):
        Quantize(**bad)


@pytest.mark.parametrize("settings", EVERY, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_an_update_that_is_not_finite_is_never_encoded(settings, bad):
    x = gauss(1000)
    x[400] = bad
    with pytest.raises(DivergedError, match=r"update: .*not finite; lower the learning rate"):
        travelled(settings, x)


def spoiled(tensor: torch.Tensor) -> list[torch.Tensor]:
    """What somebody else could send in its place."""
    out = [
        tensor.double(),
        tensor[:-1],
        tensor.flatten().repeat(2),
        tensor.to(torch.int64),
        tensor[None],
    ]
    if tensor.is_floating_point():
        out += [torch.full_like(tensor, v) for v in (math.nan, math.inf, -1.0)]
    return out


@pytest.mark.parametrize("settings", EVERY, ids=str)
def test_spoiled_tensors_are_wire_errors_that_name_the_field(settings):
    transform, _ = settings.bind(Bound(size=5000))
    sent = transform.encode(gauss(5000), KEY)
    for values in spoiled(sent.values):
        with pytest.raises(WireError, match=r"^update\.values: "):
            transform.decode(Encoded(values, sent.side), KEY)
    for name, tensor in sent.side.items():
        for bad in spoiled(tensor):
            legal = (
                bad.dtype == torch.float32
                and bad.ndim == 1
                and len(bad) > 0
                and bool((bad.abs() < 9).all())
            )
            if name == "levels" and legal and bad[0] > 0:
                continue  # shorter and longer lists of levels are legal
            with pytest.raises(WireError, match=rf"^update\.{name}: "):
                transform.decode(Encoded(sent.values, dict(sent.side) | {name: bad}), KEY)
        with pytest.raises(WireError, match=rf"^update\.{name}: "):
            transform.decode(
                Encoded(sent.values, {k: v for k, v in sent.side.items() if k != name}), KEY
            )
    with pytest.raises(WireError, match=r"^update\.more: "):
        transform.decode(Encoded(sent.values, dict(sent.side) | {"more": torch.ones(1)}), KEY)


@pytest.mark.parametrize("settings", EVERY, ids=str)
def test_levels_out_of_range_are_refused_or_read_finite(settings):
    transform, _ = settings.bind(Bound(size=5000))
    sent = transform.encode(gauss(5000), KEY)
    faults: list[str] = []
    for value in (-(1 << 31), (1 << 31) - 1):
        values = torch.full(sent.values.shape, value, dtype=torch.int32)
        try:
            y = transform.decode(Encoded(values, sent.side), KEY)
        except WireError as problem:
            faults.append(str(problem))
        else:
            assert torch.isfinite(y).all()
    assert all(fault.startswith("update.values: ") for fault in faults)


def test_the_dither_is_the_same_on_every_machine():
    x = torch.from_numpy((np.arange(4000) * 7919 % 4001 / 2000 - 1).astype(np.float32))
    transform, _ = Quantize(rate=2.0, unbiased=True).bind(Bound(size=4000))
    assert transform.dither(8, KEY).tolist() == pytest.approx(
        transform.dither(4000, KEY)[:8].tolist(), abs=0
    )
    assert error(x, travelled(Quantize(rate=2.0, unbiased=True), x)[0]) < 0.15
