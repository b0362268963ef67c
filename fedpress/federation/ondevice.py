"""A client whose local training is an ExecuTorch program: the same messages, no autograd and no model code."""

from __future__ import annotations

import math

from torch import nn

from fedpress.deploy.ondevice import DeviceModel
from fedpress.errors import DivergedError, RecipeError
from fedpress.federation.local import Task, shuffled_batches
from fedpress.wire.message import JSON


def device_sgd(model: nn.Module, task: Task) -> dict[str, JSON]:
    """Does what `sgd` does, over the same batches in the same order, in the runtime of a device.

    Give it to `Client(model=DeviceModel(program), local_update=device_sgd, ...)`. Batches larger than the program's are
    added up from several runs, smaller ones are filled up with examples of weight 0: the step is the same.

    Raises:
        RecipeError: if `model` is no `DeviceModel`, or the settings ask for another precision than float32.
        DivergedError: if the loss is not finite.
    """
    if not isinstance(model, DeviceModel):
        raise RecipeError(
            "federate: device_sgd trains an ExecuTorch program; give the client model = deploy.DeviceModel(path)"
        )
    s, shuffle, chance = (
        task.settings,
        task.key.client_stream("shuffle"),
        task.key.client_stream("prepare"),
    )
    if s.precision == "bf16":
        raise RecipeError(
            f"federate.precision: devices train in float32, got {s.precision!r}; set 'float32'"
        )
    optimizer = model.optimizer(task.lr, momentum=s.momentum, weight_decay=s.weight_decay)
    params = dict(model.named_parameters())
    anchor = {name: p.detach().clone() for name, p in params.items()} if s.proximal_mu else {}
    total, steps = 0.0, 0
    for _ in range(s.epochs):
        for index in shuffled_batches(model, len(task.arrays), s.batch_size, shuffle):
            batch = task.arrays.take(index)
            loss, gradients = model.mean_gradient(task.prepare(batch.x, chance), batch.y)
            for name, start in anchor.items():
                gradients[name] = gradients[name] + s.proximal_mu * (params[name].detach() - start)
            optimizer.step(gradients)
            total, steps = total + float(loss), steps + 1
            if not math.isfinite(total):
                raise DivergedError(
                    f"local update: after {steps} steps the loss is not finite in round {task.key.round}; "
                    f"lower federate.lr (now {task.lr:g})"
                )
    return {"loss": total / steps, "steps": steps}
