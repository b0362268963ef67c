"""The base class of stages: `check`, `run`, and the properties of each kind of stage."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Generator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import JsonValue

from fedpress.workspace.stage_folder import StageFolder
from fedpress.workspace.state import State, Tick

DIFFERENCES = "told"
"""Fact of a stage: setting -> a sentence that says how the result differs from it. Example:
{"keep_params": "0.5066, the nearest to 0.5 that the widths allow"}. Files since version 0.1 have
the key "told"."""


class Stage:
    """Base of the settings classes, one for each kind of stage.

    The fields of a settings class are the keys of its `[[stage]]` table. `check` finds errors
    before the run, and `run` does the work. A class sets only those attributes in which it differs
    from most kinds.

    Attributes:
        changes_model: whether the model after the stage differs from the one before it.
        reports_artifact: whether accuracy, size and latency in the stage's result are those of the
            file that it wrote for a device, not those of the torch model.
        repeats_measurements: whether accuracy and costs are copied from the previous stage's
            result. The measure stage measures by itself, so it needs no second measurement.
        simulates_device: whether torch only simulates what a device will compute (quantization).
            If the model is exported later, the accuracy of the file replaces the one from torch.
        uses_data_standardization: whether inputs are standardised by the mean and std of the data,
            even if a loaded model was trained with other ones.
        needs_buildable_spec: whether its output is read by building the model from its spec. Models
            that only exist in memory have no such spec and are refused.
        several_inputs: whether it accepts models whose forward takes several inputs.
        needs_clients: whether it trains on the clients' private examples.
        requires_one_of: keys of which a command must be given one, because no default suits every
            model. Example: `keep_params` or `keep_macs` for prune.
        defaults_without_data: key -> default if a command is given no data.
        saved_models: key that takes the path of a saved model -> values that are not paths.
            Example: `teacher` -> ("dense", "before").
        places: argument of a called function -> key of this stage, so that the function's errors
            name the key. Example: {"chain": "uplink"}.
    """

    changes_model: ClassVar[bool] = True
    reports_artifact: ClassVar[bool] = False
    repeats_measurements: ClassVar[bool] = False
    simulates_device: ClassVar[bool] = False
    uses_data_standardization: ClassVar[bool] = False
    needs_buildable_spec: ClassVar[bool] = False
    several_inputs: ClassVar[bool] = False
    needs_clients: ClassVar[bool] = False
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
        """Whether it guarantees differential privacy to the clients."""
        return False

    def setting_reading_labels(self) -> str:
        """Returns the setting because of which the stage reads labels; empty if it reads none.

        Example: 'score = "taylor"'. A stage that always reads labels returns its kind.
        """
        return ""

    @abstractmethod
    def check(self, state: State) -> tuple[State, dict[str, Any]]:
        """Finds all errors that would stop the run, without doing the work.

        Returns:
            The state after the stage (its shapes are right, its weights are not), and facts for
            `fedpress check`.
        """

    @abstractmethod
    def run(self, state: State, folder: StageFolder) -> Generator[Tick, None, State]:
        """Does the work; it continues from the last checkpoint in `folder`, if there is one.

        Yields:
            Progress.

        Returns:
            The new state.
        """
