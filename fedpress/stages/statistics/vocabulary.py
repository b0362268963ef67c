"""The query of texts: in how many sequences each candidate of the vocabulary is."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pydantic import JsonValue
from torch import Tensor

from fedpress.data.preparation import Preparation
from fedpress.data.vocabulary import shortened, text_part
from fedpress.errors import RecipeError
from fedpress.federation import trust_of
from fedpress.models.column_sums import ColumnSums
from fedpress.stages.statistics.query import LEAST, Answer, largest_noise
from fedpress.stages.statistics.settings import StatisticsSettings

VOCABULARY = "vocabulary"
"""Key of the tokens in a result, where tables have their columns of words."""


@dataclass(frozen=True)
class VocabularyQuery:
    """The sums that a statistics stage asks of texts. It has the methods of `Query`.

    Attributes:
        settings: the settings of the stage.
        about: how texts become examples, with all candidates as the vocabulary.
    """

    settings: StatisticsSettings
    about: Preparation

    def __post_init__(self) -> None:
        for key in ("bounds", "words"):
            if getattr(self.settings, key):
                raise RecipeError("texts have no columns", place=key, cure="leave it out")

    @property
    def _candidates(self) -> tuple[str, ...]:
        return text_part(self.about).vocabulary[1:]

    @property
    def _kept(self) -> int:
        kept = text_part(self.about).settings.vocabulary
        assert kept is not None, "checked by DataSettings"
        return kept

    @property
    def arguments(self) -> dict[str, JsonValue]:
        """The arguments of the network that makes the sums, see `ColumnSums`."""
        private = self.settings.privacy
        counted = trust_of(private.unit, private.trust).fixed_divisor
        tokens = len(self._candidates) + 1
        return {"numbers": [], "flags": [], "tokens": tokens, "gaps": False, "counted": counted}

    def planned(self, network: ColumnSums, std: float) -> dict[str, str]:
        """Returns what the noise does to the answer: its standard deviation on each mean vote."""
        found = {"error_of_votes": f"{std:.3g}"}
        # So much has each token of the vocabulary if every sequence has all of them.
        if largest_noise(std, len(self._candidates)) > 1 / math.sqrt(self._kept):
            found["warning"] = (
                "the noise alone may choose the whole vocabulary, so give a larger epsilon or a "
                "smaller vocabulary"
            )
        return found

    def answer(self, network: ColumnSums, means: Tensor, std: float) -> Answer:
        """Returns the candidates with most votes (see `Tokens`); see `Query.answer`."""
        means = means.double()
        if network.counted:
            share = max(float(means[0]), std, LEAST)
            means, std = means[1:] / share, std / share
        votes = dict(zip(self._candidates, means.tolist(), strict=True))
        ranked = sorted(self._candidates, key=lambda name: -votes[name])
        kept = ranked[: self._kept]
        found = Answer(shortened(self.about, ranked))
        found.words = {VOCABULARY: [*kept]}
        lost = sum(votes[name] < largest_noise(std, len(votes)) for name in kept)
        if lost:
            found.chosen_by_noise[VOCABULARY] = (lost, len(kept))
        return found
