import json

import pytest
from pydantic import ValidationError

from fedpress.pipeline import recipe as recipes
from fedpress.pipeline.keys import settings_of
from fedpress.stages.federate.stage import FederateStage

TEXT = """
[data]
source = "digits"
[model]
architecture = "cnn"
arguments = { in_channels = 1, image_size = 8 }
[[stage]]
kind = "federate"
%s
"""
PRIVACY = '[stage.privacy]\nunit = "client"\nepsilon = 8.0\ntrust = "%s"\n'
OLD_AND_NEW = [
    ('sum = "secure"', 'aggregator = "secure"', ('aggregator = "secure"',)),
    ('sum = "plain"', "", ("leave it out",)),
    (PRIVACY % "secure", PRIVACY % "distributed", ('trust = "distributed"',)),
    (
        'sum = "secure"\n' + PRIVACY % "secure",
        'aggregator = { kind = "secure" }\n' + PRIVACY % "distributed",
        ('aggregator = "secure"', 'trust = "distributed"'),
    ),
]


@pytest.mark.parametrize(("old", "new", "said"), OLD_AND_NEW)
def test_old_words_are_read_as_the_new_ones_and_the_new_one_is_said(old, new, said):
    before, now = (recipes.load(TEXT % words).stage[0] for words in (old, new))
    assert before.model_dump() == now.model_dump()
    assert now.warnings == ()
    assert len(before.warnings) == len(said)
    assert all(word in warning for word, warning in zip(said, before.warnings, strict=True))


@pytest.mark.parametrize(("old", "new", "said"), OLD_AND_NEW)
def test_run_folders_hang_on_the_old_words(old, new, said):
    before, now = (settings_of(recipes.load(TEXT % words)) for words in (old, new))
    assert before == now
    stage = now["stage"][0]
    assert "aggregator" not in stage
    assert "distributed" not in json.dumps(stage)
    assert stage["sum"] == ("secure" if 'sum = "secure"' in old else "plain")


def test_the_default_said_in_words_is_the_default_for_run_folders():
    said, left_out = (settings_of(recipes.load(TEXT % one)) for one in ('aggregator = "mean"', ""))
    assert said == left_out


def test_what_has_no_old_word_stands_by_its_own():
    stage = settings_of(recipes.load(TEXT % 'aggregator = "median"'))["stage"][0]
    assert stage["aggregator"] == {"kind": "median"}
    assert "sum" not in stage


def test_two_words_that_contradict_each_other_are_refused():
    with pytest.raises(ValidationError, match="contradict each other; leave out sum"):
        FederateStage(kind="federate", sum="secure", aggregator="median")
    assert FederateStage(kind="federate", sum="secure", aggregator="secure").aggregator.kind == (
        "secure"
    )


def test_a_word_that_never_was_is_unknown():
    with pytest.raises(ValidationError, match="sum"):
        FederateStage(kind="federate", sum="median")
