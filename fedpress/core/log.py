"""The log of fedpress, `logging.getLogger("fedpress")`: silent until the user adds a handler.

The empty handler is added here, not in `fedpress/__init__.py`: importing `logging` would make up
most of the time that `import fedpress` takes.
"""

from __future__ import annotations

import logging

logging.getLogger("fedpress").addHandler(logging.NullHandler())


def logger(name: str) -> logging.Logger:
    """Returns the logger of a module, by its `__name__`.

    >>> logger("fedpress.data.load").parent.name
    'fedpress'
    """
    return logging.getLogger(name)
