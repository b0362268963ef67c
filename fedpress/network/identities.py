"""Public identity keys of other clients: stored in the first run, compared in every later run.

In a secure sum (secure aggregation) clients verify each other by these keys. The server passes the
keys on, so a dishonest server could replace a client's key by its own, and then read messages that
other clients encrypt for that client. A client that has stored the true key notices this and
refuses the run. In the first run there is nothing to compare with (trust on first use), unless the
data owner has written the keys into the file before.
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
"""Name of the file in the client's folder."""


@dataclass(frozen=True)
class KnownIdentities:
    """The file `identities.toml` of a client: client name -> public identity key in hexadecimal.

    Attributes:
        path: path of the file. If there is no file yet, no key is known.
        own: name of this client. Its own key is not compared, because the client computes this key
            from its own secret.
    """

    path: Path
    own: ClientId

    def read(self) -> dict[ClientId, bytes]:
        """Returns the stored keys.

        Raises:
            NetworkError: if the file is damaged or cannot be read. To go on without it would be
                unsafe: a replaced key would not be noticed.
        """
        try:
            table = tomllib.loads(self.path.read_text("utf-8"))
            return {name: bytes.fromhex(key) for name, key in table.items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError) as error:
            raise NetworkError(
                f"it cannot be read ({error})",
                # The error is sent to the server, which need not know the file's folder.
                place=self.path.name,
                cure="restore the file from a copy, or write it anew with keys that you have "
                "compared with another client's file",
            ) from error

    def compare(self, identities: Mapping[ClientId, bytes]) -> Refusal | None:
        """Returns a refusal if a client's key differs from the stored key, else None.

        Args:
            identities: public keys of all clients of the run, as the server sent them.
        """
        known = self.read()
        for name, key in identities.items():
            # A client without a stored key passes: `note` stores its key after the check.
            if name != self.own and known.get(name, key) != key:
                return Refusal(
                    "identities",
                    f"the server names another identity key for client '{name}' than before; ask "
                    f"the owner of '{name}': if the key was made anew, remove its line from "
                    f"{self.path.name}, else the server is not honest",
                )
        return None

    def note(self, identities: Mapping[ClientId, bytes]) -> None:
        """Stores the keys of new clients; a stored key of another client is never replaced.

        Args:
            identities: public keys of all clients of the run, as the server sent them.

        Raises:
            NetworkError: if the file cannot be read or written.
        """
        known = self.read()
        merged = {**identities, **known}
        # This client's own key may change: its owner may have drawn a new secret.
        if self.own in identities:
            merged[self.own] = identities[self.own]
        if merged == known:
            return
        table = {name: merged[name].hex() for name in sorted(merged)}
        cure = "free some space; the server asks again"
        with writing(self.path, full=cure, other=cure), replacing(self.path) as part:
            part.write_text(tomli_w.dumps(table), "utf-8")
