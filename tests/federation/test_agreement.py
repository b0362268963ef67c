import json

import pytest
import torch

from fedpress.codecs import Quantize, TopK
from fedpress.errors import WireError
from fedpress.federation import Cohort, Downlink, Payload, Uplink
from fedpress.federation.agreement import Agreement, commitment
from fedpress.federation.protocol import text_tensor
from fedpress.wire import Message
from tests.federation.federation import SAMPLE_PLAN, Federation, client_plan, mlp


def rich() -> Federation:
    """A federation in which every entry says something."""
    size, cohort = 83, Cohort(4, 4)
    uplink = Uplink.bind(Payload(size, chain=(TopK(density=0.1), Quantize(bits=8))), cohort)
    downlink = Downlink(size, chain=(Quantize(bits=8),), first=(Quantize(bits=16),))
    return Federation(uplink=uplink, downlink=downlink, error_feedback=True, num_rounds=7)


FEDERATIONS = {
    "open": rich,
    "sample": lambda: Federation(privacy=SAMPLE_PLAN, num_rounds=7),
    "client": lambda: Federation(privacy=client_plan(Cohort(4, 4)), weights="equal"),
}
ENTRIES = [
    (kind, name) for kind, made in FEDERATIONS.items() for name in made().terms.agreement.leaves()
]


def other(value):
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str):
        return value + "x"
    if isinstance(value, list):
        return [*value, "x"]
    return {"x": 1} if isinstance(value, dict) else "x"


def changed(entries, name):
    """Returns `entries` with another value of the leaf `name`, such as `uplink.codecs[1].bits`."""
    tree = json.loads(json.dumps(entries))
    *way, last = [
        int(part) if part.isdigit() else part
        for part in name.replace("[", ".").replace("]", "").split(".")
    ]
    at = tree
    for part in way:
        at = at[part]
    at[last] = other(at[last])
    return tree


@pytest.mark.parametrize(("kind", "name"), ENTRIES)
def test_another_value_of_any_entry_is_refused_by_its_name(kind, name):
    federation = FEDERATIONS[kind]()
    server = Agreement(changed(federation.terms.agreement.entries, name))
    message = Message("agree", {}, {"agreement": text_tensor(server.to_json())})
    with pytest.raises(WireError) as caught:
        federation.clients["c0"].answer(message)
    said = str(caught.value)
    assert said.startswith(f"agreement.{name}: the server says ") or said.startswith(
        f"agreement.{name}."
    )
    assert "this client" in said
    of_fedpress = name in ("version", "streams")
    assert said.endswith("use the same fedpress" if of_fedpress else "use the same recipe")
    assert server.fingerprint != federation.terms.agreement.fingerprint


@pytest.mark.parametrize("kind", FEDERATIONS)
def test_the_same_agreement_is_agreed_to(kind):
    federation = FEDERATIONS[kind]()
    agreement = FEDERATIONS[kind]().terms.agreement
    message = Message("agree", {}, {"agreement": text_tensor(agreement.to_json())})
    reply = federation.clients["c0"].answer(message)
    assert (reply.kind, reply.header) == ("agreed", {"agreement": agreement.fingerprint})


def test_every_term_is_an_entry():
    terms = rich().terms
    assert terms.agreement.entries.keys() == {"version", "streams", *terms.__dataclass_fields__}


def test_the_seed_is_told_by_a_commitment_alone():
    terms = Federation(seed=123_456_789).terms
    assert "123456789" not in terms.agreement.to_json()
    assert commitment(1) != commitment(2)
    assert terms.agreement.entries["seed"] == commitment(123_456_789)


def test_an_entry_that_one_side_does_not_know_is_named():
    ours = Agreement({"version": 1, "later": {"key": 3}})
    theirs = Agreement({"version": 1})
    with pytest.raises(
        WireError, match=r"^agreement\.later\.key: the server says 3, this client no"
    ):
        ours.compare(theirs)
    with pytest.raises(WireError, match=r"^agreement\.later\.key: .* nothing, this client 3"):
        theirs.compare(ours)
    ours.compare(Agreement(dict(ours.entries)))


@pytest.mark.parametrize("pair", [(1, True), (1, 1.0), (0, False), (None, "None")])
def test_values_that_python_takes_for_equal_differ(pair):
    one, two = (Agreement({"entry": value}) for value in pair)
    with pytest.raises(WireError, match="entry"):
        one.compare(two)
    assert one.fingerprint != two.fingerprint


def test_values_that_look_alike_when_shown_short_differ():
    one, two = ({"names": ["a" * 500 + end]} for end in "xy")
    with pytest.raises(WireError, match=r"^agreement\.names: the server says ") as caught:
        Agreement(one).compare(Agreement(two))
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("text", ["", "[]", "3", "{", "[" * 100_000])
def test_a_text_that_is_no_agreement_is_refused(text):
    with pytest.raises(WireError, match="agreement"):
        Agreement.from_json(text)
    client = Federation(model=mlp()).clients["c0"]
    for tensors in ({}, {"agreement": text_tensor(text or " ")}, {"agreement": torch.zeros(3)}):
        with pytest.raises(WireError, match="agree"):
            client.answer(Message("agree", {}, tensors))
