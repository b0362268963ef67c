"""Shows log messages on the error stream with `--verbose`, and none without it."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import typer

FORMAT = "%(asctime)s %(name)s: %(message)s"


class ToErrorStream(logging.Handler):
    """Writes to the current `sys.stderr`, which rich replaces while it draws progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        """Writes one line."""
        typer.echo(self.format(record), err=True)


def take_flag(*words: str) -> bool:
    """Removes a flag such as `--debug` from `sys.argv`; returns whether it was there."""
    found = [word for word in sys.argv[1:] if word in words]
    sys.argv[1:] = [word for word in sys.argv[1:] if word not in words]
    return bool(found)


@contextmanager
def show_log(*, debug: bool, verbose: bool) -> Iterator[None]:
    """Sets the log levels for the block, and restores them.

    Args:
        debug: whether to show warnings of other libraries.
        verbose: whether to show log messages of fedpress.
    """
    ours, others = logging.getLogger("fedpress"), logging.getLogger()
    before = (logging.root.manager.disable, ours.level, others.level)
    handler = ToErrorStream()
    handler.setFormatter(logging.Formatter(FORMAT, "%H:%M:%S"))
    if verbose:
        ours.addHandler(handler)
        ours.setLevel(logging.DEBUG)
    if (
        not debug
    ):  # what a library says to its developers would only hide the one sentence that helps
        warnings.simplefilter("ignore")
        if verbose:
            others.setLevel(logging.ERROR)
        else:
            logging.disable(logging.WARNING)
    try:
        yield
    finally:
        ours.removeHandler(handler)
        logging.disable(before[0])
        ours.setLevel(before[1])
        others.setLevel(before[2])
