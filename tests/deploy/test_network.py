"""Deployment over a real SuperLink with TLS and keys: same bits as a simulation, also after kills."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.deploy.fleet import (
    CODED,
    NAMES,
    RECIPE,
    SECURE,
    Fleet,
    deployed,
    port,
    secrets_of,
    simulated,
)

pytestmark = pytest.mark.deploy
EXAMPLE = 'privacy = { unit = "sample", noise_multiplier = 1.0, delta = 1e-3 }\n'


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Three clients, which live as long as this file's tests."""
    torch.set_num_threads(1)
    made = Fleet(tmp_path_factory.mktemp("fleet"), port())
    for name in NAMES:
        made.client(name)
    yield made
    made.close()


@pytest.fixture(scope="module")
def link(fleet: Fleet):
    """A server in this process."""
    with fleet.link() as opened:
        yield opened


@pytest.mark.parametrize("case", [CODED, EXAMPLE, SECURE], ids=["coded", "example", "secure"])
def test_a_deployment_ends_in_the_bits_of_a_simulation(case, fleet, link, tmp_path):
    run = deployed(RECIPE + case, link, tmp_path / "server")
    list(run.rounds())
    records = simulated(RECIPE + case, secrets_of(fleet, run, tmp_path / "simulation"))
    for over_network, in_process in zip(run.records, records, strict=True):
        assert torch.equal(over_network.params, in_process.params)
        assert over_network.bytes_up == in_process.bytes_up
        assert over_network.bytes_down == in_process.bytes_down
        assert not over_network.refused
