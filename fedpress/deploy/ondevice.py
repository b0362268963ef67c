"""Exports a program that trains on a device: forward, loss and backward in one ExecuTorch file.

The device needs neither Python nor autograd. On this machine `fedpress.deploy.device_model` runs
the program.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from fedpress.deploy.artifact import Artifact, write
from fedpress.deploy.capture import check_finite, require, silence
from fedpress.deploy.device import captured_output, first_line
from fedpress.deploy.device_model import RUNTIME, DeviceModel
from fedpress.deploy.executorch import INSTALL, METADATA
from fedpress.deploy.pooling import rewrite_pooling_
from fedpress.errors import ExportError, ModelError
from fedpress.nn.batch_norm import BatchNorm
from fedpress.nn.compact import compact_
from fedpress.nn.resize import copied
from fedpress.tasks import Classification, Task

# Allowed relative error of outputs, of the loss and of the gradient of a parameter: two programs
# may sum float32 numbers in different orders.
TOLERANCE = 1e-3
SPARSE = 0.001
"""Smallest share of zeros by which a weight is taken for a sparse one, if nobody names those."""


class _Trained(nn.Module):
    """Maps examples, targets and example weights to the weighted sum of losses and the outputs."""

    def __init__(self, net: nn.Module, task: Task) -> None:
        super().__init__()
        self.net, self.task = net, task

    def forward(self, x: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the loss (a scalar) and the outputs [n, k]."""
        outputs = self.net(x)
        losses = self.task.loss(outputs, y, reduction="none")
        # Detached, because the exporter must differentiate only the loss.
        return (losses * weights).sum(), outputs.detach().clone()


def export_training(
    model: nn.Module,
    path: str | Path,
    *,
    input_shape: tuple[int, ...],
    task: Task | None = None,
    batch_size: int = 8,
    metadata: Mapping[str, str] | None = None,
    sparse: Sequence[str] | None = None,
) -> Artifact:
    """Writes a program that computes loss, outputs and gradients of all trainable parameters.

    Batch norms use their running statistics and do not change them, as in a federated client with
    `norm = "frozen"`. The program is run once here and its gradients are compared with torch's,
    since some of ExecuTorch's kernels for training are wrong (see `deploy.pooling`).

    For a sparse weight, only the values that are not pruned are parameters (see
    `fedpress.nn.compact`). So pruned values stay 0, and the flat vector of parameters has the
    same layout as that of the other clients in federated training.

    Args:
        model: the model, which maps float32 [N, *input_shape] to [N, outputs]; it is not changed.
        path: where to write the file.
        input_shape: shape of one example.
        task: the task whose loss the program computes. None: a classification with as many classes
            as the model has outputs.
        batch_size: examples in one run of the program; it decides the memory that the device needs.
            Training may use larger batches: `DeviceModel` sums gradients over several runs.
        metadata: more entries for the file's metadata.
        sparse: names of the weights whose zeros are pruned (`ModelSpec.sparse`); None: every
            trainable weight of two or more dimensions in which at least one value in a thousand,
            but not all, are 0.

    Raises:
        ExportError: if the model cannot be trained on a device. The error names the module or
            parameter. Reasons are active dropout; outputs that depend on the other examples of the
            batch or do not fit the task; parameters that are not float32, not finite, shared, or
            without effect on the loss. The error also comes if the model cannot be captured, the
            runtime lacks a kernel, or a gradient of the program is wrong.
    """
    with silence(), captured_output():
        require(RUNTIME, "executorch.exir", install=INSTALL)
    if batch_size < 1:
        raise ExportError(f"batch_size is {batch_size}", place="batch_size", cure="give at least 1")
    _check_no_dropout(model)
    net = _compact_(_copy(model), sparse)
    x = _inputs(input_shape, batch_size, net)
    task = task or Classification(tuple(map(str, range(net(x).shape[1]))))
    example = (x, *_targets(task, net(x)))
    trained = _Trained(net, task)
    _check_trainable(trained, example)
    metadata = {
        **(metadata or {}),
        "input_shape": json.dumps(list(input_shape)),
        "batch_size": str(batch_size),
        "task": json.dumps({"kind": task.kind, "names": list(task.names), **task.to_json()}),
        "parameters": json.dumps([name for name, p in net.named_parameters() if p.requires_grad]),
    }
    data = _lower(trained, example, metadata)
    # Before the file is written, so that no wrong program is left on the disk.
    _compare(data, trained, example)
    write(Path(path), data)
    return Artifact(Path(path), len(data), metadata)


def _check_no_dropout(model: nn.Module) -> None:
    for name, module in model.named_modules():
        # Rate 0 is allowed: such a dropout does nothing.
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            raise ExportError(
                (
                    f"module {name!r} ({type(module).__name__}) draws at random, which a program "
                    "for devices cannot"
                ),
                place="model",
                cure="set its p to 0",
            )


def _copy(model: nn.Module) -> nn.Module:
    """Returns a copy in evaluation mode on the CPU, and checks its parameters."""
    net = copied(model).to("cpu").eval()
    check_finite(net)
    first_name: dict[nn.Parameter, str] = {}
    for name, p in net.named_parameters(remove_duplicate=False):
        # The runtime would make two copies, and train each on only a part of the gradient.
        if first_name.setdefault(p, name) != name:
            raise ExportError(
                (
                    f"{first_name[p]!r} and {name!r} are one parameter, which a program for "
                    "devices cannot train"
                ),
                place="model",
                cure="give each module its own",
            )
        if p.dtype != torch.float32:
            raise ExportError(
                f"parameter {name!r} is {p.dtype}, but devices train float32",
                place="model",
                cure="convert the model",
            )
    if not any(p.requires_grad for p in first_name):
        raise ExportError(
            "no parameter of the model is trainable",
            place="model",
            cure="set requires_grad = True on some",
        )
    return net


def _compact_(net: nn.Module, sparse: Sequence[str] | None) -> nn.Module:
    """Replaces each sparse weight by a vector of its kept values, so that zeros are not trained."""
    if sparse is None:
        sparse = []
        for name, p in net.named_parameters():
            if p.dim() > 1 and p.requires_grad and _has_zeros(p.detach()):
                sparse.append(name)
    try:
        return compact_(net, sparse)
    except ModelError as error:
        raise ExportError(error.problem, place=error.place, cure=error.cure) from error


def _has_zeros(weight: Tensor) -> bool:
    # A weight of only zeros was initialised so (such as the last layer of a residual block). One
    # zero in thousands came by chance: random initialisation has one in some 16 million values.
    zeros = int((weight == 0).sum())
    return SPARSE * weight.numel() <= zeros < weight.numel() and zeros > 0


def _check_trainable(trained: _Trained, example: tuple[Tensor, Tensor, Tensor]) -> None:
    """Checks that the model would train on a device as it does here.

    Raises:
        ExportError: if one of three checks fails. The model must compute the same in training and
            evaluation mode, because a program has one mode. The output of one example must not
            depend on other examples, because short batches are padded with examples of weight 0.
            Every trainable parameter must have a gradient.
    """
    net, x = trained.net, example[0]
    with torch.no_grad():
        logits = net(x)
        # Batch norms stay in evaluation mode: the program uses their running statistics.
        for module in net.modules():
            module.training = not isinstance(module, BatchNorm)
        training_logits = net(x)
        net.eval()
        # The first example must have the same logits, whatever other examples are in the batch.
        among_others = net(torch.cat([x[:1], 3 * x[1:] + 1]))
    allowed = TOLERANCE * max(1.0, logits.abs().max().item())
    if (training_logits - logits).abs().max() > allowed:
        raise ExportError(
            (
                "the model computes differently in training and in evaluation mode (dropout?), "
                "but a program for devices has one mode"
            ),
            place="model",
            cure="remove this difference from its forward",
        )
    if (among_others - logits)[0].abs().max() > allowed:
        raise ExportError(
            (
                "the logits of one example depend on other examples of its batch (a batch norm "
                "without running statistics?), but devices pad batches"
            ),
            place="model",
            cure="use group norm",
        )
    named = {name: p for name, p in net.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(trained(*example)[0], [*named.values()], allow_unused=True)
    for name, gradient in zip(named, gradients, strict=True):
        if gradient is None:
            raise ExportError(
                f"no gradient reaches parameter {name!r}",
                place="model",
                cure="set its requires_grad = False",
            )


def _inputs(input_shape: tuple[int, ...], batch_size: int, net: nn.Module) -> Tensor:
    """Draws a batch of random examples, and checks that the model maps it to [batch_size, k].

    Raises:
        ExportError: if the model fails or returns another shape.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch_size, *input_shape, generator=generator)
    try:
        with torch.no_grad():
            logits = net(x)
    except Exception as error:
        takes = [batch_size, *input_shape]
        raise ExportError(
            f"the model does not take float32 {takes}: {first_line(error)}",
            place="input_shape",
            cure="fix input_shape",
        ) from error
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        raise ExportError(
            "a program that trains needs a model with outputs [n, k]",
            place="model",
            cure="reshape them",
        )
    return x


def _targets(task: Task, outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Returns arbitrary valid targets for `outputs` [n, k], and weights [n] of the examples."""
    n = len(outputs)
    targets = task.made_up_targets(n, task.example_targets(outputs[:1]))
    try:
        task.check(outputs, targets)
    except ModelError as error:
        raise ExportError(error.problem, place="model", cure=error.cure) from error

    # The last example gets weight 0, as padding does, so that the comparison covers that case.
    weights = torch.full((n,), 1 / max(1, n - 1))
    if n > 1:
        weights[-1] = 0
    return targets, weights


def _lower(trained: _Trained, example: tuple[Tensor, ...], metadata: dict[str, str]) -> bytes:
    """Converts the model with its loss and gradients to the bytes of an ExecuTorch file."""
    from executorch.exir import EdgeCompileConfig, to_edge
    from torch.export.experimental import _export_forward_backward

    try:
        with silence(), captured_output():
            joint = _export_forward_backward(torch.export.export(trained, example, strict=False))
            rewrite_pooling_(joint.graph_module)
            edge = to_edge(
                joint,
                compile_config=EdgeCompileConfig(_check_ir_validity=False),
                constant_methods={METADATA: json.dumps(metadata)},
            )
            found: bytes = edge.to_executorch().buffer
            return found
    except Exception as error:
        raise ExportError(
            f"the model cannot become a program that trains: {first_line(error)}",
            place="model",
            cure="use convolutions, linear layers, ReLU, max pooling, means and group norm",
        ) from error


def _compare(data: bytes, trained: _Trained, example: tuple[Tensor, Tensor, Tensor]) -> None:
    """Compares loss and gradients of the program with those of torch's autograd.

    Raises:
        ExportError: if the loss or a gradient differs. The error names the first parameter with a
            wrong gradient.
    """
    device = DeviceModel(data)
    loss, _ = device.backward(*example)
    expected, _ = trained(*example)
    named = {name: p for name, p in trained.net.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(expected, [*named.values()])
    if not torch.allclose(loss, expected.detach(), rtol=TOLERANCE, atol=TOLERANCE):
        raise ExportError(
            f"the program's loss is {loss.item():.4g}, torch's {expected.item():.4g}",
            place="model",
            cure="report it",
        )
    for name, gradient in zip(named, gradients, strict=True):
        got = device.gradients().get(name)
        allowed = TOLERANCE * max(1e-3, gradient.abs().max().item())
        # `not ... <=` instead of `>`: NaN must be refused too.
        if got is None or not (got - gradient).abs().max() <= allowed:
            raise ExportError(
                f"ExecuTorch computes a wrong gradient of {name!r}",
                place="model",
                cure="replace the operations behind it, such as overlapping pooling",
            )
