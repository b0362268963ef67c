"""Private statistics over a real SuperLink: owners approve the query, and answer from their tables."""

from __future__ import annotations

import json

import pytest

from fedpress.network.ledger import OwnerLedger
from fedpress.network.policy import Policy, PrivacyRules
from fedpress.network.status import status
from tests.deploy.fleet import Fleet, port
from tests.stages.statistics.hospitals import FIRST, TRAINING, lines_of, written

RULES = "require_approval = true\n[privacy]\ndelta = 1e-3\n"


@pytest.mark.deploy
def test_clients_answer_an_approved_query_from_their_own_tables(tmp_path):
    own = tmp_path / "server.csv"
    own.write_text("\n".join(lines_of(1, 60, seed=9)["c0"]))
    text = (written(tmp_path / "clients") + FIRST + TRAINING).replace(
        "delta = 1e-3", "delta = 1e-3, secure_noise = true"
    )
    fleet = Fleet(tmp_path / "fleet", port(20))
    try:
        for name in fleet.names:
            (fleet.home(name) / "policy.toml").write_text(RULES)
            fleet.client(name, data=tmp_path / "clients" / f"{name}.csv")
        recipe = tmp_path / "recipe.toml"
        recipe.write_text(text)
        ledgers = [fleet.home(name) / "ledger.sqlite" for name in fleet.names]
        for ledger in ledgers:
            words = ["client", "approve", str(recipe), "--ledger", str(ledger)]
            owner = fleet.command(*words, log="approve.log")
            assert owner.ended() == 0, owner.said
        assert "mean and standard deviation of age (0 to 110)" in owner.said
        server = fleet.server(text, "run", "--public", str(own))
        assert server.ended() == 0, server.said
    finally:
        fleet.close()
    query, training = json.loads((fleet.folder / "run" / "result.json").read_text())["stages"]
    age = query["columns"]["age"]
    assert age["mean"] == pytest.approx(49.8, abs=5 * age["error"])
    assert (query["clients"], training["clients"]) == (3, 3)
    for ledger in ledgers:
        rows = status(OwnerLedger(ledger), Policy(privacy=PrivacyRules(delta=1e-3)))
        spent = {row.stage: row.epsilon for row in rows}
        assert spent["statistics"] == pytest.approx(query["epsilon"], rel=1e-3)
        assert not any(row.refused for row in rows)
