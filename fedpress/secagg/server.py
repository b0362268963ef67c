"""The server of a secure sum: passes on the clients' public keys, then starts a sum each round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedpress.errors import RecipeError, SecureError, WireError
from fedpress.secagg.keys import SIGNATURE
from fedpress.secagg.message import SecAggMessage, read_bytes
from fedpress.secagg.plan import SecurePlan
from fedpress.secagg.public import PublicRound, Roster, SecAggSetup
from fedpress.secagg.round import SecureRound


class SecAggServer:
    """The server of one run: collects the clients' keys, then starts a sum for every round.

    Call `join` with each client's first message. Then send `roster` (the list of all keys) to all
    clients, call `accepted` with each answer, and call `open` for every round.

    Args:
        plan: the settings on which server and clients agree.
        identities: client name -> public key by which its signatures are verified.
        run: name of the run.
    """

    def __init__(self, plan: SecurePlan, identities: Mapping[str, bytes], run: str) -> None:
        self._setup = SecAggSetup(plan, dict(identities), run)
        self._joined: dict[str, tuple[bytes, bytes]] = {}
        self._roster: Roster | None = None
        self._accepted: set[str] = set()

    def join(self, name: str, message: SecAggMessage) -> None:
        """Stores a client's public key.

        Args:
            name: name of the client.
            message: result of `SecAggClient.join`.

        Raises:
            WireError: if the client did not sign the key, if it has joined before or has the key of
                another client, or if the roster was made already.
        """
        key = read_bytes(message, "key", (32,), "join").tobytes()
        signature = read_bytes(message, "signature", (SIGNATURE,), "join").tobytes()
        # The roster must not change after it was sent to the first client.
        if self._roster is not None or name in self._joined:
            raise WireError(
                f"{name!r} joined twice or after the roster was made",
                place="join",
                cure="join once, before the roster is made",
            )
        if not self._setup.signed(name, signature, "join", name, key):
            raise WireError(
                f"not signed by {name!r} for this run and plan",
                place="join.signature",
                cure="use the same settings as the server",
            )
        # A client with a copy of another client's key would share that client's masks.
        if any(key == other for other, _ in self._joined.values()):
            raise WireError(
                f"{name!r} has the key of another client",
                place="join.key",
                cure="send the key of this client",
            )
        self._joined[name] = key, signature

    def roster(self) -> SecAggMessage:
        """Returns the keys of all clients as a message to all clients. No client can join later.

        The keys are sorted by name, so that the order of joining does not matter.

        Raises:
            SecureError: if fewer clients joined than a round needs.
        """
        if self._roster is None:
            if len(self._joined) < self._setup.plan.cohort:
                raise SecureError(
                    f"{len(self._joined)} clients joined, a round needs {self._setup.plan.cohort}",
                    place="join",
                    cure="wait for more clients",
                )
            names = tuple(sorted(self._joined))
            keys, signatures = zip(*(self._joined[name] for name in names), strict=True)
            self._roster = Roster(names, keys, signatures)
        return self._roster.to_message()

    def load_roster_(self, roster: SecAggMessage) -> None:
        """Restores a roster that was made before the server was stopped.

        Raises:
            WireError: if the roster is faulty.
        """
        self._roster = Roster.from_message(roster, self._setup)

    def accepted(self, name: str, message: SecAggMessage) -> None:
        """Stores that a client has checked and accepted the roster.

        Args:
            name: name of the client.
            message: result of `SecAggClient.accept`.

        Raises:
            WireError: if the client is not in the roster, or did not sign its digest.
        """
        signature = read_bytes(message, "signature", (SIGNATURE,), "accept").tobytes()
        if self._roster is None or name not in self._roster.names:
            raise WireError(f"{name!r} is not in the roster", place="accept", cure="join first")
        if not self._setup.signed(name, signature, "accept", name, self._roster.digest):
            raise WireError(
                f"{name!r} did not sign this roster",
                place="accept.signature",
                cure="send the same roster to all clients",
            )
        self._accepted.add(name)

    def open(self, round: int, cohort: Sequence[str], size: int) -> SecureRound:
        """Starts the sum of one round.

        Args:
            round: number of the round.
            cohort: names of the clients of this round.
            size: number of values in each vector.

        Returns:
            The server's side of the round.

        Raises:
            RecipeError: if there is no roster yet, `size` is below 1, a client in the cohort did
                not accept the roster, or the cohort does not have the planned size.
        """
        if self._roster is None:
            raise RecipeError(
                "there is no roster yet",
                place="roster",
                cure="call `roster`, and `accepted` with the answer of each client",
            )
        if size < 1:
            raise RecipeError(f"got {size}, expected a whole number above 0", place="size")
        # A client that did not confirm this roster may have another one, with other keys.
        strangers = set(cohort).difference(self._accepted)
        if strangers:
            raise RecipeError(
                f"{min(strangers)!r} did not accept the roster",
                place="cohort",
                cure="choose only clients that accepted it",
            )
        try:
            public = PublicRound.of(self._setup, self._roster, round, cohort, size)
        except WireError as error:
            # The cohort is the caller's argument here, not a field of a message.
            place = error.place.removeprefix("round.")
            raise RecipeError(error.problem, place=place, cure=error.cure) from error
        return SecureRound(self._setup, public)
