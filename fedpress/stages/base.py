"""What a stage is, and what the rest of the house asks about a kind of stage."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Generator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import JsonValue

from fedpress.workspace.stage_folder import StageFolder
from fedpress.workspace.state import State, Tick


class Stage:
    """Base of the settings classes: frozen settings whose fields are the recipe's keys, and what is done by them.

    Beside `check` and `run` a class states only in what its kind differs from most.

    Attributes:
        changes_model: its model is another one afterwards.
        tells_of_file: the accuracy, size and latency in its line are those of a file that it has written for a device.
        repeats_line: it measures by itself: the run is worth and costs what the line before says.
        simulates: torch simulates what a device will compute, so that an exported file's accuracy takes the place of
            the one that was measured here.
        learns_from_data: inputs must be standardised as the data are, and not as a model from elsewhere wants them.
        needs_rebuilding: what it leaves is opened by building the model anew.
        several_inputs: it takes models of several inputs.
        wants_one_of: keys of which a command must give one, since no default suits all.
        without_data: keys that take other values where there is no data to look at.
        saved_models: keys whose value may be the path of a saved model, and the words that are none.
        places: arguments of the floors below -> the key of this stage that they come from, where the words differ.
    """

    changes_model: ClassVar[bool] = True
    tells_of_file: ClassVar[bool] = False
    repeats_line: ClassVar[bool] = False
    simulates: ClassVar[bool] = False
    learns_from_data: ClassVar[bool] = False
    needs_rebuilding: ClassVar[bool] = False
    several_inputs: ClassVar[bool] = False
    wants_one_of: ClassVar[tuple[str, ...]] = ()
    without_data: ClassVar[Mapping[str, JsonValue]] = {}
    saved_models: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    places: ClassVar[Mapping[str, str]] = {}

    if TYPE_CHECKING:  # fields of the settings classes, each with its own kind as type

        @property
        def kind(self) -> str:
            """Which row of the table this is."""

        @property
        def name(self) -> str:
            """What this stage is called in the recipe, unlike any other there."""

    @property
    def private(self) -> bool:
        """Whether it promises something about the clients' rows."""
        return False

    def looks_at_labels(self) -> str:
        """Says which of its settings looks at labels: its kind if it always does, empty if none does."""
        return ""

    @abstractmethod
    def check(self, state: State) -> tuple[State, dict[str, Any]]:
        """Binds to `state` without doing the work: returns the state as it will be shaped, and facts to show."""

    @abstractmethod
    def run(self, state: State, folder: StageFolder) -> Generator[Tick, None, State]:
        """Does the work from the last checkpoint in `folder`; yields progress, returns the new state."""
