"""Recordings with transcripts: manifests, LibriSpeech's folders, what is refused, the task, and the shipped config."""

from __future__ import annotations

import json
import pickle
import runpy
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import soundfile
import transformers
from tiny_language import WITH_IMAGES, write_folder
from tiny_runs import ROOT
from toy_data import quick_compilation

from mllm_jax.checkpoints.description import describe, rebuild
from mllm_jax.data.audio import audio_length
from mllm_jax.datasets.speech_records import QUESTION, SpeechRecords
from mllm_jax.errors import ConfigError, DataError
from mllm_jax.evaluation.run import evaluate_run
from mllm_jax.evaluation.tasks.clips import speech_task
from mllm_jax.generation.options import Answer
from mllm_jax.training.config_file import load_config
from mllm_jax.training.loop import train

RATE = 16_000
WORDS = ("one", "two", "three four", "five", "six seven", "eight")
CONFIG = ROOT / "configs" / "speech_whisper_smollm2.py"


def tone(path: Path, seconds: float, hertz: float = 440.0, rate: int = RATE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    times = np.arange(round(seconds * rate)) / rate
    soundfile.write(path, 0.3 * np.sin(2 * np.pi * hertz * times), rate)
    return path


@pytest.fixture
def folder(tmp_path) -> Path:
    """Returns a folder with six tones of 0.3 to 0.8 seconds, a.wav to f.wav in sub, and their manifest."""
    lines = []
    for number, text in enumerate(WORDS):
        name, seconds = f"sub/{'abcdef'[number]}.wav", 0.3 + number / 10
        tone(tmp_path / name, seconds, 200 + 100 * number)
        lines.append(json.dumps({"audio_filepath": name, "text": text, "duration": seconds}))
    (tmp_path / "all.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def written(folder: Path, *records: object) -> SpeechRecords:
    """Writes a manifest: texts and bytes as they are, other values as JSON."""
    lines = [one.encode() if isinstance(one, str) else one for one in records]
    lines = [one if isinstance(one, bytes) else json.dumps(one).encode() for one in lines]
    (folder / "some.jsonl").write_bytes(b"\n".join(lines))
    return SpeechRecords(str(folder / "some.jsonl"))


def heard(source) -> list[tuple[str, str]]:
    examples = [source.example(index) for index in range(len(source))]
    assert all(one.messages[0].text == QUESTION and one.messages[1].role == "assistant" for one in examples)
    return [(Path(one.media[0].source).name, one.messages[1].text) for one in examples]


def test_a_manifest(folder, monkeypatch):
    wanted = list(zip((f"{letter}.wav" for letter in "abcdef"), WORDS, strict=True))
    source = SpeechRecords(str(folder / "all.jsonl")).build()
    assert heard(source) == wanted and source.example(2).id == "sub/c.wav"
    assert audio_length(source.example(1).media[0]) == 6_400
    assert heard(pickle.loads(pickle.dumps(source))) == wanted
    for index in (-1, 6):
        with pytest.raises(IndexError, match="6 records"):
            source.example(index)
    monkeypatch.setenv("MLLM_DATA_DIR", str(folder))
    settings = SpeechRecords("all.jsonl", ".")
    assert heard(settings.build()) == wanted and rebuild(describe(settings)) == settings
    assert settings.build().fingerprint() == source.fingerprint()
    other = replace(settings, question="What is said?").build()
    assert other.fingerprint() != source.fingerprint() and other.example(0).messages[0].text == "What is said?"


def test_other_keys_a_byte_order_mark_and_empty_lines(folder):
    records = (
        '\ufeff{"audio": "sub/a.wav", "sentence": " one "}',
        "",
        {"path": "sub/../sub/b.wav", "text": "two", "id": 7, "duration": None, "offset": 0.0},
        "  ",
    )
    source = written(folder, *records).build()
    assert heard(source) == [("a.wav", "one"), ("b.wav", "two")]
    assert [source.example(index).id for index in (0, 1)] == ["sub/a.wav", "7"]


def test_long_recordings_are_left_out_also_by_their_headers(folder):
    settings = SpeechRecords(str(folder / "all.jsonl"), max_seconds=0.45)
    assert [text for _, text in heard(settings.build())] == ["one", "two"]
    names = [f"sub/{letter}.wav" for letter in "abc"]
    untimed = replace(written(folder, *({"audio": name, "text": name} for name in names)), max_seconds=0.45)
    assert [name for name, _ in heard(untimed.build())] == ["a.wav", "b.wav"]
    with pytest.raises(DataError, match=r"3 record\(s\), none to use"):
        replace(untimed, max_seconds=0.1).build()
    with pytest.raises(ConfigError, match="max_seconds=0"):
        SpeechRecords("all.jsonl", max_seconds=0)


GOOD = {"audio": "sub/a.wav", "text": "one"}


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ("no json", "line 2: "),
        ("[1]", "line 2 with a list"),
        (b'{"audio": "\xff", "text": "one"}', "line 2: "),
        ({"text": "one"}, r"line 2: a record with \['text'\]\n  expected: one of audio_filepath, audio, path"),
        ({"audio": "sub/b.wav"}, "line 2: .*\n  expected: one of text, sentence"),
        ({"audio": "sub/b.wav", "text": "  "}, "line 2: the text '  '"),
        ({"audio": "sub/b.wav", "text": 7}, "line 2: the text 7"),
        ({"audio": "sub/b.wav", "text": "\ud800"}, "line 2: the text"),
        ({"audio": "sub/./a.wav", "text": "again"}, "line 2: 'sub/a.wav', which is also in .* line 1"),
        ({"audio": "../a.wav", "text": "one"}, "line 2: the recording '../a.wav'\n  expected: a file inside"),
        ({"audio": "/etc/passwd", "text": "one"}, "line 2: the recording '/etc/passwd'"),
        ({"audio": ["sub/b.wav"], "text": "one"}, "line 2: the recording"),
        ({"audio": "a\0.wav", "text": "one"}, "line 2: the recording"),
        ('{"audio": "sub/b.wav", "text": "two", "duration": NaN}', "line 2: duration nan"),
        ('{"audio": "sub/b.wav", "text": "two", "duration": Infinity}', "line 2: duration inf"),
        ({"audio": "sub/b.wav", "text": "two", "duration": -1}, "line 2: duration -1"),
        ({"audio": "sub/b.wav", "text": "two", "duration": "2 s"}, "line 2: duration '2 s'"),
        ({"audio": "sub/b.wav", "text": "two", "offset": 1.5}, "line 2: offset 1.5"),
    ],
)
def test_a_line_that_is_no_record_is_refused_by_its_number(folder, record, said):
    with pytest.raises(DataError, match=said):
        written(folder, GOOD, record).build()


def test_a_missing_recording_is_refused_when_it_is_read(folder):
    source = written(folder, GOOD, {"audio": "sub/z.wav", "text": "lost"}, {"audio": "x" * 300, "text": "long"}).build()
    assert source.example(0).id == "sub/a.wav"
    for index, name in ((1, "z.wav"), (2, "xxx")):
        with pytest.raises(DataError, match=f"line {index + 1}: no recording .*{name}"):
            source.example(index)


def test_files_that_are_no_transcripts_are_refused(folder):
    (folder / "empty.jsonl").write_text("\n")
    for name, said in (
        ("empty.jsonl", "0 record"),
        ("gone.jsonl", "cannot be read"),
        ("sub", r"0 record\(s\), none to use\n.* \*.trans.txt"),
    ):
        with pytest.raises(DataError, match=said):
            SpeechRecords(str(folder / name)).build()


def test_the_folders_of_librispeech(tmp_path):
    tone(tmp_path / "19" / "198" / "19-198-0000.flac", 0.2)
    tone(tmp_path / "20" / "1" / "20-1-0003.wav", 0.5)
    (tmp_path / "19" / "198" / "19-198.trans.txt").write_text("19-198-0000 NORTHANGER ABBEY\n")
    (tmp_path / "20" / "1" / "20-1.trans.txt").write_text("20-1-0003 HELLO\n")
    source = SpeechRecords(str(tmp_path)).build()
    assert heard(source) == [("19-198-0000.flac", "NORTHANGER ABBEY"), ("20-1-0003.wav", "HELLO")]
    assert source.example(0).id == "19-198-0000"
    for line, said in ((b"20-1-0003", "the text ''"), (b"/etc/x A", "'/etc/x.flac'"), (b"20-1-0003 \xff", "the text")):
        (tmp_path / "20" / "1" / "20-1.trans.txt").write_bytes(line)
        with pytest.raises(DataError, match=f"20-1.trans.txt, line 1: .*{said}"):
            SpeechRecords(str(tmp_path)).build()


def test_the_task_of_transcription(folder):
    class Knower:
        def generate(self, conversations, **_):
            assert all(len(asked) == 1 and asked[0].role == "user" for asked in conversations)
            said = dict(heard(SpeechRecords(str(folder / "all.jsonl")).build()))
            media = (part for asked in conversations for part in asked[0].content if hasattr(part, "source"))
            return [Answer(said[Path(part.source).name].upper(), ()) for part in media]

    task = speech_task(SpeechRecords(str(folder / "all.jsonl")), name="held_out/mine")
    found = task.measure(Knower()).metrics
    assert task.name == "held_out/mine" and found["n"] == 6 and found["wer"] == 0 and found["wer_shuffled_media"] > 0.5


# ---- configs/speech_whisper_smollm2.py


def test_the_shipped_config_names_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ConfigError, match="no folder runs/whisper-small\n  expected: the files of openai/whisper-small"
    ):
        load_config(CONFIG)


@pytest.fixture
def experiment(folder):
    """Returns the shipped experiment with a tiny Whisper, a tiny LLM and the six tones."""
    sizes = dict(d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=32, decoder_ffn_dim=32)
    sizes |= dict(encoder_attention_heads=2, decoder_attention_heads=2, num_mel_bins=8, max_source_positions=50)
    ids = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 1)
    config = transformers.WhisperConfig(vocab_size=60, max_target_positions=8, **sizes, **ids)
    transformers.WhisperForConditionalGeneration(config).save_pretrained(folder / "whisper")
    llm, source = write_folder(folder / "llm", WITH_IMAGES), SpeechRecords(str(folder / "all.jsonl"), max_seconds=1)
    make = runpy.run_path(str(CONFIG))["experiment"]
    steps = {"align": 2, "transcribe": 2}
    return make(str(folder / "whisper"), str(llm), source, source, steps, 2, 128, seconds=1, dtype="float32")


@pytest.mark.slow
def test_the_shipped_experiment_trains_and_is_evaluated(experiment, tmp_path):
    stages = [replace(stage, validate_every=2, validation_batches=1) for stage in experiment.stages]
    short = replace(experiment, stages=tuple(stages))
    with quick_compilation():
        run = train(short, tmp_path / "run", devices=jax.devices()[:1])
        results = evaluate_run(run.path, devices=jax.devices()[:1], batch_size=4)
    assert run.unfinished(short) == []
    found = results["held_out/speech"]
    assert found["n"] == 6 and np.isfinite(found["wer"])
