"""Learning-rate schedules, a table: the rate over a training, as a factor of the rate that the settings give.

Each has a twin in `torch.optim.lr_scheduler`. Here the factor follows from the share of the training that is done, so
that a training that is taken up again needs no state of its schedule.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from fedpress.training.settings import TrainSettings

LEAST = 0.02
"""The factor that a warm-up begins with, so that the first step is a step."""
FIRST, LAST = 1 / 25, 1 / 25 / 1e4
"""Where one cycle begins and ends, as torch's `OneCycleLR` does by default."""


def factor(done: float, settings: TrainSettings) -> float:
    """Returns the learning-rate factor at share `done` (0..1) of the training.

    >>> factor(0.1, TrainSettings(epochs=1, warmup=0.2)), factor(1.0, TrainSettings(epochs=1))
    (0.5, 0.0)
    >>> factor(0.5, TrainSettings(epochs=1, warmup=0.0, lr_schedule="cosine"))
    0.5
    """
    return SCHEDULES[settings.lr_schedule](done, settings)


def _after_warmup(
    fall: Callable[[float, TrainSettings], float],
) -> Callable[[float, TrainSettings], float]:
    """Returns the schedule that rises linearly over the warm-up and then goes as `fall` says.

    `fall` gets the share of the training behind the warm-up that is done.
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
    # Milestones count from the beginning of the training, whatever the warm-up is.
    of_all = settings.warmup + done * (1 - settings.warmup)
    passed = sum(of_all >= milestone for milestone in settings.lr_milestones)
    return settings.lr_gamma**passed


def _one_cycle(done: float, settings: TrainSettings) -> float:
    """Up by half a cosine over the warm-up, then down to almost 0 (Smith & Topin 2018, arXiv:1708.07120)."""
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
"""Share of the training that is done, and settings -> factor; by the word of `lr_schedule`."""
