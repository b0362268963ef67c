"""Flower's client: trains one client for one round, in an actor of Ray.

A file of its own, so that actors import it. Ray would copy functions of the main program anew for
each message, and the data that they keep with them.
"""

from __future__ import annotations

import json
import os
from functools import cache

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from plain import as_dense, network, one_epoch
from shared import Task, load
from torch import Tensor, nn

# The actors get the task through their environment, which they inherit.
TASK = "SIMULATION_TASK"
app = ClientApp()


@cache
def _actor() -> tuple[Task, Tensor, Tensor, Tensor, nn.Module]:
    """Returns task, images, classes, clients and network, made once in each actor."""
    task = Task(**json.loads(os.environ[TASK]))
    torch.set_num_threads(1)
    data = load(task.folder)
    return task, as_dense(data.x, task), data.y, data.clients, network(task)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Trains one client for one round."""
    task, x, y, clients, model = _actor()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    rows = clients[int(context.node_config["partition-id"])]
    one_epoch(model, x, y, rows, task)
    content = {
        "arrays": ArrayRecord(model.state_dict()),
        "metrics": MetricRecord({"num-examples": len(rows)}),
    }
    return Message(content=RecordDict(content), reply_to=message)
