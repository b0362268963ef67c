"""A client's sessions: the stages of runs that it takes part in, kept on disk.

A client that is killed and started again goes on by itself: the messages by which a session was set
up (offer, agreement, roster of a secure sum) lie in its folder, and are handled once more before
the next question is answered. Their answers are the same as the first time.
"""

from __future__ import annotations

import re
import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fedpress.core.examples import Arrays
from fedpress.core.files import replacing, writing
from fedpress.core.log import logger
from fedpress.core.names import ClientId
from fedpress.errors import FedpressError, WireError
from fedpress.federation import ClientState, DiskState, InMemoryState, device_steps
from fedpress.federation.client_state import load_json, save_json
from fedpress.federation.exchange import failure
from fedpress.network.gate import Asked, Gate, Refusal
from fedpress.network.identities import KnownIdentities
from fedpress.stages.federate.client import IDENTITY, ClientSide
from fedpress.stages.federate.contract import Contract
from fedpress.stages.federate.offer import Offer, code_named
from fedpress.wire.message import MAX_BYTES, Message, pack, unpack

log = logger(__name__)

NAME = re.compile(r"[0-9a-f]{16,64}")
SET_UP = ("offer", "agree", "roster")
"""Messages that are kept, in the order in which they are handled again."""
KEPT = 20
"""Sessions that are kept on disk: their counts of answered rounds must outlive a run."""
OPEN = 3
"""Sessions that are held in memory."""
Examples = Callable[[Offer], Arrays]


@dataclass(eq=False)
class Session:
    """One stage of a run.

    Attributes:
        asked: what the client takes part in.
        half: the client's side of the stage, which answers the server's messages.
        folder: None for a trial, of which nothing is kept.
        refusal: why the gate refused the whole run, once all clients were known; None if it did
            not.
    """

    asked: Asked
    half: ClientSide
    folder: Path | None
    refusal: Refusal | None = None


@dataclass(eq=False)
class Sessions:
    """All sessions of a client.

    Attributes:
        name: of the client.
        folder: where the sessions are kept.
        examples: loads the client's data as an offer needs them.
        gate: the owner's policy.
        identity: 32 secret bytes behind the keys of this client in secure sums.
        known: public keys of the other clients in earlier runs; None compares nothing.
        program: an exported training program (.pte) that takes the place of torch.
        device: where the client trains.
        max_bytes: longest message that is read.
        told: is called with a sentence when a message could not be answered.
    """

    name: ClientId
    folder: Path
    examples: Examples
    gate: Gate
    identity: bytes | None = None
    known: KnownIdentities | None = None
    program: Path | None = None
    device: torch.device | None = None
    max_bytes: int = MAX_BYTES
    told: Callable[[str], None] = log.warning

    def __post_init__(self) -> None:
        self.open_sessions: dict[str, Session] = {}

    def answer(self, name: str, request: bytes) -> bytes:
        """Answers the bytes of one message of the session `name`; never raises for a bad one."""
        try:
            return pack(self._answer(name, request))
        except _Refused as refused:
            return pack(refused.answer)
        # Whatever goes wrong is told to the server, as in a simulation, and the client stays.
        except Exception as problem:
            trace = None if isinstance(problem, FedpressError) else problem
            log.info("a message could not be answered", exc_info=trace)
            self.told(f"a message could not be answered: {problem}")
            return pack(failure(problem))

    def _answer(self, name: str, request: bytes) -> Message:
        if not NAME.fullmatch(name):
            raise WireError("not the name of a session", place="session", cure="update the server")
        message = unpack(request, max_bytes=self.max_bytes)
        if message.kind == "offer":
            return self._offered(name, message, request)
        session = self.open_sessions.get(name) or self._restored(name)
        if session is None:
            raise WireError(
                "nothing was offered to this client, or to another process with its key",
                place=message.kind,
                cure="see whether two processes run with the folder or key of this client",
            )
        return self._handled(session, message, request)

    def _offered(self, name: str, message: Message, request: bytes) -> Message:
        """Answers an offer: accepted or refused."""
        trial = message.header.get("trial") is True
        code = code_named(message)
        if code is not None and (refusal := self.gate.code_named(name, code)) is not None:
            return _told(refusal)
        offer = Offer.from_message(message)
        asked = Asked(name, self.name, offer)
        refusal = self.gate.offered(asked, trial=trial)
        if refusal is not None:
            return _told(refusal)
        # The data are read only after the gate has agreed: a server that is not allowed must not
        # even learn of an error in them.
        arrays = self.examples(offer)
        folder = None if trial else self.folder / name
        memory: ClientState = InMemoryState() if folder is None else DiskState(folder / "memory")
        if self.identity is not None:
            key = torch.frombuffer(bytearray(self.identity), dtype=torch.uint8)
            memory.save_entry(IDENTITY, {"bytes": key})
        asked = replace(asked, memory=_drawn_with(memory))
        half = ClientSide(self.name, arrays, offer.common(self.device), memory)
        if self.program is not None:
            # Imported here: most clients do not have ExecuTorch installed.
            from fedpress.deploy.device_model import DeviceModel

            half.model = DeviceModel(self.program)
            half.source = device_steps
        self._close_others()
        self.open_sessions[name] = Session(asked, half, folder)
        if folder is not None:
            self._tidy(name)
            _keep(folder, "offer", request)
        return Message("offered", {"terms": offer.fingerprint})

    def _handled(self, session: Session, message: Message, request: bytes) -> Message:
        half = session.half
        contract = half.contract
        later = message.kind not in ("register", "agree")
        # Every later answer repeats the reason, so that the server hears it where it waits.
        if later and session.refusal is not None:
            return session.refusal.to_message()
        if later and contract is not None:
            refusal = self.gate.called(session.asked, contract, message)
            if refusal is not None:
                return _told(refusal)
        answer = unpack(half.handle(request), max_bytes=self.max_bytes)
        if message.kind == "agree" and half.contract is not None:
            try:
                refusal = self._agreed(session, half.contract)
            except FedpressError:
                # The client's side has agreed already, but the gate failed to decide: no yes.
                half.withdraw()
                raise
            session.refusal = refusal
            if refusal is not None:
                half.withdraw()
                return _told(refusal)
        if session.folder is not None and message.kind in SET_UP:
            _keep(session.folder, message.kind, request)
        return self.gate.leaving(session.asked, answer)

    def _agreed(self, session: Session, contract: Contract) -> Refusal | None:
        """Asks whether the run is allowed, and whether all clients have the same keys as before."""
        trial = session.folder is None
        identities = contract.population.identities
        refusal = None
        if self.known is not None:
            refusal = self.known.compare(identities)
        if refusal is None:
            refusal = self.gate.agreed(session.asked, contract, trial=trial)
        if refusal is None and self.known is not None and not trial:
            self.known.note(identities)
        return refusal

    def _restored(self, name: str) -> Session | None:
        """Opens a session that an earlier process of this client has kept; None if there is none."""
        folder = self.folder / name
        offer = folder / "offer.message"
        if not offer.exists():
            return None
        log.info("session %s goes on", name)
        for kind in SET_UP:
            path = folder / f"{kind}.message"
            if not path.exists():
                break
            answer = self._answer(name, path.read_bytes())
            # The owner has changed the policy since the session was begun.
            if answer.kind == "refused":
                raise _Refused(answer)
        return self.open_sessions.get(name)

    def _close_others(self) -> None:
        """Frees memory: each session holds a model and data, and a client lives for many runs."""
        kept = {key: one for key, one in self.open_sessions.items() if one.folder is not None}
        # A session that is closed here is opened from disk if it is asked again.
        self.open_sessions = dict(list(kept.items())[-OPEN + 1 :])

    def _tidy(self, current: str) -> None:
        """Removes the oldest sessions beyond `KEPT`."""
        if not self.folder.is_dir():
            return
        others = [path for path in self.folder.iterdir() if path.is_dir() and path.name != current]
        others.sort(key=lambda path: path.stat().st_mtime)
        for path in others[: max(0, len(others) - KEPT + 1)]:
            shutil.rmtree(path, ignore_errors=True)


class _Refused(Exception):
    """Ends the restoring of a session that the policy does not allow any more.

    Attributes:
        answer: what the server is told.
    """

    def __init__(self, answer: Message) -> None:
        super().__init__(answer.kind)
        self.answer = answer


def _drawn_with(memory: ClientState) -> str:
    """Returns the random id of a session's memory; draws and stores it the first time."""
    stored = load_json(memory, "drawn")
    if not stored:
        stored = {"name": secrets.token_hex(16)}
        save_json(memory, "drawn", stored)
    return str(stored["name"])


def _told(refusal: Refusal) -> Message:
    log.warning("refused (%s): %s", refusal.rule, refusal.reason)
    return refusal.to_message()


def _keep(folder: Path, kind: str, request: bytes) -> None:
    path = folder / f"{kind}.message"
    cure = "free some space; the server asks again"
    with writing(path, full=cure, other=cure):
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            part.write_bytes(request)
