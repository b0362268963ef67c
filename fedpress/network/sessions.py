"""A client's sessions. A session is one stage of one run in which the client takes part.

The messages that set up a session are stored on disk: the offer (settings and model), the agreement
(all clients of the run), and the roster of a secure sum (public keys of the clients). If the client
is killed and started again, it handles these messages once more before it answers the next request.
The answers to them are the same as the first time, so the session continues where it was.
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
from fedpress.errors import DataError, FedpressError, WireError
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

# The server chooses a session's name, which becomes the name of a folder here. Hexadecimal digits
# cannot form a path that leads elsewhere.
NAME = re.compile(r"[0-9a-f]{16,64}")
QUOTED = re.compile(r"'([^']*)'")
SET_UP = ("offer", "agree", "roster")
"""Messages that are kept, in the order in which they are handled again."""
KEPT = 20
"""Number of sessions that are kept on disk. Their lists of answered rounds must outlive a run."""
OPEN = 3
"""Largest number of sessions that are held in memory."""
Examples = Callable[[Offer], Arrays]
"""Loads the client's data in the layout that the offered model needs."""


@dataclass(eq=False)
class Session:
    """One stage of one run, as this client sees it.

    Attributes:
        asked: session id, client name and offer, as the owner's policy judges them.
        half: the client's side of the stage, which answers the server's messages.
        folder: where the session is stored; None for a trial (a check before the run), of which
            nothing is stored.
        refusal: why the owner's policy refused the run after the agreement; None if it did not.
    """

    asked: Asked
    half: ClientSide
    folder: Path | None
    refusal: Refusal | None = None


@dataclass(eq=False)
class Sessions:
    """All sessions of a client; answers messages of any of them.

    Attributes:
        name: name of the client.
        folder: folder with one subfolder for each session.
        examples: loads the client's data in the layout that the offered model needs.
        gate: applies the owner's policy before each answer.
        identity: 32 secret bytes from which the client's keys in secure sums follow; None: each
            session has its own keys.
        known: public keys of other clients in earlier runs; None: they are not compared.
        program: an exported training program (.pte), run by ExecuTorch in place of torch; None:
            torch trains.
        device: where the client trains.
        max_bytes: longest message that is accepted or sent, in bytes.
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
        self._latest_refusal = ""

    def answer(self, name: str, request: bytes) -> bytes:
        """Answers one message of the session `name`.

        Args:
            name: id of the session.
            request: bytes of the message.

        Returns:
            Bytes of the answer. An error becomes an answer of kind "error", a refusal one of kind
            "refused"; a bad message raises nothing.
        """
        try:
            data = pack(self._answer(name, request))
            if len(data) > self.max_bytes:
                raise WireError(
                    f"the answer has {len(data)} bytes, more than the {self.max_bytes} allowed",
                    place="message.length",
                    cure="raise max_bytes",
                )
            return data
        except _Refused as refused:
            return pack(refused.answer)
        # The server is told about any error, as in a simulation, and the client keeps running.
        except Exception as problem:
            # An error of fedpress names place and cure; any other is a bug and needs its traceback.
            trace = None if isinstance(problem, FedpressError) else problem
            log.info("a message could not be answered", exc_info=trace)
            self.told(f"a message could not be answered: {problem}")
            return pack(failure(problem))

    def _answer(self, name: str, request: bytes) -> Message:
        """Answers one message; opens the session from disk if it is not in memory."""
        if not NAME.fullmatch(name):
            raise WireError("not the name of a session", place="session", cure="update the server")
        message = unpack(request, max_bytes=self.max_bytes)
        if message.kind == "offer":
            return self._offered(name, message, request)
        session = self.open_sessions.get(name) or self._restored(name)
        if session is None:
            raise WireError(
                "nothing was offered to this client, or another process with its key got the offer",
                place=message.kind,
                cure="see whether two processes run with the folder or key of this client",
            )
        return self._handled(session, message, request)

    def _refused(self, refusal: Refusal) -> Message:
        """Tells the owner of a refusal, and returns it as the answer to the server."""
        sentence = f"refused ({refusal.rule}): {refusal.reason}"
        # A run that goes on without this client asks it again in every round.
        if sentence != self._latest_refusal:
            self.told(sentence)
        self._latest_refusal = sentence
        return refusal.to_message()

    def _offered(self, name: str, message: Message, request: bytes) -> Message:
        """Answers an offer: "offered" if it is accepted, "refused" if not."""
        trial = message.header.get("trial") is True
        # Decided before the whole offer is read, because reading it calls the code that it names.
        for code in code_named(message):
            if (refusal := self.gate.code_named(name, code)) is not None:
                return self._refused(refusal)
        offer = Offer.from_message(message)
        asked = Asked(name, self.name, offer)
        refusal = self.gate.offered(asked, trial=trial)
        if refusal is not None:
            return self._refused(refusal)
        # The data are read only after the policy has accepted the offer: a server that is not
        # allowed must learn nothing, not even that the data have an error.
        try:
            arrays = self.examples(offer)
        except DataError as problem:
            self.told(f"the data do not fit the offer: {problem}")
            raise _Refused(_for_server(problem, offer)) from problem
        folder = None if trial else self.folder / name
        memory: ClientState = InMemoryState() if folder is None else DiskState(folder / "memory")
        if self.identity is not None:
            key = torch.frombuffer(bytearray(self.identity), dtype=torch.uint8)
            memory.save_entry(IDENTITY, {"bytes": key})
        # The gate needs `memory` in `asked`: the id of the stored state is part of a run's name.
        asked = replace(asked, memory=_drawn_with(memory))
        # Before this session's model is built, because each session holds a model.
        self._close_others()
        half = ClientSide(self.name, arrays, offer.common(self.device), memory)
        if self.program is not None:
            # Imported here: most clients do not have ExecuTorch installed.
            from fedpress.deploy.device_model import DeviceModel

            half.model = DeviceModel(self.program)
            half.source = device_steps
        # The tensors are in the model now. The gate reads only settings from here on.
        asked = replace(asked, offer=replace(offer, tensors={}))
        self.open_sessions[name] = Session(asked, half, folder)
        # Stored last: an offer that fails above must not be handled again after a restart.
        if folder is not None:
            self._tidy(name)
            _keep(folder, "offer", request)
        return Message("offered", {"terms": offer.fingerprint})

    def _handled(self, session: Session, message: Message, request: bytes) -> Message:
        """Answers a message of an open session, if the owner's policy allows it."""
        half = session.half
        contract = half.contract
        later = message.kind not in ("register", "agree")
        # After a refused agreement every later answer repeats the reason, because the server may
        # read only the answer that it waits for.
        if later and session.refusal is not None:
            return session.refusal.to_message()
        if later and contract is not None:
            refusal = self.gate.called(session.asked, contract, message)
            if refusal is not None:
                return self._refused(refusal)
        answer = half.answer(message)
        if message.kind == "agree" and half.contract is not None:
            try:
                refusal = self._agreed(session, half.contract)
            except FedpressError:
                # `half` has agreed already, but the gate could not decide: that is not a yes.
                half.withdraw()
                raise
            session.refusal = refusal
            if refusal is not None:
                half.withdraw()
                return self._refused(refusal)
        if session.folder is not None and message.kind in SET_UP:
            _keep(session.folder, message.kind, request)
        return self.gate.leaving(session.asked, answer)

    def _agreed(self, session: Session, contract: Contract) -> Refusal | None:
        """Decides about the whole run: returns why it is refused, or None.

        Two things are checked: the identity keys of the other clients, and the owner's policy.
        """
        trial = session.folder is None
        identities = contract.population.identities
        refusal = None
        if self.known is not None:
            refusal = self.known.compare(identities)
        if refusal is None:
            refusal = self.gate.agreed(session.asked, contract, trial=trial)
        # Keys are stored only for a real run that is allowed: the first key seen is trusted.
        if refusal is None and self.known is not None and not trial:
            self.known.note(identities)
        return refusal

    def _restored(self, name: str) -> Session | None:
        """Opens a stored session: of an earlier process, or one that was dropped from memory.

        Returns None if no such session is stored.
        """
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
            # The message was accepted once. Since then the policy was changed, or other runs have
            # spent the budget.
            if answer.kind == "refused":
                raise _Refused(answer)
        return self.open_sessions.get(name)

    def _close_others(self) -> None:
        """Drops trials and the oldest sessions from memory; there each holds a model and data."""
        kept = {key: one for key, one in self.open_sessions.items() if one.folder is not None}
        # One fewer than `OPEN`, since the caller adds a session. A dropped session is opened from
        # disk when its next message comes.
        self.open_sessions = dict(list(kept.items())[-OPEN + 1 :])

    def _tidy(self, current: str) -> None:
        """Deletes the oldest session folders, so that `KEPT` remain with the current one."""
        if not self.folder.is_dir():
            return
        others = [path for path in self.folder.iterdir() if path.is_dir() and path.name != current]
        others.sort(key=lambda path: path.stat().st_mtime)
        for path in others[: max(0, len(others) - KEPT + 1)]:
            shutil.rmtree(path, ignore_errors=True)


class _Refused(Exception):
    """Raised if this client cannot take part.

    Either a stored session is opened again and the gate no longer allows it, or the data do not fit
    the offer.

    Attributes:
        answer: the refusal or error, which is sent to the server.
    """

    def __init__(self, answer: Message) -> None:
        super().__init__(answer.kind)
        self.answer = answer


def _for_server(problem: DataError, offer: Offer) -> Message:
    """Returns the error about this client's data that the server may read.

    It has no path, nothing in parentheses at its end, where other columns may be named, and nothing
    in quotes but names that the server has sent: a quoted word may be a value of a private row.
    """
    columns = [column["name"] for column in (offer.inputs or {}).get("columns", ())]
    known = {*columns, *offer.labels, *map(str, offer.task.names)}

    def shown(quoted: re.Match[str]) -> str:
        return quoted[0] if quoted[1] in known else "'...'"

    # The place of a file is quoted; others, such as "label column 'y'", are known to the server.
    place = "" if problem.place.startswith("'") else QUOTED.sub(shown, problem.place)
    said = re.sub(r" \(.*\)$", "", problem.problem, flags=re.DOTALL)
    parts = [problem.cure] if isinstance(problem.cure, str) else problem.cure
    cure = [QUOTED.sub(shown, part) if isinstance(part, str) else part for part in parts]
    return failure(DataError(QUOTED.sub(shown, said), place=place, cure=cure))


def _drawn_with(memory: ClientState) -> str:
    """Returns the random id of a session's stored state; draws and stores it the first time."""
    stored = load_json(memory, "drawn")
    if not stored:
        stored = {"name": secrets.token_hex(16)}
        save_json(memory, "drawn", stored)
    return str(stored["name"])


def _keep(folder: Path, kind: str, request: bytes) -> None:
    """Stores a message that set the session up, to be handled again after a restart."""
    path = folder / f"{kind}.message"
    cure = "free some space; the server asks again"
    with writing(path, full=cure, other=cure):
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            part.write_bytes(request)
