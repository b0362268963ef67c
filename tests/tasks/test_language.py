"""Language modelling: perplexity against torchmetrics and a plain loop, padding, the unigram."""

import math

import pytest
import torch

from fedpress.errors import DataError, ModelError
from fedpress.tasks import Language, merged
from fedpress.tasks.base import IGNORED


def batch(n=40, k=6, length=7, seed=0):
    """Returns outputs [n, k, length] and targets of sequences with 0 to `length` tokens."""
    chance = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, k, (n, length), generator=chance)
    lengths = torch.randint(0, length + 1, (n,), generator=chance)
    targets[torch.arange(length) >= lengths[:, None]] = IGNORED
    return torch.randn(n, k, length, generator=chance), targets


def test_perplexity_is_that_of_torchmetrics():
    text = pytest.importorskip("torchmetrics.text")
    outputs, targets = batch()
    task = Language(tuple("abcdef"))
    library = text.Perplexity(ignore_index=IGNORED)
    library.update(outputs.transpose(1, 2), targets)
    found = task.summary(merged(*(task.metrics(outputs[a::3], targets[a::3]) for a in range(3))))
    assert found["perplexity"] == pytest.approx(float(library.compute()), rel=1e-5)
    assert task.score(task.score_sums(outputs, targets)) == pytest.approx(found["perplexity"])


def test_metrics_are_those_of_a_plain_loop_over_tokens():
    outputs, targets = batch(12)
    public = torch.tensor([[0, 0, 0, 1, 2, IGNORED]])
    task = Language.fit(tuple("abcdef"), public)
    losses, right, of_unigram = [], 0, []
    counts = [4, 2, 2, 1, 1, 1]  # one more than each occurs
    for example in range(12):
        for at in range(7):
            token = int(targets[example, at])
            if token == IGNORED:
                continue
            shares = outputs[example, :, at].double().softmax(0)
            losses.append(-math.log(shares[token]))
            right += int(shares.argmax()) == token
            of_unigram.append(-math.log(counts[token] / sum(counts)))
    found = task.summary(task.metrics(outputs, targets))
    mean = sum(losses) / len(losses)
    assert found["perplexity"] == pytest.approx(math.exp(mean))
    assert found["bits_per_token"] == pytest.approx(mean / math.log(2))
    assert found["accuracy"] == pytest.approx(right / len(losses))
    assert found["tokens"] == len(losses)
    guess = math.exp(sum(of_unigram) / len(of_unigram))
    assert found["perplexity_of_unigram"] == pytest.approx(guess, rel=1e-5)


def test_the_loss_of_a_sequence_is_the_mean_over_its_own_tokens():
    outputs, targets = batch(12)
    task = Language(tuple("abcdef"))
    each = task.loss(outputs, targets, reduction="none")
    for at in range(12):
        kept = targets[at] != IGNORED
        if not kept.any():
            assert each[at] == 0
            continue
        alone = torch.nn.functional.cross_entropy(outputs[at].T[kept], targets[at][kept])
        torch.testing.assert_close(each[at], alone)
    assert (targets == IGNORED).all(1).any(), "one sequence must be empty"


def test_empty_sequences_have_no_gradient_and_no_token():
    task = Language(("a", "b"))
    outputs = torch.randn(2, 2, 3, requires_grad=True)
    targets = torch.tensor([[IGNORED] * 3, [0, 1, IGNORED]])
    task.loss(outputs, targets).backward()
    assert outputs.grad[0].abs().sum() == 0
    assert outputs.grad[1].abs().sum() > 0
    assert task.summary(task.metrics(outputs, targets))["tokens"] == 2
    empty = task.summary(task.metrics(outputs[:1], targets[:1]))
    assert empty["perplexity"] is None
    assert empty["perplexity_error"] is None


def test_a_model_that_knows_only_the_frequencies_is_warned_of():
    public = torch.randint(0, 3, (50, 8)).clamp_max(1)
    task = Language.fit(("a", "b", "c"), public)
    shares = torch.tensor(task.unigram)
    same = shares[None, :, None].expand(50, 3, 8)
    found = task.summary(task.metrics(same, public))
    assert found["perplexity"] == pytest.approx(found["perplexity_of_unigram"])
    bad = task.summary(task.metrics(torch.zeros(50, 3, 8), public))
    assert "no better than always guessing" in bad["perplexity_warning"]
    good = torch.nn.functional.one_hot(public, 3).transpose(1, 2) * 9.0
    assert task.summary(task.metrics(good, public))["perplexity_warning"] is None


def test_a_loss_too_large_for_a_perplexity_is_no_number():
    task = Language(("a", "b"))
    outputs = torch.tensor([[[1e4], [-1e4]]])
    found = task.summary(task.metrics(outputs, torch.tensor([[1]])))
    assert found["perplexity"] is None
    assert found["bits_per_token"] == pytest.approx(2e4 / math.log(2))
    assert task.score(task.score_sums(outputs, torch.tensor([[1]]))) == math.inf


def test_a_token_beyond_the_vocabulary_is_refused():
    with pytest.raises(DataError, match="from 0 to 1"):
        Language(("a", "b")).check_targets(torch.tensor([[0, 2]]))


def test_outputs_with_the_vocabulary_last_are_told_to_be_swapped():
    task = Language(tuple("abc"))
    targets = torch.zeros(2, 5, dtype=torch.int64)
    with pytest.raises(ModelError, match=r"outputs\.transpose\(1, 2\)"):
        task.check(torch.zeros(2, 5, 3), targets)
    task.check(torch.zeros(2, 5, 3).transpose(1, 2), targets)


def test_label_smoothing_is_that_of_torch():
    outputs, targets = batch(1, 4, 5, seed=3)
    targets.clamp_min_(0)
    expected = torch.nn.functional.cross_entropy(outputs, targets, label_smoothing=0.2)
    torch.testing.assert_close(
        Language(tuple("abcd")).smoothed(0.2).loss(outputs, targets), expected
    )


def test_a_large_vocabulary_keeps_no_table_of_frequencies(monkeypatch):
    monkeypatch.setattr("fedpress.tasks.language.MAX_UNIGRAM_TOKENS", 2)
    task = Language.fit(("a", "b", "c"), torch.zeros(1, 4, dtype=torch.int64))
    assert task.unigram == ()
    found = task.summary(task.metrics(torch.zeros(1, 3, 2), torch.tensor([[0, 1]])))
    assert found["perplexity_of_unigram"] is None
