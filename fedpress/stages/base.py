"""What a stage is, and what the recipe, the runner and the command line ask about its kind."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Generator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import JsonValue

from fedpress.workspace.stage_folder import StageFolder
from fedpress.workspace.state import State, Tick


class Stage:
    """Base of the settings classes: frozen settings (the recipe's keys), `check` and `run`.

    A class overrides only those of the attributes below in which its kind differs from most.

    Attributes:
        changes_model: whether the model after the stage differs from the one before it.
        reports_artifact: whether accuracy, size and latency in the stage's line of the result are
            those of the file that it has written for a device, not those of the torch model.
        repeats_measurements: whether accuracy and costs are copied from the previous stage's
            line. The measure stage does its own measuring, so it needs no second measurement.
        simulates_device: whether torch only simulates what a device will compute (quantization).
            If the model is exported later, the accuracy of the file replaces the one from torch.
        uses_data_standardization: whether inputs are standardised by the mean and std of the data,
            even where a model from elsewhere was trained with others.
        needs_buildable_spec: whether its output is opened by building the model from its spec, so
            that the spec must be able to do that.
        several_inputs: whether it accepts models whose forward takes several inputs.
        needs_clients: whether it learns from the clients' private examples.
        requires_one_of: keys of which a command must be given one, because no default suits every
            model. Example: `keep_params` or `keep_macs` for prune.
        defaults_without_data: key -> value used instead of the default where there is no data.
        saved_models: key whose value may be the path of a saved model -> words that are not paths.
            Example: `teacher` -> ("dense", "before").
        places: argument of a function on a lower floor -> key of this stage that it comes from, so
            that an error names the key. Example: {"chain": "uplink"}.
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

    # The settings classes declare both as pydantic fields, `kind` with its own Literal type. A
    # declaration at run time would be taken for a field of every class.
    if TYPE_CHECKING:

        @property
        def kind(self) -> str:
            """The row of the table of stages: "prune", "federate" and so on."""

        @property
        def name(self) -> str:
            """Name of the stage in the recipe; unique there."""

    @property
    def private(self) -> bool:
        """Whether it promises differential privacy to the clients."""
        return False

    def setting_reading_labels(self) -> str:
        """Returns the setting by which the stage reads labels; empty if it reads none.

        It is the kind where the stage always reads labels, such as "train".
        """
        return ""

    @abstractmethod
    def check(self, state: State) -> tuple[State, dict[str, Any]]:
        """Finds everything that would stop the run, without doing the work.

        Returns:
            The state with the shapes that the run will give it, and facts to show.
        """

    @abstractmethod
    def run(self, state: State, folder: StageFolder) -> Generator[Tick, None, State]:
        """Does the work, from the last checkpoint in `folder` on.

        Yields:
            Progress.

        Returns:
            The new state.
        """
