"""Language modelling: predicts the next token at each position of a sequence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import JsonValue
from torch import Tensor

from fedpress.errors import DataError, ModelError
from fedpress.tasks.base import IGNORED, Metric, Reduction, Sums, Task, json_number
from fedpress.tasks.classification import Classification

# The log probabilities of the tokens travel with the model as text: 20,000 are about 200 kB.
MAX_UNIGRAM_TOKENS = 20_000


@dataclass(frozen=True)
class Language(Task):
    """The next token at each position: targets int64 [n, length], outputs [n, vocabulary, length].

    Outputs are logits. Targets are the inputs shifted by one; where a sequence is shorter than the
    others, and where no token is asked for, the target is `IGNORED` (-100).

    The loss of a sequence is the mean over its own tokens, so it does not depend on the other
    sequences of a batch, and every sequence has the same weight in training. The metrics are means
    over all tokens. A sequence without any target has the loss 0 and no token in the metrics.

    Attributes:
        names: the tokens of the vocabulary, in the order of the outputs.
        unigram: natural logarithm of each token's share of the public targets, where each token
            counts once more than it occurs (Laplace 1814), so that none has the share 0. Empty if
            there is no public target, or the vocabulary has more than `MAX_UNIGRAM_TOKENS` tokens.
        label_smoothing: share of the target that is spread over all tokens.

    >>> task = Language(("a", "b"))
    >>> logits = torch.zeros(1, 2, 3)  # each token has the probability 1/2
    >>> found = task.summary(task.metrics(logits, torch.tensor([[0, 1, -100]])))
    >>> found["perplexity"], found["bits_per_token"]
    (2.0, 1.0)
    """

    names: tuple[str, ...]
    unigram: tuple[float, ...] = ()
    label_smoothing: float = 0.0

    kind = "language"
    targets = "classes"
    shown_metrics = (
        Metric(
            "perplexity",
            "perplexity",
            "lower",
            meaning="exp of the mean log loss of a token; guessing among k tokens has k",
        ),
        Metric("bits_per_token", "bits per token", "lower"),
        Metric("accuracy", "accuracy per token", share=True),
        Metric(
            "perplexity_of_unigram",
            "perplexity of the unigram",
            "lower",
            meaning="perplexity if each token always has its share of the public part",
        ),
        Metric("loss", "log loss per sequence", "lower"),
    )
    other_keys = ("tokens", "perplexity_warning", "perplexity_error")

    def __post_init__(self) -> None:
        if len(self.unigram) not in (0, len(self.names)):
            raise DataError(
                f"{len(self.names)} tokens but {len(self.unigram)} shares of a unigram",
                place="task 'language'",
                cure="give one for every token, or none",
            )

    @classmethod
    def fit(cls, names: tuple[str, ...], public: Tensor) -> Language:
        """Counts the tokens of public targets [n, length]."""
        counted = public[public != IGNORED]
        if not len(counted) or len(names) > MAX_UNIGRAM_TOKENS:
            return cls(names)
        counts = counted.bincount(minlength=len(names)).double() + 1
        # Six digits are enough to compare with, and keep the model's JSON short.
        shares = (counts / counts.sum()).log().tolist()
        return cls(names, tuple(round(share, 6) for share in shares))

    @property
    def _of_tokens(self) -> Classification:
        """The classification of single tokens, which has the same loss."""
        return Classification(self.names, self.label_smoothing)

    def loss(self, outputs: Tensor, targets: Tensor, *, reduction: Reduction = "mean") -> Tensor:
        """Returns the cross-entropy in nats; that of a sequence is the mean over its tokens."""
        return self._of_tokens.loss(outputs, targets, reduction=reduction)

    def soft_loss(self, outputs: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """Returns T^2 KL(teacher || student) at temperature T in nats, the mean over all positions.

        Positions without a target count too: the teacher has an answer there.
        """
        return self._of_tokens.soft_loss(outputs, teacher, temperature)

    def agreement(self, first: Tensor, second: Tensor) -> float | None:
        """Returns the share of positions with equal predictions."""
        return self._of_tokens.agreement(first, second)

    def smoothed(self, amount: float) -> Language:
        """Returns the task with label smoothing; the same task if `amount` is 0."""
        return replace(self, label_smoothing=amount) if amount else self

    def answers(self, outputs: Tensor) -> Tensor:
        """Returns the most probable token at each position, int64 [n, length]."""
        return outputs.argmax(1)

    def probabilities(self, outputs: Tensor) -> Tensor:
        """Returns the softmax of the logits, [n, vocabulary, length]."""
        return outputs.softmax(1)

    def score_sums(self, outputs: Tensor, targets: Tensor) -> Sums:
        """Returns the sum of the tokens' losses, and their number."""
        losses, counted = _token_losses(outputs, targets)
        return {"nats": losses.sum(), "tokens": counted.sum()}

    def score(self, sums: Sums) -> float:
        """Returns the perplexity."""
        return _exp(float(sums["nats"] / sums["tokens"]))

    def metrics(self, outputs: Tensor, targets: Tensor) -> Sums:
        """Returns sums over tokens and, for the standard error, over sequences."""
        losses, counted = _token_losses(outputs, targets)
        right = (outputs.detach().argmax(1) == targets) & counted
        nats, tokens = losses.sum(1), counted.sum(1).double()
        sums = {
            "nats": nats.sum(),
            "tokens": counted.sum(),
            "right": right.sum(),
            "examples": torch.tensor(len(targets)),
            "broken": (outputs.isnan().any(1) & counted).any(1).sum(),
            "nats_squared": nats.square().sum(),
            "nats_tokens": (nats * tokens).sum(),
            "tokens_squared": tokens.square().sum(),
        }
        if self.unigram:
            shares = torch.tensor(self.unigram, dtype=torch.float64)
            sums["unigram_nats"] = -shares[targets[counted]].sum()
        return sums

    def summary(self, sums: Sums) -> dict[str, JsonValue]:
        """Computes the metrics by key, and these further values.

        - `tokens`: number of targets.
        - `perplexity_warning`: a sentence if outputs are NaN, or the perplexity is no better than
          that of the unigram; else None.
        - `perplexity_error`: standard error of the perplexity, from the spread between sequences.
        """
        tokens = int(sums["tokens"])
        nats = float(sums["nats"] / sums["tokens"])
        perplexity = json_number(_exp(nats)) if tokens else None
        guess = None
        if "unigram_nats" in sums and tokens:
            guess = json_number(_exp(float(sums["unigram_nats"] / tokens)))
        warning = None
        if int(sums["broken"]):
            broken, n = int(sums["broken"]), int(sums["examples"])
            warning = (
                f"the model's outputs are not numbers (NaN) on {broken:,} of {n:,} test examples"
            )
        elif perplexity is not None and guess is not None and perplexity >= guess:
            warning = (
                f"with a perplexity of {perplexity:.4g} the model is no better than always "
                f"guessing by the tokens' shares of the public part ({guess:.4g})"
            )
        return {
            "perplexity": perplexity,
            "bits_per_token": json_number(nats / math.log(2)),
            "accuracy": json_number(sums["right"] / tokens) if tokens else None,
            "perplexity_of_unigram": guess,
            "tokens": tokens,
            "perplexity_warning": warning,
            "perplexity_error": _error(sums, nats),
        }

    def check(self, outputs: object, targets: Tensor) -> None:
        """Checks that outputs are logits [n, vocabulary, length] and targets tokens [n, length]."""
        self.check_targets(targets)
        got = list(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        if got == [len(targets), len(self.names), targets.shape[1]]:
            return
        of_one = got[1:] if isinstance(got, list) else got
        vocabulary, length = len(self.names), targets.shape[1]
        cure = f"make it return {vocabulary} numbers for each position"
        if isinstance(got, list) and got[1:] == [length, vocabulary]:
            cure = "swap its last two dimensions at the end of forward: outputs.transpose(1, 2)"
        raise ModelError(
            f"gives outputs {of_one} for one example, expected {[vocabulary, length]}: a logit per "
            "token of the vocabulary and position",
            place="outputs",
            cure=cure,
        )

    def check_targets(self, targets: Tensor) -> None:
        """Checks that targets are token numbers or `IGNORED`, int64 [n, length] with length > 0."""
        if targets.dim() != 2 or not targets.shape[1]:
            raise DataError(
                f"targets of shape {list(targets.shape)}",
                place="targets",
                cure="the task language needs int64 [n, length], a next token for each position",
            )
        self._of_tokens.check_targets(targets)

    def to_json(self) -> dict[str, JsonValue]:
        """Returns kind, names and the logarithms of the unigram."""
        return {**super().to_json(), "unigram": list(self.unigram)}


def _token_losses(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the loss of each token in nats, float64 [n, length], and which tokens count."""
    logits = outputs.detach().double()
    losses = F.cross_entropy(logits, targets, reduction="none", ignore_index=IGNORED)
    return losses, targets != IGNORED


def _exp(nats: float) -> float:
    """Returns e to the power of `nats`; infinity where that is too large for a float."""
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf


def _error(sums: Mapping[str, Any], mean: float) -> float | None:
    """Returns the standard error of the perplexity; None for fewer than two sequences.

    Tokens of one sequence depend on each other, so sequences are the independent draws. The mean
    loss of a token is a ratio of two sums over sequences; its variance is that of a ratio estimator
    (Cochran 1977, section 6.4), and the perplexity's follows by the delta method.
    """
    n, tokens = int(sums["examples"]), float(sums["tokens"])
    if n < 2 or not tokens:
        return None
    squares = float(
        sums["nats_squared"] - 2 * mean * sums["nats_tokens"] + mean**2 * sums["tokens_squared"]
    )
    if not math.isfinite(squares):
        return None
    # Rounding may leave a variance of 0 slightly negative.
    of_mean = math.sqrt(max(0.0, squares) * n / (n - 1)) / tokens
    return json_number(_exp(mean) * of_mean)
