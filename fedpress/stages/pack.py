"""The pack stage: compresses the model into one file, from which the same weights can be read."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic import BaseModel

from fedpress import storage
from fedpress.core.settings import SETTINGS
from fedpress.stages import inputs
from fedpress.stages.base import Stage
from fedpress.workspace.atomic import writing
from fedpress.workspace.stage_folder import StageFolder
from fedpress.workspace.state import Name, State, Tick


class PackStage(BaseModel, Stage):
    """`[[stage]] kind = "pack"`: writes a packed (compressed) file to artifacts/, and checks it."""

    changes_model: ClassVar = False
    needs_buildable_spec: ClassVar = True

    model_config = SETTINGS

    kind: Literal["pack"]
    name: Name = "pack"

    def check(self, state: State) -> tuple[State, dict[str, Any]]:
        """Checks that the model can be rebuilt from its spec; packs nothing.

        Raises:
            ModelError: if the model cannot be rebuilt.
        """
        storage.check_packable(state.spec, state.model)
        return state, {}

    def run(self, state: State, folder: StageFolder) -> Generator[Tick, None, State]:
        """Packs the model, and unpacks the bytes again to check that the weights are the same."""
        yield Tick(0, 1, "packing")
        # A recipe may have two pack stages, which must not overwrite each other's file.
        name = "model" if self.name == "pack" else self.name
        path = folder.run / "artifacts" / f"{name}.packed.safetensors"
        model = state.model.to("cpu")
        with writing(path):
            path.parent.mkdir(exist_ok=True)
            packed = storage.pack(state.spec, model, path)
        inputs.write_preparation(state, folder.run / "artifacts", folder.run)
        yield Tick(1, 1)
        facts: dict[str, Any] = {
            "artifact": f"artifacts/{path.name}",
            "file_bytes": packed.file_bytes,
            "packed_bytes": dict(packed.kinds),
            "float_layers": dict(packed.float_layers),
            # `storage.pack` raises an error if the unpacked weights differ.
            "verified": True,
        }
        return replace(state, model=model, facts=facts)
