"""How one update travels home: chain, sum, noise and division, all bound and checked before the run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedpress import seeds
from fedpress.errors import RecipeError, WireError
from fedpress.federate.adders import Adder, PlainSum, Sent
from fedpress.federate.exchange import ClientId
from fedpress.federate.sampling import Cohort
from fedpress.federate.transforms import Bound, Chain, Clip, Key, Transform, bind_chain, decode_chain, encode_chain
from fedpress.privacy.mechanism import noise_sum
from fedpress.privacy.plan import PrivacyPlan
from fedpress.wire.message import JSON, Message

METRICS = ("loss", "steps")
MAX_EXAMPLES = 1 << 40


@dataclass(frozen=True, eq=False)
class Mean:
    """What a round learned: the mean update [d] float32 (None if nothing usable came), a row per client, refusals."""

    update: Tensor | None
    rows: list[dict[str, JSON]]
    refused: dict[ClientId, str]


@dataclass(frozen=True)
class Uplink:
    """The agreed way of an update from client to mean; make it with `Uplink.bind`, on both sides alike.

    Attributes:
        promise: what holds for every decoded update in the sum; its `l2` is the sensitivity of the sum.
        cohort: the public plan of who takes part.
        chain: transforms, bound to each other.
        adder: how the updates are summed.
        privacy: the plan, or None. Unit "client" acts here; unit "sample" acts in the client, and here only hides
            what is not noised.
        weights: "examples" weighs each client by its number of examples, "equal" by one.
    """

    promise: Bound
    cohort: Cohort
    chain: tuple[Transform, ...]
    adder: Adder
    privacy: PrivacyPlan | None
    weights: Literal["examples", "equal"]

    @classmethod
    def bind(
        cls,
        size: int,
        cohort: Cohort,
        *,
        chain: Chain = (),
        adder: Adder | None = None,
        privacy: PrivacyPlan | None = None,
        weights: Literal["examples", "equal"] = "examples",
    ) -> Uplink:
        """Fits all parts to updates of `size` values.

        Raises:
            RecipeError: if the parts do not fit together, or a privacy promise could not be kept.
        """
        if weights not in ("examples", "equal"):
            raise RecipeError(f"federate.weights: got {weights!r}, expected 'examples' or 'equal'")
        adder = adder or PlainSum()
        promise = Bound(size)
        if privacy is not None and privacy.unit == "client":
            _check_client_unit(privacy, cohort, weights)
            chain = (Clip(clip_norm=privacy.clip_norm), *chain)
            promise = Bound(size, l2=privacy.clip_norm, linf=privacy.clip_norm)
        bound_chain, end = bind_chain(chain, Bound(size))
        adder.check(bound_chain, end)
        return cls(promise, cohort, bound_chain, adder, privacy, weights)

    @property
    def client_unit(self) -> bool:
        """Whether whole clients are protected, so that the sum is noised and divided by the fixed cohort."""
        return self.privacy is not None and self.privacy.unit == "client"

    def encode(self, update: Tensor, key: Key) -> dict[str, Tensor]:
        """Returns the tensors that carry `update` [d] to the server."""
        return encode_chain(self.chain, update, key)

    def decode(self, sent: Sent) -> Tensor:
        """Returns the update [d] float32 in `sent`, which may come from anybody.

        Raises:
            WireError: if it is not an update of the agreed size, or not finite.
        """
        update = decode_chain(self.chain, sent.tensors, sent.key)
        if update.dtype != torch.float32 or update.shape != (self.promise.size,):
            got = f"{update.dtype} {list(update.shape)}"
            raise WireError(
                f"update: got {got}, expected torch.float32 [{self.promise.size}]; send client minus server"
            )
        if not bool(torch.isfinite(update).all()):
            raise WireError("update: it holds NaN or infinity; lower the client's learning rate")
        return update

    def metrics(self, measured: Mapping[str, JSON]) -> dict[str, JSON]:
        """Returns the part of `measured` that may leave a client: under privacy only the number of planned steps."""
        allowed = METRICS if self.privacy is None else ("steps",) if self.privacy.unit == "sample" else ()
        return {name: measured[name] for name in allowed if name in measured}

    def mean(self, replies: Iterable[tuple[ClientId, Message | None]], *, seed: int, round: int) -> Mean:
        """Sums the `replies`, given in client order, adds the noise of unit "client", and divides.

        Under unit "client" the divisor is the public cohort size, never the number of replies, and noise is added even
        if nothing came: who replied is as private as what was sent.
        """
        refused: dict[ClientId, str] = {}
        total = self.adder.add(self._sent(replies, refused, seed, round), self.decode, self.promise)
        refused |= total.refused
        if self.privacy is not None and self.client_unit:
            # Noise is a function of the secret seed and of what it hides. Other sums, or the same one under another
            # plan, get independent noise, so that two runs of one seed cannot be subtracted; equal ones get an equal
            # answer, which says nothing new. To whom the seed is unknown each noise looks freshly drawn.
            hidden = seeds.fingerprint(total.sum, self.privacy)
            noised = noise_sum(total.sum, self.privacy, seeds.secret_generator(seed, "noise", round, hidden))
            return Mean((noised / self.cohort.size).float(), [], refused)
        update = (total.sum / total.weight).float() if total.weight > 0 else None
        return Mean(update, total.rows, refused)

    def _sent(
        self,
        replies: Iterable[tuple[ClientId, Message | None]],
        refused: dict[ClientId, str],
        seed: int,
        round: int,
    ) -> Iterator[Sent]:
        """Yields what passes the checks of its header and notes the rest in `refused`."""
        for client, reply in replies:
            try:
                yield self._open(reply, Key(seed, round, client))
            except WireError as problem:
                refused[client] = str(problem)

    def _open(self, reply: Message | None, key: Key) -> Sent:
        if reply is None:
            raise WireError("no reply came; see whether the client is still running")
        if reply.kind == "error":
            raise WireError(str(reply.header.get("reason", "the client failed and gave no reason"))[:500])
        if reply.kind != "update":
            raise WireError(f"update.kind: got {reply.kind!r}, expected 'update'; answer the request that was sent")
        if reply.header.get("round") != key.round:
            raise WireError(
                f"update.round: got {reply.header.get('round')!r}, expected {key.round}; answer the last request"
            )
        if self.client_unit:
            return Sent(key, reply.tensors, 1.0, {})
        examples = reply.header.get("examples")
        if not isinstance(examples, int) or isinstance(examples, bool) or not 0 < examples <= MAX_EXAMPLES:
            raise WireError(f"update.examples: got {examples!r}, expected a whole number from 1 to {MAX_EXAMPLES}")
        measured = {name: value for name, value in reply.header.items() if isinstance(value, int | float)}
        row = {"client": key.client, "examples": examples, **self.metrics(measured)}
        return Sent(key, reply.tensors, float(examples) if self.weights == "examples" else 1.0, row)


def _check_client_unit(privacy: PrivacyPlan, cohort: Cohort, weights: str) -> None:
    if weights != "equal":
        raise RecipeError(
            "federate.weights: got 'examples' under client privacy, where a large client would exceed the sensitivity;"
            ' set weights = "equal"'
        )
    if not 0 < privacy.clip_norm < float("inf"):
        raise RecipeError(f"federate.privacy.clip_norm: got {privacy.clip_norm}, expected a finite bound above 0")
    if privacy.sampling_prob != cohort.sampling_prob:
        raise RecipeError(
            f"federate.privacy.sampling_prob: the plan charges {privacy.sampling_prob} but a {cohort.sampling} cohort"
            f" of {cohort.size} in {cohort.population} is worth {cohort.sampling_prob}; plan with cohort.sampling_prob"
        )
    if privacy.steps_per_round != 1:
        raise RecipeError(f"federate.privacy.steps_per_round: got {privacy.steps_per_round}; client privacy takes 1")
