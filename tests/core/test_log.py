"""The log of fedpress."""

import logging

from fedpress.core.log import logger


def test_all_loggers_hang_on_one_that_says_nothing_by_itself(capsys):
    logger("fedpress.somewhere").error("nobody has asked")
    assert capsys.readouterr() == ("", "")
    root = logging.getLogger("fedpress")
    assert any(isinstance(handler, logging.NullHandler) for handler in root.handlers)
