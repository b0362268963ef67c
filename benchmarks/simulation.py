"""Speed of simulated federated learning: fedpress beside other simulators and a plain loop.

    python benchmarks/simulation.py --prepare
    python benchmarks/simulation.py --data DIR --rounds 6 --repeats 5

The task is pfl-research's CIFAR-10 benchmark (IID, no privacy): 1,000 clients of 50 images, 50 of
them in a round, one epoch of SGD in batches of 10 with learning rate 0.1, a CNN of 1,626,442
parameters, the mean of the updates with equal weights. After each round all simulators evaluate
the model on the same 1,000 images of the test set, which stands inside the clock: as many images
as pfl's script evaluates, 10,000 every ten rounds.

A simulator is named NAME/ENGINE/PRECISION, such as fedpress/local/float32 or pfl/processes/bf16;
`--only` takes such names, with * for anything. fedpress may have one more part, such as
fedpress/local/float32+coded; see `WITH`. Each run is a process of its own, and the simulators
take turns. `s/round` is the mean of a run's rounds without its first; the table has the median
of the runs, with the smallest and largest. `start` ends when the first round begins, `end` begins
after the last round: fedpress evaluates the clients there.

Each rival runs as its authors recommend, with one worker for each core. What was found out about
them on the way:

- flower/ray: for each of the 1,000 clients, the thread of Flower 1.42 that hands out messages looks
  through all 50 that are stored (`add_messages_to_queue`): this takes most of a core during a whole
  round. Ray's actors have niceness 15 by default, so this thread and whatever else runs starve
  them: on 2 busy cores a round took 133 s, and 22 s with niceness 0, which is set here (one run
  each; the other work was not the same). A first round of more than 6 minutes, seen once on
  another machine, may have been this.
- blazefl/threads: what BlazeFL recommends, on a Python without the global lock; `--prepare` takes
  one with it. blazefl/processes is BlazeFL's other way; it makes a new pool in each round.
- pfl/processes: was aborted once with SIGABRT, and never again. torch knows such an abort of a
  process that ends with its process group open (pytorch/pytorch#179291), so the program closes it.

`--log FILE` appends each run to FILE, so that a long measurement may be done in pieces;
`--table FILE` prints the table of all of them. The environments of the rivals lie in
`--environments` (by default in the user's cache), where `--prepare` puts them with their pins.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import importlib.metadata
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent / "rivals"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fedpress" / "rivals"
TORCH = "torch==2.13.0"
# The programs read the data with it, and neither torch nor BlazeFL brings it.
NUMPY = "numpy==2.4.6"
PINS = {
    "pfl": (TORCH, "pfl==0.6.0"),
    "flower": (TORCH, "flwr[simulation]==1.42.0", "ray==2.55.1"),
    "blazefl": (TORCH, NUMPY, "blazefl==2.0.3"),
}
"""Name of a rival -> what its environment holds; torch is installed first."""

OLDEST_PYTHON = {"blazefl": "3.12"}
"""Name of a rival -> the version of Python that it needs, if this one may be too old."""

SCRIPTS = {
    "fedpress": "ours.py",
    "plain": "plain.py",
    "central": "central.py",
    "pfl": "pfl_research.py",
    "flower": "flower.py",
    "blazefl": "blazefl_pools.py",
}
"""Name of a simulator -> its program in `benchmarks/rivals`."""

RIVALS = (
    "plain/processes/float32",
    "plain/processes/bf16",
    "central/threads/float32",
    "central/threads/bf16",
    "pfl/local/float32",
    "pfl/local/bf16",
    "pfl/processes/float32",
    "pfl/processes/bf16",
    "flower/ray/float32",
    "flower/ray/bf16",
    "blazefl/threads/float32",
    "blazefl/threads/bf16",
    "blazefl/processes/float32",
    "blazefl/processes/bf16",
)

WITH: dict[str, dict[str, Any]] = {
    "": {},
    "coded": {"uplink": [{"kind": "quantize", "rate": 0.488, "unbiased": True}]},
    # A client that joins must displace no other, so the cohort's size varies; 50 on average.
    "private": {
        "sampling": "poisson",
        "privacy": {"unit": "client", "noise_multiplier": 1.0, "delta": 1e-4, "clip_norm": 0.4},
    },
    "secure": {"aggregator": "secure"},
}
"""The part behind + -> more settings of fedpress's federate stage."""


@dataclass(frozen=True)
class Size:
    """The sizes of the task: clients, their images, clients in a round, batch, held-out images."""

    clients: int = 1000
    images: int = 50
    cohort: int = 50
    batch: int = 10
    held: int = 1000

    @property
    def trained(self) -> int:
        """Number of images that a round trains on."""
        return self.cohort * self.images


@dataclass(frozen=True)
class Arm:
    """One simulator in one way of running.

    Attributes:
        simulator: a key of `SCRIPTS`.
        engine: how it uses the cores: a name, or for fedpress also the settings of an engine.
        precision: "float32" or "bf16".
        extra: a key of `WITH`.
    """

    simulator: str
    engine: str | dict[str, Any]
    precision: str
    extra: str = ""

    def __str__(self) -> str:
        engine = self.engine if isinstance(self.engine, str) else self.engine["kind"]
        name = f"{self.simulator}/{engine}/{self.precision}"
        return f"{name}+{self.extra}" if self.extra else name

    @classmethod
    def read(cls, name: str) -> Arm:
        """Returns the arm with this name.

        Raises:
            SystemExit: if the name does not have the form NAME/ENGINE/PRECISION[+WITH].
        """
        plain, _, extra = name.partition("+")
        parts = plain.split("/")
        if len(parts) != 3 or parts[0] not in SCRIPTS or extra not in WITH:
            raise SystemExit(
                f"--only: got '{name}', expected NAME/ENGINE/PRECISION with NAME one of "
                f"{', '.join(SCRIPTS)}, and for fedpress +{', +'.join(filter(None, WITH))}"
            )
        return cls(*parts, extra)


@dataclass(frozen=True)
class Bench:
    """Where and how the arms run.

    Attributes:
        arrays: folder of the data as arrays.
        environments: folder of the rivals' environments.
        size: sizes of the task.
        rounds: rounds of a run, with the first, which is not counted.
        threads: number of cores to use.
        timeout: longest time of a run in seconds.
        facts: what is noted with each run, such as the processor.
    """

    arrays: Path
    environments: Path
    size: Size
    rounds: int
    threads: int
    timeout: float
    facts: dict[str, Any] = field(default_factory=dict)

    def run(self, arm: Arm, seed: int) -> dict[str, Any]:
        """Runs an arm once; returns its record, with "error" if it failed."""
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "result.json"
            task = {
                "folder": str(self.arrays),
                "out": str(out),
                "rounds": self.rounds,
                "cohort": self.size.cohort,
                "batch": self.size.batch,
                "lr": 0.1,
                "engine": arm.engine,
                "precision": arm.precision,
                "extra": WITH[arm.extra],
                "threads": self.threads,
                "seed": seed,
            }
            record = {"arm": str(arm), "trained": self.size.trained, **self.facts, **machine_now()}
            path = Path(folder) / "task.json"
            path.write_text(json.dumps({**task, "launched": time.time()}), "utf-8")
            with open(Path(folder) / "told.txt", "w+", encoding="utf-8") as told:
                failed = self._start(arm, path, told)
                told.seek(0)
                if failed or not out.exists():
                    return record | {"error": failed or "no result", "told": told.read()[-2000:]}
            return record | json.loads(out.read_text("utf-8"))

    def _start(self, arm: Arm, task: Path, told: Any) -> str:
        """Runs the program of an arm to its end; returns what went wrong, or an empty text."""
        command = [self.python(arm.simulator)]
        if arm.simulator == "pfl" and arm.engine == "processes":
            command += ["-m", "torch.distributed.run", "--standalone"]
            command += [f"--nproc-per-node={self.threads}"]
        command += [str(HERE / SCRIPTS[arm.simulator]), str(task)]
        # Ray's and Flower's actors import the programs too.
        known = [str(HERE), os.environ.get("PYTHONPATH", "")]
        if arm.simulator == "fedpress":
            known.insert(1, str(HERE.parents[1]))
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, known))}
        # Each program sets its own number of threads.
        environment.pop("OMP_NUM_THREADS", None)
        environment |= {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}
        # Ray's actors have niceness 15 by default and lose to any other process, above all to
        # Flower's own server: its thread that looks for messages keeps a core busy all the time.
        environment["RAY_worker_niceness"] = "0"
        # A session of its own, so that all processes of a simulator end with it.
        process = subprocess.Popen(
            command,
            stdout=told,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=task.parent,
            start_new_session=True,
        )
        try:
            code = process.wait(self.timeout)
        except subprocess.TimeoutExpired:
            return f"it took longer than {self.timeout:g} s"
        finally:
            # Also after an interrupt: a simulator that goes on would disturb what comes next.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return f"exit status {code}" if code else ""

    def python(self, simulator: str) -> str:
        """Returns the interpreter for a simulator.

        Raises:
            SystemExit: if a rival is not installed.
        """
        if simulator not in PINS:
            return sys.executable
        own = self.environments / simulator / "bin" / "python"
        if own.exists():
            return str(own)
        if all(_is_here(pin) for pin in PINS[simulator]):
            return sys.executable
        raise SystemExit(
            f"{simulator} is not in {self.environments}: run {Path(sys.argv[0]).name} --prepare "
            f"--only '{simulator}/*', or leave it out with --only"
        )


def _is_here(pin: str) -> bool:
    """Returns whether this interpreter has exactly the package that `pin` names."""
    name, _, version = pin.partition("==")
    try:
        found = importlib.metadata.version(name.partition("[")[0])
    except importlib.metadata.PackageNotFoundError:
        return False
    # torch's builds for CPUs have a suffix: 2.13.0+cpu.
    return found.partition("+")[0] == version


def prepare(environments: Path, names: Sequence[str]) -> None:
    """Makes the environments of rivals that are not there yet; tells which one fails."""
    for name in names:
        place = environments / name
        pins = "\n".join(PINS[name])
        ready = place / "ready"
        # An environment of other pins is made anew.
        if ready.exists() and ready.read_text("utf-8") == pins:
            print(f"{name}: ready in {place}")
            continue
        shutil.rmtree(place, ignore_errors=True)
        place.parent.mkdir(parents=True, exist_ok=True)
        python = _interpreter(OLDEST_PYTHON.get(name))
        if python is None:
            print(f"{name}: not installed; it needs Python {OLDEST_PYTHON[name]} in the PATH")
            continue
        steps = [[python, "-m", "venv", str(place)]]
        pip = [str(place / "bin" / "python"), "-m", "pip", "install", "--quiet"]
        steps += [[*pip, TORCH], [*pip, *PINS[name]]]
        failed = next((step for step in steps if subprocess.run(step).returncode), None)
        if failed is not None:
            shutil.rmtree(place, ignore_errors=True)
            print(f"{name}: not installed; this failed: {' '.join(failed)}")
            continue
        ready.write_text(pins, "utf-8")
        print(f"{name}: ready in {place}")


def _interpreter(version: str | None) -> str | None:
    """Returns this interpreter, or one of `version` from the PATH if it is given; None: no such."""
    if version is None:
        return sys.executable
    found = shutil.which(f"python{version}")
    # A manager of versions may have a program of that name that only tells how to install it.
    if found is None or subprocess.run([found, "-V"], capture_output=True).returncode:
        return None
    return found


def machine_now() -> dict[str, Any]:
    """Returns the load, and how many cores others keep busy during half a second."""
    facts: dict[str, Any] = {"at": time.strftime("%Y-%m-%d %H:%M:%S")}
    if hasattr(os, "getloadavg"):
        facts["load"] = round(os.getloadavg()[0], 2)
    stat = Path("/proc/stat")
    if stat.exists():
        before = _busy_ticks(stat)
        time.sleep(0.5)
        ticks = os.sysconf("SC_CLK_TCK") * 0.5
        facts["others"] = round((_busy_ticks(stat) - before) / ticks, 2)
    return facts


def _busy_ticks(stat: Path) -> int:
    """Returns the ticks since boot in which a core was neither idle nor waiting for a disk."""
    times = [int(word) for word in stat.read_text("utf-8").split("\n")[0].split()[1:9]]
    return sum(times) - times[3] - times[4]


def processor() -> str:
    """Returns the name of the processor and what it has for matrix products."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return "unknown processor"
    lines = path.read_text("utf-8").splitlines()
    facts = {key.strip(): text.strip() for key, _, text in (line.partition(":") for line in lines)}
    flags = facts.get("flags", "").split()
    known = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]
    return f"{facts.get('model name', 'unknown')} ({', '.join(known)})"


def write_arrays(folder: Path, path: Path | None, size: Size) -> str:
    """Writes the data of the task for all simulators; returns what they are.

    Args:
        folder: where the arrays go.
        path: folder of CIFAR-10; None: made images of ten classes.
        size: sizes of the task.
    """
    rng = np.random.default_rng(0)
    count = size.clients * size.images
    if path is None:
        kind = "made images"
        # Each class has its own coarse pattern, so that a model can learn something.
        patterns = rng.integers(64, 192, (10, 3, 4, 4)).repeat(8, 2).repeat(8, 3)
        labels = rng.integers(0, 10, count + size.held)
        images = np.empty((len(labels), 3, 32, 32), np.uint8)
        for at, label in enumerate(labels):
            images[at] = np.clip(patterns[label] + rng.normal(0, 60, (3, 32, 32)), 0, 255)
        x, y, held_x, held_y = images[:count], labels[:count], images[count:], labels[count:]
    else:
        kind = "CIFAR-10"
        from fedpress.data.cifar10 import read_cifar10
        from fedpress.data.settings import DataSettings

        rows = read_cifar10(DataSettings(source="cifar10", path=path), None)
        assert rows.test is not None
        x, y = rows.train.x.numpy(), rows.train.y.numpy()
        held_x, held_y = rows.test.x.numpy(), rows.test.y.numpy()
    order = rng.permutation(len(x))[:count]
    arrays = {
        "x": x[order],
        "y": y[order],
        "held_x": held_x[: size.held],
        "held_y": held_y[: size.held],
        "clients": np.arange(count).reshape(size.clients, size.images),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        wanted = np.uint8 if name.endswith("x") else np.int64
        np.save(folder / f"{name}.npy", array.astype(wanted))
    return kind


def seconds_of_round(record: dict[str, Any]) -> float:
    """Returns the mean seconds of the rounds of a run, without the first."""
    rounds = record["rounds"]
    return statistics.mean(rounds[1:] or rounds)


def spread(values: Sequence[float], form: str) -> str:
    """Returns the median of `values`, and the smallest and largest of several."""
    text = format(statistics.median(values), form)
    if len(values) == 1:
        return text
    return f"{text} ({min(values):{form}}-{max(values):{form}})"


def table(records: Sequence[dict[str, Any]]) -> str:
    """Returns the results as two Markdown tables: the arms, and fedpress against the others."""
    good = [record for record in records if "error" not in record]
    if not good:
        return "no run has ended"
    by_arm: dict[str, list[dict[str, Any]]] = {}
    for record in good:
        by_arm.setdefault(record["arm"], []).append(record)
    last = good[-1]
    rounds = sorted({len(record["rounds"]) for record in good})
    others = [record["others"] for record in good if "others" in record]
    lines = [
        f"{last['processor']}, {last['threads']} threads of {last['cores']} cores, cores that "
        f"others kept busy before the runs: {spread(others, '.1f') if others else 'unknown'}; "
        f"{last['data']}; rounds of a run: {', '.join(map(str, rounds))}; "
        f"{good[0]['at']} to {last['at']}",
        "",
        "| simulator | runs | s/round | images/s | first round, s | start, s | end, s | accuracy |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for arm, runs in by_arm.items():
        each = [seconds_of_round(run) for run in runs]
        cells = [arm, str(len(runs)), spread(each, ".2f")]
        cells += [
            f"{statistics.median(run['trained'] / s for run, s in zip(runs, each, strict=True)):.0f}"
        ]
        for values in ([run["rounds"][0] for run in runs], [run["start"] for run in runs]):
            cells.append(f"{statistics.median(values):.1f}")
        cells.append(f"{statistics.median(run['end'] for run in runs):.1f}")
        cells.append(f"{statistics.median(run['accuracy'] for run in runs):.1%}")
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *_ratios(by_arm)]
    versions: dict[str, str] = {}
    for record in good:
        versions |= record["versions"]
    lines += ["", ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))]
    for record in records:
        if "error" in record:
            lines.append(f"failed: {record['arm']}: {record['error']}")
    return "\n".join(lines)


def _ratios(by_arm: dict[str, list[dict[str, Any]]]) -> Iterator[str]:
    """Yields the lines of the second table: how many times faster each arm of fedpress is.

    Only runs of the same turn are compared, so that what else the machine does hurts both.
    """
    ours = [arm for arm in by_arm if arm.startswith("fedpress/")]
    if not ours or len(by_arm) < 2:
        return
    yield "Speed of fedpress against each (seconds of the other / seconds of fedpress in a turn):"
    yield ""
    yield f"| against | {' | '.join(ours)} |"
    yield f"| --- |{' --- |' * len(ours)}"
    for arm, runs in by_arm.items():
        other = {run["turn"]: seconds_of_round(run) for run in runs}
        cells = []
        for name in ours:
            mine = {run["turn"]: seconds_of_round(run) for run in by_arm[name]}
            both = [other[turn] / mine[turn] for turn in mine if turn in other]
            cells.append(spread(both, ".2f") if both and name != arm else "-")
        yield f"| {arm} | {' | '.join(cells)} |"


def chosen_arms(args: argparse.Namespace) -> list[Arm]:
    """Returns the arms that the arguments ask for.

    Raises:
        SystemExit: if an argument names none.
    """
    own = []
    for text in args.engines:
        engine = json.loads(text) if text.startswith("{") else text
        own += [Arm("fedpress", engine, precision) for precision in args.precisions]
    arms = [*own, *(Arm.read(name) for name in RIVALS)]
    if not args.only:
        return arms
    chosen = []
    for pattern in args.only:
        found = [arm for arm in arms if fnmatch.fnmatchcase(str(arm), pattern)]
        chosen += found or [Arm.read(pattern)]
    return _distinct(chosen)


def _distinct(arms: Sequence[Arm]) -> list[Arm]:
    """Returns the arms without those of the same name as an earlier one."""
    return list({str(arm): arm for arm in reversed(arms)}.values())[::-1]


def read_log(path: Path) -> list[dict[str, Any]]:
    """Returns the runs that `--log` has written."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def measure(args: argparse.Namespace, arms: Sequence[Arm], bench: Bench) -> list[dict[str, Any]]:
    """Runs all arms in turn, as often as asked; returns the records."""
    records = []
    began = time.time_ns()
    for repeat in range(args.repeats):
        # Every second turn goes backwards, so that no arm always follows the same one.
        for arm in arms if repeat % 2 == 0 else arms[::-1]:
            record = bench.run(arm, args.seed + repeat) | {"turn": f"{began}-{repeat}"}
            if "error" in record:
                print(f"{arm}: {record['error']}\n{record['told']}", file=sys.stderr)
            else:
                print(f"{arm}: {seconds_of_round(record):.2f} s/round", file=sys.stderr)
            records.append(record)
            if args.log is not None:
                with open(args.log, "a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
    return records


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument(
        "--data",
        type=Path,
        default=os.environ.get("FEDPRESS_CIFAR10") or None,
        help="folder of CIFAR-10; default: the variable FEDPRESS_CIFAR10, else made images",
    )
    made.add_argument("--rounds", type=int, default=6, help="rounds of a run; the first is warm-up")
    made.add_argument("--repeats", type=int, default=5, help="number of runs of each simulator")
    made.add_argument("--only", nargs="+", default=[], help="names of simulators; * for anything")
    made.add_argument(
        "--engines", nargs="+", default=["local"], help="fedpress's: names, or settings as JSON"
    )
    made.add_argument(
        "--precisions",
        nargs="+",
        choices=("float32", "bf16"),
        default=["float32"],
        help="fedpress's",
    )
    made.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="cores to use")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--timeout", type=float, default=600, help="seconds that a run may take")
    made.add_argument("--environments", type=Path, default=CACHE, help="folder of the rivals")
    made.add_argument("--prepare", action="store_true", help="install the rivals and stop")
    made.add_argument("--log", type=Path, help="append each run to this file, as JSON")
    made.add_argument("--table", type=Path, help="print the table of such a file and stop")
    made.add_argument("--tiny", action="store_true", help="20 clients of 10 images: shows it runs")
    return made


def main() -> None:
    """Measures and prints."""
    args = parser().parse_args()
    # As an interrupt, so that the simulator that runs is ended too.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    if args.table is not None:
        print(table(read_log(args.table)))
        return
    arms = chosen_arms(args)
    if args.prepare:
        names = dict.fromkeys(arm.simulator for arm in arms if arm.simulator in PINS)
        prepare(args.environments, list(names))
        return
    size = Size(clients=20, images=10, cohort=4, batch=5, held=50) if args.tiny else Size()
    with tempfile.TemporaryDirectory() as folder:
        kind = write_arrays(Path(folder), args.data, size)
        facts = {"processor": processor(), "threads": args.threads, "cores": os.cpu_count()}
        bench = Bench(
            Path(folder),
            args.environments,
            size,
            args.rounds,
            args.threads,
            args.timeout,
            {**facts, "data": kind},
        )
        records = measure(args, arms, bench)
    print(table(records))
    if any("error" in record for record in records):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
