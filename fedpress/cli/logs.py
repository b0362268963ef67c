"""What a person sees of the log: nothing, or with `--verbose` all of it, on the error stream."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import typer

FORMAT = "%(asctime)s %(name)s: %(message)s"


class ToErrorStream(logging.Handler):
    """Writes to the present `sys.stderr`, which rich replaces while bars are drawn."""

    def emit(self, record: logging.LogRecord) -> None:
        """Writes one line."""
        typer.echo(self.format(record), err=True)


def take_flag(*words: str) -> bool:
    """Says whether one of `words` stands on the command line, and takes it away from there."""
    found = [word for word in sys.argv[1:] if word in words]
    sys.argv[1:] = [word for word in sys.argv[1:] if word not in words]
    return bool(found)


@contextmanager
def show_log(*, debug: bool, verbose: bool) -> Iterator[None]:
    """Shows as much of the log as was asked for, until the command ends.

    Args:
        debug: whether other libraries may speak too.
        verbose: whether fedpress tells what it does.
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
