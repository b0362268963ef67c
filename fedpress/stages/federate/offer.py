"""The offer: the message from which a client on another machine builds its side of a stage.

In a simulation, server and clients are built from one recipe. Over a network, clients have no
recipe, so the server sends them an offer first: settings, model and seed. An offer contains no
code. It describes the model by a spec (the name of an architecture, and its arguments) and tensors.
The client checks both like a file from an unknown source.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor, nn

from fedpress import __version__, tasks
from fedpress.core import consent
from fedpress.core.canonical import JSON
from fedpress.core.examples import Preprocess
from fedpress.core.random import STREAMS, derive
from fedpress.core.settings import SETTINGS
from fedpress.data.reading import Reading
from fedpress.errors import FedpressError, WireError
from fedpress.federation.protocol import read_text, text_tensor
from fedpress.models import ModelSpec
from fedpress.stages.federate.contract import CommonInputs
from fedpress.stages.federate.flat_model import Entry, join, split
from fedpress.stages.federate.settings import FederateSettings
from fedpress.stages.federate.terms import Terms, terms_of_offer
from fedpress.tasks import Task
from fedpress.wire.message import Message

# Entries of the message: three JSON texts, and the model's vectors (see `flat_model`).
TEXTS = ("settings", "spec", "facts")


def code_named(message: Message) -> list[str]:
    """Returns the names of the user code of an offer: of its model, and of its task.

    A name is `module:function` or `module:Class`. The list is empty if no user code is needed, or
    the offer cannot be read. In the second case `Offer.from_message` raises the error. Only names
    are read; nothing is imported.
    """
    try:
        spec = json.loads(read_text(message, "spec"))
        facts = json.loads(read_text(message, "facts"))
        # The spec may name a task too, and it must be no other one.
        tasks_named = [spec.get("task", {}).get("kind"), facts["task"].get("kind")]
        named = [spec["architecture"], *tasks_named]
    except (WireError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []
    own = [name for name in named if isinstance(name, str) and consent.NAME.fullmatch(name)]
    return list(dict.fromkeys(own))


class OfferedStage(FederateSettings):
    """The settings of a federate stage as a client gets them. The class cannot run the stage."""


class _Facts(BaseModel):
    """Further entries of the offer, in addition to settings and model."""

    model_config = SETTINGS

    fedpress: str
    streams: int
    seed: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    task: dict[str, Any]
    inputs: dict[str, Any] | None
    labels: tuple[str, ...]
    reading: Reading
    entries: tuple[Entry, ...]


@dataclass(frozen=True, eq=False)
class Offer:
    """The content of an offer.

    Attributes:
        stage: settings of the federate stage.
        spec: spec of the model.
        tensors: name -> parameter or buffer of the model. They share memory with the model or the
            message that the offer comes from.
        seed: seed of the stage.
        preprocess: standardisation of raw examples, fitted on the server's public examples.
        task: loss and metrics.
        inputs: how columns of a table become inputs (see `Preparation.to_json`); None for data that
            are not tables.
        labels: columns to predict, for a table.
        reading: how a table is read, such as its delimiter.
        fedpress: version of fedpress on the server.
        streams: version of the server's random streams. Other versions draw other numbers.
    """

    stage: FederateSettings
    spec: ModelSpec
    tensors: dict[str, Tensor]
    seed: int
    preprocess: Preprocess
    task: Task
    inputs: dict[str, Any] | None = None
    labels: tuple[str, ...] = ()
    reading: Reading = field(default_factory=Reading)
    fedpress: str = __version__
    streams: int = STREAMS

    @classmethod
    def of(
        cls,
        stage: FederateSettings,
        spec: ModelSpec,
        model: nn.Module,
        *,
        preprocess: Preprocess,
        task: Task,
        seed: int,
        inputs: dict[str, Any] | None = None,
        labels: tuple[str, ...] = (),
        reading: Reading | None = None,
    ) -> Offer:
        """Creates the server's offer.

        Args:
            stage: settings of the federate stage.
            spec: spec of the model.
            model: the model; its tensors are not copied, so do not change them while the offer is
                used.
            preprocess: standardisation of raw examples.
            task: loss and metrics.
            seed: seed of the run, from which the seed of the stage is derived.
            inputs: how columns of a table become inputs.
            labels: columns to predict, for a table.
            reading: how a table is read; None: as by default.
        """
        tensors = {}
        for name, tensor in model.state_dict().items():
            tensors[name] = tensor.detach().to("cpu")
        settings = FederateSettings.model_validate(stage.model_dump())
        # Clients get only the stage's seed: from the run's seed they could compute other stages'
        # noise.
        own = derive(seed, "federate", stage.name)
        # The preparation travels as `inputs`, of this server's data.
        spec = spec.model_copy(update={"preparation": {}})
        how = reading or Reading()
        return cls(settings, spec, tensors, own, preprocess, task, inputs, labels, how)

    def to_message(self, header: dict[str, JSON]) -> Message:
        """Returns the offer as a message with the entries of `header`."""
        entries, vectors = join(self.tensors)
        facts = _Facts(
            fedpress=self.fedpress,
            streams=self.streams,
            # As text: other JSON readers turn integers above 2^53 into floats.
            seed=str(self.seed),
            mean=self.preprocess.mean,
            std=self.preprocess.std,
            task=self.task.to_json(),
            inputs=self.inputs,
            labels=self.labels,
            reading=self.reading,
            entries=entries,
        )
        return Message(
            "offer",
            header,
            {
                "settings": text_tensor(self.stage.model_dump_json()),
                "spec": text_tensor(self.spec.model_dump_json()),
                "facts": text_tensor(facts.model_dump_json()),
                **vectors,
            },
        )

    @classmethod
    def from_message(cls, message: Message) -> Offer:
        """Reads an offer from an untrusted server; no code is imported or called.

        Raises:
            WireError: if an entry is invalid, or the model or the task would need code that this
                client has not allowed.
        """
        texts = {name: read_text(message, name) for name in TEXTS}
        place = ""
        try:
            place = "facts"
            facts = _Facts.model_validate_json(texts[place])
            place = "settings"
            stage = FederateSettings.model_validate_json(texts[place])
            place = "spec"
            spec = ModelSpec.of_file(texts[place])
            place = "facts.task"
            task = tasks.of_model(facts.task, spec.class_names)
            place = "facts.mean"
            preprocess = Preprocess(facts.mean, facts.std)
            place = "model"
            tensors = split(facts.entries, message.tensors)
            place = "facts.seed"
            seed = int(facts.seed)
        except FedpressError as error:
            raise WireError(error.problem, place=f"offer.{place}", cure=error.cure) from error
        # A malicious message may contain anything. The client must answer with an error and keep
        # running.
        except (ValidationError, ValueError, TypeError) as error:
            said = " ".join(str(error).split())[:300]
            cure = "use the same fedpress on both sides"
            raise WireError(said, place=f"offer.{place}", cure=cure) from error
        return cls(
            stage,
            spec,
            tensors,
            seed,
            preprocess,
            task,
            facts.inputs,
            facts.labels,
            facts.reading,
            facts.fedpress,
            facts.streams,
        )

    def common(self, device: torch.device | None = None) -> CommonInputs:
        """Builds the model, and returns everything that a client needs to take part in the stage.

        Raises:
            WireError: if the server has another version of the random streams, the model cannot be
                built from the spec, or the tensors do not fit it.
        """
        # Other streams give other noise and other batches than the server has planned.
        if self.streams != STREAMS:
            raise WireError(
                f"the server draws random streams of version {self.streams}, this client {STREAMS}",
                place="offer.facts.streams",
                cure=f"install fedpress {self.fedpress} here, or this client's on the server",
            )
        try:
            model = self.spec.build_within_limits()
            model.load_state_dict(self.tensors)
        except FedpressError as error:
            raise WireError(error.problem, place="offer.spec", cure=error.cure) from error
        # Any exception, because a network built from an invalid spec may raise anything.
        except Exception as error:
            said = " ".join(str(error).split())[:300]
            cure = "use the same fedpress on both sides"
            raise WireError(said, place="offer.model", cure=cure) from error
        return CommonInputs.prepared(
            self.stage,
            self.spec,
            model,
            preprocess=self.preprocess,
            task=self.task,
            seed=self.seed,
            device=device,
        )

    @property
    def terms(self) -> Terms:
        """What the owner of a client's data agrees to: settings, architecture and labels.

        Weights and seed are not part of the terms. So the terms follow from a recipe alone, and
        owners can approve them before the run.
        """
        return terms_of_offer(
            self.stage,
            self.spec.architecture,
            self.spec.arguments,
            self.labels,
            task=self.task.kind,
            inputs=self.inputs,
        )

    @property
    def fingerprint(self) -> str:
        """Digest of `terms`, 16 hexadecimal digits."""
        return self.terms.fingerprint
