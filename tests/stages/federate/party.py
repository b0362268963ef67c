"""One party of a federate stage in a process of its own: the server, or a client that has only its own examples.

`python party.py server FOLDER NAME...` or `python party.py client FOLDER NAME`. FOLDER holds the recipes, the model, a
socket, and for each client a file of its examples, which that client removes as soon as it has read it.
"""

import gc
import json
import os
import sys
import time
from multiprocessing.connection import Client, Connection, Listener, wait
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from fedpress.core import parameters
from fedpress.core.examples import Arrays, Preprocess
from fedpress.federation import InMemoryState, Start, Traffic
from fedpress.federation.exchange import error
from fedpress.models import load_model
from fedpress.pipeline import recipe as recipes
from fedpress.stages.federate.client import ClientSide
from fedpress.stages.federate.contract import CommonInputs
from fedpress.stages.federate.server import ServerSide
from fedpress.tasks import Classification
from fedpress.wire import pack, unpack


class Lines:
    """A transport over one connection to each client, which answers its requests in order."""

    def __init__(self, lines: dict[str, Connection]) -> None:
        self.lines, self.traffic = lines, Traffic()
        self.asked: dict[str, list[int]] = {name: [] for name in lines}
        self.came: dict[int, tuple] = {}
        self.number = 0

    def clients(self):
        return list(self.lines)

    def send(self, client, message):
        data = pack(message)
        self.traffic += Traffic(down=len(data))
        self.lines[client].send_bytes(data)
        self.number += 1
        self.asked[client].append(self.number)
        return self.number

    def receive(self, requests, timeout=None):
        while not (found := sorted(self.came.keys() & set(requests))):
            ready = wait([self.lines[name] for name, open in self.asked.items() if open], timeout)
            if not ready:
                return None
            for name, line in self.lines.items():
                if line in ready:
                    data = line.recv_bytes()
                    self.traffic += Traffic(up=len(data))
                    request = self.asked[name].pop(0)
                    self.came[request] = name, request, unpack(data)
        return self.came.pop(found[0])

    def cancel(self, requests):
        for request in requests:
            self.came.pop(request, None)


def cases(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.toml"))


def common(folder: Path, case: Path) -> CommonInputs:
    recipe = recipes.load(case.read_text("utf-8"))
    spec, model = load_model(folder / "model")
    return CommonInputs.of(
        recipe.stage[0],
        spec,
        model,
        preprocess=Preprocess(spec.mean, spec.std),
        task=Classification(spec.class_names),
        seed=recipe.seed,
    )


def serve(folder: Path, names: list[str]) -> None:
    with Listener(str(folder / "socket"), "AF_UNIX") as listener:
        for case in cases(folder):
            came = [listener.accept() for _ in names]
            lines = {line.recv_bytes().decode(): line for line in came}
            transport = Lines({name: lines[name] for name in names})
            server = ServerSide.bind(common(folder, case), transport)
            start = parameters.flatten(server.model)
            records = list(server.rounds(Start(start)))
            population = server.population
            told = {
                "refused": [record.refused for record in records],
                "examples": None if population.examples is None else dict(population.counts),
                "accuracy": server.client_scores(records[-1].params),
                "examples in this process": sum(
                    len(one) for one in gc.get_objects() if isinstance(one, Arrays)
                ),
                "modules": sorted(name for name in sys.modules if name.startswith("fedpress.data")),
            }
            save_file({"params": records[-1].params}, case.with_suffix(".params"))
            case.with_suffix(".json").write_text(json.dumps(told))
            for line in came:
                line.close()


def answer(folder: Path, name: str) -> None:
    own = folder / f"{name}.examples"
    arrays = Arrays(**load_file(own))
    own.unlink()  # nobody else can read it any more
    for case in cases(folder):
        half = ClientSide(name, arrays, common(folder, case), InMemoryState())
        with connected(folder / "socket") as line:
            line.send_bytes(name.encode())
            while True:
                try:
                    request = line.recv_bytes()
                except EOFError:
                    break
                try:
                    reply = half.handle(request)
                except Exception as problem:  # as the transport of one process does
                    reply = pack(error(f"{type(problem).__name__}: {problem}"))
                line.send_bytes(reply)


def connected(path: Path) -> Connection:
    """Waits until the server listens."""
    for _ in range(600):
        try:
            return Client(str(path), "AF_UNIX")
        except (FileNotFoundError, ConnectionRefusedError):
            time.sleep(0.1)
    raise TimeoutError(f"no server at {path}")


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    role, place, *who = sys.argv[1:]
    if role == "server":
        serve(Path(place), who)
    else:
        answer(Path(place), who[0])
