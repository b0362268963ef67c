"""The keys of a training stage."""

import pytest
from pydantic import ValidationError

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
            "image_sizes: they take 4 epochs, more than the 3 epochs .* give epochs=4",
        ),
        ({"image_sizes": ((3, 1),)}, "side >= 4"),
        ({"image_sizes": ((4, 0),)}, "epochs >= 1"),
        ({"image_sizes": (4, 2)}, "tuple"),
        ({"epochs": -1}, "greater than or equal to 0"),
        ({"lr": 0}, "greater than 0"),
        ({"momentum": 1.0}, "less than 1"),
        ({"warmup": 1.0}, "less than 1"),
        ({"batch_size": 0}, "greater than or equal to 1"),
        ({"optimizer": "adam"}, "'sgd' or 'muon'"),
        ({"learning_rate": 1}, "Extra inputs"),
    ],
)
def test_wrong_settings_are_refused(wrong, message):
    with pytest.raises(ValidationError, match=message):
        settings(**wrong)
