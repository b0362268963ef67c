import itertools
import json

import pytest
import torch

from fedpress.workspace.drive import Milestone, Snapshot, drive
from fedpress.workspace.folder import RunFolder
from fedpress.workspace.state import Tick


class Walk:
    """A random walk of `length` steps that is worth a milestone after every third; it can be put down there."""

    def __init__(self, length=10, *, saves=True):
        self.length, self.saves = length, saves
        self.position, self.done = torch.zeros(2), 0
        self.chance = torch.Generator().manual_seed(0)

    def events(self):
        while self.done < self.length:
            self.position += torch.randn(2, generator=self.chance)
            self.done += 1
            yield Tick(self.done, self.length)
            if self.done % 3 == 0:
                record = {"done": self.done}
                yield Milestone(record, f"at {self.done}", timed=True, saves=self.saves)

    def state(self):
        return Snapshot(
            {"position": self.position, "chance": self.chance.get_state()}, {"done": self.done}
        )

    def load_(self, saved):
        self.position = saved.tensors["position"].clone()
        self.chance.set_state(saved.tensors["chance"])
        self.done = saved.facts["done"]


@pytest.fixture
def place(tmp_path):
    return RunFolder(tmp_path).stage(0, "walk", "walk")


def records(place):
    lines = place.records.path.read_text().splitlines()
    return [json.loads(line)["done"] for line in lines]


@pytest.mark.parametrize("events", range(14))
def test_work_that_stops_anywhere_goes_on_to_the_same_bits(place, events):
    whole = Walk()
    list(whole.events())
    stopped = drive(Walk(), place)
    list(itertools.islice(stopped, events))
    stopped.close()

    place.begin(0)
    again = Walk()
    list(drive(again, place))
    assert torch.equal(again.position, whole.position)
    assert records(place) == [3, 6, 9]


def test_a_note_stays_until_the_next_and_comes_back_after_a_stop(place):
    notes = [tick.note for tick in itertools.islice(drive(Walk(), place), 5)]
    assert notes == ["", "", "", "at 3", "at 3"]
    assert next(drive(Walk(), place)).note == "at 3"


def test_a_note_of_a_tick_goes_before_that_of_the_last_milestone(place):
    class Told(Walk):
        def events(self):
            yield Milestone(note="before")
            yield Tick(0, 1, "my own")
            yield Tick(1, 1)

    assert [tick.note for tick in drive(Told(), place)] == ["my own", "before"]


def test_seconds_before_a_stop_are_counted(place):
    list(itertools.islice(drive(Walk(), place), 4))
    tensors, facts = place.load_progress()
    place.save_progress(tensors, {**facts, "seconds": 1000.0})
    list(drive(Walk(), place))
    assert 1000 <= place.load_progress()[1]["seconds"] < 1060
    lines = [json.loads(line) for line in place.records.path.read_text().splitlines()]
    assert [line["seconds"] >= 1000 for line in lines] == [False, True, True]


def test_a_milestone_that_does_not_save_leaves_no_checkpoint(place):
    list(drive(Walk(saves=False), place))
    assert place.load_progress() == ({}, {})
    assert records(place) == [3, 6, 9]
