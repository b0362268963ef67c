"""The owner's gate: every rule at its boundary, and one budget for whoever asks about the data."""

from __future__ import annotations

import math
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedpress.api.approving import approve, asked_for
from fedpress.core import consent, parameters
from fedpress.errors import PolicyError, RecipeError, SecureError, TrainingError
from fedpress.federation import Start
from fedpress.federation.protocol import refusal_of, text_tensor
from fedpress.network import ledger as ledgers
from fedpress.network.gate import Asked
from fedpress.network.ledger import DAY, DataKey, OwnerLedger, Question
from fedpress.network.owner import OwnerGate
from fedpress.network.policy import Policy, PrivacyRules
from fedpress.network.spending import Charge, spent
from fedpress.network.status import StatusRow, status, table
from fedpress.privacy.ledger import Ledger, LedgerEntry
from fedpress.stages.federate.offer import Offer
from fedpress.stages.federate.refusals import AGREED_NOW
from fedpress.stages.federate.server import agree
from fedpress.wire.message import Message, pack, unpack
from tests.network.deployment import PRIVATE, RECIPE, Machines, run

LOOSE = {"max_epsilon": 1e6, "total_epsilon": 1e6, "trust": ("local", "distributed", "central")}
SECURE = """aggregator = "secure"
secure_keys = true
"""
OPEN = Policy(privacy=None)


def policy(privacy=(), **keys) -> Policy:
    return Policy(privacy=PrivacyRules(**{**LOOSE, **dict(privacy)}), **keys)


def gate(place: Path, rules: Policy, data: str = "own", **keys) -> OwnerGate:
    ledger = keys.pop("ledger", None) or OwnerLedger(place / "ledger.sqlite", **keys)
    return OwnerGate(rules, ledger, ledger.data(DataKey(f"/{data}", f"digest of {data}")), "cert")


def machines(place: Path, rules: Policy, text: str = RECIPE + PRIVATE, **keys) -> Machines:
    """Three clients, of which the first has an owner with rules; the others allow everything."""
    names = [f"c{at}" for at in range(3)]
    gates = {name: gate(place / "others", OPEN, data=name) for name in names[1:]}
    gates = {names[0]: gate(place, rules, **keys), **gates}
    found = Machines(place, gates, text)
    assert list(found.data.clients) == list(gates)
    return found


def shown(own: OwnerGate) -> list[StatusRow]:
    return status(own.ledger, own.policy)


def refusals(server) -> list[str]:
    return [record.refused.get("c0", "") for record in run(server)]


# Rules about the offer.


def offer(text: str = RECIPE + PRIVATE) -> Offer:
    found = Machines(Path("unused"), {}, text)
    from fedpress.pipeline.start import first_state

    state = first_state(found.recipe, found.data)
    stage = found.recipe.stage[0]
    return Offer.of(
        stage,
        state.spec,
        state.model,
        preprocess=found.data.preprocess,
        task=found.data.task,
        seed=1,
        labels=("label",),
    )


CENTRAL = PRIVATE + 'trust = "central"\n'
WHOLE = PRIVATE.replace("sample", "client") + 'trust = "local"\n'
SEEDED = PRIVATE.replace("secure_noise = true", "")


@pytest.mark.parametrize(
    ("allows", "refuses", "text", "rule"),
    [
        ({"server": "ab" * 32}, {"server": "cd" * 32}, PRIVATE, "server"),
        ({"families": ("mlp",)}, {"families": ("cnn",)}, PRIVATE, "families"),
        ({"max_parameters": 610}, {"max_parameters": 609}, PRIVATE, "max_parameters"),
        ({"min_cohort": 2}, {"min_cohort": 3}, "cohort = 2\n" + PRIVATE, "min_cohort"),
        ({"secure_sum": False}, {"secure_sum": True}, PRIVATE, "secure_sum"),
        ({"metrics": ("examples",)}, {"metrics": ("loss",)}, PRIVATE, "metrics"),
        ({"privacy": None}, {}, "", "privacy"),
        (
            {"privacy": PrivacyRules(unit="sample")},
            {"privacy": PrivacyRules(unit="client")},
            PRIVATE,
            "privacy.unit",
        ),
        (
            {"privacy": PrivacyRules(trust=("central",))},
            {"privacy": PrivacyRules(trust=("local",))},
            CENTRAL,
            "privacy.trust",
        ),
        (
            {"privacy": PrivacyRules(secure_noise=False)},
            {"privacy": PrivacyRules()},
            SEEDED,
            "privacy.secure_noise",
        ),
    ],
)
def test_each_rule_about_an_offer_allows_and_refuses(tmp_path, allows, refuses, text, rule):
    asked = Asked("1" * 16, "c0", offer(RECIPE + text))
    own = gate(tmp_path, Policy(**allows))
    own.server = "ab" * 32
    assert own.offered(asked, trial=False) is None
    own.policy = Policy(**refuses)
    found = own.offered(asked, trial=False)
    assert found is not None
    assert found.rule == rule
    # The server shows it: the cure stands after a semicolon.
    assert "; " in found.reason


def test_a_secure_sum_whose_keys_follow_from_the_seed_is_none(tmp_path):
    own = gate(tmp_path, Policy(secure_sum=True, privacy=None))
    seeded = Asked("1" * 16, "c0", offer(RECIPE + 'aggregator = "secure"\n'))
    assert "secure_keys" in own.offered(seeded, trial=False).reason
    drawn = Asked("1" * 16, "c0", offer(RECIPE + SECURE))
    assert own.offered(drawn, trial=False) is None


def test_a_promise_about_clients_is_also_one_about_rows(tmp_path):
    asked = Asked("1" * 16, "c0", offer(RECIPE + WHOLE))
    for unit in ("sample", "client"):
        assert gate(tmp_path, policy({"unit": unit})).offered(asked, trial=False) is None


def test_the_policy_and_the_certificate_must_name_one_server(tmp_path):
    import ssl

    (tmp_path / "ca.pem").write_text(ssl.DER_cert_to_PEM_cert(b"one"))
    (tmp_path / "data").write_text("1")
    (tmp_path / "policy.toml").write_text(f'server = "{"ab" * 32}"')
    where = {"policy": tmp_path / "policy.toml", "ledger": tmp_path / "ledger.sqlite"}
    for certificate in (None, tmp_path / "ca.pem"):
        with pytest.raises(PolicyError, match="allows the server with certificate abab"):
            OwnerGate.open(tmp_path / "data", certificate=certificate, **where)
    (tmp_path / "policy.toml").write_text("")
    assert len(OwnerGate.open(tmp_path / "data", certificate=certificate, **where).server) == 64


# Own code.


def code_offer(name: str) -> bytes:
    message = offer().to_message({"stage": "federate"})
    text = bytes(message.tensors["spec"].tolist()).decode()
    named = text.replace('"architecture":"mlp"', f'"architecture":"{name}"')
    assert named != text
    tensors = {**message.tensors, "spec": text_tensor(named)}
    return pack(Message(message.kind, message.header, tensors))


def test_code_that_the_policy_does_not_name_is_refused_and_never_imported(tmp_path, monkeypatch):
    (tmp_path / "hostile.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w').close()")
    monkeypatch.syspath_prepend(tmp_path)
    # Even if another part of the process has allowed it.
    with consent.allowing("hostile:Net"):
        found = machines(tmp_path, policy())
        reply = unpack(found.sessions["c0"].answer("1" * 16, code_offer("hostile:Net")))
    assert (reply.kind, reply.header["rule"]) == ("refused", "code")
    reply = unpack(found.sessions["c1"].answer("1" * 16, code_offer("hostile:Net")))
    assert (reply.kind, reply.header["rule"]) == ("refused", "code")
    assert not (tmp_path / "mark").exists()


def test_code_must_be_installed_where_the_policy_names_it(tmp_path):
    (tmp_path / "data").write_text("1")
    where = {"policy": tmp_path / "policy.toml", "ledger": tmp_path / "ledger.sqlite"}
    (tmp_path / "policy.toml").write_text('code = ["nowhere_at_all:Net"]')
    with pytest.raises(PolicyError, match=r"not installed here.*install the package"):
        OwnerGate.open(tmp_path / "data", **where)
    (tmp_path / "policy.toml").write_text('code = ["json:loads"]')
    own = OwnerGate.open(tmp_path / "data", **where)
    assert own.code_named("1" * 16, "json:loads") is None
    consent.withdraw()


# Rules about the run.


@pytest.mark.recipe
def test_a_small_population_is_refused_when_all_clients_are_known(tmp_path):
    found = machines(tmp_path, policy(min_cohort=3))
    assert refusals(found.bind(tmp_path / "a")) == ["", "", ""]
    found = machines(tmp_path, policy(min_cohort=4))
    reasons = refusals(found.bind(tmp_path / "b"))
    assert all("min_cohort: 3 clients in the run" in reason for reason in reasons)


def test_a_secure_sum_counts_the_clients_that_may_be_left(tmp_path):
    # A sum of three is opened with two.
    found = machines(tmp_path, Policy(privacy=None, min_cohort=2), RECIPE + SECURE)
    assert refusals(found.bind(tmp_path / "a")) == ["", "", ""]
    found = machines(tmp_path, Policy(privacy=None, min_cohort=3), RECIPE + SECURE)
    server = found.bind(tmp_path / "b")
    with pytest.raises(
        SecureError, match=r"c0 .the owner's policy says no to min_cohort: 2 clients"
    ):
        run(server)


def planned(tmp_path, delta=1e-5) -> float:
    """Epsilon of the whole recipe for one client, as its contract has it."""
    found = machines(tmp_path / "planned", policy())
    contract = found.bind(None).contract
    charges = [Charge("sample", entry) for entry in contract.planned_charges("c0")]
    return spent(charges, unit="sample", delta=delta)


@pytest.mark.parametrize("key", ["max_epsilon", "total_epsilon"])
def test_a_run_fits_exactly_into_its_budget_and_not_into_less(tmp_path, key):
    needed = planned(tmp_path)
    fits = machines(tmp_path / "fits", policy({key: needed}))
    assert refusals(fits.bind(tmp_path / "a")) == ["", "", ""]
    assert shown(fits.gates["c0"])[-1].epsilon == pytest.approx(needed)
    tight = machines(tmp_path / "tight", policy({key: 0.999 * needed}))
    reasons = refusals(tight.bind(tmp_path / "b"))
    assert all(reasons)
    assert shown(tight.gates["c0"])[-1].epsilon == 0
    assert shown(tight.gates["c0"])[0].refused[0].rule == f"privacy.{key}"


def test_only_approved_recipes_take_part_and_a_changed_one_is_another(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE + PRIVATE)
    found = machines(tmp_path, policy(require_approval=True))
    book = found.gates["c0"].ledger
    with pytest.raises(TrainingError, match="no client accepts"):
        Machines(tmp_path, {"c0": found.gates["c0"]}).bind(None)
    (approval,) = approve(path, ledger=book.path)
    assert refusals(found.bind(tmp_path / "a")) == ["", "", ""]
    offered = book.rows("rounds")[0]["recipe"]
    assert offered == approval.fingerprint
    assert asked_for(path, ["stage.federate.num_rounds=4"])[0].fingerprint != offered
    approve(path, ledger=book.path, withdraw=True)
    server = found.bind(tmp_path / "b")
    assert "c0" not in server.population.names
    (told,) = found.sentences
    assert told.startswith("client 'c0' does not take part (the owner's policy says no to require")
    assert told.endswith("; to approve it there: fedpress client approve RECIPE)")


@pytest.mark.parametrize("rest", ["", PRIVATE, SECURE, CENTRAL, WHOLE, "cohort = 2\nlr = 0.5\n"])
def test_a_recipe_alone_gives_the_fingerprint_of_the_real_offer(tmp_path, rest):
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE + rest)
    real = Offer.from_message(offer(RECIPE + rest).to_message({"stage": "federate"}))
    assert asked_for(path)[0].fingerprint == real.fingerprint


# Charges.


def test_every_answered_round_is_charged_once_also_after_a_restart(tmp_path):
    found = machines(tmp_path, policy())
    run(found.bind(tmp_path / "memory"), rounds=2)
    book = found.gates["c0"].ledger
    own = found.gates["c0"].data
    before = book.charges(own)
    assert [charge.entry.first_round for charge in before] == [1, 2]
    # The server and all clients are started again; the rounds are asked once more.
    found.start()
    run(found.bind(tmp_path / "memory"))
    assert [charge.entry.first_round for charge in book.charges(own)] == [1, 2, 3]


def test_the_owner_is_told_once_why_the_client_does_not_take_part(tmp_path):
    found = machines(tmp_path, policy({"max_epsilon": 0.1}))
    said = []
    found.sessions["c0"].told = said.append
    assert all(refusals(found.bind(tmp_path / "memory")))
    assert len(said) == 1
    assert said[0].startswith("refused (privacy.max_epsilon): epsilon of this recipe would be")


def rounds_of(server, found):
    """Yields after each round why `c0` is not in it, and what it was asked."""
    for record in server.rounds(Start(parameters.flatten(server.model))):
        asked = [kind for name, kind in found.asked if name == "c0"]
        found.asked.clear()
        yield record.refused.get("c0", ""), asked


def test_an_owner_who_refuses_the_run_is_asked_again_when_the_client_was_started_again(tmp_path):
    found = machines(tmp_path, policy({"max_epsilon": 0.1}))
    server = found.bind(tmp_path / "memory")
    found.asked.clear()
    rounds = rounds_of(server, found)
    reason, asked = next(rounds)
    assert "privacy.max_epsilon" in reason
    assert asked == []
    found.gates["c0"].policy = policy()
    found.start()
    assert next(rounds) == (AGREED_NOW, ["agree"])
    assert next(rounds) == ("", ["fit"])


def test_an_owner_who_approves_during_the_run_is_asked_again(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE + PRIVATE)
    found = machines(tmp_path, policy(require_approval=True))
    book = found.gates["c0"].ledger
    approve(path, ledger=book.path)
    found.bind(tmp_path / "memory")
    # The server is started again, and goes on with the same clients.
    approve(path, ledger=book.path, withdraw=True)
    found.start()
    server = found.bind(tmp_path / "memory")
    found.asked.clear()
    rounds = rounds_of(server, found)
    reason, asked = next(rounds)
    assert "require_approval" in reason
    assert asked == []
    approve(path, ledger=book.path)
    assert next(rounds) == (AGREED_NOW, ["agree"])
    assert next(rounds) == ("", ["fit"])


def agreed_in_a_trial(found) -> dict[str, str]:
    """Checks the recipe, and returns who refuses and why."""
    server = found.bind(None)
    return agree(server.transport, server.contract)


@pytest.mark.parametrize("key", ["max_epsilon", "total_epsilon"])
def test_a_killed_server_may_check_and_go_on_where_the_budget_is_just_enough(tmp_path, key):
    needed = planned(tmp_path)
    found = machines(tmp_path, policy({key: needed}))
    run(found.bind(tmp_path / "memory"), 1)
    found.start()
    # As `fedpress server` does before a run: a trial, which does not say which run will go on.
    assert agreed_in_a_trial(found) == {}
    records = run(found.bind(tmp_path / "memory"))
    assert not any(record.refused for record in records)
    own = found.gates["c0"]
    assert spent(own.ledger.charges(own.data), unit="sample", delta=1e-5) <= needed * (1 + 1e-9)
    # The run is finished: nothing of it can go on, and the budget is spent.
    found.start()
    assert key in agreed_in_a_trial(found)["c0"]


def test_the_same_question_to_a_client_that_forgot_its_secret_costs_again(tmp_path):
    import shutil

    found = machines(tmp_path, policy())
    run(found.bind(tmp_path / "memory"), rounds=1)
    shutil.rmtree(tmp_path / "c0")
    found.start()
    run(found.bind(tmp_path / "memory"), rounds=1)
    own = found.gates["c0"]
    assert len(own.ledger.charges(own.data)) == 2


@pytest.mark.recipe
def test_two_recipes_and_two_servers_share_the_budget_of_the_data(tmp_path):
    needed = planned(tmp_path)
    rules = policy({"total_epsilon": 1.2 * needed})
    first = machines(tmp_path / "first", rules)
    assert refusals(first.bind(tmp_path / "a")) == ["", "", ""]
    book = first.gates["c0"].ledger
    # Another recipe, from another server, into another folder; the data were copied elsewhere.
    own = OwnerGate(rules, book, book.data(DataKey("/copy", "digest of own")), "another")
    second = machines(tmp_path / "second", rules, (RECIPE + PRIVATE).replace("= 10\n", "= 5\n"))
    second.gates["c0"] = own
    second.start()
    reasons = refusals(second.bind(tmp_path / "b"))
    assert all(reasons)
    assert spent(book.charges(own.data), unit="sample", delta=1e-5) <= 1.2 * needed
    # Other data are not charged.
    other = machines(tmp_path / "third", rules, data="other", ledger=book)
    assert refusals(other.bind(tmp_path / "c")) == ["", "", ""]


def test_a_budget_that_another_server_spends_meanwhile_refuses_the_rest(tmp_path):
    needed = planned(tmp_path)
    found = machines(tmp_path, policy({"total_epsilon": needed}))
    server = found.bind(tmp_path / "memory")
    own = found.gates["c0"]
    with own.ledger.changing():
        about = Question(own.data, "2" * 16, "another", "another", "federate")
        entry = LedgerEntry("owner", "federate", 1.0, 8.0, 1, 1, 1)
        own.ledger.write_round(about, "another run", 1, [Charge("sample", entry)])
    reasons = refusals(server)
    assert reasons[-1].startswith("the owner's policy says no to privacy.total_epsilon: epsilon of")
    assert spent(own.ledger.charges(own.data), unit="sample", delta=1e-5) <= needed * (1 + 1e-9)


def test_a_run_without_privacy_ends_every_promise_about_the_data(tmp_path):
    found = machines(tmp_path, OPEN, RECIPE)
    run(found.bind(tmp_path / "a"))
    own = found.gates["c0"]
    assert shown(own)[-1].epsilon == math.inf
    private = machines(tmp_path / "b", policy(), ledger=own.ledger)
    assert all(refusals(private.bind(tmp_path / "c")))


EVERY_TRUST = {
    "rows, local": PRIVATE,
    "rows, together": PRIVATE + 'trust = "distributed"\n',
    "rows, server": CENTRAL,
    "clients, local": WHOLE,
    "clients, together": PRIVATE.replace("sample", "client") + 'trust = "distributed"\n',
    "clients, server": PRIVATE.replace("sample", "client"),
    "clients, correlated": PRIVATE.replace("sample", "client") + "correlated = { bands = 2 }\n",
}


@pytest.mark.parametrize("text", EVERY_TRUST.values(), ids=EVERY_TRUST)
def test_the_owner_is_charged_what_the_server_charges_and_what_was_planned(tmp_path, text):
    unit = "sample" if "sample" in text else "client"
    found = machines(
        tmp_path, policy({"unit": unit}), RECIPE + "epochs = 1\nmomentum = 0.0\n" + text
    )
    server = found.bind(tmp_path / "memory")
    assert refusals(server) == ["", "", ""]
    own = found.gates["c0"]
    charges = own.ledger.charges(own.data)
    charged = spent(charges, unit=unit, delta=1e-3)
    kept = server.spend(Ledger(unit), server.planned_tasks(), 1, 3)
    mine = [entry for entry in kept.entries if entry.who in ("c0", "population")]
    assert charged == Ledger(unit, tuple(mine)).epsilon(delta=1e-3)
    planned = [Charge(unit, entry) for entry in server.contract.planned_charges("c0")]
    assert charged == spent(planned, unit=unit, delta=1e-3)


def test_rounds_drawn_by_chance_are_charged_as_a_whole_with_the_first_answer(tmp_path):
    text = RECIPE + 'cohort = 2\nsampling = "poisson"\n' + PRIVATE.replace("sample", "client")
    found = machines(tmp_path, policy({"unit": "client"}), text)
    server = found.bind(tmp_path / "memory")
    own = found.gates["c0"]
    run(server)
    charges = own.ledger.charges(own.data)
    assert [charge.entry.steps for charge in charges] in ([], [3])
    entries = server.contract.charges_of_answer("c0", 2, first=True)
    assert [(entry.steps, entry.sampling_prob) for entry in entries] == [(3, pytest.approx(2 / 3))]
    assert server.contract.charges_of_answer("c0", 3, first=False) == []


def test_a_question_that_the_client_itself_refuses_costs_nothing(tmp_path):
    found = machines(tmp_path, policy())
    server = found.bind(tmp_path / "memory")
    session = found.sessions["c0"]
    own = found.gates["c0"]
    agreement = server.contract.terms.agreement.fingerprint
    params = torch.zeros(server.uplink.size)
    for header in (
        {"round": 1, "agreement": "another"},
        {"round": 99, "agreement": agreement},
        {"agreement": agreement},
    ):
        for kind in ("fit", "evaluate"):
            question = pack(Message(kind, header, {"params": params}))
            assert unpack(session.answer(found.opened[-1], question)).kind == "error"
    assert own.ledger.charges(own.data) == []


@pytest.mark.recipe
def test_rounds_per_day_hold_for_all_runs_and_whatever_the_clock_says(tmp_path):
    now = [1e9]
    found = machines(tmp_path, policy(rounds_per_day=2), clock=lambda: now[0])
    server = found.bind(tmp_path / "memory")
    first = refusals(server)
    assert first[:2] == ["", ""]
    assert first[2].startswith(
        "the owner's policy says no to rounds_per_day: 2 in 24 hours are allowed; "
    )
    now[0] -= 100 * DAY
    assert refusals(found.bind(tmp_path / "memory"))[2]
    now[0] += 101 * DAY + 1
    assert refusals(found.bind(tmp_path / "memory")) == ["", "", ""]


@pytest.mark.parametrize("rules", [{"min_cohort": 9}, {"families": ("cnn",)}])
def test_a_policy_that_was_changed_holds_for_a_run_that_goes_on(tmp_path, rules):
    found = machines(tmp_path, policy())
    server = found.bind(tmp_path / "memory")
    reasons = []
    for record in server.rounds(Start(parameters.flatten(server.model))):
        reasons.append(record.refused.get("c0", ""))
        # This client alone is started again, with another policy.
        found.gates["c0"].policy = policy(**rules)
        found.start()
    assert reasons[0] == ""
    (key,) = rules
    assert all(f"the owner's policy says no to {key}" in reason for reason in reasons[1:])


# Measures.


def test_the_loss_leaves_only_if_it_may(tmp_path):
    found = machines(tmp_path, Policy(privacy=None, metrics=("examples",)), RECIPE)
    server = found.bind(tmp_path / "memory")
    rows = {row["client"]: row for row in run(server)[0].clients}
    assert "loss" not in rows["c0"]
    assert "loss" in rows["c1"]
    scores = server.client_scores(torch.zeros(server.uplink.size))
    assert sorted(scores) == ["c1", "c2"]
    assert [one.rule for one in shown(found.gates["c0"])[0].refused] == ["metrics"]


# The ledger in use.


@pytest.mark.recipe
def test_a_ledger_that_does_not_work_refuses_and_says_so_on_both_sides(
    tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr(ledgers, "PATIENCE", 0.1)
    found = machines(tmp_path, policy())
    server = found.bind(tmp_path / "memory")
    import sqlite3

    raw = sqlite3.connect(tmp_path / "ledger.sqlite")
    raw.execute("BEGIN IMMEDIATE")
    reasons = refusals(server)
    raw.rollback()
    assert reasons[0] == (
        "the owner's policy says no to ledger: the owner's ledger cannot be read or written; "
        "the output of that client names a cure"
    )
    assert str(tmp_path) not in reasons[0]
    assert "ledger.sqlite" in caplog.text


def test_a_charge_without_an_answer_is_kept_and_not_charged_again(tmp_path, monkeypatch):
    from fedpress.stages.federate.client import ClientSide

    found = machines(tmp_path, policy())
    server = found.bind(tmp_path / "memory")
    real = ClientSide.answer

    class Killed(BaseException):
        pass

    def dies(self, message):
        if self.name == "c0" and message.kind == "fit":
            raise Killed
        return real(self, message)

    monkeypatch.setattr(ClientSide, "answer", dies)
    with pytest.raises(Killed):
        run(server)
    own = found.gates["c0"]
    assert len(own.ledger.charges(own.data)) == 1
    monkeypatch.undo()
    found.start()
    run(found.bind(tmp_path / "memory"), rounds=1)
    assert len(own.ledger.charges(own.data)) == 1


def test_the_status_is_a_table_of_what_was_asked_answered_refused_and_spent(tmp_path):
    found = machines(tmp_path, policy(rounds_per_day=2))
    run(found.bind(tmp_path / "memory"))
    rows = shown(found.gates["c0"])
    assert (rows[0].asked, rows[0].answered, rows[0].server) == (1, 2, "cert")
    assert rows[0].epsilon == rows[-1].epsilon > 0
    lines = table(rows)
    assert lines[0].split() == [
        "data",
        "recipe",
        "stage",
        "server",
        "approved",
        "asked",
        "answered",
        "epsilon",
    ]
    assert lines[1].split()[:3] == ["own", rows[0].recipe, "federate"]
    assert lines[2].split()[:2] == ["own", "total"]
    assert "on own: rounds_per_day: 2 in 24 hours are allowed; " in lines[3]


def test_a_refusal_in_the_middle_of_a_run_is_read_as_such():
    refusal = Message("refused", {"rule": "min_cohort", "reason": "2 clients"})
    assert refusal_of(refusal) == "the owner's policy says no to min_cohort: 2 clients"
    assert refusal_of(Message("update", {})) is None


@pytest.mark.recipe
@settings(
    max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    total=st.floats(0.3, 3.0),
    runs=st.lists(st.tuples(st.integers(1, 3), st.booleans()), min_size=1, max_size=4),
)
def test_whatever_is_asked_the_sum_never_exceeds_the_total(tmp_path_factory, total, runs):
    place = tmp_path_factory.mktemp("total")
    rules = policy({"total_epsilon": total}, min_cohort=1)
    book = OwnerLedger(place / "ledger.sqlite")
    for at, (rounds, moved) in enumerate(runs):
        # Each is another recipe and server; some find the data at another path.
        key = DataKey(f"/moved-{at}" if moved else "/own", "digest of own")
        own = OwnerGate(rules, book, book.data(key), f"server {at}")
        text = (RECIPE + PRIVATE).replace("batch_size = 10", f"batch_size = {at + 5}")
        asker = Machines(place / str(at), {"c0": own}, text)
        # Nobody agrees where the whole run does not fit in.
        with suppress(RecipeError):
            run(asker.bind(place / str(at) / "memory"), rounds=rounds)
        total_now = spent(book.charges(own.data), unit="sample", delta=1e-5)
        assert total_now <= total * (1 + 1e-9)
