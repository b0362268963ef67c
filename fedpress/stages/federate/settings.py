"""The `[[stage]] kind = "federate"` table of a recipe: its keys, their ranges and defaults."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fedpress.codecs import AnyTransform, Quantize
from fedpress.core.renamed import ReadsOldKeys, Renamed
from fedpress.errors import Argument, SettingError
from fedpress.federation import AnyAggregator, AnyAlgorithm, Average, LocalSettings
from fedpress.federation.algorithms.optimizers import Server
from fedpress.federation.delays import AnyDelays
from fedpress.federation.schedules import AnySchedule, Synchronous
from fedpress.privacy.adaptive import AdaptiveClip
from fedpress.training.augment import Augment
from fedpress.workspace.state import Name


class PrivacySettings(ReadsOldKeys):
    """`[stage.privacy]`: what is protected, against whom, and how strongly.

    Give `epsilon`, and the noise is calibrated to it before the run; or give `noise_multiplier`,
    and epsilon follows from it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    renamed: ClassVar[tuple[Renamed, ...]] = (Renamed("trust", "secure", "trust", "distributed"),)

    unit: Literal["sample", "client"] = Field(
        description="what is protected: single rows, or a whole client"
    )
    trust: Literal["local", "distributed", "central"] | None = Field(
        None,
        description="who adds the noise: each client, the clients together under a secure sum, or "
        "the"
        " server",
    )
    delta: float = Field(1e-5, gt=0, lt=1, description="chance that the promise fails")
    clip_norm: float = Field(1.0, gt=0, description="L2 norm by which one unit can move a sum")
    epsilon: float | None = Field(
        None, gt=0, description="budget of all rounds; the noise is calibrated to it"
    )
    noise_multiplier: float | None = Field(
        None, gt=0, description="noise standard deviation / clip_norm, in the place of epsilon"
    )
    adaptive: AdaptiveClip | None = Field(
        None, description="the clip norm follows the updates (unit client)"
    )
    correlated: CorrelatedNoise | None = Field(
        None,
        description="noise that cancels over the rounds, for populations without sampling (unit "
        "client)",
    )
    secure_noise: bool = Field(
        False,
        description="noise from the operating system's randomness on a public grid; runs then "
        "differ",
    )

    @model_validator(mode="after")
    def _one_of_two(self) -> PrivacySettings:
        if self.epsilon is None and self.noise_multiplier is None:
            raise SettingError(
                "it needs either epsilon or noise_multiplier",
                cure=(
                    "give ",
                    Argument("epsilon", 8.0),
                    " (the noise is calibrated) or ",
                    Argument("noise_multiplier", 1.0),
                ),
            )
        if self.epsilon is not None and self.noise_multiplier is not None:
            raise SettingError(
                "epsilon and noise_multiplier are both given", cure="leave one of them out"
            )
        # Written into the settings, so that a run folder says which trust it had.
        if self.trust is None:
            object.__setattr__(self, "trust", "central" if self.unit == "client" else "local")
        central_client = (self.unit, self.trust) == ("client", "central")
        for name in ("adaptive", "correlated"):
            if getattr(self, name) is not None and not central_client:
                raise SettingError(
                    (
                        "it is for unit 'client' with trust 'central', not "
                        f"'{self.unit}' with '{self.trust}'"
                    ),
                    place=name,
                    cure=f"leave {name} out",
                )
        # The correlated noise of a round cancels part of the last one, which had another scale.
        if self.adaptive is not None and self.correlated is not None:
            raise SettingError(
                "correlated noise needs one clip norm, and adaptive changes it",
                place="adaptive",
                cure="leave adaptive or correlated out",
            )
        return self


class CorrelatedNoise(BaseModel):
    """`[stage.privacy.correlated]`: noise correlated over the rounds by matrix factorisation.

    Choquette-Choo et al. 2023 (arXiv:2306.08153). A client takes part in at most every
    `Cohort.period`-th round; if all clients take part in all rounds, that is 1.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    bands: int = Field(16, ge=2, le=64, description="draws that are mixed into one round")


class FederateSettings(LocalSettings, ReadsOldKeys):
    """The keys of a federate stage, beside those of local training.

    `trainable` holds patterns of parameter names; only these parameters train and travel.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    renamed: ClassVar[tuple[Renamed, ...]] = (
        Renamed("sum", "secure", "aggregator", "secure"),
        Renamed("sum", "plain", "aggregator", None),
        Renamed("sum", "plain", "aggregator", "mean"),
    )

    kind: Literal["federate"]
    name: Name = "federate"
    num_rounds: int = Field(10, ge=0, description="rounds; 0 leaves the model as it is")
    cohort: int | None = Field(None, ge=1, description="clients in a round; all by default")
    sampling: Literal["fixed", "poisson", "cyclic"] = Field(
        "fixed",
        description="who takes part: a fixed number drawn in each round, each client by chance, or "
        "all in turn",
    )
    schedule: AnySchedule = Field(
        Synchronous(), description="when whom is asked, and when the server takes a step"
    )
    delays: AnyDelays | None = Field(
        None, description="how long clients take, on a virtual clock; at once without it"
    )
    weights: Literal["examples", "equal"] | None = Field(
        None, description="of the mean; examples by default, equal under client privacy"
    )
    server: Server = Field(
        Average(), description="optimizer of the server: average, momentum or adam"
    )
    algorithm: AnyAlgorithm | None = Field(
        None,
        description="what clients and server do with the model; FedAvg with `server` if left out",
    )
    proximal_mu: float = Field(
        0.0, ge=0, description="FedProx: strength of the pull back to the server's model"
    )
    trainable: tuple[str, ...] = Field(
        ("*",), description="patterns of parameter names; only these train and travel"
    )
    norm: Literal["frozen", "batch"] = Field(
        "frozen", description="statistics of batch norms: fixed, or those of each batch"
    )
    augment: Augment = Field(Augment(), description="random changes of training images")
    privacy: PrivacySettings | None = Field(
        None, description="what is promised about the clients' rows; nothing without this table"
    )
    uplink: tuple[AnyTransform, ...] = Field((), description="what makes an update small, in order")
    downlink: tuple[AnyTransform, ...] = Field(
        (),
        description="codes the difference to the model that clients hold; the whole model travels "
        "if "
        "empty",
    )
    first_downlink: tuple[AnyTransform, ...] = Field(
        (Quantize(bits=8),), description="codes the model itself for clients that hold nothing yet"
    )
    error_feedback: bool = Field(
        False, description="clients add what coding lost of one update to the next"
    )
    aggregator: AnyAggregator | None = Field(
        None,
        description="how the server makes one update of many: mean (if left out), secure (it "
        "learns "
        "the sum alone), "
        "median",
    )
    secure_keys: bool = Field(
        False,
        description="keys of a secure sum from the operating system's randomness; else they follow "
        "from the seed",
    )
    max_dropout: float = Field(
        1 / 3, ge=0, lt=0.5, description="share of a cohort that may vanish from a secure sum"
    )
    target_metric: float | None = Field(
        None, description="stop when the task's primary metric on the validation set reaches this"
    )
    target_accuracy: float | None = Field(
        None, gt=0, le=1, description="the name of target_metric in version 0.1"
    )
    patience: int = Field(
        0, ge=0, description="stop after so many rounds without a better one; 0 = never"
    )

    @model_validator(mode="after")
    def _one_place_for_algorithm(self) -> FederateSettings:
        """Refuses keys of version 0.1 beside a table of the algorithm, which may contradict it."""
        if self.algorithm is None:
            return self
        kind = self.algorithm.kind
        for key, unset in (("server", Average()), ("proximal_mu", 0.0)):
            if getattr(self, key) == unset:
                continue
            if key in type(self.algorithm).model_fields:
                cure = "write it into the table of the algorithm"
            else:
                cure = f"leave {key} out, which '{kind}' does not have"
            raise SettingError(f"it stands beside algorithm = '{kind}'", place=key, cure=cure)
        return self

    @property
    def target(self) -> float | None:
        """The value of the task's primary metric at which the rounds stop."""
        return self.target_metric if self.target_metric is not None else self.target_accuracy
