"""Known identities: noted the first time, compared ever after."""

import pytest

from fedpress.errors import NetworkError
from fedpress.network.identities import KnownIdentities

A, B, OTHER = bytes(32), bytes([1]) * 32, bytes([2]) * 32


@pytest.fixture
def known(tmp_path):
    return KnownIdentities(tmp_path / "identities.toml", "me")


def test_the_first_keys_are_noted_and_pass_again(known):
    keys = {"me": A, "b": B}
    assert known.compare(keys) is None
    known.note(keys)
    assert known.read() == keys
    assert known.compare(keys) is None


def test_another_key_is_refused_until_the_owner_has_done_what_the_reason_says(known):
    known.note({"b": B, 'with space = "and more"': A})
    refusal = known.compare({"b": OTHER})
    assert refusal.rule == "identities"
    assert "client 'b'" in refusal.reason
    assert "remove its line from identities.toml" in refusal.reason
    lines = known.path.read_text().splitlines()
    known.path.write_text("\n".join(line for line in lines if not line.startswith("b = ")))
    assert known.compare({"b": OTHER}) is None
    known.note({"b": OTHER})
    assert known.compare({"b": B}) is not None


def test_new_clients_are_added_and_none_is_forgotten_or_changed(known):
    known.note({"b": B})
    known.note({"c": A})
    known.note({"b": OTHER})
    assert known.read() == {"b": B, "c": A}


def test_the_key_of_this_client_follows_its_own_secret(known):
    known.note({"me": A})
    assert known.compare({"me": OTHER}) is None
    known.note({"me": OTHER})
    assert known.read() == {"me": OTHER}


def test_a_run_without_secure_sum_writes_nothing(known):
    assert known.compare({}) is None
    known.note({})
    assert not known.path.exists()


def test_keys_that_the_owner_has_written_hold_from_the_first_run_on(known):
    known.path.write_text(f'b = "{B.hex()}"\n')
    assert known.compare({"b": OTHER}) is not None


@pytest.mark.parametrize("text", ["b = ", "b = 3", 'b = "xyz"', "[b]\nc = 1", "\udcff"])
def test_a_damaged_file_refuses_all(known, text):
    known.path.write_bytes(text.encode("utf-8", "surrogateescape"))
    for call in (known.compare, known.note):
        with pytest.raises(NetworkError, match="identities"):
            call({"b": B})
