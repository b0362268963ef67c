"""How one update travels home: chain, sum, noise and division, all bound and checked before the run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Literal

import torch
from torch import Tensor

from fedpress.codecs import (
    Bound,
    Chain,
    Clip,
    Key,
    Noise,
    Settings,
    bind_chain,
    check_float,
    decode_chain,
    encode_chain,
)
from fedpress.core import random
from fedpress.core.names import ClientId
from fedpress.errors import RecipeError, SecureError, WireError
from fedpress.federation.aggregators.mean import Adder, PlainSum, Sent, Session, Total
from fedpress.federation.failures import Tally
from fedpress.federation.protocol import check_header, need
from fedpress.federation.sampling import Cohort
from fedpress.federation.servernoise import ServerNoise
from fedpress.privacy.adaptive import AdaptiveClip, share_below
from fedpress.privacy.noise.mechanism import noise_sum
from fedpress.privacy.plan import PrivacyPlan
from fedpress.wire.message import JSON, Message

Trust = Literal["local", "secure", "central"]
METRICS = ("loss", "steps")
SERVER = "server"


@dataclass(frozen=True, eq=False)
class Mean:
    """What a round learned: the mean update [d] float32 (None if nothing usable came), a row per client, refusals.

    `state` is what the next round's noise and clip norm need. `failures` counts, with noise, the protected units that
    gave nothing; None without privacy.
    """

    update: Tensor | None
    rows: list[dict[str, JSON]]
    refused: dict[ClientId, str]
    state: dict[str, Tensor] = field(default_factory=dict)
    failures: Tally | None = None


@dataclass(eq=False)
class _Heard:
    """What the headers of a round's replies said, besides what goes into the sum."""

    refused: dict[ClientId, str] = field(default_factory=dict)
    below: list[bool] = field(default_factory=list)
    failures: dict[ClientId, Tally] = field(default_factory=dict)


@dataclass(frozen=True)
class Uplink:
    """The agreed way of an update from client to mean; make it with `Uplink.bind`, on both sides alike.

    Attributes:
        promise: what holds for every decoded update in the sum; under unit "client" its `l2` is the sensitivity.
        cohort: the public plan of who takes part.
        chain: transforms, bound to each other.
        codecs: the settings from which the chain was bound, for the agreement.
        adder: how the updates are summed.
        privacy: the plan, or None.
        trust: who adds the noise of the plan: "central" the server, to the sum; "secure" the clients together, so
            that it has its full size in the secure sum only; "local" each client alone.
        weights: "examples" weighs each client by its number of examples, "equal" by one.
        divisor: public number by which a private sum is divided, whoever replied.
        noise: what the server adds, with trust "central".
        adaptive: how the clip norm follows the updates; it then travels with each request, and updates are sent in
            units of it.
    """

    promise: Bound
    cohort: Cohort
    chain: Chain
    adder: Adder
    privacy: PrivacyPlan | None
    trust: Trust
    weights: Literal["examples", "equal"]
    divisor: float
    noise: ServerNoise | None = None
    adaptive: AdaptiveClip | None = None
    codecs: tuple[Settings, ...] = ()

    def agreed(self) -> dict[str, object]:
        """Returns all fields but the bound transforms, which follow from `codecs`."""
        return {one.name: getattr(self, one.name) for one in fields(self) if one.name != "chain"}

    @classmethod
    def bind(
        cls,
        size: int,
        cohort: Cohort,
        *,
        chain: Sequence[Settings] = (),
        shapes: tuple[tuple[int, ...], ...] = (),
        adder: Adder | None = None,
        privacy: PrivacyPlan | None = None,
        trust: Trust | None = None,
        weights: Literal["examples", "equal"] = "examples",
        divisor: float | None = None,
        noise: ServerNoise | None = None,
        adaptive: AdaptiveClip | None = None,
    ) -> Uplink:
        """Fits all parts to updates of `size` values.

        Raises:
            RecipeError: if the parts do not fit together, or a privacy promise could not be kept.
        """
        if weights not in ("examples", "equal"):
            raise RecipeError(f"federate.weights: got {weights!r}, expected 'examples' or 'equal'")
        adder, start = adder or PlainSum(), Bound(size, shapes=shapes)
        promise = start
        if privacy is None:
            trust = "central"
        elif privacy.unit == "client":
            trust = trust or "central"
            _check_client_unit(privacy, cohort, weights)
            own = (Noise(std=privacy.noise_std),) if trust == "local" and privacy.noise_std else ()
            chain = (Clip(clip_norm=privacy.clip_norm), *own, *chain)
            promise = Bound(size, l2=privacy.clip_norm, linf=privacy.clip_norm)
        else:
            trust = trust or "local"
        bound_chain, end = bind_chain(chain, start)
        if trust == "local" and privacy is not None and privacy.unit == "client":
            promise = start  # the noise is in the update: a second clip would shorten it
        if weights == "examples" and not isinstance(adder, PlainSum):
            raise RecipeError(
                "federate.weights: got 'examples', but in a secure sum the server cannot see how many examples stand "
                'behind an update; set weights = "equal"'
            )
        adder.check(
            {one.kind: bound_one for one, bound_one in zip(chain, bound_chain, strict=True)}, end
        )
        if adaptive is not None and adaptive.count_noise is None:
            raise RecipeError(
                "privacy.adaptive.count_noise: not planned; give it, or bind with a planned one"
            )
        if privacy is not None and trust == "central":
            noise = noise or ServerNoise(privacy)
        return cls(
            promise,
            cohort,
            bound_chain,
            adder,
            privacy,
            trust,
            weights,
            divisor or cohort.size,
            noise,
            adaptive,
            tuple(chain),
        )

    @property
    def client_unit(self) -> bool:
        """Whether whole clients are protected, so that the sum is divided by the fixed cohort."""
        return self.privacy is not None and self.privacy.unit == "client"

    @property
    def joint(self) -> bool:
        """Whether clients send sums of clipped gradients that only together carry enough noise for their examples."""
        return self.privacy is not None and self.privacy.unit == "sample" and self.trust != "local"

    def encode(self, update: Tensor, key: Key, *, unit: float = 1.0) -> dict[str, Tensor]:
        """Returns the tensors that carry `update` [d] to the server, in units of `unit`."""
        return encode_chain(self.chain, update if unit == 1 else update / unit, key)

    def decode(self, tensors: Mapping[str, Tensor], key: Key) -> Tensor:
        """Returns the update [d] float32 in `tensors`, which may come from anybody.

        Raises:
            WireError: if it is not an update of the agreed size, or not finite.
        """
        return check_float(decode_chain(self.chain, tensors, key), self.promise.size, "update")

    def metrics(self, measured: Mapping[str, JSON]) -> dict[str, JSON]:
        """Returns the part of `measured` that may leave a client: under privacy only the number of planned steps."""
        secret = self.privacy is not None and (self.privacy.unit == "client" or self.joint)
        if secret or not isinstance(self.adder, PlainSum):
            return {}
        allowed = METRICS if self.privacy is None else ("steps",)
        return {name: measured[name] for name in allowed if name in measured}

    def init(self) -> dict[str, Tensor]:
        """Returns the state before the first round."""
        return (
            {}
            if self.adaptive is None
            else {"clip_norm": torch.tensor(self.adaptive.initial, dtype=torch.float64)}
        )

    def unit(self, state: Mapping[str, Tensor]) -> float:
        """Returns the unit of updates in the next round: the clip norm of an adaptive clip, else 1."""
        return 1.0 if self.adaptive is None else float(state["clip_norm"])

    def mean(
        self,
        replies: Iterable[tuple[ClientId, Message | None]],
        *,
        seed: int,
        round: int,
        session: Session | None = None,
        cohort: Sequence[ClientId] = (),
        state: Mapping[str, Tensor] | None = None,
        secret: int | None = None,
    ) -> Mean:
        """Sums the `replies`, given in client order, adds the server's noise, and divides.

        Under privacy the divisor is public and never the number of replies, and noise is added even if nothing came:
        who replied is as private as what was sent.

        Args:
            replies: of the clients asked.
            seed: of the run.
            round: of the replies.
            session: the sum's server side; needed for a secure sum.
            cohort: the clients asked; needed for a secure sum.
            state: of the round before, or None before the first.
            secret: what the server's noise hangs on instead of the seed.
        """
        state, heard, key = dict(state or self.init()), _Heard(), Key(seed, round, SERVER, secret)
        sent = self._sent(replies, heard, key)
        try:
            total = (session or PlainSum()).add(sent, self.decode, self.promise, cohort, key)
        except SecureError as problem:
            for _ in sent:  # note why each of the others was refused
                pass
            return Mean(None, [], dict.fromkeys(cohort, str(problem)) | heard.refused, state)
        heard.refused |= total.refused
        if self.privacy is None:
            update = (total.sum / total.weight).float() if total.weight > 0 else None
            return Mean(update, total.rows, heard.refused, state)
        return self._private_mean(total, heard, state, key)

    def _private_mean(
        self, total: Total, heard: _Heard, state: dict[str, Tensor], key: Key
    ) -> Mean:
        failures, state = self._count_failures(heard, state, key, total.sum)
        if self.trust == "local" and not self.client_unit:  # every update is private by itself
            update = (total.sum / total.weight).float() if total.weight > 0 else None
            return Mean(update, total.rows, heard.refused, state, failures)
        unit, noised = self.unit(state), total.sum
        if self.noise is not None:
            noised, state = self.noise.add(total.sum, state, key)
        if self.adaptive is not None:
            state |= self._next_clip(heard.below, state, key)
        update = (noised.double() * (unit / self.divisor)).float()
        return Mean(update, [], heard.refused, state, failures)

    def _count_failures(
        self, heard: _Heard, state: dict[str, Tensor], key: Key, total: Tensor
    ) -> tuple[Tally, dict[str, Tensor]]:
        """Returns how many units gave nothing; noise is added here if it is the server's, else it is in the counts."""
        # What a client says of itself and that it was refused would move two counts: only one of them may stand.
        counted = Tally.sum(
            tally for name, tally in heard.failures.items() if name not in heard.refused
        )
        if self.noise is None:
            return counted, state
        if self.client_unit:  # a client whose reply does not count is one that failed
            counted = replace(counted, failed=counted.failed + len(heard.refused))
        noised, state = self.noise.count(counted.tensor(), state, key, random.fingerprint(total))
        return Tally(*noised.double().tolist()), state

    def _tally(self, header: Mapping[str, JSON]) -> Tally:
        """Returns what a client says of its failures, held to what it may have: others pay for an invented count."""
        assert self.privacy is not None
        tally, most, steps = Tally(*need("update", header, "failures")), 1.0, 1
        if not self.client_unit:
            if "examples" not in header:  # in a secure sum nobody says how many there are
                return tally
            steps = need("update", header, "steps") if "steps" in header else 1
            most = need("update", header, "examples") * max(1, steps)
        noise = (
            0.0
            if self.noise is not None
            else self.privacy.noise_multiplier * math.sqrt(max(1, steps))
        )
        if not tally.fits(most, noise):
            raise WireError(
                f"update.failures: got {header['failures']!r}, more or less than can have failed"
            )
        return tally

    def _next_clip(
        self, below: list[bool], state: Mapping[str, Tensor], key: Key
    ) -> dict[str, Tensor]:
        assert self.adaptive is not None
        norm = float(state["clip_norm"])
        chance = key.noise_source("clip", random.fingerprint(below, norm, self.adaptive))
        count = PrivacyPlan("client", 0.5, 1.0, 2 * (self.adaptive.count_noise or 0.0))
        bits = torch.tensor([sum(0.5 if bit else -0.5 for bit in below)], dtype=torch.float64)
        share = share_below(float(noise_sum(bits, count, chance)), self.cohort.size)
        return {"clip_norm": torch.tensor(self.adaptive.update(norm, share), dtype=torch.float64)}

    def _sent(
        self, replies: Iterable[tuple[ClientId, Message | None]], heard: _Heard, key: Key
    ) -> Iterator[Sent]:
        """Yields what passes the checks of its header, and notes in `heard` what else the replies say."""
        for client, reply in replies:
            try:
                yield self._open(reply, Key(key.seed, key.round, client), heard)
            except WireError as problem:
                heard.refused[client] = str(problem)

    def _open(self, reply: Message | None, key: Key, heard: _Heard) -> Sent:
        if reply is None:
            raise WireError("no reply came; see whether the client is still running")
        header = reply.header
        check_header(reply.kind, header)
        if reply.kind == "error":
            raise WireError(str(header.get("reason", "the client failed and gave no reason"))[:500])
        if reply.kind != "update":
            raise WireError(
                f"update.kind: got {reply.kind!r}, expected 'update'; answer the request that was sent"
            )
        if need("update", header, "round") != key.round:
            raise WireError(
                f"update.round: got {header['round']!r}, expected {key.round}; answer the last request"
            )
        plain = not (self.client_unit or self.joint) and isinstance(self.adder, PlainSum)
        examples: int = need("update", header, "examples") if plain else 1
        if self.adaptive is not None:
            heard.below.append(need("update", header, "below"))
        if self.privacy is not None and "failures" in header:
            heard.failures[key.client] = self._tally(header)
        if not plain:
            secure: Mapping[str, JSON] = (
                need("update", header, "secure") if "secure" in header else {}
            )
            return Sent(key, reply.tensors, 1.0, {}, secure)
        row = {"client": key.client, "examples": examples, **self.metrics(header)}
        return Sent(key, reply.tensors, float(examples) if self.weights == "examples" else 1.0, row)


def _check_client_unit(privacy: PrivacyPlan, cohort: Cohort, weights: str) -> None:
    if weights != "equal":
        raise RecipeError(
            "federate.weights: got 'examples' under client privacy, where a large client would exceed the sensitivity;"
            ' set weights = "equal"'
        )
    if not 0 < privacy.clip_norm < float("inf"):
        raise RecipeError(
            f"federate.privacy.clip_norm: got {privacy.clip_norm}, expected a finite bound above 0"
        )
    if privacy.sampling_prob != cohort.sampling_prob:
        raise RecipeError(
            f"federate.privacy.sampling_prob: the plan charges {privacy.sampling_prob} but a {cohort.sampling} cohort"
            f" of {cohort.size} in {cohort.population} is worth {cohort.sampling_prob}; plan with cohort.sampling_prob"
        )
    if privacy.steps_per_round != 1:
        raise RecipeError(
            f"federate.privacy.steps_per_round: got {privacy.steps_per_round}; client privacy takes 1"
        )
