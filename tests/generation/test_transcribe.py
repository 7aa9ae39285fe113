"""Transcription against transformers' Whisper: short and long form, beams, languages, word times; and its own parts."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import tiny_whisper
import torch
from tiny_whisper import END, IDS, RATE, Reference, sound
from toy_data import quick_compilation

import mllm_jax
from mllm_jax.cli.commands import main
from mllm_jax.errors import ConfigError, DataError
from mllm_jax.generation import speech_steps
from mllm_jax.generation.speech_options import SpeechOptions, compression_ratio
from mllm_jax.generation.transcript import Segment, Transcript, Word, formatted
from mllm_jax.generation.words import split_words

# One attempt without tests, as the default of transformers.
PLAIN = dict(language="de", temperatures=(0.0,), compression_ratio=None, logprob=None, no_speech=None)
TIMED = PLAIN | dict(timestamps="segment")
GERMAN = dict(language="de", task="transcribe", temperature=0.0)


@pytest.fixture(autouse=True, scope="module")
def _quickly():
    torch.set_num_threads(1)
    with quick_compilation():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_whisper.make(tmp_path_factory.mktemp("whisper"))


@pytest.fixture(scope="module")
def reference(folder) -> Reference:
    return Reference(folder)


@pytest.fixture(scope="module")
def assistant(folder) -> mllm_jax.Assistant:
    return mllm_jax.Assistant.load(folder)


def text_of(assistant, tokens) -> str:
    return assistant._transcriber.tokenizer.decode([int(t) for t in tokens if t < END]).strip()


def expected(assistant, found, seconds: float) -> list[tuple[float, float, str]]:
    """Returns transformers' segments with text, of which none lasts longer than the sound."""
    given = [(float(s["start"]), float(s["end"]), text_of(assistant, s["tokens"])) for s in found["segments"][0]]
    return [(min(start, seconds), min(end, seconds), text) for start, end, text in given if text]


def same_segments(transcript: Transcript, wanted: list[tuple[float, float, str]]) -> None:
    # There it also transcribes windows that begin in the padding of a short recording.
    wanted, padding = wanted[: len(transcript.segments)], wanted[len(transcript.segments) :]
    assert all(start == end for start, end, _ in padding)
    assert [segment.text for segment in transcript.segments] == [text for *_, text in wanted]
    ours = [(segment.start, segment.end) for segment in transcript.segments]
    np.testing.assert_allclose(ours, [times[:2] for times in wanted], atol=0.021)
    assert transcript.text and wanted


@pytest.mark.parametrize(
    ("seconds", "ours", "theirs"),
    [
        (1.31, {}, {}),
        (6.13, {}, {}),
        (6.13, dict(beams=3), dict(num_beams=3)),
        (6.13, dict(condition_on_previous=True), dict(condition_on_prev_tokens=True)),
    ],
    ids=["a window", "windows", "beams", "previous text"],
)
def test_segments_equal_those_of_transformers(assistant, reference, seconds, ours, theirs):
    samples, rate = sound(seconds)
    found = reference(samples, **GERMAN, **theirs)
    transcript = assistant.transcribe((samples, rate), **TIMED, **ours)
    same_segments(transcript, expected(assistant, found, seconds))
    assert len(transcript.segments) >= seconds // 3
    assert (transcript.language, transcript.language_probability) == ("de", None)


@pytest.mark.parametrize("previous", [False, True])
def test_a_prompt_precedes_windows_as_in_transformers(assistant, reference, previous):
    samples, rate = sound(4.5, seed=1)
    ids = torch.tensor([IDS["<|startofprev|>"], *assistant._transcriber.tokenizer.words(" Names")])
    found = reference(samples, **GERMAN, prompt_ids=ids, condition_on_prev_tokens=previous)
    said = assistant.transcribe((samples, rate), **TIMED, prompt="Names ", condition_on_previous=previous)
    same_segments(said, expected(assistant, found, 4.5))
    assert said.text != assistant.transcribe((samples, rate), **TIMED).text


def test_a_short_recording_has_one_segment_without_times(assistant, reference):
    samples, rate = sound(1.7, seed=2)
    found = reference(samples, **GERMAN, timed=False)
    transcript = assistant.transcribe((samples, rate), **PLAIN)
    (tokens,) = {tuple(segment["result"].tolist()) for segment in found["segments"][0][:1]}
    assert tokens[:4] == tuple(IDS[f"<|{name}|>"] for name in ("startoftranscript", "de", "transcribe", "notimestamps"))
    assert transcript.text == text_of(assistant, tokens[4:]) != ""
    assert [(s.start, s.end, s.text) for s in transcript.segments] == [(0, 1.7, transcript.text)]


def test_the_language_is_detected_and_its_probability_is_among_languages(assistant, reference):
    recordings = [sound(1.5, seed) for seed in range(4)]
    features = reference.extractor([s for s, _ in recordings], sampling_rate=RATE, return_tensors="pt").input_features
    with torch.no_grad():
        start = torch.full((4, 1), IDS["<|startoftranscript|>"])
        logits = reference.model(features, decoder_input_ids=start).logits[:, 0]
    codes = ["en", "de", "ja"]
    likely = logits[:, [IDS[f"<|{code}|>"] for code in codes]].softmax(1)
    found = assistant.transcribe(recordings, **PLAIN | dict(language=None))
    assert [transcript.language for transcript in found] == [codes[i] for i in likely.argmax(1)]
    ours = [transcript.language_probability for transcript in found]
    np.testing.assert_allclose(ours, likely.max(1).values, rtol=1e-4)
    silence = logits.softmax(1)[:, IDS["<|nospeech|>"]]
    np.testing.assert_allclose([t.segments[0].no_speech_probability for t in found], silence, rtol=1e-4)


@pytest.mark.parametrize("beams", [1, 3])
def test_the_mean_log_probability_is_that_of_transformers(assistant, reference, beams, monkeypatch):
    samples, rate = sound(1.31)
    found = reference(samples, **GERMAN, num_beams=beams, logprob_threshold=-1e9)
    result = found["segments"][0][0]["result"]
    tokens = result["sequences"]
    tokens = tokens[-len(result["scores"]) :] if beams == 1 else tokens[3:]
    ends = (tokens == END).nonzero()
    tokens = tokens[: ends[0, 0] + 1] if len(ends) else tokens
    wanted = reference.model._retrieve_avg_logprobs(result["scores"], tokens, 0.0)
    seen = []
    monkeypatch.setattr(SpeechOptions, "fails", lambda self, attempt, *_: seen.append(attempt))
    assistant.transcribe((samples, rate), **TIMED, beams=beams)
    assert list(seen[0].tokens) == tokens.tolist()
    assert seen[0].logprob == pytest.approx(float(wanted), rel=1e-4)


@pytest.mark.parametrize("beams", [1, 3])
def test_word_times_equal_those_of_transformers(assistant, reference, beams):
    samples, rate = sound(4.7, seed=4)
    found = reference(samples, **GERMAN, num_beams=beams, return_token_timestamps=True)
    wanted = []
    for segment in found["segments"][0]:
        tokens, times = segment["tokens"].tolist(), segment["token_timestamps"].tolist()
        places = [i for i, token in enumerate(tokens) if token < END]
        groups = split_words([tokens[i] for i in places], assistant._transcriber.tokenizer.decode)
        wanted += [
            (times[places[parts[0]] - 1], min(times[places[parts[-1]]], 4.7)) for text, parts in groups if text.strip()
        ]
    transcript = assistant.transcribe((samples, rate), **PLAIN, timestamps="word", beams=beams)
    words = [word for segment in transcript.segments for word in segment.words]
    assert len(words) > 3 and all(0 < word.probability <= 1 for word in words)
    np.testing.assert_allclose([(word.start, word.end) for word in words], wanted, atol=1e-5)


@pytest.mark.parametrize("beams", [1, 3])
def test_a_cache_that_grows_changes_no_text(assistant, monkeypatch, beams):
    """Checks windows with texts that are longer than the room that their cache has at first."""
    audio, rooms, grow = sound(6.13), [], speech_steps.SpeechSteps.grow
    wanted = assistant.transcribe(audio, **TIMED, beams=beams)
    monkeypatch.setattr(speech_steps, "FEW", 1)
    noted = lambda self, state, room: rooms.append(room) or grow(self, state, room)  # noqa: E731
    monkeypatch.setattr(speech_steps.SpeechSteps, "grow", noted)
    assert assistant.transcribe(audio, **TIMED, beams=beams) == wanted
    assert rooms == [32, tiny_whisper.LONGEST]


# ---- attempts


def test_a_text_that_fails_a_test_is_written_again_at_the_next_temperature(assistant):
    audio = sound(1.9)
    greedy, warm = (assistant.transcribe(audio, **TIMED | dict(temperatures=(t,))) for t in (0.0, 1.0))
    assert greedy.text != warm.text
    for name, failed, passed in (("compression_ratio", 0.1, 100.0), ("logprob", 0.0, -100.0)):
        for threshold, wanted in ((failed, warm), (passed, greedy)):
            options = TIMED | {"temperatures": (0.0, 1.0), name: threshold}
            assert assistant.transcribe(audio, **options).text == wanted.text, (name, threshold)
    again = assistant.transcribe(audio, **TIMED | dict(temperatures=(1.0,), seed=1))
    assert again.text != warm.text


def test_an_improbable_window_without_speech_has_no_text(assistant):
    audio = sound(4.2)
    assert assistant.transcribe(audio, **TIMED).segments
    silent = assistant.transcribe(audio, **TIMED | dict(no_speech=0.0, logprob=0.0, temperatures=(0.0, 1.0)))
    assert silent == Transcript("", "de", None, ())
    assert assistant.transcribe(audio, **TIMED | dict(no_speech=1.0, logprob=0.0)).segments


def test_repetition_compresses():
    assert compression_ratio([7] * 200, 50_000) > 10 > 1.2 > compression_ratio(range(0, 50_000, 251), 50_000)


# ---- kinds of sound


def test_silence_and_ten_milliseconds(assistant):
    for samples in (np.zeros(3 * RATE, np.float32), sound(0.01)[0]):
        transcript = assistant.transcribe((samples, RATE), **TIMED)
        assert all(0 <= s.start <= s.end <= len(samples) / RATE for s in transcript.segments)
    silent = assistant.transcribe((np.zeros(5 * RATE, np.float32), RATE), **TIMED, voice_activity=True)
    assert silent == Transcript("", "de", None, ())


def test_voice_activity_passes_over_silence(assistant):
    (first, _), (last, _) = sound(1.0), sound(1.5, seed=5)
    samples = np.concatenate([first, np.zeros(9 * RATE, np.float32), last])
    found = assistant.transcribe((samples, RATE), **TIMED, voice_activity=True)
    starts = [segment.start for segment in found.segments]
    assert starts and all(start < 2 or start >= 9.69 for start in starts) and max(starts) > 9
    plain = assistant.transcribe((samples, RATE), **TIMED)
    assert any(2 < segment.start < 9 for segment in plain.segments)


def test_a_path_bytes_and_another_rate_are_read(assistant, tmp_path):
    samples, _ = sound(1.9)
    path = tmp_path / "a.wav"
    soundfile.write(path, samples, RATE, subtype="FLOAT")
    wanted = assistant.transcribe((samples, RATE), **TIMED)
    assert assistant.transcribe(path, **TIMED) == wanted == assistant.transcribe(path.read_bytes(), **TIMED)
    slow = assistant.transcribe((samples, 8_000), **TIMED)
    assert slow.segments[-1].end <= 3.8 and slow.segments[-1].end > 1.9


def test_a_list_gives_what_one_by_one_gives_and_streams_in_order(assistant):
    recordings = [sound(seconds, seed) for seed, seconds in enumerate((6.2, 0.8, 4.4))]
    streamed, progress = [[] for _ in recordings], []
    found = assistant.transcribe(
        recordings,
        **TIMED,
        batch_size=2,
        on_segment=lambda index, segment: streamed[index].append(segment),
        on_progress=progress.append,
    )
    assert [tuple(segments) for segments in streamed] == [transcript.segments for transcript in found]
    assert progress == sorted(progress) and progress[-1] == pytest.approx(11.4) and len(progress) >= 4
    for recording, transcript in zip(recordings, found, strict=True):
        alone = []
        single = assistant.transcribe(recording, **TIMED, on_segment=alone.append)
        assert tuple(alone) == single.segments and single.text == transcript.text
        pairs = zip(single.segments, transcript.segments, strict=True)
        assert all((a.start, a.end, a.text) == (b.start, b.end, b.text) for a, b in pairs)
    assert assistant.transcribe([], **TIMED) == []


def test_segments_come_before_the_recording_ends(assistant):
    """Stops in the middle: what was heard until then has been passed on."""

    class Stop(Exception):
        pass

    def stop(segment):
        raise Stop

    progress = []
    with pytest.raises(Stop):
        assistant.transcribe(sound(8.2), **TIMED, on_segment=stop, on_progress=progress.append)
    assert progress == []


# ---- refusals


def test_what_a_model_cannot_do_is_refused(assistant, folder, tmp_path):
    audio = sound(1.0)
    for options, said in (
        (dict(language="klingon"), "klingon"),
        (dict(language="fr"), "one of de, en, ja"),
        (dict(task="sing"), "'transcribe', 'translate'"),
        (dict(timestamps="letter"), "letter"),
        (dict(beams=0), "beams=0"),
        (dict(temperatures=()), "temperatures=()"),
        (dict(beam=2), "beam="),
    ):
        with pytest.raises(ConfigError, match=said.replace("(", r"\(").replace(")", r"\)")):
            assistant.transcribe(audio, **options)
    with pytest.raises(DataError):
        assistant.transcribe([audio, b"no sound"], **TIMED)
    english = shutil.copytree(folder, tmp_path / "english")
    settings = tiny_whisper.GENERATION | dict(is_multilingual=False)
    for missing in ("alignment_heads", "no_timestamps_token_id", "prev_sot_token_id"):
        settings.pop(missing)
    (english / "generation_config.json").write_text(json.dumps(settings))
    tokenizer = (english / "tokenizer.json").read_text()
    for token in ("<|notimestamps|>", "<|startofprev|>"):
        tokenizer = tokenizer.replace(token, token.replace("|>", "_|>"))
    (english / "tokenizer.json").write_text(tokenizer)
    english = mllm_jax.Assistant.load(english)
    for options, said in (
        (dict(task="translate"), "multilingual"),
        (dict(language="de"), "one of en"),
        (dict(timestamps="segment"), "no_timestamps_token_id"),
        (dict(prompt="Names"), "prev_sot_token_id"),
    ):
        with pytest.raises(ConfigError, match=said):
            english.transcribe(audio, **options)
    with pytest.raises(ConfigError, match="at most 2 seconds"):
        english.transcribe(sound(2.5))
    with pytest.raises(ConfigError, match="asked for text"):
        english.generate("Hello")


def test_features_of_another_size_are_refused(folder, tmp_path):
    other = shutil.copytree(folder, tmp_path / "other")
    settings = json.loads((other / "preprocessor_config.json").read_text())
    (other / "preprocessor_config.json").write_text(json.dumps(settings | dict(chunk_length=3)))
    with pytest.raises(ConfigError, match="8 bands and 300 frames"):
        mllm_jax.Assistant.load(other)


# ---- formats and the command

SAID = Transcript(
    "Hello there. Good --> bye",
    "en",
    0.9,
    (
        Segment(0.0, 1.5, "Hello there.", (Word(0.0, 0.5, "Hello", 0.9), Word(0.5, 1.4996, "there.", 0.8)), 0.1),
        Segment(3_661.25, 3_663.0, "Good --> bye", (), 0.2),
    ),
)


def test_formats_have_exact_texts():
    assert formatted(SAID, "txt") == "Hello there.\nGood --> bye\n"
    cues = [
        ("00:00:00{}000 --> 00:00:00{}500", "Hello"),
        ("00:00:00{}500 --> 00:00:01{}500", "there."),
        ("01:01:01{}250 --> 01:01:03{}000", "Good -> bye"),
    ]
    srt = "\n".join(f"{i}\n{times.format(',', ',')}\n{text}\n" for i, (times, text) in enumerate(cues, start=1))
    assert formatted(SAID, "srt") == srt
    vtt = "\n".join(f"{times.format('.', '.')}\n{text}\n" for times, text in cues)
    assert formatted(SAID, "vtt") == "WEBVTT\n\n" + vtt
    found = json.loads(formatted(SAID, "json"))
    assert found["segments"][0]["words"][1] == dict(start=0.5, end=1.4996, text="there.", probability=0.8)
    assert (found["language"], found["language_probability"], found["text"]) == ("en", 0.9, SAID.text)


def test_the_command_writes_a_file_for_each_recording(assistant, folder, tmp_path, capsys, monkeypatch):
    given = tmp_path / "sounds"
    (given / "more").mkdir(parents=True)
    recordings = {"a": sound(2.6), "more/b": sound(1.2, seed=1)}
    for name, (samples, rate) in recordings.items():
        soundfile.write(given / f"{name}.wav", samples, rate, subtype="FLOAT")
    (given / "notes.txt").write_text("not sound")
    (given / "bad.wav").write_text("not sound either")
    command = ["transcribe", str(given), "--model", str(folder), "--language", "german", "--temperatures", "0"]
    code = main([*command, "--format", "srt", "--out", str(tmp_path / "out")])
    wanted = dict(language="de", temperatures=(0.0,), timestamps="segment")
    for name, audio in recordings.items():
        text = (tmp_path / "out" / f"{name}.srt").read_text()
        assert text == formatted(assistant.transcribe(audio, **wanted), "srt")
    assert code == 1 and not (tmp_path / "out" / "bad.srt").exists()
    shown = capsys.readouterr()
    assert "bad.wav" in shown.err and "seconds" in shown.err
    assert main([*command, "--format", "srt", "--out", str(tmp_path / "out")]) == 2
    assert main([*command, "--format", "vtt"]) == 2  # several recordings without --out
    assert "--overwrite" in (shown := capsys.readouterr()).err and "--out" in shown.err

    piped = io.BytesIO((given / "a.wav").read_bytes())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(piped))
    assert main(["transcribe", "-", *command[2:]]) == 0
    text = formatted(assistant.transcribe(recordings["a"], **wanted | dict(timestamps=None)), "txt")
    assert capsys.readouterr().out == text != ""
