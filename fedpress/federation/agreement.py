"""What server and clients must hold alike: the terms of a run, and their agreement as versioned canonical JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from hashlib import blake2b
from typing import Literal

from fedpress.core import parameters, random
from fedpress.core.canonical import JSON, canonical
from fedpress.errors import RecipeError, WireError
from fedpress.federation.algorithms import Algorithm, FedAvg, check_fits
from fedpress.federation.downlink import Downlink
from fedpress.federation.local import LocalSettings, Prepare
from fedpress.federation.schedules import Schedule
from fedpress.federation.uplink import Uplink
from fedpress.tasks import Task

FEDAVG = FedAvg()
VERSION = 1
"""Of the agreement's form. Raise it when an entry changes its meaning under the same name."""
SHOWN = 120
"""Characters of a value that a refusal shows: an entry may hold a whole list of names."""
Norm = Literal["frozen", "batch"]


@dataclass(frozen=True)
class Agreement:
    """The entries of an agreement, by name; two sides hold it alike if their fingerprints are equal.

    >>> ours, theirs = Agreement({"norm": "frozen"}), Agreement({"norm": "batch"})
    >>> ours.fingerprint == theirs.fingerprint
    False
    >>> ours.compare(theirs)
    Traceback (most recent call last):
        ...
    fedpress.errors.WireError: agreement.norm: the server says 'frozen', this client 'batch'; use the same recipe
    """

    entries: dict[str, JSON]

    def to_json(self) -> str:
        """Returns the canonical text: sorted keys, no spaces, and every number as Python writes it."""
        return self._text

    @cached_property
    def _text(self) -> str:
        return json.dumps(self.entries, sort_keys=True, separators=(",", ":"), allow_nan=False)

    @cached_property
    def fingerprint(self) -> str:
        """Digest of the text, 16 hexadecimal digits: what travels with every request."""
        return blake2b(self.to_json().encode(), digest_size=8).hexdigest()

    @classmethod
    def from_json(cls, text: str) -> Agreement:
        """Reads what `to_json` gave and anybody may have sent.

        Raises:
            WireError: if it is no table.
        """
        try:
            entries = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise WireError(
                f"not JSON ({type(error).__name__})",
                place="agreement",
                cure="use the same fedpress on both sides",
            ) from error
        if not isinstance(entries, dict):
            raise WireError(
                f"got {type(entries).__name__}, expected a table",
                place="agreement",
                cure="use the same fedpress on both sides",
            )
        return cls(entries)

    def leaves(self) -> dict[str, JSON]:
        """Returns every single entry by its whole name, such as `uplink.cohort.size`."""
        return dict(_leaves("", self.entries))

    def compare(self, client: Agreement) -> None:
        """Compares with what a `client` holds.

        Raises:
            WireError: naming the first entry that the client holds otherwise, with both values.
        """
        if self.to_json() == client.to_json():  # so nothing has to be looked at one by one
            return
        ours, theirs = self.leaves(), client.leaves()
        for name in sorted(ours.keys() | theirs.keys()):
            # By their text: 1, 1.0 and true are equal in Python, and not in a canonical text.
            here, there = _text(ours, name), _text(theirs, name)
            if here != there:
                same = "fedpress" if name in ("version", "streams") else "recipe"
                raise WireError(
                    f"the server says {_short(here)}, this client {_short(there)}",
                    place=f"agreement.{name}",
                    cure=f"use the same {same}",
                )


@dataclass(frozen=True)
class Terms:
    """All that server and clients must hold alike; whatever is added here is part of the agreement.

    Attributes:
        layout: names and shapes of the parameters that train.
        settings: how a client trains.
        uplink: how updates come home.
        seed: of the run. The agreement holds a commitment to it: clients with another seed draw other masks and
            rotations, so that the mean of their updates points anywhere.
        prepare: raw examples [k, ...] and a generator -> network input; its fields tell its settings.
        task: what is learned.
        downlink: the agreed code of the model on its way to the clients, None if it travels whole.
        norm: "frozen" fixes the statistics of batch norm (scale and bias train); "batch" uses those of each batch.
        error_feedback: clients add what coding lost of one update to the next (Seide et al. 2014; Karimireddy et al.
            2019, arXiv:1901.09847).
        num_rounds: how many rounds are planned; without end if None.
        algorithm: what clients and server do with the model.
        max_tasks: how often one client may be asked in the rounds, where that is planned too.
        schedule: when the server asks whom; None for plain rounds.

    Raises:
        RecipeError: if the algorithm does not fit the rest.
    """

    layout: parameters.Layout
    settings: LocalSettings
    uplink: Uplink
    seed: int
    prepare: Prepare
    task: Task
    downlink: Downlink | None = None
    norm: Norm = "frozen"
    error_feedback: bool = False
    num_rounds: int | None = None
    algorithm: Algorithm = FEDAVG
    max_tasks: int | None = None
    schedule: Schedule | None = None

    def __post_init__(self) -> None:
        trust = self.uplink.trust
        check_fits(self.algorithm, self.settings, steps=trust.steps, unit=trust.unit)
        extras = tuple(codec.name for codec in self.uplink.vector_codecs[1:])
        if extras != tuple(self.algorithm.extras_up):
            raise RecipeError(
                (
                    f"'{self.algorithm.kind}' sends {list(self.algorithm.extras_up)} beside the "
                    f"update, but the uplink is for {list(extras)}"
                ),
                place="algorithm",
                cure="bind it with extras = algorithm.extras_up",
            )
        if self.algorithm.needs_equal_weights and self.uplink.weights != "equal":
            raise RecipeError(
                (
                    f"got '{self.uplink.weights}', but '{self.algorithm.kind}' holds only if every "
                    "client counts the same"
                ),
                place="weights",
                cure='set weights = "equal"',
            )

    @cached_property
    def agreement(self) -> Agreement:
        """The agreement of all these, under the names of the fields."""
        entries = {one.name: canonical(getattr(self, one.name)) for one in fields(self)}
        entries["seed"] = commitment(self.seed)
        return Agreement({"version": VERSION, "streams": random.STREAMS, **entries})


def commitment(seed: int) -> str:
    """Returns what lets two sides see that they hold the same `seed`, without saying it.

    A small seed can be found by trying; what must stay secret hangs on 256 bits of the operating system instead.
    """
    return random.fingerprint("fedpress seed", seed)[:32]


def _leaves(name: str, value: JSON) -> Iterator[tuple[str, JSON]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(f"{name}.{key}" if name else key, item)
    elif isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        for at, item in enumerate(value):
            yield from _leaves(f"{name}[{at}]", item)
    else:
        yield name, value


def _text(leaves: Mapping[str, JSON], name: str) -> str:
    return repr(leaves[name]) if name in leaves else "nothing"


def _short(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."
