"""Reads files from folders that name client and label, such as `client/label/image.png`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fedpress.core.examples import Arrays
from fedpress.data.classes import number_classes
from fedpress.data.examples import InputRows, Progress, SourceRows, TargetRows
from fedpress.data.paths import similar_path
from fedpress.data.settings import DataSettings
from fedpress.errors import DataError

# Endings of image files. Other files in the folders, such as notes, are ignored.
ENDINGS = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"))


@dataclass(frozen=True)
class LabelledFiles:
    """Files of all clients, with the labels that their folders name.

    Attributes:
        settings: the `[data]` table of the recipe.
        what: what the files are, such as "images".
        files: the files, in the order of their paths.
        owners: int64 [n]: position of each file's client in `owner_names`.
        owner_names: names of the clients.
    """

    settings: DataSettings
    what: str
    files: list[Path]
    owners: Tensor
    owner_names: tuple[str, ...]

    @property
    def places(self) -> list[str]:
        """Names of the files in errors.

        "*" replaces the label's folder: no error may show the label of a private file.
        """
        return [f"'{file.parent.parent / '*' / file.name}'" for file in self.files]

    def rows(self, inputs: Callable[[Tensor], InputRows]) -> SourceRows:
        """Returns the rows to split; `inputs` reads the files after the split."""
        path = self.settings.path
        assert path is not None, "checked by DataSettings"
        # Sorted, because the order in a folder is arbitrary.
        labels = sorted({file.parent.name for file in self.files})
        position = {label: i for i, label in enumerate(labels)}
        y = torch.tensor([position[file.parent.name] for file in self.files])

        def targets(public: Tensor) -> TargetRows:
            return number_classes(y, labels, public, self.settings, f"{self.what} of '{path}'")

        # The files are read later; until then `x` has their positions.
        rows = Arrays(torch.arange(len(y))[:, None], y)
        return SourceRows(
            path.name,
            rows,
            owners=self.owners,
            owner_names=self.owner_names,
            targets=targets,
            inputs=inputs,
        )


def labelled_files(
    settings: DataSettings, what: str, layout: str, endings: frozenset[str]
) -> LabelledFiles:
    """Finds the files in folders that name client and label.

    Args:
        settings: the `[data]` table of the recipe.
        what: what the files are, such as "images".
        layout: how they lie, such as "client/label/image.png", for errors.
        endings: endings of the files; other files are ignored.

    Raises:
        DataError: if there is no such folder, or a client has no files.
    """
    path = settings.path
    assert path is not None, "checked by DataSettings"
    source = f"source '{settings.source}'"
    if not path.is_dir():
        raise DataError(f"no folder '{path}'", place=source, cure=similar_path(path))
    files = {client.name: _files(client, endings) for client in _folders(path)}
    if not files:
        raise DataError(f"'{path}' holds no folders", place=source, cure=f"expected {layout}")
    every: list[Path] = []
    owner_of: list[int] = []
    for owner, (name, own) in enumerate(files.items()):
        if not own:
            raise DataError(
                f"client '{name}' has no {what} in '{path / name}'",
                place=source,
                cure=f"expected {layout.replace('client', name, 1)}, or remove the folder",
            )
        every.extend(own)
        owner_of.extend([owner] * len(own))
    return LabelledFiles(settings, what, every, torch.tensor(owner_of), tuple(files))


def read_folders(settings: DataSettings, progress: Progress | None) -> SourceRows:
    """Returns uint8 images [n, C, H, W] in the order of their paths.

    Images are decoded after the split into public and private rows, because the first public
    image decides the size and the number of channels; if no image is public, the first image does.
    Decoded images are never written to the cache folder, because they may be private.

    Raises:
        DataError: if there are no images, or a client has none. For an unreadable image the error
            comes later, when the image is decoded.
    """
    # Imported here, because other sources do not need pillow.
    from fedpress.data import images

    found = labelled_files(settings, "images", "client/label/image.png", ENDINGS)
    places = found.places

    def inputs(public: Tensor) -> InputRows:
        like = int(public.min()) if len(public) else 0
        x = images.decode(
            found.files,
            where=lambda number: places[number],
            size=settings.image_size,
            like=like,
            progress=progress,
        )
        return images.prepared(x, resized=settings.image_size is not None)

    return found.rows(inputs)


def _files(client: Path, endings: frozenset[str]) -> list[Path]:
    found = []
    for label in _folders(client):
        for file in sorted(label.iterdir()):
            if file.suffix.lower() in endings and not _is_hidden(file):
                found.append(file)
    return found


def _folders(path: Path) -> list[Path]:
    return sorted(child for child in path.iterdir() if child.is_dir() and not _is_hidden(child))


def _is_hidden(path: Path) -> bool:
    # Operating systems add such files to folders, for example .DS_Store.
    return path.name.startswith(".")
