"""The settings of a federate stage: the keys of its table in a recipe, with ranges and defaults.

A federate stage trains the model by federated learning, with or without differential privacy.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import BaseModel, Field, model_validator

from fedpress.codecs import AnyTransform, Quantize
from fedpress.core.renamed import ReadsOldKeys, Renamed
from fedpress.core.settings import SETTINGS
from fedpress.errors import Argument, SettingError
from fedpress.federation import AnyAggregator, AnyAlgorithm, Average, LocalSettings
from fedpress.federation.algorithms.optimizers import Server
from fedpress.federation.delays import AnyDelays
from fedpress.federation.schedules import AnySchedule, Synchronous
from fedpress.privacy.adaptive import AdaptiveClip
from fedpress.training.augment import Augment
from fedpress.workspace.state import Name


class PromiseSettings(BaseModel):
    """What is protected, and who adds which noise: keys of `privacy` in every stage that has it."""

    model_config = SETTINGS

    # No default, because only the user can know what must be protected.
    unit: Literal["sample", "client"] = Field(
        description="what is protected: sample (one example) or client (all examples of a client)"
    )
    trust: Literal["local", "distributed", "central"] | None = Field(
        None,
        description="who adds the noise: local (each client), distributed (all clients together, "
        "in a secure sum), central (the server)",
    )
    # Should be well below 1 / (number of protected units). `fedpress.stages.federate.privacy`
    # refuses delta >= 1 / (number of units).
    delta: float = Field(
        1e-5, gt=0, lt=1, description="delta of (epsilon, delta)-differential privacy"
    )
    secure_noise: bool = Field(
        False,
        description="draw noise from the operating system's random numbers, and round it to a "
        "public grid; then a run cannot be repeated",
    )


class SecureSumSettings(BaseModel):
    """The keys of a secure sum: of every stage in which clients may add up what they send."""

    model_config = SETTINGS

    # Off by default, so that a simulation can be repeated bit by bit.
    secure_keys: bool = Field(
        False,
        description="draw the keys of a secure sum from the operating system; by default they "
        "follow from the seed",
    )
    # The noise of clients that drop out is missing in the sum. So with a larger share each client
    # must add more noise.
    max_dropout: float = Field(
        1 / 3,
        ge=0,
        lt=0.5,
        description="largest share of a round's clients whose drop-out does not make a secure sum "
        "fail",
    )


class PrivacySettings(PromiseSettings, ReadsOldKeys):
    """`[stage.privacy]`: differential privacy: the protected unit, who adds the noise, the budget.

    Give either `epsilon` or `noise_multiplier`. With `epsilon`, the noise is calibrated before the
    run so that earlier stages and all rounds together spend this epsilon. With `noise_multiplier`, the noise is fixed,
    and epsilon is computed from it.
    """

    model_config = SETTINGS
    # Recipes and run folders of older versions have trust = "secure", which is now "distributed".
    renamed: ClassVar[tuple[Renamed, ...]] = (Renamed("trust", "secure", "trust", "distributed"),)

    clip_norm: float = Field(
        1.0,
        gt=0,
        description="largest L2 norm of one unit's contribution (a gradient or an update); larger "
        "ones are scaled down",
    )
    epsilon: float | None = Field(
        None,
        gt=0,
        examples=[8.0],
        description="privacy budget of all rounds and of earlier stages; the noise is calibrated "
        "to it",
    )
    noise_multiplier: float | None = Field(
        None,
        gt=0,
        examples=[1.0],
        description="standard deviation of the noise / clip_norm, in place of epsilon",
    )
    adaptive: AdaptiveClip | None = Field(
        None, description="adapt the clip norm to the size of the updates (unit client)"
    )
    correlated: CorrelatedNoise | None = Field(
        None,
        description="noise correlated over the rounds, so that most of it cancels in the sum of "
        "all rounds (unit client, no Poisson sampling)",
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
        # Correlated noise cancels part of the noise of earlier rounds. This works only if the noise
        # of all rounds has the same scale.
        if self.adaptive is not None and self.correlated is not None:
            raise SettingError(
                "correlated noise needs one clip norm, and adaptive changes it",
                place="adaptive",
                cure="leave adaptive or correlated out",
            )
        return self


class CorrelatedNoise(BaseModel):
    """`[stage.privacy.correlated]`: noise correlated over the rounds by matrix factorisation.

    Choquette-Choo et al. 2023 (arXiv:2306.08153). The analysis needs a minimum number of rounds
    between two rounds of a client. Example: if a quarter of the clients takes part in each round, a
    client takes part in every 4th round at most.
    """

    model_config = SETTINGS

    # Each band costs a draw of noise in every round, and more bands hardly lower the error.
    bands: int = Field(
        16,
        ge=2,
        le=64,
        description="number of rounds whose noise is combined in the noise of each round",
    )


class FederateSettings(SecureSumSettings, LocalSettings, ReadsOldKeys):
    """The keys of a federate stage. The keys of local training are in `LocalSettings`."""

    model_config = SETTINGS
    renamed: ClassVar[tuple[Renamed, ...]] = (
        Renamed("sum", "secure", "aggregator", "secure"),
        Renamed("sum", "plain", "aggregator", None),
        Renamed("sum", "plain", "aggregator", "mean"),
    )

    kind: Literal["federate"]
    name: Name = "federate"
    num_rounds: int = Field(10, ge=0, description="number of rounds; 0 leaves the model unchanged")
    cohort: int | None = Field(
        None, ge=1, description="number of clients in a round; by default all"
    )
    sampling: Literal["fixed", "poisson", "cyclic"] = Field(
        "fixed",
        description="who takes part in a round: fixed (a random cohort of fixed size), poisson "
        "(each client with the same probability), cyclic (cohorts in turn)",
    )
    schedule: AnySchedule = Field(
        Synchronous(),
        description="when the server sends the model to a client, and after which answers it takes "
        "a step",
    )
    delays: AnyDelays | None = Field(
        None, description="simulated time that clients take; by default they answer at once"
    )
    weights: Literal["examples", "equal"] | None = Field(
        None,
        description="weights of the clients' mean: examples (by number of examples) or equal; the "
        "default is equal with privacy (except unit sample with trust local) or if the algorithm "
        "or aggregator needs it, else examples",
    )
    server: Server = Field(
        Average(), description="optimizer of the server: average, momentum or adam"
    )
    algorithm: AnyAlgorithm | None = Field(
        None,
        description="federated algorithm, such as fedprox or scaffold; by default FedAvg with the "
        "optimizer `server`",
    )
    proximal_mu: float = Field(
        0.0, ge=0, description="FedProx: weight of the squared distance to the server's model"
    )
    trainable: tuple[str, ...] = Field(
        ("*",),
        description="names of parameters that are trained and sent, * for anything; others are "
        "frozen",
    )
    norm: Literal["frozen", "batch"] = Field(
        "frozen", description="statistics of batch norms: fixed, or those of each batch"
    )
    augment: Augment = Field(Augment(), description="random changes of training images")
    privacy: PrivacySettings | None = Field(
        None, description="differential privacy for the clients; by default none"
    )
    uplink: tuple[AnyTransform, ...] = Field(
        (), description="codecs of the clients' updates, in order; by default float32"
    )
    downlink: tuple[AnyTransform, ...] = Field(
        (),
        description="codecs of the change that is sent to clients with an older model; by default "
        "the whole model is sent in float32",
    )
    # The first model is sent whole, so each value gets more bits than a small change would need.
    first_downlink: tuple[AnyTransform, ...] = Field(
        (Quantize(bits=8),),
        description="with downlink: codecs of the model that a client is sent the first time",
    )
    # Off by default: the client must store the error, and some codecs do not allow it.
    error_feedback: bool = Field(
        False, description="clients add the coding error of an update to their next one"
    )
    aggregator: AnyAggregator | None = Field(
        None,
        description="how the server combines updates: mean (the default), secure (it learns only "
        "the sum), median",
    )
    target_metric: float | None = Field(
        None, description="stop when the task's primary metric on the validation set reaches this"
    )
    # Recipes of version 0.1 still work.
    target_accuracy: float | None = Field(
        None, gt=0, le=1, description="name of target_metric in version 0.1, for accuracy"
    )
    patience: int = Field(
        0,
        ge=0,
        description="stop after this many rounds without a better validation score; 0 = never",
    )

    scored_clients: int = Field(
        1000,
        ge=0,
        description="number of clients, drawn at random, whose own examples measure the final "
        "model; all if there are fewer, 0 = none; never under privacy",
    )

    @model_validator(mode="after")
    def _one_place_for_algorithm(self) -> FederateSettings:
        """Refuses `server` and `proximal_mu` with `algorithm`, which they may contradict."""
        if self.algorithm is None:
            return self
        kind = self.algorithm.kind
        for key, unset in (("server", Average()), ("proximal_mu", 0.0)):
            # A key that is set to its default looks like a missing key, and changes nothing.
            if getattr(self, key) == unset:
                continue
            if key in type(self.algorithm).model_fields:
                cure = "write it into the table of the algorithm"
            else:
                cure = f"leave {key} out, which '{kind}' does not have"
            raise SettingError(
                f"it is given together with algorithm = '{kind}'", place=key, cure=cure
            )
        return self

    @property
    def target(self) -> float | None:
        """The value of the task's main metric at which the rounds stop; None: they do not."""
        return self.target_metric if self.target_metric is not None else self.target_accuracy
