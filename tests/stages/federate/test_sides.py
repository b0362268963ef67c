"""Server and client sides of a stage: how they are built, and what a client refuses before the first round."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from fedpress.core.examples import Arrays, Preprocess
from fedpress.data.population import Population
from fedpress.errors import FedpressError, RecipeError, WireError
from fedpress.federation import InMemoryState
from fedpress.federation.protocol import text_tensor
from fedpress.models import ModelSpec
from fedpress.stages.federate.client import ClientSide
from fedpress.stages.federate.contract import CommonInputs
from fedpress.stages.federate.server import ServerSide, agree, register
from fedpress.stages.federate.settings import FederateSettings
from fedpress.stages.federate.stage import FederateStage
from fedpress.tasks import Classification
from fedpress.transport import LocalTransport
from fedpress.wire import Message, pack, unpack

NAMES = ("a", "b", "c", "d")
SAMPLE = {"unit": "sample", "noise_multiplier": 1.0, "delta": 1e-3}
CLIENT = {"unit": "client", "noise_multiplier": 1.0, "delta": 1e-3}
SECURE = CLIENT | {"trust": "distributed"}
SPEC = ModelSpec(architecture="mlp", input_shape=(6,), class_names=("x", "y", "z"))


RAW, TASK = Preprocess(), Classification(("x", "y", "z"))


def common(seed=7, preprocess=RAW, **keys) -> CommonInputs:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    stage = FederateStage.model_validate({"kind": "federate", "batch_size": 4, **keys})
    return CommonInputs.of(stage, SPEC, model, preprocess=preprocess, task=TASK, seed=seed)


def examples(at: int) -> Arrays:
    chance = torch.Generator().manual_seed(at)
    n = 10 + at
    return Arrays(torch.randn(n, 6, generator=chance), torch.randint(3, (n,), generator=chance))


def clients_of(begin: CommonInputs) -> dict[str, ClientSide]:
    return {
        name: ClientSide(name, examples(at), begin, InMemoryState())
        for at, name in enumerate(NAMES)
    }


def transport_to(clients: dict[str, ClientSide]) -> LocalTransport:
    return LocalTransport({name: client.handle for name, client in clients.items()})


def ask(client: ClientSide, message: Message) -> Message:
    return unpack(client.handle(pack(message)))


# A key of the stage -> another value of it, and the entry by which a client with that value refuses.
ALTERED = {
    "batch_size": (5, "settings.batch_size"),
    "epochs": (2, "settings.epochs"),
    "lr": (0.5, "settings.lr"),
    "lr_decay": (0.5, "settings.lr_decay"),
    "momentum": (0.5, "settings.momentum"),
    "optimizer": ("adamw", "settings.lr|settings.optimizer"),
    "weight_decay": (0.5, "settings.weight_decay"),
    "precision": ("bf16", "settings.precision"),
    "name": ("another", "seed"),
    "num_rounds": (11, "max_tasks|num_rounds"),
    "cohort": (3, "max_tasks|uplink"),
    "sampling": ("poisson", "max_tasks|uplink"),
    "schedule": ({"kind": "buffered", "buffer": 2, "concurrency": 3}, "max_tasks|schedule"),
    "weights": ("equal", "uplink.weights"),
    "server": ({"kind": "momentum"}, "algorithm"),
    "algorithm": ({"kind": "fedprox", "proximal_mu": 0.1}, "algorithm"),
    "proximal_mu": (0.1, "algorithm"),
    "trainable": (("0.*",), "layout"),
    "norm": ("batch", "norm"),
    "augment": ({"flip": "random"}, "prepare"),
    "privacy": (CLIENT, ""),
    "uplink": (({"kind": "quantize", "bits": 8},), "uplink"),
    "downlink": (({"kind": "quantize", "bits": 8},), "downlink"),
    "error_feedback": (True, "error_feedback"),
    "aggregator": ("median", "uplink"),
}
SECURE_ALONE = {"secure_keys", "max_dropout"}
"""Keys of secure sums: who draws the keys is each client's own business, and the rest is in the plan, see below."""
ADAM_ALONE = {"betas"}
"""Keys of another optimizer than the default, see below."""
SERVER_ALONE = {
    "kind",
    "first_downlink",  # part of `downlink`, see below
    "delays",
    "target_metric",
    "target_accuracy",
    "patience",
    "scored_clients",
}


def test_every_key_of_the_table_is_known_to_be_alike_or_not_to_matter():
    known = {*ALTERED, *SECURE_ALONE, *ADAM_ALONE, *SERVER_ALONE}
    assert known == set(FederateSettings.model_fields), (
        "a new key of the federate table: say here by which entry of the agreement a client with another value refuses"
    )


@pytest.mark.parametrize("key", ALTERED)
def test_a_client_with_another_value_of_a_key_refuses_by_the_name_of_the_entry(key):
    value, entry = ALTERED[key]
    clients = clients_of(common())
    clients["b"] = ClientSide("b", examples(1), common(**{key: value}), InMemoryState())
    transport = transport_to(clients)
    population = Population(NAMES, {name: len(clients[name].arrays) for name in NAMES})
    contract = common().contract(population)
    refused = agree(transport, contract)
    assert list(refused) == ["b"]
    words = refused["b"].removeprefix("WireError: ")
    assert words.startswith(tuple(f"agreement.{one}" for one in entry.split("|")))
    assert "use the same recipe" in words
    # It goes on refusing: nothing of its data leaves under another agreement.
    fit = Message("fit", {"round": 1, "agreement": contract.terms.agreement.fingerprint})
    with pytest.raises(WireError) as caught:
        clients["b"].handle(pack(fit))
    assert str(caught.value) == words


@pytest.mark.parametrize(
    ("keys", "other", "entry"),
    [
        ({"privacy": SECURE}, {"privacy": SECURE, "max_dropout": 0.25}, "uplink"),
        (
            {"downlink": ({"kind": "quantize", "bits": 8},)},
            {
                "downlink": ({"kind": "quantize", "bits": 8},),
                "first_downlink": ({"kind": "quantize", "bits": 4},),
            },
            "downlink.first",
        ),
        ({"optimizer": "adamw"}, {"optimizer": "adamw", "betas": (0.8, 0.9)}, "settings.betas"),
        ({}, {"seed": 8}, "seed"),
        ({}, {"preprocess": Preprocess((0.5,), (0.5,))}, "prepare.preprocess"),
        ({"privacy": SAMPLE}, {"privacy": SAMPLE | {"clip_norm": 2.0}}, "uplink.privacy.clip_norm"),
        ({"privacy": SAMPLE}, {"privacy": SAMPLE | {"noise_multiplier": 2.0}}, "uplink.privacy"),
    ],
)
def test_other_seeds_preprocessing_and_plans_are_refused_by_name(keys, other, entry):
    ours, theirs = clients_of(common(**keys)), clients_of(common(**other))
    clients = {**ours, "c": theirs["c"]}
    transport = transport_to(clients)
    contract = common(**keys).contract(register(transport))
    refused = agree(transport, contract)
    assert list(refused) == ["c"]
    assert refused["c"].startswith(f"WireError: agreement.{entry}")


def test_without_a_client_that_agrees_there_is_no_run():
    with pytest.raises(RecipeError, match=r"no client agrees, for instance a .*agreement\.seed"):
        ServerSide.bind(common(seed=8), transport_to(clients_of(common())))


@pytest.mark.parametrize(
    ("keys", "counts", "identities"),
    [
        ({}, True, False),
        ({"privacy": SAMPLE}, True, False),
        ({"privacy": SAMPLE | {"trust": "central"}}, True, False),
        ({"privacy": SAMPLE | {"trust": "distributed"}}, True, True),
        ({"privacy": CLIENT}, False, False),
        ({"privacy": SECURE}, False, True),
        ({"aggregator": "secure"}, False, True),
    ],
)
def test_a_client_tells_its_count_only_where_it_is_public_and_its_key_only_for_a_secure_sum(
    keys, counts, identities
):
    clients = clients_of(common(**keys))
    reply = ask(clients["a"], Message("register"))
    assert reply.header.keys() == {"examples"} & {"examples" if counts else ""} | (
        {"identity"} if identities else set()
    )
    server = ServerSide.bind(common(**keys), transport_to(clients))
    assert (server.population.examples is not None) == counts
    assert (server.population.identities != {}) == identities


def test_a_client_refuses_what_the_server_invents_about_it():
    clients = clients_of(common(privacy=SAMPLE))
    true = register(transport_to(clients))
    agreement = common(privacy=SAMPLE).contract(true).terms.agreement.to_json()

    def told(population):
        tensors = {
            "agreement": text_tensor(agreement),
            "population": text_tensor(population.to_json()),
        }
        return ask(clients["a"], Message("agree", {}, tensors))

    assert told(true).kind == "agreed"
    with pytest.raises(WireError, match=r"the server says that 'a' has 11, but it has 10"):
        told(replace(true, examples={**true.counts, "a": 11}))
    with pytest.raises(WireError, match="does not name 'a'"):
        told(Population(NAMES[1:], {name: true.counts[name] for name in NAMES[1:]}))
    secure = clients_of(common(privacy=SECURE))
    known = register(transport_to(secure))
    wrong = {**known.identities, "a": known.identities["b"]}
    tensors = {
        "agreement": text_tensor(agreement),
        "population": text_tensor(replace(known, identities=wrong).to_json()),
    }
    with pytest.raises(WireError, match="another key than that of 'a'"):
        ask(secure["a"], Message("agree", {}, tensors))


def test_before_it_has_agreed_a_client_answers_nothing_else():
    client = clients_of(common())["a"]
    for kind in ("fit", "evaluate", "join", "roster", "unmask"):
        with pytest.raises(WireError, match=f"{kind}: this client has not agreed yet"):
            ask(client, Message(kind))


def test_accuracy_on_private_examples_is_refused_by_the_client_itself():
    for keys in ({"privacy": SAMPLE}, {"privacy": CLIENT}):
        clients = clients_of(common(**keys))
        server = ServerSide.bind(common(**keys), transport_to(clients))
        params = torch.cat([p.detach().reshape(-1) for p in server.model.parameters()])
        assert server.client_scores(params) == {}
        header = {"agreement": server.contract.terms.agreement.fingerprint}
        with pytest.raises(WireError, match="is private too"):
            ask(clients["a"], Message("evaluate", header, {"params": params}))


@pytest.mark.parametrize("keys", [{}, {"privacy": CLIENT}, {"aggregator": "secure"}])
def test_a_message_gets_the_answer_that_its_bytes_get(keys):
    answers = []
    for as_bytes in (True, False):
        clients = clients_of(common(**keys))
        server = ServerSide.bind(common(**keys), transport_to(clients))
        params = torch.cat([p.detach().reshape(-1) for p in server.model.parameters()])
        header = {"round": 1, "agreement": server.contract.terms.agreement.fingerprint}
        fit = Message("fit", {**header, "cohort": list(NAMES)}, {"params": params})
        got = []
        for request in (Message("register"), Message("join"), fit, Message("evaluate")):
            try:
                if as_bytes:
                    got.append(clients["a"].handle(pack(request)))
                else:
                    got.append(pack(clients["a"].answer(request)))
            except FedpressError as problem:
                got.append(str(problem))
        answers.append(got)
    assert answers[0] == answers[1]
    assert isinstance(answers[0][0], bytes)


def test_without_privacy_every_client_says_what_the_model_is_worth_to_it():
    clients = clients_of(common())
    server = ServerSide.bind(common(), transport_to(clients))
    params = torch.cat([p.detach().reshape(-1) for p in server.model.parameters()])
    found = server.client_scores(params)
    for at, name in enumerate(NAMES):
        arrays = examples(at)
        right = (server.model(arrays.x).argmax(1) == arrays.y).double().mean()
        assert found[name] == pytest.approx(float(right))


@pytest.mark.parametrize("count", [0, 1, 3])
def test_some_clients_drawn_at_random_say_what_the_model_is_worth(count):
    found = []
    for seed in range(20):
        settings = common(scored_clients=count)
        settings = replace(settings, seed=seed)
        server = ServerSide.bind(settings, transport_to(clients_of(settings)))
        params = torch.cat([p.detach().reshape(-1) for p in server.model.parameters()])
        found.append(tuple(server.client_scores(params)))
        assert tuple(server.client_scores(params)) == found[-1]
    assert {len(names) for names in found} == {count}
    assert {name for names in found for name in names} == (set(NAMES) if count else set())


@pytest.mark.parametrize("metrics", [{"accuracy": "high"}, {"accuracy": True}, {"accuracy": []}, 3])
def test_an_evaluation_that_is_none_is_left_out(metrics):
    clients = clients_of(common())

    def invented(request):
        reply = unpack(clients["b"].handle(request))
        if reply.kind != "evaluated":
            return pack(reply)
        return pack(Message("evaluated", {"examples": 1, "metrics": metrics}))

    handlers = {name: client.handle for name, client in clients.items()} | {"b": invented}
    server = ServerSide.bind(common(), LocalTransport(handlers))
    params = torch.cat([p.detach().reshape(-1) for p in server.model.parameters()])
    assert list(server.client_scores(params)) == ["a", "c", "d"]


def test_every_client_of_a_secure_sum_makes_a_secret_of_its_own():
    keys = {"privacy": SECURE, "secure_keys": True}
    identities = [register(transport_to(clients_of(common(**keys)))).identities for _ in range(2)]
    assert len({key for one in identities for key in one.values()}) == 2 * len(NAMES)
    from_seed = [
        register(transport_to(clients_of(common(privacy=SECURE)))).identities for _ in range(2)
    ]
    assert from_seed[0] == from_seed[1]


def test_clients_that_work_with_different_recipes_are_told_apart_when_they_register():
    clients = clients_of(common()) | {"b": clients_of(common(privacy=CLIENT))["b"]}
    with pytest.raises(RecipeError, match=r"have different recipes .*population\.examples"):
        register(transport_to(clients))


def test_the_bytes_before_the_first_round_are_those_of_the_messages():
    transport = transport_to(clients_of(common()))
    server = ServerSide.bind(common(), transport)
    assert server.set_up == transport.traffic
    assert server.set_up.up > 0
    assert server.set_up.down > 0


def test_where_the_cohort_is_secret_no_length_tells_that_a_client_refused():
    central = {"privacy": CLIENT, "sampling": "poisson", "cohort": 2}
    other = clients_of(common(lr=0.5, **central))["b"]
    told, sent = [], []
    for clients in (clients_of(common(**central)), clients_of(common(**central)) | {"b": other}):
        transport = transport_to(clients)
        told.append(ServerSide.bind(common(**central), transport).set_up)
        sent.append(transport.traffic)
    assert told[0] == told[1]
    assert told[0] == sent[0] != sent[1]


def test_the_population_is_json_that_names_no_example():
    population = register(transport_to(clients_of(common())))
    assert json.loads(population.to_json())["names"] == list(NAMES)
