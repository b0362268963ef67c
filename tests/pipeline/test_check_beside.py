"""Checks in a second process find what checks in this process find, and stop the run."""

import os
import threading
import time

import pytest
import torch

from fedpress.errors import TrainingError
from fedpress.pipeline import check_beside
from fedpress.pipeline.check_beside import ChecksBeside, can_check_beside
from fedpress.pipeline.recipe import load
from fedpress.workspace.state import StageFinished, StageStarted, Tick

EVENTS = (
    StageStarted(0, "train", "train", reused=False),
    Tick(1, 1, ""),
    StageFinished(0, {}),
    StageStarted(1, "pack", "pack", reused=False),
)


def failing(where):
    yield 1
    where.append(os.getpid())
    raise TrainingError("too small", place="x", cure="more")


def test_a_run_whose_checks_pass_is_followed_to_its_end():
    beside = ChecksBeside(iter([1, 2]))
    assert list(beside.follow(iter(EVENTS))) == list(EVENTS)
    assert beside.passed
    assert not beside.failed


def test_a_failed_check_raises_its_own_error_before_the_second_stage():
    where = []
    beside = ChecksBeside(failing(where))
    seen = []
    with pytest.raises(TrainingError, match="too small"):
        seen.extend(beside.follow(iter(EVENTS)))
    assert len(seen) < 3
    assert beside.failed
    assert not beside.passed
    assert where == [os.getpid()]


def test_an_error_of_the_run_is_not_one_of_the_checks():
    def broken():
        yield EVENTS[0]
        raise TrainingError("the loss is nan", place="x", cure="lower lr")

    beside = ChecksBeside(time.sleep(5) for _ in range(1))
    with pytest.raises(TrainingError, match="nan"):
        list(beside.follow(broken()))
    assert not beside.failed
    beside.stop()
    beside.stop()


def test_a_copy_that_ends_by_itself_or_hangs_is_replaced_by_this_process(monkeypatch):
    here, made = os.getpid(), []

    def check(trouble):
        if os.getpid() != here:
            trouble()
        made.append(1)
        yield 1

    beside = ChecksBeside(check(lambda: os._exit(0 + 9)))
    assert list(beside.follow(iter(EVENTS))) == list(EVENTS)
    monkeypatch.setattr(check_beside, "LONGEST_WAIT", 0.1)
    beside = ChecksBeside(check(lambda: time.sleep(60)))
    assert list(beside.follow(iter(EVENTS))) == list(EVENTS)
    assert made == [1, 1]
    assert beside.passed


def test_without_a_second_process_the_checks_are_made_here(monkeypatch):
    def refused():
        raise OSError("no memory")

    monkeypatch.setattr(os, "fork", refused)
    where = []
    with pytest.raises(TrainingError, match="too small"):
        list(ChecksBeside(failing(where)).follow(iter(EVENTS)))
    assert where == [os.getpid()]


def test_who_may_be_copied(monkeypatch):
    # A test before may have left a thread of its own.
    monkeypatch.setattr(threading, "active_count", lambda: 1)
    cpu = torch.device("cpu")
    one = '[data]\nsource = "digits"\n[model]\narchitecture = "mlp"\n[[stage]]\nkind = "train"\nepochs = 1\n'
    two = one + '[[stage]]\nkind = "pack"\n'
    own = two.replace('"digits"', '"mine:rows"')
    if len(os.sched_getaffinity(0)) > 1:
        assert can_check_beside(load(two), cpu)
    assert not can_check_beside(load(two), torch.device("cuda"))
    assert not can_check_beside(load(one), cpu)
    assert not can_check_beside(load(own), cpu)
    monkeypatch.setattr(threading, "active_count", lambda: 2)
    assert not can_check_beside(load(two), cpu)
