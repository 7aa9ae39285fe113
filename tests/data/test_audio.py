"""Sound of every common form is read as mono samples; hostile or damaged files are refused with a reason."""

from __future__ import annotations

import io
import itertools
import os
import sys
import tracemalloc
import wave

import av
import numpy as np
import pytest
import soundfile
import soxr

from mllm_jax.data import audio_files
from mllm_jax.data.audio import MAX_SECONDS, as_audio, audio_blocks, audio_length
from mllm_jax.data.message import Audio
from mllm_jax.errors import DataError

RATE = 16_000
# (format of soundfile, encoding, error of its compression)
FORMATS = [
    ("WAV", "PCM_U8", 1e-2),
    ("WAV", "PCM_16", 5e-5),
    ("WAV", "PCM_24", 5e-7),
    ("WAV", "PCM_32", 5e-7),
    ("WAV", "FLOAT", 0),
    ("WAV", "DOUBLE", 0),
    ("WAV", "ULAW", 2e-2),
    ("AIFF", "PCM_16", 5e-5),
    ("FLAC", "PCM_16", 5e-5),
    ("FLAC", "PCM_24", 5e-7),
    ("OGG", "VORBIS", 5e-2),
    ("OGG", "OPUS", 8e-2),
    ("MP3", "MPEG_LAYER_III", 5e-2),
]
CODED = [(kind, code) for kind, code, _ in FORMATS]


def tone(n: int = 24_000, rate: int = RATE, seed: int = 0) -> np.ndarray:
    """Returns speech-like sound: some slow tones, and a little noise."""
    time, rng = np.arange(n) / rate, np.random.default_rng(seed)
    waves = sum(0.1 * np.sin(2 * np.pi * pitch * time + pitch) for pitch in (110, 317, 930))
    return (waves + 0.003 * rng.normal(size=n)).astype(np.float32)


def encode(samples: np.ndarray, kind: str = "WAV", code: str = "PCM_16", rate: int = RATE) -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, samples, rate, format=kind, subtype=code)
    return stream.getvalue()


def movie(
    samples: np.ndarray | None, rate: int = RATE, *, kind: str = "mp4", codec: str = "aac", video: bool = False
) -> bytes:
    """Returns a file of a kind that soundfile does not read."""
    stream = io.BytesIO()
    with av.open(stream, "w", format=kind) as container:
        if video:
            shown = container.add_stream("mpeg4", rate=10)
            shown.width = shown.height = 32
            shown.pix_fmt = "yuv420p"
        if samples is not None:
            heard = container.add_stream(codec, rate=rate)
            heard.layout = "stereo" if samples.ndim == 2 else "mono"
            planes = np.ascontiguousarray(np.atleast_2d(samples.T))
            frame = av.AudioFrame.from_ndarray(planes, format="fltp", layout=heard.layout.name)
            frame.sample_rate, frame.pts = rate, 0
            for packet in itertools.chain(heard.encode(frame), heard.encode()):
                container.mux(packet)
        if video:
            image = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
            for packet in itertools.chain(shown.encode(image), shown.encode()):
                container.mux(packet)
    return stream.getvalue()


def refusal(source, call=as_audio, *args) -> str:
    with pytest.raises(DataError) as found:
        list(call(source, *args))
    assert all((found.value.given, found.value.expected, found.value.todo))
    return str(found.value)


@pytest.mark.parametrize(("kind", "code", "error"), FORMATS)
def test_files_of_every_kind(kind, code, error, tmp_path):
    samples = tone()
    data = encode(samples, kind, code)
    read = as_audio(data)
    assert read.dtype == np.float32 and read.shape == samples.shape
    inner = slice(None, -500 if code == "OPUS" else None)  # Opus damages the end
    assert np.abs(read - samples)[inner].max() <= error + 1e-12
    assert audio_length(data) == len(samples)
    path = tmp_path / "sound"  # the content decides, not the name
    path.write_bytes(data)
    np.testing.assert_array_equal(as_audio(path), read)
    np.testing.assert_array_equal(as_audio(str(path)), read)
    np.testing.assert_array_equal(as_audio(Audio(path)), read)
    np.testing.assert_array_equal(as_audio(Audio(data, rate=RATE)), read)


@pytest.mark.parametrize(
    ("kind", "codec", "rate", "video"),
    [
        ("mp4", "aac", 44_100, False),
        ("mp4", "aac", 16_000, True),
        ("matroska", "libopus", 48_000, False),
        ("webm", "libopus", 48_000, False),
        ("adts", "aac", 16_000, False),
    ],
)
def test_the_sound_of_videos_and_of_what_pyav_reads(kind, codec, rate, video):
    samples = tone(rate, rate)
    data = movie(np.stack([samples, samples], 1), rate, kind=kind, codec=codec, video=video)
    read = as_audio(data, rate)
    assert len(read) == audio_length(data, rate)
    # encoders add up to two of their frames as padding
    assert len(samples) - 50 <= len(read) <= len(samples) + 4_096
    shift = 1024 if kind == "adts" else 0  # the header of this one does not name the padding before
    inner = slice(shift + 2_000, shift + 12_000)
    assert np.corrcoef(read[inner], samples[2_000:12_000])[0, 1] > 0.98


def test_mp3_in_blocks_and_without_a_declared_length():
    """Checks that block by block gives the whole, where soundfile damages MP3; and that an estimate is not believed."""
    samples = (0.1 * np.random.default_rng(0).normal(size=160_000)).astype(np.float32)
    data = encode(samples, "MP3", "MPEG_LAYER_III")
    whole, _ = soundfile.read(io.BytesIO(data), dtype="float32")
    np.testing.assert_allclose(as_audio(data), whole, atol=1e-5)
    second = data.index(data[:2], 4)
    assert 0 < data.index(b"Xing") < second
    bare = data[second:]
    assert len(as_audio(bare)) == audio_length(bare) >= len(samples)
    tagged = b"ID3\x04\x00\x00" + bytes((0, 0, 10, 0)) + bytes(1280) + data
    assert audio_length(tagged) == len(as_audio(tagged)) == len(samples)
    titled = data + b"TAG" + b"\xc4\xe0" * 15 + bytes(95)
    assert len(titled) == len(data) + 128 and len(as_audio(titled)) == len(samples), "a title that is not UTF-8"


@pytest.mark.parametrize("data", [*(encode(tone(4_800, 48_000), *each, 48_000) for each in CODED), movie(tone(4_800))])
def test_the_length_comes_from_the_header(data, monkeypatch):
    def decoded(*_):
        raise AssertionError("decoded")
        yield

    length = len(as_audio(data))
    for name in ("_soundfile_blocks", "_av_blocks"):
        monkeypatch.setattr(audio_files, name, decoded)
    assert audio_length(data) == audio_length(Audio(data)) == length
    with pytest.raises(AssertionError, match="decoded"):
        as_audio(data)


def test_channels_are_averaged():
    left, right = tone(seed=1), tone(seed=2)
    both = np.stack([left, right], 1)
    np.testing.assert_allclose(as_audio((both, RATE)), (left + right) / 2, atol=1e-7)
    np.testing.assert_allclose(as_audio(encode(both, code="FLOAT")), (left + right) / 2, atol=1e-7)
    np.testing.assert_allclose(as_audio((np.stack([left] * 6, 1), RATE)), left, atol=1e-7)


def test_samples_at_the_right_rate_need_no_package(monkeypatch):
    for name in ("soundfile", "av", "soxr"):
        monkeypatch.setitem(sys.modules, name, None)
    samples = tone(200_000)
    np.testing.assert_array_equal(as_audio((samples, RATE)), samples)
    np.testing.assert_array_equal(as_audio(Audio(samples.astype(np.float64), rate=RATE)), samples)
    np.testing.assert_array_equal(as_audio(Audio((samples, RATE))), samples)
    assert as_audio((samples.astype(np.float16), RATE)).dtype == np.float32
    assert audio_length((samples, 8_000)) == 400_000
    install = "pip install 'mllm-jax[media]'"
    assert install in refusal((samples, 8_000)) and "soxr" in refusal((samples, 8_000))
    assert install in refusal(encode(samples)) and "soundfile" in refusal(encode(samples))


def test_pyav_is_asked_for_only_where_it_is_needed(monkeypatch):
    data, film = encode(tone()), movie(tone())
    monkeypatch.setitem(sys.modules, "av", None)
    as_audio(data)
    assert "the package av" in refusal(film) and "pip install" in refusal(film)


def test_the_result_is_a_copy():
    samples = tone(1_000)
    read = as_audio((samples, RATE))
    read[:] = 0
    assert samples.any()


@pytest.mark.parametrize(("given", "wanted"), [(8_000, 16_000), (44_100, 16_000), (48_000, 16_000), (16_000, 24_000)])
@pytest.mark.parametrize("n", [1, 7, 160, 65_536, 100_003])
def test_resampling_equals_soxr_over_the_whole(given, wanted, n):
    samples = tone(n, given)
    whole = soxr.resample(samples, given, wanted, quality="HQ")
    if not len(whole):
        assert "without samples" in refusal((samples, given), as_audio, wanted)
        return
    read = as_audio((samples, given), wanted)
    np.testing.assert_allclose(read, whole, atol=1e-4)
    assert audio_length((samples, given), wanted) == len(read)


@pytest.mark.parametrize(("kind", "code"), CODED)
def test_blocks_join_to_the_whole(kind, code):
    """Checks the resampler's state from block to block, and that each block has the asked size."""
    data = encode(tone(70_001, 44_100 if code != "OPUS" else 48_000), kind, code, 44_100 if code != "OPUS" else 48_000)
    whole = as_audio(data)
    for seconds in (0.01, 0.3, 100):
        blocks = list(audio_blocks(data, seconds))
        assert {len(block) for block in blocks[:-1]} <= {round(seconds * RATE)}
        assert 0 < len(blocks[-1]) <= round(seconds * RATE)
        assert all(block.dtype == np.float32 for block in blocks)
        np.testing.assert_array_equal(np.concatenate(blocks), whole)
    assert audio_length(data) == len(whole)


def test_three_hours_take_the_memory_of_a_block(tmp_path):
    seconds, rate = 3 * 3_600, 8_000
    path = tmp_path / "long.wav"
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 1, rate, seconds * rate, "NONE", ""))
        file.writeframes(b"")
        file._datawritten = seconds * rate
        file._patchheader()
    os.truncate(path, 44 + seconds * rate)  # a hole: takes no space on the disk
    assert audio_length(path) == seconds * RATE
    message = refusal(path)
    assert "10,800 seconds" in message and "audio_blocks(source, seconds=30)" in message
    tracemalloc.start()
    try:
        count = sum(map(len, audio_blocks(path, 30)))
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count == seconds * RATE
    assert most < 12 << 20, "30 seconds are 1.9 MB; all are 691 MB"


def test_a_bound_without_a_declared_length(monkeypatch):
    """Checks that a whole decode ends at the bound although the header has no length."""
    monkeypatch.setattr("mllm_jax.data.audio.MAX_SECONDS", 1)
    samples = tone(48_000 * 2, 48_000)
    film = movie(samples, 48_000, kind="webm", codec="libopus")
    assert "at once" in refusal(film)
    assert "at once" in refusal((samples, 48_000))
    assert len(as_audio((samples[:48_000], 48_000))) == 16_000
    assert MAX_SECONDS == 3_600


def test_files_written_to_a_pipe_have_no_size():
    samples = tone()
    data = bytearray(encode(samples))
    at = data.index(b"data")
    data[4:8] = data[at + 4 : at + 8] = b"\xff" * 4
    np.testing.assert_allclose(as_audio(bytes(data)), samples, atol=5e-5)
    data = bytearray(encode(samples, "FLAC"))
    at = data.index(b"fLaC") + 8 + 10  # 36 bits of the number of samples
    data[at : at + 8] = (int.from_bytes(data[at : at + 8], "big") >> 36 << 36).to_bytes(8, "big")
    np.testing.assert_allclose(as_audio(bytes(data)), samples, atol=5e-5)
    assert audio_length(bytes(data)) == len(samples)


@pytest.mark.parametrize(("kind", "code"), CODED)
def test_a_truncated_file_is_refused(kind, code, tmp_path):
    data = encode(tone(100_000, 48_000), kind, code, 48_000)
    for cut in (len(data) // 2, len(data) * 9 // 10):
        path = tmp_path / f"{cut}.bin"
        path.write_bytes(data[:cut])
        message = refusal(path)
        assert "is cut off" in message or "cannot be decoded" in message
        assert str(path) in message
        refusal(path, audio_blocks, 0.1)


@pytest.mark.parametrize(("kind", "codec"), [("mp4", "aac"), ("matroska", "libopus")])
def test_a_truncated_film_is_refused(kind, codec):
    data = movie(tone(48_000 * 4, 48_000), 48_000, kind=kind, codec=codec)
    message = refusal(data[: len(data) // 2])
    assert "is cut off" in message or "cannot be decoded" in message


def test_files_that_are_not_sound(tmp_path):
    text = tmp_path / "speech.wav"
    text.write_text("This is a text that somebody named .wav.\n" * 50)
    assert "speech.wav" in refusal(text) and "cannot be decoded" in refusal(text)
    (tmp_path / "empty.wav").write_bytes(b"")
    assert "an empty file" in refusal(tmp_path / "empty.wav") and "an empty file" in refusal(b"")
    assert "No such file" in refusal(tmp_path / "missing.wav")
    assert "cannot be read" in refusal(tmp_path)
    assert "without samples" in refusal(encode(np.zeros(0, np.float32)))
    assert "without samples" in refusal(encode(np.zeros(0, np.float32)), lambda data: [audio_length(data)])
    film = movie(None, video=True)
    assert "without sound" in refusal(film) and "video" in refusal(film)
    for data in (b"RIFF", b"OggS", b"ID3" + bytes(7), bytes(5_000), b"\xff\xfb" * 40, encode(tone())[:40]):
        refusal(data)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "not a regular file" in refusal(tmp_path / "pipe")


def test_a_playlist_opens_nothing_else(tmp_path):
    inner = tmp_path / "inner.wav"
    inner.write_bytes(encode(tone()))
    listed = f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:9,\n{inner}\n#EXT-X-ENDLIST\n".encode()
    concat = f"ffconcat version 1.0\nfile {inner}\n".encode()
    for data in (listed, concat):
        assert "cannot be decoded" in refusal(data)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("channels", [1, 2])
def test_samples_that_are_no_numbers(value, channels):
    samples = np.stack([tone(100_000)] * channels, 1)
    samples[80_000, -1] = value
    for source in ((samples, RATE), encode(samples, code="FLOAT")):
        message = refusal(source)
        assert "sample 80,000 (second 5.000)" in message and str(value) in message and "finite" in message
        refusal(source, audio_blocks, 1)


def test_samples_of_another_scale_or_kind():
    samples = tone(1_000)
    assert "samples / 32,768" in refusal(((samples * 32_768).astype(np.int16), RATE))
    assert "samples / 2,147,483,648" in refusal(((samples * 32_768).astype(np.int32), RATE))
    assert "(samples - 128) / 128" in refusal((np.full(9, 128, np.uint8), RATE))
    assert "samples / 32768" in refusal((samples * 32_768, RATE)), "integers that became float"
    assert len(as_audio((samples * 20, RATE))) == 1_000, "sound may exceed 1"
    assert "complex64[1000]" in refusal((samples.astype(np.complex64), RATE))
    assert "bool[1000]" in refusal((samples > 0, RATE))
    assert "float32[1, 10, 100]" in refusal((samples.reshape(1, 10, 100), RATE))
    assert "samples.T" in refusal((np.stack([samples, samples]), RATE)), "channels first"
    assert "without samples" in refusal((samples[:0], RATE))
    assert "float32[]" in refusal((np.float32(1), RATE))


@pytest.mark.parametrize("rate", [0, -16_000, 999, 10**7, 16_000.5, float("nan"), float("inf"), True, "16000", None])
def test_wrong_rates(rate):
    assert "samples a second" in refusal(encode(tone()), as_audio, rate)
    refusal((tone(), rate))
    refusal((tone(), RATE), audio_length, rate)
    refusal((tone(), RATE), audio_blocks, 1, rate)


def test_a_rate_that_is_not_the_sounds_own():
    data = encode(tone(), rate=8_000)
    message = refusal(Audio(data, rate=16_000))
    assert "8000" in message and "16000" in message and "leave the rate out" in message
    assert len(as_audio(Audio(data, rate=8_000))) == 48_000
    assert audio_length((tone(), 8_000.0), 16_000.0) == 48_000 and len(as_audio(data, 16_000.0)) == 48_000
    assert "8000" in refusal(Audio((tone(), 8_000), rate=16_000))
    assert "without a rate" in refusal(Audio(tone()))
    assert "without a rate" in refusal(tone())
    assert "nothing" in refusal(Audio())
    assert "a file without a rate" in refusal((data, 8_000))


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), 1e-9, "1", MAX_SECONDS + 1])
def test_wrong_blocks(seconds):
    """Checks that the refusal comes with the call, before a block is read."""
    with pytest.raises(DataError, match="blocks of"):
        audio_blocks((tone(), RATE), seconds)


def test_hostile_headers():
    data = bytearray(encode(tone(100), code="FLOAT"))
    at = data.index(b"fmt ") + 8
    data[at + 4 : at + 8] = (2**31 - 1).to_bytes(4, "little")
    assert "2,147,483,647 samples a second" in refusal(bytes(data))
    assert "33 channels" in refusal(encode(np.zeros((10, 33), np.float32)))
    rng = np.random.default_rng(0)
    for kind, code in CODED:
        whole = encode(tone(8_000), kind, code)
        for _ in range(20):
            noise = bytearray(whole)
            for place in rng.integers(0, len(noise), 12):
                noise[place] = rng.integers(256)
            try:
                as_audio(bytes(noise))
            except DataError as error:
                assert error.todo
    for kind, codec in (("mp4", "aac"), ("matroska", "libopus")):
        whole = movie(tone(8_000, 48_000), 48_000, kind=kind, codec=codec)
        for _ in range(12):
            noise = bytearray(whole)
            for place in rng.integers(0, len(noise), 12):
                noise[place] = rng.integers(256)
            try:
                as_audio(bytes(noise))
            except DataError as error:
                assert error.todo


def test_files_are_closed(tmp_path, monkeypatch):
    """Checks the file of a reader that stops early, and of one that ends with a refusal."""
    opened = []
    real = audio_files._open_file
    monkeypatch.setattr(audio_files, "_open_file", lambda path: opened.append(real(path)) or opened[-1])
    for name, data in {"a.wav": encode(tone(100_000)), "b.mp4": movie(tone(100_000)), "c.txt": b"text" * 99}.items():
        (tmp_path / name).write_bytes(data)
    for name in ("a.wav", "b.mp4"):
        blocks = audio_blocks(tmp_path / name, 0.1)
        assert len(next(blocks)) == 1_600 and not opened[-1].closed
        blocks.close()
        assert opened[-1].closed
    refusal(tmp_path / "c.txt")
    assert opened[-1].closed and len(opened) == 3
