"""Computes the loss by which a student network learns from a teacher network (distillation)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.nn.functional as F
from pydantic import BaseModel, Field
from torch import Tensor, nn

from fedpress.core.inputs import Inputs, call, shape_of, shape_text
from fedpress.core.outputs import as_float32, output_tensors, outputs_text, spreads
from fedpress.core.random_source import RandomSource, public_stream
from fedpress.core.settings import SETTINGS
from fedpress.errors import TrainingError, renaming, suggestion
from fedpress.tasks import Task

Pair = str | tuple[str, str]
"""A module's name in both networks, or the pair (name in the student, name in the teacher)."""


class DistillSettings(BaseModel):
    """Settings of distillation: the terms of the student's loss and their weights.

    The loss is `(1 - weight) * task.loss + weight * task.soft_loss`, plus the terms of features
    and attention. `task` is what the model learns, such as classification. For classification the
    soft loss is `T^2 * KL(teacher || student)` at temperature T; for regression it is the squared
    difference of the outputs.

    An entry of `features` or `attention` names a module: one string such as "layer2" if the module
    has this name in both networks, else a pair [student's name, teacher's name].
    """

    model_config = SETTINGS

    temperature: float = Field(
        default=4.0,
        gt=0,
        le=1e4,
        description="divides the logits of both networks before they are compared; a higher value "
        "gives small probabilities more weight",
    )
    weight: float = Field(
        default=0.9,
        ge=0,
        le=1,
        description="weight of the loss against the teacher's outputs; the loss against the "
        "targets has 1 - weight",
    )
    features: tuple[Pair, ...] = Field(
        default=(),
        description="modules whose outputs the student imitates (squared distance of features)",
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

    FitNets (Romero et al. 2015, arXiv:1412.6550), equation 3. The paper does not divide. The
    division makes the loss independent of the scale of the features.

    Args:
        student: features of any shape.
        teacher: features of the same shape.
    """
    # A teacher of zeros has no scale to divide by.
    return (student - teacher).square().sum() / (2 * teacher.square().sum().clamp_min(1e-12))


def attention_map(x: Tensor) -> Tensor:
    """Returns the attention map of features [n, C, ...]: unit vectors [n, positions].

    The value of a position is the mean square over channels. Since the map has no channel axis,
    networks of different widths can be compared. Zagoruyko and Komodakis (2017, arXiv:1612.03928),
    section 3.1.
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
def module_outputs(model: nn.Module, names: tuple[str, ...]) -> Iterator[dict[str, Tensor]]:
    """Yields a dictionary of the outputs of the modules `names`, by name.

    Every forward pass of `model` within the block overwrites these outputs.

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
                cure="name a module that returns one tensor",
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

            # Defaults are evaluated now: a closure would see the last `at` and `name` of the loop.
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
    """The distillation loss of a student network: call the object on each batch.

    Train inside `with distillation.recording_features(student)`, and give the parameters of
    `projections` to the student's optimizer. The teacher is frozen and in evaluation mode; it gets
    the same augmented inputs as the student.

    Args:
        teacher: the network to learn from.
        student: the network that learns.
        settings: the terms of the loss.
        example: prepared inputs [n, ...], n >= 2, on which both networks run once to compare their
            shapes.
        task: gives the loss on targets and the loss on the teacher's outputs.
        context: returns the context in which the teacher runs, for instance autocast.
        seed: seed of the projections' initial weights.

    Raises:
        TrainingError: if the numbers of classes or the shapes of features differ, a module does not
            exist, or the teacher's outputs are not finite.
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
        # Standard deviation of each of the teacher's outputs over the examples.
        self.spreads: list[float] = []
        # The student's features of the latest forward pass, by module name.
        self.student_features: dict[str, Tensor] = {}
        self.projections = nn.ModuleList()
        """For each pair of features a map to the teacher's width; `Identity` for equal widths."""
        self._create_projections(student, example, public_stream(seed, "projections"))

    def _create_projections(
        self, student: nn.Module, example: Inputs, chance: RandomSource
    ) -> None:
        """Runs both networks on `example`, checks that they fit, and creates the projections."""
        # In training mode this run would change the running statistics of batch norms.
        modes = [(module, module.training) for module in student.modules()]
        student.eval()
        try:
            with torch.no_grad(), self.recording_features(student):
                logits = call(student, example)
                teacher_features, teacher_logits = self.run_teacher(example)
        finally:
            for module, mode in modes:
                module.training = mode

        _check_logits(logits, teacher_logits)
        self.spreads = spreads([teacher_logits])
        # `renaming` turns the place of an error into the setting that the user wrote.
        for at, (mine, theirs) in enumerate(self.features):
            shape = self.student_features[mine].shape
            with renaming({"features": f"features[{at}]"}):
                helper = projection(mine, shape, teacher_features[theirs].shape, chance)
            self.projections.append(helper)

        for at, (mine, theirs) in enumerate(self.attention):
            shape, teacher_shape = self.student_features[mine].shape, teacher_features[theirs].shape
            if len(shape) < 3 or shape[2:] != teacher_shape[2:]:
                raise TrainingError(
                    (
                        f"attention compares positions, but '{mine}' has shape {list(shape[1:])} "
                        f"and the teacher's '{theirs}' {list(teacher_shape[1:])}"
                    ),
                    place=f"attention[{at}]",
                    cure="name modules that return [channels, ...] with equal positions",
                )
        # Features of the test run must not be taken for those of a training batch.
        self.student_features.clear()

    @contextmanager
    def recording_features(self, student: nn.Module) -> Iterator[None]:
        """Within the block, keeps the features of each forward pass of `student` for the loss."""
        names = tuple(mine for mine, _ in (*self.features, *self.attention))
        with renaming(self._keys), module_outputs(student, names) as self.student_features:
            yield

    @property
    def _keys(self) -> dict[str, str]:
        """Maps the place in an error of `module_outputs` to the setting that it comes from.

        Example: with two features, `names[2]` is `attention[0]`. In `names`, features come first.
        """
        keys = [f"features[{at}]" for at in range(len(self.features))]
        keys += [f"attention[{at}]" for at in range(len(self.attention))]
        return {f"names[{at}]": key for at, key in enumerate(keys)}

    def __call__(self, student: nn.Module, x: Inputs, logits: Tensor, y: Tensor) -> Tensor:
        """Returns the loss of a batch.

        Args:
            student: the network that learns.
            x: inputs [n, ...].
            logits: the student's outputs [n, ...] for `x`.
            y: targets.
        """
        s = self.settings
        teacher_features, teacher_logits = self.run_teacher(x)
        loss = s.weight * self._soft_loss(logits, teacher_logits)
        # At weight 1 the loss on targets has the factor 0, so it is not computed.
        if s.weight < 1:
            loss = loss + (1 - s.weight) * self.task.loss(logits, y)
        for (mine, theirs), project in zip(self.features, self.projections, strict=True):
            projected = project(self.student_features[mine].float())
            loss = loss + s.feature_weight * feature_loss(projected, teacher_features[theirs])
        for mine, theirs in self.attention:
            own = self.student_features[mine].float()
            loss = loss + s.attention_weight * attention_loss(own, teacher_features[theirs])
        return loss

    def _soft_loss(self, outputs: Tensor, teacher: Tensor) -> Tensor:
        """Returns the task's soft loss; without one, several outputs count as shares of variance.

        The squared difference of boxes in pixels would outweigh that of logits a thousand times.
        """
        if isinstance(outputs, Tensor) or self.task.own_soft_loss:
            return self.task.soft_loss(outputs, teacher, self.settings.temperature)
        return self.task.divergence(outputs, teacher, self.spreads)

    @torch.no_grad()
    def run_teacher(self, x: Inputs) -> tuple[dict[str, Tensor], Tensor]:
        """Returns the teacher's features by module name, and its logits [n, ...], for inputs `x`.

        Raises:
            TrainingError: if the teacher does not take such inputs or does not return one tensor,
                or if it lacks one of the modules, or such a module does not return one tensor.
        """
        names = tuple(theirs for _, theirs in (*self.features, *self.attention))
        with self.context(), renaming(self._keys), module_outputs(self.teacher, names) as features:
            try:
                logits = call(self.teacher, x)
            # torch raises one of these errors for inputs of a wrong shape or type.
            except (RuntimeError, ValueError, IndexError) as error:
                raise TrainingError(
                    (
                        f"the teacher does not take inputs of shape {shape_text(shape_of(x))} "
                        f"({str(error).splitlines()[0]})"
                    ),
                    place="teacher",
                    cure="give a teacher of the same inputs",
                ) from error

        if not isinstance(logits, Tensor) and not self.task.several_outputs:
            raise TrainingError(
                f"the teacher returns {type(logits).__name__}",
                place="teacher",
                cure="it must return logits",
            )
        # Autocast gives half-precision numbers, whose differences would be too coarse for a loss.
        return {name: value.float() for name, value in features.items()}, as_float32(logits)


class Projection(nn.Module):
    """A 1x1 convolution over dimension `axis`, from the student's width to the teacher's."""

    def __init__(self, weight: Tensor, axis: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        """Maps [..., width, ...] to [..., teacher's width, ...]."""
        # Not `nn.Conv2d`: the channels of tokens are the last axis.
        return F.linear(x.movedim(self.axis, -1), self.weight).movedim(-1, self.axis)


def _pairs(names: tuple[Pair, ...]) -> tuple[tuple[str, str], ...]:
    """Returns pairs (student's name, teacher's name); a single name stands for both."""
    pairs = []
    for name in names:
        if isinstance(name, str):
            pairs.append((name, name))
        else:
            pairs.append(name)
    return tuple(pairs)


def _check_logits(logits: Tensor, teacher_logits: Tensor) -> None:
    """Raises TrainingError if the teacher's outputs have another shape, or are not finite."""
    ours, theirs = output_tensors(logits), output_tensors(teacher_logits)
    if [t.shape for t in ours] != [t.shape for t in theirs]:
        raise TrainingError(
            (
                f"the teacher gives outputs {outputs_text(teacher_logits)} for one example, the "
                f"student {outputs_text(logits)}"
            ),
            place="teacher",
            cure="give a teacher of the same classes",
        )
    if not any(t.is_floating_point() for t in theirs):
        raise TrainingError(
            f"the teacher gives integers alone, {outputs_text(teacher_logits)} for one example",
            place="teacher",
            cure="make forward return floats, such as logits",
        )
    if not all(bool(t.isfinite().all()) for t in theirs):
        raise TrainingError(
            "the teacher's outputs contain NaN or infinity",
            place="teacher",
            cure="give a teacher that is trained",
        )


def projection(name: str, mine: torch.Size, theirs: torch.Size, chance: RandomSource) -> nn.Module:
    """Returns a module that brings the student's features to the teacher's shape.

    Args:
        name: name of the student's module, for errors.
        mine: shape of the student's features.
        theirs: shape of the teacher's features; only the number of channels may differ (axis 1 or
            the last axis).
        chance: source of the initial weights.

    Raises:
        TrainingError: if the shapes differ in another way.
    """
    if mine == theirs:
        return nn.Identity()

    # Channels are axis 1 of images [n, C, H, W] and the last axis of tokens [n, length, width].
    # Shapes with different numbers of axes are refused below.
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
    teacher_width, student_width = theirs[axis], mine[axis]
    # A sum over `student_width` products: this factor gives outputs the variance of the inputs.
    weight = chance.normal(teacher_width, student_width, dtype=torch.float32) / student_width**0.5
    return Projection(weight, axis)
