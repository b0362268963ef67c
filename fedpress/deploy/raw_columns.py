"""The preparation of a table inside an ONNX graph, which then has one named input for each column.

Numbers and truth values are float inputs [batch, 1], where NaN is a missing cell; words are string
inputs [batch, 1], where the empty text is one. The graph fills, encodes and standardises as
`fedpress.data.prepare` does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedpress.deploy.capture import BATCH, require
from fedpress.errors import Argument, ExportError, first_line

INSIDE = "preparation_inside"
"""Metadata key of files whose inputs are raw columns."""
INSIDE_OF = "preparation"
"""Metadata key of the JSON of the preparation, in every file."""
INPUT = (
    "one tensor [N, 1] for each column: float32, where NaN is a missing cell, or string, where the "
    "empty text is one"
)
"""What such a file takes, in words for the reader of its metadata."""
ML = "ai.onnx.ml"
"""The part of ONNX that has operations on words."""
ML_VERSION = 2
"""Its first version whose `LabelEncoder` maps text to numbers."""
NETWORK = "network/"
"""Prefix of all names of the network in the graph; a column may have any of these names."""
PARTS = {
    "series": "windows over a series",
    "text": "texts",
    "audio": "recordings",
    "image": "images",
}
"""Keys of a preparation's JSON that say another kind than rows of a table -> what it is."""


@dataclass(frozen=True)
class RawColumn:
    """One column.

    Attributes:
        name: its name, and that of the input.
        words: its words, in the order of their inputs; None for numbers and truth values.
        fill: value of each input for a missing cell; empty: NaN, so that the outputs are NaN.
        unknown: values of the inputs for a word that is not listed; empty: NaN.
    """

    name: str
    words: tuple[str, ...] | None
    fill: tuple[float, ...]
    unknown: tuple[float, ...] = ()

    @property
    def width(self) -> int:
        """Number of inputs of the network that the column becomes."""
        return 1 if self.words is None else len(self.words)

    @property
    def stranger(self) -> str:
        """A word that is not listed and does not mean a missing cell."""
        word = "<unknown>"
        while word in (self.words or ()):
            word += ">"
        return word


@dataclass(frozen=True)
class RawColumns:
    """All columns of a table, and the standardisation.

    Attributes:
        columns: the columns, in the order of their inputs.
        gaps: texts that mean a missing word, beside the empty one.
        mean: mean of each input of the network.
        std: standard deviation of each input of the network.
        content: the JSON from which all this was read.
    """

    columns: tuple[RawColumn, ...]
    gaps: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    content: Mapping[str, Any]

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> RawColumns:
        """Reads the JSON of a preparation (`fedpress.data.Preparation.to_json`).

        Raises:
            ExportError: if it cannot be inside of a graph; the error says why.
        """
        if not content:
            raise _not_inside("the data do not say how raw rows become inputs of the model")
        for key, what in PARTS.items():
            if key in content:
                raise _not_inside(
                    f"the model takes {what}, and only rows of a table can be prepared inside a file"
                )
        columns = tuple(_column(line) for line in content["columns"])
        return cls(
            # A column without words has no input of the network.
            tuple(column for column in columns if column.width),
            tuple(content["gaps"]),
            tuple(content["mean"]),
            tuple(content["std"]),
            content,
        )

    @classmethod
    def of_file(cls, metadata: Mapping[str, str], path: str) -> RawColumns | None:
        """Reads the metadata of a file; None if the file takes prepared inputs.

        Raises:
            ExportError: if the metadata are corrupt.
        """
        if INSIDE not in metadata:
            return None
        try:
            return cls.of(json.loads(metadata[INSIDE_OF]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ExportError(
                f"the metadata of {path} are corrupt ({first_line(error)})",
                place="path",
                cure="export it again",
            ) from error

    def metadata(self) -> dict[str, str]:
        """Returns the entries of the file's metadata, which `of_file` reads."""
        told = {"input": INPUT, "standardised_by_the_file": True}
        return {
            INSIDE: "true",
            INSIDE_OF: json.dumps({**self.content, **told}),
            "input": INPUT,
        }

    @property
    def names(self) -> list[str]:
        """Names of the inputs of the graph."""
        return [column.name for column in self.columns]

    def arrays(self, x: np.ndarray) -> list[np.ndarray]:
        """Returns raw columns that become the standardised inputs `x` [n, d], up to rounding.

        It is used to measure a file with examples that are prepared already.

        Raises:
            ExportError: if `x` has another shape.
        """
        if x.ndim != 2 or x.shape[1] != len(self.mean):
            raise ExportError(
                f"got an array of shape {list(x.shape)}",
                place="x",
                cure=f"give the columns {', '.join(self.names)} by name, or standardised inputs "
                f"[n, {len(self.mean)}]",
            )
        raw = x.astype(np.float64) * np.array(self.std) + np.array(self.mean)
        found = []
        at = 0
        for column in self.columns:
            block = raw[:, at : at + column.width]
            at += column.width
            found.append(
                block.astype(np.float32) if column.words is None else _texts(block, column)
            )
        return found

    def insert_(self, proto: Any) -> None:
        """Puts the preparation in front of a network in an ONNX message with one input [batch, d].

        The names of the outputs stay; all other names get the prefix `NETWORK`.
        """
        onnx = require("onnx")["onnx"]
        prefixed = onnx.compose.add_prefix(
            proto, NETWORK, rename_inputs=True, rename_outputs=False, rename_functions=False
        )
        proto.CopyFrom(prefixed)
        graph = proto.graph
        target = graph.input[0].name
        del graph.input[:]
        nodes, blocks, inputs = [], [], []
        for number, column in enumerate(self.columns):
            kind = onnx.TensorProto.FLOAT if column.words is None else onnx.TensorProto.STRING
            inputs.append(onnx.helper.make_tensor_value_info(column.name, kind, [BATCH, 1]))
            made = self._nodes(column, f"{NETWORK}column_{number}", graph, onnx)
            nodes += made
            # A column of numbers without a fill is read as it is.
            blocks.append(made[-1].output[0] if made else column.name)
        rows, centred = f"{NETWORK}rows", f"{NETWORK}centred"
        mean = _constant(graph, onnx, f"{NETWORK}mean", np.array([self.mean], dtype=np.float32))
        std = _constant(graph, onnx, f"{NETWORK}std", np.array([self.std], dtype=np.float32))
        nodes += [
            onnx.helper.make_node("Concat", blocks, [rows], axis=1),
            onnx.helper.make_node("Sub", [rows, mean], [centred]),
            onnx.helper.make_node("Div", [centred, std], [target]),
        ]
        network = list(graph.node)
        del graph.node[:]
        graph.node.extend([*nodes, *network])
        graph.input.extend(inputs)
        if not any(one.domain == ML for one in proto.opset_import):
            proto.opset_import.append(onnx.helper.make_opsetid(ML, ML_VERSION))

    def _nodes(self, column: RawColumn, name: str, graph: Any, onnx: Any) -> list[Any]:
        """Returns the nodes that turn one column into its inputs; the last has the result."""
        if column.words is None:
            if not column.fill:
                return []
            fill = _constant(graph, onnx, f"{name}_fill", np.array([column.fill], dtype=np.float32))
            return [
                onnx.helper.make_node("IsNaN", [column.name], [f"{name}_gaps"]),
                onnx.helper.make_node("Where", [f"{name}_gaps", fill, column.name], [name]),
            ]
        count = len(column.words)
        nothing = (np.nan,) * count
        # A row for each word, one for a missing cell, and one for any other word.
        rows = [*np.eye(count).tolist(), column.fill or nothing, column.unknown or nothing]
        table = _constant(graph, onnx, f"{name}_table", np.array(rows, dtype=np.float32))
        gaps = [gap for gap in dict.fromkeys(("", *self.gaps)) if gap not in column.words]
        numbers = [*range(count), *[count] * len(gaps)]
        encode = onnx.helper.make_node(
            "LabelEncoder",
            [column.name],
            [f"{name}_numbers"],
            domain=ML,
            keys_strings=[*column.words, *gaps],
            values_int64s=numbers,
            default_int64=count + 1,
        )
        flat = _constant(graph, onnx, f"{name}_flat", np.array([-1], dtype=np.int64))
        return [
            encode,
            onnx.helper.make_node("Reshape", [f"{name}_numbers", flat], [f"{name}_rows"]),
            onnx.helper.make_node("Gather", [table, f"{name}_rows"], [name], axis=0),
        ]


def _column(line: Mapping[str, Any]) -> RawColumn:
    """Reads a column of the JSON.

    Raises:
        ExportError: if it cannot be an input of a graph.
    """
    name, kind, fill = line["name"], line["kind"], tuple(line["fill"] or ())
    if not name:
        raise _not_inside("a column without a name cannot be an input", "give it a name")
    if kind in ("number", "truth"):
        return RawColumn(name, None, fill)
    if kind != "words":
        raise _not_inside(
            f"column '{name}' is of the kind {kind}, which cannot be prepared inside a file",
            "name it in drop_columns",
        )
    words = tuple(line["words"])
    if "" in words:
        raise _not_inside(
            f"column '{name}' has the empty text as a word, which inside a file is a missing cell",
            "write another word for it in the table",
        )
    unknown = {
        "zeros": (0.0,) * len(words),
        "other": tuple(float(word == "other") for word in words),
        # Training leaves such rows out.
        "refused": (),
    }
    return RawColumn(name, words, fill, unknown[line["unknown"]])


def _not_inside(problem: str, cure: str = "") -> ExportError:
    """Returns the error for a preparation that cannot be inside; `cure`: another way to follow."""
    return ExportError(
        problem,
        place="preparation",
        cure=(f"{cure}, or give " if cure else "give ", Argument("preparation", "beside")),
    )


def _texts(block: np.ndarray, column: RawColumn) -> np.ndarray:
    """Returns the words [n, 1] that become the inputs `block` [n, k]."""
    assert column.words is not None, "checked by the caller"
    words = np.array([*column.words, "", column.stranger], dtype=object)
    which = block.argmax(1)
    if column.unknown and not any(column.unknown):
        which[block.max(1) < 0.5] = len(column.words) + 1
    if column.fill:
        which[np.abs(block - np.array(column.fill)).max(1) < 1e-3] = len(column.words)
    found: np.ndarray = words[which][:, None]
    return found


def _constant(graph: Any, onnx: Any, name: str, value: np.ndarray) -> str:
    """Adds a constant to the graph, and returns its name."""
    graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    return name
