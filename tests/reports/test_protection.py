from __future__ import annotations

import pytest

from fedpress.reports.protection import all_private, protection, protections

SAMPLE = {"kind": "federate", "name": "f", "unit": "sample", "epsilon": 2.0, "delta": 1e-5}


def everything(it) -> str:
    return " ".join([it.summary, *it.protected, *it.trusted, *it.unprotected])


def test_sample_privacy_protects_examples_against_the_server():
    it = protection(SAMPLE)
    assert (
        it.summary
        == "Every private example is protected with ε = 2.00 at δ = 1e-5, against all who lack the noise's seed."
    )
    assert "7.39 times" in " ".join(it.protected)  # e^2
    assert not any("The server." in line for line in it.trusted)
    assert any("secure sum" in line for line in it.unprotected)


@pytest.mark.parametrize("trust", ["central", "local"])
def test_a_buffered_schedule_hides_what_a_client_sends_and_not_that_it_is_listed(trust):
    stage = {**SAMPLE, "unit": "client", "trust": trust}
    rounds, buffered = protection(stage), protection({**stage, "schedule": "buffered"})
    assert "Adding or removing one client" in everything(rounds)
    assert "is on the list" not in everything(rounds)
    assert "Whether one client sends its updates, or nothing" in everything(buffered)
    assert "is on the list, and when it was asked" in everything(buffered)


def test_client_privacy_with_central_noise_trusts_the_server():
    it = protection({**SAMPLE, "unit": "client"})
    assert "everybody except the server" in it.summary
    assert it.trusted[0].startswith("The server.")
    assert any("Nothing is hidden from the server" in line for line in it.unprotected)


@pytest.mark.parametrize("epsilon", [None, float("inf"), float("nan")])
@pytest.mark.parametrize("unit", ["sample", "client", "none", None])
def test_without_a_finite_epsilon_nothing_is_promised(unit, epsilon):
    it = protection({"kind": "federate", "unit": unit, "epsilon": epsilon, "delta": 1e-5})
    assert it.summary.startswith("No differential privacy")
    assert it.protected == []


def test_a_stage_without_privacy_breaks_the_promise_of_the_run():
    stages = [{"kind": "federate", "name": "open"}, {"kind": "train"}, SAMPLE]
    first, second = protections(stages)
    assert first.summary.startswith("No differential privacy")
    assert "But not in the run as a whole: “open” used private data" in second.summary
    assert not all_private(stages)
    assert all_private([SAMPLE, {"kind": "train"}])


def test_accuracy_on_private_examples_is_named_as_uncovered():
    assert not any("worth to each client" in line for line in protection(SAMPLE).unprotected)
    assert any(
        "worth to each client" in line
        for line in protection({**SAMPLE, "client_accuracy": {"a": 1}}).unprotected
    )


@pytest.mark.parametrize(("sampling_prob", "secret"), [(0.1, True), (1.0, False)])
def test_cohorts_must_be_secret_only_where_they_are_sampled(sampling_prob, secret):
    it = protection({**SAMPLE, "unit": "client", "sampling_prob": sampling_prob})
    assert any("Secret cohorts" in line for line in it.trusted) == secret


def test_an_unknown_unit_is_not_dressed_up_as_a_promise():
    it = protection({**SAMPLE, "unit": "household"})
    assert "household" in it.summary
    assert it.protected == []


@pytest.mark.parametrize("stage", [SAMPLE, {**SAMPLE, "unit": "client"}, {"kind": "federate"}])
def test_every_page_says_what_is_public_and_what_is_not_covered(stage):
    text = everything(protection(stage))
    for words in ("public part", "test sets", "Who the clients are"):
        assert words in text


def test_a_large_epsilon_has_a_readable_factor():
    assert "e^800 times" in " ".join(protection({**SAMPLE, "epsilon": 800.0}).protected)


def federated(**facts):
    return {"kind": "federate", "name": "f", "epsilon": 2.0, "delta": 1e-5, **facts}


TRUST = [
    ("sample local plain", "adds the noise before anything leaves", "learned only the sum"),
    ("sample secure seed", "keys of the secure sum follow", "adds the noise."),
    ("sample secure system", "learned only the sum", "keys of the secure"),
    ("sample central plain", "sees every client's sum of gradients", "learned only"),
    ("client secure system", "learned only the sum", "sees every client"),
    ("client local plain", "noise of its own is added inside", "learned only the sum"),
    ("client central plain", "sees every client's update without noise", "learned only"),
]


@pytest.mark.parametrize(("kind", "said", "unsaid"), TRUST)
def test_each_kind_of_trust_is_told_apart(kind, said, unsaid):
    unit, trust, keys = kind.split()
    secure = {"sum": "secure", "keys": keys} if keys != "plain" else {"sum": "plain"}
    it = protection(federated(unit=unit, trust=trust, **secure))
    text = " ".join([it.summary, *it.protected, *it.trusted, *it.unprotected])
    assert said in text
    assert unsaid not in text


def test_a_secure_sum_without_privacy_hides_updates_and_promises_no_more():
    it = protection(federated(epsilon=None, sum="secure", keys="seed"))
    assert "single updates are hidden" in it.summary
    assert not it.protected
    assert any("keys of the secure sum follow" in line for line in it.trusted)


@pytest.mark.parametrize("unit", ["sample", "client"])
@pytest.mark.parametrize("trust", ["local", "central", "distributed"])
def test_noise_from_the_system_leaves_no_seed_and_no_rounding_to_fear(unit, trust):
    seeded = everything(protection(federated(unit=unit, trust=trust)))
    secret = everything(protection(federated(unit=unit, trust=trust, noise_source="system")))
    assert "the noise's seed" in seeded or trust == "central"
    for words in ("knows the seed", "Attacks on rounding"):
        assert words in seeded
        assert words not in secret
    assert "noise's seed" not in secret
    assert "Other runs on the same data" in secret


QUERY = {
    **SAMPLE,
    "kind": "statistics",
    "sums": 12,
    "columns": {"age": {"mean": 50.0, "std": 1.0}, "pay": {"mean": 1.0, "std": 1.0}},
    "words": {"job": ["cook"]},
}


def test_a_query_says_what_was_asked_and_what_it_cost():
    it = protection(QUERY)
    assert "protected with ε = 2.00 at δ = 1e-5" in it.summary
    assert it.summary.endswith(
        "Asked once, by 12 sums over all examples: mean and standard deviation of age, pay; the most "
        "frequent words of job."
    )
    assert "gradient" not in " ".join(it.protected)
    medians = {"age": {"median": 1.0, "quartiles": [0.0, 2.0]}}
    assert "median and quartiles of age" in protection({**QUERY, "columns": medians}).summary


def test_a_later_stage_says_what_was_left_to_it():
    said = protection({**SAMPLE, "epsilon_budget": 8.0, "epsilon_left": 7.123}).summary
    assert said.endswith("of the budget of ε = 8.00 they had left ε = 7.13 to this one.")
    assert "left" not in protection(SAMPLE).summary


def test_a_query_beside_an_open_stage_promises_nothing_for_the_run():
    first, _ = protections([QUERY, {"kind": "federate", "name": "open"}])
    assert "But not in the run as a whole: “open” used private data" in first.summary
    assert all_private([QUERY])


def test_a_query_of_texts_says_so():
    texts = {**QUERY, "columns": {}, "words": {"vocabulary": ["a", "b"]}}
    assert protection(texts).summary.endswith(
        "sums over all examples: the tokens of the vocabulary."
    )


def test_what_a_later_stage_says_alike_is_said_once():
    first, second = protections([QUERY, SAMPLE])
    assert first.trusted == first.unprotected == ["The same as in “f”, below."]
    assert second == protection(SAMPLE)
    other, _ = protections([{**QUERY, "trust": "central"}, SAMPLE])
    assert other.trusted == protection({**QUERY, "trust": "central"}).trusted
