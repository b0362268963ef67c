"""Error against true bytes, and speed, of `quantize` with packing beside EDEN, uniform levels with zstd and Shannon.

Every rate is eight times the bytes of the whole message over the number of values; ours gets the bytes that EDEN took.
The error is the squared error over the squared norm. Speeds are megabytes of float32 a second of processor time on one
thread, median of the repeats; quantizer, packing and message together. The search for the step counts, so rivals that
try many steps (zstd, NNCodec) look slow; EDEN is plain numpy here. NNCodec runs where it is installed.

    python benchmarks/codecs.py [--size 3300000] [--update FILE] [--rates 0.5 1 2] [--repeats 3] [--json]
    python benchmarks/codecs.py --make-update FILE --data DIR

An update is a flat float32 vector: .npy, .pt or .safetensors. `--make-update` makes one: the pruned ResNet-18 of
`checkpoints/cifar10-cpu` trained for one local epoch on the 600 CIFAR-10 images of one client, minus where it began.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from eden import Eden, Nncodec, UniformZstd
from torch import Tensor

from fedpress.codecs.base import Bound, Key, Settings, bind_chain, decode_chain, encode_chain
from fedpress.codecs.quantize import Quantize, Sign, Ternary
from fedpress.wire import Message, pack, unpack

Row = dict[str, str | float]
RATES = (0.1, 0.25, 0.5, 1.0, 2.0, 3.0, 4.0)
GOALS = {("ours", 1.0): 0.36, ("ours", 2.0): 0.090, ("ours", 4.0): 0.0058}
GOALS |= {
    ("ours unbiased", 1.0): 0.57,
    ("ours unbiased", 2.0): 0.10,
    ("ours unbiased", 4.0): 0.0058,
}
KEY = Key(seed=0, round=1, client="0")


def ours(
    settings: Settings, size: int
) -> tuple[Callable[[Tensor], bytes], Callable[[bytes], Tensor]]:
    """Returns encoder and decoder of a whole message."""
    chain, _ = bind_chain([settings], Bound(size=size))

    def encoded(x: Tensor) -> bytes:
        tensors = encode_chain(chain, x, KEY)
        return pack(Message("update", {"round": 1}, tensors, frozenset(tensors)))

    return (
        encoded,
        lambda data: decode_chain(chain, unpack(data).tensors, KEY),
    )


def rival(
    codec: Eden | UniformZstd | Nncodec, size: int
) -> tuple[Callable[[Tensor], bytes], Callable[[bytes], Tensor]]:
    """Returns encoder and decoder of a rival, whose messages have no frame."""
    return (
        lambda x: codec.encode(x.numpy(), 0),
        lambda data: torch.from_numpy(codec.decode(data, size, 0)),
    )


def measured(
    name: str,
    x: Tensor,
    codec: tuple[Callable[[Tensor], bytes], Callable[[bytes], Tensor]],
    repeats: int,
) -> Row:
    """Codes `x` [d] and reads it again, `repeats` times."""
    encode, decode = codec
    there, back = [], []
    for _ in range(repeats):
        start = time.thread_time()
        data = encode(x)
        middle = time.thread_time()
        y = decode(data)
        there.append(middle - start)
        back.append(time.thread_time() - middle)
    error = float((x.double() - y.double()).square().sum() / x.double().square().sum())
    megabytes = 4e-6 * x.numel()
    return {
        "codec": name,
        "bits": 8 * len(data) / x.numel(),
        "error": error,
        "encode": megabytes / statistics.median(there),
        "decode": megabytes / statistics.median(back),
    }


def rows(x: Tensor, rates: list[float], repeats: int) -> Iterator[Row]:
    """Yields a row for each codec and rate; `wanted` is the rate of its group."""
    size = x.numel()
    for rate in rates:
        for kind, unbiased in (("", False), (" unbiased", True)):
            eden = measured("eden" + kind, x, rival(Eden(rate, unbiased), size), 1)
            quantize = Quantize(rate=min(eden["bits"], rate), unbiased=unbiased)
            mine = measured("ours" + kind, x, ours(quantize, size), repeats)
            yield mine | {"wanted": rate, "against_eden": mine["error"] / eden["error"]}
            yield eden | {"wanted": rate}
        yield measured("uniform + zstd", x, rival(UniformZstd(rate), size), 1) | {"wanted": rate}
        if find_spec("nncodec"):
            for kind, trellis in (("nncodec", False), ("nncodec, trellis", True)):
                yield measured(kind, x, rival(Nncodec(rate, trellis), size), 1) | {"wanted": rate}
        yield {
            "codec": "Shannon, Gaussian",
            "bits": rate,
            "error": 2.0 ** (-2 * rate),
            "wanted": rate,
        }
    for name, settings in (
        ("sign", Sign()),
        ("ternary", Ternary()),
        ("ternary unbiased (TernGrad)", Ternary(unbiased=True)),
        ("4 bits", Quantize(bits=4)),
        ("4 bits unbiased (QSGD)", Quantize(bits=4, unbiased=True)),
        ("8 bits", Quantize(bits=8)),
    ):
        yield measured(name, x, ours(settings, size), repeats) | {"wanted": 9.0}


def read_update(path: Path) -> Tensor:
    """Reads a flat float32 vector [d]; several tensors of a file follow one another."""
    if path.suffix == ".npy":
        parts = [torch.from_numpy(np.load(path))]
    elif path.suffix == ".safetensors":
        from safetensors.torch import load_file

        parts = list(load_file(path).values())
    else:
        loaded = torch.load(path, weights_only=True)
        parts = list(loaded.values()) if isinstance(loaded, dict) else [loaded]
    return torch.cat([part.reshape(-1).float() for part in parts])


def make_update(data: Path, *, lr: float = 0.005, batch: int = 50, whole: bool = True) -> Tensor:
    """Trains the checkpoint for one epoch on the first client's 600 images; returns client minus server [d]."""
    from fedpress.core.parameters import flatten, trainable
    from fedpress.core.random_source import public_stream
    from fedpress.data import DataSettings, load
    from fedpress.models import freeze_batch_norm_, load_model
    from fedpress.training.augment import Augment, augment

    _, model = load_model(Path(__file__).parent / "checkpoints" / "cifar10-cpu")
    settings = DataSettings(
        source="cifar10", path=str(data), num_clients=10, examples_per_client=600
    )
    federated = load(settings, seed=0)
    client = next(iter(federated.clients.values()))
    if not whole:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith("head."))
    freeze_batch_norm_(model.train())
    before = flatten(model)
    chance = public_stream(0, "make-update")
    optimizer = torch.optim.SGD(trainable(model), lr)
    for index in chance.permutation(len(client)).split(batch):
        some = client.take(index)
        optimizer.zero_grad()
        x = augment(federated.preprocess(some.x), Augment(flip="random"), chance)
        F.cross_entropy(model(x), some.y).backward()
        optimizer.step()
    return flatten(model) - before


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=3_300_000, help="values of the Gaussian vector")
    parser.add_argument("--update", type=Path, help="measure this update as well")
    parser.add_argument("--make-update", type=Path, help="make an update, write it there and stop")
    parser.add_argument("--data", type=Path, help="folder that holds cifar10/")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="bits per value")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.make_update:
        if arguments.data is None:
            parser.error("--make-update needs --data")
        np.save(arguments.make_update, make_update(arguments.data).numpy())
        return
    torch.set_num_threads(1)
    gaussian = torch.randn(arguments.size, generator=torch.Generator().manual_seed(0))
    vectors = {f"Gaussian, {arguments.size} values": gaussian}
    if arguments.update:
        update = read_update(arguments.update)
        vectors[f"{arguments.update.name}, {update.numel()} values"] = update
    for name, x in vectors.items():
        if not arguments.json:
            print(
                f"\n{name}\n{'codec':<28}{'bits':>8}{'error':>10}{'goal':>8}{'/ EDEN':>8}{'encode':>8}{'decode':>8}"
            )
        for row in rows(x, arguments.rates, arguments.repeats):
            goal = GOALS.get((str(row["codec"]), float(row["wanted"]))) if x is gaussian else None
            show = (
                partial(json.dumps, {"vector": name, "goal": goal} | row)
                if arguments.json
                else partial(line, row, goal)
            )
            print(show(), flush=True)


def line(row: Row, goal: float | None) -> str:
    """Formats a row of the table."""
    ratio = f"{row['against_eden']:.3f}" if "against_eden" in row else ""
    speed = f"{row['encode']:>8.0f}{row['decode']:>8.0f}" if "encode" in row else ""
    return f"{row['codec']:<28}{row['bits']:>8.4f}{row['error']:>10.5f}{goal or '':>8}{ratio:>8}{speed}"


if __name__ == "__main__":
    main()
