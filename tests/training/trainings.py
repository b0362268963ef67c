"""Small networks, images and settings, and how a training of them is run and compared."""

import numpy as np
import torch

from fedpress.core.examples import Arrays, Preprocess
from fedpress.core.random_source import public_stream
from fedpress.models.plain import CNN, MLP
from fedpress.models.resnet import resnet_small
from fedpress.tasks import Classification
from fedpress.training.augment import Augment
from fedpress.training.fit import Fit, Step
from fedpress.training.settings import TrainSettings
from tests.chance import generator

PREPROCESS = Preprocess((0.5,), (0.25,))
CHANGES = Augment(crop=0.25, flip="alternate", cutout=0.3)
TASK = Classification(tuple("0123456789"))
NONE = Arrays(torch.zeros(0, 3, 8, 8, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64))


def images(n=24, *, seed=0, classes=10):
    chance = generator(seed, "images")
    x = torch.randint(0, 256, (n, 3, 8, 8), generator=chance, dtype=torch.uint8)
    return Arrays(x, torch.randint(0, classes, (n,), generator=chance))


def fitting(model, settings, **more):
    return Fit(model, settings, **({"task": TASK} | more))


def network(kind="resnet", seed=0):
    torch.manual_seed(seed)
    makers = {
        "resnet": lambda: resnet_small(width=4),
        "cnn": lambda: CNN(image_size=8),
        "dropout": lambda: CNN(image_size=8, dropout=(0.3, 0.3)),
        "mlp": lambda: MLP(in_features=192, hidden=(16, 12)),
    }
    return makers[kind]()


def settings(**changes):
    return TrainSettings(
        **{"epochs": 3, "batch_size": 8, "lr": 0.05, "precision": "float32", **changes}
    )


def fit_all(fit, train, validation=NONE):
    """Trains to the end; returns the records of the epochs."""
    return [e for e in fit.epochs(train, validation, PREPROCESS) if not isinstance(e, Step)]


def assert_same(one, two):
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


def assert_close(model, twin, atol=1e-6):
    for (name, a), b in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, atol=atol, rtol=0, msg=lambda m, name=name: f"{name}: {m}")


def rates(s, n):
    """The learning-rate factor of every step, from the corners of its line."""
    steps = max(1, n // s.batch_size)
    at = np.arange(s.epochs * steps) / (s.epochs * steps)
    return np.maximum(
        np.interp(at, [0, s.warmup, 1], [0 if s.warmup else 1, 1, 0]),
        np.where(at < s.warmup, 0.02, 0),
    )


def batches(s, n, seed):
    for epoch in range(s.epochs):
        order = public_stream(seed, "epoch", epoch).permutation(n)
        yield from (
            order[at : at + s.batch_size]
            for at in range(0, max(1, n - s.batch_size + 1), s.batch_size)
        )
