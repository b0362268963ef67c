"""Checks the later stages of a run in a second process, while the first stage works already."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import suppress

import torch

from fedpress.core.log import logger
from fedpress.pipeline.recipe import Recipe
from fedpress.workspace.state import Event, StageFinished

log = logger(__name__)

LONGEST_WAIT = 300.0
"""Seconds after which the second process is given up, and its work is done in this process."""


def can_check_beside(recipe: Recipe, device: torch.device) -> bool:
    """Whether the checks may run in a copy of this process, made by `fork`.

    The copy has only one of the original's threads, so a process with other Python threads or with
    a GPU in use must not be copied. With one core the second process would only delay the first.
    """
    if sys.platform != "linux" or device.type != "cpu" or torch.cuda.is_initialized():
        return False
    # A user's functions may have started threads or opened connections, which must not be copied.
    if any(":" in name for name in (recipe.model.architecture or "", recipe.data.source)):
        return False
    if len(recipe.stage) < 2:
        return False
    # The thread of a spinner ends a moment after the spinner.
    for _ in range(50):
        if threading.active_count() == 1:
            return len(os.sched_getaffinity(0)) > 1
        time.sleep(0.01)
    return False


class ChecksBeside:
    """Goes through the remaining checks in a copy of this process.

    Only whether they pass is taken from the copy. If one fails, or if the copy itself fails, the
    checks are made again in this process, which raises the error as it would have been raised
    without the copy. So no error has to be sent between processes, and no error can get lost.

    Args:
        remaining: the checks; the original of this iterator is used up only if the copy fails.

    Attributes:
        passed: whether all checks have passed.
        failed: whether a check has raised an error.
    """

    def __init__(self, remaining: Iterator[object]) -> None:
        self.passed, self.failed = False, False
        self._remaining = remaining
        self._began = time.monotonic()
        self._process: int | None = _in_copy(remaining)

    def follow(self, events: Iterator[Event]) -> Iterator[Event]:
        """Yields the events of a run; no stage after the first begins before all checks passed.

        Raises:
            FedpressError: the error of a check, at the next event of the run.
        """
        for event in events:
            if not self.passed:
                self._ask(wait=isinstance(event, StageFinished))
            yield event
        # A run whose events end without a finished stage.
        if not self.passed:
            self._ask(wait=True)

    def stop(self) -> None:
        """Ends the second process, if it still works."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.kill(self._process, signal.SIGKILL)
            os.waitpid(self._process, 0)
            self._process = None

    def _ask(self, *, wait: bool) -> None:
        """Notes whether the checks have passed; if they have failed, makes them here."""
        status = self._status()
        while status is None and (wait or self._late()):
            if self._late():
                # The copy of a process can hang where a library held a lock during the `fork`.
                log.warning("the checks beside the run took too long; they are made again")
                self.stop()
                status = 1
                break
            time.sleep(0.01)
            status = self._status()
        if status is None:
            return
        if status:
            self.failed = True
            for _ in self._remaining:
                pass
            self.failed = False
        self.passed = True

    def _late(self) -> bool:
        return time.monotonic() - self._began > LONGEST_WAIT

    def _status(self) -> int | None:
        """Returns the exit code of the second process; None while it works."""
        if self._process is None:
            return 1
        process, status = os.waitpid(self._process, os.WNOHANG)
        if not process:
            return None
        self._process = None
        return os.waitstatus_to_exitcode(status)


def _in_copy(remaining: Iterator[object]) -> int | None:
    """Starts the copy of this process; returns its process id, None if there can be no copy."""
    # Python 3.12 warns about every fork of a process with threads of native libraries. These
    # threads wait for work, and the copy computes with one thread.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            process = os.fork()
        except OSError as error:  # no memory or no free process id
            log.info("no second process for the checks (%s)", error)
            return None
    if process:
        return process
    code = 1
    try:
        # OpenMP's threads were not copied, so the copy must not use them.
        torch.set_num_threads(1)
        # What the checks print is printed again if they fail, so here it would be printed twice.
        with open(os.devnull, "w", encoding="utf-8") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
        for _ in remaining:
            pass
        code = 0
    except BaseException:  # also KeyboardInterrupt: nothing may leave the copy
        pass
    finally:
        # Without cleaning up: locks and files belong to the original.
        os._exit(code)
