import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn

from fedpress.compress.distill import (
    Distillation,
    DistillSettings,
    attention_loss,
    attention_map,
    feature_loss,
    module_outputs,
)
from fedpress.core.random_source import public_stream
from fedpress.errors import TrainingError
from fedpress.models.plain import MLP
from fedpress.models.resnet import resnet_small
from fedpress.tasks import Classification
from fedpress.training.fit import Fit
from fedpress.training.settings import TrainSettings

TASK = Classification(tuple("abcde"))
STAGES = ("stages.0", "stages.1", "stages.2")


def network(width=4, seed=0, classes=5):
    torch.manual_seed(seed)
    return resnet_small(width=width, num_classes=classes)


def batch(n=6, seed=0, classes=5):
    chance = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 8, 8, generator=chance), torch.randint(
        0, classes, (n,), generator=chance
    )


def lesson(teacher, student, **changes):
    return Distillation(teacher, student, DistillSettings(**changes), batch()[0], TASK)


def loss_of(distillation, student, *, train=False):
    x, y = batch()
    student.train(train)
    with distillation.recording_features(student):
        return distillation(student, x, student(x), y)


def softened(row, temperature):
    """The plain twin of softmax."""
    top = max(row)
    weights = [math.exp((v - top) / temperature) for v in row]
    return [w / sum(weights) for w in weights]


@settings(deadline=None, max_examples=50)
@given(
    seed=st.integers(0, 1000),
    n=st.integers(1, 4),
    classes=st.integers(1, 5),
    temperature=st.floats(0.25, 20),
)
def test_logit_loss_is_the_divergence_summed_by_hand(seed, n, classes, temperature):
    student, teacher = torch.randn(
        2, n, classes, generator=torch.Generator().manual_seed(seed)
    ).double()
    total = 0.0
    for mine, theirs in zip(student.tolist(), teacher.tolist(), strict=True):
        q, p = softened(mine, temperature), softened(theirs, temperature)
        total += sum(b * math.log(b / a) for a, b in zip(q, p, strict=True))
    found = TASK.soft_loss(student, teacher, temperature).item()
    assert found == pytest.approx(temperature**2 * total / n, rel=1e-6, abs=1e-9)


def test_at_high_temperature_centred_logits_are_matched_by_square():
    """Hinton et al. 2015, section 2.1: the loss tends to sum (v - z)^2 / (2 classes) of logits with mean zero."""
    student, teacher = torch.randn(2, 8, 5, generator=torch.Generator().manual_seed(0)).double()
    student, teacher = (x - x.mean(1, keepdim=True) for x in (student, teacher))
    expected = (student - teacher).square().sum(1).mean() / (2 * 5)
    assert TASK.soft_loss(student, teacher, 1e4).item() == pytest.approx(expected.item(), rel=1e-3)


def test_attention_map_is_the_loop_over_positions():
    x = torch.randn(2, 3, 4, 5)
    for example, found in zip(x, attention_map(x), strict=True):
        energy = [
            sum(float(example[c, i, j]) ** 2 for c in range(3)) / 3
            for i in range(4)
            for j in range(5)
        ]
        length = math.sqrt(sum(e * e for e in energy))
        torch.testing.assert_close(found, torch.tensor([e / length for e in energy]))


def test_attention_loss_compares_networks_of_other_widths():
    student, teacher = torch.randn(3, 4, 5, 5), torch.randn(3, 9, 5, 5)
    distances = [
        (a - b).square().sum() / 2
        for a, b in zip(attention_map(student), attention_map(teacher), strict=True)
    ]
    torch.testing.assert_close(attention_loss(student, teacher), torch.stack(distances).mean())


def test_attention_of_dead_channels_is_no_nan():
    loss = attention_loss(torch.zeros(2, 3, 4, 4, requires_grad=True), torch.zeros(2, 5, 4, 4))
    loss.backward()
    assert loss == 0


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_feature_loss_is_free_of_the_scale_of_features(scale):
    student, teacher = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0))
    expected = 0.5 * sum(
        (a - b) ** 2
        for a, b in zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True)
    )
    expected /= sum(b**2 for b in teacher.flatten().tolist())
    assert feature_loss(scale * student, scale * teacher).item() == pytest.approx(
        expected, rel=1e-5
    )


def test_a_student_that_equals_its_teacher_gets_no_gradient():
    student = network().eval()
    teacher = network()
    loss = loss_of(lesson(teacher, student, weight=1.0, features=STAGES, attention=STAGES), student)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert all(p.grad.abs().max() < 1e-5 for p in student.parameters())


def test_weight_zero_is_the_cross_entropy_alone():
    student = network(seed=1).eval()
    x, y = batch()
    found = loss_of(lesson(network(), student, weight=0.0), student)
    torch.testing.assert_close(found, F.cross_entropy(student(x), y))


def test_the_whole_loss_is_the_sum_of_its_terms():
    student, teacher = network(seed=1).eval(), network(width=6).eval()
    how = {"temperature": 3.0, "weight": 0.7, "feature_weight": 2.0, "attention_weight": 5.0}
    pair = ("stages.0", "stages.0")
    distillation = Distillation(
        teacher,
        student,
        DistillSettings(features=(pair,), attention=STAGES, **how),
        batch()[0],
        TASK.smoothed(0.1),
    )
    found = loss_of(distillation, student)
    x, y = batch()
    with module_outputs(student, STAGES) as mine, module_outputs(teacher, STAGES) as theirs:
        a, b = student(x), teacher(x)
    (projection,) = distillation.projections
    wide = torch.einsum("oc,nchw->nohw", projection.weight, mine["stages.0"])
    expected = 0.3 * F.cross_entropy(a, y, label_smoothing=0.1) + 0.7 * TASK.soft_loss(a, b, 3.0)
    expected += 2 * feature_loss(wide, theirs["stages.0"])
    expected += 5 * sum(attention_loss(mine[name], theirs[name]) for name in STAGES)
    torch.testing.assert_close(found, expected)


def test_the_teacher_is_frozen_and_stays_as_it_was():
    teacher, student = network(width=6).train(), network()
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    distillation = lesson(teacher, student, features=STAGES, attention=STAGES)
    loss_of(distillation, student, train=True).backward()
    assert not any(m.training for m in teacher.modules())
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())
    assert all(
        p.grad is not None for p in [*student.parameters(), *distillation.projections.parameters()]
    )


def test_binding_changes_neither_the_student_nor_its_modes():
    student = network().train()
    student.norm.eval()
    before = {k: v.clone() for k, v in student.state_dict().items()}
    lesson(network(seed=1), student, features=STAGES)
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())
    assert student.training
    assert not student.norm.training
    assert not any(m._forward_hooks for m in student.modules())


@pytest.mark.parametrize(
    ("mine", "theirs", "axis"),
    [((6, 3), (6, 5), 1), ((6, 3, 4, 4), (6, 5, 4, 4), 1), ((6, 7, 3), (6, 7, 5), 2)],
)
def test_projections_widen_the_dimension_of_channels(mine, theirs, axis):
    from fedpress.compress.distill import projection

    project = projection("x", torch.Size(mine), torch.Size(theirs), public_stream(0))
    x = torch.randn(mine)
    assert project(x).shape == theirs
    assert torch.equal(project(x).movedim(axis, -1), x.movedim(axis, -1) @ project.weight.T)


def test_equal_widths_need_no_projection():
    distillation = lesson(network(seed=1), network(), features=STAGES)
    assert not list(distillation.projections.parameters())


def test_training_moves_the_projections_and_brings_student_and_teacher_together():
    from fedpress.core.examples import Arrays, Preprocess

    teacher, student = network(width=6), network(seed=1)
    distillation = lesson(teacher, student, weight=1.0, features=STAGES)
    first = [p.clone() for p in distillation.projections.parameters()]
    images = Arrays(
        torch.randint(0, 256, (32, 3, 8, 8), dtype=torch.uint8), torch.zeros(32, dtype=torch.int64)
    )
    fit = Fit(student, TrainSettings(epochs=8, batch_size=16, lr=0.02), task=TASK, seed=0, objective=distillation,
              helpers=distillation.projections)  # fmt: skip
    with distillation.recording_features(student):
        losses = [
            e.loss
            for e in fit.epochs(images, images.take(slice(0)), Preprocess((0.5,), (0.25,)))
            if hasattr(e, "loss")
        ]
    assert losses[-1] < 0.7 * losses[0]
    assert not any(
        torch.equal(a, b) for a, b in zip(first, distillation.projections.parameters(), strict=True)
    )


class Odd(nn.Module):
    def __init__(self, returned):
        super().__init__()
        self.returned = returned
        self.inner = nn.Identity()

    def forward(self, x):
        self.inner((x, x))
        return self.returned(x)


NAN = Odd(lambda x: torch.full((len(x), 5), math.nan))
TEACHERS = {
    "other classes": (
        network(classes=7),
        {},
        r"outputs \[7\] .* the student \[5\]; give a teacher of the same classes",
    ),
    "other inputs": (
        MLP(in_features=12, num_classes=5),
        {},
        r"does not take inputs of shape \[3, 8, 8\]",
    ),
    "NaN": (NAN, {}, "NaN or infinity"),
    "no logits": (Odd(lambda x: (x, x)), {}, "returns tuple; it must return logits"),
    "no such module": (
        network(),
        {"features": ["stage.0"]},
        r"no module 'stage.0'; did you mean 'stages.0'",
    ),
    "no tensor": (
        Odd(lambda x: x[:, 0, 0, :5]),
        {"features": [["stages.0", "inner"]]},
        "returns a tuple",
    ),
    "other positions": (
        network(),
        {"features": [["stages.0", "stages.1"]]},
        r"\[4, 8, 8\], the teacher's \[8, 4, 4\]",
    ),
    "attention to other positions": (
        network(),
        {"attention": [["stages.0", "stages.1"]]},
        "equal positions",
    ),
    "attention of a vector": (network(), {"attention": ["head"]}, "compares positions"),
}


@pytest.mark.parametrize("name", TEACHERS)
def test_a_teacher_that_does_not_fit_is_refused(name):
    teacher, how, message = TEACHERS[name]
    with pytest.raises(TrainingError, match=message):
        lesson(teacher, network(), **how)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": 0},
        {"temperature": math.inf},
        {"weight": 1.1},
        {"feature_weight": -1},
        {"hints": ()},
    ],
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValidationError):
        DistillSettings(**wrong)


def test_hooks_are_gone_after_the_context():
    student = network()
    with module_outputs(student, STAGES):
        assert student.stages[0]._forward_hooks
    with pytest.raises(TrainingError), module_outputs(student, ("stages.0", "nowhere")):
        pass
    assert not any(m._forward_hooks for m in student.modules())
