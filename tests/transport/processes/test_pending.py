import torch
from hypothesis import given
from hypothesis import strategies as st

from fedpress.federation import InMemoryState
from fedpress.transport.processes.pending import PendingState

ROUNDS = st.integers(1, 6)
STEPS = st.lists(st.tuples(st.sampled_from(["save", "entry", "load", "note"]), ROUNDS), max_size=12)


@given(before=st.lists(ROUNDS, max_size=4), steps=STEPS)
def test_it_reads_like_a_storage_that_is_written_at_once(before, steps):
    true, stored = InMemoryState(), InMemoryState()
    for number in before:
        for memory in (true, stored):
            memory.save(number, {"x": torch.tensor(number)})
    pending = PendingState(stored)
    kept = dict(stored.rounds)
    for at, (step, number) in enumerate(steps):
        value = {"x": torch.tensor(100 + at)}
        if step == "save":
            true.save(number, value), pending.save(number, value)
        elif step == "entry":
            true.save_entry(f"{number}", value), pending.save_entry(f"{number}", value)
        elif step == "note":
            assert pending.entry(f"{number}") == true.entry(f"{number}")
        # The true storage forgets old states, so it may have none where the other has one still.
        elif true.load(number):
            assert pending.load(number) == true.load(number)
    assert stored.rounds == kept
    assert stored.notes == {}
    copy = pending.copied()
    assert (copy.rounds, copy.notes) == (true.rounds, true.notes)
    for write in pending.writes:
        write.store(stored)
    assert (stored.rounds, stored.notes) == (true.rounds, true.notes)
