"""Flower: its simulation in Ray actors, one for each core, with its own FedAvg.

Flower's node for a client lives in an actor that serves many clients. The data are read once in
each actor, and the network is built once there.
"""

from __future__ import annotations

import json
import os

import flower_client
import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from shared import Clock, Task, accuracy, cnn, load, normalised


def server(task: Task, clock: Clock, shares: list[float]) -> ServerApp:
    """Returns the server, which appends the accuracy after each round to `shares`."""
    app = ServerApp()
    data = load(task.folder)
    held, labels = normalised(data.held_x), data.held_y
    model = cnn()

    def evaluate(number: int, arrays: ArrayRecord) -> MetricRecord:
        # Round 0 is the evaluation before the first round, which no other simulator makes.
        if number:
            model.load_state_dict(arrays.to_torch_state_dict())
            shares.append(accuracy(model, held, labels, task.dtype))
        clock.lap()
        return MetricRecord({"accuracy": shares[-1] if shares else 0.0})

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = FedAvg(
            fraction_train=task.cohort / len(data.clients),
            fraction_evaluate=0.0,
            min_available_nodes=len(data.clients),
        )
        strategy.start(
            grid, ArrayRecord(model.state_dict()), num_rounds=task.rounds, evaluate_fn=evaluate
        )

    return app


def main() -> None:
    """Runs the simulation."""
    task = Task.read()
    clock = Clock(task)
    torch.set_num_threads(task.threads)
    os.environ[flower_client.TASK] = json.dumps(task.__dict__)
    shares: list[float] = []
    run_simulation(
        server(task, clock, shares),
        flower_client.app,
        num_supernodes=len(load(task.folder).clients),
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"num_cpus": task.threads, "include_dashboard": False},
        },
    )
    clock.write(shares[-1], ["flwr", "ray"])


if __name__ == "__main__":
    main()
