"""Decides which numbers of two stages may be compared, such as latencies in one runtime."""

from __future__ import annotations

from fedpress.reports import units
from fedpress.reports.reading import Json

# Key of a format in a recipe -> its name in sentences.
FORMATS = {
    "onnx": "ONNX",
    "executorch": "ExecuTorch",
    "litert": "LiteRT",
    "openvino": "OpenVINO",
}


def changing_stages(stages: list[Json]) -> list[Json]:
    """Returns all stages that are not of kind "measure".

    If every stage is of kind "measure", all are returned.
    """
    # A measure stage does not change the model. Its result repeats the numbers of the stage before.
    changing = [stage for stage in stages if stage.get("kind") != "measure"]
    return changing or stages


def examples_of(stage: Json) -> int | None:
    """Returns the number of test examples of a stage's metric; None where it is not recorded."""
    # Results of version 0.1 have no such number.
    found = units.number(stage.get("test_examples"))
    return None if found is None else int(found)


def same_test_set(one: Json, other: Json) -> bool:
    """Returns whether two stages were measured on equally many test examples."""
    # All stages of one run have the same test set. A model that was loaded from another run may
    # have been measured on another test set. Results show this only by the number of examples.
    return examples_of(one) == examples_of(other)


def common_examples(stages: list[Json]) -> int | None:
    """Returns the number of test examples if it is known and equal for all stages; else None."""
    found = {examples_of(stage) for stage in stages}
    return found.pop() if len(found) == 1 else None


def exported_format(stage: Json) -> str:
    """Returns the format of a stage's exported file, such as "ONNX"; "" if it exported none.

    An exported file contains the network's operations and its weights. So its size must not be
    compared with the size of a file that contains only weights.

    >>> exported_format({"format": "onnx", "artifact": "artifacts/model.onnx"}), exported_format({})
    ('ONNX', '')
    """
    given = stage.get("format")
    if not stage.get("artifact") or not isinstance(given, str):
        return ""
    return FORMATS.get(given, given)


def runtime_of(stage: Json) -> str:
    """Returns the runtime in which a stage's latency was measured, such as "onnxruntime".

    "an unknown runtime" if it is not recorded.
    """
    return str(stage.get("runtime") or "an unknown runtime")
