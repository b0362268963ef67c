"""The table of trust models: what privacy protects, who adds the noise, what clients may report.

A run picks a row of `TRUSTS` by a kind of this table and the protected unit: one example ("sample")
or all examples of one client ("client").

| kind | who adds the noise | who learns only private results |
| --- | --- | --- |
| open | nobody | nobody |
| local | each client adds the full noise | everybody, also the server |
| distributed | each client adds a share; the sum has all the noise | everybody, also the server |
| central | the server | everybody except the server |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
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
"""What privacy protects; see `Trust.unit`."""
Kind: TypeAlias = Literal["open", "local", "distributed", "central"]
"""Who adds the noise; see the table at the top of this file."""


@dataclass(frozen=True)
class Trust:
    """One row of the table: what is protected, who adds the noise, and the rules that follow.

    Attributes:
        kind: who adds the noise; see the table at the top of this file.
        unit: what is protected: one example of a client ("sample") or all examples of a client
            ("client"); None without privacy.
        steps: how a client computes gradients, a key of `GRADIENT_SOURCES`.
        noise: where the noise is added: "step" (to the gradient of each local step), "vector" (to
            each vector before it is sent), "sum" (each client adds its share to its vector),
            "server" (to the aggregate), or "none".
        reported_measures: which measures of its training a client may report, such as "loss".
        reports_examples: whether a client may report its number of examples.
        names_clients: whether the record of a round may have a row for each client.
        hides_cohort: whether only the server may know which clients took part in a round.
        fixed_divisor: whether a sum is divided by a public number, however many clients replied.
            Otherwise it is divided by the sum of the clients' weights.
        keeps_residual: whether a client may use error feedback. It may not if it adds noise to the
            vector itself: the residual would contain the noise, and the next update would remove
            it.
        on_failure: what a client does if its training fails. "raises": it sends the error.
            "hides_cause": it sends an error without the cause. "counts_client": it sends zeros, and
            counts as one failed client. "counts_batch": it sends zeros, and counts its expected
            batch size as failed examples.
    """

    kind: Kind
    unit: Unit | None
    steps: Literal["plain", "private", "joint"]
    noise: Literal["none", "step", "vector", "sum", "server"]
    reported_measures: tuple[str, ...] = ()
    reports_examples: bool = False
    names_clients: bool = False
    hides_cohort: bool = False
    fixed_divisor: bool = True
    keeps_residual: bool = False
    on_failure: Literal["raises", "hides_cause", "counts_client", "counts_batch"] = "counts_client"

    def agreed(self) -> dict[str, object]:
        """Returns the fields that server and client compare; the others follow from these two."""
        return {"kind": self.kind, "unit": self.unit}

    # Rules for the parts of an uplink, used before the run.

    @property
    def on_aggregate(self) -> bool:
        """Whether only the sum of the vectors has the full noise, and so needs a sensitivity."""
        return self.noise in ("sum", "server")

    def codecs(
        self, plan: PrivacyPlan | None, clip_norm: float | None, vectors: int
    ) -> tuple[Settings, ...]:
        """Returns the codecs that privacy adds before those of the recipe.

        Args:
            plan: plan of the noise; None without privacy.
            clip_norm: L2 bound of the vector; None: no bound.
            vectors: number of vectors that a client sends, see `per_vector_multiplier`.

        Returns:
            A clip, followed by noise if each client adds all the noise to its vector. Nothing if
            `clip_norm` is None.
        """
        if clip_norm is None:
            return ()
        clip = Clip(clip_norm=clip_norm)
        if plan is None or self.noise != "vector" or not plan.noise_multiplier:
            return (clip,)
        std = per_vector_multiplier(plan.noise_multiplier, vectors) * clip_norm
        return clip, Noise(std=std)

    def decoded_bound(self, clip_norm: float | None, start: Bound, end: Bound) -> Bound:
        """Returns the bound to which the server clips every decoded vector.

        Args:
            clip_norm: L2 bound of the vector at the client; None: no bound.
            start: bound of the vector before the first codec.
            end: bound of the encoded vector, after the last codec.
        """
        # Without noise on the aggregate, the bound is the largest norm that an honest client's
        # vector can have. It is infinite if clients add noise to the vector, because clipping would
        # change the noise.
        l2 = end.decoded_l2
        # Noise on the aggregate is proportional to the clip norm. Codecs may make a vector longer
        # (rounding does, slightly), so the server clips it back to the clip norm.
        if self.unit == "client" and self.on_aggregate and clip_norm is not None:
            l2 = clip_norm
        return replace(start, l2=l2, linf=l2, shapes=())

    def server_noise(
        self, plan: PrivacyPlan | None, planned: ServerNoise | None
    ) -> ServerNoise | None:
        """Returns the noise that a trusted server adds to a sum; None if the server adds no noise.

        Args:
            plan: plan of the noise; None without privacy.
            planned: noise to use, such as correlated noise; None: independent noise of `plan`.
        """
        if self.noise != "server" or plan is None:
            return None
        return planned or ServerNoise(plan)

    def check(
        self, plan: PrivacyPlan | None, cohort: Cohort, weights: Weights, aggregator: Aggregator
    ) -> None:
        """Checks that the privacy guarantee holds with plan, cohort, weights and aggregator.

        Raises:
            RecipeError: if one of them breaks the guarantee, or if the aggregator does not support
                these weights.
        """
        if weights not in ("examples", "equal"):
            raise RecipeError(f"got {weights!r}, expected 'examples' or 'equal'", place="weights")
        if plan is not None and self.unit == "client":
            _check_client_unit(plan, cohort, weights)
        if weights == "examples" and aggregator.weights != "examples":
            raise RecipeError(
                (
                    f"got 'examples', but the aggregator '{aggregator.kind}' cannot weigh clients "
                    "by their numbers of examples"
                ),
                place="weights",
                cure='set weights = "equal"',
            )

        # Each client adds only a share of the noise, so a server that saw single updates would see
        # them nearly without noise.
        if self.noise == "sum" and aggregator.sees_updates:
            raise RecipeError(
                (
                    f"got '{aggregator.kind}', but with trust '{self.kind}' single updates have "
                    "too little noise, and only a secure sum hides them"
                ),
                place="aggregator",
                cure='set aggregator = "secure"',
            )

        # The question is only whether the aggregator has a sensitivity; any finite bound would do.
        moved = Bound(1, l2=plan.clip_norm if plan is not None else math.inf)
        if self.on_aggregate and aggregator.sensitivity(moved, cohort.size) is None:
            raise RecipeError(
                (
                    f"got '{aggregator.kind}', which one {self.unit} can change without limit, so "
                    f"noise of trust '{self.kind}' does not hide it"
                ),
                place="aggregator",
                cure=(
                    'set trust = "local", where every vector has noise before it is '
                    'aggregated, or aggregator = "mean"'
                ),
            )

    def check_vectors(self, plan: PrivacyPlan | None, extras: Mapping[str, ExtraVector]) -> None:
        """Checks that privacy covers the further vectors of an algorithm.

        Raises:
            RecipeError: if a vector cannot be covered.
        """
        for name, extra in extras.items():
            if self.steps == "joint":
                raise RecipeError(
                    (
                        f"it sends '{name}' beside the update, but with unit 'sample' and trust "
                        f"'{self.kind}' a client sends only one sum of gradients"
                    ),
                    place="algorithm",
                    cure='set trust = "local", or take another algorithm',
                )
            if self.unit == "client" and extra.clip_norm is None:
                raise RecipeError(
                    f"its vector '{name}' has no clip_norm, which client privacy needs",
                    place="algorithm",
                    cure=(
                        "give it a clip_norm in the table of the algorithm, near the norm that it "
                        "has without privacy"
                    ),
                )

    # Rules for clients in a round.

    def reported(
        self, measured: Mapping[str, JSON], examples: int, *, updates_seen: bool
    ) -> dict[str, JSON]:
        """Returns the header fields of an update that tell something about the client.

        Args:
            measured: measures of the local update, such as its loss.
            examples: the client's number of examples.
            updates_seen: whether the server sees single updates. In a secure sum the server does
                not see them, and then nothing else about a single client is reported either.
        """
        if not updates_seen:
            return {}
        header = {name: measured[name] for name in self.reported_measures if name in measured}
        if self.reports_examples:
            header["examples"] = examples
        return header

    def after_failure(self, problem: Exception | SystemExit, expected: float) -> dict[str, JSON]:
        """Returns the measures of a client whose training failed, or raises an error.

        Under privacy a failure must not reveal anything about the data. If noise hides whether an
        update is zero, the client sends zeros, and only a noisy count tells of the failure.

        Args:
            problem: the exception that the local update raised.
            expected: expected number of examples in a batch, which is public.

        Raises:
            Exception: `problem` itself, without privacy or if it follows from noised values only.
            TrainingError: otherwise; this error does not name the cause.
        """
        diverged = isinstance(problem, DivergedError)
        if self.on_failure == "counts_client":
            return {"not_finite" if diverged else "failed": 1}
        # The same count for every cause: one example must not move two counts.
        if self.on_failure == "counts_batch":
            return {"failed": round(expected)}
        # Divergence of DP-SGD is a function of noised gradients only, so the error reveals no more
        # than they do.
        if self.on_failure == "raises" or diverged:
            raise problem
        raise TrainingError(
            f"failed with {type(problem).__name__}",
            place="local update",
            cure="the cause is hidden for privacy; test the model on public examples",
        ) from problem

    def failures(
        self, measured: Mapping[str, JSON], plan: PrivacyPlan, key: Key, hidden: Callable[[], str]
    ) -> dict[str, JSON]:
        """Returns the header field with the counts of failed examples (or clients), under privacy.

        A trusted server gets exact counts and adds the noise itself. Otherwise the client adds
        noise here.

        Args:
            measured: measures of the local update, with the counts.
            plan: plan of the noise.
            key: key of this client in this round.
            hidden: returns the fingerprint of the data that the noise hides. Other data must get
                other noise: the difference of two answers with equal noise would have none. Called
                only if noise is added here, since hashing a large model takes a while.
        """
        tally = Tally.of(measured)
        if self.noise == "server":
            return {"failures": tally.to_json()} if tally.total else {}
        steps = self.noised_counts(plan)
        return {"failures": tally.noised(plan, key, steps=steps, hidden=hidden()).to_json()}

    # Rules for the server in a round.

    def tally(self, header: Mapping[str, JSON], plan: PrivacyPlan) -> Tally:
        """Returns the failures that a client reports, after checking that they are possible.

        Without the check one client could stop the run for all by reporting a huge number.

        Raises:
            WireError: if a count is negative or the counts are too large, by more than noise can
                explain. At most examples x steps failures are possible, or 1 under unit "client".
        """
        tally = Tally(*need("update", header, "failures"))
        most = 1.0
        steps = 1
        if self.unit == "sample":
            # In a secure sum clients do not report their numbers of examples, so there is no limit.
            if "examples" not in header:
                return tally
            if "steps" in header:
                steps = max(1, need("update", header, "steps"))
            most = need("update", header, "examples") * steps
        # The tally is a sum over all steps; the noise of a sum grows with the square root.
        noise = 0.0 if self.noise == "server" else plan.noise_multiplier * math.sqrt(steps)
        if not tally.fits(most, noise):
            raise WireError(
                f"got {header['failures']!r}, which is not possible with this many examples",
                place="update.failures",
                cure="count every failed example once",
            )
        return tally

    def with_refused(self, tally: Tally, refused: int) -> Tally:
        """Returns `tally`, plus the number of refused replies if the counts are of clients."""
        if self.unit == "client" and self.noise == "server":
            return replace(tally, failed=tally.failed + refused)
        return tally

    def noised_counts(self, plan: PrivacyPlan) -> int:
        """Returns how many noised counts are added up in the tally that a client reports."""
        # DP-SGD adds noise in every local step, so each step's count has its own noise.
        return plan.steps_per_round if self.noise == "step" else 1


def per_vector_multiplier(noise_multiplier: float, vectors: int) -> float:
    """Returns the noise multiplier of each of m vectors that together cost as much as one vector.

    One client moves vector i by at most the clip norm C_i of this vector. If vector i is divided by
    C_i sqrt(m), all m vectors together form one vector that a client moves by at most 1. This joint
    vector gets noise of standard deviation `noise_multiplier`, so vector i itself gets noise of
    standard deviation noise_multiplier sqrt(m) C_i. The m vectors are then one Gaussian mechanism,
    which costs as much privacy as one vector with `noise_multiplier`.

    Args:
        noise_multiplier: noise multiplier of the joint vector.
        vectors: number of vectors m.

    >>> per_vector_multiplier(1.5, 1), per_vector_multiplier(1.5, 4)
    (1.5, 3.0)
    """
    return noise_multiplier * math.sqrt(vectors) if vectors > 1 else noise_multiplier


TRUSTS: tuple[Trust, ...] = (
    Trust(
        "open",
        None,
        "plain",
        "none",
        reported_measures=("loss", "steps"),
        reports_examples=True,
        names_clients=True,
        fixed_divisor=False,
        keeps_residual=True,
        on_failure="raises",
    ),
    Trust(
        "local",
        "sample",
        "private",
        "step",
        reported_measures=("steps",),
        reports_examples=True,
        names_clients=True,
        fixed_divisor=False,
        # Error feedback is allowed: noise is in the gradients, so the residual is post-processing.
        keeps_residual=True,
        on_failure="hides_cause",
    ),
    Trust("distributed", "sample", "joint", "sum", on_failure="counts_batch"),
    Trust(
        "central",
        "sample",
        "joint",
        "server",
        reports_examples=True,
        hides_cohort=True,
        on_failure="counts_batch",
    ),
    Trust("local", "client", "plain", "vector"),
    Trust("distributed", "client", "plain", "sum"),
    Trust("central", "client", "plain", "server", hides_cohort=True, keeps_residual=True),
)
"""One row for each unit and trust, and one without privacy."""
DEFAULT_KINDS: Mapping[Unit | None, Kind] = {None: "open", "sample": "local", "client": "central"}
"""The default trust of each unit."""
OLD_KINDS = {"secure": "distributed"}
"""Names in recipes of version 0.1 -> names now."""


def trust_of(unit: Unit | None, kind: str | None = None) -> Trust:
    """Returns the row of `unit` and `kind`.

    Args:
        unit: what privacy protects; None: no privacy, and `kind` is ignored.
        kind: who adds the noise; None: the default of the unit.

    Raises:
        RecipeError: if there is no such row.

    >>> trust_of("client").kind, trust_of("sample", "distributed").steps, trust_of(None).noise
    ('central', 'joint', 'none')
    """
    if kind is None or unit is None:
        wanted: str = DEFAULT_KINDS[unit]
    else:
        wanted = OLD_KINDS.get(kind, kind)
    for row in TRUSTS:
        if (row.unit, row.kind) == (unit, wanted):
            return row
    raise RecipeError(
        f"got {kind!r}, expected 'local', 'distributed' or 'central'",
        place="trust",
    )


def _check_client_unit(plan: PrivacyPlan, cohort: Cohort, weights: Weights) -> None:
    """Checks for unit "client" that the sensitivity is one clip norm, and checks the sampling."""
    # With weights by examples, a client moves the sum by weight x clip norm, and the weight has no
    # bound.
    if weights != "equal":
        raise RecipeError(
            (
                "got 'examples', but under client privacy a client with many examples would exceed "
                "the sensitivity"
            ),
            place="weights",
            cure='set weights = "equal"',
        )
    # The noise is multiplier x clip norm: other clip norms would make it infinite or 0.
    if not 0 < plan.clip_norm < math.inf:
        raise RecipeError(
            f"got {plan.clip_norm}, expected a finite bound above 0",
            place="privacy.clip_norm",
        )
    # A plan with a smaller probability than the cohort's would claim too much amplification.
    if plan.sampling_prob != cohort.sampling_prob:
        raise RecipeError(
            (
                f"got {plan.sampling_prob}, but the probability of a {cohort.sampling} cohort of "
                f"{cohort.size} in {cohort.population} is {cohort.sampling_prob}"
            ),
            place="privacy.sampling_prob",
            cure="plan with cohort.sampling_prob",
        )
    # A client sends one update a round, however many local steps it takes.
    if plan.steps_per_round != 1:
        raise RecipeError(
            f"got {plan.steps_per_round}, expected 1 under client privacy",
            place="privacy.steps_per_round",
            cure="set it to 1",
        )
