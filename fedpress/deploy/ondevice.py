"""A program that trains on a device: forward, loss and backward in one ExecuTorch file, without Python or autograd.

`export_training` writes it, `DeviceModel` runs it here in the runtime that phones have. Its parameters lie in the
runtime's memory: what is written to them is what the program computes with.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fedpress.deploy.artifact import Artifact, write
from fedpress.deploy.capture import check_finite, require, silence
from fedpress.deploy.device import hush, said
from fedpress.deploy.executorch import INSTALL, WORDS, refused_kernel
from fedpress.errors import ExportError, ModelError
from fedpress.nn.compact import compact_
from fedpress.nn.quantized import is_qparam
from fedpress.nn.resize import copied

aten = torch.ops.aten
RUNTIME = "executorch.extension.training"
TOLERANCE = 1e-3  # of a parameter's largest gradient: float32 sums in another order
NET = "net."


class _Trained(nn.Module):
    """Maps examples, labels and weights of the examples to the weighted sum of cross-entropies, and the logits."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """The logits come out as a copy: gradients flow through the loss alone."""
        logits = self.net(x)
        return (
            F.cross_entropy(logits, y, reduction="none") * weights
        ).sum(), logits.detach().clone()


def export_training(
    model: nn.Module,
    path: str | Path,
    *,
    input_shape: tuple[int, ...],
    batch_size: int = 8,
    metadata: Mapping[str, str] | None = None,
    sparse: Sequence[str] | None = None,
) -> Artifact:
    """Writes a program that computes loss, logits and the gradients of all trainable parameters of `model`.

    Batch norm keeps its statistics, as in a federated client with `norm = "frozen"`; group norm is as good as any. The
    program is run once here and its gradients compared with torch's, because kernels of training are young.

    Of a sparse weight the program trains the kept values alone (see `fedpress.nn.compact`): its zeros stay
    zeros, and its parameters are those of the clients of a federated stage.

    Args:
        model: a classifier of float32 [N, *input_shape]; left as it was.
        path: the file.
        input_shape: shape of one example.
        batch_size: how many examples one run of the program takes; it bounds the memory on the device, not the batch
            of the training, which `DeviceModel` adds up.
        metadata: further words for the file.
        sparse: names of the weights whose zeros are pruned (`ModelSpec.sparse`); by default every matrix or filter with
            some zeros, but not zeros alone.

    Raises:
        ExportError: if the model draws at random, mixes examples or has parameters that are not float32, not finite,
            shared, or out of reach of the loss, if it cannot be captured, if the runtime lacks a kernel, or if a
            gradient comes out wrong; each by name.
    """
    with silence(), hush():
        require(RUNTIME, "executorch.exir", install=INSTALL)
    if batch_size < 1:
        raise ExportError(f"export: batch_size is {batch_size}; give at least 1")
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            raise ExportError(
                f"export: module {name!r} ({type(module).__name__}) draws at random, which a program for devices "
                "cannot; set its p to 0"
            )
    net = _compact_(_copy(model), sparse)
    example = _example(input_shape, batch_size, net)
    _check(net, example)
    words = {
        **(metadata or {}),
        "input_shape": json.dumps(list(input_shape)),
        "batch_size": str(batch_size),
        "parameters": json.dumps([name for name, p in net.named_parameters() if p.requires_grad]),
    }
    data = _lower(_Trained(net), example, words)
    _compare(data, net, example)
    write(Path(path), data)
    return Artifact(Path(path), len(data), words)


def _copy(model: nn.Module) -> nn.Module:
    net = copied(model).to("cpu").eval()
    check_finite(net)
    first: dict[nn.Parameter, str] = {}
    for name, p in net.named_parameters(remove_duplicate=False):
        if first.setdefault(p, name) != name:
            raise ExportError(
                f"export: {first[p]!r} and {name!r} are one parameter, which a program for devices cannot train; give "
                "each module its own"
            )
        if p.dtype != torch.float32:
            raise ExportError(
                f"export: parameter {name!r} is {p.dtype}, but devices train float32; convert the model"
            )
    if not any(p.requires_grad for p in first):
        raise ExportError(
            "export: no parameter of the model is trainable; set requires_grad = True on some"
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
        raise ExportError(f"export: {error}") from error


def _has_zeros(weight: Tensor) -> bool:
    zeros = int((weight == 0).sum())
    return 0 < zeros < weight.numel()


def _check(net: nn.Module, example: tuple[Tensor, Tensor, Tensor]) -> None:
    """Refuses what would train otherwise on a device than here, or not at all.

    A program has one mode, and fills batches up with examples of weight 0, which must not reach the others.
    """
    x = example[0]
    with torch.no_grad():
        logits = net(x)
        for module in net.modules():
            module.training = not isinstance(module, nn.modules.batchnorm._BatchNorm)
        training = net(x)
        net.eval()
        others = net(torch.cat([x[:1], 3 * x[1:] + 1]))
    room = TOLERANCE * max(1.0, logits.abs().max().item())
    if (training - logits).abs().max() > room:
        raise ExportError(
            "export: the model computes otherwise in training than in evaluation mode (dropout?), but a program for "
            "devices has one mode; take that out of its forward"
        )
    if (others - logits)[0].abs().max() > room:
        raise ExportError(
            "export: the logits of one example depend on the others of its batch (a batch norm without running "
            "statistics?), but devices fill batches up; use group norm"
        )
    named = {name: p for name, p in net.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(
        _Trained(net)(*example)[0], [*named.values()], allow_unused=True
    )
    for name, gradient in zip(named, gradients, strict=True):
        if gradient is None:
            raise ExportError(
                f"export: no gradient reaches parameter {name!r}; set its requires_grad = False"
            )


def _example(
    input_shape: tuple[int, ...], batch_size: int, net: nn.Module
) -> tuple[Tensor, Tensor, Tensor]:
    """Draws examples, labels and weights, one of them 0 as in a batch that is filled up."""
    chance = torch.Generator().manual_seed(0)
    x = torch.randn(batch_size, *input_shape, generator=chance)
    try:
        with torch.no_grad():
            logits = net(x)
    except Exception as error:
        takes = [batch_size, *input_shape]
        raise ExportError(
            f"export: the model does not take float32 {takes}: {said(error)}; fix input_shape"
        ) from error
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        raise ExportError(
            "export: a program that trains needs a classifier with logits [n, classes]; reshape them"
        )
    weights = torch.full((batch_size,), 1 / max(1, batch_size - 1))
    weights[batch_size - 1] *= batch_size == 1
    return x, torch.randint(0, logits.shape[1], (batch_size,), generator=chance), weights


def _lower(trained: _Trained, example: tuple[Tensor, ...], words: dict[str, str]) -> bytes:
    """Returns the file's bytes."""
    from executorch.exir import EdgeCompileConfig, to_edge
    from torch.export.experimental import _export_forward_backward

    try:
        with silence(), hush():
            joint = _export_forward_backward(torch.export.export(trained, example, strict=False))
            _mend_(joint.graph_module)
            edge = to_edge(
                joint,
                compile_config=EdgeCompileConfig(_check_ir_validity=False),
                constant_methods={WORDS: json.dumps(words)},
            )
            found: bytes = edge.to_executorch().buffer
            return found
    except Exception as error:
        raise ExportError(
            f"export: the model cannot become a program that trains: {said(error)}; use convolutions, linear layers, "
            "ReLU, max pooling, means and group norm"
        ) from error


def _mend_(graph: fx.GraphModule) -> None:
    """Writes the gradients of pooling with kernels that ExecuTorch 1.5 has right.

    Its kernel of max pooling adds to memory that it does not clear: each value is scattered to where its maximum came
    from. It has none of average pooling: without overlap, each value is spread over its window.
    """
    for node in list(graph.graph.nodes):
        if node.target is aten.max_pool2d_with_indices_backward.default:
            _replace_(graph, node, _scattered)
        elif node.target is aten.avg_pool2d_backward.default and _covers(node):
            _replace_(graph, node, _spread)
    graph.recompile()


def _replace_(graph: fx.GraphModule, node: fx.Node, twin: Callable[..., Tensor]) -> None:
    """Puts the operations of the function `twin` in the place of `node`."""
    from torch.fx.experimental.proxy_tensor import make_fx

    given = [a.meta["val"] if isinstance(a, fx.Node) else a for a in node.args]
    traced = make_fx(lambda *tensors: twin(*_fill(given, tensors)))(
        *[v for v in given if isinstance(v, Tensor)]
    )
    inputs = iter([a for a in node.args if isinstance(a, fx.Node)])
    copied: dict[fx.Node, fx.Node] = {}
    with graph.graph.inserting_before(node):
        for inner in traced.graph.nodes:
            if inner.op == "placeholder":
                copied[inner] = next(inputs)
            elif inner.op == "call_function":
                copied[inner] = graph.graph.node_copy(inner, copied.__getitem__)
            else:
                node.replace_all_uses_with(copied[inner.args[0]])
    graph.graph.erase_node(node)


def _fill(values: Sequence[Any], tensors: Sequence[Tensor]) -> list[Any]:
    """Puts `tensors` in the places of the tensors among `values`."""
    given = iter(tensors)
    return [next(given) if isinstance(v, Tensor) else v for v in values]


def _scattered(gradient: Tensor, x: Tensor, *others: Any) -> Tensor:
    planes = x.shape[:2]
    zeros = torch.zeros(*planes, x.shape[2] * x.shape[3])
    return zeros.scatter_add(
        2, others[-1].reshape(*planes, -1), gradient.reshape(*planes, -1)
    ).reshape(x.shape)


def _covers(node: fx.Node) -> bool:
    """Whether windows of an average lie side by side and leave nothing out."""
    arguments: list[Any] = list(node.args)
    _, x, size, *others = arguments
    stride, padding = others[0] or size, others[1]
    inside = x.meta["val"].shape[2:]
    fits = all(length % step == 0 for length, step in zip(inside, size, strict=False))
    return (
        len(size) == 2
        and list(stride) == list(size)
        and not any(padding)
        and fits
        and others[4] is None
    )


def _spread(gradient: Tensor, x: Tensor, size: Sequence[int], *_: Any) -> Tensor:
    n, c, h, w = gradient.shape
    windows = (gradient / (size[0] * size[1])).reshape(n, c, h, 1, w, 1)
    return windows.expand(n, c, h, size[0], w, size[1]).reshape(x.shape)


def _compare(data: bytes, net: nn.Module, example: tuple[Tensor, Tensor, Tensor]) -> None:
    """Holds the gradients of the program against autograd's."""
    device = DeviceModel(data)
    loss, _ = device.backward(*example)
    expected, _ = _Trained(net)(*example)
    named = {name: p for name, p in net.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(expected, [*named.values()])
    if not torch.allclose(loss, expected.detach(), rtol=TOLERANCE, atol=TOLERANCE):
        raise ExportError(
            f"export: the program's loss is {loss.item():.4g}, torch's {expected.item():.4g}; report it"
        )
    for name, gradient in zip(named, gradients, strict=True):
        got = device.gradients().get(name)
        room = TOLERANCE * max(1e-3, gradient.abs().max().item())
        if got is None or not (got - gradient).abs().max() <= room:  # also if it is NaN
            raise ExportError(
                f"export: ExecuTorch computes a wrong gradient of {name!r}; replace the operations behind it, "
                "such as overlapping pooling"
            )


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
                _, logits = self._run(
                    *self._padded(torch.zeros(0, *self.input_shape), torch.zeros(0).long(), 1)
                )
                self.classes = logits.shape[1]
            except (RuntimeError, KeyError, ValueError) as error:
                if refused := refused_kernel(printed()):
                    raise ExportError(f"export: ExecuTorch has {refused}; replace it") from error
                reason = "it has no batch size" if isinstance(error, KeyError) else said(error)
                raise ExportError(
                    f"export: this is no program that trains: {reason}; write one with export_training"
                ) from error
        held = self._module.named_parameters()
        for name in names:
            if NET + name not in held:
                raise ExportError(
                    f"export: this program does not hold parameter {name!r}; write it again"
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
            y: int64 [batch_size].
            weights: float32 [batch_size], 0 where an example only fills the batch.

        Returns:
            The weighted sum of losses, and logits [batch_size, classes]; `gradients` has the gradients of the sum.

        Raises:
            ExportError: if the shapes are others, or a label is no class.
        """
        wanted = (self.batch_size, *self.input_shape)
        if tuple(x.shape) != wanted or y.shape != weights.shape or y.shape != (self.batch_size,):
            raise ExportError(
                f"export: the program takes examples {list(wanted)} and labels and weights [{self.batch_size}], got "
                f"{list(x.shape)}, {list(y.shape)} and {list(weights.shape)}; fill the batch up with weights of 0"
            )
        if int(y.min()) < 0 or int(y.max()) >= self.classes:
            raise ExportError(
                f"export: labels are {int(y.min())}..{int(y.max())}, but the program has classes "
                f"0..{self.classes - 1}; give the labels that it was exported for"
            )
        return self._run(x, y, weights)

    def _run(self, x: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        given = [
            x.to(torch.float32).contiguous(),
            y.to(torch.int64).contiguous(),
            weights.contiguous(),
        ]
        loss, logits = self._module.forward_backward("forward", given)
        return loss, logits

    def gradients(self) -> dict[str, Tensor]:
        """Returns the gradients of the last run by parameter name."""
        return {name.removeprefix(NET): g for name, g in self._module.named_gradients().items()}

    def mean_gradient(self, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the mean loss over a batch [n, ...] of any size and its gradients, added up over runs of the program.

        Raises:
            ExportError: if examples have another shape or are not as many as labels, are none, or a label is no class.
        """
        if not len(x) or len(x) != len(y):
            raise ExportError(
                f"export: got {len(x)} examples and {len(y)} labels; give one label each, and at least one"
            )
        total, gradients = torch.zeros(()), dict[str, Tensor]()
        for part in self._parts(x, y):
            loss, _ = self.backward(*part)
            total = total + loss
            for name, gradient in self.gradients().items():
                gradients[name] = gradients[name] + gradient if name in gradients else gradient
        return total, gradients

    def logits(self, x: Tensor) -> Tensor:
        """Returns the logits [n, classes] of examples [n, *input_shape]."""
        if not len(x):
            return torch.zeros(0, self.classes)
        labels = torch.zeros(len(x), dtype=torch.int64)
        found = [self.backward(*part)[1] for part in self._parts(x, labels)]
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
        for part, labels in zip(x.split(self.batch_size), y.split(self.batch_size), strict=True):
            yield self._padded(part, labels, len(x))

    def _padded(self, x: Tensor, y: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """Fills a part of a batch of `n` up with zeros of weight 0."""
        lacks = self.batch_size - len(x)
        weights = torch.cat([torch.full((len(x),), 1 / n), torch.zeros(lacks)])
        return (
            torch.cat([x, x.new_zeros(lacks, *x.shape[1:])]),
            torch.cat([y, y.new_zeros(lacks)]),
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
            f"export: cannot read {path}: {error.strerror}; write it with export_training"
        ) from error
