import torch

from fedpress.federation.outbox import Outbox
from fedpress.federation.schedules import Assignment
from fedpress.transport import LocalTransport
from fedpress.wire import Message, pack, unpack

ONE, TWO, THREE = (Assignment(name, task, 0.0) for name, task in [("a", 1), ("b", 1), ("c", 2)])


def begun():
    """Returns an outbox with three tasks at work: two that started from one model, one from another."""
    outbox = Outbox(LocalTransport(dict.fromkeys("abc", lambda data: pack(unpack(data)))))
    first = Message("fit", {"round": 1}, {"params": torch.zeros(3)})
    second = Message("fit", {"round": 2}, {"params": torch.ones(3), "more": torch.ones(1)})
    for task, message in ((ONE, first), (TWO, first), (THREE, second)):
        outbox.send(task, message)
    return outbox


def test_an_answer_is_that_of_the_task_that_is_waited_for():
    outbox = begun()
    task, reply = outbox.receive([THREE], None)
    assert task == THREE
    assert reply.header == {"round": 2}
    assert list(outbox.open) == [ONE, TWO]


def test_a_task_whose_answer_never_comes_is_given_up():
    outbox = begun()
    outbox.transport.cancel([outbox.open[TWO][0]])
    assert outbox.receive([TWO], 0.0) == (TWO, None)
    assert list(outbox.open) == [ONE, THREE]


def test_what_is_not_wanted_is_cancelled():
    outbox = begun()
    assert outbox.cancel_all_but([TWO]) == ["a", "c"]
    assert list(outbox.open) == [TWO]


def test_a_state_holds_each_model_once_and_brings_every_question_back():
    outbox = begun()
    state = {name: tensor.clone() for name, tensor in outbox.state([ONE, TWO, THREE]).items()}
    assert state.keys() == {"headers", "1.params", "2.params", "2.more"}
    again = Outbox(outbox.transport)
    again.load_([ONE, TWO, THREE], state)
    for task in (ONE, TWO, THREE):
        old, new = outbox.open[task][1], again.open[task][1]
        assert pack(old) == pack(new)
    assert again.open[ONE][1] is again.open[TWO][1]  # packed once
    assert Outbox(outbox.transport).state([]) == {}
