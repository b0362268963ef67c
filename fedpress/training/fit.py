"""The one training loop and the one evaluation of the house."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fedpress.core.examples import Arrays, Preprocess, resized
from fedpress.core.parameters import trainable
from fedpress.core.random import derive, generator
from fedpress.errors import DivergedError, TrainingError
from fedpress.nn.quantized import kept_entries, step_sizes
from fedpress.nn.resize import copied
from fedpress.training.augment import Augment, augment
from fedpress.training.optimizers import Muon

Precision = Literal["auto", "float32", "bf16"]
Objective = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]
"""The loss of a step, from the model, its prepared input [n, ...], its float32 logits [n, classes], the labels [n]."""


class TrainSettings(BaseModel):
    """How to train on the public part.

    Optimizers: "sgd" with Nesterov momentum, or "muon" (orthogonalised momentum, Jordan 2024) for the hidden weights
    with SGD at `head_lr` for the rest. The learning rate rises linearly over `warmup` of the steps, then falls linearly
    to 0. Weight decay acts on weights, never on biases, norms and step sizes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: int = Field(ge=0)
    batch_size: int = Field(default=256, ge=1)
    optimizer: Literal["sgd", "muon"] = "sgd"
    lr: float = Field(default=0.1, gt=0)
    head_lr: float = Field(
        default=0.05,
        gt=0,
        description="muon only: learning rate of biases, norms, first and last layer",
    )
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=5e-4, ge=0)
    bn_penalty: float = Field(
        default=0.0,
        ge=0,
        description="strength of the L1 penalty on batch-norm scales, for the score 'bn_scale'",
    )
    warmup: float = Field(default=0.2, ge=0, lt=1)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    ema: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="decay per step of the averaged weights; 0 = the last weights",
    )
    augment: Augment = Augment()
    image_sizes: tuple[tuple[int, int], ...] = Field(
        default=(), description="[[side, epochs], ...]; later epochs at full size"
    )
    patience: int = Field(
        default=0,
        ge=0,
        description="stop after so many full-size epochs without a better validation accuracy; 0 = never",
    )
    precision: Precision = "auto"

    @model_validator(mode="after")
    def _sizes_fit(self) -> TrainSettings:
        if any(side < 4 or epochs < 1 for side, epochs in self.image_sizes):
            raise ValueError("image_sizes holds [side, epochs] with side >= 4 and epochs >= 1")
        if sum(epochs for _, epochs in self.image_sizes) > self.epochs:
            raise ValueError(f"image_sizes take more than the {self.epochs} epochs")
        return self

    def side(self, epoch: int) -> int | None:
        """Returns the image side of `epoch` (from 0), or None for full size."""
        for side, epochs in self.image_sizes:
            if epoch < epochs:
                return side
            epoch -= epochs
        return None


@dataclass(frozen=True)
class Evaluation:
    """Share of right answers (0..1) and mean cross-entropy in nats over `examples`.

    `logits` [examples, classes] are what the model gave, on the CPU; None unless they were asked for.
    """

    accuracy: float
    loss: float
    examples: int
    logits: Tensor | None = None


@dataclass(frozen=True)
class EpochRecord:
    """What one epoch did: training loss, and accuracy on the validation set (None without one)."""

    epoch: int
    epochs: int
    loss: float
    accuracy: float | None
    image_size: int | None


def device() -> torch.device:
    """Returns the GPU when there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def uses_bf16(model: nn.Module, precision: Precision) -> bool:
    """Whether autocast to bfloat16 is used: "auto" says yes where it is faster (a GPU, or a CPU with the instructions).

    Small networks gain nothing from it, so "auto" leaves those of under half a million parameters in float32.
    """
    if precision != "auto":
        return precision == "bf16"
    large = sum(p.numel() for p in model.parameters()) >= 500_000
    convolves = any(isinstance(m, nn.modules.conv._ConvNd) for m in model.modules())
    fast = device().type == "cuda" or torch.cpu._is_avx512_bf16_supported()
    return large and convolves and fast


def autocast(model: nn.Module, precision: Precision) -> AbstractContextManager[object]:
    """Returns the context in which forward passes of `model` run."""
    if uses_bf16(model, precision):
        return torch.autocast(device().type, torch.bfloat16)
    return nullcontext()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts all modules into evaluation mode, then gives each its own mode back: frozen norms stay frozen."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def memory_format(x: Tensor, model: nn.Module | None = None) -> torch.memory_format:
    """Returns channels-last for images, the plain format else, and for a `model` that must not have it."""
    images = x.dim() == 4 and x.shape[1] > 1 and (model is None or takes_channels_last(model))
    return torch.channels_last if images else torch.contiguous_format


def takes_channels_last(model: nn.Module) -> bool:
    """Says whether the faster memory format is safe for `model` on this machine.

    On processors without AVX-512 torch 2.13 writes beyond its memory in the backward pass of a strided 1x1 convolution
    in this format, if it has fewer input channels than a vector register has floats, 8.
    """
    if device().type != "cpu" or torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return True
    return not any(
        isinstance(m, nn.Conv2d)
        and m.in_channels < 8
        and m.kernel_size == (1, 1)
        and m.stride != (1, 1)
        for m in model.modules()
    )


def place_(model: nn.Module) -> nn.Module:
    """Moves `model` to the device and gives its convolution weights the faster memory format where that is safe."""
    wanted = torch.channels_last if takes_channels_last(model) else torch.contiguous_format
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.data.contiguous(memory_format=wanted)
    return model.to(device())


def evaluate(
    model: nn.Module,
    arrays: Arrays,
    preprocess: Preprocess,
    *,
    precision: Precision = "float32",
    batch_size: int = 500,
    keep_logits: bool = False,
) -> Evaluation:
    """Measures accuracy and loss of `model` on `arrays`; the modes of its modules are left as they were.

    With `keep_logits` what the model gave comes with them.

    Raises:
        TrainingError: if there are no examples.
    """
    if not len(arrays):
        raise TrainingError(
            "evaluate: there are no examples to measure on; give the data set a test part"
        )
    right, loss = 0, 0.0
    kept: list[Tensor] = []
    at = next((p.device for p in model.parameters()), torch.device("cpu"))
    with evaluating(model), torch.inference_mode(), autocast(model, precision):
        for x, y in zip(arrays.x.split(batch_size), arrays.y.split(batch_size), strict=True):
            inputs = preprocess(x.to(at)).contiguous(memory_format=memory_format(x, model))
            logits = outputs(model, inputs).float()
            right += int((logits.argmax(1) == y.to(at)).sum())
            loss += float(F.cross_entropy(logits, y.to(at), reduction="sum"))
            if keep_logits:
                kept.append(logits.cpu())
    return Evaluation(
        right / len(arrays), loss / len(arrays), len(arrays), torch.cat(kept) if kept else None
    )


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    """Returns what `model` gives for the batch `x` [n, ...]: [n, ...], also where it cannot take a batch of one.

    Code such as `squeeze()` drops the dimension of a batch of one, or fails: then the example runs beside its copy,
    which changes nothing in a network that handles each example by itself.

    Raises:
        Exception: whatever the network raises; that of a batch norm with nothing to average is left as it is.
    """
    if len(x) != 1:
        return model(x)
    try:
        alone = model(x)
    except Exception as problem:
        if ONE_VALUE in str(problem):
            raise
        try:
            return model(torch.cat([x, x]))[:1]
        except Exception:
            raise problem from None
    if alone.dim() and len(alone) == 1:
        return alone
    return model(torch.cat([x, x]))[:1]


NOTHING_TO_TRAIN = (
    "train: no parameter of the model has requires_grad, so there is nothing to train"
)


def check(
    model: nn.Module,
    settings: TrainSettings,
    train: Arrays,
    validation: Arrays,
    preprocess: Preprocess,
) -> None:
    """Finds what would stop a training of `model` later on: no examples, no validation set, wrong image sizes, no norm.

    Raises:
        TrainingError: saying which setting does not fit.
    """
    if settings.epochs and not len(train):
        raise TrainingError(
            "train: the public part has no examples; set data.public_share or lower data.validation"
        )
    if settings.epochs and settings.patience and not len(validation):
        raise TrainingError(
            "train: patience needs a validation set; set data.validation, or leave patience out"
        )
    if settings.epochs and settings.bn_penalty:
        _batch_norm_scales(model)
    if (
        settings.epochs
        and min(settings.batch_size, len(train)) == 1
        and _needs_two(model, preprocess(train.x[:1]))
    ):
        if settings.batch_size == 1:
            raise TrainingError(
                "train: batch_size = 1 leaves a batch norm nothing to average; take 2 or more"
            )
        raise TrainingError(
            "train: the public part has one example, which leaves a batch norm nothing to average; raise "
            "data.public_share"
        )
    if settings.epochs and not any(p.requires_grad for p in model.parameters()):
        raise TrainingError(NOTHING_TO_TRAIN)
    for side, _ in settings.image_sizes:
        if train.x.dim() != 4 or side > min(train.x.shape[2:]):
            raise TrainingError(
                f"train: image_sizes asks for images of {side} pixels, but examples are {tuple(train.x.shape[1:])}; "
                "give smaller sides, or leave image_sizes out"
            )
        two = Arrays(resized(train.x[:2], side), train.y[:2])
        try:
            evaluate(model, two, preprocess)
        except RuntimeError as error:
            raise TrainingError(
                f"train: the model cannot take images of {side} pixels ({str(error).splitlines()[0]}); "
                "leave image_sizes out, or use a network that pools, such as resnet18"
            ) from error


ONE_VALUE = "more than 1 value per channel"
"""What torch says of a batch norm in training mode that has nothing to average."""


def averages_batches(model: nn.Module) -> bool:
    """Says whether a batch norm of `model` takes its statistics from the batch, now that it is in this mode."""
    norms = (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    return any(norm.training or norm.running_mean is None for norm in norms)


def _needs_two(model: nn.Module, x: Tensor) -> bool:
    """Says whether a batch norm of `model` cannot train on the single example `x` [1, ...]: one value a channel."""
    twin = copied(model).train()
    if not averages_batches(twin):
        return False
    at = next((p.device for p in twin.parameters()), x.device)
    try:
        with torch.no_grad():
            twin(x.to(at))
    except ValueError as error:
        return ONE_VALUE in str(error)
    return False


@dataclass(frozen=True)
class Step:
    """One optimizer step is done, of `total` in the whole training."""

    done: int
    total: int


class Fit:
    """A model in training: iterate over `epochs()`; `state()` and `load_()` carry it over a stop, to the same bits.

    After every step the loop yields, so whatever a method does to the weights between steps, its caller does there.

    Args:
        model: trained in place.
        settings: how.
        seed: of order, augmentation and dropout.
        objective: the loss; cross-entropy with the settings' label smoothing by default.
        helpers: what the objective trains besides and nobody keeps: its parameters go to the same optimizer.
        sparse: names of parameters whose zeros stay zero (see `ModelSpec.sparse`).
    """

    def __init__(
        self,
        model: nn.Module,
        settings: TrainSettings,
        *,
        seed: int,
        objective: Objective | None = None,
        helpers: nn.Module | None = None,
        sparse: Sequence[str] = (),
    ) -> None:
        self.model, self.settings, self.seed = place_(model), settings, seed
        self.objective = objective or self._cross_entropy
        self.helpers = (helpers or nn.Module()).to(device())
        weights = dict(model.named_parameters(remove_duplicate=False))
        self.zeros = [(weights[name], ~kept) for name, kept in kept_entries(model, sparse).items()]
        self.scales = _batch_norm_scales(model) if settings.epochs and settings.bn_penalty else []
        self.average = None
        if settings.ema:
            self.average = AveragedModel(
                model, multi_avg_fn=get_ema_multi_avg_fn(settings.ema), use_buffers=True
            )
        self.views: list[tuple[nn.Parameter, nn.Parameter]] = []
        self.optimizers = self._optimizers()
        self.base = [[g["lr"] for g in o.param_groups] for o in self.optimizers]
        self.epoch = 0
        self.best = (-1.0, -1)
        self.best_weights: dict[str, Tensor] = {}

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        s, muon = self.settings, self.settings.optimizer == "muon"
        hidden = _hidden(self.model) if muon else []
        ids = {id(p) for p in hidden}
        rest = [p for p in (*trainable(self.model), *trainable(self.helpers)) if id(p) not in ids]
        if not rest and not hidden and s.epochs:
            raise TrainingError(NOTHING_TO_TRAIN)
        # Decay acts on weights only: norms and biases have one dimension, step sizes of groups have two.
        spared = step_sizes(self.model)
        decays = [p for p in rest if p.dim() > 1 and id(p) not in spared]
        stays = [p for p in rest if p.dim() <= 1 or id(p) in spared]
        groups = [
            {"params": decays, "weight_decay": 5e-4 if muon else s.weight_decay},
            {"params": stays, "weight_decay": 0.0},
        ]
        optimizers: list[torch.optim.Optimizer] = []
        if rest:
            lr, momentum = (s.head_lr, 0.9) if muon else (s.lr, s.momentum)
            used = [g for g in groups if g["params"]]
            optimizers.append(torch.optim.SGD(used, lr, momentum, nesterov=momentum > 0))
        if hidden:
            optimizers.append(self._muon(hidden))
        return optimizers

    def _muon(self, hidden: list[nn.Parameter]) -> torch.optim.Optimizer:
        s = self.settings
        # Muon takes matrices: each sees its filter through a view that shares the memory.
        self.views = [(p, nn.Parameter(_matrix(p.data, p))) for p in hidden]
        assert all(p.data_ptr() == view.data_ptr() for p, view in self.views), (
            "a view must share its weight's memory"
        )
        return Muon(
            [view for _, view in self.views], s.lr, momentum=s.momentum, weight_decay=s.weight_decay
        )

    def result_(self) -> nn.Module:
        """Returns the model with its final weights: under `patience` the best on the validation set, else the last.

        With `ema` both are averaged weights.
        """
        if self.settings.patience and self.best_weights:
            self.model.load_state_dict(self.best_weights)
        else:
            self.model.load_state_dict(self._current().state_dict())
        return self.model

    def _current(self) -> nn.Module:
        return (
            self.average.module
            if self.average is not None and self.average.n_averaged > 0
            else self.model
        )

    @property
    def finished(self) -> bool:
        """Whether all epochs are done or patience has run out."""
        patience, waited = self.settings.patience, self.epoch - 1 - self.best[1]
        ran_out = patience > 0 and self.best[1] >= 0 and waited >= patience
        return self.epoch >= self.settings.epochs or ran_out

    def epochs(
        self, train: Arrays, validation: Arrays, preprocess: Preprocess
    ) -> Iterator[Step | EpochRecord]:
        """Trains epoch by epoch: yields every step, and a record after each epoch, when the state may be saved.

        Raises:
            TrainingError: if the settings do not fit the data (see `check`).
            DivergedError: if the loss or a weight is not finite.
        """
        check(self.model, self.settings, train, validation, preprocess)
        train = Arrays(train.x.to(device()), train.y.to(device()))
        side, images = None, train.x
        while not self.finished:
            now = self.settings.side(self.epoch)
            if now != side:
                side, images = now, train.x if now is None else resized(train.x, now)
            loss = yield from self._epoch(Arrays(images, train.y), preprocess)
            accuracy = None
            if len(validation):
                small = Arrays(resized(validation.x, side), validation.y) if side else validation
                accuracy = evaluate(
                    self._current(), small, preprocess, precision=self.settings.precision
                ).accuracy
                self._remember_(accuracy, full_size=side is None)
            self.epoch += 1
            size = images.shape[-1] if images.dim() == 4 else None
            yield EpochRecord(self.epoch, self.settings.epochs, loss, accuracy, size)

    def _remember_(self, accuracy: float, *, full_size: bool) -> None:
        """Keeps the best epoch; under patience only those at full size count, the others do not compare."""
        if accuracy <= self.best[0] or (self.settings.patience and not full_size):
            return
        self.best = (accuracy, self.epoch)
        if self.settings.patience:
            self.best_weights = {k: v.clone() for k, v in self._current().state_dict().items()}

    def _epoch(self, train: Arrays, preprocess: Preprocess) -> Generator[Step, None, float]:
        s, n = self.settings, len(train)
        chance = generator(self.seed, "epoch", self.epoch)
        torch.manual_seed(derive(self.seed, "dropout", self.epoch))
        order = torch.randperm(n, generator=chance)
        # Which images start mirrored is drawn once for the run, so that two epochs in a row show both sides.
        mirrored = torch.rand(n, generator=generator(self.seed, "flip")) < 0.5
        mirrored ^= self.epoch % 2 == 1
        steps = max(1, n // s.batch_size)
        self.model.train()
        total = 0.0
        for step in range(steps):
            index = order[step * s.batch_size : (step + 1) * s.batch_size]
            self._rate_((self.epoch + step / steps) / s.epochs)
            batch = train.take(index)
            x = augment(batch.x, s.augment, chance, flipped=mirrored[index])
            loss = self._step(preprocess(x.to(device())), batch.y.to(device()))
            if not math.isfinite(loss):
                raise self._diverged(
                    f"the loss is {loss} at epoch {self.epoch + 1}, step {step + 1}"
                )
            total += loss
            yield Step(self.epoch * steps + step + 1, s.epochs * steps)
        weights = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        broken = next((name for name, p in weights if not torch.isfinite(p).all()), None)
        if broken is not None:  # the last step may do this after the last loss was seen
            raise self._diverged(f"'{broken}' is not finite after epoch {self.epoch + 1}")
        return total / steps

    def _diverged(self, what: str) -> DivergedError:
        s = self.settings
        rates = f"stage.lr (now {s.lr})"
        if s.optimizer == "muon":
            rates += f" or stage.head_lr (now {s.head_lr})"
        return DivergedError(
            f"train: {what}; lower {rates} or check the data for wrong values; the last good checkpoint is kept"
        )

    def _step(self, x: Tensor, y: Tensor) -> float:
        x = x.contiguous(memory_format=memory_format(x, self.model))
        with autocast(self.model, self.settings.precision):
            logits = outputs(self.model, x)
        loss = self.objective(self.model, x, logits.float(), y)
        if self.scales:  # network slimming (Liu et al. 2017, arXiv:1708.06519, eq. 1)
            loss = (
                loss
                + self.settings.bn_penalty
                * torch.stack([scale.abs().sum() for scale in self.scales]).sum()
            )
        loss.backward()
        for parameter, view in self.views:
            view.grad = None if parameter.grad is None else _matrix(parameter.grad, parameter)
        for optimizer in self.optimizers:
            optimizer.step()
        with torch.no_grad():
            for weight, zero in self.zeros:
                weight.masked_fill_(zero, 0)
        self.model.zero_grad(set_to_none=True)
        self.helpers.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update_parameters(self.model)
        return float(loss.detach())

    def _cross_entropy(self, model: nn.Module, x: Tensor, logits: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(logits, y, label_smoothing=self.settings.label_smoothing)

    def _rate_(self, done: float) -> None:
        factor = one_cycle(done, self.settings.warmup)
        for optimizer, rates in zip(self.optimizers, self.base, strict=True):
            for group, lr in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = lr * factor

    @torch.no_grad()
    def forget_(self, weight: nn.Parameter, where: Tensor) -> None:
        """Zeroes the momentum of `weight` at the true entries of `where`, of its shape: they begin to train anew."""
        view = next((view for p, view in self.views if p is weight), None)
        key, entries = (weight, where) if view is None else (view, _matrix(where, weight))
        for optimizer in self.optimizers:
            momentum = optimizer.state.get(key, {}).get("momentum_buffer")
            if momentum is not None:
                momentum.masked_fill_(entries, 0)

    def state(self) -> dict[str, Tensor]:
        """Returns all that a later `load_` needs, as named tensors; they are the living ones, so save or copy them."""
        out = {f"model/{k}": v for k, v in self.model.state_dict().items()}
        out |= {f"helpers/{k}": v for k, v in self.helpers.state_dict().items()}
        if self.average is not None:
            out |= {f"average/{k}": v for k, v in self.average.state_dict().items()}
        out |= {f"best/{k}": v for k, v in self.best_weights.items()}
        for at, optimizer in enumerate(self.optimizers):
            for key, slot in optimizer.state_dict()["state"].items():
                out |= {
                    f"optimizer/{at}/{key}/{k}": v for k, v in slot.items() if isinstance(v, Tensor)
                }
        out["progress"] = torch.tensor(
            [self.epoch, self.best[1], self.best[0]], dtype=torch.float64
        )
        return out

    def load_(self, state: dict[str, Tensor]) -> None:
        """Takes up the `state()` of an earlier `Fit` with the same model and settings."""

        def part(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}

        self.model.load_state_dict(part("model/"))
        self.helpers.load_state_dict(part("helpers/"))
        if self.average is not None:
            self.average.load_state_dict(part("average/"))
        self.best_weights = part("best/")
        for at, optimizer in enumerate(self.optimizers):
            params = [p for group in optimizer.param_groups for p in group["params"]]
            slots: dict[int, dict[str, Tensor]] = {}
            for name, value in part(f"optimizer/{at}/").items():
                key, _, leaf = name.partition("/")
                slots.setdefault(int(key), {})[leaf] = _laid_out_like(params[int(key)], value)
            optimizer.load_state_dict({**optimizer.state_dict(), "state": slots})
        epoch, best_epoch, best = state["progress"].tolist()
        self.epoch, self.best = int(epoch), (best, int(best_epoch))


def one_cycle(done: float, warmup: float) -> float:
    """Returns the learning-rate factor at share `done` (0..1) of the run: linear up over `warmup`, linear down to 0.

    It starts at 2%, so that the first step is a step.

    >>> one_cycle(0.5, 0.0), one_cycle(0.1, 0.2), one_cycle(1.0, 0.2)
    (0.5, 0.5, 0.0)
    """
    if done < warmup:
        return max(done / warmup, 0.02)
    return (1 - done) / (1 - warmup)


def _batch_norm_scales(model: nn.Module) -> list[nn.Parameter]:
    """The scales of the batch norms that train.

    Raises:
        TrainingError: if there are none.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    scales = [norm.weight for norm in norms if norm.affine and norm.weight.requires_grad]
    if not scales:
        raise TrainingError(
            "train: bn_penalty pulls at batch-norm scales, but the model trains none; leave it out"
        )
    return scales


def _hidden(model: nn.Module) -> list[nn.Parameter]:
    """The weights that Muon takes: convolutions and linear layers but the first and the last; a shared one once.

    A computed weight (weight norm and the like) is not a parameter: what it is computed from goes the way of the rest.
    """
    weights = [m.weight for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    ends = {id(w) for w in (*weights[:1], *weights[-1:])}
    inner = {
        id(w): w
        for w in weights
        if id(w) not in ends and isinstance(w, nn.Parameter) and w.requires_grad
    }
    return list(inner.values())


def _matrix(x: Tensor, weight: Tensor) -> Tensor:
    """A filter [o, i, h, w], or its gradient, as a matrix [o, h*w*i], its columns in the order of `weight`'s memory.

    The same memory if `x` lies like `weight`, a copy else.
    """
    if x.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last):
        x = x.permute(0, 2, 3, 1)
    return x.reshape(len(x), -1) if x.dim() == 4 else x


def _laid_out_like(parameter: Tensor, value: Tensor) -> Tensor:
    """Gives a saved momentum the memory layout of its parameter, which files do not keep."""
    return torch.empty_like(parameter).copy_(value) if value.shape == parameter.shape else value
