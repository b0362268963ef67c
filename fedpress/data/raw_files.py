"""Reads recordings and images that are to be predicted, as those of the training were read."""

from __future__ import annotations

from typing import Any

from fedpress.data import audio, folders
from fedpress.data.preparation import Preparation
from fedpress.data.preparation_parts import AudioPart, ImagePart
from fedpress.data.raw_inputs import RawInputs, UnknownWords, files_of
from fedpress.errors import DataError


def read_recordings(given: Any, about: Preparation, unknown: UnknownWords) -> RawInputs:
    """Makes log-mel spectrograms of a WAV file, a folder of them, or a list of files.

    Raises:
        DataError: if a file cannot be read, or has a sample rate that no public recording of the
            training had.
    """
    part = about.part
    assert isinstance(part, AudioPart), "checked by the caller"
    files, names = files_of(given, audio.ENDINGS, "recordings")
    places = [f"'{file}'" for file in files]
    for file, place in zip(files, places, strict=True):
        rate = audio.rate_of(file, place)
        if part.rates and rate not in part.rates:
            known = " or ".join(f"{one:,}" for one in part.rates)
            raise DataError(
                f"it has {rate:,} samples per second, the recordings of the training had {known}",
                place=place,
                cure=f"resample it, for instance with ffmpeg -i {file.name} -ar {part.rates[0]} "
                "new.wav",
            )
    return RawInputs(audio.spectrograms(files, part.settings, places), names={"file": names})


def read_images(given: Any, about: Preparation, unknown: UnknownWords) -> RawInputs:
    """Decodes an image, a folder of images, or a list of files.

    Raises:
        DataError: if a file cannot be read, or has another size and the training did not resize.
    """
    # Imported here, because other inputs do not need pillow.
    from fedpress.data import images

    part = about.part
    assert isinstance(part, ImagePart), "checked by the caller"
    files, names = files_of(given, folders.ENDINGS, "images")
    x = images.decode_as(files, part, lambda at: f"'{files[at]}'")
    return RawInputs(x, names={"file": names})
