"""Features of sound as audio encoders read them, with only NumPy.

The results equal those of transformers' extractors. Log-mel spectrograms are those of `WhisperFeatureExtractor`
without torch to 1e-6. With torch, it computes in float32: a few values in bins some 80 dB below the loudest differ by
up to 1e-4, the others by less than 1e-5. Samples are those of `Wav2Vec2FeatureExtractor`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, NoReturn, Protocol

import numpy as np

from mllm_jax.errors import ConfigError, DataError
from mllm_jax.files import read_json

FRAMES = 1_024  # whose spectra are computed at a time
MAX_CHUNK = 1 << 27  # samples, or values of features, that one sound is padded to


class AudioProcessor(Protocol):
    """The interface of `LogMel` and `Waveform`, which convert mono samples to an audio encoder's features.

    Attributes:
        name: of the features in the result, which transformers gives the encoder's input.
        rate: samples per second that it expects.
    """

    name: ClassVar[str]
    rate: int

    def __call__(self, sounds: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """Converts samples float[n] from -1 to 1 to features float32[B, ...] and, if it gives one, `attention_mask`
        int32[B, T] (1 = valid)."""
        ...

    def steps(self, samples: Any, longest: int | None = None) -> Any:
        """Returns the number of valid steps of the features of n samples: what the mask's row sums to.

        Args:
            samples: n, or an integer array of these.
            longest: the most samples in the batch, if they are padded to it; None: each is alone.
        """
        ...


@dataclass(frozen=True)
class Waveform:
    """Samples as features, as in wav2vec 2.0, HuBERT and BEATs.

    Attributes:
        rate: samples per second.
        normalise: scale each sound to zero mean and unit variance. Without a mask, the padding of a batch counts as
            sound for both, as in transformers.
        padding_value: of samples after a sound that is shorter than the longest.
        return_attention_mask: whether the result has a mask over samples.
    """

    name: ClassVar[str] = "input_values"
    rate: int = 16_000
    normalise: bool = False
    padding_value: float = 0.0
    return_attention_mask: bool = True

    def __call__(self, sounds: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """Implements `AudioProcessor`. Raises DataError: no sounds, or samples of another kind."""
        lengths = _require_sounds(sounds)
        values = _padded(sounds, max(lengths), self.padding_value)
        if self.normalise:
            for row, length in zip(values, lengths, strict=True):
                valid = row[:length] if self.return_attention_mask else row
                row[:] = (row - valid.mean()) / np.sqrt(valid.var() + 1e-7)
                if self.return_attention_mask:
                    row[length:] = self.padding_value
        return {self.name: values} | (_mask(lengths, max(lengths)) if self.return_attention_mask else {})

    def steps(self, samples: Any, longest: int | None = None) -> Any:
        """Implements `AudioProcessor`: every sample is a step."""
        return samples


@dataclass(frozen=True)
class LogMel:
    """Log-mel spectrograms of Whisper and of models with its encoder.

    Attributes:
        feature_size: number of mel bands.
        rate: samples per second.
        hop_length: samples from one frame to the next.
        chunk_length: seconds that sound is padded and cut to.
        n_fft: samples of a frame.
        padding_value: of samples after a shorter sound.
        return_attention_mask: whether the result has a mask over frames.
        padding: "max_length": to `chunk_length` seconds; "longest": to the longest of the sounds.
        truncation: cut sounds to `chunk_length` seconds.
    """

    name: ClassVar[str] = "input_features"
    feature_size: int = 80
    rate: int = 16_000
    hop_length: int = 160
    chunk_length: int = 30
    n_fft: int = 400
    padding_value: float = 0.0
    return_attention_mask: bool = False
    padding: str = "max_length"
    truncation: bool = True

    def __post_init__(self):
        if self.padding not in ("max_length", "longest"):
            raise ConfigError(f"padding={self.padding!r:.40}", "'max_length' or 'longest'", "change the padding")
        values = self.chunk_samples // self.hop_length * self.feature_size
        if max(self.chunk_samples, values) > MAX_CHUNK:
            raise ConfigError(
                f"chunks of {self.chunk_samples:,} samples, {values:,} values of features",
                f"at most {MAX_CHUNK:,}",
                "correct chunk_length, sampling_rate, hop_length or feature_size",
            )

    @property
    def chunk_samples(self) -> int:
        """Samples that sound is padded and cut to."""
        return self.chunk_length * self.rate

    def __call__(self, sounds: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """Implements `AudioProcessor` with `input_features` float32[B, feature_size, T].

        Raises:
            DataError: no sounds, samples of another kind, or padding="longest" and none is longer than half a frame.
        """
        _require_sounds(sounds)
        if self.truncation:
            sounds = [sound[: self.chunk_samples] for sound in sounds]
        lengths = [len(sound) for sound in sounds]
        longest = max(lengths)
        if self.padding == "max_length":
            longest = max(longest, self.chunk_samples)
        if longest <= self.n_fft // 2 or longest < self.hop_length:
            raise DataError(
                f"sound of {longest} samples with padding='longest'",
                f"more than {max(self.n_fft // 2, self.hop_length - 1)} samples for one frame",
                "pad it to 'max_length', or leave it out",
            )
        padded = _padded(sounds, longest, self.padding_value)
        features = np.stack([self._log_mel(row) for row in padded])
        valid = self.steps(np.asarray(lengths), max(lengths))
        return {self.name: features} | (_mask(valid, features.shape[2]) if self.return_attention_mask else {})

    def steps(self, samples: Any, longest: int | None = None) -> Any:
        """Implements `AudioProcessor`: mel frames, of which one that begins in the sound is valid.

        With padding="longest", the longest sound's last frame is left out if the sound ends in it.
        """
        one = np.ndim(samples) == 0
        lengths, longest = np.asarray(samples), samples if longest is None else longest
        if self.truncation:
            lengths, longest = np.minimum(lengths, self.chunk_samples), np.minimum(longest, self.chunk_samples)
        if self.padding == "max_length":
            longest = np.maximum(longest, self.chunk_samples)
        steps = np.minimum(-(-lengths // self.hop_length), longest // self.hop_length)
        return int(steps) if one else steps

    def _log_mel(self, samples: np.ndarray) -> np.ndarray:
        """Converts float32[n] to float32[feature_size, n // hop_length]."""
        spectrogram = np.concatenate(list(self.spectrogram([samples])), axis=1)
        return self.scaled(spectrogram, spectrogram.max())

    def scaled(self, spectrogram: np.ndarray, largest: float) -> np.ndarray:
        """Returns the features float32 of a log spectrogram.

        Args:
            largest: value in the spectrogram of the whole sound.
        """
        return ((np.maximum(spectrogram, largest - 8.0) + 4.0) / 4.0).astype(np.float32)

    def spectrogram(self, pieces: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Computes the log10 mel spectrogram of a sound in pieces, with a few pieces in memory at a time.

        Yields:
            float64[feature_size, n], of at most FRAMES frames. Joined, n // hop_length frames of n samples.
        """
        edge, hop = self.n_fft // 2, self.hop_length
        held, last = np.zeros(0), np.zeros(0)  # the samples of the next frames, and the last ones of the sound
        total, done, begun = 0, 0, False
        for piece in pieces:
            held = np.concatenate([held, piece.astype(np.float64)])
            total += len(piece)
            last = np.concatenate([last, held[-len(piece) :]])[-edge - 1 :]
            if not begun and total > edge:
                held, begun = np.concatenate([held[edge:0:-1], held]), True
            if begun:
                # Whisper leaves out the last frame.
                count = max(min((len(held) - self.n_fft) // hop + 1, total // hop - done), 0)
                yield from self._log_frames(held, count)
                held, done = held[count * hop :], done + count
        held = np.concatenate([held, last[-2::-1]]) if begun else np.pad(held, edge, mode="reflect")
        yield from self._log_frames(held, total // hop - done)

    def _log_frames(self, wave: np.ndarray, count: int) -> Iterator[np.ndarray]:
        """Yields the log10 mel spectrogram of the first `count` frames of padded samples."""
        window = hann_window(self.n_fft)
        filters = mel_filters(self.n_fft, self.feature_size, self.rate)
        for start in range(0, count, FRAMES):
            frames = np.lib.stride_tricks.sliding_window_view(wave, self.n_fft)[:: self.hop_length]
            spectrum = np.fft.rfft(frames[start : min(start + FRAMES, count)] * window)
            yield np.log10(np.maximum(filters @ (spectrum.real**2 + spectrum.imag**2).T, 1e-10))


# The features of models whose folders name none: by `model_type`, or by the architecture of ours.
OF_MODELS = {
    "whisper": "WhisperFeatureExtractor",
    "qwen2_audio": "WhisperFeatureExtractor",
    "qwen2_audio_encoder": "WhisperFeatureExtractor",
    "qwen2_5_omni": "WhisperFeatureExtractor",
    "qwen2_5_omni_thinker": "WhisperFeatureExtractor",
    "hubert": "Wav2Vec2FeatureExtractor",
    "wav2vec2": "Wav2Vec2FeatureExtractor",
    "BEATs": "waveform",
}
_FILES = (
    ("processor_config.json", "feature_extractor"),
    ("processor_config.json", "audio_processor"),
    ("preprocessor_config.json", None),
)
_COUNTS = {
    "feature_size": 4_096,
    "sampling_rate": 1_000_000,
    "hop_length": 1 << 16,
    "chunk_length": 3_600,
    "n_fft": 1 << 16,
}
# Derived from other options by transformers, or of other tools.
_IDLE = (
    "n_samples",
    "nb_max_frames",
    "mel_filters",
    "processor_class",
    "feature_extractor_type",
    "auto_map",
    "return_tensors",
)


def read_audio_processor(folder: str | Path, **options: Any) -> AudioProcessor:
    """Reads the processor of sound of a Hugging Face folder.

    Args:
        folder: with preprocessor_config.json, or a processor_config.json with `feature_extractor`, which has precedence
            as in transformers. If the file names no type, config.json decides; BEATs needs no other file.
        options: override the file's, as do those of transformers' processors of whole models. `padding` and
            `truncation`, which transformers passes with each call, are fields of `LogMel`: use `dataclasses.replace`.

    Raises:
        ConfigError: there is no such file, it is no JSON, its type is not supported, or an option would change the
            features and is not supported.
    """
    folder = Path(folder)
    known = _of_model(_read_file(folder / "config.json") or {})
    for name, part in _FILES:
        values = _read_file(folder / name)
        values = values.get(part) if part and values is not None else values
        if isinstance(values, Mapping):
            named = {"feature_extractor_type": known, **{k: v for k, v in values.items() if v is not None}}
            return audio_processor({**named, **options}, str(folder / name))
    if known == "waveform":
        return audio_processor({"feature_extractor_type": known, **options}, str(folder / "config.json"))
    raise ConfigError(
        f"{folder} without preprocessor_config.json", "a folder with its processor's settings", "fetch the file as well"
    )


def audio_processor(values: Mapping[str, Any], what: str = "preprocessor_config.json") -> AudioProcessor:
    """Builds the processor of sound that a file's options describe.

    Raises:
        ConfigError: see `read_audio_processor`.
    """

    def refuse(given: str, expected: str) -> NoReturn:
        raise ConfigError(f"{what}: {given}", expected, "correct the file, or prepare the features yourself")

    kind = str(values.get("feature_extractor_type")).removesuffix("Fast")
    if kind not in set(OF_MODELS.values()):
        refuse(f"feature_extractor_type={kind!r:.80}", f"one of {', '.join(sorted(set(OF_MODELS.values())))}")
    mel = kind == "WhisperFeatureExtractor"
    fields: dict[str, Any] = {}
    read = {"padding_side", "dither", "feature_size", *_IDLE}
    for name, most in _COUNTS.items():
        if (mel or name == "sampling_rate") and name in values:
            if type(values[name]) is not int or not 1 <= values[name] <= most:
                refuse(f"{name}={values[name]!r:.80}", f"an integer from 1 to {most:,}")
            fields["rate" if name == "sampling_rate" else name] = values[name]
    flags = {"return_attention_mask": "return_attention_mask"}
    if kind == "Wav2Vec2FeatureExtractor":
        fields |= {"normalise": True, "return_attention_mask": False}
        flags["do_normalize"] = "normalise"
    for name, field in flags.items():
        if name in values:
            if not isinstance(values[name], bool):
                refuse(f"{name}={values[name]!r:.80}", "true or false")
            fields[field] = values[name]
    value = fields["padding_value"] = values.get("padding_value", 0.0)
    if type(value) not in (int, float) or not abs(value) < 1e30:
        refuse(f"padding_value={value!r:.80}", "a number")
    if not mel and values.get("feature_size", 1) != 1:
        refuse(f"feature_size={values['feature_size']!r:.80}", f"1: {kind} has one value a sample")
    if values.get("padding_side", "right") != "right":
        refuse(f"padding_side={values['padding_side']!r:.80}", "'right': the encoders read sound from its beginning")
    if values.get("dither", 0.0) != 0:
        refuse(f"dither={values['dither']!r:.80}", "0: equal sounds have equal features")
    read |= flags.keys() | {"padding_value", "sampling_rate"} | (_COUNTS.keys() if mel else set())
    unread = {name: value for name, value in values.items() if name not in read and value not in (None, False)}
    if unread and "image_processor_type" not in values:  # some models' files hold the options of both
        refuse(", ".join(f"{name}={value!r:.80}" for name, value in sorted(unread.items())), f"options of {kind}")
    return LogMel(**fields) if mel else Waveform(**fields)


def _read_file(path: Path) -> Mapping[str, Any] | None:
    """Returns the JSON object in a file, or None if there is no file."""
    try:
        return read_json(path, ConfigError)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"{path}: {error}", "JSON", "fetch the file again") from error


def _of_model(config: Mapping[str, Any]) -> str | None:
    named = config.get("architectures")
    for name in (config.get("model_type"), *(named if isinstance(named, list) else ())):
        if isinstance(name, str) and name in OF_MODELS:
            return OF_MODELS[name]
    return None


@lru_cache(maxsize=8)
def hann_window(size: int) -> np.ndarray:
    """Returns Hann's periodic window float64[size]."""
    return 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / size)


def mel_filters(n_fft: int, count: int, rate: int) -> np.ndarray:
    """Returns Slaney's mel filters of equal area up to 8 kHz, float64[count, n_fft // 2 + 1]."""
    step = math.log(6.4) / 27  # logarithmic from 1 kHz, which is mel 15
    mels = np.linspace(0, 15 + math.log(8.0) / step, count + 2)
    edges = np.where(mels < 15, mels * 200 / 3, 1000 * np.exp(step * (mels - 15)))
    slopes = edges[:, None] - np.linspace(0, rate // 2, n_fft // 2 + 1)
    width = np.diff(edges)[:, None]
    filters = np.maximum(0, np.minimum(-slopes[:-2] / width[:-1], slopes[2:] / width[1:]))
    return filters * (2 / (edges[2:] - edges[:-2]))[:, None]


def _require_sounds(sounds: Sequence[np.ndarray]) -> list[int]:
    """Returns the lengths. Raises DataError: no list of float[n] with n >= 1 and finite samples."""
    listed = isinstance(sounds, Sequence) and not isinstance(sounds, (str, bytes)) and len(sounds) > 0
    for sound in sounds if listed else (sounds,):
        form = f"{sound.dtype}{list(sound.shape)}" if isinstance(sound, np.ndarray) else type(sound).__name__
        if not listed or not isinstance(sound, np.ndarray) or sound.ndim != 1 or sound.dtype.kind != "f":
            raise DataError(
                f"sound given as {form}",
                "a list of mono samples float[n]",
                "read each with mllm_jax.data.audio.as_audio",
            )
        if not len(sound) or not np.isfinite(sound).all():
            raise DataError(
                f"sound {form} {'without samples' if not len(sound) else 'with NaN or infinity'}",
                "at least one sample, all finite",
                "repair or leave out the record",
            )
    return [len(sound) for sound in sounds]


def _padded(sounds: Sequence[np.ndarray], length: int, value: float) -> np.ndarray:
    out = np.full((len(sounds), length), value, np.float32)
    for row, sound in zip(out, sounds, strict=True):
        row[: len(sound)] = sound
    return out


def _mask(valid: Sequence[int] | np.ndarray, length: int) -> dict[str, np.ndarray]:
    return {"attention_mask": (np.arange(length) < np.asarray(valid)[:, None]).astype(np.int32)}
