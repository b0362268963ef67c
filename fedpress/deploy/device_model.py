"""Loads a program that trains (see `ondevice`) into ExecuTorch, and makes it a torch module.

The parameters of the module share memory with the runtime. So the program uses every value that is
written to them.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedpress.deploy.capture import require, silence
from fedpress.deploy.device import captured_output, first_line
from fedpress.deploy.executorch import INSTALL, METADATA, refused_kernel
from fedpress.errors import DataError, ExportError
from fedpress.nn.quantized import is_qparam
from fedpress.tasks import Classification, of_model

# Python module of ExecuTorch that runs programs that train.
RUNTIME = "executorch.extension.training"
NET = "net."
"""Prefix of all parameter names in a program (the attribute `net` of `ondevice._Trained`)."""


class DeviceModel(nn.Module):
    """The parameters of a training program, under the names of the model that it was made from.

    Code that reads or overwrites parameters (`core.parameters`, a federated client) can use it like
    any other module. It has no forward; `backward`, `mean_gradient` and `logits` run the program.

    Attributes:
        metadata: the entries that are stored in the file.
        batch_size: number of examples in one run of the program.
        input_shape: shape of one example.
        task: the task whose loss the program computes.
        outputs: number of outputs for one example.
    """

    def __init__(self, program: bytes | str | Path) -> None:
        """Loads a program.

        Args:
            program: the path of a file, or the bytes of the file.

        Raises:
            ExportError: if the file is missing or damaged, or is not a training program.
        """
        super().__init__()
        data = program if isinstance(program, bytes) else _read_file(program)
        # The runtime reads the bytes in place, so they must live as long as this object.
        self._data = data
        with silence(), captured_output() as printed:
            self._library = require(RUNTIME, install=INSTALL)[RUNTIME]
            try:
                self._module = self._library._load_for_executorch_for_training_from_buffer(data)
                self.metadata: dict[str, str] = json.loads(
                    self._module.model.run_method(METADATA, ())[0]
                )
                self.batch_size = int(self.metadata["batch_size"])
                self.input_shape = tuple(json.loads(self.metadata["input_shape"]))
                names = json.loads(self.metadata["parameters"])
                self.task = of_model(json.loads(self.metadata.get("task", "{}")), ())
                # The number of outputs is not stored in the file, so the program is run once.
                empty = torch.zeros(0, *self.input_shape), self._zero_targets(0)
                _, outputs = self._run(*self._padded(*empty, 1))
                self.outputs = outputs.shape[1]
                # Files of version 0.1.0 do not name their classes.
                if not self.task.names:
                    self.task = Classification(tuple(map(str, range(self.outputs))))
            except (RuntimeError, KeyError, ValueError) as error:
                if refused := refused_kernel(printed()):
                    raise ExportError(
                        f"ExecuTorch has {refused}", place="program", cure="replace it"
                    ) from error
                reason = (
                    "it has no batch size" if isinstance(error, KeyError) else first_line(error)
                )
                raise ExportError(
                    f"this is not a training program: {reason}",
                    place="program",
                    cure="write one with export_training",
                ) from error
        self._add_parameters(names)

    def _add_parameters(self, names: Sequence[str]) -> None:
        """Registers the runtime's parameters under dotted `names`, in nested modules."""
        in_runtime = self._module.named_parameters()
        for name in names:
            if NET + name not in in_runtime:
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
            owner.register_parameter(key, nn.Parameter(in_runtime[NET + name]))

    def __deepcopy__(self, memo: dict[int, object]) -> DeviceModel:
        """Loads the program a second time and copies the current parameters into it."""
        # Copied tensors alone would belong to no program.
        twin = type(self)(self._data)
        memo[id(self)] = twin
        twin.load_state_dict(self.state_dict())
        for mine, other in zip(self.parameters(), twin.parameters(), strict=True):
            other.requires_grad_(mine.requires_grad)
        return twin

    def backward(self, x: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Runs the program once.

        Args:
            x: float32 [batch_size, *input_shape].
            y: targets of the task: int64 [batch_size] for classes, else float32 [batch_size, k], or
                [batch_size] if k is 1.
            weights: weight of each example in the sum, float32 [batch_size]; 0 for padding.

        Returns:
            The weighted sum of losses, and outputs [batch_size, k]. Afterwards `gradients` returns
            the gradients of this sum.

        Raises:
            ExportError: if a shape does not fit, or a target is invalid for the task.
        """
        # The shapes are fixed in the program, and a wrong shape could crash the runtime.
        wanted = (self.batch_size, *self.input_shape)
        if tuple(x.shape) != wanted or {len(y), *weights.shape} != {self.batch_size}:
            raise ExportError(
                (
                    f"the program takes examples {list(wanted)}, and as many targets and weights, "
                    f"got {list(x.shape)}, {list(y.shape)} and {list(weights.shape)}"
                ),
                place="x",
                cure="pad the batch with examples of weight 0",
            )
        return self._run(x, self._checked(y), weights)

    def _checked(self, y: Tensor) -> Tensor:
        """Checks targets [batch_size, ...] and returns them in the program's shape.

        Raises:
            ExportError: if the targets are invalid for the task.
        """
        try:
            self.task.check_targets(y)
        except DataError as error:
            raise ExportError(error.problem, place="y", cure=error.cure) from error
        return y.reshape(self._zero_targets(len(y)).shape)

    def _zero_targets(self, n: int) -> Tensor:
        """Returns `n` targets of zeros, in dtype and shape as the program takes them."""
        return self.task.example_targets(torch.zeros(n, self.task.outputs))

    def _run(self, x: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        arguments = [x.to(torch.float32).contiguous(), y.contiguous(), weights.contiguous()]
        loss, outputs = self._module.forward_backward("forward", arguments)
        return loss, outputs

    def gradients(self) -> dict[str, Tensor]:
        """Returns the gradients of the last run by parameter name."""
        return {name.removeprefix(NET): g for name, g in self._module.named_gradients().items()}

    def mean_gradient(self, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the mean loss over a batch [n, ...] of any size, and its gradients by name.

        The program runs on `batch_size` examples at a time, each with weight 1 / n. Loss and
        gradients are summed over the runs.

        Raises:
            ExportError: if there is no example, the numbers of examples and targets differ, or
                examples or targets do not fit.
        """
        if not len(x) or len(x) != len(y):
            raise ExportError(
                f"got {len(x)} examples and {len(y)} targets",
                place="y",
                cure="give at least one example, and one target for each",
            )
        total = torch.zeros(())
        gradients: dict[str, Tensor] = {}
        for part in self._parts(x, y):
            loss, _ = self.backward(*part)
            total = total + loss
            for name, gradient in self.gradients().items():
                if name in gradients:
                    gradient = gradients[name] + gradient
                gradients[name] = gradient
        return total, gradients

    def logits(self, x: Tensor) -> Tensor:
        """Returns the model's outputs [n, k] for examples [n, *input_shape]."""
        if not len(x):
            return torch.zeros(0, self.outputs)
        # The program's only method also takes targets, which do not change the outputs.
        parts = self._parts(x, self._zero_targets(len(x)))
        found = [self.backward(*part)[1] for part in parts]
        return torch.cat(found)[: len(x)]

    def optimizer(
        self, lr: float, *, momentum: float = 0.0, weight_decay: float = 0.0
    ) -> DeviceSGD:
        """Returns ExecuTorch's own SGD over the parameters."""
        # Step sizes of quantizers get no weight decay, as in torch training: decay would shrink
        # the range of the weights.
        weights: dict[str, Tensor] = {}
        step_sizes: dict[str, Tensor] = {}
        for name, parameter in self._module.named_parameters().items():
            group = step_sizes if is_qparam(name) else weights
            group[name] = parameter

        optimizers = []
        for group, decay in ((weights, weight_decay), (step_sizes, 0.0)):
            if group:
                # The fourth argument is the dampening of the momentum.
                made = self._library.get_sgd_optimizer(group, lr, momentum, 0, decay)
                optimizers.append((set(group), made))
        return DeviceSGD(optimizers)

    def _parts(self, x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for part, targets in zip(x.split(self.batch_size), y.split(self.batch_size), strict=True):
            yield self._padded(part, targets, len(x))

    def _padded(self, x: Tensor, y: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """Pads a part of a batch of `n` examples to `batch_size`, with zeros of weight 0.

        The weights of its examples are 1 / n.
        """
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
        """Takes pairs of parameter names and the runtime's optimizer of these parameters."""
        self._groups = groups

    def step(self, gradients: Mapping[str, Tensor]) -> None:
        """Takes one step, with `gradients` by parameter name."""
        by_name = {NET + name: gradient.contiguous() for name, gradient in gradients.items()}
        for names, optimizer in self._groups:
            optimizer.step({name: g for name, g in by_name.items() if name in names})


def _read_file(path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ExportError(
            f"cannot read {path}: {error.strerror}",
            place="program",
            cure="write it with export_training",
        ) from error
