"""Frames of videos with their times: sampling, formats, and files that are damaged, huge, turned or no videos."""

from __future__ import annotations

import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest
from clips import clip, shades, sound

from mllm_jax.data import video as reading
from mllm_jax.data.message import Video
from mllm_jax.data.video import FrameSampling, FrameTimes, measure_video, read_video, video_header
from mllm_jax.errors import ConfigError, DataError

RATE = FrameSampling(num_frames=None, fps=2.0)
NOISE = np.random.default_rng(0).integers(0, 256, (30, 32, 48, 3), np.uint8)


@pytest.fixture(autouse=True)
def _no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# ---- sampling


@pytest.mark.parametrize("frames", [1, 3, 4, 5, 6, 7, 23, 100, 12_345])
@pytest.mark.parametrize("count", [1, 5, 8])
def test_frames_begin_equal_parts(frames, count):
    found = FrameSampling(count).indices(frames, count)
    np.testing.assert_array_equal(found, [i * frames // count for i in range(count)])
    if count == 5:  # the reference's formula
        np.testing.assert_array_equal(found, np.arange(0, frames, frames / 5).astype(int))
    ends = FrameSampling(count, position="ends").indices(frames, count)
    assert ends[0] == 0 and (count == 1 or ends[-1] == frames - 1)
    middle = FrameSampling(count, position="middle").indices(frames, count)
    np.testing.assert_array_equal(middle, [int((i + 0.5) * frames / count) for i in range(count)])


@pytest.mark.parametrize(
    "change,frames,fps,count",
    [
        ({}, 300, 30.0, 20), ({}, 30, 30.0, 4), ({}, 3, 30.0, 3), ({}, 100_000, 25.0, 768),
        (dict(max_frames=6), 300, 30.0, 6),
        (dict(multiple=2), 25, 8.0, 6), (dict(multiple=2), 1, 8.0, 1), (dict(multiple=2, max_frames=7), 300, 30.0, 6),
        (dict(fps=0.1, min_frames=1), 300, 30.0, 1),
    ],
)  # fmt: skip
def test_a_rate_with_bounds(change, frames, fps, count):
    assert replace(RATE, **change).count(frames, fps) == count


@pytest.mark.parametrize(
    "wrong",
    [
        dict(num_frames=None), dict(fps=1.0), dict(num_frames=0), dict(num_frames=None, fps=0.0), dict(multiple=0),
        dict(num_frames=None, fps=float("inf")), dict(min_frames=9, max_frames=8), dict(position="end"),
    ],
)  # fmt: skip
def test_contradictory_samplings_are_refused(wrong):
    with pytest.raises(ConfigError):
        FrameSampling(**wrong)


# ---- files


@pytest.mark.parametrize(
    "codec,suffix",
    [("mpeg4", "mp4"), ("libx264", "mp4"), ("libx264", "mkv"), ("libvpx", "webm"), ("mpeg4", "avi"), ("libx264", "ts")],
)
def test_five_frames_of_a_file(codec, suffix, tmp_path):
    made = clip(23, 8, codec=codec, suffix=suffix)
    path = tmp_path / "a.mp4"
    path.write_bytes(made)
    frames, times = read_video(path)
    assert frames.dtype == np.uint8 and frames.shape == (5, 32, 48, 3)
    assert shades(frames) == [0, 4, 9, 13, 18 % 15]
    np.testing.assert_allclose(times.seconds, [0, 0.5, 9 / 8, 13 / 8, 18 / 8], atol=1e-3)
    assert times.fps == pytest.approx(5 / 23 * 8, rel=1e-3)
    header = video_header(made)
    assert header.size == (32, 48) and header.frames == 23 and header.duration == pytest.approx(23 / 8, abs=0.01)
    for exact in (False, True):
        size, measured = measure_video(path, FrameSampling(), exact)
        assert size == (32, 48) and measured.fps == pytest.approx(times.fps, rel=1e-2)
        np.testing.assert_allclose(measured.seconds, times.seconds, atol=1e-9 if exact else 1e-3)


def test_titles_need_not_be_utf_8():
    made = clip(3, 2)
    assert b"Lavf" in made, "the name of the program that wrote it"
    assert shades(read_video(made.replace(b"Lavf", b"\xff\xfe\xff\xfe"), FrameSampling(3))[0]) == [0, 1, 2]


def test_frames_by_rate():
    frames, times = read_video(clip(24, 8), RATE)
    assert shades(frames) == [0, 4, 8, 12, 1, 5] and times.seconds.tolist() == [0, 0.5, 1, 1.5, 2, 2.5]
    assert times.fps == 2.0


def test_decoding_begins_at_key_frames(monkeypatch):
    """Checks that frames between a key frame's group and the next wanted frame are not decoded."""
    made, decoded = clip(60, key_every=10, codec="mpeg4"), []
    frames_of = reading._frames

    def counted(*given):
        for frame in frames_of(*given):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(reading, "_frames", counted)
    frames, _ = read_video(made, FrameSampling(3))
    assert shades(frames) == [0, 5, 10] and len(decoded) == 1 + 3, "the first frame for the size, then one each"


def test_times_of_a_variable_rate_are_the_real_ones():
    times = [0.1, 0.2, 0.25, 0.5, 1.0, 4.0, 4.1]
    frames, found = read_video(clip(7, times=times), FrameSampling(7))
    assert shades(frames) == list(range(7))
    np.testing.assert_allclose(found.seconds, np.subtract(times, 0.1), atol=1e-3)
    frames, found = read_video(clip(7, times=times), FrameSampling(3))
    assert shades(frames) == [0, 2, 4]
    np.testing.assert_allclose(found.seconds, [0, 0.15, 0.9], atol=1e-3)


def test_fewer_frames_than_asked_repeat():
    frames, times = read_video(clip(3, 2))
    assert shades(frames) == [0, 0, 1, 1, 2] and times.seconds.tolist() == [0, 0, 0.5, 0.5, 1]
    frames, times = read_video(clip(1, 2))
    assert shades(frames) == [0] * 5 and times.seconds.tolist() == [0] * 5
    assert shades(read_video(clip(3, 2), RATE)[0]) == [0, 1, 2], "by rate, at most all frames"


@pytest.mark.parametrize("angle", [90, -90, 180])
def test_rotation_is_applied(angle):
    stored = np.zeros((3, 32, 64, 3), np.uint8)
    stored[:, :16, :32] = 255  # above, left
    turned = np.rot90(stored[0], angle // 90)
    made = clip(3, frames=stored, size=(32, 64), rotation=angle)
    frames, _ = read_video(made, FrameSampling(1))
    assert frames[0].shape == turned.shape and np.abs(frames[0].astype(int) - turned).mean() < 8
    assert video_header(made).size == measure_video(made, FrameSampling(1))[0] == turned.shape[:2]


def test_large_frames_are_scaled_while_they_are_decoded():
    made = clip(2, size=(4320, 7680), codec="mpeg4", suffix="avi")
    header = video_header(made)
    assert header.size == (4320, 7680), "8K"
    frames, _ = read_video(made, FrameSampling(2))
    assert frames.shape[1] * frames.shape[2] <= reading.MAX_FRAME_PIXELS and shades(frames) == [0, 1]
    assert frames.shape[2] / frames.shape[1] == pytest.approx(16 / 9, abs=0.01)
    assert measure_video(made, FrameSampling(2))[0] == frames.shape[1:3]


def test_bounds(monkeypatch):
    made = clip(4)
    monkeypatch.setattr(reading, "MAX_CALL_PIXELS", 4 * 32 * 48 // 4)
    assert read_video(made, FrameSampling(4))[0].shape == (4, 16, 24, 3), "all frames together are bounded"
    monkeypatch.setattr(reading, "MAX_PIXELS", 32 * 48 - 1)
    with pytest.raises(DataError, match="frames of 32 x 48 pixels\n  expected: at most 1,535 pixels"):
        read_video(made)


# ---- damaged files


@pytest.mark.parametrize("part", [0.9, 0.8])
def test_the_end_is_missing(part):
    made = clip(30, header_first=True)
    with pytest.warns(UserWarning, match=r"a video: only \d+ of 30 frames can be read"):
        frames, times = read_video(made[: int(part * len(made))])
    whole = [round(4 * second) for second in times.seconds]
    assert frames.shape == (5, 32, 48, 3) and shades(frames) == [index % 15 for index in whole]
    assert whole[0] == 0 and 4 < whole[-1] < 27, "spread over the readable part"
    with pytest.raises(DataError, match="no frame can be decoded"):
        read_video(made[: len(made) // 2])


@pytest.mark.parametrize("codec", ["mpeg4", "libx264"])
def test_the_end_is_noise(codec):
    made = bytearray(clip(30, codec=codec, frames=NOISE, header_first=True))
    start = int(0.6 * len(made))
    made[start:] = np.random.default_rng(0).integers(0, 256, len(made) - start, np.uint8).tobytes()
    with pytest.warns(UserWarning, match=r"only \d+ of 30 frames can be read"):
        frames, times = read_video(bytes(made))
    assert frames.shape[0] == 5 and 0 < times.seconds[-1] < 0.7 * 30 / 4 and (np.diff(times.seconds) > 0).all()


def refused() -> dict[str, tuple[bytes, str]]:
    return {
        "empty": (b"", "cannot be opened as a video"),
        "text": (b"not a video\n" * 100, "cannot be opened as a video"),
        "half a header": (clip(8)[:40], "cannot be opened as a video"),
        "sound": (sound(), "with audio\n  expected: a video stream"),
        "sound with a cover": (sound(cover=True), "with audio\n  expected: a video stream"),
        "an unknown codec": (clip(4).replace(b"avc1", b"zzz1"), "a codec that FFmpeg does not know"),
        "a playlist": (b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n/etc/passwd\n", "cannot be opened as a video"),
        "a list of files": (b"ffconcat version 1.0\nfile /etc/passwd\n", "cannot be opened as a video"),
    }


@pytest.mark.parametrize("name", refused())
def test_what_is_no_video_is_refused(name, tmp_path):
    content, message = refused()[name]
    path = tmp_path / "a.mp4"
    path.write_bytes(content)
    for source in (content, path, str(path)):
        for read in (read_video, video_header):
            with pytest.raises(DataError, match=message) as refusal:
                read(source)
            assert refusal.value.todo and ("a.mp4" in refusal.value.given) == (source is not content)


def test_changed_bytes_are_read_or_refused():
    warnings.simplefilter("ignore")  # that not all frames can be read
    rng, refused = np.random.default_rng(7), 0
    files = [clip(12, codec=codec, suffix=suffix) for codec, suffix in (("mpeg4", "avi"), ("libx264", "mkv"))]
    for number in range(40):
        made = bytearray(files[number % 2])
        for place in rng.integers(0, min(len(made), 1500), 8):
            made[place] = rng.integers(256)
        try:
            frames, times = read_video(bytes(made))
            assert len(frames) == len(times.seconds) == 5
        except DataError:
            refused += 1
    assert 0 < refused < 40


def test_paths_that_cannot_be_read(tmp_path):
    for path in (tmp_path, tmp_path / "absent.mp4", "a\0b.mp4", "/dev/null"):
        with pytest.raises(DataError):
            read_video(path)


def test_without_pyav_the_command_is_given(monkeypatch):
    made = clip(2)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(DataError, match=r"pip install 'mllm-jax\[media\]'"):
        read_video(made)


# ---- messages

FRAMES = np.zeros((3, 4, 4, 3), np.uint8)


def test_frames_have_times():
    assert Video(FRAMES, fps=2).source is FRAMES and not Video(list(FRAMES), times=[0, 1, 5.5]).is_file
    assert Video("a.mp4").is_file and Video(b"", num_frames=3).is_file and Video("a.mp4", fps=2).is_file
    times = FrameTimes.of(3, None, [0.5, 1, 2.5])
    assert times.seconds.tolist() == [0.5, 1, 2.5] and times.fps == 1.0
    assert FrameTimes.of(3, 4.0, None).seconds.tolist() == [0, 0.25, 0.5]
    assert FrameTimes.of(1, None, [7.0]).seconds.tolist() == [7.0]


@pytest.mark.parametrize(
    "source,more,given",
    [
        (FRAMES, {}, "3 frames without their times"),
        (list(FRAMES), {}, "3 frames without their times"),
        (["a.png", "b.png"], {}, "2 frames without their times"),
        (FRAMES[0], dict(fps=1), r"an array \[4, 4, 3\]"),
        (7, dict(fps=1), "a int"),
        ([], dict(fps=1), "no frames"),
        (FRAMES, dict(times=[0, 1]), "3 frames with 2 times"),
        (FRAMES, dict(times=[0, 2, 1]), r"frames with times \[0, 2, 1\]"),
        (FRAMES, dict(times=[0, 1, float("nan")]), "times"),
        (FRAMES, dict(times="abc"), "times 'abc'"),
        (FRAMES, dict(fps=0), "fps=0"),
        (FRAMES, dict(fps="2"), "fps='2'"),
        (FRAMES, dict(fps=1, num_frames=2), "frames with num_frames"),
        ("a.mp4", dict(times=[0]), "file with times"),
        ("a.mp4", dict(fps=1, num_frames=2), "fps and num_frames"),
        ("a.mp4", dict(num_frames=0), "num_frames=0"),
        (None, dict(fps=-1), "fps=-1"),
    ],
)
def test_frames_without_right_times_are_refused(source, more, given):
    with pytest.raises(DataError, match=given) as refusal:
        Video(source, **more)
    assert "Video(frames, fps=...)" in refusal.value.todo
