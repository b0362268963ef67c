"""Recordings are compared with a plain log-mel of numpy, and with the samples they were made of."""

import wave

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from fedpress.data import DataSettings, load
from fedpress.data.audio import read_wave
from fedpress.data.audio_settings import AudioSettings
from fedpress.data.log_mel import log_mel
from fedpress.errors import DataError


def write(path, samples, *, rate=16_000, width=2):
    """Writes samples from -1 to 1, [n] or [n, channels]."""
    samples = np.asarray(samples, dtype=np.float64)
    channels = 1 if samples.ndim == 1 else samples.shape[1]
    whole = np.round(samples.flatten() * (2.0 ** (8 * width - 1) - 1)).astype(np.int64)
    whole += 128 if width == 1 else 0
    data = whole.astype("<i8").view(np.uint8).reshape(-1, 8)[:, :width].tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setparams((channels, width, rate, 0, "NONE", ""))
        file.writeframes(data)


def tone(pitch, *, rate=16_000, seconds=1.0):
    return 0.5 * np.sin(2 * np.pi * pitch * np.arange(int(rate * seconds)) / rate)


def plain_log_mel(samples, ask):
    """The twin: one window after the other, and a triangle drawn by np.interp for each band."""
    length, hop = int(ask.window * ask.sample_rate), int(ask.hop * ask.sample_rate)
    size = 2
    while size < length:
        size *= 2
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(length) / length)
    spectra = []
    for start in range(0, len(samples) - length + 1, hop):
        spectra.append(np.abs(np.fft.rfft(samples[start : start + length] * hann, size)) ** 2)
    top = 2595 * np.log10(1 + ask.sample_rate / 2 / 700)
    edges = 700 * (10 ** (np.linspace(0, top, ask.mels + 2) / 2595) - 1)
    hertz = np.fft.rfftfreq(size, 1 / ask.sample_rate)
    bands = [np.interp(hertz, edges[at : at + 3], [0, 1, 0], 0, 0) for at in range(ask.mels)]
    return np.log(np.array(bands) @ np.array(spectra).T + 1e-6)


@pytest.mark.parametrize(
    "ask",
    [
        AudioSettings(),
        AudioSettings(sample_rate=8000, mels=20, window=0.032, hop=0.016, seconds=0.7),
        AudioSettings(mels=64, window=0.1, hop=0.1),
    ],
)
def test_spectrograms_are_those_of_a_plain_twin(ask):
    chance = np.random.default_rng(0)
    waves = chance.normal(0, 0.2, (3, ask.samples)).astype(np.float32)
    found = log_mel(torch.from_numpy(waves), ask)
    assert found.shape == (3, ask.mels, ask.frames)
    for one, samples in zip(found, waves, strict=True):
        wanted = plain_log_mel(samples.astype(np.float64), ask)
        assert one.numpy() == pytest.approx(wanted, abs=1e-3)


def test_a_tone_is_in_the_band_of_its_pitch():
    ask = AudioSettings()
    for pitch in (300, 1000, 4000):
        found = log_mel(torch.from_numpy(tone(pitch)[None].astype(np.float32)), ask)[0].mean(1)
        step = 2595 * np.log10(1 + 8000 / 700) / (ask.mels + 1)
        assert abs(found.argmax().item() - (2595 * np.log10(1 + pitch / 700) / step - 1)) < 1


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("channels", [1, 2])
def test_samples_of_every_width_are_read(tmp_path, width, channels):
    samples = np.random.default_rng(0).uniform(-1, 1, (16_000, channels))
    write(tmp_path / "a.wav", samples, width=width)
    found = read_wave(tmp_path / "a.wav", AudioSettings(), "a")
    assert found == pytest.approx(samples.mean(1), abs=2.0 ** (2 - 8 * width) + 1e-7)


@pytest.mark.parametrize("rate", [8000, 22_050, 44_100])
def test_other_rates_are_resampled(tmp_path, rate):
    write(tmp_path / "a.wav", tone(440, rate=rate), rate=rate)
    found = read_wave(tmp_path / "a.wav", AudioSettings(), "a")
    # The ends ring, because the recording begins and ends at once.
    assert found[500:-500] == pytest.approx(tone(440)[500:-500], abs=5e-3)


def test_long_recordings_are_cut_and_short_ones_end_in_silence(tmp_path):
    for seconds in (0.4, 3.0):
        write(tmp_path / "a.wav", tone(440, seconds=seconds))
        found = read_wave(tmp_path / "a.wav", AudioSettings(), "a")
        kept = int(16_000 * min(seconds, 1.0))
        assert found[:kept] == pytest.approx(tone(440)[:kept], abs=1e-4)
        assert (found[kept:] == 0).all()


def folder(root, count=6):
    for client in ("ann", "bob", "open"):
        for label, pitch in (("high", 2000), ("low", 300)):
            for number in range(count):
                write(root / client / label / f"{number}.wav", tone(pitch, seconds=0.3))
    return root


def ask(path, **keys):
    keys = {"public_clients": ["open"], "validation": 0, "test_share": 0.3, **keys}
    return DataSettings(source="audio", path=path, audio={"seconds": 0.3, "mels": 20}, **keys)


def test_recordings_belong_to_the_client_and_label_of_their_folders(tmp_path):
    (folder(tmp_path / "sounds") / "ann" / "high" / "notes.txt").write_text("x")
    data = load(ask(tmp_path / "sounds"), 0)
    assert (data.name, list(data.clients)) == ("sounds", ["ann", "bob"])
    assert data.class_names == ("high", "low")
    assert data.example_shape == (1, 20, 28)
    for part in (data.public, data.test, *data.clients.values()):
        band = part.x[:, 0].mean(2).argmax(1)
        assert torch.equal(band < 10, part.y == 1)


def test_recordings_that_cannot_be_read_are_refused_without_their_label(tmp_path):
    root = folder(tmp_path / "sounds", 3)
    bad = root / "ann" / "low" / "1.wav"
    float_wave = bytearray(bad.read_bytes())
    float_wave[20] = 3  # the format: floats
    cases = {
        b"": "not a readable WAV file .EOFError",
        b"RIFFxxxxJUNK" * 9: "not a readable WAV file",
        bytes(float_wave): "not a readable WAV file .unknown format: 3.; save it as WAV of 16-bit",
    }
    for content, message in cases.items():
        bad.write_bytes(content)
        with pytest.raises(DataError, match=rf"ann/\*/1.wav': {message}"):
            load(ask(root), 0)
    write(bad, [])
    with pytest.raises(DataError, match=r"ann/\*/1.wav': it has no samples; remove it"):
        load(ask(root), 0)


def test_folders_without_recordings_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"no folder '.*no'"):
        load(ask(tmp_path / "no"), 0)
    (tmp_path / "ann").mkdir()
    with pytest.raises(DataError, match=r"client 'ann' has no recordings .*ann/label/sound.wav"):
        load(ask(tmp_path), 0)


def test_too_many_bands_are_refused(tmp_path):
    root = folder(tmp_path / "sounds", 3)
    settings = DataSettings(
        source="audio", path=root, public_clients=["open"], audio={"mels": 200, "seconds": 0.3}
    )
    with pytest.raises(DataError, match=r"audio.mels: 200 bands are narrower than the spectrum of"):
        load(settings, 0)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"window": 2.0}, "2 s are longer than an example of 1 s; lower it, or raise seconds"),
        ({"window": 1e-5}, "1e-05 s have less than 2 samples"),
        ({"hop": 1e-5}, "1e-05 s have less than 1 samples"),
        ({"seconds": 0}, "greater than 0"),
    ],
)
def test_lengths_that_do_not_fit_are_refused(keys, message):
    with pytest.raises(ValidationError, match=message):
        AudioSettings(**keys)
