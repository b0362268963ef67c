"""The table `audio` of `[data]`: how a recording becomes a log-mel spectrogram."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, Field, model_validator

from fedpress.errors import SettingError


class AudioSettings(BaseModel, frozen=True, extra="forbid"):
    """Length of a recording, and the log-mel spectrogram that is made of it.

    >>> AudioSettings(seconds=0.5).frames
    48
    """

    sample_rate: int = Field(
        default=16_000,
        ge=100,
        le=384_000,
        description="samples per second; recordings with another rate are resampled",
    )
    seconds: float = Field(
        default=1.0,
        gt=0,
        le=3600,
        description="length of an example; longer recordings are cut, shorter ones end in silence",
    )
    mels: int = Field(
        default=40, ge=1, le=1024, description="frequency bands, evenly spaced in mel"
    )
    window: float = Field(default=0.025, gt=0, le=10, description="seconds of one spectrum")
    hop: float = Field(default=0.010, gt=0, le=10, description="seconds between two spectra")

    @property
    def samples(self) -> int:
        """Samples of an example."""
        return round(self.seconds * self.sample_rate)

    @property
    def window_samples(self) -> int:
        """Samples of one spectrum."""
        return round(self.window * self.sample_rate)

    @property
    def hop_samples(self) -> int:
        """Samples between the beginnings of two spectra."""
        return round(self.hop * self.sample_rate)

    @property
    def frames(self) -> int:
        """Spectra of an example."""
        return 1 + (self.samples - self.window_samples) // self.hop_samples

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.window_samples < 2 or self.hop_samples < 1:
            key = "window" if self.window_samples < 2 else "hop"
            raise SettingError(
                f"{getattr(self, key):g} s have less than {2 if key == 'window' else 1} samples",
                place=key,
                cure="raise it, or sample_rate",
            )
        if self.window_samples > self.samples:
            raise SettingError(
                f"{self.window:g} s are longer than an example of {self.seconds:g} s",
                place="window",
                cure="lower it, or raise seconds",
            )
        return self
