"""A client whose local training is an ExecuTorch program: the same messages, no autograd and no model code."""

from __future__ import annotations

import math

from torch import Tensor, nn

from fedpress.core.inputs import NamedInputs
from fedpress.deploy.device_model import DeviceModel
from fedpress.errors import DivergedError, RecipeError
from fedpress.federation.local import (
    LocalWork,
    Outcome,
    Step,
    Steps,
    shuffled_batches,
    too_large,
)


def device_steps(model: nn.Module, work: LocalWork) -> Steps:
    """Does what `plain_steps` does, over the same batches in the same order, in the runtime of a device.

    Give it to `ClientPlan.bind(..., source=device_steps)` for a client whose model is
    `DeviceModel(program)`. Batches larger than the program's are added up from several runs,
    smaller ones are filled up with examples of weight 0: the step is the same.

    Raises:
        RecipeError: if `model` is no `DeviceModel`, the settings ask for another precision than
            float32, or the examples have several inputs.
        DivergedError: if the loss is not finite.
    """
    if not isinstance(model, DeviceModel):
        raise RecipeError(
            "device_steps trains an ExecuTorch program",
            place="model",
            cure="give the client model = deploy.DeviceModel(path)",
        )
    if isinstance(work.arrays.x, NamedInputs):
        raise RecipeError(
            "the program of a device takes one float32 tensor, and these examples have several inputs",
            place="source",
            cure="leave source out, so that this client trains in torch",
        )
    s = work.plan.settings
    shuffle, chance = work.key.client_stream("shuffle"), work.key.client_stream("prepare")
    if s.precision == "bf16":
        raise RecipeError(
            f"devices train in float32, got {s.precision!r}",
            place="precision",
            cure="set 'float32'",
        )
    optimizer = model.optimizer(work.lr, momentum=s.momentum, weight_decay=s.weight_decay)
    params = dict(model.named_parameters())
    total, steps = 0.0, 0
    for _ in range(s.epochs):
        for index in shuffled_batches(model, len(work.arrays), s.batch_size, shuffle):
            batch = work.arrays.take(index)
            x = work.plan.prepare(batch.x, chance)
            assert isinstance(x, Tensor)
            loss, found = model.mean_gradient(x, batch.y)
            # Of its own memory: the runtime's may be read only, and a correction is written in
            # place.
            gradients = {name: found[name].clone() for name in params}
            yield Step([p.detach() for p in params.values()], [*gradients.values()])
            optimizer.step(gradients)
            total, steps = total + float(loss), steps + 1
            if not math.isfinite(total):
                raise DivergedError(
                    f"after {steps} steps the loss is not finite in round {work.key.round}",
                    place="local update",
                    cure=f"lower {too_large(s, work.lr, penalties=work.plan.penalties)}",
                )
    return Outcome({"loss": total / steps, "steps": steps})
