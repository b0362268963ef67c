"""The parameters of a training program in the runtime that phones have, as an ordinary model.

They lie in the runtime's memory: what is written to them is what the program computes with.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedpress.deploy.capture import require, silence
from fedpress.deploy.device import hush, said
from fedpress.deploy.executorch import INSTALL, WORDS, refused_kernel
from fedpress.errors import DataError, ExportError
from fedpress.nn.quantized import is_qparam
from fedpress.tasks import Classification, of_model

RUNTIME = "executorch.extension.training"
NET = "net."
"""What the names of a program's parameters begin with: it holds the model in the attribute `net`."""


class DeviceModel(nn.Module):
    """The parameters of a training program, under the names of the model that it was made of.

    They are views of the runtime's memory: an ordinary model to whoever reads or overwrites parameters, such as
    `core.parameters` and a federated client. It has no forward of its own; `loss` and `backward` run the program.
    """

    def __init__(self, program: bytes | str | Path) -> None:
        """Loads a file or its bytes.

        Raises:
            ExportError: if it is damaged, or is no program that trains.
        """
        super().__init__()
        self._data = data = (
            program if isinstance(program, bytes) else _read(program)
        )  # the runtime reads it in place
        with silence(), hush() as printed:
            self._library = require(RUNTIME, install=INSTALL)[RUNTIME]
            try:
                self._module = self._library._load_for_executorch_for_training_from_buffer(data)
                self.words: dict[str, str] = json.loads(self._module.model.run_method(WORDS, ())[0])
                self.batch_size = int(self.words["batch_size"])
                self.input_shape = tuple(json.loads(self.words["input_shape"]))
                names = json.loads(self.words["parameters"])
                self.task = of_model(json.loads(self.words.get("task", "{}")), ())
                nothing = torch.zeros(0, *self.input_shape), self._no_targets(0)
                _, outputs = self._run(*self._padded(*nothing, 1))
                self.outputs = outputs.shape[1]
                if not self.task.names:  # a file of version 0.1.0, which does not name its classes
                    self.task = Classification(tuple(map(str, range(self.outputs))))
            except (RuntimeError, KeyError, ValueError) as error:
                if refused := refused_kernel(printed()):
                    raise ExportError(
                        f"ExecuTorch has {refused}", place="program", cure="replace it"
                    ) from error
                reason = "it has no batch size" if isinstance(error, KeyError) else said(error)
                raise ExportError(
                    f"this is no program that trains: {reason}",
                    place="program",
                    cure="write one with export_training",
                ) from error
        held = self._module.named_parameters()
        for name in names:
            if NET + name not in held:
                raise ExportError(
                    f"this program does not hold parameter {name!r}",
                    place="program",
                    cure="write it again",
                )
            owner: nn.Module = self
            *parts, key = name.split(".")
            for part in parts:
                if part not in owner._modules:
                    owner.add_module(part, nn.Module())
                owner = owner._modules[part]  # type: ignore[assignment]
            owner.register_parameter(key, nn.Parameter(held[NET + name]))

    def __deepcopy__(self, memo: dict[int, object]) -> DeviceModel:
        """Loads the program again, in memory of its own, with the parameters as they are now."""
        twin = memo[id(self)] = type(self)(self._data)
        twin.load_state_dict(self.state_dict())
        for mine, other in zip(self.parameters(), twin.parameters(), strict=True):
            other.requires_grad_(mine.requires_grad)
        return twin

    def backward(self, x: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Runs the program once.

        Args:
            x: float32 [batch_size, *input_shape].
            y: targets of the task: int64 [batch_size] where they are classes, else float32 [batch_size, k], or
                [batch_size] where k is 1.
            weights: float32 [batch_size], 0 where an example only fills the batch.

        Returns:
            The weighted sum of losses, and outputs [batch_size, k]; `gradients` has the gradients of the sum.

        Raises:
            ExportError: if the shapes are others, or a target is none of the task.
        """
        wanted = (self.batch_size, *self.input_shape)
        if tuple(x.shape) != wanted or {len(y), *weights.shape} != {self.batch_size}:
            raise ExportError(
                (
                    f"the program takes examples {list(wanted)}, and as many targets and weights, "
                    f"got {list(x.shape)}, {list(y.shape)} and {list(weights.shape)}"
                ),
                place="x",
                cure="fill the batch up with weights of 0",
            )
        return self._run(x, self._checked(y), weights)

    def _checked(self, y: Tensor) -> Tensor:
        """Returns targets [batch_size, ...] in the shape that the program takes; refuses those of another task."""
        try:
            self.task.check_targets(y)
        except DataError as error:
            raise ExportError(error.problem, place="y", cure=error.cure) from error
        return y.reshape(self._no_targets(len(y)).shape)

    def _no_targets(self, n: int) -> Tensor:
        """Returns zeros as `n` targets, in the type and shape of the program's own."""
        if self.task.targets == "classes":
            return torch.zeros(n, dtype=torch.int64)
        return torch.zeros(n, self.task.outputs)

    def _run(self, x: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        given = [
            x.to(torch.float32).contiguous(),
            y.contiguous(),
            weights.contiguous(),
        ]
        loss, outputs = self._module.forward_backward("forward", given)
        return loss, outputs

    def gradients(self) -> dict[str, Tensor]:
        """Returns the gradients of the last run by parameter name."""
        return {name.removeprefix(NET): g for name, g in self._module.named_gradients().items()}

    def mean_gradient(self, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the mean loss over a batch [n, ...] of any size and its gradients, added up over runs of the program.

        Raises:
            ExportError: if examples have another shape or are not as many as targets, are none, or a target is none of
                the task.
        """
        if not len(x) or len(x) != len(y):
            raise ExportError(
                f"got {len(x)} examples and {len(y)} targets",
                place="y",
                cure="give one target each, and at least one",
            )
        total, gradients = torch.zeros(()), dict[str, Tensor]()
        for part in self._parts(x, y):
            loss, _ = self.backward(*part)
            total = total + loss
            for name, gradient in self.gradients().items():
                gradients[name] = gradients[name] + gradient if name in gradients else gradient
        return total, gradients

    def logits(self, x: Tensor) -> Tensor:
        """Returns the outputs [n, k] of examples [n, *input_shape]: logits, or whatever the task makes of them."""
        if not len(x):
            return torch.zeros(0, self.outputs)
        found = [self.backward(*part)[1] for part in self._parts(x, self._no_targets(len(x)))]
        return torch.cat(found)[: len(x)]

    def optimizer(
        self, lr: float, *, momentum: float = 0.0, weight_decay: float = 0.0
    ) -> DeviceSGD:
        """Returns ExecuTorch's own SGD over the parameters."""
        held = self._module.named_parameters()
        steps = {
            name: p for name, p in held.items() if is_qparam(name)
        }  # step sizes get no decay, as in `sgd`
        groups = [
            ({name: p for name, p in held.items() if name not in steps}, weight_decay),
            (steps, 0.0),
        ]
        made = [
            (set(some), self._library.get_sgd_optimizer(some, lr, momentum, 0, decay))
            for some, decay in groups
            if some
        ]
        return DeviceSGD(made)

    def _parts(self, x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for part, targets in zip(x.split(self.batch_size), y.split(self.batch_size), strict=True):
            yield self._padded(part, targets, len(x))

    def _padded(self, x: Tensor, y: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """Fills a part of a batch of `n` up with zeros of weight 0."""
        lacks = self.batch_size - len(x)
        weights = torch.cat([torch.full((len(x),), 1 / n), torch.zeros(lacks)])
        return (
            torch.cat([x, x.new_zeros(lacks, *x.shape[1:])]),
            torch.cat([y, y.new_zeros(lacks, *y.shape[1:])]),
            weights,
        )


class DeviceSGD:
    """SGD with momentum and weight decay that runs in ExecuTorch."""

    def __init__(self, groups: Sequence[tuple[Collection[str], Any]]) -> None:
        """Takes the runtime's own objects, each with the names of the parameters that it moves."""
        self._groups = groups

    def step(self, gradients: Mapping[str, Tensor]) -> None:
        """Changes the parameters by their `gradients`, given by name."""
        given = {NET + name: gradient.contiguous() for name, gradient in gradients.items()}
        for names, runtime in self._groups:
            runtime.step({name: gradient for name, gradient in given.items() if name in names})


def _read(path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ExportError(
            f"cannot read {path}: {error.strerror}",
            place="program",
            cure="write it with export_training",
        ) from error
