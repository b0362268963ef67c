"""What earlier stages have left of a budget: the noise of a stage is calibrated to it."""

import pytest

from fedpress.errors import PrivacyError, WireError
from fedpress.federation.protocol import text_tensor
from fedpress.privacy.ledger import POPULATION, Ledger, LedgerEntry
from fedpress.stages.federate.budget import epsilon_left
from fedpress.stages.federate.server import ServerSide, register
from fedpress.wire import Message
from tests.stages.federate.test_sides import ask, clients_of, common, transport_to

TRUSTS = [
    pytest.param("sample", "local", marks=pytest.mark.recipe),
    pytest.param("sample", "distributed", marks=pytest.mark.recipe),
    pytest.param("sample", "central", marks=pytest.mark.recipe),
    ("client", "local"),
    ("client", "distributed"),
    ("client", "central"),
]
BEFORE = LedgerEntry(POPULATION, "statistics", 1.0, 4.0, 1)


def stage(unit="client", trust="central", **keys):
    private = {"unit": unit, "trust": trust, "epsilon": 2.0, "delta": 1e-3}
    return common(privacy=private, num_rounds=3, **keys)


@pytest.mark.parametrize(("unit", "trust"), TRUSTS)
def test_both_stages_together_use_the_budget_and_do_not_pass_it(unit, trust):
    begin = stage(unit, trust)
    clients = clients_of(begin)
    server = ServerSide.bind(begin, transport_to(clients), ledger=Ledger(unit, (BEFORE,)))
    after = server.spend(server.ledger, server.planned_tasks(), 1, 3)
    assert 0.97 * 2.0 <= after.epsilon(delta=1e-3) <= 2.0
    # The clients plan with the same noise.
    assert all(client.contract.terms == server.contract.terms for client in clients.values())


def test_without_earlier_charges_the_budget_is_the_recipes():
    begin = stage()
    population = register(transport_to(clients_of(begin)))
    assert epsilon_left(begin, population, Ledger("client")) is None


def test_a_budget_that_is_spent_is_refused():
    begin = stage()
    spent = Ledger("client", (LedgerEntry(POPULATION, "first", 1.0, 1.0, 1),))
    server = ServerSide.bind(begin, transport_to(clients_of(begin)), ledger=spent)
    with pytest.raises(PrivacyError, match=r"would bring epsilon to .*, beyond the budget 2"):
        server.spend(server.ledger, server.planned_tasks(), 1, 3)


@pytest.mark.parametrize("private", [True, False])
def test_a_client_refuses_a_server_that_plans_with_more_than_its_recipe_has(private):
    begin = stage() if private else common()
    clients = clients_of(begin)
    population = register(transport_to(clients))
    tensors = {"population": text_tensor(population.to_json())}
    with pytest.raises(WireError, match=r"agree.epsilon: the server plans with 2\.5, this client"):
        ask(clients["a"], Message("agree", {"epsilon": 2.5}, tensors))
