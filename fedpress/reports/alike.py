"""Which numbers of two stages may be compared: only those that were measured in the same way."""

from __future__ import annotations

from fedpress.reports import units
from fedpress.reports.reading import Json

FORMATS = {
    "onnx": "ONNX",
    "executorch": "ExecuTorch",
    "litert": "LiteRT",
    "openvino": "OpenVINO",
}


def changing_stages(stages: list[Json]) -> list[Json]:
    """Leaves out measure stages, whose lines repeat the one before.

    If there are no others, all stay.
    """
    return [stage for stage in stages if stage.get("kind") != "measure"] or stages


def examples_of(stage: Json) -> int | None:
    """Returns on how many examples a stage's metric was measured.

    None if a line does not say it (version 0.1).
    """
    found = units.number(stage.get("test_examples"))
    return None if found is None else int(found)


def same_test_set(one: Json, other: Json) -> bool:
    """Says whether the metrics of two stages were measured on as many examples.

    All stages of one run have the same test set; a model that came from elsewhere may have been
    measured on another.
    """
    return examples_of(one) == examples_of(other)


def common_examples(stages: list[Json]) -> int | None:
    """Returns on how many examples all these stages were measured.

    None if that differs or is not known.
    """
    found = {examples_of(stage) for stage in stages}
    return found.pop() if len(found) == 1 else None


def exported_format(stage: Json) -> str:
    """Returns the name of the format if the stage's file is one for a device; else an empty text.

    A device file holds the network's operations beside its numbers, so its size does not compare
    with that of the numbers alone.

    >>> exported_format({"format": "onnx", "artifact": "artifacts/model.onnx"}), exported_format({})
    ('ONNX', '')
    """
    given = stage.get("format")
    if not stage.get("artifact") or not isinstance(given, str):
        return ""
    return FORMATS.get(given, given)


def runtime_of(stage: Json) -> str:
    """Returns in which runtime the latency was measured; every stage measures it on one thread."""
    return str(stage.get("runtime") or "an unknown runtime")
