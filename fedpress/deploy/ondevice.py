"""A program that trains on a device: forward, loss and backward in one ExecuTorch file, without Python or autograd.

`export_training` writes it; `fedpress.deploy.device_model` runs it here, in the runtime that phones have.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from fedpress.deploy.artifact import Artifact, write
from fedpress.deploy.capture import check_finite, require, silence
from fedpress.deploy.device import hush, said
from fedpress.deploy.device_model import RUNTIME, DeviceModel
from fedpress.deploy.executorch import INSTALL, WORDS
from fedpress.deploy.pooling import rewrite_pooling_
from fedpress.errors import ExportError, ModelError
from fedpress.nn.batch_norm import BatchNorm
from fedpress.nn.compact import compact_
from fedpress.nn.resize import copied
from fedpress.tasks import Classification, Task

TOLERANCE = 1e-3  # of a parameter's largest gradient: float32 sums in another order


class _Trained(nn.Module):
    """Maps examples, targets and weights of the examples to the weighted sum of their losses, and the outputs."""

    def __init__(self, net: nn.Module, task: Task) -> None:
        super().__init__()
        self.net, self.task = net, task

    def forward(self, x: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """The outputs come out as a copy: gradients flow through the loss alone."""
        outputs = self.net(x)
        losses = self.task.loss(outputs, y, reduction="none")
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
    """Writes a program that computes loss, outputs and the gradients of all trainable parameters of `model`.

    Batch norm keeps its statistics, as in a federated client with `norm = "frozen"`; group norm is as good as any. The
    program is run once here and its gradients compared with torch's, because kernels of training are young.

    Of a sparse weight the program trains the kept values alone (see `fedpress.nn.compact`): its zeros stay
    zeros, and its parameters are those of the clients of a federated stage.

    Args:
        model: takes float32 [N, *input_shape] and gives [N, outputs]; left as it was.
        path: the file.
        input_shape: shape of one example.
        task: what is learned: its loss is in the program. None: a classification, with as many classes as the model
            has outputs.
        batch_size: how many examples one run of the program takes; it bounds the memory on the device, not the batch
            of the training, which `DeviceModel` adds up.
        metadata: further words for the file.
        sparse: names of the weights whose zeros are pruned (`ModelSpec.sparse`); by default every matrix or filter with
            some zeros, but not zeros alone.

    Raises:
        ExportError: if the model draws at random, mixes examples or has parameters that are not float32, not finite,
            shared, or out of reach of the loss, if its outputs do not fit the task, if it cannot be captured, if the
            runtime lacks a kernel, or if a gradient comes out wrong; each by name.
    """
    with silence(), hush():
        require(RUNTIME, "executorch.exir", install=INSTALL)
    if batch_size < 1:
        raise ExportError(f"batch_size is {batch_size}", place="batch_size", cure="give at least 1")
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            raise ExportError(
                (
                    f"module {name!r} ({type(module).__name__}) draws at random, which a program "
                    "for devices cannot"
                ),
                place="model",
                cure="set its p to 0",
            )
    net = _compact_(_copy(model), sparse)
    x = _inputs(input_shape, batch_size, net)
    task = task or Classification(tuple(map(str, range(net(x).shape[1]))))
    example = (x, *_targets(task, net(x)))
    trained = _Trained(net, task)
    _check_trainable(trained, example)
    words = {
        **(metadata or {}),
        "input_shape": json.dumps(list(input_shape)),
        "batch_size": str(batch_size),
        "task": json.dumps({"kind": task.kind, "names": list(task.names), **task.about()}),
        "parameters": json.dumps([name for name, p in net.named_parameters() if p.requires_grad]),
    }
    data = _lower(trained, example, words)
    _compare(data, trained, example)
    write(Path(path), data)
    return Artifact(Path(path), len(data), words)


def _copy(model: nn.Module) -> nn.Module:
    net = copied(model).to("cpu").eval()
    check_finite(net)
    first: dict[nn.Parameter, str] = {}
    for name, p in net.named_parameters(remove_duplicate=False):
        if first.setdefault(p, name) != name:
            raise ExportError(
                (
                    f"{first[p]!r} and {name!r} are one parameter, which a program for devices "
                    "cannot train"
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
    if not any(p.requires_grad for p in first):
        raise ExportError(
            "no parameter of the model is trainable",
            place="model",
            cure="set requires_grad = True on some",
        )
    return net


def _compact_(net: nn.Module, sparse: Sequence[str] | None) -> nn.Module:
    """Lets only the kept values of sparse weights be parameters: a program that trained all would forget the zeros."""
    named = dict(net.named_parameters())
    if sparse is None:
        sparse = [
            name
            for name, p in named.items()
            if p.dim() > 1 and p.requires_grad and _has_zeros(p.detach())
        ]
    try:
        return compact_(net, sparse)
    except ModelError as error:
        raise ExportError(error.problem, place=error.place, cure=error.cure) from error


def _has_zeros(weight: Tensor) -> bool:
    zeros = int((weight == 0).sum())
    return 0 < zeros < weight.numel()


def _check_trainable(trained: _Trained, example: tuple[Tensor, Tensor, Tensor]) -> None:
    """Refuses what would train otherwise on a device than here, or not at all.

    A program has one mode, and fills batches up with examples of weight 0, which must not reach the others.
    """
    net, x = trained.net, example[0]
    with torch.no_grad():
        logits = net(x)
        for module in net.modules():
            module.training = not isinstance(module, BatchNorm)
        training = net(x)
        net.eval()
        others = net(torch.cat([x[:1], 3 * x[1:] + 1]))
    room = TOLERANCE * max(1.0, logits.abs().max().item())
    if (training - logits).abs().max() > room:
        raise ExportError(
            (
                "the model computes otherwise in training than in evaluation mode (dropout?), "
                "but a program for devices has one mode"
            ),
            place="model",
            cure="take that out of its forward",
        )
    if (others - logits)[0].abs().max() > room:
        raise ExportError(
            (
                "the logits of one example depend on the others of its batch (a batch norm "
                "without running statistics?), but devices fill batches up"
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
    """Draws examples that the model takes, and looks at what it makes of them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch_size, *input_shape, generator=generator)
    try:
        with torch.no_grad():
            logits = net(x)
    except Exception as error:
        takes = [batch_size, *input_shape]
        raise ExportError(
            f"the model does not take float32 {takes}: {said(error)}",
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
    """Makes up targets for `outputs` [n, k], and weights [n], one of them 0 as in a batch that is filled up."""
    n = len(outputs)
    like = torch.zeros(1, dtype=torch.int64)
    if task.targets != "classes":
        like = torch.zeros(1, task.outputs)
    targets = task.made_up(n, like)
    try:
        task.check(outputs, targets)
    except ModelError as error:
        raise ExportError(error.problem, place="model", cure=error.cure) from error
    weights = torch.full((n,), 1 / max(1, n - 1))
    weights[n - 1] *= n == 1
    return targets, weights


def _lower(trained: _Trained, example: tuple[Tensor, ...], words: dict[str, str]) -> bytes:
    """Returns the file's bytes."""
    from executorch.exir import EdgeCompileConfig, to_edge
    from torch.export.experimental import _export_forward_backward

    try:
        with silence(), hush():
            joint = _export_forward_backward(torch.export.export(trained, example, strict=False))
            rewrite_pooling_(joint.graph_module)
            edge = to_edge(
                joint,
                compile_config=EdgeCompileConfig(_check_ir_validity=False),
                constant_methods={WORDS: json.dumps(words)},
            )
            found: bytes = edge.to_executorch().buffer
            return found
    except Exception as error:
        raise ExportError(
            f"the model cannot become a program that trains: {said(error)}",
            place="model",
            cure="use convolutions, linear layers, ReLU, max pooling, means and group norm",
        ) from error


def _compare(data: bytes, trained: _Trained, example: tuple[Tensor, Tensor, Tensor]) -> None:
    """Holds the gradients of the program against autograd's."""
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
        room = TOLERANCE * max(1e-3, gradient.abs().max().item())
        if got is None or not (got - gradient).abs().max() <= room:  # also if it is NaN
            raise ExportError(
                f"ExecuTorch computes a wrong gradient of {name!r}",
                place="model",
                cure="replace the operations behind it, such as overlapping pooling",
            )
