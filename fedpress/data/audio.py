"""Reads recordings from folders that name client and label: `client/label/sound.wav`."""

from __future__ import annotations

import wave
from collections.abc import Iterator
from contextlib import contextmanager
from math import gcd
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedpress.data.audio_settings import AudioSettings
from fedpress.data.examples import InputRows, Progress, SourceRows
from fedpress.data.folders import labelled_files
from fedpress.data.log_mel import log_mel
from fedpress.data.preparation import Preparation
from fedpress.data.preparation_parts import AudioPart
from fedpress.data.settings import DataSettings
from fedpress.errors import DataError

ENDINGS = frozenset((".wav", ".wave"))
"""Endings of sound files; other files are ignored."""
# Recordings that become spectrograms at once: enough for speed, few enough for the memory.
BATCH = 64


def read_audio(settings: DataSettings, progress: Progress | None) -> SourceRows:
    """Returns log-mel spectrograms, float32 [n, 1, mels, frames], in the order of their paths.

    Raises:
        DataError: if there are no recordings, a client has none, or a file cannot be read.
    """
    found = labelled_files(settings, "recordings", "client/label/sound.wav", ENDINGS)

    def inputs(public: Tensor) -> InputRows:
        x = spectrograms(found.files, settings.audio, found.places, progress)
        seen = {rate_of(found.files[at], found.places[at]) for at in public.tolist()}
        about = Preparation((), part=AudioPart(settings.audio, tuple(sorted(seen))))
        return InputRows(x, torch.zeros(len(x), dtype=torch.bool), about)

    return found.rows(inputs)


def spectrograms(
    files: list[Path],
    settings: AudioSettings,
    places: list[str],
    progress: Progress | None = None,
) -> Tensor:
    """Returns the log-mel spectrograms of recordings, float32 [n, 1, mels, frames].

    Args:
        files: WAV files.
        settings: length of a recording, and its spectrogram.
        places: names of the files in errors.
        progress: called with the number of files that have been read.

    Raises:
        DataError: if a file cannot be read.
    """
    x = torch.empty(len(files), settings.mels, settings.frames)
    for start in range(0, len(files), BATCH):
        chunk = range(start, min(start + BATCH, len(files)))
        waves = [read_wave(files[at], settings, places[at]) for at in chunk]
        x[start : chunk.stop] = log_mel(torch.from_numpy(np.stack(waves)), settings)
        if progress:
            progress("reading recordings", chunk.stop, len(files))
    return x[:, None]


def read_wave(path: Path, settings: AudioSettings, place: str) -> np.ndarray:
    """Returns one recording as float32 [samples] from -1 to 1, the mean of its channels.

    Args:
        path: a WAV file of whole numbers (PCM) of 8, 16, 24 or 32 bits.
        settings: sample rate and length of the result.
        place: name of the file in errors.

    Raises:
        DataError: if the file is no such WAV file, or has no samples.
    """
    with _opened(path, place) as file:
        rate, channels, width = file.getframerate(), file.getnchannels(), file.getsampwidth()
        # The rest of a long recording is not used.
        wanted = int(settings.seconds * rate) + 1
        data = file.readframes(min(file.getnframes(), wanted))
    samples = _as_floats(data[: len(data) - len(data) % (width * channels)], width, channels)
    if not len(samples) or not rate:
        raise DataError("it has no samples", place=place, cure="remove it")
    samples = _resampled(samples, rate, settings.sample_rate)[: settings.samples]
    return np.pad(samples, (0, settings.samples - len(samples))).astype(np.float32)


def rate_of(path: Path, place: str) -> int:
    """Returns the samples per second that a WAV file declares; `place` is its name in errors.

    Raises:
        DataError: if the file is no WAV file of whole numbers.
    """
    with _opened(path, place) as file:
        return file.getframerate()


@contextmanager
def _opened(path: Path, place: str) -> Iterator[wave.Wave_read]:
    try:
        with path.open("rb") as opened, wave.open(opened) as file:
            yield file
    except (OSError, EOFError, wave.Error, ValueError) as error:
        raise DataError(
            f"not a readable WAV file ({str(error) or type(error).__name__})",
            place=place,
            cure="save it as WAV of 16-bit whole numbers (PCM)",
        ) from error


def _as_floats(data: bytes, width: int, channels: int) -> np.ndarray:
    """Returns the mean of the channels, float64 [samples] from -1 to 1."""
    if width == 1:
        # Only 8-bit samples have no sign: silence is 128.
        values = np.frombuffer(data, np.uint8).astype(np.float64) - 128
    else:
        # 24 bits have no type of their own, so all widths become the upper bytes of 32 bits.
        padded = np.zeros((len(data) // width, 4), dtype=np.uint8)
        padded[:, 4 - width :] = np.frombuffer(data, np.uint8).reshape(-1, width)
        values = padded.view("<i4")[:, 0] / 2.0 ** (8 * (4 - width))
    mean: np.ndarray = (values / 2.0 ** (8 * width - 1)).reshape(-1, channels).mean(1)
    return mean


def _resampled(samples: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    if rate == wanted:
        return samples
    # Imported here: most recordings have the wanted rate, and scipy.signal is slow to import.
    from scipy.signal import resample_poly

    common = gcd(rate, wanted)
    # The filter removes frequencies that the new rate cannot hold.
    result: np.ndarray = resample_poly(samples, wanted // common, rate // common)
    return result
