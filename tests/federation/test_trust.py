"""What follows from each row of the table of trust; what it does in a round is tested with uplink, client and stage."""

import pytest

from fedpress.errors import DivergedError, RecipeError, TrainingError
from fedpress.federation.sources import GRADIENT_SOURCES
from fedpress.federation.trust import TRUSTS, per_vector_multiplier, trust_of
from tests.federation.federation import SAMPLE_PLAN, key

MEASURED = {"loss": 1.5, "steps": 4, "secret": 7}


@pytest.fixture(params=TRUSTS, ids=[f"{row.kind} {row.unit}" for row in TRUSTS])
def trust(request):
    return request.param


def test_every_unit_and_kind_is_one_row(trust):
    assert trust_of(trust.unit, trust.kind) is trust
    assert len({(row.unit, row.kind) for row in TRUSTS}) == len(TRUSTS)
    assert trust.agreed() == {"kind": trust.kind, "unit": trust.unit}
    assert trust.steps in GRADIENT_SOURCES


def test_an_unknown_kind_is_refused_and_the_old_word_is_read():
    assert trust_of("client", "secure") is trust_of("client", "distributed")
    with pytest.raises(RecipeError, match="expected 'local', 'distributed' or 'central'"):
        trust_of("client", "nobody")


def test_a_client_is_named_only_where_its_own_vectors_are_private_or_nothing_is(trust):
    assert trust.names_clients == (trust.noise in ("none", "step"))
    assert trust.names_clients == (not trust.fixed_divisor)
    assert trust.hides_cohort == (trust.noise == "server")


def test_nothing_but_public_numbers_is_said(trust):
    said = trust.reported(MEASURED, 9, updates_seen=True)
    assert "secret" not in said
    assert ("loss" in said) is (trust.unit is None)
    assert ("examples" in said) <= (trust.unit != "client")
    assert trust.reported(MEASURED, 9, updates_seen=False) == {}


def test_a_failure_is_raised_kept_quiet_about_or_counted(trust):
    problem = ValueError("pixel 17")
    if trust.unit is None:
        with pytest.raises(ValueError, match="pixel 17"):
            trust.after_failure(problem, 3.6)
    elif trust.noise == "step":
        with pytest.raises(TrainingError, match="ValueError; the cause is hidden") as caught:
            trust.after_failure(problem, 3.6)
        assert "17" not in str(caught.value)
    elif trust.unit == "client":
        assert trust.after_failure(problem, 3.6) == {"failed": 1}
        assert trust.after_failure(DivergedError("x"), 3.6) == {"not_finite": 1}
    else:  # the same for every cause
        assert trust.after_failure(problem, 3.6) == {"failed": 4}
        assert trust.after_failure(DivergedError("x"), 3.6) == {"failed": 4}


def test_counts_of_failures_have_noise_unless_the_server_adds_it(trust):
    if trust.unit is None:
        return  # nothing is counted
    said = trust.failures({"failed": 2}, SAMPLE_PLAN, key(), lambda: "hidden").get("failures")
    assert (said == [0.0, 2.0]) is (trust.noise == "server")
    none = trust.failures({}, SAMPLE_PLAN, key(), lambda: "hidden")
    assert bool(none) is (trust.noise != "server")


@pytest.mark.parametrize("vectors", [1, 2, 3, 7])
def test_the_noise_of_many_vectors_costs_what_one_costs(vectors):
    each = per_vector_multiplier(1.7, vectors)
    assert (vectors / each**2) ** -0.5 == pytest.approx(1.7)
