"""The log of fedpress, `logging.getLogger("fedpress")`: silent until the user adds a handler.

A `NullHandler`, which drops all messages, is added here and not in `fedpress/__init__.py`:
importing `logging` there would make up most of the time that `import fedpress` takes.
"""

from __future__ import annotations

import logging

logging.getLogger("fedpress").addHandler(logging.NullHandler())


def logger(name: str) -> logging.Logger:
    """Returns the logger of the module whose `__name__` is `name`.

    >>> logger("fedpress.data.load").parent.name
    'fedpress'
    """
    return logging.getLogger(name)
