"""Local training on a device: an ExecuTorch program computes the gradients instead of torch."""

from __future__ import annotations

import math

from torch import Tensor, nn

from fedpress.core.inputs import NamedInputs
from fedpress.deploy.device_model import DeviceModel
from fedpress.errors import DivergedError, RecipeError
from fedpress.federation.local import (
    LocalSettings,
    LocalWork,
    Outcome,
    Step,
    Steps,
    check_is_sgd,
    shuffled_batches,
    too_large,
)


def device_steps(model: nn.Module, work: LocalWork) -> Steps:
    """Trains like `plain_steps`, but with the gradients of an ExecuTorch program.

    Pass this function as `ClientPlan.bind(..., source=device_steps)` for a client whose model is
    `DeviceModel(program)`. Batches and their order are the same as in torch. A program has a fixed
    batch size: a larger batch is computed in several runs, and a smaller batch is padded with
    examples of weight 0.

    Args:
        model: the `DeviceModel`.
        work: the client's work in this round.

    Yields:
        Each step after its gradient is computed.

    Raises:
        RecipeError: if `model` is not a `DeviceModel`, if the settings ask for bf16 or another
            optimizer than SGD, or if the examples have several inputs.
        DivergedError: if the loss is not finite.
    """
    settings = work.plan.settings
    device = _device_model(model, work, settings)
    shuffle = work.key.client_stream("shuffle")
    chance = work.key.client_stream("prepare")
    optimizer = device.optimizer(
        work.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
    )
    params = dict(device.named_parameters())
    total = 0.0
    steps = 0
    for _ in range(settings.epochs):
        for index in shuffled_batches(device, len(work.arrays), settings.batch_size, shuffle):
            batch = work.arrays.take(index)
            x = work.plan.prepare(batch.x, chance)
            # `_device_model` has refused examples with several inputs.
            assert isinstance(x, Tensor)
            loss, found = device.mean_gradient(x, batch.y)
            # Cloned, because algorithms change gradients in place, and the runtime's memory may be
            # read-only.
            gradients = {name: found[name].clone() for name in params}
            # The caller may change the gradients before the optimizer uses them.
            yield Step([p.detach() for p in params.values()], [*gradients.values()])
            optimizer.step(gradients)
            total += float(loss)
            steps += 1
            if not math.isfinite(total):
                raise DivergedError(
                    f"after {steps} steps the loss is not finite in round {work.key.round}",
                    place="local update",
                    cure=f"lower {too_large(settings, work.lr, penalties=work.plan.penalties)}",
                )
    return Outcome({"loss": total / steps, "steps": steps})


def _device_model(model: nn.Module, work: LocalWork, settings: LocalSettings) -> DeviceModel:
    """Returns `model` after checking that its program can train with these settings.

    Raises:
        RecipeError: if the program cannot, or if `model` is not a `DeviceModel`.
    """
    if not isinstance(model, DeviceModel):
        raise RecipeError(
            "device_steps trains an ExecuTorch program",
            place="model",
            cure="give the client model = deploy.DeviceModel(path)",
        )
    if isinstance(work.arrays.x, NamedInputs):
        raise RecipeError(
            "a device's program has one float32 tensor as input, and these examples have several "
            "inputs",
            place="source",
            cure="leave source out, so that this client trains in torch",
        )
    check_is_sgd(settings, "a device's runtime has no other optimizer than SGD")
    if settings.precision == "bf16":
        raise RecipeError(
            f"devices train in float32, got {settings.precision!r}",
            place="precision",
            cure="set 'float32'",
        )
    return model
