"""A private vocabulary: candidates are counted with noise, charged once, and texts are read by it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import count

import pytest
import torch
from scipy import stats

import fedpress
from fedpress.data import Preparation
from fedpress.data.vocabulary import CHARACTERS
from fedpress.errors import FedpressError
from fedpress.models.column_sums import ColumnSums
from fedpress.pipeline import recipe as recipes
from fedpress.pipeline.check import check_recipe
from fedpress.pipeline.start import load_data
from fedpress.privacy.ledger import Ledger
from fedpress.privacy.per_example.gradients import clipped_gradient_sum
from fedpress.stages.federate.rounds import FederatedRounds
from fedpress.tasks import ColumnSums as SumsTask
from fedpress.tasks.base import IGNORED
from tests.harness import finish
from tests.stages.statistics.noise import noise_of
from tests.stages.statistics.texts import ASKING, KEPT, LETTERS, TRAINING, text_of, written

UNKNOWN = "<unknown>"


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> str:
    return written(tmp_path_factory.mktemp("data") / "texts")


@pytest.fixture(scope="module")
def whole(texts, tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "whole"
    finish(texts + ASKING + TRAINING, path)
    return path


def tokens(n: int, count: int, length: int = 10, seed: int = 0) -> torch.Tensor:
    chance = torch.Generator().manual_seed(seed)
    x = torch.randint(0, count, (n, length), generator=chance)
    x[:3] = torch.tensor([0, 1, count - 1])[:, None]
    return x


def test_a_sequence_votes_alike_for_each_of_its_different_tokens():
    x = tokens(50, 7)
    phi = ColumnSums(numbers=(), tokens=7).phi(x)
    for row, votes in zip(x.tolist(), phi.tolist(), strict=True):
        own = set(row) - {0}
        expected = [len(own) ** -0.5 if token in own else 0.0 for token in range(1, 7)]
        assert votes == pytest.approx(expected)


@pytest.mark.parametrize("counted", [False, True])
def test_no_sequence_adds_more_than_the_sensitivity(counted):
    sums = ColumnSums(numbers=(), tokens=7, counted=counted)
    x = tokens(500, 7)
    each = sums.phi(x).double().norm(dim=1)
    assert float(each.max()) == pytest.approx(sums.norm, rel=1e-6)
    y = torch.zeros(500, dtype=torch.int64)
    total, *_ = clipped_gradient_sum(sums, SumsTask(("a",)).loss, x, y, clip_norm=sums.norm)
    assert torch.allclose(total, -sums.phi(x).sum(0), atol=1e-3)


@pytest.mark.recipe
def test_the_vocabulary_has_the_most_frequent_letters_and_reaches_every_part(whole, texts):
    line = json.loads((whole / "result.json").read_text())["stages"][0]
    assert set(line["words"]["vocabulary"]) == set(LETTERS[:KEPT])
    about = Preparation.read(whole / "preparation.json")
    assert about.part.vocabulary == (UNKNOWN, *sorted(LETTERS[:KEPT]))
    for stage in ("0-statistics", "1-federate"):
        spec = json.loads((whole / "stages" / stage / "spec.json").read_text())
        spec = spec.get("spec", spec)
        assert tuple(spec["class_names"]) == about.part.vocabulary
        assert spec["preparation"] == about.to_json()
    # Guessing by the shares would be this good; a network of pairs of letters cannot be better.
    final = json.loads((whole / "result.json").read_text())["final"]
    assert 1 < final["perplexity"] < KEPT + 1


@pytest.mark.recipe
def test_the_query_is_charged_once_and_the_training_has_the_rest(whole):
    first, second = json.loads((whole / "result.json").read_text())["stages"]
    ledger = Ledger.from_json((whole / "ledger.json").read_text())
    charged = [entry.who for entry in ledger.entries if entry.what == "statistics"]
    assert sorted(charged) == ["c0", "c1", "c2"]
    assert first["epsilon"] == pytest.approx(4.0)
    assert second["epsilon"] <= second["epsilon_budget"] == 8.0
    assert 4.0 < second["epsilon_left"] < 8.0


@pytest.mark.recipe
def test_the_texts_are_those_of_a_run_that_lists_the_vocabulary(texts, whole, tmp_path):
    spec = json.loads((whole / "stages/1-federate/spec.json").read_text())
    names = tuple(spec.get("spec", spec)["class_names"])
    from fedpress.data import statistics

    recipe = recipes.load(texts + ASKING)
    data = load_data(recipe)
    part = data.preparation.part
    about = replace(data.preparation, part=replace(part, vocabulary=names))
    found = statistics.settled(data, about)
    listed = recipes.load(
        texts.replace('statistics = "private"', f"classes = {json.dumps(names[1:])}")
        + "[[stage]]\nkind = 'federate'\n"
    )
    expected = load_data(listed)
    # A sequence without any token of the vocabulary is dropped there, and teaches nothing here.
    for name, arrays in expected.clients.items():
        own = found.clients[name]
        asked = (own.y != IGNORED).any(1)
        assert torch.equal(own.x[asked], arrays.x)
        assert torch.equal(own.y[asked], arrays.y)


@pytest.mark.recipe
@pytest.mark.parametrize(
    ("unit", "trust"), [("sample", "local"), ("sample", "distributed"), ("client", "central")]
)
def test_the_noise_of_the_counts_has_the_planned_standard_deviation(texts, unit, trust):
    drawn = noise_of(texts + ASKING, unit, trust, seeds=4)
    assert len(drawn) >= 4 * len(CHARACTERS)
    assert stats.kstest(drawn, "norm").pvalue > 1e-3
    assert math.sqrt(sum(one**2 for one in drawn) / len(drawn)) == pytest.approx(1, abs=0.15)


def test_candidates_are_listed_or_public_or_all_characters(tmp_path):
    text = written(tmp_path / "texts")
    data = load_data(recipes.load(text + ASKING))
    assert data.class_names == (UNKNOWN, *CHARACTERS)
    listed = text.replace(
        "[data.text]", 'classes = ["x", "e", "t", "a", "o", "i", "n"]\n[data.text]'
    )
    data = load_data(recipes.load(listed + ASKING))
    assert data.class_names == (UNKNOWN, "x", "e", "t", "a", "o", "i", "n")
    public = text.replace("[data.text]", 'public_clients = ["c0"]\n[data.text]')
    data = load_data(recipes.load(public + ASKING))
    assert data.class_names == (UNKNOWN, *sorted(set(text_of(0))))


def test_unknown_tokens_are_predicted_only_if_the_recipe_says_so(tmp_path):
    from fedpress.data import statistics
    from fedpress.data.vocabulary import shortened

    text = written(tmp_path / "texts")
    for keys, predicted in (("", False), ('unknown = "other"', True)):
        data = load_data(recipes.load(text.replace("[data.text]", f"{keys}\n[data.text]") + ASKING))
        found = statistics.settled(data, shortened(data.preparation, list(LETTERS)))
        y = torch.cat([arrays.y for arrays in found.clients.values()])
        assert bool((y == 0).any()) is predicted
        assert bool((torch.cat([a.x for a in found.clients.values()]) == 0).any())


BAD = {
    "no size": (
        {"data.text.vocabulary": "none"},
        r"recipe.data.text.vocabulary: a private query finds the most frequent tokens, and nothing "
        r"says how many; give recipe.data.text.vocabulary = 60",
    ),
    "as many as candidates": (
        {"data.classes": '["a", "b", "c"]'},
        r"recipe.data.text.vocabulary: there are 3 candidates for a vocabulary of 6 tokens",
    ),
    "dropped sequences": (
        {"data.unknown": "drop"},
        r"recipe.data.unknown: a sequence with a rare token would be left out",
    ),
    "bounds": (
        {"stage.0.bounds": "{ age = [0, 1] }"},
        r"recipe.stage\[0\].bounds: texts have no columns; leave it out",
    ),
    "words without candidates": (
        {"data.text.tokens": "words", "data.text.length": "2"},
        r"no row is public, .*; add classes = ",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_told_by_key_with_a_cure(texts, case):
    overrides, words = BAD[case]

    def checked() -> None:
        recipe = recipes.load(
            texts + ASKING, [f"{key}={value}" for key, value in overrides.items()]
        )
        check_recipe(recipe, load_data(recipe))

    with pytest.raises(FedpressError, match=words):
        checked()


def test_a_vocabulary_that_drowns_in_noise_is_a_warning_of_the_check(texts):
    recipe = recipes.load(texts + ASKING, ["stage.0.privacy.epsilon=0.01"])
    [facts] = check_recipe(recipe, load_data(recipe))
    assert facts["warning"].startswith("the noise alone may choose the whole vocabulary")


class Killed(BaseException):
    """The end of the process."""


@pytest.mark.recipe
def test_a_run_that_is_killed_in_the_training_goes_on_with_the_same_bits(
    texts, whole, tmp_path, monkeypatch
):
    path = tmp_path / "run"
    charging = "_charged"
    real = getattr(FederatedRounds, charging)
    calls = count()

    def dying(self, *args, **how):
        # The query's round is the first one.
        if next(calls) == 2:
            raise Killed
        return real(self, *args, **how)

    with monkeypatch.context() as patch:
        patch.setattr(FederatedRounds, charging, dying)
        with pytest.raises(Killed):
            finish(texts + ASKING + TRAINING, path)
    finish(texts + ASKING + TRAINING, path, resume=True)
    for name in ("ledger.json", "preparation.json", "stages/1-federate/model.safetensors"):
        assert (path / name).read_bytes() == (whole / name).read_bytes()
    # A run that takes the query over does not ask it again.
    finish(texts + ASKING + TRAINING, tmp_path / "other", reuse=path)
    for name in ("ledger.json", "preparation.json", "stages/1-federate/model.safetensors"):
        assert (tmp_path / "other" / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.recipe
def test_predict_continues_a_text_with_the_tokens_of_the_vocabulary(whole, tmp_path):
    new = tmp_path / "new.txt"
    new.write_text("eta")
    found = fedpress.predict(whole, new)
    assert set(found.names) == {UNKNOWN, *LETTERS[:KEPT]}
    assert fedpress.evaluate(whole)["perplexity"] > 1
