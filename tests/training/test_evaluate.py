"""The evaluation: against a plain loop, and without a trace in the model."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from fedpress.core.examples import Arrays, Preprocess
from fedpress.errors import TrainingError
from fedpress.models import freeze_batch_norm_
from fedpress.training.evaluate import evaluate, outputs
from tests.training.trainings import (
    NONE,
    PREPROCESS,
    TASK,
    assert_same,
    images,
    network,
)


@pytest.mark.parametrize("batch_size", [1, 7, 500])
def test_evaluation_equals_a_plain_loop(batch_size):
    model, data = network("resnet"), images(20)
    twin = copy.deepcopy(model).eval()
    right, loss = 0, 0.0
    for x, y in zip(data.x, data.y, strict=True):
        probability = twin(PREPROCESS(x[None])).softmax(1)[0]
        right += int(probability.argmax() == y)
        loss -= float(probability[y].detach().log())
    measured = evaluate(model, data, PREPROCESS, TASK, batch_size=batch_size)
    assert (measured.score, measured.examples) == (right / 20, 20)
    assert measured.loss == pytest.approx(loss / 20, rel=1e-5)
    assert measured.metrics == {}
    whole = evaluate(model, data, PREPROCESS, TASK, batch_size=batch_size, all_metrics=True)
    assert (whole.score, whole.loss) == (measured.score, measured.loss)
    logits = twin(PREPROCESS(data.x)).detach()
    expected = TASK.summary(TASK.metrics(logits, data.y))
    assert whole.metrics.keys() == expected.keys()
    assert whole.metrics["auc"] == pytest.approx(expected["auc"], abs=1e-4)
    assert whole.metrics["confusion"] == expected["confusion"]


@pytest.mark.parametrize("batch_size", [3, 500])
def test_a_groups_score_is_that_of_its_examples_alone(batch_size):
    model, data = network("resnet"), images(20)
    # Groups that lie across batches.
    groups = torch.arange(20) % 3
    found = evaluate(model, data, PREPROCESS, TASK, batch_size=batch_size, groups=groups)
    alone = [
        evaluate(model, data.take(torch.nonzero(groups == at).flatten()), PREPROCESS, TASK).score
        for at in range(3)
    ]
    assert found.group_scores == pytest.approx(alone)
    plain = evaluate(model, data, PREPROCESS, TASK, batch_size=batch_size)
    assert (found.score, found.loss, plain.group_scores) == (plain.score, plain.loss, ())


def test_evaluation_leaves_every_mode_and_number_as_it_was():
    model = freeze_batch_norm_(network("resnet").train())
    modes = [m.training for m in model.modules()]
    before = copy.deepcopy(model.state_dict())
    evaluate(model, images(), PREPROCESS, TASK)
    assert [m.training for m in model.modules()] == modes
    assert True in modes
    assert False in modes  # the frozen norms
    assert_same(model.state_dict(), before)
    with pytest.raises(RuntimeError):
        evaluate(model, Arrays(torch.zeros(2, 5, 8, 8), torch.zeros(2)), Preprocess(), TASK)
    assert [m.training for m in model.modules()] == modes


def test_evaluation_of_nothing_is_refused_and_of_broken_weights_says_nan():
    with pytest.raises(TrainingError, match="no examples to evaluate on"):
        evaluate(network("mlp"), NONE, PREPROCESS, TASK)
    model = network("mlp")
    nn.init.constant_(model.layers[0].weight, float("nan"))
    assert np.isnan(evaluate(model, images(), PREPROCESS, TASK).loss)


class Squeezed(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(x[..., None].squeeze())


def test_a_batch_of_one_gives_what_it_gives_in_company_also_where_code_drops_its_dimension():
    model, x = Squeezed(), torch.randn(3, 6)
    torch.testing.assert_close(outputs(model, x[:1]), model(x)[:1])
    assert torch.equal(outputs(model.head, x[:1]), model.head(x[:1]))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        outputs(nn.BatchNorm1d(6), x[:1])
    arrays = Arrays(x, torch.tensor([0, 1, 2]))
    plain = Preprocess((0.0,) * 6, (1.0,) * 6)
    one_by_one = evaluate(model, arrays, plain, TASK, batch_size=1)
    assert one_by_one.loss == pytest.approx(evaluate(model, arrays, plain, TASK).loss, rel=1e-5)
