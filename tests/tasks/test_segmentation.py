"""Segmentation: overlaps against torchmetrics and a plain loop, ignored pixels, warnings."""

import pytest
import torch

from fedpress.errors import DataError, ModelError
from fedpress.tasks import Segmentation, merged
from fedpress.tasks.base import IGNORED

NAMES = ("background", "road", "car", "sky")


def batch(n=9, side=6, seed=0):
    """Returns outputs [n, 4, side, side] and targets, of which some are ignored; no pixel is sky."""
    chance = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, 3, (n, side, side), generator=chance)
    targets[:, 0, :2] = IGNORED
    outputs = torch.randn(n, 4, side, side, generator=chance)
    outputs[:, 3] -= 100  # nor is any predicted as sky
    return outputs, targets


def test_mean_iou_is_that_of_torchmetrics():
    classification = pytest.importorskip("torchmetrics.classification")
    outputs, targets = batch()
    task = Segmentation(NAMES)
    library = classification.MulticlassJaccardIndex(4, ignore_index=IGNORED)
    library.update(outputs, targets)
    found = task.summary(merged(*(task.metrics(outputs[a::2], targets[a::2]) for a in range(2))))
    assert found["mean_iou"] == pytest.approx(float(library.compute()), rel=1e-5)
    f1 = classification.MulticlassF1Score(4, ignore_index=IGNORED, average="none")
    f1.update(outputs, targets)
    # The Dice coefficient of pixels is their F1.
    assert found["dice_by_class"][:3] == pytest.approx(f1.compute()[:3].tolist(), rel=1e-5)


def test_metrics_are_those_of_a_plain_loop_over_pixels():
    outputs, targets = batch(4)
    task = Segmentation(NAMES)
    predicted = outputs.argmax(1)
    pairs = list(zip(targets.flatten().tolist(), predicted.flatten().tolist(), strict=True))
    ious, dices = [], []
    right = total = 0
    for label in range(3):
        both = either = size = 0
        for truth, answer in pairs:
            if truth == IGNORED:
                continue
            both += truth == label and answer == label
            either += truth == label or answer == label
            size += (truth == label) + (answer == label)
            right += truth == label and answer == label
            total += truth == label
        ious.append(both / either)
        dices.append(2 * both / size)
    found = task.summary(task.metrics(outputs, targets))
    assert found["iou_by_class"] == [*map(pytest.approx, ious), None]
    assert found["mean_iou"] == pytest.approx(sum(ious) / 3)
    assert found["dice"] == pytest.approx(sum(dices) / 3)
    assert found["pixel_accuracy"] == pytest.approx(right / total)


def test_ignored_pixels_change_neither_loss_nor_metrics():
    outputs, targets = batch()
    task = Segmentation(NAMES)
    other = outputs.clone()
    other[:, :, 0, :2] += 50 * torch.randn(9, 4, 2)
    torch.testing.assert_close(task.loss(outputs, targets), task.loss(other, targets))
    assert task.summary(task.metrics(outputs, targets)) == task.summary(
        task.metrics(other, targets)
    )


def test_a_model_that_answers_only_background_is_warned_of():
    targets = torch.zeros(2, 10, 10, dtype=torch.int64)
    targets[:, 0, 0] = 1
    outputs = torch.zeros(2, 4, 10, 10)
    outputs[:, 0] = 5
    task = Segmentation(NAMES)
    found = task.summary(task.metrics(outputs, targets))
    assert (
        "answers 'background' at every pixel, which is right at 99.0%"
        in (found["mean_iou_warning"])
    )
    assert found["pixel_accuracy"] == 0.99
    assert found["mean_iou"] == pytest.approx(0.99 / 2)


def test_a_model_worse_than_the_largest_class_is_warned_of_and_a_good_one_is_not():
    targets = torch.zeros(2, 10, 10, dtype=torch.int64)
    targets[:, :3] = 1
    wrong = torch.nn.functional.one_hot(1 - targets, 4).movedim(-1, 1).float()
    task = Segmentation(NAMES)
    found = task.summary(task.metrics(wrong, targets))
    assert "no better than always answering 'background' (35.0%)" in found["mean_iou_warning"]
    good = task.summary(task.metrics(-wrong[:, :2], targets.clamp_max(1)))
    assert good["mean_iou_warning"] is None
    one = task.summary(task.metrics(wrong, torch.zeros_like(targets)))
    assert "all test pixels are 'background'" in one["mean_iou_warning"]


def test_weights_of_classes_count_public_pixels():
    targets = torch.tensor([[[0, 0, 0], [1, IGNORED, IGNORED]]])
    task = Segmentation(("a", "b")).weighted("balanced", targets)
    assert task.class_weights == pytest.approx((4 / (2 * 3), 4 / (2 * 1)))
    assert task.unweighted == Segmentation(("a", "b"))


@pytest.mark.parametrize("shape", [(2, 4), (2, 4, 3, 3), (2, 3, 6, 6)])
def test_outputs_that_are_no_map_of_classes_are_refused(shape):
    targets = torch.zeros(2, 6, 6, dtype=torch.int64)
    with pytest.raises(ModelError, match=r"expected \[4, 6, 6\].*; make it return 4 numbers"):
        Segmentation(NAMES).check(torch.zeros(shape), targets)


def test_a_class_for_each_example_is_refused():
    with pytest.raises(DataError, match=r"int64 \[n, h, w\]"):
        Segmentation(NAMES).check_targets(torch.zeros(4, dtype=torch.int64))
