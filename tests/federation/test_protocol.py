import re

import pytest
import torch

from fedpress.errors import WireError
from fedpress.federation import Cohort, Payload, Uplink, protocol
from fedpress.federation.gatherer import round_mean
from fedpress.federation.protocol import FIELDS, REPORT, check_header, need
from fedpress.wire import Message, pack
from fedpress.wire.fields import NAMES, NUMBER, whole
from tests.federation.federation import SAMPLE_PLAN, Federation, update

RIGHT = {
    "round": 3,
    "agreement": "abc",
    "from": 0,
    "counted": 0,
    "cohort": ["a", "b"],
    "clip_norm": 0.5,
    "examples": 10,
    "loss": 0.25,
    "steps": 4,
    "below": True,
    "failures": [0.5, -1.25],
    "secure": {"round": 3},
    "run": "abc",
    "names": [],
    "size": 7,
    "reason": "it failed",
    "identity": "00ff",
    "metrics": {"accuracy": 0.5},
    "stage": "federate",
    "trial": False,
    "terms": "00ff",
    "rule": "max_epsilon",
    "epsilon": 8.0,
}
WRONG = {
    "a whole number": [
        True,
        False,
        1.0,
        3.5,
        "3",
        "",
        None,
        [],
        [3],
        {},
        -1,
        -(1 << 62),
        1 << 62,
        float("inf"),
    ],
    "a finite number": [True, "1", None, [1], {}, float("nan"), float("inf")],
    "a finite number above 0": [True, "1", None, [1], 0.0, -1.0, float("nan"), float("inf")],
    "text": [True, 1, 1.0, None, ["a"], {}],
    "true or false": [0, 1, 1.0, "true", None, []],
    "a list of names": ["ab", 1, None, [1], ["a", 1], ["a", None], {"a": 1}, [["a"]]],
    "a table": [[], "x", 1, None, True],
    "two numbers": [
        [],
        [1.0],
        [1.0, 2.0, 3.0],
        [1.0, "2"],
        [True, 1.0],
        "12",
        None,
        {},
        [1.0, float("nan")],
        [1e308, 0],
    ],
}


def wrong_for(kind):
    return next(
        values for words, values in WRONG.items() if kind.expected.split(" from ")[0] == words
    )


CASES = [
    (message, name, kind) for message, fields in FIELDS.items() for name, kind in fields.items()
]


@pytest.mark.parametrize(
    ("message", "name", "kind"), CASES, ids=lambda v: v if isinstance(v, str) else ""
)
def test_every_field_of_every_message_takes_its_kind_and_nothing_else(message, name, kind):
    check_header(message, {name: RIGHT[name]})
    assert need(message, {name: RIGHT[name]}, name) == RIGHT[name]
    for value in wrong_for(kind):
        if name == "size" and value == 1 << 62:
            continue
        with pytest.raises(WireError, match=rf"^{message}\.{name}: got .*, expected "):
            check_header(message, {name: value})
    with pytest.raises(WireError, match=rf"^{message}\.{name}: got None"):
        need(message, {}, name)


def test_the_report_of_a_secure_sum_is_checked_inside_an_update():
    check_header("update", {"secure": {"round": 0}})
    for value in wrong_for(REPORT["round"]):
        with pytest.raises(WireError, match=r"^update\.secure\.round: got"):
            check_header("update", {"secure": {"round": value}})


def test_a_field_that_nobody_reads_and_an_unknown_message_pass():
    check_header("fit", {"later": True})
    check_header("hello", {"round": True})


def test_long_values_are_shown_short():
    with pytest.raises(WireError) as caught:
        check_header("fit", {"round": "9" * 5000})
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize("value", [True, 1.0, "1", -1, 0, 1 << 62, None, [1], {"a": 1}])
def test_a_client_answers_only_rounds_that_are_whole_numbers(value):
    federation = Federation(privacy=SAMPLE_PLAN, num_rounds=2)
    fit = federation.fit()
    with pytest.raises(WireError, match=r"fit\.round: got"):
        federation.clients["c0"].handle(
            pack(Message("fit", {**fit.header, "round": value}, fit.tensors))
        )


@pytest.mark.parametrize("field", ["round", "examples", "steps"])
@pytest.mark.parametrize("value", [True, 1.0, "1", -1, 1 << 62])
def test_a_server_counts_only_replies_whose_numbers_are_whole(field, value):
    reply = update(torch.ones(2), **{field: value})
    mean = round_mean(Uplink.bind(Payload(2), Cohort(1, 1)), iter([("c0", reply)]), seed=1, round=1)
    assert mean.update is None
    assert mean.refused["c0"].startswith(f"update.{field}: got {value!r}")


def test_kinds_say_what_they_expect():
    assert whole(1).holds(1)
    assert not whole(1).holds(0)
    assert NUMBER.holds(1)
    assert NAMES.holds([])


def test_every_answer_and_every_question_of_the_table_in_words_is_a_row():
    told = set(re.findall(r"`(\w+)`", protocol.__doc__.partition("| --- |")[2])) & FIELDS.keys()
    assert told == FIELDS.keys()
