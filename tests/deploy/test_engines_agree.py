"""Rounds in this process, in worker processes, in actors of Ray and over Flower's SuperLink end in the same bits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from fedpress.errors import RecipeError
from fedpress.pipeline import recipe as recipes
from fedpress.pipeline.start import first_state, load_data
from fedpress.stages.federate.binding import bind
from fedpress.transport.engine import ENGINES, LocalEngine, engine_settings, open_engine
from fedpress.transport.processes.engine import ProcessEngine
from fedpress.transport.processes.transport import ProcessTransport
from tests import engines
from tests.engines import CASES, FEWER_CASES, MANY, RECIPE, Finished

if TYPE_CHECKING:
    from fedpress.transport.flower import ServerLink
    from tests.deploy.fleet import Fleet

# The collector closes what others left open, in whichever test comes next: sockets of broken connections, and the files
# and processes that Ray started.
LEFT_OPEN = "ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning"
pytestmark = pytest.mark.filterwarnings(LEFT_OPEN)
needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="could not import 'ray'")
needs_flower = pytest.mark.skipif(find_spec("flwr") is None, reason="could not import 'flwr'")

REFUSED = {"three at a time, private": "the order of the answers determines which client is asked"}
"""Cases that a deployment refuses -> why."""
FIRST_ANSWERS = ("more asked than needed", "the slow left out", "three at a time")
"""Cases without fixed bits over a network: the first answers count, and who is fast is not known."""
OVER_A_NETWORK = [case for case in FEWER_CASES if case not in (*REFUSED, *FIRST_ANSWERS)]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Gives torch one thread, as the clients have it: another number adds floats in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def expected_of(case: str, folder: Path) -> tuple[Finished, Path | None]:
    """Returns what the local engine makes of a case, and where another engine finds the same secrets.

    Without random secrets all noise and keys follow from the seed: then there is no such folder.
    """
    text = engines.recipe_of(case)
    if not engines.has_secrets(case):
        return engines.expected(text), None
    found = engines.simulated(text, folder=folder / "local")
    engines.copy_secrets(folder / "local", folder / "other")
    return found, folder / "other"


@pytest.mark.parametrize("table", engines.REGISTRIES)
def test_every_row_of_a_table_has_a_case_that_uses_it(table):
    rows = engines.ROWS[table]
    missing = [row for row in engines.REGISTRIES[table] if row not in rows]
    assert not missing, f"tests/engines.py: ROWS[{table!r}] lacks {missing}"
    unknown = [row for row in rows if row not in engines.REGISTRIES[table]]
    assert not unknown, f"tests/engines.py: ROWS[{table!r}] has {unknown}, and fedpress has not"
    for row in rows:
        assert (table, row) in engines.used_by(engines.stage_of(f"{table}: {row}"))


def test_left_out_masks_of_a_secure_sum_change_no_bit_and_no_size():
    # Long enough that a simulation leaves masks out; see `fedpress.secagg.masks`.
    text = RECIPE.replace("hidden = [8]", "hidden = [64]") + engines.ROWS["aggregator"]["secure"]
    real = engines.simulated(text, LocalEngine(real_bytes=True))
    with open_engine(engine_settings({"kind": "processes", "workers": 2})) as processes:
        for other in (engines.simulated(text), engines.simulated(text, processes)):
            assert not list(engines.differences(other, real))
            assert other.traffic == real.traffic


def test_fewer_cases_use_every_row():
    used = set()
    for case in OVER_A_NETWORK:
        used |= engines.used_by(engines.stage_of(case))
    for table, rows in engines.REGISTRIES.items():
        assert {(table, row) for row in rows} <= used


def test_every_engine_is_compared():
    # "auto" is "local" or "processes". "stacked" adds in another order, so it agrees up to rounding;
    # tests/transport/test_stacked.py compares it.
    assert set(ENGINES) == {"auto", "local", "processes", "ray", "stacked"}


@pytest.mark.deploy
def test_the_comparison_sees_one_bit_and_one_byte():
    one = engines.expected(RECIPE)
    (*first, last) = one.records
    changed = torch.nextafter(last.params, torch.tensor(1.0))
    for other, place in (
        (replace(last, params=changed), "params"),
        (replace(last, bytes_up=last.bytes_up + 1), "bytes_up"),
        (replace(last, server_state={**last.server_state, "more": changed}), "server_state"),
    ):
        (found,) = engines.differences(one, replace(one, records=[*first, other]))
        assert place in found
    (found,) = engines.differences(one, replace(one, scores={}))
    assert "scores" in found


@pytest.mark.deploy
@pytest.mark.parametrize("case", CASES)
def test_messages_as_bytes_give_the_bits_bytes_and_records_of_messages_as_they_are(case, tmp_path):
    expected, folder = expected_of(case, tmp_path)
    assert not torch.equal(expected.records[0].params, expected.records[-1].params)
    found = engines.simulated(engines.recipe_of(case), LocalEngine(real_bytes=True), folder)
    assert not list(engines.differences(expected, found))
    assert found.traffic == expected.traffic


@pytest.mark.deploy
@pytest.mark.parametrize("case", CASES)
def test_processes_give_the_bits_bytes_and_records_of_the_local_engine(case, tmp_path):
    expected, folder = expected_of(case, tmp_path)
    engine = ProcessEngine(2)
    try:
        # On disk, where the local engine had the clients' states in memory.
        side = engines.bound(engines.recipe_of(case), engine, folder or tmp_path / "states")
        found = engines.finish(side)
        assert side.transport.num_workers == 2
    finally:
        engine.end_stage()
    assert not list(engines.differences(expected, found))
    assert found.traffic == expected.traffic


@pytest.mark.deploy
def test_blocks_of_forty_clients_are_added_up_in_workers_to_the_same_bits(monkeypatch):
    blocks = []
    parts = ProcessTransport.parts

    def counted(self, requests, round, size):
        blocks.append((len(requests), size))
        return parts(self, requests, round, size)

    monkeypatch.setattr(ProcessTransport, "parts", counted)
    engine = ProcessEngine(2)
    try:
        found = engines.simulated(MANY, engine)
    finally:
        engine.end_stage()
    assert not list(engines.differences(engines.expected(MANY), found))
    assert blocks == 2 * [(40, 2)]


@pytest.fixture(scope="module")
def ray_engine():
    """Ray on this machine, with two actors of one thread each."""
    with open_engine(engine_settings({"kind": "ray", "actors": 2, "cpus_per_client": 0.5})) as made:
        yield made


@pytest.mark.deploy
@needs_ray
@pytest.mark.parametrize("case", FEWER_CASES)
def test_actors_give_the_bits_bytes_and_records_of_the_local_engine(case, ray_engine, tmp_path):
    expected, folder = expected_of(case, tmp_path)
    try:
        found = engines.simulated(engines.recipe_of(case), ray_engine, folder)
    finally:
        ray_engine.end_stage()
    assert not list(engines.differences(expected, found))
    assert found.traffic == expected.traffic


@pytest.mark.deploy
@needs_ray
def test_forty_clients_in_actors_give_the_bits_of_the_local_engine(ray_engine):
    try:
        found = engines.simulated(MANY, ray_engine)
    finally:
        ray_engine.end_stage()
    assert not list(engines.differences(engines.expected(MANY), found))


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Four clients, each a process of its own."""
    from tests.deploy.fleet import Fleet, port

    made = Fleet(tmp_path_factory.mktemp("fleet"), port(), engines.NAMES, RECIPE)
    for name in engines.NAMES:
        made.client(name)
    yield made
    made.close()


@pytest.fixture(scope="module")
def link(fleet: Fleet) -> Iterator[ServerLink]:
    """The SuperLink, to which this process is connected as the server."""
    with fleet.link() as opened:
        yield opened


@pytest.mark.deploy
@needs_flower
@pytest.mark.parametrize("case", OVER_A_NETWORK)
def test_a_deployment_gives_the_bits_bytes_and_records_of_the_local_engine(
    case, fleet, link, tmp_path
):
    from tests.deploy.fleet import deployed, secrets_of

    run = deployed(engines.recipe_of(case), link, tmp_path / "server", clients=engines.NAMES)
    found = engines.finish(run.side)
    # Each client has a random key for secure sums, and a deployment has no simulated delays.
    secrets = secrets_of(fleet, run, tmp_path / "local")
    expected = engines.simulated(engines.without_delays(engines.recipe_of(case)), folder=secrets)
    assert not list(engines.differences(expected, found))


@pytest.mark.deploy
@needs_flower
@pytest.mark.parametrize("case", FIRST_ANSWERS)
def test_a_deployment_in_which_the_first_answers_count_uses_as_many(case, fleet, link, tmp_path):
    from tests.deploy.fleet import deployed

    # Which clients are first is a matter of time, so only their number can be compared.
    assert not engines.stage_of(case).schedule.waits_for_all
    run = deployed(engines.recipe_of(case), link, tmp_path / "server", clients=engines.NAMES)
    found = engines.finish(run.side).records
    expected = engines.expected(engines.recipe_of(case)).records
    assert [len(one.clients) for one in found] == [len(one.clients) for one in expected]
    assert not any(one.refused for one in found)


@pytest.mark.parametrize(("case", "reason"), REFUSED.items())
def test_a_deployment_refuses_what_cannot_be_planned_over_a_network(case, reason):
    loaded = recipes.load(engines.recipe_of(case))
    state = first_state(loaded, load_data(loaded).without_clients())
    with pytest.raises(RecipeError, match=reason):
        bind(loaded.stage[0], replace(state, network=NoNetwork()))


class NoNetwork:
    """A network that nobody may use: the refusal comes before the first message."""
