"""Reads the user's images from folders that name client and label: `client/label/image.png`."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from fedpress.core.examples import Arrays
from fedpress.data.classes import number_classes
from fedpress.data.examples import InputRows, Progress, SourceRows, TargetRows
from fedpress.data.settings import DataSettings
from fedpress.errors import DataError

# Endings of image files. Other files in the folders, such as notes, are ignored.
ENDINGS = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"))


def read_folders(settings: DataSettings, progress: Progress | None) -> SourceRows:
    """Returns uint8 images [n, C, H, W] in the order of their paths.

    Images are decoded after the split into public and private rows, because the first public
    image decides the size and the number of channels; if no image is public, the first image does.
    Decoded images are never written to the cache folder, because they may be private.

    Raises:
        DataError: if there are no images, or a client has none. For an unreadable image the error
            comes later, when the image is decoded.
    """
    assert settings.path is not None, "checked by DataSettings"
    if not settings.path.is_dir():
        raise DataError(
            f"no folder '{settings.path}'", place="source 'folders'", cure="check the path"
        )
    # Imported here, because other sources do not need pillow.
    from fedpress.data import images

    files = {client.name: _images(client) for client in _folders(settings.path)}
    if not files:
        raise DataError(
            f"'{settings.path}' holds no folders",
            place="source 'folders'",
            cure="expected client/label/image.png",
        )
    for name, own in files.items():
        if not own:
            raise DataError(
                f"client '{name}' has no images in '{settings.path / name}'",
                place="source 'folders'",
                cure=f"expected {name}/label/image.png, or remove the folder",
            )
    every: list[Path] = []
    owner_of: list[int] = []
    for owner, own in enumerate(files.values()):
        every.extend(own)
        owner_of.extend([owner] * len(own))
    # Sorted, because the order in a folder is arbitrary.
    labels = sorted({file.parent.name for file in every})

    def where(number: int) -> str:
        # "*" replaces the label's folder: no error may show the label of a private image.
        client = every[number].parent.parent
        return f"'{client / '*' / every[number].name}'"

    def inputs(public: Tensor) -> InputRows:
        like = int(public.min()) if len(public) else 0
        x = images.decode(
            every, where=where, size=settings.image_size, like=like, progress=progress
        )
        return InputRows(x, torch.zeros(len(x), dtype=torch.bool))

    position = {label: i for i, label in enumerate(labels)}
    y = torch.tensor([position[file.parent.name] for file in every])
    owners = torch.tensor(owner_of)

    def targets(public: Tensor) -> TargetRows:
        return number_classes(y, labels, public, settings, f"images of '{settings.path}'")

    # The images are decoded later; until then `x` has their positions.
    rows = Arrays(torch.arange(len(y))[:, None], y)
    names = tuple(files)
    return SourceRows(
        settings.path.name, rows, owners=owners, owner_names=names, targets=targets, inputs=inputs
    )


def _images(client: Path) -> list[Path]:
    found = []
    for label in _folders(client):
        for file in sorted(label.iterdir()):
            if file.suffix.lower() in ENDINGS and not _is_hidden(file):
                found.append(file)
    return found


def _folders(path: Path) -> list[Path]:
    return sorted(child for child in path.iterdir() if child.is_dir() and not _is_hidden(child))


def _is_hidden(path: Path) -> bool:
    # Operating systems add such files to folders, for example .DS_Store.
    return path.name.startswith(".")
