"""The file `presence.json` of a deployed run: which clients are online, late or have refused.

The server writes the file while it runs. `fedpress watch`, which shows the run in a browser, reads
it. Nothing else depends on it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fedpress.core import files

NAME = "presence.json"
MOST_NAMED = 200
"""Largest number of clients in the file, so that it stays small. Clients that are offline or late
come first."""
MOST_LETTERS = 300
"""Number of letters after which a text that a client has sent is cut off."""


@dataclass(frozen=True)
class ClientNow:
    """The state of one client, as the server knows it; times are seconds since 1970.

    Attributes:
        name: name of the client.
        online: whether the client is connected.
        heard: time of the client's last answer; None: the client has not answered yet.
        asked: time of the request that the client has not answered yet; None: it has answered all
            requests.
        awaited: whether the server still waits for the answer to that request.
        seconds: how long the client's last answer took; None: the client has not answered yet.
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
        name: name of the client; "" if the file must not name clients.
        rule: name of the rule that the run breaks; the client's policy consists of rules.
        reason: explanation in words.
    """

    name: str
    rule: str
    reason: str


@dataclass(frozen=True)
class PresenceNow:
    """The states of all clients of a run at one time: the content of the file.

    Attributes:
        at: the time, in seconds since 1970.
        known: number of clients that the server knows.
        online: number of clients that are connected.
        hidden: whether it is secret which clients take part in a round. Then clients are counted,
            but not named.
        clients: states of at most `MOST_NAMED` clients; empty in the file if `hidden`.
        refused: clients that have refused to take part; without names in the file if `hidden`.
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
            OSError: if the file cannot be written.
        """
        # Not synced to the disk, which would be slow. A power failure may lose the file, but after
        # it no client is online anyway.
        with files.replacing(folder / NAME, durable=False) as part:
            part.write_text(json.dumps(asdict(self.shown())), "utf-8")

    def shown(self) -> PresenceNow:
        """Returns a copy with only the facts that may be written to the file.

        If `hidden`, it has no facts about single clients. The times of requests and answers, for
        example, would show which clients were drawn for a round.
        """
        if self.hidden:
            # Sorted, because the order in which clients refused could tell which clients they are.
            unnamed = sorted((replace(one, name="") for one in self.refused), key=_rule)
            return replace(self, clients=(), refused=tuple(unnamed[:MOST_NAMED]))
        named = sorted(self.clients, key=_trouble)
        return replace(self, clients=tuple(named[:MOST_NAMED]), refused=self.refused[:MOST_NAMED])


def _rule(one: RefusedNow) -> tuple[str, str]:
    return one.rule, one.reason


def _trouble(one: ClientNow) -> tuple[bool, float, str]:
    """Returns a sorting key: clients that are offline first, then those asked longest ago."""
    return one.online, one.asked or float("inf"), one.name


def read_presence(folder: Path) -> PresenceNow | None:
    """Reads the file; None if it is missing or damaged."""
    try:
        page: Any = json.loads((folder / NAME).read_text("utf-8"))
        clients = [ClientNow(**one) for one in page.pop("clients")]
        refused = [RefusedNow(**one) for one in page.pop("refused")]
        found = PresenceNow(**page, clients=tuple(clients), refused=tuple(refused))
        # The file may have been edited: names in a file that says "hidden" must not be shown.
        return found.shown()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
