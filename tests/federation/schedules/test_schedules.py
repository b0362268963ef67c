import random

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from fedpress.errors import RecipeError
from fedpress.federation import Cohort
from fedpress.federation.delays import Constant, Exponential, Lognormal
from fedpress.federation.schedules import (
    SCHEDULES,
    AnySchedule,
    Buffered,
    ScheduleContext,
    Synchronous,
)
from fedpress.federation.schedules.base import look_ahead

DELAYS = [None, Constant(seconds=1.0), Lognormal(median=10.0), Exponential()]


class Given:
    """Delays by client, the same for every task."""

    def __init__(self, *seconds):
        self.by_name = {f"c{i}": each for i, each in enumerate(seconds)}

    def draw(self, seed, client, task):
        return self.by_name[client]


def context(schedule, clients, *, size=None, sampling="fixed", delays=None, seed=5):
    names = [f"c{i}" for i in range(clients)]
    return ScheduleContext(names, schedule.cohort(size, clients, sampling), seed, seed, delays)


def steps(scheduler, first, last):
    """Runs a scheduler without messages; yields for each step who was asked, who taken, timing and late."""
    for step in range(first, last + 1):
        scheduler.begin(step)
        asked, taken = scheduler.ask(), []
        while waiting := scheduler.wait():
            taken.append(waiting[0])
            scheduler.take(waiting[0])
            asked += scheduler.ask()
        yield asked, taken, *scheduler.end()


@pytest.mark.parametrize("delays", DELAYS, ids=str)
@pytest.mark.parametrize(("buffer", "concurrency", "clients"), [(1, 1, 1), (3, 5, 20), (4, 9, 6)])
def test_a_client_is_in_a_buffer_once_and_gets_no_version_twice(
    buffer, concurrency, clients, delays
):
    schedule = Buffered(buffer=buffer, concurrency=concurrency)
    scheduler = schedule.open(context(schedule, clients, delays=delays), {})
    names = set()
    for step, (asked, taken, timing, late) in enumerate(steps(scheduler, 1, 40), 1):
        assert len(taken) == buffer
        assert len({one.client for one in taken}) == buffer
        assert all(one.task == step for one in asked)
        assert not names & {(one.client, one.task) for one in asked}
        names |= {(one.client, one.task) for one in asked}
        assert timing.staleness == tuple(step - one.task for one in taken)
        assert min(timing.staleness) >= 0
        assert len(scheduler.at_work) <= concurrency
        assert len({one.client for one in scheduler.at_work}) == len(scheduler.at_work)
        assert not late
        assert not timing.spare


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 10.0])
def test_no_weight_is_above_one_and_none_grows_with_staleness(exponent):
    schedule = Buffered(staleness_exponent=exponent)
    weights = [schedule.weight(staleness) for staleness in range(1000)]
    assert weights[0] == 1
    assert weights == sorted(weights, reverse=True)
    assert weights[-1] >= 0
    assert Synchronous().weight(0) == 1


def test_one_client_moves_the_sum_of_a_step_by_at_most_its_clip_norm():
    # Whatever a client sends in place of its updates, the sums of a step are no further apart than one clipped update.
    chance, schedule = random.Random(1), Buffered(buffer=4, concurrency=7, staleness_exponent=0.5)
    scheduler = schedule.open(context(schedule, 9, delays=Lognormal()), {})
    for step, (_, taken, _, _) in enumerate(steps(scheduler, 1, 60), 1):
        values = {
            one: chance.uniform(-1, 1) for one in taken
        }  # one value each, within a clip norm of 1
        weights = {one: schedule.weight(step - one.task) for one in taken}
        whole = sum(weights[one] * values[one] for one in taken)
        for client in {one.client for one in taken}:
            without = sum(weights[one] * values[one] for one in taken if one.client != client)
            assert abs(whole - without) <= 1


@pytest.mark.parametrize("delays", DELAYS, ids=str)
def test_going_on_from_a_state_asks_and_takes_the_same(delays):
    schedule = Buffered(buffer=3, concurrency=6)
    begun = context(schedule, 15, delays=delays)
    whole = list(steps(schedule.open(begun, {}), 1, 12))
    for stop in range(1, 12):
        scheduler = schedule.open(begun, {})
        list(steps(scheduler, 1, stop))
        state = {name: tensor.clone() for name, tensor in scheduler.state().items()}
        assert list(steps(schedule.open(begun, state), stop + 1, 12)) == whole[stop:]


@pytest.mark.parametrize("schedule", [Buffered(buffer=3, concurrency=6), Synchronous()], ids=str)
@pytest.mark.parametrize("delays", DELAYS, ids=str)
def test_looking_ahead_names_whom_a_run_asks(schedule, delays):
    begun = context(schedule, 15, delays=delays)
    seen = [[one.client for one in asked] for asked, *_ in steps(schedule.open(begun, {}), 1, 9)]
    assert look_ahead(schedule, begun, 9) == seen


@pytest.mark.parametrize("delays", DELAYS, ids=str)
def test_participation_counts_every_task_before_anybody_is_asked(delays):
    schedule = Buffered(buffer=3, concurrency=6)
    begun = context(schedule, 15, delays=delays)
    foreseen, counts = schedule.plan_participation(begun, 9), dict.fromkeys(begun.clients, 0)
    for step, (asked, *_) in enumerate(steps(schedule.open(begun, {}), 1, 9), 1):
        assert foreseen.asked(step) == [one.client for one in asked]
        for one in asked:
            counts[one.client] += 1
    assert {name: foreseen.tasks(name) for name in counts} == counts
    assert foreseen.max_tasks == foreseen.composed_tasks == max(counts.values())
    assert sum(counts.values()) == 9 * 3 + 5  # one for each that answered, and those still at work


@pytest.mark.parametrize(("sampling", "most"), [("fixed", 10), ("poisson", 10), ("cyclic", 4)])
def test_participation_in_rounds_is_bounded_by_the_draw(sampling, most):
    begun = context(Synchronous(), 12, size=4, sampling=sampling)
    foreseen = Synchronous().plan_participation(begun, 10)
    names = [name for step in range(1, 11) for name in foreseen.asked(step)]
    assert (foreseen.max_tasks, foreseen.composed_tasks) == (most, 10)
    assert max(names.count(name) for name in set(names)) <= most


def test_updates_are_stale_by_the_steps_that_were_taken_meanwhile():
    # c0 needs 10 s, c1 1 s: with a buffer of one, c1 is in every step until c0 comes home.
    schedule = Buffered(buffer=1, concurrency=2)
    scheduler = schedule.open(context(schedule, 2, delays=Given(10.0, 1.0)), {})
    found = [(taken[0].client, timing) for _, taken, timing, _ in steps(scheduler, 1, 10)]
    assert [client for client, _ in found] == ["c1"] * 9 + ["c0"]
    assert [timing.staleness for _, timing in found] == [(0,)] * 9 + [(9,)]
    assert [timing.simulated_seconds for _, timing in found] == [*map(float, range(1, 11))]


def test_a_round_lasts_as_long_as_its_slowest_client():
    scheduler = Synchronous().open(context(Synchronous(), 3, delays=Given(1.0, 7.0, 2.0)), {})
    found = list(steps(scheduler, 1, 2))
    assert [one.client for one in found[0][1]] == ["c0", "c1", "c2"]
    assert [timing.simulated_seconds for _, _, timing, _ in found] == [7.0, 14.0]


def test_who_passes_the_deadline_is_late_and_the_round_ends_there():
    schedule = Synchronous(deadline=5.0)
    scheduler = schedule.open(context(schedule, 3, delays=Given(1.0, 7.0, 2.0)), {})
    ((_, taken, timing, late),) = steps(scheduler, 1, 1)
    assert [one.client for one in taken] == ["c0", "c2"]
    assert timing.simulated_seconds == 5.0
    assert late == {"c1": "late: its answer would have come after 7 s, and the deadline is 5 s"}


def test_over_selection_takes_the_first_answers_and_tells_who_was_spare():
    schedule = Synchronous(over_selection=2.0)
    scheduler = schedule.open(context(schedule, 4, size=2, delays=Given(4.0, 3.0, 9.0, 1.0)), {})
    ((asked, taken, timing, late),) = steps(scheduler, 1, 1)
    assert [one.client for one in asked] == ["c0", "c1", "c2", "c3"]
    assert [one.client for one in taken] == ["c1", "c3"]  # in the order of the cohort
    assert timing.spare == ("c0", "c2")
    assert timing.simulated_seconds == 3.0
    assert not late


def test_over_selection_with_a_deadline_that_too_few_meet():
    schedule = Synchronous(over_selection=2.0, deadline=2.0)
    scheduler = schedule.open(context(schedule, 4, size=2, delays=Given(4.0, 3.0, 9.0, 1.0)), {})
    ((_, taken, timing, late),) = steps(scheduler, 1, 1)
    assert [one.client for one in taken] == ["c3"]
    assert list(late) == ["c0", "c1", "c2"]
    assert timing.spare == ()
    assert timing.simulated_seconds == 2.0


@pytest.mark.parametrize("sampling", ["fixed", "poisson", "cyclic"])
def test_without_over_selection_the_cohort_is_that_of_the_draw(sampling):
    cohort = Cohort(4, 12, sampling)
    begun = context(Synchronous(), 12, size=4, sampling=sampling)
    for number, (asked, taken, timing, _) in enumerate(
        steps(Synchronous().open(begun, {}), 1, 8), 1
    ):
        assert [one.client for one in asked] == cohort.draw(begun.clients, seed=5, round=number)
        assert taken == asked
        assert timing.simulated_seconds is None


@pytest.mark.recipe
def test_idle_clients_are_drawn_alike_often():
    schedule = Buffered(buffer=5, concurrency=10)
    begun = context(schedule, 50, delays=Constant(seconds=1.0))
    asked = [name for names in look_ahead(schedule, begun, 2000) for name in names]
    counts = torch.tensor([asked.count(f"c{i}") for i in range(50)]).double()
    assert counts.sum() == pytest.approx(10_000, abs=10)
    assert counts.std() < 3 * counts.mean().sqrt()


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"size": 3}, "size: got 3, but a buffered schedule takes"),
        ({"sampling": "poisson"}, "sampling: got 'poisson', but a buffered schedule does not draw"),
        ({"clients": 2}, "buffer: got 3, but there are 2 clients"),
    ],
)
def test_what_does_not_go_with_a_buffer_is_refused(keys, words):
    with pytest.raises(RecipeError, match=words):
        context(Buffered(buffer=3), **{"clients": 9, **keys})


def test_the_table_names_every_row():
    adapter = TypeAdapter(AnySchedule)
    for kind, row in SCHEDULES.items():
        assert isinstance(adapter.validate_python({"kind": kind}), row)
    with pytest.raises(ValidationError, match="staleness_exponent"):
        adapter.validate_python({"kind": "buffered", "staleness_exponent": -1})


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90.0), ("5m", 300.0), ("1.5h", 5400.0), ("60", 60.0)]
)
def test_a_deadline_is_read_from_text(text, seconds):
    assert Synchronous(deadline=text).deadline == seconds
    again = Synchronous.model_validate_json(Synchronous(deadline=text).model_dump_json())
    assert again.deadline == seconds


@pytest.mark.parametrize("text", ["soon", "m", "5 d", "", "-5m", "0s", "nanm"])
def test_a_deadline_that_is_none_is_refused(text):
    with pytest.raises(ValidationError, match="deadline"):
        Synchronous(deadline=text)
