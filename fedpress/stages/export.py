"""The export stage: writes the device artifact, runs it back, and measures it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from fedpress.deploy import Artifact, accuracy, export_onnx, latency, parity
from fedpress.folder import StageFolder
from fedpress.state import Name, State, Tick


class ExportStage(BaseModel):
    """`[[stage]] kind = "export"`: an ONNX file, compared with the model on real test images."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["export"]
    name: Name = "export"
    format: Literal["onnx"] = "onnx"
    parity_examples: int = Field(256, ge=1, description="test images on which artifact and model are compared")

    def check(self, state: State) -> tuple[State, dict[str, Any]]:
        """Exports the untrained model and throws the file away: what cannot be exported is refused before the run.

        Raises:
            ExportError: if the model cannot be exported.
        """
        with tempfile.TemporaryDirectory() as folder:
            artifact = self._export(state, Path(folder) / "model.onnx")
        return state, {"format": self.format, "file_bytes": artifact.file_bytes}

    def run(self, state: State, folder: StageFolder) -> Generator[Tick, None, State]:
        """Exports, compares with torch on real images, and measures accuracy and latency in onnxruntime."""
        yield Tick(0, 4, "writing ONNX")
        path = folder.run.path / "artifacts" / ("model.onnx" if self.name == "export" else f"{self.name}.onnx")
        path.parent.mkdir(exist_ok=True)
        model = state.model.to("cpu")
        artifact = self._export(state, path)
        yield Tick(1, 4, "comparing with torch")
        test = state.data.test
        x = state.data.preprocess(test.x[: self.parity_examples])
        same = parity(model, path, x)
        yield Tick(2, 4, "measuring accuracy")
        share = accuracy(path, test.x, test.y, state.data.preprocess)
        yield Tick(3, 4, "measuring latency")
        time = latency(path, state.spec.input_shape)
        yield Tick(4, 4)
        facts: dict[str, Any] = {
            "artifact": f"artifacts/{path.name}",
            "file_bytes": artifact.file_bytes,
            "accuracy": share,
            "latency_ms": time.median_ms,
            "latency_p10_ms": time.p10_ms,
            "latency_p90_ms": time.p90_ms,
            "runtime": "onnxruntime",
            "parity": {
                "max_abs_error": same.max_abs_error,
                "same_argmax_share": same.same_argmax_share,
                "examples": same.examples,
            },
        }
        return replace(state, model=model, facts=facts)

    def _export(self, state: State, path: Path) -> Artifact:
        return export_onnx(
            state.model,
            path,
            input_shape=state.spec.input_shape,
            preprocess=state.data.preprocess,
            metadata={"class_names": json.dumps(state.data.class_names)},
        )
