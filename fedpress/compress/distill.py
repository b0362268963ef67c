"""Distillation: a student learns from a teacher's outputs, features and attention; an objective of `Fit`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from fedpress.core.inputs import Inputs, call, shape_of, shape_told
from fedpress.core.random_source import RandomSource, public_stream
from fedpress.errors import TrainingError, renaming, suggestion
from fedpress.tasks import Task

Pair = str | tuple[str, str]


class DistillSettings(BaseModel):
    """What a student learns from its teacher.

    The loss is `(1 - weight) * task.loss + weight * task.soft_loss`, plus the terms of features
    and attention. The soft loss of a classification is `T^2 * KL(teacher || student)` at
    temperature T, that of a regression the squared difference of the outputs. A module is named
    once for both networks, or as [student's, teacher's].
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    temperature: float = Field(
        default=4.0,
        gt=0,
        le=1e4,
        description="divides the logits of both networks before they are compared; higher shows more "
        "of the small probabilities",
    )
    weight: float = Field(
        default=0.9, ge=0, le=1, description="share of the teacher's outputs against the targets"
    )
    features: tuple[Pair, ...] = Field(
        default=(), description="modules whose outputs the student imitates, value by value"
    )
    feature_weight: float = Field(default=1.0, ge=0, description="factor on the loss of `features`")
    attention: tuple[Pair, ...] = Field(
        default=(), description="modules whose outputs are strong at the same positions"
    )
    attention_weight: float = Field(
        default=1.0, ge=0, description="factor on the loss of `attention`"
    )


def feature_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Returns half the squared distance of features of one shape, in units of the teacher's squared length.

    FitNets (Romero et al. 2015, arXiv:1412.6550), equation 3, made free of the scale of the
    features.
    """
    return (student - teacher).square().sum() / (2 * teacher.square().sum().clamp_min(1e-12))


def attention_map(x: Tensor) -> Tensor:
    """Returns how active each position of features [n, C, ...] is, as unit vectors [n, positions].

    The mean square over channels: so networks of other widths compare. Zagoruyko and Komodakis
    (2017, arXiv:1612.03928), section 3.1.
    """
    return F.normalize(x.square().mean(1).flatten(1), dim=1, eps=1e-12)


def attention_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Returns half the squared distance of the attention maps [n, positions], averaged over examples (equation 2)."""
    return (attention_map(student) - attention_map(teacher)).square().sum(1).mean() / 2


@contextmanager
def outputs(model: nn.Module, names: tuple[str, ...]) -> Iterator[dict[str, Tensor]]:
    """Collects what the modules `names` of `model` put out in its latest forward pass, while the context lasts.

    Raises:
        TrainingError: if `model` has no such module, or its output is no tensor.
    """
    found: dict[str, Tensor] = {}
    modules = dict(model.named_modules())

    def keep(at: int, name: str, output: object) -> None:
        if not isinstance(output, Tensor):
            raise TrainingError(
                f"the module '{name}' puts out a {type(output).__name__}, not a tensor",
                place=f"names[{at}]",
                cure="name another",
            )
        found[name] = output

    handles = []
    try:
        for at, name in enumerate(names):
            if name not in modules:
                raise TrainingError(
                    f"{type(model).__name__} has no module '{name}'",
                    place=f"names[{at}]",
                    cure=suggestion(name, list(modules)) or "print(model) shows all names",
                )

            def hook(
                _: nn.Module, __: object, output: object, at: int = at, name: str = name
            ) -> None:
                keep(at, name, output)

            handles.append(modules[name].register_forward_hook(hook))
        yield found
    finally:
        for handle in handles:
            handle.remove()


class Distillation:
    """The objective of a student: call `watching` around the training, and train `helpers` with the student.

    The teacher is put into evaluation mode and frozen; it sees what the student sees, augmentation
    included.

    Args:
        teacher: the network to learn from.
        student: the network that learns.
        settings: what to learn.
        example: prepared inputs [n, ...], n >= 2, on which shapes are compared.
        task: what is learned.
        context: makes the context in which the teacher runs, for instance autocast.
        seed: of the projections' first weights.

    Raises:
        TrainingError: if the networks do not fit each other: classes, modules, shapes, or values
            that are not finite.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        settings: DistillSettings,
        example: Inputs,
        task: Task,
        *,
        context: Callable[[], AbstractContextManager[object]] = nullcontext,
        seed: int = 0,
    ) -> None:
        self.teacher, self.settings = teacher.eval().requires_grad_(False), settings
        self.task = task
        self.context = context
        self.features, self.attention = _pairs(settings.features), _pairs(settings.attention)
        self.seen: dict[str, Tensor] = {}
        self.helpers = nn.ModuleList()
        """The projections of the student's features, one for each pair: `Identity` where widths are equal."""
        self._bind(student, example, public_stream(seed, "projections"))

    def _bind(self, student: nn.Module, example: Inputs, chance: RandomSource) -> None:
        modes = [(module, module.training) for module in student.modules()]
        student.eval()
        try:
            with torch.no_grad(), self.watching(student):
                logits = call(student, example)
                theirs, taught = self.teach(example)
        finally:
            for module, mode in modes:
                module.training = mode
        if taught.shape != logits.shape:
            raise TrainingError(
                (
                    f"the teacher gives outputs {list(taught.shape[1:])} for one example, the "
                    f"student {list(logits.shape[1:])}"
                ),
                place="teacher",
                cure="give a teacher of the same classes",
            )
        if not taught.isfinite().all():
            raise TrainingError(
                "the teacher's outputs hold NaN or infinity",
                place="teacher",
                cure="give a teacher that is trained",
            )
        for at, (mine, other) in enumerate(self.features):
            with renaming({"features": f"features[{at}]"}):
                self.helpers.append(
                    projection(mine, self.seen[mine].shape, theirs[other].shape, chance)
                )
        for at, (mine, other) in enumerate(self.attention):
            a, b = self.seen[mine].shape, theirs[other].shape
            if len(a) < 3 or a[2:] != b[2:]:
                raise TrainingError(
                    (
                        f"attention compares positions, but '{mine}' has shape {list(a[1:])} and the "
                        f"teacher's '{other}' {list(b[1:])}"
                    ),
                    place=f"attention[{at}]",
                    cure="name modules that put out [channels, ...] with equal positions",
                )
        self.seen.clear()

    @contextmanager
    def watching(self, student: nn.Module) -> Iterator[None]:
        """Keeps the features of the student's latest forward pass while the context lasts."""
        names = tuple(mine for mine, _ in (*self.features, *self.attention))
        with renaming(self._keys), outputs(student, names) as self.seen:
            yield

    @property
    def _keys(self) -> dict[str, str]:
        """The settings' words for the places in the `names` of modules."""
        keys = [f"features[{at}]" for at in range(len(self.features))]
        keys += [f"attention[{at}]" for at in range(len(self.attention))]
        return {f"names[{at}]": key for at, key in enumerate(keys)}

    def __call__(self, student: nn.Module, x: Inputs, logits: Tensor, y: Tensor) -> Tensor:
        """Returns the loss of a batch: inputs `x` [n, ...], its `logits` [n, ...], targets `y`."""
        s = self.settings
        theirs, taught = self.teach(x)
        loss = s.weight * self.task.soft_loss(logits, taught, s.temperature)
        if s.weight < 1:
            loss = loss + (1 - s.weight) * self.task.loss(logits, y)
        for (mine, other), project in zip(self.features, self.helpers, strict=True):
            loss = loss + s.feature_weight * feature_loss(
                project(self.seen[mine].float()), theirs[other]
            )
        for mine, other in self.attention:
            loss = loss + s.attention_weight * attention_loss(
                self.seen[mine].float(), theirs[other]
            )
        return loss

    @torch.no_grad()
    def teach(self, x: Inputs) -> tuple[dict[str, Tensor], Tensor]:
        """Returns the teacher's features by module name, and its logits [n, ...], for the student's inputs `x`.

        Raises:
            TrainingError: if the teacher does not take such inputs.
        """
        names = tuple(other for _, other in (*self.features, *self.attention))
        with self.context(), renaming(self._keys), outputs(self.teacher, names) as theirs:
            try:
                logits = call(self.teacher, x)
            except (RuntimeError, ValueError, IndexError) as error:
                raise TrainingError(
                    (
                        f"the teacher does not take inputs of shape {shape_told(shape_of(x))} "
                        f"({str(error).splitlines()[0]})"
                    ),
                    place="teacher",
                    cure="give a teacher of the same inputs",
                ) from error
        if not isinstance(logits, Tensor):
            raise TrainingError(
                f"the teacher returns {type(logits).__name__}",
                place="teacher",
                cure="it must return logits",
            )
        return {name: value.float() for name, value in theirs.items()}, logits.float()


class Projection(nn.Module):
    """A learned 1x1 convolution over dimension `axis` without bias: features of one width become those of another."""

    def __init__(self, weight: Tensor, axis: int) -> None:
        super().__init__()
        self.weight, self.axis = nn.Parameter(weight), axis

    def forward(self, x: Tensor) -> Tensor:
        """Maps [..., width, ...] to [..., teacher's width, ...]."""
        return F.linear(x.movedim(self.axis, -1), self.weight).movedim(-1, self.axis)


def _pairs(names: tuple[Pair, ...]) -> tuple[tuple[str, str], ...]:
    return tuple((name, name) if isinstance(name, str) else name for name in names)


def projection(name: str, mine: torch.Size, theirs: torch.Size, chance: RandomSource) -> nn.Module:
    """What brings the student's features to the teacher's shape: at most one dimension differs, that of channels."""
    if mine == theirs:
        return nn.Identity()
    differ = [i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b]
    if len(mine) != len(theirs) or len(differ) != 1 or differ[0] not in (1, len(mine) - 1):
        raise TrainingError(
            (
                f"the features of '{name}' have shape {list(mine[1:])}, the teacher's "
                f"{list(theirs[1:])}"
            ),
            place="features",
            cure="name modules whose outputs differ in the number of channels only",
        )
    (axis,) = differ
    wide, narrow = theirs[axis], mine[axis]
    weight = chance.normal(wide, narrow, dtype=torch.float32) / narrow**0.5
    return Projection(weight, axis)
