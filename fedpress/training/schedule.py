"""The learning rate over a training, as a factor of the rate that the settings give."""

from __future__ import annotations


def one_cycle(done: float, warmup: float) -> float:
    """Returns the learning-rate factor at share `done` (0..1) of the run: linear up over `warmup`, linear down to 0.

    It starts at 2%, so that the first step is a step.

    >>> one_cycle(0.5, 0.0), one_cycle(0.1, 0.2), one_cycle(1.0, 0.2)
    (0.5, 0.5, 0.0)
    """
    if done < warmup:
        return max(done / warmup, 0.02)
    return (1 - done) / (1 - warmup)
