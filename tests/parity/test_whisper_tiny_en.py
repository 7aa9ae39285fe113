"""The folder that tests/assets/whisper_tiny_en.py makes: transformers opens it, and it hears words; so do we.

benchmarks/whisper_real.py prints the word error rates of 100 prompts.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
import torch
from asterisk_package import SOUNDS, NotFetched, asterisk
from foxdot_package import foxdot
from transformers import WhisperForConditionalGeneration, WhisperProcessor
from transformers.models.whisper.modeling_whisper import sinusoids
from whisper_tiny_en import NO_TIMESTAMPS, REQUIREMENTS, whisper_tiny_en

import mllm_jax
from mllm_jax.data.audio import as_audio
from mllm_jax.data.processing.text_normalizer import EnglishNormalizer
from mllm_jax.datasets.asterisk_speech import AsteriskSpeech
from mllm_jax.evaluation.metrics import wer

FETCH = os.environ.get("CI") == "true"


@pytest.fixture(scope="module")
def folder(require_asset) -> Path:
    """Returns the folder, downloaded only if CI=true."""
    found = whisper_tiny_en(fetch=FETCH)
    require_asset(found, f"the package of {REQUIREMENTS.name}: python tests/assets/whisper_tiny_en.py")
    return found


@pytest.fixture(scope="module")
def theirs(folder):
    torch.set_num_threads(1)
    model = WhisperForConditionalGeneration.from_pretrained(folder).eval()
    return model, WhisperProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def transcribe(theirs):
    model, processor = theirs

    def transcribe(*paths: Path, **options) -> list[str]:
        heard = []
        for path in paths:
            samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
            heard.append(soxr.resample(samples.mean(axis=1), rate, 16_000))
        features = processor(heard, sampling_rate=16_000, return_tensors="pt").input_features
        with torch.no_grad():
            said = model.generate(features, max_new_tokens=48, **options)
        shown = dict(decode_with_timestamps=True) if options else dict(skip_special_tokens=True)
        return [text.strip() for text in processor.batch_decode(said, **shown)]

    return transcribe


def test_every_tensor_has_its_name_and_none_is_missing(folder):
    model, found = WhisperForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(found.values()), found
    assert sum(value.numel() for value in model.parameters()) == 37_760_256
    assert all(torch.equal(value, value.half().float()) for value in model.parameters())
    # The encoder's positions are computed, not learned: a known table in the place where transformers reads it.
    difference = model.model.encoder.embed_positions.weight - sinusoids(1500, 384)
    assert difference.abs().max() < 1e-3


def test_the_tokenizer_has_the_special_tokens_and_the_times(folder):
    tokenizer = WhisperProcessor.from_pretrained(folder).tokenizer
    assert len(tokenizer) == 51864 and tokenizer.all_special_ids[-1] == NO_TIMESTAMPS
    ids = tokenizer("Hello there").input_ids
    assert tokenizer.decode(ids) == "<|startoftranscript|><|notimestamps|>Hello there<|endoftext|>"
    assert tokenizer.convert_tokens_to_ids(["<|0.00|>", "<|29.98|>", "<|30.00|>"]) == [50363, 51862, 51863]
    if (folder / "normalizer.json").is_file():
        assert tokenizer.normalize("Two colours, please!") == "2 colors please"


def test_it_hears_words(transcribe, require_asset):
    found = foxdot(fetch=FETCH)
    require_asset(found, "FoxDot's sounds: python tests/assets/foxdot_package.py")
    voices = found / "snd" / "_"
    assert transcribe(voices / "1" / "one1.wav", voices / "2" / "two1.wav", voices / "3" / "three1.wav") == [
        "One.",
        "Two.",
        "3",
    ]


def test_it_hears_sentences(transcribe, require_asset):
    try:
        found = asterisk(fetch=FETCH)
    except NotFetched as reason:
        pytest.skip(f"Asterisk's prompts: {reason}")
    require_asset(found, "Asterisk's prompts: python tests/assets/asterisk_package.py")
    login, toggle = (found / SOUNDS / f"{name}.wav" for name in ("agent-alreadyon", "dictate/both_help"))
    assert transcribe(login, toggle) == [
        "That agent is already logged on. Please enter your agent number followed by the pound key.",
        "Press star to toggle pause. Press pound to enter a new dictation file name.",
    ]
    (timed,) = transcribe(login, return_timestamps=True)
    times = [float(part.split("|>")[0]) for part in timed.split("<|")[1:] if part[0].isdigit()]
    assert times[0] < 0.5 and times == sorted(times) and np.isclose(times[-1], 4.9, atol=0.8)


# ---- ours beside transformers

PLAIN = dict(temperatures=(0.0,), compression_ratio=None, logprob=None, no_speech=None)  # as transformers' defaults


@pytest.fixture(scope="module")
def prompts(require_asset) -> list[tuple[Path, str]]:
    """Returns 100 of Asterisk's prompts of four words or more, with their texts, of which few are transcribed alone."""
    try:
        found = asterisk(fetch=FETCH)
    except NotFetched as reason:
        pytest.skip(f"Asterisk's prompts: {reason}")
    require_asset(found, "Asterisk's prompts: python tests/assets/asterisk_package.py")
    source = AsteriskSpeech(folder=str(found)).build()
    pairs = [(source.folder / f"{p.name}.wav", p.text) for p in source.prompts if len(p.text.split()) >= 4]
    return [pairs[i] for i in np.linspace(0, len(pairs) - 1, 100).astype(int)]


@pytest.fixture(scope="module")
def ours(folder, optimized) -> mllm_jax.Assistant:
    return mllm_jax.Assistant.load(folder)


@pytest.fixture(scope="module")
def said(ours, prompts) -> list[str]:
    return [found.text for found in ours.transcribe([path for path, _ in prompts[::5]], **PLAIN, batch_size=1)]


def error_rate(folder: Path, answers: list[str], targets: list[str]) -> float:
    normalise = EnglishNormalizer(str(folder))
    return wer([normalise(text) for text in answers], [normalise(text) for text in targets])


@pytest.mark.slow
def test_transcripts_of_20_clips_equal_those_of_transformers(folder, theirs, prompts, said):
    model, processor = theirs
    wanted = []
    for start in range(0, 100, 50):
        heard = [as_audio(path) for path, _ in prompts[start : start + 50 : 5]]
        with torch.no_grad():
            tokens = model.generate(processor(heard, sampling_rate=16_000, return_tensors="pt").input_features)
        wanted += [text.strip() for text in processor.batch_decode(tokens, skip_special_tokens=True)]
    assert len(wanted) == 20 and said == wanted
    rate = error_rate(folder, said, [text for _, text in prompts[::5]])
    print(f"word error rate of 20 prompts: {100 * rate:.2f} %")
    assert rate < 0.12


def joined(prompts, seconds: float) -> tuple[np.ndarray, str]:
    """Returns prompts with half a second of silence after each, and their text."""
    pieces, texts = [], []
    for path, text in prompts:
        pieces += [as_audio(path), np.zeros(8_000, np.float32)]
        texts.append(text)
        if sum(map(len, pieces)) >= seconds * 16_000:
            return np.concatenate(pieces), " ".join(texts)
    raise AssertionError(f"the prompts are shorter than {seconds} seconds")


def generated(theirs, samples: np.ndarray, **options) -> dict:
    """Returns what transformers' sequential long form returns."""
    model, processor = theirs
    how = dict(sampling_rate=16_000, return_tensors="pt", return_attention_mask=True)
    given = processor(samples, truncation=False, padding="longest", **how)
    how = dict(return_timestamps=True, return_segments=True, attention_mask=given.attention_mask)
    with torch.no_grad():
        return model.generate(given.input_features, **how, **options)


@pytest.mark.slow
def test_three_minutes_in_sequential_long_form(folder, ours, theirs, prompts):
    samples, target = joined(prompts, 180)
    wanted = theirs[1].tokenizer.decode(generated(theirs, samples)["sequences"][0], skip_special_tokens=True).strip()
    found = ours.transcribe((samples, 16_000), **PLAIN)
    rates = [error_rate(folder, [text], [target]) for text in (found.text, wanted)]
    print(f"word error rate of {len(samples) / 16_000:.0f} s: ours {100 * rates[0]:.2f}, theirs {100 * rates[1]:.2f} %")
    assert abs(rates[0] - rates[1]) < 0.01 and rates[0] < 0.15
    assert len(found.segments) > 20 and found.segments[-1].end > 170


@pytest.mark.slow
def test_word_times(folder, ours, theirs, prompts):
    samples, _ = joined(prompts[10:], 32)
    theirs[0].set_attn_implementation("eager")  # which returns the attention
    decode, times = theirs[1].tokenizer.decode, []
    for segment in generated(theirs, samples, return_token_timestamps=True)["segments"][0]:
        tokens, ends = segment["tokens"].tolist(), segment["token_timestamps"].tolist()
        words = [(i, decode([token])) for i, token in enumerate(tokens) if token < 50_256]
        # A token begins where the one before it ends.
        times += [(text.strip(), ends[i - 1]) for i, text in words if text.startswith(" ") and text.strip()]
    found = ours.transcribe((samples, 16_000), timestamps="word", **PLAIN)
    begun = [(word.text, word.start) for segment in found.segments for word in segment.words]
    assert len(begun) == len(times) > 40
    assert all(ours.startswith(theirs) for (ours, _), (theirs, _) in zip(begun, times, strict=True))
    largest = max(abs(ours - theirs) for (_, ours), (_, theirs) in zip(begun, times, strict=True))
    print(f"largest difference of {len(begun)} word times: {largest:.3f} s")
    assert largest < 0.1
