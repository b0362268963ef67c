"""Identity keys of other clients: noted the first time, and compared in every later run.

In a secure sum clients verify each other by these keys, which reach them through the server. A
server that exchanges a key could read what was meant for that client; a client that has noted the
key refuses. The first time nothing can be compared (trust on first use), unless the owner has
filled the file before.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import tomli_w

from fedpress.core.files import replacing, writing
from fedpress.core.names import ClientId
from fedpress.errors import NetworkError
from fedpress.network.gate import Refusal

FILE = "identities.toml"


@dataclass(frozen=True)
class KnownIdentities:
    """The file `identities.toml` of a client: name -> public identity key in hexadecimal.

    Attributes:
        path: the file; it need not exist.
        own: name of this client. Its key is not looked up, because it follows from its own secret.
    """

    path: Path
    own: ClientId

    def read(self) -> dict[ClientId, bytes]:
        """Returns the keys that are known.

        Raises:
            NetworkError: if the file is damaged: without it an exchanged key would not be noticed.
        """
        try:
            table = tomllib.loads(self.path.read_text("utf-8"))
            return {name: bytes.fromhex(key) for name, key in table.items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError) as error:
            raise NetworkError(
                f"it cannot be read ({error})",
                # The server reads this sentence, and need not know where the file lies.
                place=self.path.name,
                cure="bring the file back from a copy, or compare the keys with another client's",
            ) from error

    def compare(self, identities: Mapping[ClientId, bytes]) -> Refusal | None:
        """Returns a refusal if a known client has another key than before, else None."""
        known = self.read()
        for name, key in identities.items():
            if name != self.own and known.get(name, key) != key:
                return Refusal(
                    "identities",
                    f"the server names another identity key for client '{name}' than before; ask "
                    f"the owner of '{name}': if the key was made anew, remove its line from "
                    f"{self.path.name}, else the server is not honest",
                )
        return None

    def note(self, identities: Mapping[ClientId, bytes]) -> None:
        """Adds the keys of clients that are new.

        Raises:
            NetworkError: if the file cannot be read or written.
        """
        known = self.read()
        merged = {**identities, **known}
        if self.own in identities:
            merged[self.own] = identities[self.own]
        if merged == known:
            return
        table = {name: merged[name].hex() for name in sorted(merged)}
        cure = "free some space; the server asks again"
        with writing(self.path, full=cure, other=cure), replacing(self.path) as part:
            part.write_text(tomli_w.dumps(table), "utf-8")
