"""The agreement: all settings that must be equal on the server and on each client, as JSON.

Before the first round the server sends it to every client, which compares it with its own. If a
client trained with another learning rate or seed, the run would silently give a wrong result.
"""

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
"""The default algorithm."""
VERSION = 1
"""Version of the agreement's format; increase it if an entry keeps its name but changes meaning."""
MAX_VALUE_CHARS = 120
"""Longer values are cut in error messages: an entry may hold a list of all clients."""
Norm = Literal["frozen", "batch"]
"""See `Terms.norm`."""


@dataclass(frozen=True)
class Agreement:
    """The settings of one side. Server and client agree if their fingerprints are equal.

    Attributes:
        entries: name of a field of `Terms` -> its value as JSON.

    >>> ours, theirs = Agreement({"norm": "frozen"}), Agreement({"norm": "batch"})
    >>> ours.fingerprint == theirs.fingerprint
    False
    >>> ours.compare(theirs)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    fedpress.errors.WireError: agreement.norm: the server says 'frozen', this client 'batch'...
    """

    entries: dict[str, JSON]

    def to_json(self) -> str:
        """Returns canonical JSON: sorted keys, no spaces, numbers as Python writes them."""
        return self._text

    @cached_property
    def _text(self) -> str:
        # NaN is refused: it is not valid JSON, and never equal to itself.
        return json.dumps(self.entries, sort_keys=True, separators=(",", ":"), allow_nan=False)

    @cached_property
    def fingerprint(self) -> str:
        """Digest of the JSON text, 16 hexadecimal digits. Every request contains it."""
        return blake2b(self.to_json().encode(), digest_size=8).hexdigest()

    @classmethod
    def from_json(cls, text: str) -> Agreement:
        """Reads a text in the format of `to_json`. The sender need not be trusted.

        Raises:
            WireError: if the text is not a JSON object.
        """
        try:
            entries = json.loads(text)
        # Thousands of nested lists are valid JSON, but Python raises a RecursionError for them.
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
        """Returns every value by its full name, such as `uplink.cohort.size`."""
        return dict(_leaves("", self.entries))

    def compare(self, client: Agreement) -> None:
        """Compares this agreement of the server with a client's agreement.

        Raises:
            WireError: if they differ; the error names the first entry that differs, and its values.
        """
        # The texts are nearly always equal, and then need no further work.
        if self.to_json() == client.to_json():
            return
        # Compared value by value, so that the error names one setting and not the whole text.
        ours = self.leaves()
        theirs = client.leaves()
        for name in sorted(ours.keys() | theirs.keys()):
            # Compared as text: 1, 1.0 and true are equal in Python, but not in canonical JSON.
            here = _text(ours, name)
            there = _text(theirs, name)
            if here == there:
                continue
            same = "fedpress" if name in ("version", "streams") else "recipe"
            raise WireError(
                f"the server says {_short(here)}, this client {_short(there)}",
                place=f"agreement.{name}",
                cure=f"use the same {same}",
            )


@dataclass(frozen=True)
class Terms:
    """The settings of a run that server and clients share; each field is an entry of the agreement.

    Attributes:
        layout: names and shapes of the trainable parameters.
        settings: how a client trains in a round, such as its learning rate.
        uplink: how updates are encoded, sent to the server and averaged.
        seed: seed of the run. The agreement contains only a digest of it. A client with another
            seed would draw other masks and rotations, and the mean of the updates would be noise.
        prepare: function that turns raw examples [k, ...] into network input; its second argument
            is a random generator, for augmentation.
        task: what is learned, such as classification; it gives the loss.
        downlink: how the model is encoded for the clients; None: parameters are sent as float32.
        norm: "frozen" fixes the statistics of batch norms (their scale and bias are still trained);
            "batch" uses the statistics of each batch.
        error_feedback: whether clients add the coding error of one update to the next update (Seide
            et al. 2014; Karimireddy et al. 2019, arXiv:1901.09847).
        num_rounds: number of planned rounds; None for no limit.
        algorithm: the client's update and the server's step, such as FedAvg.
        max_tasks: how often one client may be asked in the run; None for no limit.
        schedule: when the server asks which client; None for synchronous rounds.

    Raises:
        RecipeError: if the algorithm does not fit the other settings.
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

        # The first vector of an uplink is always the update; the others belong to the algorithm.
        extras = tuple(codec.name for codec in self.uplink.vector_codecs[1:])
        if extras != tuple(self.algorithm.extras_up):
            raise RecipeError(
                (
                    f"'{self.algorithm.kind}' sends {list(self.algorithm.extras_up)} beside the "
                    f"update, but the uplink is for {list(extras)}"
                ),
                place="algorithm",
                cure="bind the uplink with extras = algorithm.extras_up",
            )

        if self.algorithm.needs_equal_weights and self.uplink.weights != "equal":
            raise RecipeError(
                (
                    f"got '{self.uplink.weights}', but '{self.algorithm.kind}' is correct only if "
                    "all clients have the same weight"
                ),
                place="weights",
                cure='set weights = "equal"',
            )

    @cached_property
    def agreement(self) -> Agreement:
        """The agreement: an entry for each field, and the versions of format and random streams."""
        entries = {one.name: canonical(getattr(self, one.name)) for one in fields(self)}
        # The seed itself is not sent: in a simulation, noise and keys can be computed from it.
        entries["seed"] = commitment(self.seed)
        return Agreement({"version": VERSION, "streams": random.STREAMS, **entries})


def commitment(seed: int) -> str:
    """Returns a digest of `seed`, by which two sides compare their seeds without sending them.

    A small seed can be found by trying all values. With the settings `secure_noise` and
    `secure_keys`, noise and keys are therefore drawn from 256 random bits of the operating system,
    not from the seed.
    """
    return random.fingerprint("fedpress seed", seed)[:32]


def _leaves(name: str, value: JSON) -> Iterator[tuple[str, JSON]]:
    """Yields all values inside `value` with their full names, such as `uplink.cohort.size`.

    A list of plain values, such as [3, 3], counts as one value.
    """
    if isinstance(value, dict) and value:
        for key, item in value.items():
            full = f"{name}.{key}" if name else key
            yield from _leaves(full, item)
    elif isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        for index, item in enumerate(value):
            yield from _leaves(f"{name}[{index}]", item)
    else:
        yield name, value


def _text(leaves: Mapping[str, JSON], name: str) -> str:
    return repr(leaves[name]) if name in leaves else "nothing"


def _short(text: str) -> str:
    if len(text) <= MAX_VALUE_CHARS:
        return text
    return f"{text[: MAX_VALUE_CHARS - 3]}..."
