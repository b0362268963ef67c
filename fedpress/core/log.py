"""The log of fedpress, `logging.getLogger("fedpress")`: silent unless somebody asks for it.

The handler is added here and not where the package begins, since `import fedpress` must take no
time, and importing `logging` takes more than all the rest.
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
