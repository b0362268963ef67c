"""Switches log messages on stderr on with `--verbose`; without this flag nothing is logged."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import typer

FORMAT = "%(asctime)s %(name)s: %(message)s"
"""Format of one line of the log, for `logging.Formatter`."""


class ToErrorStream(logging.Handler):
    """A log handler that writes each line to what `sys.stderr` is at that time.

    logging.StreamHandler always writes to the stream that it starts with. But rich replaces
    `sys.stderr` while it draws progress bars.
    """

    def emit(self, record: logging.LogRecord) -> None:
        """Writes one line."""
        typer.echo(self.format(record), err=True)


def take_flag(*words: str) -> bool:
    """Removes a flag such as `--debug` from `sys.argv`; returns whether it was there."""
    # Removed by hand, so that the flag works at any place of the command line.
    found = [word for word in sys.argv[1:] if word in words]
    sys.argv[1:] = [word for word in sys.argv[1:] if word not in words]
    return bool(found)


@contextmanager
def show_log(*, debug: bool, verbose: bool) -> Iterator[None]:
    """Sets the log levels for the block, and restores them afterwards.

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
    ):  # warnings of libraries are for developers; a user would not see our error among them
        warnings.simplefilter("ignore")
        if verbose:
            others.setLevel(logging.ERROR)
        else:
            logging.disable(logging.WARNING)
    # Restored, because tests run several commands in one process.
    try:
        yield
    finally:
        ours.removeHandler(handler)
        logging.disable(before[0])
        ours.setLevel(before[1])
        others.setLevel(before[2])
