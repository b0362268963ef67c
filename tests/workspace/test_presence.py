"""The file of who is there: what it holds, what it hides, and that damage is no error."""

import json

import pytest

from fedpress.workspace.presence import (
    MOST_NAMED,
    NAME,
    ClientNow,
    PresenceNow,
    RefusedNow,
    read_presence,
)

CLIENTS = (
    ClientNow("anna", True, heard=5.0, seconds=1.0),
    ClientNow("bert", True, asked=8.0, awaited=True),
    ClientNow("cleo", False, heard=1.0, asked=2.0, awaited=True),
)
REFUSED = (RefusedNow("dora", "max_epsilon", "8 is more than 5"),)


def test_what_is_written_is_read_and_those_in_trouble_come_first(tmp_path):
    PresenceNow(10.0, 4, 2, False, CLIENTS, REFUSED).write(tmp_path)
    found = read_presence(tmp_path)
    assert [one.name for one in found.clients] == ["cleo", "bert", "anna"]
    assert set(found.clients) == set(CLIENTS)
    assert (found.refused, found.known, found.online) == (REFUSED, 4, 2)
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_a_hidden_cohort_leaves_only_counts_in_the_file(tmp_path):
    PresenceNow(10.0, 4, 2, True, CLIENTS, REFUSED).write(tmp_path)
    text = (tmp_path / NAME).read_text()
    assert not any(name in text for name in ("anna", "bert", "cleo", "dora"))
    page = json.loads(text)
    assert page.keys() == {"at", "known", "online", "hidden", "clients", "refused"}
    assert page["clients"] == []
    assert page["refused"] == [{"name": "", "rule": "max_epsilon", "reason": "8 is more than 5"}]


def test_who_was_asked_makes_no_difference_to_the_file_of_a_hidden_cohort(tmp_path):
    texts = []
    for clients in (CLIENTS, CLIENTS[::-1], ()):
        PresenceNow(10.0, 4, 2, True, clients).write(tmp_path)
        texts.append((tmp_path / NAME).read_text())
    assert len(set(texts)) == 1


def test_names_in_a_file_that_says_hidden_are_not_read(tmp_path):
    PresenceNow(10.0, 4, 2, False, CLIENTS, REFUSED).write(tmp_path)
    page = json.loads((tmp_path / NAME).read_text())
    (tmp_path / NAME).write_text(json.dumps(page | {"hidden": True}))
    found = read_presence(tmp_path)
    assert found.clients == ()
    assert [one.name for one in found.refused] == [""]


def test_the_file_stays_small(tmp_path):
    clients = tuple(ClientNow(f"c{at}", at > 50) for at in range(10_000))
    PresenceNow(10.0, 10_000, 9_949, False, clients).write(tmp_path)
    found = read_presence(tmp_path)
    assert len(found.clients) == MOST_NAMED
    assert not any(one.online for one in found.clients[:51])
    assert found.known == 10_000


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"clients": 1}', '{"clients": [[]], "refused": []}', "[" * 9999]
)
def test_a_damaged_file_is_as_none(tmp_path, text):
    (tmp_path / NAME).write_text(text)
    assert read_presence(tmp_path) is None


def test_a_missing_file_is_as_none(tmp_path):
    assert read_presence(tmp_path / "nowhere") is None
