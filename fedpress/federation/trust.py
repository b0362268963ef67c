"""Who adds which noise: one row for each protected unit and trust, with all that follows from it.

| kind | who adds the noise | against whom the guarantee holds |
| --- | --- | --- |
| open | nobody | nobody |
| local | each client, all of it | everybody, the server too |
| distributed | all clients together: only their sum carries all of it | everybody, the server too |
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
        unit: what is protected: one example of a client ("sample") or all examples of a client
            ("client"); None without privacy.
        steps: source of the gradients of a client's local steps, a key of `GRADIENT_SOURCES`.
        noise: where the noise is added: "step" (each local step), "vector" (each vector that leaves
            a client), "sum" (each client adds its share), "server" (to the aggregate), or "none".
        reported_measures: what a client may report of its training, such as its loss.
        tells_examples: whether a client may report how many examples it has.
        names_clients: whether a record may have a row for each client.
        hides_cohort: whether only the server may know which clients took part.
        fixed_divisor: whether a sum is divided by a public number, whoever replied. Otherwise it is
            divided by the sum of the weights that arrived.
        keeps_residual: whether a client may use error feedback. It must not where noise is in the
            vector itself: the residual would contain the noise, and the next update remove it.
        on_failure: what a client does if its work fails. "raises": the error goes to the server.
            "keeps_quiet": without its cause. "counts_client": it sends zeros and counts as one
            failed client. "counts_batch": it sends zeros and counts its expected batch as failed.
    """

    kind: Kind
    unit: Unit | None
    steps: Literal["plain", "private", "joint"]
    noise: Literal["none", "step", "vector", "sum", "server"]
    reported_measures: tuple[str, ...] = ()
    tells_examples: bool = False
    names_clients: bool = False
    hides_cohort: bool = False
    fixed_divisor: bool = True
    keeps_residual: bool = False
    on_failure: Literal["raises", "keeps_quiet", "counts_client", "counts_batch"] = "counts_client"

    def agreed(self) -> dict[str, object]:
        """Returns the two entries that name the row; everything else follows from them."""
        return {"kind": self.kind, "unit": self.unit}

    # What is bound before the run.

    @property
    def on_aggregate(self) -> bool:
        """Whether noise on the aggregate hides the unit, so that it must have a sensitivity."""
        return self.noise in ("sum", "server")

    def codecs(
        self, plan: PrivacyPlan | None, clip_norm: float | None, vectors: int
    ) -> tuple[Settings, ...]:
        """Returns the codecs that privacy puts before those of the recipe.

        Args:
            plan: of the noise; None without privacy.
            clip_norm: L2 bound of the vector; None if it has none.
            vectors: how many vectors a client sends, see `per_vector_multiplier`.

        Returns:
            A clip, followed by noise where each vector carries its own; nothing without a bound.
        """
        if clip_norm is None:
            return ()
        clip = Clip(clip_norm=clip_norm)
        if plan is None or self.noise != "vector" or not plan.noise_multiplier:
            return (clip,)
        std = per_vector_multiplier(plan.noise_multiplier, vectors) * clip_norm
        return clip, Noise(std=std)

    def decoded_bound(self, clip_norm: float | None, start: Bound, end: Bound) -> Bound:
        """Returns the bound to which the server clips every decoded vector again.

        Args:
            clip_norm: L2 bound of the vector at the client; None if it has none.
            start: bound before the first codec.
            end: bound after the last codec.
        """
        # Without noise on the aggregate: the longest vector that an honest client's message decodes
        # to. It is infinite where the vector carries noise, because clipping would shorten noise.
        l2 = end.decoded_l2
        # Noise on the aggregate is measured against the clip norm, so a codec that lengthens the
        # vector (rounding does, a little) must not let a client move the sum by more than that.
        if self.unit == "client" and self.on_aggregate and clip_norm is not None:
            l2 = clip_norm
        return replace(start, l2=l2, linf=l2, shapes=())

    def server_noise(
        self, plan: PrivacyPlan | None, planned: ServerNoise | None
    ) -> ServerNoise | None:
        """Returns the noise that a trusted server adds to a sum; None for other rows.

        It is `planned` if given (correlated noise, for instance), else the noise of `plan`.
        """
        if self.noise != "server" or plan is None:
            return None
        return planned or ServerNoise(plan)

    def check(
        self, plan: PrivacyPlan | None, cohort: Cohort, weights: Weights, aggregator: Aggregator
    ) -> None:
        """Checks that plan, cohort, weights and aggregator keep the guarantee of this row.

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

        # One client's share of the noise protects nothing by itself: a server that sees single
        # updates would see them nearly without noise.
        if self.noise == "sum" and aggregator.sees_updates:
            raise RecipeError(
                (
                    f"got '{aggregator.kind}' with trust '{self.kind}', where only a secure sum "
                    "carries all of the noise"
                ),
                place="aggregator",
                cure='set aggregator = "secure"',
            )

        # Any finite bound would do here: only whether the aggregator has a sensitivity is asked.
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
        """Checks that the further vectors of an algorithm can be bounded and charged.

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
                        "give it a clip_norm in the table of the algorithm, near the norm that it "
                        "has without privacy"
                    ),
                )

    # What a client does and reports.

    def reported(
        self, measured: Mapping[str, JSON], examples: int, *, updates_seen: bool
    ) -> dict[str, JSON]:
        """Returns what the header of an update reports about its client.

        Args:
            measured: what the local update measured, such as its loss.
            examples: how many examples the client has.
            updates_seen: whether the server sees single updates. In a secure sum it must not learn
                anything of a single client, so nothing is reported.
        """
        if not updates_seen:
            return {}
        header = {name: measured[name] for name in self.reported_measures if name in measured}
        if self.tells_examples:
            header["examples"] = examples
        return header

    def after_failure(self, problem: Exception, expected: float) -> dict[str, JSON]:
        """Returns what counts as measured if a client's work fails, or raises an error.

        Under privacy nobody may learn from a failure what is in the data. Where noise hides whether
        an update is zero, the client sends zeros and the failure is only counted, with noise.

        Args:
            problem: the exception of the local update.
            expected: examples that one batch is expected to have, a public number.

        Raises:
            Exception: `problem` itself, where there is no privacy or it says nothing of the data.
            TrainingError: in its place, without the cause.
        """
        diverged = isinstance(problem, DivergedError)
        if self.on_failure == "counts_client":
            return {"not_finite" if diverged else "failed": 1}
        # The same count for every cause: one example must not move two counts.
        if self.on_failure == "counts_batch":
            return {"failed": round(expected)}
        # Whether noised steps diverge is computed from the noised gradients alone, so it says
        # nothing about the examples that their noise does not hide.
        if self.on_failure == "raises" or diverged:
            raise problem
        raise TrainingError(
            f"failed with {type(problem).__name__}",
            place="local update",
            cure="what on stays private",
        ) from problem

    def failures(
        self, measured: Mapping[str, JSON], plan: PrivacyPlan, key: Key, hidden: str
    ) -> dict[str, JSON]:
        """Returns the count of failed examples (or clients) as a header reports it, under privacy.

        A trusted server gets the counts as they are and adds the noise. Otherwise it is added here.

        Args:
            measured: what the local update measured.
            plan: of the noise.
            key: of this client in this round.
            hidden: fingerprint of everything that the noise hides. With the same noise for other
                examples two answers could be subtracted, and their difference would have none.
        """
        tally = Tally.of(measured)
        if self.noise == "server":
            return {"failures": tally.to_json()} if tally.total else {}
        steps = self.noised_counts(plan)
        return {"failures": tally.noised(plan, key, steps=steps, hidden=hidden).to_json()}

    # What the server reads and counts.

    def tally(self, header: Mapping[str, JSON], plan: PrivacyPlan) -> Tally:
        """Returns the failures that a client reports, checked against how many there can be.

        Without the check one client could end the run for all by reporting a huge number.

        Raises:
            WireError: if it reports more, or less, than can have failed.
        """
        tally = Tally(*need("update", header, "failures"))
        most = 1.0
        steps = 1
        if self.unit == "sample":
            # In a secure sum nobody reports how many examples there are, so there is no limit.
            if "examples" not in header:
                return tally
            if "steps" in header:
                steps = max(1, need("update", header, "steps"))
            most = need("update", header, "examples") * steps
        # The counts of several steps are added up, so their noise grows with the square root.
        noise = 0.0 if self.noise == "server" else plan.noise_multiplier * math.sqrt(steps)
        if not tally.fits(most, noise):
            raise WireError(
                f"got {header['failures']!r}, more or less than can have failed",
                place="update.failures",
                cure="count every example that failed once",
            )
        return tally

    def with_refused(self, tally: Tally, refused: int) -> Tally:
        """Returns `tally` plus the `refused` replies: a refused protected client has failed."""
        if self.unit == "client" and self.noise == "server":
            return replace(tally, failed=tally.failed + refused)
        return tally

    def noised_counts(self, plan: PrivacyPlan) -> int:
        """Returns how many noised counts of failures one client reports in a round, added up."""
        return plan.steps_per_round if self.noise == "step" else 1


def per_vector_multiplier(noise_multiplier: float, vectors: int) -> float:
    """Returns the noise multiplier that each of `vectors` needs so that all cost as much as one.

    One client moves vector i by at most its clip norm C_i. Divide vector i by C_i sqrt(m): then all
    m vectors together are one vector that a client moves by at most 1. Noise of `noise_multiplier`
    on each of its values is noise of noise_multiplier sqrt(m) C_i on vector i. So this is one
    Gaussian mechanism, and the ledger holds `noise_multiplier` for any m.

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
        tells_examples=True,
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
        tells_examples=True,
        names_clients=True,
        fixed_divisor=False,
        # Allowed: the noise is in the gradients, so the residual of the codecs is post-processing.
        keeps_residual=True,
        on_failure="keeps_quiet",
    ),
    Trust("distributed", "sample", "joint", "sum", on_failure="counts_batch"),
    Trust(
        "central",
        "sample",
        "joint",
        "server",
        tells_examples=True,
        hides_cohort=True,
        on_failure="counts_batch",
    ),
    Trust("local", "client", "plain", "vector"),
    Trust("distributed", "client", "plain", "sum"),
    Trust("central", "client", "plain", "server", hides_cohort=True, keeps_residual=True),
)
"""One row for each unit and trust, and one without privacy."""
USUAL: Mapping[Unit | None, Kind] = {None: "open", "sample": "local", "client": "central"}
"""The default trust of each unit."""
OLD = {"secure": "distributed"}
"""Words of version 0.1 -> their present names."""


def trust_of(unit: Unit | None, kind: str | None = None) -> Trust:
    """Returns the row of `unit` (None: no privacy) and `kind` (the default of the unit if None).

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
    """Checks that under unit "client" the sensitivity is one clip norm, and the charge is right."""
    # With weights by examples a client moves the sum by weight x clip norm, which nothing bounds.
    if weights != "equal":
        raise RecipeError(
            (
                "got 'examples' under client privacy, where a large client would exceed the "
                "sensitivity"
            ),
            place="weights",
            cure='set weights = "equal"',
        )
    # Noise is the multiplier times the clip norm: infinite, or none at all, without one.
    if not 0 < plan.clip_norm < math.inf:
        raise RecipeError(
            f"got {plan.clip_norm}, expected a finite bound above 0",
            place="privacy.clip_norm",
        )
    # A smaller probability than that of the cohort would claim amplification that does not exist.
    if plan.sampling_prob != cohort.sampling_prob:
        raise RecipeError(
            (
                f"the plan charges {plan.sampling_prob} but a {cohort.sampling} cohort of "
                f"{cohort.size} in {cohort.population} is worth {cohort.sampling_prob}"
            ),
            place="privacy.sampling_prob",
            cure="plan with cohort.sampling_prob",
        )
    # A client sends one update a round, however many local steps it takes.
    if plan.steps_per_round != 1:
        raise RecipeError(
            f"got {plan.steps_per_round}",
            place="privacy.steps_per_round",
            cure="client privacy takes 1",
        )
