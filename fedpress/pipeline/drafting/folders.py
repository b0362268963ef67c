"""Drafts a recipe for a folder of images, recordings, texts or arrays, or for one such file."""

from __future__ import annotations

import json
import wave
from itertools import islice
from pathlib import Path
from typing import Any

from fedpress.core.inputs import is_image
from fedpress.core.random import derive
from fedpress.data import FederatedData, load
from fedpress.data.audio import ENDINGS as RECORDINGS
from fedpress.data.audio_settings import AudioSettings
from fedpress.data.folders import ENDINGS as IMAGES
from fedpress.data.settings import DataSettings
from fedpress.data.text import SPEAKER, SPEECH
from fedpress.errors import DataError
from fedpress.pipeline.drafting.base import Draft, name_of, relative

RECIPE = """name = {name}
description = {description}

[data]
source = {source}
path = {path}{keys}
public_share = 0.1  # of each client's {rows}, for training before the federation
{tables}
[model]
architecture = {network}{arguments}

[[stage]]
kind = "train"  # on the public {rows} alone
epochs = {epochs}
batch_size = 32
{optimizer}
[[stage]]
kind = "federate"  # on the private {rows}, which stay with their clients
num_rounds = {rounds}
batch_size = 32
{optimizer}
[[stage]]
kind = "export"  # artifacts/model.onnx
"""
SGD = "lr = 0.05\n"
ADAM = 'optimizer = "adam"\nlr = 0.005\n'
FOLLOWS = "  # its sizes follow from the data"

READER = '''"""A small network that reads tokens and predicts the next one."""

from torch import Tensor, nn


class Reader(nn.Module):
    """Takes token numbers [n, length], gives logits [n, num_classes, length]."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(num_classes, 32)
        self.read = nn.GRU(32, 128, batch_first=True)
        self.head = nn.Linear(128, num_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        states, _ = self.read(self.embed(tokens))
        return self.head(states).transpose(1, 2)
'''
# Files that are looked at, to find out what a folder holds.
MOST_FILES = 100_000
# An image is resized to a square with a side between these.
SMALLEST_SIDE, LARGEST_SIDE = 8, 64
# A spectrogram has so many bands and spectra: a square, which the network takes.
SIDE = 32
# Longer recordings are cut.
LONGEST_SECONDS = 2.0
# A text with so many speeches is a play, whose speakers are clients.
FEWEST_SPEECHES = 20


def of_folder(path: Path, folder: Path) -> Draft:
    """Drafts a recipe for a folder, by the files that it holds.

    Args:
        path: the folder.
        folder: folder of the recipe.

    Raises:
        DataError: if it holds no files that can be read.
    """
    images, recordings = _files(path, "*/*/*", IMAGES), _files(path, "*/*/*", RECORDINGS)
    if recordings and len(recordings) > len(images):
        return _of_recordings(path, recordings, folder)
    if images:
        return _of_images(path, images, folder)
    if _files(path, "*", {".npz", ".npy"}):
        return of_arrays(path, folder)
    if _files(path, "*", {".txt"}) or _files(path, "*/*", {".txt"}):
        return of_texts(path, folder)
    raise DataError(
        f"'{path}' has no images or recordings in folders client/label, no texts and no arrays",
        place="data",
        cure="expected client/label/image.png, client/label/sound.wav, client.txt or client.npz; "
        "with one owner: all/label/image.png",
    )


def _files(path: Path, pattern: str, endings: set[str] | frozenset[str]) -> list[Path]:
    found = islice(path.glob(pattern), MOST_FILES)
    return sorted(file for file in found if file.suffix.lower() in endings and file.is_file())


def _of_images(path: Path, files: list[Path], folder: Path) -> Draft:
    from PIL import Image

    with Image.open(files[0]) as image:
        side = max(SMALLEST_SIDE, min(LARGEST_SIDE, *image.size))
    size = f"\nimage_size = {side}  # all images are resized to squares of this side"
    text = _recipe(path, folder, "folders", "images", keys=size, network="cnn")
    return Draft(text, {}, (f"{len(files):,} images of {_clients(files)} clients",))


def _of_recordings(path: Path, files: list[Path], folder: Path) -> Draft:
    lengths = []
    rate = AudioSettings().sample_rate
    for file in files[:100]:
        try:
            with wave.open(str(file), "rb") as opened:
                rate = opened.getframerate()
                lengths.append(opened.getnframes() / rate)
        except (wave.Error, EOFError, OSError) as error:
            raise DataError(
                f"it cannot be read as a recording ({error})",
                place=f"'{file.parent.parent / '*' / file.name}'",
                cure="save it as WAV, or remove it",
            ) from error
    seconds = min(LONGEST_SECONDS, max(0.1, round(sorted(lengths)[len(lengths) // 2], 2)))
    table = _audio_table(rate, seconds)
    text = _recipe(path, folder, "audio", "recordings", network="cnn", tables=table)
    told = f"{len(files):,} recordings of {_clients(files)} clients, {seconds:g} s at {rate:,} Hz"
    return Draft(text, {}, (told,))


def _audio_table(rate: int, seconds: float) -> str:
    """Returns the table `[data.audio]` of spectrograms with as many bands as spectra."""
    # A spectrum is two hops long: 32 of them take 33 hops.
    hop = int(seconds * rate) // (SIDE + 1)
    keys = {"sample_rate": rate, "seconds": seconds, "mels": SIDE}
    keys |= {"window": round(2 * hop / rate, 6), "hop": round(hop / rate, 6)}
    assert AudioSettings.model_validate(keys).frames == SIDE
    why = {
        "sample_rate": "other rates are resampled",
        "seconds": "longer recordings are cut, shorter ones end in silence",
        "mels": "frequency bands",
        "window": "seconds of a spectrum",
        "hop": f"seconds between two: {SIDE} spectra",
    }
    lines = [f"{key} = {value}  # {why[key]}" for key, value in keys.items()]
    return "\n[data.audio]\n" + "\n".join(lines) + "\n"


def of_texts(path: Path, folder: Path) -> Draft:
    """Drafts a recipe for a text, or for a folder with a text or a folder for each client.

    Raises:
        DataError: if the texts cannot be read.
    """
    keys, told = "", "the clients are the files and folders of the folder"
    if path.is_file():
        if len(SPEECH.findall(path.read_text("utf-8", errors="replace"))) >= FEWEST_SPEECHES:
            keys = f'\nclient_column = "{SPEAKER}"  # each speaker of the play is a client'
            told = "the clients are the speakers of the play"
        else:
            keys = "\nnum_clients = 10  # the text names no clients: its parts are dealt"
            told = "client: none; parts of the text are dealt to 10 clients"
    length = '\n[data.text]\ntokens = "characters"  # or words\nlength = 40  # of a sequence\n'
    module = f"{name_of(path.stem).replace('-', '_').lower()}_net"
    # The vocabulary is that of the public texts, which the recipe's own seed chooses.
    given: dict[str, Any] = {"text": {"length": 40}}
    given |= {"client_column": SPEAKER} if SPEAKER in keys else {}
    given |= {"num_clients": 10} if "num_clients" in keys else {}
    found = _loaded("text", path, **given)
    arguments = (
        f"\narguments = {{ num_classes = {found.num_classes} }}  # the public texts' characters"
    )
    text = _recipe(
        path,
        folder,
        "text",
        "texts",
        keys=keys,
        network=f"{module}:Reader",
        arguments=arguments,
        tables=length,
        optimizer=ADAM,
    )
    return Draft(text, {f"{module}.py": READER}, (told, f"{module}.py: a small network, yours"))


def of_arrays(path: Path, folder: Path) -> Draft:
    """Drafts a recipe for a .npz file, or a folder of .npy or .npz files.

    Raises:
        DataError: if the arrays cannot be read, or have no usual names.
    """
    found = _loaded("numpy", path)
    x = found.public.x
    keys, network = "", "mlp"
    if is_image(x) and min(x.shape[2:]) >= SMALLEST_SIDE:
        network = "cnn"
        if x.shape[2] != x.shape[3]:
            side = min(LARGEST_SIDE, *x.shape[2:])
            keys = f"\nimage_size = {side}  # all images are resized to squares of this side"
    text = _recipe(path, folder, "numpy", "examples", keys=keys, network=network)
    parts = (*found.clients.values(), found.public, found.validation, found.test)
    count = sum(map(len, parts))
    told = f"{count:,} examples of {len(found.clients)} clients, task: {found.task.kind}"
    return Draft(text, {}, (told,))


def _loaded(source: str, path: Path, **keys: Any) -> FederatedData:
    """Returns the data as the drafted recipe will load them."""
    given = {"source": source, "path": path, "public_share": 0.1, **keys}
    return load(DataSettings.model_validate(given), derive(0, "data"))


def _recipe(
    path: Path,
    folder: Path,
    source: str,
    rows: str,
    *,
    keys: str = "",
    network: str,
    arguments: str = "",
    tables: str = "",
    optimizer: str = SGD,
) -> str:
    """Returns the text of a recipe; `keys` and `tables` are further lines of `[data]`."""
    return RECIPE.format(
        name=json.dumps(name_of(path.stem)),
        description=json.dumps(f"learns from {path.name}"),
        source=json.dumps(source),
        path=json.dumps(relative(path, folder)),
        rows=rows,
        keys=keys,
        tables=tables,
        network=json.dumps(network) + ("" if arguments else FOLLOWS),
        arguments=arguments,
        optimizer=optimizer,
        epochs=5,
        rounds=5,
    )


def _clients(files: list[Path]) -> int:
    return len({file.parent.parent for file in files})
