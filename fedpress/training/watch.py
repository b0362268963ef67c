"""Reads the losses of a training a few steps late, and keeps the state before the first bad one.

Reading a loss waits until the device has finished the step. A GPU then idles until it gets the next
step, so its losses are read when later steps are already queued.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

State = dict[str, Tensor]
SMALL = 16
"""Tensors of at most this many values on the CPU, such as counters, are copied at every step."""


def steps_late(device: torch.device) -> int:
    """Returns how many steps late losses are read on `device`: 0 on a CPU, which never waits."""
    return 0 if device.type == "cpu" else 8


class Watch:
    """The losses of an epoch that have not been read yet.

    For every step call `keep_`, run the forward pass, and then call `see` before anything else is
    changed. If a value from `see` or `rest` is not finite, `kept` is the state before its step.

    Args:
        state: returns the tensors that a step changes. If `late` is 0, only what a forward pass
            changes is needed, because the loss is read before the rest of the step.
        late: number of steps between a loss and its reading.

    Attributes:
        kept: copies of `state()`, from before the first step whose loss was not finite.
    """

    def __init__(self, state: Callable[[], State], late: int) -> None:
        self._state = state
        self._late = late
        self._step = 0
        # Whether all losses so far were finite: a tensor on the device, so nothing waits for it.
        self._good: Tensor | None = None
        self._unread: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()
        self._small: deque[State] = deque(maxlen=late + 1)
        self._large: State = {}

    @torch.no_grad()
    def keep_(self) -> None:
        """Copies the state before a step, if no loss so far was bad."""
        small: State = {}
        large: State = {}
        for name, value in self._state().items():
            is_small = value.device.type == "cpu" and value.numel() <= SMALL
            (small if is_small else large)[name] = value
        self._small.append({name: value.clone() for name, value in small.items()})
        if self._good is None or large.keys() != self._large.keys():
            # In its first step an optimizer makes its state. Waiting once costs nothing.
            if self._good is None or bool(self._good):
                self._large = {name: value.clone() for name, value in large.items()}
            return
        for name, value in large.items():
            # Chosen on the device: the CPU does not know yet whether the last losses were good.
            self._large[name].copy_(torch.where(self._good, value, self._large[name]))

    def see(self, loss: Tensor) -> Iterator[tuple[int, float]]:
        """Takes the loss of the step, and yields (number of a step from 0, its loss) that are due.

        Args:
            loss: a scalar on any device.
        """
        loss = loss.detach()
        finite = torch.isfinite(loss)
        self._good = finite if self._good is None else self._good & finite
        done = None
        if loss.is_cuda:
            # To pinned memory, behind the step in the queue; the event says when it has arrived.
            loss = loss.to("cpu", non_blocking=True)
            done = torch.cuda.Event()
            done.record()
        self._unread.append((self._step, loss, done))
        self._step += 1
        yield from self._read(self._late)

    def rest(self) -> Iterator[tuple[int, float]]:
        """Yields the steps and losses that have not been read, after the last step."""
        yield from self._read(0)

    def _read(self, waiting: int) -> Iterator[tuple[int, float]]:
        while len(self._unread) > waiting:
            step, loss, done = self._unread.popleft()
            if done is not None:
                done.synchronize()
            yield step, float(loss)

    def kept(self, step: int) -> State:
        """Returns the state before `step`, the first step whose loss was not finite."""
        newest = self._step - 1
        return {**self._large, **self._small[len(self._small) - 1 - (newest - step)]}
