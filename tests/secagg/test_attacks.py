"""What a dishonest server, client or stranger may try, and what it gets."""

import contextlib
import copy

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedpress.errors import RecipeError, SecureError, WireError
from fedpress.secagg import SecAggClient, SecAggMessage, SecAggServer, SecurePlan, identity
from fedpress.secagg.keys import KeyPair, sign
from fedpress.secagg.public import PublicRound, SecAggSetup
from tests.secagg.people import changed, group, numbers, reported, secret

ONE = torch.ones(3, dtype=torch.int64)


@pytest.fixture
def people():
    return group(6)


def test_a_second_vector_in_the_same_round_is_refused(people):
    _, members = people
    members["c0"].mask(ONE, round=1, cohort=list(members))
    with pytest.raises(SecureError, match="answered another mask question"):
        members["c0"].mask(ONE + 1, round=1, cohort=list(members))
    with pytest.raises(SecureError, match="answered another mask question"):
        members["c0"].mask(torch.ones(4, dtype=torch.int64), round=1, cohort=list(members))


def test_another_cohort_in_the_same_round_is_refused():
    _, members = group(3, extra=1)
    members["c0"].mask(ONE, round=1, cohort=["c0", "c1", "c2"])
    with pytest.raises(SecureError, match="answered another mask question"):
        members["c0"].mask(ONE, round=1, cohort=["c0", "c1", "c3"])


def test_a_round_that_is_over_is_refused(people):
    _, members = people
    members["c0"].mask(ONE, round=5, cohort=list(members))
    with pytest.raises(SecureError, match="round 4: it is over: round"):
        members["c0"].mask(ONE, round=4, cohort=list(members))


def test_nobody_is_called_dead_to_some_and_alive_to_others(people):
    combiner, members = people
    values = numbers(6)
    everybody = reported(combiner, members, values)
    requests = everybody.requests()
    fewer = reported(combiner, members, values, silent=["c5"])
    others = fewer.requests()
    answers = {name: members[name].unmask(requests[name]) for name in ("c0", "c1", "c2")}
    with pytest.raises(SecureError, match="'c0' answered another unmask question"):
        members["c0"].unmask(others["c0"])
    answers |= {name: members[name].unmask(others[name]) for name in ("c3", "c4")}
    for secure in (everybody, fewer):
        mixed = copy.deepcopy(secure)
        for name, answer in answers.items():
            shape = {key: tensor.shape for key, tensor in answer.tensors.items()}
            locks = 6 if secure is everybody else 5
            if shape["locks"][0] == locks:
                mixed.share(name, answer)
        with pytest.raises(SecureError, match="and at least 4 must"):
            mixed.sum()


def test_answers_about_different_lists_of_equal_length_open_nothing_together():
    combiner, members = group(9)
    values = numbers(9)
    lists = [reported(combiner, members, values, silent=[name]) for name in ("c7", "c8")]
    first, second = (secure.requests() for secure in lists)
    answers = {
        name: members[name].unmask((first if at % 2 else second)[name])
        for at, name in enumerate(list(first)[:7])
    }
    for secure in lists:
        for name, answer in answers.items():
            secure.share(name, answer)
        with pytest.raises(SecureError, match=r"[0-3] of the committee gave right answers"):
            secure.sum()


def test_a_list_of_too_few_is_refused_by_the_committee(people):
    combiner, members = people
    secure = reported(combiner, members, numbers(6))
    request = secure.requests()["c0"]
    few = torch.tensor([1, 1, 1, 0, 0, 0], dtype=torch.uint8)
    cut = {key: request.tensors[key][:3] for key in ("nonces", "digests", "signatures")}
    with pytest.raises(SecureError, match="3 of 6 clients reported"):
        members["c0"].unmask(changed(request, reported=few, **cut))


def test_clients_that_did_not_report_cannot_be_listed(people):
    combiner, members = people
    secure = reported(combiner, members, numbers(6), silent=["c5"])
    request = secure.requests()["c0"]
    more = {
        key: torch.cat([request.tensors[key], request.tensors[key][:1]])
        for key in ("nonces", "digests", "signatures")
    }
    with pytest.raises(WireError, match="'c5' signed no such report"):
        members["c0"].unmask(changed(request, reported=torch.ones(6, dtype=torch.uint8), **more))


def test_a_report_of_another_round_cannot_be_listed(people):
    combiner, members = people
    old = reported(combiner, members, numbers(6)).requests()["c0"]
    new = reported(combiner, members, numbers(6), round=2).requests()["c0"]
    with pytest.raises(WireError, match="signed no such report"):
        members["c0"].unmask(
            changed(new, signatures=old.tensors["signatures"], digests=old.tensors["digests"])
        )


def test_who_masked_nothing_unmasks_nothing():
    combiner, members = group(6)
    request = reported(combiner, members, numbers(6)).requests()["c0"]
    known = {name: identity(secret(name)) for name in members}
    fresh = SecAggClient("c0", secret("c0"), SecurePlan(6, 18), known, "run")
    with pytest.raises(SecureError, match="roster: this client has no roster"):
        fresh.unmask(request)
    fresh.accept(combiner.roster())
    with pytest.raises(SecureError, match="masked no vector"):
        fresh.unmask(request)


def test_shares_addressed_to_another_cannot_be_read(people):
    combiner, members = people
    secure = reported(combiner, members, numbers(6))
    requests = secure.requests()
    answer = members["c0"].unmask(changed(requests["c0"], sealed=requests["c1"].tensors["sealed"]))
    secure.share("c0", answer)
    assert (
        answer.tensors["body"].shape == members["c1"].unmask(requests["c1"]).tensors["body"].shape
    )
    for name in ("c1", "c2", "c3", "c4"):
        secure.share(name, members[name].unmask(requests[name]))
    assert torch.equal(
        secure.sum(), numbers(6).sum(0)
    )  # what c0 could not read came from the others


def test_a_client_that_seals_rubbish_closes_the_sum_and_is_named(people):
    combiner, members = people
    secure = reported(combiner, members, numbers(6))
    secure._reports[3]["sealed"] ^= 1
    requests = secure.requests()
    for name in requests:
        secure.share(name, members[name].unmask(requests[name]))
    with pytest.raises(SecureError, match="only 0 of the committee can decrypt the shares of 'c3'"):
        secure.sum()


def test_a_client_with_other_masks_than_its_neighbours_is_named(people):
    combiner, members = people
    secure = reported(combiner, members, numbers(6))
    secure._reports[3]["commitments"] ^= 1
    with pytest.raises(SecureError, match="'c3' and its neighbours do not agree"):
        secure.requests()


@pytest.mark.parametrize("field", ["masked", "nonce", "sealed", "commitments", "signature"])
def test_a_report_that_was_changed_is_refused(people, field):
    combiner, members = people
    secure = combiner.open(1, list(members), 3)
    part = members["c0"].mask(ONE, round=1, cohort=list(members))
    with pytest.raises(WireError, match=r"report\.signature"):
        secure.add("c0", changed(part, **{field: part.tensors[field] ^ 1}))
    assert secure.reported == []


def test_a_report_of_another_client_round_run_or_plan_is_refused(people):
    combiner, members = people
    cohort = list(members)
    secure = combiner.open(2, cohort, 3)
    part = members["c1"].mask(ONE, round=2, cohort=cohort)
    with pytest.raises(WireError, match=r"report\.signature: not signed by 'c0'"):
        secure.add("c0", part)
    with pytest.raises(WireError, match=r"report\.round: got 1, expected 2"):
        secure.add("c0", members["c0"].mask(ONE, round=1, cohort=cohort))
    old = members["c0"].mask(ONE, round=1, cohort=cohort)
    with pytest.raises(WireError, match=r"report\.signature"):
        secure.add("c0", SecAggMessage({"round": 2}, old.tensors))
    for other in (group(6, run="other")[1], group(6, max_corrupt=0.0)[1]):
        with pytest.raises(WireError, match=r"report\.signature"):
            secure.add("c0", other["c0"].mask(ONE, round=2, cohort=cohort))
    secure.add("c1", part)
    with pytest.raises(WireError, match="reported twice"):
        secure.add("c1", part)
    with pytest.raises(WireError, match="not in the cohort"):
        secure.add("x", part)


def test_a_late_report_or_answer_is_refused(people):
    combiner, members = people
    secure = reported(combiner, members, numbers(6, size=3), silent=["c5"])
    late = members["c5"].mask(numbers(6, size=3)[5], round=1, cohort=list(members))
    requests = secure.requests()
    answer = members["c0"].unmask(requests["c0"])
    with pytest.raises(WireError, match="twice or too late"):
        secure.add("c5", late)
    with pytest.raises(WireError, match="'c5' was not asked"):
        secure.share("c5", answer)
    secure.share("c0", answer)
    with pytest.raises(WireError, match="answered twice"):
        secure.share("c0", answer)


def test_strangers_doubles_and_other_sizes_of_cohort_are_refused(people):
    combiner, members = people
    for cohort in (["c0", "c1", "c2", "c3", "c4", "x"], ["c0"] * 6, ["c0", "c1"], []):
        with pytest.raises(WireError, match=r"round\.cohort"):
            members["c0"].mask(ONE, round=1, cohort=cohort)
        with pytest.raises(RecipeError, match="cohort"):
            combiner.open(1, cohort, 3)
    _, more = group(3, extra=1)
    with pytest.raises(WireError, match="'c3' was asked but is not in the cohort"):
        more["c3"].mask(ONE, round=1, cohort=["c0", "c1", "c2"])


def test_a_swapped_key_a_double_and_a_missing_client_in_the_roster_are_refused():
    combiner, members = group(3)
    roster = combiner.roster()
    known = {name: identity(secret(name)) for name in members}

    def fresh(name="c0", run="run"):
        return SecAggClient(name, secret(name), SecurePlan(3, 18), known, run)

    keys = roster.tensors["keys"].clone()
    keys[1] = torch.frombuffer(bytearray(KeyPair(bytes(32), "run").public), dtype=torch.uint8)
    with pytest.raises(WireError, match="'c1' is not signed by it"):
        fresh().accept(changed(roster, keys=keys))
    with pytest.raises(WireError, match="two clients have the same key"):
        fresh().accept(changed(roster, keys=roster.tensors["keys"][:1].expand(3, 32)))
    for names in (["c0", "c1", "c1"], ["c1", "c0", "c2"]):
        with pytest.raises(WireError, match=r"roster\.names"):
            fresh().accept(SecAggMessage({"names": names}, roster.tensors))
    with pytest.raises(WireError, match="'x' is not signed by it"):
        fresh().accept(SecAggMessage({"names": ["c0", "c1", "x"]}, roster.tensors))
    rest = {key: tensor[1:] for key, tensor in roster.tensors.items()}
    with pytest.raises(WireError, match="the key of 'c0' is missing"):
        fresh().accept(SecAggMessage({"names": ["c1", "c2"]}, rest))
    with pytest.raises(WireError, match="is not signed by it"):
        fresh(run="other").accept(roster)
    member = fresh()
    member.accept(roster)
    with pytest.raises(SecureError, match="another roster"):
        member.accept(
            SecAggMessage(
                {"names": ["c0", "c1"]}, {key: tensor[:2] for key, tensor in roster.tensors.items()}
            )
        )


def test_a_roster_that_others_have_checked_is_checked_anew_under_other_identities():
    combiner, members = group(3)
    roster = combiner.roster()
    members["c0"].accept(roster)
    known = {name: identity(secret(name)) for name in members}
    plan = SecurePlan(3, 18)
    SecAggClient("c0", secret("c0"), plan, known, "run").accept(roster)
    known["c1"] = identity(secret("stranger"))
    with pytest.raises(WireError, match="'c1' is not signed by it"):
        SecAggClient("c0", secret("c0"), plan, known, "run").accept(roster)


def test_a_key_that_agrees_on_no_secret_is_refused():
    names = ["c0", "c1"]
    plan = SecurePlan(2, 18)
    known = {name: identity(secret(name)) for name in names}
    member, combiner = (
        SecAggClient("c0", secret("c0"), plan, known, "run"),
        SecAggServer(plan, known, "run"),
    )
    combiner.join("c0", member.join())
    low = bytes(32)
    signature = sign(secret("c1"), *SecAggSetup(plan, {}, "run").words, "join", "c1", low)
    combiner.join(
        "c1",
        SecAggMessage(
            {},
            {
                "key": torch.zeros(32, dtype=torch.uint8),
                "signature": torch.tensor(list(signature), dtype=torch.uint8),
            },
        ),
    )
    with pytest.raises(WireError, match="the key of 'c1' is invalid"):
        member.accept(combiner.roster())


def test_joining_with_a_forged_signature_twice_or_late_is_refused(people):
    names = ["c0", "c1"]
    known = {name: identity(secret(name)) for name in names}
    members = {
        name: SecAggClient(name, secret(name), SecurePlan(2, 18), known, "run") for name in names
    }
    combiner = SecAggServer(SecurePlan(2, 18), known, "run")
    with pytest.raises(WireError, match=r"join\.signature: not signed by 'c0'"):
        combiner.join("c0", members["c1"].join())
    with pytest.raises(SecureError, match="0 clients joined"):
        combiner.roster()
    combiner.join("c0", members["c0"].join())
    with pytest.raises(WireError, match="joined twice"):
        combiner.join("c0", members["c0"].join())
    combiner.join("c1", members["c1"].join())
    roster = combiner.roster()
    accepted = members["c0"].accept(roster)
    with pytest.raises(WireError, match=r"accept\.signature"):
        combiner.accepted("c1", accepted)
    with pytest.raises(WireError, match="not in the roster"):
        combiner.accepted("x", accepted)
    combiner.accepted("c0", accepted)
    with pytest.raises(RecipeError, match="did not accept"):
        combiner.open(1, names, 3)


def test_wrong_identities_and_secrets_are_refused():
    known = {"c0": identity(secret("c0"))}
    with pytest.raises(RecipeError, match="expected 32 random bytes"):
        SecAggClient("c0", b"short", SecurePlan(2, 18), known, "run")
    with pytest.raises(RecipeError, match="does not belong to the client's secret"):
        SecAggClient("c0", secret("c1"), SecurePlan(2, 18), known, "run")


COMBINER, MEMBERS = group(3)
SECURE = reported(COMBINER, MEMBERS, numbers(3))
REQUESTS = SECURE.requests()
PARTS = {
    "join": MEMBERS["c0"].join(),
    "roster": COMBINER.roster(),
    "accepted": MEMBERS["c0"].accept(COMBINER.roster()),
    "report": MEMBERS["c0"].mask(numbers(3)[0], round=1, cohort=["c0", "c1", "c2"]),
    "request": REQUESTS["c0"],
    "share": MEMBERS["c0"].unmask(REQUESTS["c0"]),
}
JUNK = st.one_of(
    st.none(),
    st.integers(),
    st.text(max_size=3),
    st.lists(st.text(max_size=2), max_size=4),
    st.booleans(),
)


def receive(kind, part):
    known = {name: identity(secret(name)) for name in MEMBERS}
    if kind == "join":
        SecAggServer(SecurePlan(3, 18), known, "run").join("c0", part)
    elif kind == "roster":
        SecAggClient("c0", secret("c0"), SecurePlan(3, 18), known, "run").accept(part)
    elif kind == "accepted":
        COMBINER.accepted("c0", part)
    elif kind == "report":
        COMBINER.open(1, list(MEMBERS), 7).add("c0", part)
    elif kind == "request":
        member = SecAggClient("c0", secret("c0"), SecurePlan(3, 18), known, "run")
        member.load_state_(MEMBERS["c0"].state())
        member.unmask(part)
    else:
        secure = copy.deepcopy(SECURE)
        secure.share("c0", part)
        for name in ("c1", "c2"):
            secure.share(name, MEMBERS[name].unmask(REQUESTS[name]))
        assert torch.equal(secure.sum(), numbers(3).sum(0))


@pytest.mark.parametrize("kind", PARTS)
def test_the_parts_that_are_fuzzed_are_taken_unchanged(kind):
    receive(kind, PARTS[kind])


@pytest.mark.recipe
@given(kind=st.sampled_from(sorted(PARTS)), data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_no_mutated_part_raises_anything_but_our_errors(kind, data):
    part = PARTS[kind]
    header, tensors = dict(part.header), dict(part.tensors)
    what = data.draw(st.sampled_from(["header", "drop", "cut", "type", "flip", "shape"]))
    name = data.draw(st.sampled_from(sorted(tensors)))
    if what == "header":
        header[data.draw(st.sampled_from(["round", "names", "cohort", "size"]))] = data.draw(JUNK)
    elif what == "drop":
        del tensors[name]
    elif what == "cut":
        tensors[name] = tensors[name][:-1]
    elif what == "type":
        tensors[name] = tensors[name].to(
            data.draw(st.sampled_from([torch.float32, torch.int64, torch.int8]))
        )
    elif what == "flip":
        flat = tensors[name].clone().reshape(-1)
        flat[data.draw(st.integers(0, len(flat) - 1))] ^= data.draw(st.integers(1, 127))
        tensors[name] = flat.view(tensors[name].shape)
    else:
        tensors[name] = tensors[name].reshape(-1)[None]
    with contextlib.suppress(WireError, SecureError):
        receive(kind, SecAggMessage(header, tensors))


def test_a_list_without_the_neighbours_of_one_client_is_refused_by_the_committee():
    """A server that has everybody's report leaves out all neighbours of the one client that it wants to see alone."""
    plan = SecurePlan(100, 18)
    facts = PublicRound(1, tuple(f"c{i:02}" for i in range(100)), 2, bytes(32), plan)
    victim = next(i for i in range(100) if len(facts.neighbours(i)) <= plan.dropped)
    left = np.ones(100, bool)
    left[facts.neighbours(victim)] = False
    assert left.sum() >= plan.survivors  # so the count alone would let it pass
    assert "only 0 neighbours" in facts.too_few(left)
