"""What one NVIDIA GPU does alone, in under 8 minutes: training, private steps, many clients, export.

    python benchmarks/gpu.py --data FOLDER [--only dense private clients export] [--json FILE]
    python benchmarks/gpu.py --pack SMALL --data FOLDER
    python benchmarks/gpu.py --tiny --device cpu

`dense` trains a ResNet-18 on CIFAR-10, to 94% of the test images (settings of the recipe `cifar10`,
40 epochs in the place of 60). `private` compares a step of DP-SGD with a plain step of the same
network. `clients` compares rounds of clients that train one after another with rounds of clients in
one program (engine `stacked`); on a CPU also with worker processes. `export` writes the trained
network as ONNX and compares both on test images.

FOLDER has CIFAR-10 in one of the forms of `docs/data.md`. `--pack` writes it in less than 60 MB:
the test images as they are, the training images as WebP of quality 95. `--tiny` runs everything in
seconds on made-up images, to show that it works. Nothing else of the machine is needed.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import private_step
import torch
from torch import Tensor, nn

import fedpress
from fedpress import deploy
from fedpress.codecs import Key
from fedpress.core import consent, parameters
from fedpress.core.examples import Arrays, Preprocess
from fedpress.data import DataSettings
from fedpress.data.cifar10 import read_cifar10
from fedpress.federation import Start
from fedpress.models.resnet import ResNet, resnet18
from fedpress.pipeline import recipe as recipes
from fedpress.pipeline.start import first_state
from fedpress.stages.federate.binding import bind
from fedpress.tasks import Classification
from fedpress.training.augment import Augment
from fedpress.training.device import find, uses_bf16
from fedpress.training.evaluate import evaluate
from fedpress.training.fit import EpochRecord, Fit
from fedpress.training.settings import TrainSettings
from fedpress.transport.engine import engine_settings, open_engine

# The networks of the clients lie there.
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "rivals")]

PREPROCESS = Preprocess((0.49140, 0.48216, 0.44653), (0.24703, 0.24349, 0.26159))
"""Mean and standard deviation of the training images, from CIFAR-10's own statistics."""
CLASSES = tuple(str(number) for number in range(10))
QUALITY = 95
"""Quality of the training images that `--pack` writes."""


@dataclass(frozen=True)
class Network:
    """A network of simulated clients.

    Attributes:
        name: its name in the table.
        architecture: name of an architecture, or `module:function`.
        arguments: its arguments, in TOML.
        shape: shape of an example; float32 values.
        rows: number of examples of a client.
    """

    name: str
    architecture: str
    arguments: str
    shape: tuple[int, ...]
    rows: int


MLP = Network("MLP, 2,410 parameters", "mlp", "in_features = 64, hidden = [32]", (64,), 50)
SMALL = Network("CNN, 82,058 parameters", "small_cnn:SmallCNN", "", (3, 32, 32), 50)
PFL = Network("pfl's CNN, 1,626,442 parameters", "shared:cnn", "", (3, 32, 32), 50)


@dataclass(frozen=True)
class Sizes:
    """How much each part does.

    Attributes:
        epochs: epochs of the dense training.
        image_sizes: smaller images in its first epochs.
        batch: its batch size.
        widths: widths of its network; empty: those of ResNet-18.
        private_batches: batch sizes of the private step.
        repeats: number of pairs of a private and a plain step.
        cohorts: networks with numbers of clients in a round.
        rounds: number of rounds that are timed.
        images: number of made-up images; 0: CIFAR-10 is read.
    """

    epochs: int = 40
    image_sizes: tuple[tuple[int, int], ...] = ((16, 8), (24, 10))
    batch: int = 512
    widths: tuple[int, ...] = ()
    private_batches: tuple[int, ...] = (64, 512)
    repeats: int = 9
    cohorts: tuple[tuple[Network, int], ...] = (
        (MLP, 10),
        (MLP, 100),
        (SMALL, 10),
        (SMALL, 100),
        (PFL, 50),
    )
    rounds: int = 5
    images: int = 0


TINY = Sizes(
    epochs=2,
    image_sizes=((16, 1),),
    batch=16,
    widths=(8, 16),
    private_batches=(4,),
    repeats=1,
    cohorts=((replace(MLP, rows=20), 3), (replace(SMALL, rows=10), 2)),
    rounds=1,
    images=48,
)


@dataclass(frozen=True)
class Row:
    """A row of the table: what was measured in which part, and how it came out."""

    part: str
    what: str
    value: str


@dataclass
class Bench:
    """What the parts share.

    Attributes:
        device: the device.
        sizes: how much each part does.
        data: folder of CIFAR-10; None if the images are made up.
        model: the network of `dense`, once it is trained.
        read: training and test images; empty until a part needs them.
    """

    device: torch.device
    sizes: Sizes
    data: Path | None
    model: nn.Module | None = None
    read: list[Arrays] = field(default_factory=list)

    def images(self) -> list[Arrays]:
        """Returns training and test images, in uint8 on the CPU."""
        if not self.read:
            self.read = _made_up(self.sizes.images) if self.sizes.images else cifar10(self.data)
        return self.read

    def network(self) -> nn.Module:
        """Returns the untrained network of `dense`."""
        torch.manual_seed(0)
        if self.sizes.widths:
            return ResNet(widths=self.sizes.widths, blocks=1, num_classes=10)
        return resnet18()


def _made_up(count: int) -> list[Arrays]:
    chance = torch.Generator().manual_seed(0)
    found = []
    for n in (count, max(10, count // 4)):
        x = torch.randint(0, 256, (n, 3, 32, 32), generator=chance, dtype=torch.uint8)
        found.append(Arrays(x, torch.arange(n) % 10))
    return found


def cifar10(folder: Path | None) -> list[Arrays]:
    """Returns training and test images of CIFAR-10."""
    rows = read_cifar10(DataSettings(source="cifar10", path=folder), None)
    assert rows.test is not None
    return [rows.train, rows.test]


def dense(bench: Bench) -> list[Row]:
    """Trains ResNet-18 on CIFAR-10."""
    sizes = bench.sizes
    train, test = bench.images()
    settings = TrainSettings(
        epochs=sizes.epochs,
        image_sizes=sizes.image_sizes,
        batch_size=sizes.batch,
        optimizer="muon",
        lr=0.1,
        momentum=0.8,
        weight_decay=0.05,
        warmup=0.1,
        label_smoothing=0.1,
        ema=0.998 if len(train) > 1000 else 0.5,
        augment=Augment(crop=0.125, flip="alternate", cutout=0.25),
    )
    task = Classification(CLASSES)
    fit = Fit(bench.network(), settings, task=task, seed=0, device=bench.device)
    nobody = train.take(torch.arange(0))
    began = time.perf_counter()
    ended = [began]
    for event in fit.epochs(train, nobody, PREPROCESS):
        if isinstance(event, EpochRecord):
            private_step.wait_for(bench.device)
            ended.append(time.perf_counter())
            print(f"epoch {event.epoch}: loss {event.loss:.3f}", file=sys.stderr, flush=True)
    bench.model = fit.result_()
    seconds = [after - before for before, after in pairwise(ended)]
    found = evaluate(bench.model, test, PREPROCESS, task, precision=settings.precision)
    kind = "bf16" if uses_bf16(bench.model, settings.precision) else "float32"
    rows = [
        Row("dense", f"accuracy after {sizes.epochs} epochs", f"{found.score:.2%} (goal 94%)"),
        Row("dense", f"training in {kind}", f"{ended[-1] - began:.0f} s"),
        # The first epoch at full size still chooses kernels.
        Row("dense", "images a second at full size", f"{len(train) / min(seconds[-3:]):,.0f}"),
    ]
    if bench.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(bench.device) / 2**30
        rows.append(Row("dense", "most memory", f"{peak:.1f} GiB"))
    return rows


def private(bench: Bench) -> list[Row]:
    """Compares steps of DP-SGD with plain steps of the network with 30% of the parameters."""
    rows = []
    for batch in bench.sizes.private_batches:
        for precision in (None, torch.bfloat16):
            found = private_step.measure(
                batch=batch,
                repeats=bench.sizes.repeats,
                autocast=precision,
                # Chosen by fedpress, so that a method which a GPU cannot do shows.
                method=None,
                device=bench.device,
            )
            times = "plain {plain_s:.4f} s, private {private_s:.4f} s, ".format(**found)
            ratio = "{ratio:.2f}x ({ratio_low:.2f}-{ratio_high:.2f})".format(**found)
            rows.append(Row("private", "{precision}, batch {batch}".format(**found), times + ratio))
    # In a run the noise comes from a cipher on the CPU, and not from torch as above.
    size = sum(p.numel() for p in private_step.network().parameters())
    chance = Key(0, 1, "c0", secret=1).private_stream("noise")
    took = private_step.seconds(lambda: chance.normal(size), time.perf_counter)
    rows.append(Row("private", f"noise of {size:,} values, on the CPU", f"{took:.3f} s"))
    return rows


RECIPE = """
name = "clients"
[data]
source = "digits"
[model]
architecture = "{architecture}"
arguments = {{ {arguments} }}
[[stage]]
kind = "federate"
num_rounds = {rounds}
batch_size = 10
lr = 0.05
scored_clients = 0
weights = "equal"
"""


def clients(bench: Bench) -> list[Row]:
    """Compares rounds of clients in one program with rounds of clients one after another."""
    consent.allow(PFL.architecture, SMALL.architecture)
    engines = ["local", "stacked"]
    if bench.device.type == "cpu":
        engines.insert(1, "processes")
    rows = []
    for network, count in bench.sizes.cohorts:
        medians = {}
        for engine in engines:
            seconds = round_seconds(bench, network, count, engine)
            medians[engine] = statistics.median(seconds)
            shown = f"{_short(medians[engine])} ({_short(min(seconds))}-{_short(max(seconds))})"
            ratio = f", {medians['local'] / medians[engine]:.2f}x local"
            what = f"{network.name}, {count} clients, {engine}"
            rows.append(Row("clients", what, f"{shown} a round{ratio}"))
            print(f"{what}: {shown}", file=sys.stderr, flush=True)
    return rows


def _short(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"


def round_seconds(bench: Bench, network: Network, count: int, engine: str) -> list[float]:
    """Returns the seconds of each round, without the two first ones, in which kernels are chosen."""
    rounds = bench.sizes.rounds + 2
    text = RECIPE.format(
        architecture=network.architecture, arguments=network.arguments, rounds=rounds
    )
    loaded = recipes.load(text)
    state = first_state(loaded, client_data(network, count))
    with open_engine(engine_settings(engine)) as opened:
        state = replace(state, device=bench.device, engine=opened)
        stage: Any = loaded.stage[0]
        server = bind(stage, state).server
        start = Start(parameters.flatten(server.model))
        return [record.seconds for record in server.rounds(start)][2:]


def client_data(network: Network, count: int) -> fedpress.FederatedData:
    """Returns made-up examples of simulated clients."""
    chance = torch.Generator().manual_seed(0)

    def examples(n: int) -> Arrays:
        return Arrays(torch.randn(n, *network.shape, generator=chance), torch.arange(n) % 10)

    held = examples(10)
    return fedpress.FederatedData(
        "made-up examples",
        {f"c{number}": examples(network.rows) for number in range(count)},
        public=held,
        validation=held,
        test=held,
        num_classes=10,
        class_names=CLASSES,
    )


def export(bench: Bench) -> list[Row]:
    """Writes the network as ONNX, and compares the file with it on test images."""
    # The file is made and run on the CPU, as on a device.
    model = bench.network() if bench.model is None else bench.model
    model = model.to("cpu").eval()
    _, test = bench.images()
    x = PREPROCESS(test.x[:1000])
    assert isinstance(x, Tensor)
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        job = deploy.Job(input_shape=(3, 32, 32), preprocess=PREPROCESS)
        artifact = deploy.export(model, Path(folder) / "model.onnx", "onnx", job)
        took = time.perf_counter() - began
        found = deploy.parity(model, artifact.path, x)
    same = f"{found.same_argmax_share:.1%} of {len(x)} images alike, "
    return [
        Row("export", "ONNX", f"{artifact.file_bytes / 1e6:.1f} MB in {took:.1f} s"),
        Row("export", "parity", same + f"largest error {found.max_abs_error:.1e}"),
    ]


PARTS: dict[str, Callable[[Bench], list[Row]]] = {
    "dense": dense,
    "private": private,
    "clients": clients,
    "export": export,
}
"""Name of a part -> its function; `export` writes the model of `dense`, which comes before it."""


def pack(source: Path, target: Path) -> int:
    """Writes CIFAR-10 into a folder in the layout of the hub; returns the size in bytes.

    Args:
        source: folder with the images.
        target: new folder.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    target.mkdir(parents=True)
    size = 0
    for name, rows in zip(("train", "test"), cifar10(source), strict=True):
        assert isinstance(rows.x, Tensor)
        images = []
        for image in rows.x.permute(0, 2, 3, 1).numpy():
            written = io.BytesIO()
            if name == "train":
                Image.fromarray(image).save(written, "WEBP", quality=QUALITY, method=6)
            else:
                Image.fromarray(image).save(written, "WEBP", lossless=True, quality=100, method=6)
            images.append({"bytes": written.getvalue(), "path": None})
        file = target / f"{name}-00000-of-00001.parquet"
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        columns = {"img": pa.array(images, kind), "label": rows.y.tolist()}
        pq.write_table(pa.table(columns), file, compression="none", use_dictionary=False)
        size += file.stat().st_size
    return size


def machine(device: torch.device) -> str:
    """Says what the numbers depend on."""
    names = [platform.machine(), f"{os.cpu_count()} cores", f"torch {torch.__version__}"]
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        names[:1] = models[:1]
    if device.type == "cuda":
        tf32 = f"TF32 convolutions {torch.backends.cudnn.allow_tf32}"
        tf32 += f", products {torch.backends.cuda.matmul.allow_tf32}"
        names = [torch.cuda.get_device_name(device), *names, f"CUDA {torch.version.cuda}", tf32]
    if hasattr(os, "getloadavg"):
        names.append(f"load before {os.getloadavg()[0]:.2f}")
    return ", ".join(names)


def table(about: str, rows: Sequence[Row]) -> str:
    """Lays the rows out for a person, as a table in Markdown."""
    lines = [about, "", "| part | what | value |", "| --- | --- | --- |"]
    for row in rows:
        lines.append(f"| {row.part} | {row.what} | {row.value} |")
    return "\n".join(lines)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, help="folder of CIFAR-10; without it, downloaded")
    parser.add_argument(
        "--device", default="auto", help="cuda, cuda:1, cpu; the GPU if there is one"
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--epochs", type=int, help="epochs of the dense training")
    parser.add_argument("--tiny", action="store_true", help="only shows that it runs")
    parser.add_argument("--json", type=Path, help="file for the rows")
    parser.add_argument("--pack", type=Path, help="write the images in under 60 MB, and end")
    chosen = parser.parse_args()
    if chosen.pack is not None:
        print(f"{pack(chosen.data, chosen.pack) / 1e6:.1f} MB in {chosen.pack}")
        return
    sizes = TINY if chosen.tiny else Sizes()
    if chosen.epochs is not None:
        sizes = replace(sizes, epochs=chosen.epochs, image_sizes=())
    bench = Bench(find(chosen.device), sizes, chosen.data)
    about = machine(bench.device)
    rows: list[Row] = []
    for name, part in PARTS.items():
        if name not in chosen.only:
            continue
        began = time.perf_counter()
        rows += part(bench)
        rows.append(Row(name, "whole part", f"{time.perf_counter() - began:.0f} s"))
        # Written after each part, so that a run which is ended by a time limit leaves something.
        if chosen.json is not None:
            found = {"machine": about, "rows": [vars(row) for row in rows]}
            chosen.json.write_text(json.dumps(found, indent=1), "utf-8")
    print(table(about, rows))


if __name__ == "__main__":
    main()
