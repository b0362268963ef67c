"""Distillation: a student network learns from a teacher's outputs, features and attention maps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from fedpress.core.inputs import Inputs, call, shape_of, shape_text
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
        description="divides the logits of both networks before they are compared; higher shows "
        "more of the small probabilities",
    )
    weight: float = Field(
        default=0.9, ge=0, le=1, description="share of the teacher's outputs against the targets"
    )
    features: tuple[Pair, ...] = Field(
        default=(), description="modules whose outputs the student imitates, value by value"
    )
    feature_weight: float = Field(default=1.0, ge=0, description="factor on the loss of `features`")
    attention: tuple[Pair, ...] = Field(
        default=(), description="modules whose attention maps the student imitates"
    )
    attention_weight: float = Field(
        default=1.0, ge=0, description="factor on the loss of `attention`"
    )


def feature_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Returns half the squared distance of features, divided by the teacher's squared norm.

    FitNets (Romero et al. 2015, arXiv:1412.6550), equation 3; the division makes it independent of
    the features' scale.

    Args:
        student: features of any shape.
        teacher: features of the same shape.
    """
    # A teacher of zeros has no scale to divide by.
    return (student - teacher).square().sum() / (2 * teacher.square().sum().clamp_min(1e-12))


def attention_map(x: Tensor) -> Tensor:
    """Returns the mean square over channels of [n, C, ...], as unit vectors [n, positions].

    It has no channel axis, so networks of different widths can be compared. Zagoruyko and Komodakis
    (2017, arXiv:1612.03928), section 3.1.
    """
    return F.normalize(x.square().mean(1).flatten(1), dim=1, eps=1e-12)


def attention_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Returns half the squared distance of the attention maps, averaged over examples.

    Zagoruyko and Komodakis (2017, arXiv:1612.03928), equation 2.

    Args:
        student: features [n, C, ...].
        teacher: features [n, C', ...] with the same positions.
    """
    return (attention_map(student) - attention_map(teacher)).square().sum(1).mean() / 2


@contextmanager
def outputs(model: nn.Module, names: tuple[str, ...]) -> Iterator[dict[str, Tensor]]:
    """Within the block collects the outputs of the modules `names` in the latest forward pass.

    Raises:
        TrainingError: if `model` has no such module, or its output is not a tensor.
    """
    found: dict[str, Tensor] = {}
    modules = dict(model.named_modules())

    def keep(at: int, name: str, output: object) -> None:
        if not isinstance(output, Tensor):
            raise TrainingError(
                f"the module '{name}' returns a {type(output).__name__}, not a tensor",
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

            # The defaults hold the values of this turn of the loop.
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
    """The training objective of a student.

    Training runs inside `watching`, and the parameters of `helpers` are trained with the student's.
    The teacher is frozen and in evaluation mode; it sees the same inputs as the student, including
    augmentation.

    Args:
        teacher: the network to learn from.
        student: the network that learns.
        settings: what to learn.
        example: prepared inputs [n, ...], n >= 2, with which shapes are compared.
        task: what is learned.
        context: returns the context in which the teacher runs, for instance autocast.
        seed: of the projections' initial weights.

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
        # In training mode the teacher's batch norms and dropout would change its answers.
        self.teacher = teacher.eval().requires_grad_(False)
        self.settings = settings
        self.task = task
        self.context = context
        self.features = _pairs(settings.features)
        self.attention = _pairs(settings.attention)
        # The student's features of the latest forward pass, by module name.
        self.seen: dict[str, Tensor] = {}
        self.helpers = nn.ModuleList()
        """One projection for each pair of features: `Identity` if their widths are equal."""
        self._bind(student, example, public_stream(seed, "projections"))

    def _bind(self, student: nn.Module, example: Inputs, chance: RandomSource) -> None:
        """Runs both networks on `example`, checks that they fit, and creates the projections."""
        # Batch norms would change in training mode, and a batch of one would fail.
        modes = [(module, module.training) for module in student.modules()]
        student.eval()
        try:
            with torch.no_grad(), self.watching(student):
                logits = call(student, example)
                teacher_features, teacher_logits = self.teach(example)
        finally:
            for module, mode in modes:
                module.training = mode

        _check_logits(logits, teacher_logits)
        for at, (mine, theirs) in enumerate(self.features):
            shape = self.seen[mine].shape
            with renaming({"features": f"features[{at}]"}):
                helper = projection(mine, shape, teacher_features[theirs].shape, chance)
            self.helpers.append(helper)

        for at, (mine, theirs) in enumerate(self.attention):
            shape, teacher_shape = self.seen[mine].shape, teacher_features[theirs].shape
            if len(shape) < 3 or shape[2:] != teacher_shape[2:]:
                raise TrainingError(
                    (
                        f"attention compares positions, but '{mine}' has shape {list(shape[1:])} "
                        f"and the teacher's '{theirs}' {list(teacher_shape[1:])}"
                    ),
                    place=f"attention[{at}]",
                    cure="name modules that return [channels, ...] with equal positions",
                )
        self.seen.clear()

    @contextmanager
    def watching(self, student: nn.Module) -> Iterator[None]:
        """Within the block the student's features are kept for the loss."""
        names = tuple(mine for mine, _ in (*self.features, *self.attention))
        with renaming(self._keys), outputs(student, names) as self.seen:
            yield

    @property
    def _keys(self) -> dict[str, str]:
        """Maps places in errors of `outputs` (`names[2]`) to settings (`attention[0]`)."""
        keys = [f"features[{at}]" for at in range(len(self.features))]
        keys += [f"attention[{at}]" for at in range(len(self.attention))]
        return {f"names[{at}]": key for at, key in enumerate(keys)}

    def __call__(self, student: nn.Module, x: Inputs, logits: Tensor, y: Tensor) -> Tensor:
        """Returns the loss of a batch.

        Args:
            student: the network that learns.
            x: inputs [n, ...].
            logits: the student's outputs [n, ...] for them.
            y: targets.
        """
        s = self.settings
        teacher_features, teacher_logits = self.teach(x)
        loss = s.weight * self.task.soft_loss(logits, teacher_logits, s.temperature)
        if s.weight < 1:
            loss = loss + (1 - s.weight) * self.task.loss(logits, y)
        for (mine, theirs), project in zip(self.features, self.helpers, strict=True):
            projected = project(self.seen[mine].float())
            loss = loss + s.feature_weight * feature_loss(projected, teacher_features[theirs])
        for mine, theirs in self.attention:
            own = self.seen[mine].float()
            loss = loss + s.attention_weight * attention_loss(own, teacher_features[theirs])
        return loss

    @torch.no_grad()
    def teach(self, x: Inputs) -> tuple[dict[str, Tensor], Tensor]:
        """Returns the teacher's features by module name and its logits [n, ...], for inputs `x`.

        Raises:
            TrainingError: if the teacher does not take such inputs.
        """
        names = tuple(theirs for _, theirs in (*self.features, *self.attention))
        with self.context(), renaming(self._keys), outputs(self.teacher, names) as features:
            try:
                logits = call(self.teacher, x)
            # What torch raises for inputs of a wrong shape or type.
            except (RuntimeError, ValueError, IndexError) as error:
                raise TrainingError(
                    (
                        f"the teacher does not take inputs of shape {shape_text(shape_of(x))} "
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
        # float32 also under autocast, where differences of half-precision numbers would be coarse.
        return {name: value.float() for name, value in features.items()}, logits.float()


class Projection(nn.Module):
    """A 1x1 convolution over dimension `axis`, from the student's width to the teacher's."""

    def __init__(self, weight: Tensor, axis: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        """Maps [..., width, ...] to [..., teacher's width, ...]."""
        return F.linear(x.movedim(self.axis, -1), self.weight).movedim(-1, self.axis)


def _pairs(names: tuple[Pair, ...]) -> tuple[tuple[str, str], ...]:
    """Returns (student's, teacher's) module names; a single name is that of both."""
    pairs = []
    for name in names:
        if isinstance(name, str):
            pairs.append((name, name))
        else:
            pairs.append(name)
    return tuple(pairs)


def _check_logits(logits: Tensor, teacher_logits: Tensor) -> None:
    """Refuses a teacher with outputs of another shape, or outputs that are not finite."""
    if teacher_logits.shape != logits.shape:
        raise TrainingError(
            (
                f"the teacher gives outputs {list(teacher_logits.shape[1:])} for one example, the "
                f"student {list(logits.shape[1:])}"
            ),
            place="teacher",
            cure="give a teacher of the same classes",
        )
    if not teacher_logits.isfinite().all():
        raise TrainingError(
            "the teacher's outputs hold NaN or infinity",
            place="teacher",
            cure="give a teacher that is trained",
        )


def projection(name: str, mine: torch.Size, theirs: torch.Size, chance: RandomSource) -> nn.Module:
    """Returns a module that brings the student's features to the teacher's shape.

    Args:
        name: of the student's module, for errors.
        mine: shape of the student's features.
        theirs: shape of the teacher's features; only the channels may differ (dimension 1 or the
            last).
        chance: source of the initial weights.

    Raises:
        TrainingError: if the shapes differ otherwise.
    """
    if mine == theirs:
        return nn.Identity()

    # Channels are the second axis of images and the last one of tokens.
    differ = []
    for i, (a, b) in enumerate(zip(mine, theirs, strict=False)):
        if a != b:
            differ.append(i)
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
    # Outputs then have the variance of the inputs.
    weight = chance.normal(wide, narrow, dtype=torch.float32) / narrow**0.5
    return Projection(weight, axis)
