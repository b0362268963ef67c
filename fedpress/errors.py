"""The errors of fedpress: each message is one sentence that names the place, what was got and the cure."""


class FedpressError(Exception):
    """Base of every error that a user can act on; the command line shows it without a traceback and exits with 2."""


class RecipeError(FedpressError):
    """A recipe or a setting is wrong: unknown key, wrong type or range, settings that do not fit together."""


class DataError(FedpressError):
    """Data is missing, corrupt, or too small for what was asked."""


class ModelError(FedpressError):
    """A model cannot be built, traced, pruned or rebuilt."""


class TrainingError(FedpressError):
    """Training cannot go on, for instance because the loss is not finite."""


class DivergedError(TrainingError):
    """Numbers grew until they were not finite: the learning rate is too large, or the data holds wrong values."""


class PrivacyError(FedpressError):
    """A privacy promise cannot be kept: no noise level reaches the budget, or the budget would be passed."""


class WireError(FedpressError):
    """A message is corrupt, of an unknown version, or does not fit what was agreed."""


class SecureError(FedpressError):
    """A secure sum stays closed: too few clients are left, or somebody did not keep to the protocol."""


class ExportError(FedpressError):
    """A model cannot be exported, or the artifact differs from the model."""


class RunError(FedpressError):
    """A run folder is missing, belongs to another recipe, or cannot be written."""


def did_you_mean(word: str, known: "list[str]") -> str:
    """Returns `; did you mean 'x'?` for the nearest of the `known` words, or an empty string.

    >>> did_you_mean("epsilom", ["epsilon", "delta"])
    "; did you mean 'epsilon'?"
    """
    from difflib import get_close_matches

    near = get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean '{near[0]}'?" if near else ""
