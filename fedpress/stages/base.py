"""The base class of stages; a stage is one step of a recipe, such as `prune` or `federate`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Generator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import JsonValue

from fedpress.core.canonical import JSON
from fedpress.data import Preparation
from fedpress.data.settings import DataSettings
from fedpress.workspace.stage_folder import StageFolder
from fedpress.workspace.state import State, Tick

if TYPE_CHECKING:
    from fedpress.stages.federate.terms import Terms

DIFFERENCES = "told"
"""Key in the result of a stage. Its value maps a setting to a sentence on how the result differs
from this setting. Example: {"keep_params": "0.5066, the nearest to 0.5 that the widths allow"}. All
files since version 0.1 have the key "told", so it must stay."""


class Stage:
    """Base class of all settings classes; each kind of stage has one settings class.

    The fields of a settings class are the keys of its `[[stage]]` table in a recipe. `check` finds
    errors before the run, and `run` does the work. Most kinds of stages need few of the attributes
    below, so each has a default.

    Attributes:
        changes_model: whether the stage changes the model.
        reports_artifact: whether accuracy, size and latency in the result are measured on the file
            that the stage wrote for a device, and not on the torch model.
        repeats_measurements: whether the result has the accuracy and costs of the previous stage's
            result, because this stage does not change the model.
        simulates_device: whether torch only simulates what a device will compute, as after
            quantization. If the model is exported later, the accuracy of the exported file replaces
            the accuracy in torch.
        uses_data_standardization: whether inputs are standardised by the mean and std of the data,
            even if a loaded model was trained with another mean and std.
        needs_buildable_spec: whether the file that the stage writes is read by building the model
            from its spec. A model that only exists in memory has no such spec and is refused.
        several_inputs: whether the stage accepts models whose forward takes several inputs.
        needs_clients: whether the stage trains on the clients' private examples.
        gives_statistics: whether the stage completes data whose statistics come from a private
            query (`FederatedData.awaits_statistics`). Then it must be the first stage.
        requires_one_of: keys of which the user of a command must give one, because no default suits
            every model. Example: `keep_params` or `keep_macs` for prune.
        defaults_without_data: key -> its default if a command is given no data.
        saved_models: key whose value is the path of a saved model -> values that are not paths.
            Example: `teacher` -> ("dense", "before").
        places: argument of a function that the stage calls -> key of the stage. So errors of the
            function name the key. Example: {"chain": "uplink"}.
    """

    changes_model: ClassVar[bool] = True
    reports_artifact: ClassVar[bool] = False
    repeats_measurements: ClassVar[bool] = False
    simulates_device: ClassVar[bool] = False
    uses_data_standardization: ClassVar[bool] = False
    needs_buildable_spec: ClassVar[bool] = False
    several_inputs: ClassVar[bool] = False
    needs_clients: ClassVar[bool] = False
    gives_statistics: ClassVar[bool] = False
    requires_one_of: ClassVar[tuple[str, ...]] = ()
    defaults_without_data: ClassVar[Mapping[str, JsonValue]] = {}
    saved_models: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    places: ClassVar[Mapping[str, str]] = {}

    # For type checkers only: the settings classes declare both as pydantic fields, and pydantic
    # would take a declaration here for a field of every class.
    if TYPE_CHECKING:

        @property
        def kind(self) -> str:
            """Kind of the stage in the table of stages, such as "prune"."""

        @property
        def name(self) -> str:
            """Name of the stage, unique in the recipe."""

    @property
    def private(self) -> bool:
        """Whether the stage guarantees differential privacy to the clients."""
        return False

    @property
    def hides_clients(self) -> bool:
        """Whether nobody may learn what a single client holds: by privacy, or by a secure sum."""
        return self.private

    def prepared_shape(self, about: Preparation) -> Preparation:
        """Returns how rows are prepared after the stage: the inputs are known, not the numbers.

        Args:
            about: how they are prepared before the stage.
        """
        return about

    def terms(
        self, architecture: str, arguments: Mapping[str, JSON], data: DataSettings
    ) -> Terms | None:
        """Returns what the stage asks of the owners of the clients' data; None: nothing.

        Args:
            architecture: name of the recipe's architecture.
            arguments: its arguments.
            data: the `[data]` table of the recipe. The data themselves are not read.
        """
        return None

    def setting_reading_labels(self) -> str:
        """Returns the setting because of which the stage reads labels, such as 'score = "taylor"'.

        A stage that always reads labels returns its kind. A stage that reads none returns "".
        """
        return ""

    @abstractmethod
    def check(self, state: State) -> tuple[State, dict[str, Any]]:
        """Finds errors that would stop the run, without doing the work.

        Args:
            state: model, data, seed, device and ledger (the privacy costs so far) before the stage.

        Returns:
            The state after the stage: its model has the right shapes, but not the final weights.
            And the results that are known before the run, such as `epsilon`; `fedpress check` shows
            them.
        """

    @abstractmethod
    def run(self, state: State, folder: StageFolder) -> Generator[Tick, None, State]:
        """Does the work, from the last checkpoint in `folder` if there is one.

        Args:
            state: model, data, seed, device and ledger (the privacy costs so far) before the stage.
            folder: the stage's folder in the run folder.

        Yields:
            The progress, such as 3 of 10 steps.

        Returns:
            The state after the stage.
        """
