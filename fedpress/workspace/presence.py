"""The file `presence.json` of a deployed run: who is online, who is late, who refused and why.

The server writes it while it runs, and `fedpress watch` reads it. Nothing else depends on it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fedpress.core import files

NAME = "presence.json"
MOST_NAMED = 200
"""Clients that the file names, so that it stays small: those in trouble come first."""
MOST_LETTERS = 300
"""Longest text of a client that the file takes over."""


@dataclass(frozen=True)
class ClientNow:
    """One client, as the server sees it; times are seconds since 1970.

    Attributes:
        name: name of the client.
        online: whether it is connected.
        heard: when its last answer came; None: not yet.
        asked: when it was asked what it has not answered yet; None: nothing is open.
        awaited: whether the server still waits for that answer.
        seconds: that its last answer took; None: there was none.
    """

    name: str
    online: bool
    heard: float | None = None
    asked: float | None = None
    awaited: bool = False
    seconds: float | None = None


@dataclass(frozen=True)
class RefusedNow:
    """A client that has refused to take part.

    Attributes:
        name: name of the client; "" if it must not be named.
        rule: rule of its policy.
        reason: for people.
    """

    name: str
    rule: str
    reason: str


@dataclass(frozen=True)
class PresenceNow:
    """All clients of a run at one moment.

    Attributes:
        at: seconds since 1970.
        known: how many clients the server knows.
        online: how many of them are connected.
        hidden: whether nobody may learn which clients take part in a round. Then clients are
            only counted.
        clients: at most `MOST_NAMED`; none if `hidden`.
        refused: without names if `hidden`.
    """

    at: float
    known: int
    online: int
    hidden: bool = True
    clients: tuple[ClientNow, ...] = ()
    refused: tuple[RefusedNow, ...] = ()

    def write(self, folder: Path) -> None:
        """Writes the file atomically.

        Raises:
            OSError: if it cannot be written.
        """
        # Not durable: after a power failure nobody is online.
        with files.replacing(folder / NAME, durable=False) as part:
            part.write_text(json.dumps(asdict(self.shown())), "utf-8")

    def shown(self) -> PresenceNow:
        """Returns what the file may hold.

        If the cohort is hidden, this is nothing that differs from one client to another: who was
        asked, or heard last, would tell who was drawn.
        """
        if self.hidden:
            unnamed = sorted((replace(one, name="") for one in self.refused), key=_rule)
            return replace(self, clients=(), refused=tuple(unnamed[:MOST_NAMED]))
        named = sorted(self.clients, key=_trouble)
        return replace(self, clients=tuple(named[:MOST_NAMED]), refused=self.refused[:MOST_NAMED])


def _rule(one: RefusedNow) -> tuple[str, str]:
    return one.rule, one.reason


def _trouble(one: ClientNow) -> tuple[bool, float, str]:
    """Returns a key that is smallest for a client that is offline, then for the longest asked."""
    return one.online, one.asked or float("inf"), one.name


def read_presence(folder: Path) -> PresenceNow | None:
    """Reads the file; None if it is missing or damaged."""
    try:
        page: Any = json.loads((folder / NAME).read_text("utf-8"))
        clients = [ClientNow(**one) for one in page.pop("clients")]
        refused = [RefusedNow(**one) for one in page.pop("refused")]
        found = PresenceNow(**page, clients=tuple(clients), refused=tuple(refused))
        # As for the writer: a file that says "hidden" and has names must not be shown.
        return found.shown()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
