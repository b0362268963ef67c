"""A client's sessions: kept and replayed, closed to strangers, and never more than it agreed to."""

import json
import shutil

import pytest
import torch

from fedpress.core import parameters
from fedpress.errors import DataError, NetworkError
from fedpress.federation import Start
from fedpress.federation.exchange import exchange
from fedpress.federation.protocol import text_tensor
from fedpress.network import sessions
from fedpress.network.gate import NoPolicy
from fedpress.network.identities import KnownIdentities
from fedpress.stages.federate.server import agree
from fedpress.wire.message import Message, pack, unpack
from tests.network.deployment import PRIVATE, RECIPE, Machines, run

NAMES = ("c0", "c1", "c2")
CODED = 'uplink = [{ kind = "topk", density = 0.2 }]\nerror_feedback = true\n'
SECURE = (
    "secure_keys = true\n"
    "[stage.privacy]\n"
    'unit = "client"\ntrust = "distributed"\nnoise_multiplier = 2.0\ndelta = 1e-3\n'
)


def machines(folder, text=RECIPE + CODED, gate=NoPolicy):
    return Machines(folder / "clients", {name: gate() for name in NAMES}, text)


def ask(here, name, session, message):
    """Returns the answer of one client to one message."""
    return unpack(here.sessions[name].answer(session, pack(message)))


def questions(here, memory):
    """Binds the stage and returns the session and the offer that the clients were sent."""
    here.bind(memory)
    session = here.opened[-1]
    path = here.folder / "c0" / session / "offer.message"
    return session, unpack(path.read_bytes())


@pytest.mark.recipe
@pytest.mark.parametrize("text", [RECIPE + CODED, RECIPE + SECURE], ids=["coded", "secure"])
def test_clients_that_are_started_again_in_the_middle_end_in_the_same_bits(tmp_path, text):
    whole = machines(tmp_path / "whole", text)
    server = whole.bind(tmp_path / "server-whole")
    # The clients' secrets are random: the second deployment gets copies.
    broken = machines(tmp_path / "broken", text)
    broken.bind(tmp_path / "server-broken")
    one, other = whole.opened[-1], broken.opened[-1]
    for name in NAMES:
        into = broken.folder / name / other / "memory"
        shutil.rmtree(into)
        shutil.copytree(whole.folder / name / one / "memory", into)
    shutil.copytree(tmp_path / "server-whole", tmp_path / "server-broken", dirs_exist_ok=True)
    shutil.copytree(whole.folder, broken.folder, dirs_exist_ok=True)
    wanted = run(server)[-1].params
    broken.start()
    second = broken.bind(tmp_path / "server-broken")
    found = None
    for record in second.rounds(Start(parameters.flatten(second.model))):
        found = record
        broken.start()
    assert torch.equal(found.params, wanted)


def test_a_restarted_client_answers_a_round_without_a_new_offer(tmp_path):
    here = machines(tmp_path, RECIPE + PRIVATE)
    server = here.bind(tmp_path / "server")
    first = run(server, rounds=1)
    here.start()
    assert all(client.open_sessions == {} for client in here.sessions.values())
    assert first[0].refused == {}
    records = run(here.bind(tmp_path / "server"), rounds=2)
    assert [record.refused for record in records] == [{}, {}]


def test_a_trial_leaves_nothing_on_disk(tmp_path):
    here = machines(tmp_path, RECIPE + PRIVATE)
    here.bind(None)
    assert not list((tmp_path / "clients").rglob("*"))


def test_only_one_trial_is_held_and_few_sessions(tmp_path):
    here = machines(tmp_path)
    for at in range(6):
        here.bind(None)
        here.bind(tmp_path / f"server-{at}")
    for client in here.sessions.values():
        assert len(client.open_sessions) <= sessions.OPEN
        assert sum(one.folder is None for one in client.open_sessions.values()) <= 1
    # The first one was closed, and is opened from disk.
    assert ask(here, "c0", here.opened[3], Message("register")).kind == "registered"


def test_the_oldest_sessions_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(sessions, "KEPT", 3)
    here = machines(tmp_path)
    for at in range(5):
        here.bind(tmp_path / f"server-{at}")
    kept = {path.name for path in (here.folder / "c0").iterdir()}
    assert len(kept) == 3
    assert here.opened[-1] in kept


@pytest.mark.parametrize(
    "name",
    ["", "a", "../../etc/passwd", "A" * 16, "0" * 65, "0" * 15, "0123456789abcdef\n", "é" * 16],
)
def test_a_name_that_is_none_is_refused_before_anything_is_read(tmp_path, name):
    here = machines(tmp_path)
    answer = unpack(here.sessions["c0"].answer(name, b"whatever"))
    assert answer.kind == "error"
    assert "not the name of a session" in answer.header["reason"]
    assert not here.folder.exists()


@pytest.mark.parametrize("kind", ["register", "agree", "fit", "evaluate", "roster", "unheard of"])
def test_nothing_is_answered_before_an_offer(tmp_path, kind):
    answer = ask(machines(tmp_path), "c0", "0" * 16, Message(kind))
    assert answer.kind == "error"
    assert "nothing was offered" in answer.header["reason"]


@pytest.mark.parametrize("kind", ["fit", "evaluate", "roster", "unheard of"])
def test_nothing_but_public_facts_leave_before_an_agreement(tmp_path, kind):
    here = machines(tmp_path)
    session, offer = questions(here, tmp_path / "server")
    here.start()
    shutil.rmtree(here.folder)
    assert ask(here, "c0", session, offer).kind == "offered"
    assert ask(here, "c0", session, Message(kind)).kind == "error"


@pytest.mark.parametrize("body", [b"", b"x", b"\0" * 100, pack(Message("m"))[:-1]])
def test_garbage_is_an_error_and_the_client_stays(tmp_path, body):
    here = machines(tmp_path)
    session, _ = questions(here, tmp_path / "server")
    assert unpack(here.sessions["c0"].answer(session, body)).kind == "error"
    assert ask(here, "c0", session, Message("register")).kind == "registered"


def test_the_server_learns_neither_a_path_nor_a_column_that_the_recipe_does_not_name(tmp_path):
    here = machines(tmp_path)
    _, offer = questions(here, tmp_path / "server")
    told = []

    def examples(offer):
        raise DataError(
            "it lacks the columns age (it has hiv, pressure)",
            place="'/data/visits.csv'",
            cure="name its columns as the recipe does",
        )

    here.sessions["c0"].examples = examples
    here.sessions["c0"].told = told.append
    answer = ask(here, "c0", "1" * 16, offer)
    assert answer.kind == "error"
    assert answer.header["reason"] == (
        "DataError: it lacks the columns age; name its columns as the recipe does"
    )
    (said,) = told
    assert "visits.csv" in said
    assert "hiv" in said


def test_a_message_that_is_too_long_is_not_read(tmp_path):
    here = machines(tmp_path)
    _, offer = questions(here, tmp_path / "server")
    here.sessions["c0"].max_bytes = 1000
    answer = ask(here, "c0", "0" * 16, offer)
    assert answer.kind == "error"
    assert "max_bytes" in answer.header["reason"]


def offer_with(offer, **changes):
    """Returns the offer with entries of its texts replaced: `spec__architecture="x"`."""
    texts = {
        name: json.loads(bytes(offer.tensors[name].tolist()))
        for name in ("spec", "facts", "settings")
    }
    for path, value in changes.items():
        *way, last = path.split("__")
        table = texts
        for key in way:
            table = table[key]
        table[last] = value
    tensors = {name: text_tensor(json.dumps(table)) for name, table in texts.items()}
    return Message("offer", offer.header, {**offer.tensors, **tensors})


def test_an_offer_with_code_imports_nothing(tmp_path, monkeypatch):
    here = machines(tmp_path)
    _, offer = questions(here, tmp_path / "server")
    (tmp_path / "hostile.py").write_text(
        f"open({str(tmp_path / 'mark')!r}, 'w')\ndef make(**keys):\n    raise SystemExit\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for changes in (
        {"spec__architecture": "hostile:make"},
        {"facts__task": {"kind": "hostile:make"}},
        {"settings__algorithm": {"kind": "hostile:make"}},
    ):
        answer = ask(here, "c0", "0" * 16, offer_with(offer, **changes))
        assert answer.kind in ("error", "refused")
    assert not (tmp_path / "mark").exists()


def test_an_offer_of_a_huge_model_is_refused_before_it_is_built(tmp_path):
    here = machines(tmp_path)
    _, offer = questions(here, tmp_path / "server")
    huge = offer_with(offer, spec__arguments={"in_features": 64, "hidden": [10**9, 10**9]})
    answer = ask(here, "c0", "0" * 16, huge)
    assert answer.kind == "error"
    assert "offer.spec" in answer.header["reason"]


def test_a_kept_session_that_is_damaged_is_told(tmp_path):
    here = machines(tmp_path)
    session, _ = questions(here, tmp_path / "server")
    here.start()
    (here.folder / "c0" / session / "agree.message").write_bytes(b"damaged")
    assert ask(here, "c0", session, Message("evaluate")).kind == "error"


def with_identities(here, tmp_path):
    """Gives every client a secret of its own and a file of known keys."""
    for at, (name, client) in enumerate(here.sessions.items()):
        client.identity = bytes([at]) * 32
        client.known = KnownIdentities(tmp_path / f"{name}.toml", name)


def refusals(server):
    """Asks all clients once more; returns who does not agree, and why."""
    return agree(server.transport, server.contract)


def test_clients_note_the_identities_of_the_others(tmp_path):
    here = machines(tmp_path, RECIPE + SECURE)
    with_identities(here, tmp_path)
    here.bind(None)
    assert not (tmp_path / "c0.toml").exists()
    here.bind(tmp_path / "server")
    tables = [client.known.read() for client in here.sessions.values()]
    assert set(tables[0]) == set(NAMES)
    assert tables[0] == tables[1] == tables[2]


def test_a_client_whose_key_was_exchanged_is_refused_by_all_others(tmp_path):
    here = machines(tmp_path, RECIPE + SECURE)
    with_identities(here, tmp_path)
    here.bind(tmp_path / "one")
    here.sessions["c1"].identity = bytes([9]) * 32
    refused = refusals(here.bind(tmp_path / "two"))
    assert set(refused) == {"c0", "c2"}
    assert "client 'c1'" in refused["c0"]
    # What the reason tells the owner to do cures it.
    for name in ("c0", "c2"):
        path = tmp_path / f"{name}.toml"
        lines = path.read_text().splitlines()
        path.write_text("\n".join(line for line in lines if not line.startswith("c1 ")))
    assert refusals(here.bind(tmp_path / "three")) == {}


def test_a_damaged_file_of_identities_refuses_the_agreement(tmp_path):
    here = machines(tmp_path, RECIPE + SECURE)
    with_identities(here, tmp_path)
    (tmp_path / "c0.toml").write_text("c1 = ")
    assert set(refusals(here.bind(tmp_path / "server"))) == {"c0"}
    client = here.sessions["c0"]
    with pytest.raises(NetworkError):
        client.known.read()
    # Not agreed: the client answers no round.
    session = here.opened[-1]
    assert ask(here, "c0", session, Message("fit")).kind in ("error", "refused")


def test_the_same_identity_holds_over_sessions_and_restarts(tmp_path):
    here = machines(tmp_path, RECIPE + SECURE)
    with_identities(here, tmp_path)
    found = []
    for at in range(2):
        transport = here.open("0" * 15 + str(at), None)
        _, offer = questions(here, tmp_path / f"server-{at}")
        list(exchange(transport, dict.fromkeys(NAMES, offer)))
        replies = dict(exchange(transport, dict.fromkeys(NAMES, Message("register"))))
        found.append({name: reply.header["identity"] for name, reply in replies.items()})
        here.start()
        with_identities(here, tmp_path)
    assert found[0] == found[1]
    assert len(set(found[0].values())) == 3
