"""One error, two readers: Python sees its arguments named, the command line its flags."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from fedpress.core.consent import as_flags as consent_as_flags
from fedpress.errors import FedpressError

FLAGS = {
    "input_shape": "--input",
    "data": "--data",
    "path": "--path",
    "checkpoint": "--checkpoint",
    "out": "--out",
    "mean": "--mean",
    "std": "--std",
}
"""Arguments of the Python calls, and the flags of the commands that are the same."""
_ARGUMENT = re.compile(
    rf"(?<![\w.\"'-])({'|'.join(FLAGS)})="  # no part of a longer word, no key of a recipe
    r"(\((?P<numbers>[^()]*)\)|\"(?P<quoted>[^\"]*)\"|(?P<word>[A-Z]+\b))?"
)
_FLAG = re.compile(
    rf"(?<![\w-])({'|'.join(FLAGS.values())})(?![\w-])(?P<value> (?:\d+(?:,\d+)+|[A-Z]{{3,}}\b))?"
)


def as_flags(message: str) -> str:
    """Says an error for the command line.

    >>> as_flags('give input_shape=(3, 32, 32), or data="cifar10"')
    'give --input 3,32,32, or --data cifar10'
    """

    def flag(found: re.Match[str]) -> str:
        value = found["numbers"] or found["quoted"] or found["word"] or ""
        return f"{FLAGS[found[1]]} {value.replace(', ', ',')}".rstrip()

    return consent_as_flags(_ARGUMENT.sub(flag, message))


def as_arguments(message: str) -> str:
    """Says an error for Python.

    >>> as_arguments("--input: give it, such as --input 3,32,32, or --data SOURCE")
    'input_shape=: give it, such as input_shape=(3, 32, 32), or data=SOURCE'
    """
    names = {flag: name for name, flag in FLAGS.items()}

    def argument(found: re.Match[str]) -> str:
        value = (found["value"] or "").strip()
        return f"{names[found[1]]}=" + (f"({value.replace(',', ', ')})" if "," in value else value)

    message = message.replace("add --resume to go on, or give another", "give another")
    message = re.sub(r"package\.module:function --checkpoint (\S+|'[^']*')", _checkpoint, message)
    return _FLAG.sub(argument, message)


def _checkpoint(found: re.Match[str]) -> str:
    path = found[1].strip("'")
    return f'"package.module:function" and checkpoint="{path}"'


@contextmanager
def naming_arguments() -> Iterator[None]:
    """Lets errors that pass through name arguments of Python."""
    try:
        yield
    except FedpressError as error:
        said = as_arguments(str(error))
        if said == str(error):
            raise
        raise type(error)(said) from error
