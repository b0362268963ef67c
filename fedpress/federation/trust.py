"""Who adds which noise, decided once: a row says all that follows from what is protected and from whom.

| kind | who adds the noise | against whom the promise holds |
| --- | --- | --- |
| open | nobody | nobody |
| local | each client, all of it | everybody, the server too |
| distributed | the clients together: only their sum carries it all | everybody, the server too |
| central | the server | everybody but the server |
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from fedpress.codecs import Bound, Clip, Key, Noise, Settings
from fedpress.core.canonical import JSON
from fedpress.errors import DivergedError, RecipeError, TrainingError, WireError
from fedpress.federation.aggregators.base import Aggregator, Weights
from fedpress.federation.failures import Tally
from fedpress.federation.protocol import need
from fedpress.federation.sampling import Cohort
from fedpress.federation.servernoise import ServerNoise
from fedpress.federation.vectors import ExtraVector
from fedpress.privacy.plan import PrivacyPlan

Unit: TypeAlias = Literal["sample", "client"]
Kind: TypeAlias = Literal["open", "local", "distributed", "central"]


@dataclass(frozen=True)
class Trust:
    """One row.

    Attributes:
        kind: see the table above.
        unit: what is protected: one example of a client ("sample") or all that a client holds ("client").
        steps: where the gradients of a client's local steps come from, a row of `local.GRADIENT_SOURCES`.
        noise: where the noise is: in every local "step"; in every "vector" that leaves a client; in the "sum" of what
            the clients send, each with its share; on the aggregate, from the "server"; or nowhere.
        measures: what a client may say of its training, beside the number of its examples if `tells_examples`.
        tells_examples: whether a client may say how many examples it has.
        names_clients: whether a record may have a row for each client.
        hides_cohort: whether nobody but the server may know who took part.
        fixed_divisor: whether a sum is divided by a public number, whoever replied; else by the weights that came.
        keeps_residual: whether a client may add what coding lost to its next update: noise in it would be taken away.
        failing: what a client does whose work fails: "raises", "keeps_quiet" about the cause, or sends zeros and counts
            as one failure ("counts_client") or as its expected batch ("counts_batch").
    """

    kind: Kind
    unit: Unit | None
    steps: Literal["plain", "private", "joint"]
    noise: Literal["none", "step", "vector", "sum", "server"]
    measures: tuple[str, ...] = ()
    tells_examples: bool = False
    names_clients: bool = False
    hides_cohort: bool = False
    fixed_divisor: bool = True
    keeps_residual: bool = False
    failing: Literal["raises", "keeps_quiet", "counts_client", "counts_batch"] = "counts_client"

    def agreed(self) -> dict[str, object]:
        """Returns what names the row; all else follows from it."""
        return {"kind": self.kind, "unit": self.unit}

    # What is bound before the run.

    @property
    def on_aggregate(self) -> bool:
        """Whether noise on the aggregate must hide a protected unit, so that its sensitivity must be known."""
        return self.noise in ("sum", "server")

    def codecs(
        self, plan: PrivacyPlan | None, clip_norm: float | None, vectors: int
    ) -> tuple[Settings, ...]:
        """Returns what stands before the codecs of a vector: the clip of its promise, and noise where it is in each.

        `vectors` is how many travel, see `share`.
        """
        if clip_norm is None:
            return ()
        clip = Clip(clip_norm=clip_norm)
        if plan is None or self.noise != "vector" or not plan.noise_multiplier:
            return (clip,)
        return clip, Noise(std=share(plan.noise_multiplier, vectors) * clip_norm)

    def promise(self, clip_norm: float | None, start: Bound, end: Bound) -> Bound:
        """Returns what the server holds every decoded vector to; `end` is the bound of the chain that encodes it.

        Where noise is in the vector itself there is no promise: a second clip would shorten the noise. Where the noise
        is on the aggregate it is measured against the clip, so not even a codec may lengthen a vector.
        """
        l2 = end.decoded_l2
        if self.unit == "client" and self.on_aggregate and clip_norm is not None:
            l2 = clip_norm
        return replace(start, l2=l2, linf=l2, shapes=())

    def server_noise(
        self, plan: PrivacyPlan | None, planned: ServerNoise | None
    ) -> ServerNoise | None:
        """Returns what a trusted server adds to a sum: what was `planned`, or the noise of the plan."""
        if self.noise != "server" or plan is None:
            return None
        return planned or ServerNoise(plan)

    def check(
        self, plan: PrivacyPlan | None, cohort: Cohort, weights: Weights, aggregator: Aggregator
    ) -> None:
        """Checks that plan, cohort, weights and aggregator keep the promise of this row.

        Raises:
            RecipeError: if one of them does not.
        """
        if weights not in ("examples", "equal"):
            raise RecipeError(f"got {weights!r}, expected 'examples' or 'equal'", place="weights")
        if plan is not None and self.unit == "client":
            _check_client_unit(plan, cohort, weights)
        if weights == "examples" and aggregator.weights != "examples":
            raise RecipeError(
                (
                    f"got 'examples', but the aggregator '{aggregator.kind}' cannot weigh clients "
                    "by how many examples stand behind an update"
                ),
                place="weights",
                cure='set weights = "equal"',
            )
        if self.noise == "sum" and aggregator.sees_updates:
            raise RecipeError(
                (
                    f"got '{aggregator.kind}' with trust '{self.kind}', where only a secure sum "
                    "carries all of the noise"
                ),
                place="aggregator",
                cure='set aggregator = "secure"',
            )
        moved = Bound(1, l2=plan.clip_norm if plan is not None else math.inf)
        if self.on_aggregate and aggregator.sensitivity(moved, cohort.size) is None:
            raise RecipeError(
                (
                    f"got '{aggregator.kind}', which gives no bound on how far one {self.unit} "
                    f"moves it, so noise of trust '{self.kind}' hides nothing"
                ),
                place="aggregator",
                cure=(
                    'set trust = "local", where every vector carries its noise before it is '
                    'aggregated, or aggregator = "mean"'
                ),
            )

    def check_vectors(self, plan: PrivacyPlan | None, extras: Mapping[str, ExtraVector]) -> None:
        """Checks that further vectors of an algorithm can be bounded and charged.

        Raises:
            RecipeError: if one cannot.
        """
        for name, extra in extras.items():
            if self.steps == "joint":
                raise RecipeError(
                    (
                        f"it sends '{name}' beside the update, but with unit 'sample' and trust "
                        f"'{self.kind}' a client sends one sum of gradients alone"
                    ),
                    place="algorithm",
                    cure='set trust = "local", or take another algorithm',
                )
            if self.unit == "client" and extra.clip_norm is None:
                raise RecipeError(
                    f"its vector '{name}' has no bound, and client privacy must charge one",
                    place="algorithm",
                    cure=(
                        "give it a clip_norm in the table of the algorithm, near the norm that it has "
                        "without privacy"
                    ),
                )

    # What a client does and says.

    def said(self, measured: Mapping[str, JSON], examples: int, *, seen: bool) -> dict[str, JSON]:
        """Returns what the header of an update says of its client; nothing where no single client is `seen`."""
        if not seen:
            return {}
        header = {name: measured[name] for name in self.measures if name in measured}
        return {**header, "examples": examples} if self.tells_examples else header

    def after_failure(self, problem: Exception, expected: float) -> dict[str, JSON]:
        """Returns what is measured in place of an update when a client's work fails, or raises what may be said.

        Under privacy nobody may learn from a failure what is in the data. Where noise hides that an update is zero, a
        failure is one, and only counted: `expected` is the batch that was expected, a public number.
        """
        diverged = isinstance(problem, DivergedError)
        if self.failing == "counts_client":
            return {"not_finite" if diverged else "failed": 1}
        if self.failing == "counts_batch":  # the same for every cause
            return {"failed": round(expected)}
        # That steps diverge follows from noised steps alone, so it says nothing about the examples.
        if self.failing == "raises" or diverged:
            raise problem
        raise TrainingError(
            f"failed with {type(problem).__name__}",
            place="local update",
            cure="what on stays private",
        ) from problem

    def failures(
        self, measured: Mapping[str, JSON], plan: PrivacyPlan, key: Key, hidden: str
    ) -> dict[str, JSON]:
        """Returns what a header says of examples, or clients, that gave nothing; asked under privacy alone.

        A trusted server gets the counts as they are and adds the noise; otherwise it is added here. It is drawn for all
        that `hidden` names: were it the same for other examples, two answers could be compared.
        """
        tally = Tally.of(measured)
        if self.noise == "server":
            return {"failures": tally.to_json()} if tally.total else {}
        steps = plan.steps_per_round if self.noise == "step" else 1
        return {"failures": tally.noised(plan, key, steps=steps, hidden=hidden).to_json()}

    # What the server reads and counts.

    def tally(self, header: Mapping[str, JSON], plan: PrivacyPlan) -> Tally:
        """Returns what a client says of its failures, held to what it may have: others pay for an invented count.

        Raises:
            WireError: if it is more or less than can have failed.
        """
        tally, most, steps = Tally(*need("update", header, "failures")), 1.0, 1
        if self.unit == "sample":
            if "examples" not in header:  # in a secure sum nobody says how many there are
                return tally
            steps = need("update", header, "steps") if "steps" in header else 1
            most = need("update", header, "examples") * max(1, steps)
        noise = 0.0 if self.noise == "server" else plan.noise_multiplier * math.sqrt(max(1, steps))
        if not tally.fits(most, noise):
            raise WireError(
                f"got {header['failures']!r}, more or less than can have failed",
                place="update.failures",
                cure="count every example that failed once",
            )
        return tally

    def counted(self, tally: Tally, refused: int) -> Tally:
        """Returns `tally` with the replies that do not count: of a protected client, that is a failure too."""
        if self.unit == "client" and self.noise == "server":
            return replace(tally, failed=tally.failed + refused)
        return tally

    # What is told of the plan.

    def noised_counts(self, plan: PrivacyPlan) -> int:
        """Returns in how many noised counts of failures one client's part of a round comes."""
        return plan.steps_per_round if self.noise == "step" else 1


def share(noise_multiplier: float, vectors: int) -> float:
    """Returns the noise multiplier of each of so many vectors that together cost what one costs at `noise_multiplier`.

    One client moves vector i by at most its clip norm C_i. In units of C_i sqrt(m) all m vectors are one vector that a
    client moves by at most 1. With noise of `noise_multiplier` on each value there, which is noise_multiplier sqrt(m)
    C_i on vector i, this is one Gaussian mechanism: the ledger holds `noise_multiplier`, whatever m is.

    >>> share(1.5, 1), share(1.5, 4)
    (1.5, 3.0)
    """
    return noise_multiplier * math.sqrt(vectors) if vectors > 1 else noise_multiplier


TRUSTS: tuple[Trust, ...] = (
    Trust(
        "open",
        None,
        "plain",
        "none",
        measures=("loss", "steps"),
        tells_examples=True,
        names_clients=True,
        fixed_divisor=False,
        keeps_residual=True,
        failing="raises",
    ),
    Trust(
        "local",
        "sample",
        "private",
        "step",
        measures=("steps",),
        tells_examples=True,
        names_clients=True,
        fixed_divisor=False,
        keeps_residual=True,  # the noise is in the gradients: what coding loses holds no more of it
        failing="keeps_quiet",
    ),
    Trust("distributed", "sample", "joint", "sum", failing="counts_batch"),
    Trust(
        "central",
        "sample",
        "joint",
        "server",
        tells_examples=True,
        hides_cohort=True,
        failing="counts_batch",
    ),
    Trust("local", "client", "plain", "vector"),
    Trust("distributed", "client", "plain", "sum"),
    Trust("central", "client", "plain", "server", hides_cohort=True, keeps_residual=True),
)
"""One row for each unit and trust, and one without privacy."""
USUAL: Mapping[Unit | None, Kind] = {None: "open", "sample": "local", "client": "central"}
"""The trust of each unit where none is named."""
OLD = {"secure": "distributed"}
"""Words of version 0.1 and what they are called now."""


def trust_of(unit: Unit | None, kind: str | None = None) -> Trust:
    """Returns the row of `unit` (None: no privacy) and `kind` (the usual one if None).

    Raises:
        RecipeError: if there is none.

    >>> trust_of("client").kind, trust_of("sample", "distributed").steps, trust_of(None).noise
    ('central', 'joint', 'none')
    """
    wanted = USUAL[unit] if kind is None or unit is None else OLD.get(kind, kind)
    for row in TRUSTS:
        if (row.unit, row.kind) == (unit, wanted):
            return row
    raise RecipeError(
        f"got {kind!r}, expected 'local', 'distributed' or 'central'",
        place="trust",
    )


def _check_client_unit(plan: PrivacyPlan, cohort: Cohort, weights: Weights) -> None:
    if weights != "equal":
        raise RecipeError(
            (
                "got 'examples' under client privacy, where a large client would exceed the "
                "sensitivity"
            ),
            place="weights",
            cure='set weights = "equal"',
        )
    if not 0 < plan.clip_norm < math.inf:
        raise RecipeError(
            f"got {plan.clip_norm}, expected a finite bound above 0",
            place="privacy.clip_norm",
        )
    if plan.sampling_prob != cohort.sampling_prob:
        raise RecipeError(
            (
                f"the plan charges {plan.sampling_prob} but a {cohort.sampling} cohort of "
                f"{cohort.size} in {cohort.population} is worth {cohort.sampling_prob}"
            ),
            place="privacy.sampling_prob",
            cure="plan with cohort.sampling_prob",
        )
    if plan.steps_per_round != 1:
        raise RecipeError(
            f"got {plan.steps_per_round}",
            place="privacy.steps_per_round",
            cure="client privacy takes 1",
        )
