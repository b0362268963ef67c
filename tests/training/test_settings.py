"""The keys of a training stage."""

import pytest
from pydantic import ValidationError

from fedpress.training.settings import TrainSettings
from tests.training.trainings import (
    fit_all,
    fitting,
    images,
    network,
    settings,
)


def test_image_sizes_follow_their_schedule():
    s = settings(epochs=5, image_sizes=((4, 2), (6, 1)))
    assert [s.side(e) for e in range(6)] == [4, 4, 6, None, None, None]
    records = fit_all(fitting(network("resnet"), s, seed=0), images(), images(4, seed=1))
    assert [r.image_size for r in records] == [4, 4, 6, 8, 8]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"image_sizes": ((4, 2), (6, 2))},
            "image_sizes: these sizes take 4 epochs, but the training has only 3; give epochs=4",
        ),
        ({"image_sizes": ((3, 1),)}, "side >= 4"),
        ({"image_sizes": ((4, 0),)}, "epochs >= 1"),
        ({"image_sizes": (4, 2)}, "tuple"),
        ({"epochs": -1}, "greater than or equal to 0"),
        ({"lr": 0}, "greater than 0"),
        ({"momentum": 1.0}, "less than 1"),
        ({"warmup": 1.0}, "less than 1"),
        ({"batch_size": 0}, "greater than or equal to 1"),
        ({"optimizer": "adagrad"}, "'sgd', 'adamw', 'adam' or 'muon'"),
        ({"optimizer": "adamw", "momentum": 0.8}, "momentum: optimizer 'adamw' has no momentum; "),
        ({"betas": (0.8, 0.9)}, "betas: optimizer 'sgd' has no betas; leave betas out"),
        ({"optimizer": "adam", "betas": (0.8, 1.0)}, "less than 1"),
        ({"lr_schedule": "cosin"}, "'linear', 'cosine', 'constant', 'step' or 'onecycle'"),
        ({"lr_milestones": (0.5, 1.0)}, "less than 1"),
        ({"lr_gamma": 0}, "greater than 0"),
        ({"learning_rate": 1}, "Extra inputs"),
    ],
)
def test_wrong_settings_are_refused(wrong, message):
    with pytest.raises(ValidationError, match=message):
        settings(**wrong)


@pytest.mark.parametrize(("optimizer", "lr", "decay"), [("adamw", 1e-3, 1e-2), ("adam", 1e-3, 0.0)])
def test_an_optimizer_brings_the_rates_that_are_usual_for_it(optimizer, lr, decay):
    s = TrainSettings(epochs=1, optimizer=optimizer)
    assert (s.lr, s.weight_decay) == (lr, decay)
    given = TrainSettings(epochs=1, optimizer=optimizer, lr=0.1, weight_decay=5e-4)
    assert (given.lr, given.weight_decay) == (0.1, 5e-4)
    again = TrainSettings.model_validate_json(s.model_dump_json())
    assert again == s


def test_without_a_word_sgd_has_its_usual_rates():
    s = TrainSettings(epochs=1)
    assert (s.optimizer, s.lr, s.weight_decay, s.momentum) == ("sgd", 0.1, 5e-4, 0.9)
