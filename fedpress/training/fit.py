"""`Fit`: the training loop on public examples, as a generator of steps that can be resumed."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fedpress.core.examples import Arrays, Preprocess, resized
from fedpress.core.inputs import Inputs, is_image
from fedpress.core.log import logger
from fedpress.core.outputs import as_float32
from fedpress.core.parameters import tensors_under
from fedpress.core.random import derive
from fedpress.core.random_source import public_stream, seed_generators_
from fedpress.errors import DivergedError
from fedpress.nn.quantized import kept_entries
from fedpress.tasks import Task
from fedpress.training.augment import augment
from fedpress.training.checks import batch_norm_scales, check_training
from fedpress.training.device import autocast, find, laid_out, place_, uses_bf16
from fedpress.training.evaluate import evaluate, outputs
from fedpress.training.optimizers import Optimizers
from fedpress.training.schedule import factor
from fedpress.training.settings import TrainSettings
from fedpress.training.watch import Watch, steps_late

log = logger(__name__)

Objective = Callable[[nn.Module, Inputs, Tensor, Tensor], Tensor]
"""Function of a batch that returns its loss.

Its arguments are the model, and standardised inputs, float32 outputs and targets [n, ...].
"""


@dataclass(frozen=True)
class EpochRecord:
    """The result of an epoch.

    Attributes:
        epoch: number of the epoch, from 1.
        epochs: number of epochs of the training.
        loss: mean training loss.
        score: primary metric on the validation set; None if there is no validation set.
        metric: key of the primary metric.
        image_size: side of the images in pixels; None if examples are no images.
    """

    epoch: int
    epochs: int
    loss: float
    score: float | None
    metric: str
    image_size: int | None


@dataclass(frozen=True)
class Step:
    """Progress of a training: `done` of `total` optimizer steps have been taken."""

    done: int
    total: int


class Fit:
    """A training of a model. Iterating over `epochs()` does the training.

    `epochs()` yields after every step, so the caller can change weights between steps, for example
    to apply masks. A training that is resumed with `state()` and `load_()` gives bit-identical
    results.

    Args:
        model: the model, trained in place.
        settings: epochs, optimizer, learning rate and so on.
        task: defines loss and metrics.
        seed: seed for the order of examples, augmentation and dropout.
        objective: a loss that replaces the task's loss; None: the task's loss.
        helpers: a module that the objective uses, such as a projection for distillation. It is
            trained too, but is not part of the result.
        sparse: names of pruned parameters, whose zeros stay zero.
        device: the device for training; None: `find()`.
        late: number of steps after which a loss is read; None: `steps_late` of the device. It
            changes no result.

    Attributes:
        epoch: number of finished epochs.
        best: best validation score and its epoch, from 0; the epoch is -1 before the first score.
        best_weights: weights of that epoch, as a state dict; empty without `patience`.
        optimizers: the optimizers.
        average: the moving average of the weights; None without `ema`.
        zeros: pairs of a pruned parameter and the mask of its pruned entries.
        scales: batch-norm scales under the L1 penalty `bn_penalty`.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: TrainSettings,
        *,
        task: Task,
        seed: int,
        objective: Objective | None = None,
        helpers: nn.Module | None = None,
        sparse: Sequence[str] = (),
        device: torch.device | None = None,
        late: int | None = None,
    ) -> None:
        self.device = device or find()
        self.late = steps_late(self.device) if late is None else late
        self.model, self.settings, self.seed = place_(model, self.device), settings, seed
        self.objective = objective or self._task_loss
        self.task = task.smoothed(settings.label_smoothing)
        self.helpers = (helpers or nn.Module()).to(self.device)
        weights = dict(model.named_parameters(remove_duplicate=False))
        self.zeros = [(weights[name], ~kept) for name, kept in kept_entries(model, sparse).items()]
        self.scales: list[nn.Parameter] = []
        if settings.epochs and settings.bn_penalty:
            self.scales = batch_norm_scales(model)
        self.average = None
        # Buffers are averaged too, because averaged weights need matching batch-norm statistics.
        if settings.ema:
            self.average = AveragedModel(
                model, multi_avg_fn=get_ema_multi_avg_fn(settings.ema), use_buffers=True
            )
        self.optimizers = Optimizers(self.model, self.helpers, settings)
        if settings.epochs:
            log.info(
                "training on %s in %s with %s, rate %g (%s)",
                self.device,
                "bf16" if uses_bf16(model, settings.precision) else "float32",
                settings.optimizer,
                settings.lr,
                settings.lr_schedule,
            )
        self.epoch = 0
        self.best = (self.task.worst, -1)
        self.best_weights: dict[str, Tensor] = {}

    def result_(self) -> nn.Module:
        """Returns the model with its final weights.

        They are those of the last epoch; with `patience`, those of the epoch with the best
        validation metric. With `ema`, the moving average of the weights at that epoch is taken.
        """
        if self.settings.patience and self.best_weights:
            self.model.load_state_dict(self.best_weights)
        else:
            self.model.load_state_dict(self._current().state_dict())
        return self.model

    def _current(self) -> nn.Module:
        """Returns the model with averaged weights; without `ema` the model itself."""
        if self.average is not None and self.average.n_averaged > 0:
            averaged: nn.Module = self.average.module
            return averaged
        return self.model

    @property
    def finished(self) -> bool:
        """Whether all epochs are done, or the metric has not improved for `patience` epochs."""
        _, best_epoch = self.best
        patience = self.settings.patience
        waited = self.epoch - 1 - best_epoch
        out_of_patience = patience > 0 and best_epoch >= 0 and waited >= patience
        return self.epoch >= self.settings.epochs or out_of_patience

    def epochs(
        self, train: Arrays, validation: Arrays, preprocess: Preprocess
    ) -> Iterator[Step | EpochRecord]:
        """Trains the model; yields a `Step` after each step and a record after each epoch.

        After each epoch the caller may save `state()`, from which training can be resumed.

        Raises:
            TrainingError: if the settings do not fit the data (see `check_training`).
            DivergedError: if the loss or a trained parameter is not finite. The error names the
                step. After a loss that is not finite, the training is in the state before its step,
                even if the loss was read later.
        """
        check_training(self.model, self.settings, train, validation, preprocess, self.task)
        # All examples are moved at once: copying each batch to a GPU would take longer.
        train = Arrays(train.x.to(self.device), train.y.to(self.device))
        side, images = None, train.x
        while not self.finished:
            now = self.settings.side(self.epoch)
            if now != side:
                side, images = now, _at_size(train, now).x
            loss = yield from self._epoch(Arrays(images, train.y), preprocess)
            score = None
            if len(validation):
                score = evaluate(
                    self._current(),
                    _at_size(validation, side),
                    preprocess,
                    self.task,
                    precision=self.settings.precision,
                ).score
                self._remember_(score, full_size=side is None)
            self.epoch += 1
            size = images.shape[-1] if is_image(images) else None
            yield EpochRecord(
                self.epoch, self.settings.epochs, loss, score, self.task.primary, size
            )

    def _remember_(self, score: float, *, full_size: bool) -> None:
        """Notes the score if it is the best so far; with `patience` also keeps the weights."""
        # Scores at a smaller image size cannot be compared with scores at full size.
        if self.settings.patience and not full_size:
            return
        if not self.task.better(score, self.best[0]):
            return
        self.best = (score, self.epoch)
        # Cloned, since training goes on with the same tensors.
        if self.settings.patience:
            self.best_weights = {k: v.clone() for k, v in self._current().state_dict().items()}

    def _epoch(self, train: Arrays, preprocess: Preprocess) -> Generator[Step, None, float]:
        s, n = self.settings, len(train)
        # Each epoch has its own random streams, so that a resumed run draws the same numbers.
        chance = public_stream(self.seed, "epoch", self.epoch)
        seed_generators_(derive(self.seed, "dropout", self.epoch))
        order = chance.permutation(n)
        # For flip "alternate": one half of the images is mirrored in even epochs, the other half in
        # odd epochs. So two consecutive epochs show both versions of every image.
        mirrored = public_stream(self.seed, "flip").uniform(n) < 0.5
        mirrored ^= self.epoch % 2 == 1
        # An incomplete batch at the end is skipped; each epoch skips other examples. If there are
        # fewer examples than a batch has, they are the only batch.
        steps = max(1, n // s.batch_size)
        self.model.train()
        watch = Watch(self.state if self.late else self._buffers, self.late)
        losses: list[float] = []
        for step in range(steps):
            index = order[step * s.batch_size : (step + 1) * s.batch_size]
            done = (self.epoch + step / steps) / s.epochs
            self.optimizers.set_rate_(factor(done, s))
            batch = train.take(index)
            x = augment(batch.x, s.augment, chance, flipped=mirrored[index])
            watch.keep_()
            loss = self._loss(preprocess(x.to(self.device)), batch.y.to(self.device))
            # Checked before the step: on a CPU, a bad loss then changes no weight.
            losses += self._finite(watch, watch.see(loss))
            self._step_(loss)
            yield Step(self.epoch * steps + step + 1, s.epochs * steps)
        losses += self._finite(watch, watch.rest())
        # If the last step made a weight infinite, no later loss of this epoch shows it.
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and not torch.isfinite(parameter).all():
                raise self._diverged(f"'{name}' is not finite after epoch {self.epoch + 1}")
        # One by one, since Python 3.12 rounds `sum` differently.
        total = 0.0
        for value in losses:
            total += value
        return total / steps

    def _finite(self, watch: Watch, read: Iterator[tuple[int, float]]) -> list[float]:
        """Returns the losses in `read`; at one that is not finite, restores the state and raises.

        The state is that before the step of this loss.
        """
        losses = []
        for step, loss in read:
            if not math.isfinite(loss):
                kept = watch.kept(step)
                if self.late:
                    self.load_(kept)
                else:
                    for name, buffer in self._buffers().items():
                        buffer.copy_(kept[name])
                raise self._diverged(
                    f"the loss is {loss} at epoch {self.epoch + 1}, step {step + 1}"
                )
            losses.append(loss)
        return losses

    def _buffers(self) -> dict[str, Tensor]:
        """Returns what a forward pass can change, under the names of `state`."""
        out = {f"model/{k}": v for k, v in self.model.named_buffers()}
        return out | {f"helpers/{k}": v for k, v in self.helpers.named_buffers()}

    def _diverged(self, what: str) -> DivergedError:
        s = self.settings
        rates = f"lr (now {s.lr})"
        if s.optimizer == "muon":
            rates += f" or head_lr (now {s.head_lr})"
        return DivergedError(
            f"{what}",
            place="train",
            cure=(
                f"lower {rates} or check the data for wrong values; the last good checkpoint is "
                "kept"
            ),
        )

    def _loss(self, x: Inputs, y: Tensor) -> Tensor:
        x = laid_out(x, self.model)
        with autocast(self.model, self.settings.precision):
            logits = outputs(self.model, x)
        # The loss is computed in float32: sums and logarithms are too inaccurate in bfloat16.
        loss = self.objective(self.model, x, as_float32(logits), y)
        # Network slimming (Liu et al. 2017, arXiv:1708.06519, equation 1).
        if self.scales:
            lengths = torch.stack([scale.abs().sum() for scale in self.scales])
            loss = loss + self.settings.bn_penalty * lengths.sum()
        return loss

    def _step_(self, loss: Tensor) -> None:
        loss.backward()
        self.optimizers.step_()
        # Masking gradients is not enough: momentum and weight decay move pruned weights too.
        with torch.no_grad():
            for weight, zero in self.zeros:
                weight.masked_fill_(zero, 0)
        self.model.zero_grad(set_to_none=True)
        self.helpers.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update_parameters(self.model)

    def _task_loss(self, model: nn.Module, x: Inputs, outputs: Tensor, y: Tensor) -> Tensor:
        return self.task.loss(outputs, y)

    def state(self) -> dict[str, Tensor]:
        """Returns the state for `load_` as named tensors.

        Further training changes these tensors in place, so save or copy them at once.
        """
        out = {f"model/{k}": v for k, v in self.model.state_dict().items()}
        out |= {f"helpers/{k}": v for k, v in self.helpers.state_dict().items()}
        if self.average is not None:
            out |= {f"average/{k}": v for k, v in self.average.state_dict().items()}
        out |= {f"best/{k}": v for k, v in self.best_weights.items()}
        out |= {f"optimizer/{k}": v for k, v in self.optimizers.state().items()}
        # One float64 tensor: it represents the score and both epoch numbers exactly.
        out["progress"] = torch.tensor(
            [self.epoch, self.best[1], self.best[0]], dtype=torch.float64
        )
        return out

    def load_(self, state: dict[str, Tensor]) -> None:
        """Loads the `state()` of an earlier `Fit` with the same model and settings."""
        self.model.load_state_dict(tensors_under(state, "model/"))
        self.helpers.load_state_dict(tensors_under(state, "helpers/"))
        if self.average is not None:
            self.average.load_state_dict(tensors_under(state, "average/"))
        self.best_weights = tensors_under(state, "best/")
        self.optimizers.load_(tensors_under(state, "optimizer/"))
        epoch, best_epoch, best = state["progress"].tolist()
        self.epoch, self.best = int(epoch), (best, int(best_epoch))


def _at_size(arrays: Arrays, side: int | None) -> Arrays:
    """Returns images resized to `side` pixels; unchanged if `side` is None or `x` has no images."""
    if side and is_image(arrays.x):
        return replace(arrays, x=resized(arrays.x, side))
    return arrays
