"""Recognises files of other programs or formats, such as ONNX, that a user gives as a model.

The error about such a file then says how its model can be used in fedpress. A file is recognised by
its first bytes, or by the list of files in an archive. Nothing is unpickled, because a pickle may
run any code.
"""

from __future__ import annotations

import json
import pickletools
import shlex
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

from fedpress.errors import Argument, Shell, Words

# Number of bytes at the start of a file by which it is recognised.
HEAD = 4096
# At most this many bytes of a pickle are scanned. A state dict of 100,000 tensors has fewer.
LONGEST_PICKLE = 1 << 24
# The beginning of fedpress's own packed files contains these bytes.
FORMAT = b"fedpress packed model"
# The number at the beginning of files that torch.save wrote before version 1.6.
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
# Modules whose classes occur in the pickle of a state dict. A pickled network also has classes of
# other modules.
OF_TENSORS = (
    "collections",
    "torch",
    "torch._utils",
    "torch.storage",
    "torch._tensor",
    "numpy",
    "_codecs",
    "builtins",
    "__builtin__",
)

# Placeholder for the path of the file in the cures below.
HERE = "PATH OF THIS FILE"
# Parts of the advice that the errors below give.
BUILDER = Argument("model", "package.module:function")
GIVE_BUILDER = ("give what builds the network, with these weights: ", BUILDER, " and ")
WEIGHTS = (*GIVE_BUILDER, Argument("checkpoint", HERE))
SAVED_WEIGHTS: Words = (*GIVE_BUILDER, Argument("checkpoint", "weights.pt"))
SAVE_STATE_DICT = ("save a state dict with torch.save, then ", *SAVED_WEIGHTS)
EXPORTED = (
    "it cannot be pruned or trained any more: give the PyTorch model that it was exported from "
    "(fedpress measure takes the exported files that it can run)"
)
BUILD = ("write a function that returns the network as a torch.nn.Module, and give ", BUILDER)
BUILD_AGAIN = ("build it in PyTorch: ", *BUILD)
Finding = tuple[str, Words]
"""What a file is, such as "an ONNX file", and how its model can be used here."""


class Foreign(NamedTuple):
    """The two parts of the error about a file of another program.

    Attributes:
        what: the problem: what the file is, such as "'m.onnx' is an ONNX file".
        cure: the advice: how the file's model can be used in fedpress.
    """

    what: str
    cure: Words


def identify(path: Path) -> Foreign | None:
    """Recognises a file or folder of another program.

    Returns:
        What the file is, and how its model can be used in fedpress. None if the path does not
        exist or cannot be read, or if it may be a file or folder of fedpress.

    >>> identify(Path("no-such-file")) is None
    True
    """
    found: Finding | None = None
    try:
        if path.is_dir():
            found = _folder(path)
        elif path.is_file():
            found = _file(path)
    # The file cannot be read. The code that loads it later will report the reason.
    except (OSError, ValueError, RuntimeError, zipfile.BadZipFile):
        return None
    if found is None:
        return None
    what, cure = found
    parts = [cure] if isinstance(cure, str) else cure
    return Foreign(f"'{path}' is {what}", tuple(_with_path(part, str(path)) for part in parts))


def _with_path(part: str | Argument | Shell, path: str) -> str | Argument | Shell:
    if isinstance(part, str):
        return part.replace(HERE, shlex.quote(path))
    if isinstance(part, Argument) and part.value == HERE:
        return Argument(part.name, path)
    return part


def _file(path: Path) -> Finding | None:
    with open(path, "rb") as file:
        head = file.read(HEAD)
    if not head:
        return "an empty file", "copy it again"
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        try:
            return _zip(path)
        except zipfile.BadZipFile:
            return "a damaged archive (torch.save writes such archives)", "copy it again"
    # Content comes before the suffix, because a file may have any name.
    for matches, what, cure in BY_HEAD:
        if matches(head):
            return what, cure
    if _is_safetensors(head):
        return None if FORMAT in head else ("a state dict (safetensors)", WEIGHTS)
    # A pickle begins with the number of its protocol, 0 to 5.
    if head[:1] == b"\x80" and head[1:2] in b"\x00\x01\x02\x03\x04\x05":
        return _pickle(path)
    suffix = path.suffix.lower()
    if suffix in BY_SUFFIX:
        return BY_SUFFIX[suffix]
    # A damaged file of a kind that fedpress reads. The code that loads it will report the damage.
    if suffix == ".safetensors" or FORMAT in head:
        return None
    if path.name == "spec.json":
        return "a part of a model's folder", f"give the folder: {shlex.quote(str(path.parent))}"
    what = "text" if _is_text(head) else "of a kind that fedpress does not know"
    return (
        f"no model: it is {what}",
        ("give the folder of a model or of a run, or a packed file, or ", *BUILD),
    )


def _is_text(head: bytes) -> bool:
    return not any(byte < 32 and byte not in b"\t\n\r\f" for byte in head)


def _is_safetensors(head: bytes) -> bool:
    # The file begins with the size of its JSON header; 100 MB is the limit of safetensors itself.
    size = int.from_bytes(head[:8], "little")
    return 2 <= size <= 100_000_000 and head[8:9] == b"{"


def _is_onnx(head: bytes) -> bool:
    """Returns whether the first two protobuf fields are fields of an ONNX model.

    The first field is a version from 1 to 31; the second is producer, domain, graph or opset.
    """
    has_version = head[:1] == b"\x08" and 0 < head[1] < 32
    return has_version and head[2:3] in (b"\x12", b"\x1a", b"\x3a", b"\x42")


def _begins_with(magic: bytes) -> Callable[[bytes], bool]:
    return lambda head: head.startswith(magic)


BY_HEAD: tuple[tuple[Callable[[bytes], bool], str, Words], ...] = (
    (
        lambda head: head[4:8] == b"TFL3",
        "a LiteRT (TensorFlow Lite) file",
        EXPORTED,
    ),
    (
        lambda head: head[4:6] == b"ET" and head[6:8].isdigit(),
        "an ExecuTorch program",
        EXPORTED,
    ),
    (
        _begins_with(b"GGUF"),
        "a GGUF file of quantized weights",
        (*BUILD, " of the original weights"),
    ),
    (
        _begins_with(b"\x89HDF\r\n\x1a\n"),
        "an HDF5 file, as Keras writes them",
        BUILD_AGAIN,
    ),
    (
        _begins_with(b"\x93NUMPY"),
        "a numpy array",
        SAVE_STATE_DICT,
    ),
    (
        _is_onnx,
        "an ONNX file",
        EXPORTED,
    ),
    (
        lambda head: b"<net " in head and head.lstrip()[:1] == b"<",
        "an OpenVINO file",
        EXPORTED,
    ),
    (
        _begins_with(b"\x1f\x8b"),
        "a gzip file",
        "unpack it and give what is inside",
    ),
    (
        lambda head: head[257:262] == b"ustar",
        "a tar archive",
        "unpack it and give what is inside",
    ),
    (
        _begins_with(b"version https://git-lfs"),
        "a pointer of Git LFS, not the file itself",
        "fetch it with: git lfs pull",
    ),
)
"""Test of the first bytes, what such a file is, and how its model can be used here."""

BY_SUFFIX: dict[str, Finding] = {
    ".onnx": ("an ONNX file", EXPORTED),
    ".tflite": ("a damaged LiteRT (TensorFlow Lite) file", EXPORTED),
    ".pb": ("a TensorFlow graph", BUILD_AGAIN),
    ".py": ("a Python file", "give the function in it that builds the network: module:function"),
    ".toml": ("a recipe, not a model", f"start it with: fedpress run {HERE}"),
    ".bin": ("a file of weights without a description", BUILD),
}
"""Suffix -> what such a file is, and how its model can be used here; if `BY_HEAD` finds nothing."""


# Files that an archive of torch.export holds, in its two formats.
PROGRAM_FILES = {"archive_format", "models/model.json", "serialized_exported_program.json"}


def _zip(path: Path) -> Finding:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        # torch.save puts all files into one folder; the name of the folder is arbitrary.
        inner = {name.partition("/")[2] or name for name in names}
        if inner & PROGRAM_FILES:
            return "a program of torch.export", ("it cannot be split into layers: ", *BUILD)
        if "constants.pkl" in inner and any(name.startswith("code/") for name in inner):
            return (
                "a TorchScript archive",
                (
                    "its layers are compiled and cannot be pruned: ",
                    *BUILD,
                    f"; its weights are in torch.jit.load('{path}').state_dict()",
                ),
            )
        if "config.json" in names and any(name.endswith(".weights.h5") for name in names):
            return "a Keras archive", BUILD_AGAIN
        pickles = [name for name in names if name.endswith("data.pkl")]
        if not pickles:
            return "a zip archive", "unpack it and give what is inside"
        with archive.open(pickles[0]) as file:
            return _by_classes(_classes_in(file))


def _pickle(path: Path) -> Finding:
    with open(path, "rb") as file:
        numbers = [argument for _, argument, _ in _operations(file)]
        if LEGACY_MAGIC in numbers:
            # The file has four pickles: the magic number, the protocol version, facts about the
            # machine, and the object. The first was read above; two more are skipped.
            for _ in range(2):
                for _ in _operations(file):
                    pass
            return _by_classes(_classes_in(file))
        file.seek(0)
        names = _classes_in(file)
    if _own_classes(names):
        return _by_classes(names)
    return (
        "a Python pickle",
        (
            "save a state dict with torch.save(model.state_dict(), 'weights.pt'), then ",
            *SAVED_WEIGHTS,
        ),
    )


def _own_classes(names: set[str]) -> list[str]:
    """Returns the classes among `names` that no state dict has, sorted with the user's first."""
    own = []
    for name in names:
        if name.partition(" ")[0] not in OF_TENSORS:
            own.append(name.replace(" ", "."))
    return sorted(own, key=lambda name: (name.startswith("torch."), name))


def _by_classes(names: set[str]) -> Finding:
    own = _own_classes(names)
    if not own:
        return "a state dict, or a checkpoint that holds one", WEIGHTS
    return (
        f"a pickled object of classes such as {own[0]}, and opening it may run any code",
        (
            "where it was made, save the state dict with "
            "torch.save(model.state_dict(), 'weights.pt'), then ",
            *SAVED_WEIGHTS,
        ),
    )


def _classes_in(file: IO[bytes]) -> set[str]:
    """Returns `module name` of every class and function in the next pickle, without loading them.

    A pickle is a program for a stack machine. The instruction GLOBAL has module and name as its
    argument. STACK_GLOBAL takes both from the stack: they are the last two strings that were pushed
    or fetched from the memo.
    """
    found: set[str] = set()
    words: list[str] = []
    memo: dict[int, str] = {}
    for operation, argument, position in _operations(file):
        if position > LONGEST_PICKLE:
            break
        if operation == "GLOBAL":
            found.add(str(argument))
        elif operation == "STACK_GLOBAL":
            found.add(" ".join(words[-2:]))
        elif "UNICODE" in operation:
            words.append(str(argument))
        elif operation == "MEMOIZE":
            memo[len(memo)] = words[-1] if words else ""
        elif operation in ("BINGET", "LONG_BINGET") and argument in memo:
            words.append(memo[int(str(argument))])
    return found


def _operations(file: IO[bytes]) -> Iterator[tuple[str, object, int]]:
    for operation, argument, position in pickletools.genops(file):
        yield operation.name, argument, position or 0


def _folder(path: Path) -> Finding | None:
    names = {entry.name for entry in path.iterdir()}
    if not names:
        return "an empty folder", "give the folder of a model or of a run, or a packed file"
    if "sweep.json" in names:
        return "the folder of a sweep", "give one of the runs in its folder variants"
    if "spec.json" in names or "stages" in names:
        return None
    if "saved_model.pb" in names:
        return "a TensorFlow SavedModel", BUILD_AGAIN
    suffixes = (".safetensors", ".bin", ".pt", ".pth")
    weights = sorted(name for name in names if Path(name).suffix in suffixes)
    if "config.json" in names and weights:
        return _hub(path, weights[0])
    if weights:
        file = Argument("checkpoint", str(path / weights[0]))
        return f"a folder with the file of weights '{weights[0]}'", (*GIVE_BUILDER, file)
    if not names & {"settings.json", "recipe.toml", "result.json"}:
        return (
            "a folder without a model",
            "give the folder of a model or of a run, or a packed file",
        )
    return None


def _hub(path: Path, weights: str) -> Finding:
    """Describes a folder of the Hugging Face hub; the model class is read from its config.json."""
    try:
        config = json.loads((path / "config.json").read_text("utf-8"))
        # AutoModel finds the class itself, so it is the fallback.
        kinds = config.get("architectures") or ["AutoModel"]
        kind = str(kinds[0]) if isinstance(kinds, list) else "AutoModel"
    except (ValueError, AttributeError, IndexError, RecursionError):
        kind = "AutoModel"
    # The name comes from the file and is shown as code for the user to run, so it must be a plain
    # identifier.
    if not kind.isidentifier():
        kind = "AutoModel"
    call = f"transformers.{kind}.from_pretrained('{path}')"
    return (
        f"a model of the Hugging Face hub ({kind}, {weights})",
        (f"write a function that returns {call}, and give ", BUILDER),
    )
