"""Computes log-mel spectrograms: the energy of sound by time and frequency, as an ear hears it."""

from __future__ import annotations

import torch
from torch import Tensor

from fedpress.data.audio_settings import AudioSettings
from fedpress.errors import DataError

# Added to the energy before the logarithm, so that silence is a finite number.
FLOOR = 1e-6


def log_mel(waves: Tensor, settings: AudioSettings) -> Tensor:
    """Returns float32 [n, mels, frames]: log(energy + 1e-6) of Hann windows in mel bands.

    Args:
        waves: samples from -1 to 1, float32 [n, samples].
        settings: sizes of windows, and the number of bands.

    Raises:
        DataError: if a band is narrower than the resolution of the spectrum.

    >>> log_mel(torch.zeros(2, 16000), AudioSettings()).shape
    torch.Size([2, 40, 98])
    """
    length = settings.window_samples
    frames = waves.unfold(-1, length, settings.hop_samples)
    window = torch.hann_window(length, periodic=True)
    # The next power of two, which a Fourier transform computes fastest.
    size = 1 << (length - 1).bit_length()
    energy = torch.fft.rfft(frames * window, n=size).abs().square()
    bands: Tensor = energy @ mel_filters(settings, size).T
    return (bands + FLOOR).log().transpose(1, 2).contiguous()


def mel_filters(settings: AudioSettings, size: int) -> Tensor:
    """Returns float32 [mels, size / 2 + 1]: triangles of height 1 whose edges are even in mel.

    A frequency of f Hz is 2595 log10(1 + f / 700) mel (O'Shaughnessy 1987, the formula of HTK).

    Args:
        settings: number of bands, and the sample rate; bands reach from 0 to half of it.
        size: samples of the Fourier transform.

    Raises:
        DataError: if a band holds no frequency of the transform.
    """
    top = 2595 * torch.log10(torch.tensor(1 + settings.sample_rate / 2 / 700, dtype=torch.float64))
    mel = torch.linspace(0, float(top), settings.mels + 2, dtype=torch.float64)
    edges = 700 * (10 ** (mel / 2595) - 1)
    bins = torch.arange(size // 2 + 1, dtype=torch.float64) * settings.sample_rate / size
    low, middle, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    rising = (bins - low) / (middle - low)
    falling = (high - bins) / (high - middle)
    filters = torch.minimum(rising, falling).clamp_min(0)
    if bool((filters.sum(1) == 0).any()):
        raise DataError(
            f"{settings.mels} bands are narrower than the spectrum of {settings.window:g} s",
            place="audio.mels",
            cure="lower it, or raise audio.window",
        )
    return filters.float()
