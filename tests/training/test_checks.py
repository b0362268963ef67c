"""What would stop a training is refused before its first step."""

import copy

import pytest
import torch
from torch import nn

from fedpress.core.examples import Arrays
from fedpress.errors import TrainingError
from tests.training.trainings import (
    NONE,
    assert_same,
    fit_all,
    fitting,
    images,
    network,
    settings,
)


def test_one_public_example_under_batch_norm_is_refused_only_where_nothing_can_be_averaged():
    vectors = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.BatchNorm1d(8), nn.Linear(8, 10))
    for n, size, cure in (
        (1, 8, "give more public examples by .*data.public_share"),
        (4, 1, "take 2 or more"),
    ):
        with pytest.raises(
            TrainingError, match=rf"a batch norm needs two (examples )?to average over; {cure}"
        ):
            fit_all(fitting(vectors, settings(batch_size=size), seed=0), images(n))
    assert fit_all(fitting(vectors, settings(epochs=1), seed=0), images(9))
    assert fit_all(
        fitting(network("resnet"), settings(epochs=1), seed=0), images(1)
    )  # 8 x 8 pixels have statistics


def test_a_network_that_fails_on_a_single_example_is_refused():
    class Squeezes(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.head = (
                nn.Conv2d(3, 4, 3),
                nn.BatchNorm2d(4),
                nn.Linear(144, 10),
            )

        def forward(self, x):
            return self.head(self.norm(self.conv(x)).squeeze().flatten(1))

    with pytest.raises(
        TrainingError,
        match=r"^batch_size: got 1, but the network fails on a single example \(mat1 and mat2",
    ):
        fit_all(fitting(Squeezes(), settings(batch_size=1), seed=0), images(4))


@pytest.mark.parametrize(
    ("changes", "train", "validation", "message"),
    [
        ({}, NONE, NONE, "the public part has no examples"),
        ({"patience": 1}, images(), NONE, "^patience: early stopping needs a validation set"),
        (
            {"image_sizes": ((9, 1),)},
            images(),
            NONE,
            r"sides of 9 pixels, but examples are \[3, 8, 8\]",
        ),
        (
            {"image_sizes": ((4, 1),)},
            Arrays(torch.zeros(9, 192), torch.zeros(9)),
            NONE,
            r"examples are \[192\]",
        ),
        (
            {"image_sizes": ((6, 1),)},
            images(),
            NONE,
            r"cannot take images of 6 pixels \(mat1 and mat2",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused_before_the_first_step(
    changes, train, validation, message
):
    model = network("cnn")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TrainingError, match=message):
        fit_all(fitting(model, settings(**changes), seed=0), train, validation)
    assert_same(model.state_dict(), before)


def test_a_network_that_trains_nothing_is_refused():
    with pytest.raises(TrainingError, match="no parameter of the model has requires_grad"):
        fitting(network("mlp").requires_grad_(False), settings(), seed=0)


def test_a_penalty_on_scales_that_nobody_trains_is_refused():
    frozen = network("resnet")
    for parameter in frozen.parameters():
        parameter.requires_grad_(parameter.dim() > 1)
    for model in (network("mlp"), frozen):
        with pytest.raises(
            TrainingError,
            match="bn_penalty: it penalises batch-norm scales, but the model has no trainable batch norm",
        ):
            fit_all(fitting(model, settings(bn_penalty=0.1), seed=0), images())
