"""Learning-rate schedules: the finished share of training -> a factor on the learning rate.

Each schedule has a counterpart in `torch.optim.lr_scheduler`. The functions here have no state that
a resumed run would have to load.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from fedpress.training.settings import TrainSettings

# Smallest factor during the warm-up, except of "onecycle". With 0 the first step would change
# nothing.
LEAST = 0.02
# First and last factor of "onecycle", the defaults of torch's `OneCycleLR`.
FIRST, LAST = 1 / 25, 1 / 25 / 1e4


def factor(done: float, settings: TrainSettings) -> float:
    """Returns the factor of the learning rate when a share `done` (0..1) of the training is done.

    >>> factor(0.1, TrainSettings(epochs=1, warmup=0.2)), factor(1.0, TrainSettings(epochs=1))
    (0.5, 0.0)
    >>> factor(0.5, TrainSettings(epochs=1, warmup=0.0, lr_schedule="cosine"))
    0.5
    """
    return SCHEDULES[settings.lr_schedule](done, settings)


def _after_warmup(
    fall: Callable[[float, TrainSettings], float],
) -> Callable[[float, TrainSettings], float]:
    """Returns a schedule that rises linearly during the warm-up and then follows `fall`.

    The argument of `fall` is the finished share of the training after the warm-up.
    """

    def schedule(done: float, settings: TrainSettings) -> float:
        if done < settings.warmup:
            return max(done / settings.warmup, LEAST)
        return fall((done - settings.warmup) / (1 - settings.warmup), settings)

    return schedule


def _linear(done: float, settings: TrainSettings) -> float:
    return 1 - done


def _cosine(done: float, settings: TrainSettings) -> float:
    """Half a cosine (Loshchilov & Hutter 2017, arXiv:1608.03983, equation 5, without restarts)."""
    return (1 + math.cos(math.pi * done)) / 2


def _constant(done: float, settings: TrainSettings) -> float:
    return 1.0


def _step(done: float, settings: TrainSettings) -> float:
    # `done` counts from the end of the warm-up, but milestones from the beginning of the training.
    done_of_training = settings.warmup + done * (1 - settings.warmup)
    passed = sum(done_of_training >= milestone for milestone in settings.lr_milestones)
    return settings.lr_gamma**passed


def _one_cycle(done: float, settings: TrainSettings) -> float:
    """Rises by half a cosine during the warm-up, then falls to nearly 0.

    Smith & Topin 2018, arXiv:1708.07120.
    """
    warmup = settings.warmup
    if done < warmup:
        return FIRST + (1 - FIRST) * (1 - math.cos(math.pi * done / warmup)) / 2
    fallen = (done - warmup) / (1 - warmup)
    return LAST + (1 - LAST) * (1 + math.cos(math.pi * fallen)) / 2


SCHEDULES: dict[str, Callable[[float, TrainSettings], float]] = {
    "linear": _after_warmup(_linear),
    "cosine": _after_warmup(_cosine),
    "constant": _after_warmup(_constant),
    "step": _after_warmup(_step),
    "onecycle": _one_cycle,
}
"""The schedules, as functions of (share of training done, settings), by `lr_schedule`."""
