"""Federate stages for tests of the engines: a case for every row of the tables, and what must be equal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, get_args

import torch

from fedpress.codecs import TRANSFORMS
from fedpress.core import parameters
from fedpress.federation import DiskState, LocalSettings, RoundRecord, Start
from fedpress.federation.aggregators import AGGREGATORS
from fedpress.federation.algorithms import ALGORITHMS
from fedpress.federation.algorithms.optimizers import SERVERS
from fedpress.federation.delays import DELAYS
from fedpress.federation.exchange import Traffic
from fedpress.federation.schedules import SCHEDULES
from fedpress.federation.trust import TRUSTS
from fedpress.pipeline import recipe as recipes
from fedpress.pipeline.start import first_state, load_data
from fedpress.stages.federate.binding import bind
from fedpress.stages.federate.server import ServerSide
from fedpress.stages.federate.settings import FederateSettings
from fedpress.transport.engine import LocalEngine
from fedpress.workspace.state import Engine

RECIPE = """
name = "engines"
[data]
source = "digits"
num_clients = 4
examples_per_client = 20
validation = 20
[model]
architecture = "mlp"
arguments = { in_features = 64, hidden = [8] }
[[stage]]
kind = "federate"
num_rounds = 2
batch_size = 10
"""
MANY = (
    RECIPE.replace("num_clients = 4", "num_clients = 40")
    .replace("examples_per_client = 20", "examples_per_client = 4")
    .replace("batch_size = 10", "batch_size = 2")
)
"""The same with 40 clients: processes add up the updates of blocks of two."""
NAMES = ("c0", "c1", "c2", "c3")
CODED = """
uplink = [{ kind = "topk", density = 0.2 }, { kind = "quantize", bits = 8 }]
error_feedback = true
downlink = [{ kind = "quantize", bits = 8 }]
"""
CLIP = '{ kind = "clip", clip_norm = 0.1 }'


def private(unit: str, trust: str, more: str = "") -> str:
    """Returns the key `privacy` of a stage."""
    budget = f"noise_multiplier = 1.0, delta = 1e-3{more}"
    return f'privacy = {{ unit = "{unit}", trust = "{trust}", {budget} }}\n'


def codec(text: str, *before: str) -> str:
    """Returns the key `uplink` of a stage with the codec `text` after those in `before`."""
    return f"uplink = [{', '.join([*before, text])}]\n"


ROWS: Mapping[str, Mapping[str, str]] = {
    "algorithm": {
        "fedavg": 'algorithm = "fedavg"\n',
        "fedprox": 'algorithm = { kind = "fedprox", proximal_mu = 0.1 }\n',
        "fedavgm": 'algorithm = "fedavgm"\n',
        "fedadam": 'algorithm = "fedadam"\n',
        "scaffold": 'algorithm = "scaffold"\ncohort = 3\n',
        "qfedavg": 'algorithm = { kind = "qfedavg", q = 1.0 }\nweights = "equal"\n',
    },
    "aggregator": {
        "mean": 'aggregator = "mean"\n',
        "secure": 'aggregator = "secure"\nweights = "equal"\n',
        "median": 'aggregator = "median"\nweights = "equal"\n',
        "trimmed": 'aggregator = { kind = "trimmed", beta = 0.25 }\nweights = "equal"\n',
    },
    "codec": {
        "clip": codec(CLIP),
        "topk": codec('{ kind = "topk", density = 0.2 }'),
        "randomk": codec('{ kind = "randomk", density = 0.3 }'),
        "rotate": codec('{ kind = "rotate" }', CLIP),
        "lowrank": codec('{ kind = "lowrank", rank = 2 }'),
        "quantize": codec('{ kind = "quantize", rate = 1.0, unbiased = true }'),
        "powers": codec('{ kind = "powers" }'),
        "sign": codec('{ kind = "sign", block = 64 }'),
        "ternary": codec('{ kind = "ternary", block = 64 }'),
        "discretize": codec('{ kind = "discretize", scale = 1000.0 }', CLIP),
        "noise": codec('{ kind = "noise", std = 0.01 }', CLIP),
        "lossless": codec('{ kind = "lossless" }'),
    },
    "schedule": {
        "synchronous": 'schedule = { kind = "synchronous" }\ncohort = 2\n',
        # One client at a time: the order of answers does not depend on how fast clients are.
        "buffered": 'schedule = { kind = "buffered", concurrency = 1, buffer = 2 }\n',
    },
    "delays": {
        "constant": 'delays = { kind = "constant" }\n',
        "lognormal": 'delays = { kind = "lognormal" }\n',
        "exponential": 'delays = { kind = "exponential" }\n',
    },
    "server": {
        "average": 'server = { kind = "average" }\n',
        "momentum": 'server = { kind = "momentum" }\n',
        "adam": 'server = { kind = "adam" }\n',
    },
    "optimizer": {name: f'optimizer = "{name}"\n' for name in ("sgd", "adamw", "adam")},
    "sampling": {
        "fixed": "cohort = 2\n",
        "poisson": 'cohort = 2\nsampling = "poisson"\n',
        "cyclic": 'cohort = 2\nsampling = "cyclic"\n',
    },
    "weights": {name: f'weights = "{name}"\n' for name in ("examples", "equal")},
    "trust": {
        "open": "",
        "sample local": private("sample", "local"),
        "sample distributed": private("sample", "distributed"),
        "sample central": private("sample", "central"),
        "client local": private("client", "local"),
        "client distributed": private("client", "distributed"),
        "client central": private("client", "central"),
    },
}
"""Table -> row of it -> keys of a stage that uses the row."""
OTHERS: Mapping[str, str] = {
    "coded both ways": CODED,
    "coded both ways, two of four": CODED + "cohort = 2\n",
    "coded, with client privacy": codec('{ kind = "quantize", bits = 8 }')
    + private("client", "central"),
    "adaptive": private("client", "central", ", adaptive = {}"),
    "correlated": private("client", "central", ", correlated = { bands = 2 }"),
    "noise of the system": private("client", "distributed", ", secure_noise = true")
    + "secure_keys = true\n",
    "more asked than needed": CODED
    + 'cohort = 2\nschedule = { kind = "synchronous", over_selection = 2.0 }\n',
    "the slow left out": CODED
    + 'cohort = 2\nschedule = { kind = "synchronous", over_selection = 2.0 }\n'
    'delays = { kind = "lognormal", median = 10.0 }\n',
    "three at a time": 'schedule = { kind = "buffered", concurrency = 3, buffer = 2 }\n'
    'delays = { kind = "lognormal", median = 10.0 }\n',
    "three at a time, private": 'schedule = { kind = "buffered", concurrency = 3, buffer = 2 }\n'
    'delays = { kind = "lognormal", median = 10.0 }\n' + private("client", "central"),
}
"""Further cases, in which rows meet."""
CASES: Mapping[str, str] = {
    **{f"{table}: {row}": text for table, rows in ROWS.items() for row, text in rows.items()},
    **OTHERS,
}
"""All cases: name -> keys of the stage."""


def _joined(*texts: str) -> str:
    """Returns the keys of several stages; of a key that several have, the last one counts."""
    keys = {}
    for text in texts:
        for line in text.strip().splitlines():
            keys[line.partition(" = ")[0]] = line
    return "\n".join(keys.values()) + "\n"


def _together(*tables: str) -> dict[str, str]:
    """Returns cases that use one row of each table at once, so many that each row is in one."""
    found = {}
    for at in range(max(len(ROWS[table]) for table in tables)):
        rows = {table: list(ROWS[table])[at % len(ROWS[table])] for table in tables}
        text = _joined(*(ROWS[table][row] for table, row in rows.items()))
        found[" + ".join(rows.values())] = text
    return found


FEWER_CASES: Mapping[str, str] = {
    **_together("codec", "algorithm"),
    **_together("server", "delays", "sampling", "weights", "optimizer"),
    **_together("aggregator"),
    **_together("schedule"),
    **_together("trust"),
    **OTHERS,
}
"""The same rows in fewer cases, for an engine in which every case takes seconds."""


def without_delays(text: str) -> str:
    """Returns the keys of a stage without simulated delays."""
    return "".join(line for line in text.splitlines(True) if not line.startswith("delays"))


def _choices(settings: type[Any], key: str) -> list[str]:
    """Returns the values that a key of literals may have."""
    annotation = settings.model_fields[key].annotation
    found = []
    for one in (annotation, *get_args(annotation)):
        found += [value for value in get_args(one) if isinstance(value, str)]
    return found


def trust_name(unit: str | None, kind: str) -> str:
    """Returns the name of a row of the table of trust models."""
    return kind if unit is None else f"{unit} {kind}"


REGISTRIES: Mapping[str, list[str]] = {
    "algorithm": list(ALGORITHMS),
    "aggregator": list(AGGREGATORS),
    "codec": list(TRANSFORMS),
    "schedule": list(SCHEDULES),
    "delays": list(DELAYS),
    "server": list(SERVERS),
    "optimizer": _choices(LocalSettings, "optimizer"),
    "sampling": _choices(FederateSettings, "sampling"),
    "weights": _choices(FederateSettings, "weights"),
    "trust": [trust_name(row.unit, row.kind) for row in TRUSTS],
}
"""Table -> all its rows, as fedpress has them."""


def used_by(stage: FederateSettings) -> set[tuple[str, str]]:
    """Returns the rows that a stage uses, each as (table, row)."""
    used = {("codec", one.kind) for one in stage.uplink}
    for table in ("algorithm", "aggregator", "schedule", "delays", "server"):
        row = getattr(stage, table)
        if row is not None:
            used.add((table, row.kind))
    for key in ("optimizer", "sampling", "weights"):
        used.add((key, getattr(stage, key)))
    privacy = stage.privacy
    if privacy is None:
        used.add(("trust", "open"))
    else:
        assert privacy.trust is not None
        used.add(("trust", trust_name(privacy.unit, privacy.trust)))
    return used


def recipe_of(case: str) -> str:
    """Returns the recipe of one of `CASES` or `FEWER_CASES`."""
    return RECIPE + {**CASES, **FEWER_CASES}[case]


def stage_of(case: str) -> FederateSettings:
    """Returns the settings of a case."""
    return recipes.load(recipe_of(case)).stage[0]


@dataclass(frozen=True, eq=False)
class Finished:
    """What a stage left.

    Attributes:
        records: of the rounds.
        traffic: bytes of all messages of the simulation.
        scores: what the model is worth at each client.
    """

    records: list[RoundRecord]
    traffic: Traffic
    scores: Any


def finish(side: ServerSide) -> Finished:
    """Runs all rounds of a bound stage, and measures the model at the clients."""
    records = list(side.rounds(Start(parameters.flatten(side.model))))
    return Finished(records, side.transport.traffic, side.client_scores(records[-1].params))


def simulated(text: str, engine: Engine | None = None, folder: Path | None = None) -> Finished:
    """Runs the first stage of the recipe `text` as a simulation, by default in this process."""
    return finish(bound(text, engine, folder))


def bound(text: str, engine: Engine | None = None, folder: Path | None = None) -> ServerSide:
    """Returns the server of the first stage of the recipe `text`, simulated by `engine`."""
    loaded = recipes.load(text)
    state = replace(first_state(loaded, load_data(loaded)), engine=engine or LocalEngine())
    return bind(loaded.stage[0], state, folder).server


@cache
def expected(text: str) -> Finished:
    """Returns what the local engine makes of the recipe `text`, which is run once."""
    return simulated(text)


def differences(one: Finished, other: Finished) -> Iterator[str]:
    """Yields each place where parameters, state, records or scores are not equal bit for bit."""
    if len(one.records) != len(other.records):
        yield f"{len(one.records)} rounds against {len(other.records)}"
    for mine, theirs in zip(one.records, other.records, strict=False):
        place = f"round {mine.round}"
        if not torch.equal(mine.params, theirs.params):
            yield f"{place}: params"
        tensors, others = mine.server_state, theirs.server_state
        if tensors.keys() != others.keys():
            yield f"{place}: server_state has other names"
        for name in tensors.keys() & others.keys():
            if not torch.equal(tensors[name], others[name]):
                yield f"{place}: server_state {name}"
        facts, other_facts = _facts(mine), _facts(theirs)
        for name, value in facts.items():
            if value != other_facts[name]:
                yield f"{place}: {name}: {value!r} against {other_facts[name]!r}"
    if one.scores != other.scores:
        yield f"scores: {one.scores!r} against {other.scores!r}"


def _facts(record: RoundRecord) -> dict[str, Any]:
    facts = asdict(replace(record, params=torch.empty(0), server_state={}))
    # Only the wall time may differ.
    for name in ("params", "server_state", "seconds"):
        del facts[name]
    return facts


def has_secrets(case: str) -> bool:
    """Returns whether noise or keys of a case are random numbers of the operating system."""
    stage = stage_of(case)
    return stage.secure_keys or (stage.privacy is not None and stage.privacy.secure_noise)


def copy_secrets(source: Path, to: Path) -> None:
    """Copies the secrets of server and clients from one folder of states to another."""
    (place,) = source.iterdir()
    for own in place.iterdir():
        for entry in ("secret", "identity"):
            if found := DiskState(own).entry(entry):
                DiskState(to / place.name / own.name).save_entry(entry, found)
