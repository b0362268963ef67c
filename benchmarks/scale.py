"""Many clients on one machine: seconds to start, memory, and what a round costs beside training.

    python benchmarks/scale.py --registered 10000 --cohort 1000 --rounds 4

With `--state` each client keeps what its coded update left out, on the disk: 6.5 MB.

All clients take no step at all, so the time of a round is what fedpress adds: the model to the
client, the update back, checks, norm and sum in float64. The network has as many parameters as
that of pfl-research's CIFAR-10 benchmark. Memory is the largest resident size of the run's process
and of its workers together, shared pages counted once (proportional set size).

Printed beside it is what the arithmetic alone takes on one thread, in the same run: one copy of
the parameters, one subtraction, one norm and one addition in float64.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import threading
import time
from pathlib import Path

import torch

import fedpress
from fedpress.core.examples import Arrays, Preprocess
from fedpress.federation import local
from fedpress.federation.sources import GRADIENT_SOURCES
from fedpress.transport.processes.settings import cores

PARAMETERS = 1_626_442
"""Parameters of the CNN of pfl-research's CIFAR-10 benchmark."""
INPUTS = 200


def without_steps(model, work):
    """A client's local training that takes no step; see `fedpress.federation.local.plain_steps`."""
    yield from ()
    return local.Outcome({"loss": 0.0, "steps": 0})


def data_of(registered: int) -> fedpress.FederatedData:
    """Returns a data set of clients with one example each."""
    x = torch.zeros(registered, INPUTS)
    y = torch.arange(registered) % 10
    clients = {f"c{at}": Arrays(x[at : at + 1], y[at : at + 1]) for at in range(registered)}
    held = Arrays(torch.zeros(20, INPUTS), torch.arange(20) % 10)
    names = tuple(map(str, range(10)))
    return fedpress.FederatedData(
        "scale",
        clients,
        public=held,
        validation=held,
        test=held,
        num_classes=10,
        class_names=names,
        preprocess=Preprocess((0.0,), (1.0,)),
    )


def recipe(args: argparse.Namespace) -> dict[str, object]:
    """Returns the recipe of the run."""
    hidden = round((PARAMETERS - 10) / (INPUTS + 11))
    stage = {
        "kind": "federate",
        "num_rounds": args.rounds,
        "cohort": args.cohort,
        "scored_clients": 0,
        "weights": "equal",
    }
    if args.state:
        stage |= {"uplink": [{"kind": "topk", "density": 0.01}], "error_feedback": True}
    model = {"architecture": "mlp", "arguments": {"in_features": INPUTS, "hidden": [hidden]}}
    return {"name": "scale", "data": {"source": "digits"}, "model": model, "stage": [stage]}


class Memory(threading.Thread):
    """Measures the memory of this process and its children until `stop` is set."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.stop = threading.Event()
        self.largest = 0

    def run(self) -> None:
        """Measures ten times a second."""
        while not self.stop.wait(0.1):
            self.largest = max(self.largest, family_bytes())


def family_bytes() -> int:
    """Returns the proportional set size of this process and its children, in bytes."""
    own = os.getpid()
    total = 0
    for process in [str(own), *children(own)]:
        try:
            text = Path(f"/proc/{process}/smaps_rollup").read_text()
        # The process has ended meanwhile.
        except OSError:
            continue
        line = next(line for line in text.splitlines() if line.startswith("Pss:"))
        total += 1024 * int(line.split()[1])
    return total


def children(parent: int) -> list[str]:
    """Returns the ids of the child processes of `parent`."""
    return Path(f"/proc/{parent}/task/{parent}/children").read_text().split()


def arithmetic(repeats: int = 50) -> float:
    """Returns the milliseconds of the arithmetic that no implementation can leave out."""
    torch.set_num_threads(1)
    start, total = torch.randn(PARAMETERS), torch.zeros(PARAMETERS, dtype=torch.float64)
    model = torch.empty_like(start)
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        model.copy_(start)
        update = model - start
        torch.dot(update, update)
        total.add_(update)
        times.append(time.perf_counter() - began)
    return 1e3 * statistics.median(times)


def main() -> None:
    """Runs the recipe, and prints a line for each number."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--registered", type=int, default=10_000)
    parser.add_argument("--cohort", type=int, default=1_000)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--engine", default="processes")
    parser.add_argument(
        "--state", action="store_true", help="clients keep a residual of the model's size"
    )
    args = parser.parse_args()

    GRADIENT_SOURCES["plain"] = without_steps
    alone = arithmetic()
    torch.set_num_threads(cores())
    data = data_of(args.registered)
    memory = Memory()
    memory.start()
    began = time.perf_counter()
    first = None
    with tempfile.TemporaryDirectory() as folder:
        run = fedpress.Run.begin(recipe(args), data=data, out=f"{folder}/run", engine=args.engine)
        for event in run.events():
            if first is None and isinstance(event, fedpress.Tick):
                first = time.perf_counter() - began
        seconds = [record["seconds"] for record in run.records]
    memory.stop.set()
    memory.join()
    each = [1e3 * value / args.cohort for value in seconds[1:] or seconds]
    print(
        f"{args.registered} clients, {args.cohort} a round, {PARAMETERS} parameters, {cores()} cores"
    )
    print(f"first round begins after {first:.1f} s")
    print(f"a client costs {statistics.median(each):.2f} ms ({min(each):.2f} to {max(each):.2f})")
    print(f"its arithmetic alone on one thread: {alone:.2f} ms")
    print(f"memory: {memory.largest / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
