"""What everybody knows about the clients of a run: names, numbers of examples and signing keys."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

from fedpress.core.names import ClientId
from fedpress.errors import DataError

CURE = "take what the server of this run sent"
"""What an error about unreadable text suggests."""


@dataclass(frozen=True)
class Population:
    """All clients of a run, and the public facts about them.

    Attributes:
        names: names of all clients, in an order that never changes.
        examples: number of examples of each client; None if the unit of privacy is a client:
            then the number is private.
        identities: public signing key of each client (Ed25519, 32 bytes); empty if the run has
            no secure sum of updates, which needs these keys.

    Raises:
        DataError: if a name occurs twice, or numbers or keys do not belong to the named clients.

    >>> Population(("a", "b"), {"a": 3, "b": 5}).total
    8
    """

    names: tuple[ClientId, ...]
    examples: Mapping[ClientId, int] | None = None
    identities: Mapping[ClientId, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.names or len(set(self.names)) != len(self.names):
            raise DataError(
                "expected at least one client, and a different name for each",
                place="population.names",
                cure="list each client once",
            )
        for what, table in (("examples", self.examples), ("identities", self.identities)):
            if table and table.keys() != set(self.names):
                raise DataError(
                    f"expected one entry for each of the {len(self.names)} clients",
                    place=f"population.{what}",
                    cure="give one entry for each client, or none at all",
                )
        for name, count in (self.examples or {}).items():
            # A client without examples cannot take part, and no noise can be planned for it.
            if count < 1:
                raise DataError(
                    f"got {count}",
                    place=f"population.examples.{name}",
                    cure="leave this client out",
                )

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    @cached_property
    def _names(self) -> frozenset[ClientId]:
        return frozenset(self.names)

    @property
    def total(self) -> int:
        """Number of examples of all clients together.

        Raises:
            DataError: if these numbers are private.
        """
        return sum(self.counts.values())

    @property
    def counts(self) -> Mapping[ClientId, int]:
        """Number of examples of each client.

        Raises:
            DataError: if these numbers are private.
        """
        if self.examples is None:
            raise DataError(
                "clients are protected here, so their numbers of examples are secret",
                place="population.examples",
                cure="use settings that do not need these numbers",
            )
        return self.examples

    def to_json(self) -> str:
        """Returns the population as one line of JSON."""
        return self._text

    @cached_property
    def _text(self) -> str:
        counts = None
        if self.examples is not None:
            counts = [self.examples[name] for name in self.names]
        keys = []
        if self.identities:
            keys = [self.identities[name].hex() for name in self.names]
        # Lists in the order of the names: the same population always gives the same text.
        table = {"names": list(self.names), "examples": counts, "identities": keys}
        return json.dumps(table, separators=(",", ":"))

    @classmethod
    @lru_cache(maxsize=2)
    def from_json(cls, text: str) -> Population:
        """Reads the text of `to_json`. The text is checked, because it comes over the network.

        All simulated clients of a run are sent the same text, so the last ones are kept.

        Raises:
            DataError: if the text is not valid.
        """
        try:
            table: dict[str, Any] = json.loads(text)
            names, counts, keys = table["names"], table["examples"], table["identities"]
            # `type` instead of isinstance, because isinstance takes `True` for an int.
            if not all(type(name) is str for name in names):
                raise TypeError("names")
            if counts is not None and not all(type(count) is int for count in counts):
                raise TypeError("examples")
            examples = None
            if counts is not None:
                examples = dict(zip(names, counts, strict=True))
            identities: dict[ClientId, bytes] = {}
            if keys:
                identities = dict(zip(names, map(bytes.fromhex, keys), strict=True))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise DataError(
                f"not a table of clients ({type(error).__name__}: {error})",
                place="population",
                cure=CURE,
            ) from error
        return cls(tuple(names), examples, identities)
