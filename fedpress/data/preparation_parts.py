"""What a `Preparation` says beyond columns: windows of rows, texts, recordings or images.

To add a kind of raw input, write a class here with a row in `PARTS`, and a reader with a row in
`fedpress.data.raw_inputs.KINDS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, Self, get_args

from fedpress.data.audio_settings import AudioSettings
from fedpress.data.series_settings import SeriesSettings
from fedpress.data.text_settings import TextSettings

Missing = Literal["error", "drop", "mean"]
"""What a missing cell does: an error, its row is dropped, or the mean replaces it."""


class Part(Protocol):
    """How one kind of raw input becomes examples."""

    key: str
    """Key of the part in the JSON, such as "series"; it names the kind of raw input."""
    keys: frozenset[str]
    """All keys of its JSON; another key means a step that this version does not know."""

    def shape(self, width: int) -> tuple[int, ...]:
        """Returns the shape of one example; `width` is the number of inputs of a row."""
        ...

    def channels(self, width: int) -> int:
        """Returns how many means and standard deviations there are."""
        ...

    def steps(self) -> str:
        """Returns what is done, in words for the reader of the JSON."""
        ...

    def to_json(self) -> dict[str, Any]:
        """Returns the part as plain JSON values."""
        ...

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Reads the output of `to_json`; raises ValueError or KeyError if it is wrong."""
        ...


@dataclass(frozen=True)
class SeriesPart:
    """Windows over the rows of a table.

    Attributes:
        settings: the windows. Its `by` names the client column too, which tells series apart in the
            training.
        missing: what a missing cell does; with "drop" a row with one ends its series.
        form: how the dates of `order_column` are written, such as "%d.%m.%Y"; None: ISO 8601.
    """

    settings: SeriesSettings
    missing: Missing = "error"
    form: str | None = None

    key = "series"
    keys = frozenset({*SeriesSettings.model_fields, "missing", "form"})

    def shape(self, width: int) -> tuple[int, ...]:
        """Returns [columns, window], or [columns] for windows of one row."""
        return (width,) if self.settings.window == 1 else (width, self.settings.window)

    def channels(self, width: int) -> int:
        """Returns the number of inputs of a row."""
        return width

    def steps(self) -> str:
        """Returns the steps in words."""
        return (
            "lags and calendar, the columns in order, gaps filled, windows, then (x - mean) / std"
        )

    def to_json(self) -> dict[str, Any]:
        """Returns the settings of the windows, with `missing`."""
        # Readers that do not know the key can read series without it.
        form = {} if self.form is None else {"form": self.form}
        return {**self.settings.model_dump(mode="json"), "missing": self.missing, **form}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> SeriesPart:
        """Reads the output of `to_json`."""
        rest = dict(content)
        missing, form = rest.pop("missing"), rest.pop("form", None)
        if missing not in get_args(Missing):
            raise ValueError(f"missing is {missing!r}")
        return cls(SeriesSettings.model_validate(rest), missing, form)


@dataclass(frozen=True)
class TextPart:
    """Texts as sequences of token numbers.

    Attributes:
        settings: what a token is, and the length of a sequence.
        vocabulary: the token of each number; number 0 stands for unknown tokens and padding.
        learns_unknown: whether token 0 is predicted, too. Only the training needs it, so the JSON
            does not have it.
    """

    settings: TextSettings
    vocabulary: tuple[str, ...]
    learns_unknown: bool = field(default=False, compare=False)

    key = "text"
    keys = frozenset({"tokens", "length", "vocabulary"})

    def shape(self, width: int) -> tuple[int, ...]:
        """Returns [length]."""
        return (self.settings.length,)

    def channels(self, width: int) -> int:
        """Returns 0: token numbers are not standardised."""
        return 0

    def steps(self) -> str:
        """Returns the steps in words."""
        return "the numbers of the last tokens, then 0 up to the length"

    def to_json(self) -> dict[str, Any]:
        """Returns what a token is, the length, and the vocabulary."""
        found = {"tokens": self.settings.tokens, "length": self.settings.length}
        return {**found, "vocabulary": list(self.vocabulary)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> TextPart:
        """Reads the output of `to_json`."""
        rest = dict(content)
        vocabulary = tuple(map(str, rest.pop("vocabulary")))
        if not vocabulary:
            raise ValueError("the vocabulary is empty")
        return cls(TextSettings.model_validate(rest), vocabulary)


@dataclass(frozen=True)
class AudioPart:
    """Recordings as log-mel spectrograms.

    Attributes:
        settings: length of a recording, and its spectrogram.
        rates: samples per second of the public recordings; empty: recordings of every rate are
            taken. Another rate than `settings.sample_rate` is resampled.
    """

    settings: AudioSettings
    rates: tuple[int, ...] = ()

    key = "audio"
    keys = frozenset({*AudioSettings.model_fields, "rates"})

    def shape(self, width: int) -> tuple[int, ...]:
        """Returns [1, mels, frames]."""
        return (1, self.settings.mels, self.settings.frames)

    def channels(self, width: int) -> int:
        """Returns 1: all bands have one mean."""
        return 1

    def steps(self) -> str:
        """Returns the steps in words."""
        return "mean of the channels, log(energy + 1e-6) in mel bands, then (x - mean) / std"

    def to_json(self) -> dict[str, Any]:
        """Returns the settings, with `rates`."""
        return {**self.settings.model_dump(mode="json"), "rates": list(self.rates)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> AudioPart:
        """Reads the output of `to_json`."""
        rest = dict(content)
        rates = tuple(map(int, rest.pop("rates")))
        return cls(AudioSettings.model_validate(rest), rates)


@dataclass(frozen=True)
class ImagePart:
    """Images as bytes.

    Attributes:
        channels_of_image: 1 for grey, 3 for colours.
        height: height in pixels.
        width: width in pixels.
        resized: whether images of other sizes are resized; else they are errors.
    """

    channels_of_image: int
    height: int
    width: int
    resized: bool

    key = "image"
    keys = frozenset({"channels", "height", "width", "resized"})

    def shape(self, width: int) -> tuple[int, ...]:
        """Returns [channels, height, width]."""
        return (self.channels_of_image, self.height, self.width)

    def channels(self, width: int) -> int:
        """Returns the number of colours."""
        return self.channels_of_image

    def steps(self) -> str:
        """Returns the steps in words."""
        return "grey or RGB, resized, divided by 255, then (x - mean) / std"

    def to_json(self) -> dict[str, Any]:
        """Returns channels, height and width, and whether images are resized."""
        return {
            "channels": self.channels_of_image,
            "height": self.height,
            "width": self.width,
            "resized": self.resized,
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> ImagePart:
        """Reads the output of `to_json`."""
        channels, height, width = (int(content[key]) for key in ("channels", "height", "width"))
        if channels not in (1, 3) or height < 1 or width < 1:
            raise ValueError(f"images of {channels} channels and {height}x{width} pixels")
        # Resizing makes squares.
        if bool(content["resized"]) and height != width:
            raise ValueError(f"images are resized to {height}x{width} pixels")
        return cls(channels, height, width, bool(content["resized"]))


PARTS: dict[str, type[Part]] = {
    part.key: part for part in (SeriesPart, TextPart, AudioPart, ImagePart)
}
"""Key in the JSON -> the class that reads it."""
