"""Qwen2-Audio against transformers: encoder, batches, logits, answers, folders both ways, loss and gradients."""

from __future__ import annotations

import io
import json
import re
import wave
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import transformers
from qwen2_audio_reference import CASES, GIVEN, HEARD, MARK, NEW_TOKENS, SOUNDS, TEXTS, Loaded, sound
from rich.console import Console
from safetensors.torch import load_file, save_file
from toy_data import quick_compilation
from transformers.models.qwen2_audio.modeling_qwen2_audio import Qwen2AudioEncoder

from mllm_jax import (
    AdamW,
    Assistant,
    Audio,
    Experiment,
    Message,
    Mixture,
    MLPProjectorConfig,
    NextToken,
    Pretrained,
    Processor,
    Stage,
    Text,
    TokenizerConfig,
    Weighted,
    from_pretrained,
    save_pretrained,
)
from mllm_jax.checkpoints.hf import hub_tensors
from mllm_jax.cli import main
from mllm_jax.data.audio import as_audio
from mllm_jax.data.message import Example
from mllm_jax.data.processing.audio import LogMel
from mllm_jax.encoders.qwen2_audio import Qwen2AudioEncoderConfig
from mllm_jax.errors import ConfigError, DataError
from mllm_jax.generation.conversation import Dialogue, chat
from mllm_jax.generation.generate import complete
from mllm_jax.generation.options import Options
from mllm_jax.generation.prompts import PromptFile
from mllm_jax.generation.sampling import Sampling
from mllm_jax.models.qwen2_audio import TEMPLATE, Qwen2AudioLayout
from mllm_jax.models.registry import abstract_params, family_of_config
from mllm_jax.training.config_file import load_config
from mllm_jax.training.loop import train

MADE = {}


@pytest.fixture(autouse=True)
def _quickly():
    with quick_compilation():
        yield


@pytest.fixture
def load(randomise, tmp_path_factory):
    """Returns a function that makes each case once."""

    def make(case: str) -> Loaded:
        if case not in MADE:
            MADE[case] = Loaded(case, tmp_path_factory.mktemp("theirs"), randomise)
        return MADE[case]

    return make


@pytest.fixture(params=CASES)
def loaded(request, load) -> Loaded:
    return load(request.param)


# ---- the encoder


@pytest.mark.parametrize("case", CASES)
def test_the_encoder_alone(case, randomise, assert_close, tmp_path):
    """Checks every hidden state at valid frames for unequal lengths, without a mask, and the folder written."""
    config = transformers.Qwen2AudioEncoder.config_class(**HEARD | CASES[case][0])
    reference = randomise(Qwen2AudioEncoder._from_config(config, attn_implementation="eager"), seed=2)
    reference.save_pretrained(tmp_path / "theirs")
    module, params = from_pretrained(tmp_path / "theirs")
    c, frames = module.config, 2 * config.max_source_positions
    audio = np.random.default_rng(0).normal(size=(4, config.num_mel_bins, frames)).astype(np.float32)
    lengths = np.array([frames, frames // 2 + 1, 7, 3])
    mask = (np.arange(frames) < lengths[:, None]).astype(np.int32)
    heard, kept = (n.numpy() for n in reference._get_feat_extract_output_lengths(torch.tensor(lengths)))
    np.testing.assert_array_equal(c.frames(lengths), kept)
    assert [c.frames(n) for n in range(8)] == [0, 0, 0, 1, 1, 1, 1, 2] and c.rate == 16_000

    hidden = np.where(np.arange(frames // 2) < heard[:, None], 0.0, -1e9)[:, None, None]
    run = jax.jit(module.apply, static_argnames="output_hidden_states")
    for given, seen in ((None, None), (mask, torch.tensor(hidden, dtype=torch.float32))):
        ours = run({"params": params}, audio, given, output_hidden_states=True)
        with torch.no_grad():
            theirs = reference(torch.tensor(audio), seen, output_hidden_states=True)
        assert len(ours.hidden_states) == len(theirs.hidden_states) == c.num_layers + 1
        np.testing.assert_array_equal(ours.hidden_states[-1], ours.last_hidden_state)
        for mine, other in zip(ours.hidden_states, theirs.hidden_states, strict=True):
            counts = heard if mine.shape[1] == frames // 2 else kept
            valid = np.arange(mine.shape[1]) < (counts if given is not None else np.full(4, frames))[:, None]
            assert_close(np.asarray(mine)[valid], other.numpy()[valid], 1e-5)
    np.testing.assert_array_equal(ours.mask.sum(axis=1), kept)
    assert not np.array_equal(ours.last_hidden_state, run({"params": params}, audio).last_hidden_state)

    save_pretrained(module, params, tmp_path / "ours")
    opened, info = Qwen2AudioEncoder.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert all(torch.equal(x, opened.state_dict()[name]) for name, x in reference.state_dict().items())
    assert family_of_config(c).from_hf(family_of_config(c).to_hf(c)) == c


# ---- the whole model


def test_a_batch_is_what_their_processor_makes(loaded):
    theirs, ours = loaded.inputs(), loaded.batch
    np.testing.assert_array_equal(ours["segments"], theirs["attention_mask"])
    np.testing.assert_array_equal(ours["tokens"], theirs["input_ids"] * theirs["attention_mask"])
    slots = [(row, slot) for row, sounds in enumerate(SOUNDS) for slot in range(len(sounds))]
    for index, where in enumerate(slots):
        np.testing.assert_array_equal(ours["audio_masks"][where], theirs["feature_attention_mask"][index])
        np.testing.assert_allclose(ours["audio_sounds"][where], theirs["input_features"][index], atol=2e-4)
    assert ours["audio_masks"].sum() == theirs["feature_attention_mask"].sum() and not ours["audio_masks"][1].any()
    np.testing.assert_array_equal(ours["media_index"] >= 0, ours["tokens"] == loaded.ids["<|AUDIO|>"])


def test_logits(loaded, assert_close):
    with torch.no_grad():
        theirs = loaded.reference(**loaded.inputs()).logits.numpy()
    ours = np.asarray(loaded.apply({"params": loaded.params}, loaded.batch).logits)
    for row, segments in enumerate(loaded.batch["segments"]):
        length = int(segments.sum())
        assert_close(ours[row, :length], theirs[row, :length], 1e-5, f"row {row}")


def test_greedy_answers(loaded):
    """Checks the tokens of each row: in a batch of unequal prompts, one with text alone; and of each row by itself."""
    settings = transformers.GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
    inputs = loaded.inputs("left")
    with torch.no_grad():
        out = loaded.reference.generate(**inputs, generation_config=settings)
    wanted = out[:, inputs["input_ids"].shape[1] :].tolist()
    how = dict(max_new_tokens=NEW_TOKENS, ignore_eos=True)
    found = complete(loaded.model, loaded.params, loaded.batch, loaded.ours, **how)
    assert [list(answer.tokens) for answer in found] == wanted and len({*map(tuple, wanted)}) == len(TEXTS)
    shape = dict(slots={"audio": 3}, length=loaded.batch["tokens"].shape[1])
    for text, sounds, together in zip(TEXTS, GIVEN, wanted, strict=True):
        alone = loaded.ours(text, audios=sounds, **shape)
        assert list(complete(loaded.model, loaded.params, alone, loaded.ours, **how)[0].tokens) == together


def test_the_folder_written_opens_there(loaded, assert_close, tmp_path):
    save_pretrained(loaded.model, loaded.params, tmp_path / "ours", companions=loaded.folder)
    stored = load_file(tmp_path / "ours" / "model.safetensors")
    assert stored.keys() == load_file(loaded.folder / "model.safetensors").keys()
    again, info = type(loaded.reference).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in loaded.reference.state_dict().items())
    with torch.no_grad():
        found, kept = (model(**loaded.inputs()).logits for model in (again.eval(), loaded.reference))
    assert_close(found, kept, 1e-5)
    options = CASES[loaded.case][0]
    assert {name: getattr(again.config.audio_config, name) for name in options} == options
    model, params = from_pretrained(tmp_path / "ours")
    assert model.config == loaded.model.config
    jax.tree.map(np.testing.assert_array_equal, params, loaded.params)
    # The reference's names in memory are others.
    assert "model.audio_tower.conv1.weight" in loaded.reference.state_dict() and "audio_tower.conv1.weight" in stored
    save_file(loaded.reference.state_dict(), tmp_path / "ours" / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, from_pretrained(tmp_path / "ours")[1], loaded.params)


def test_a_head_that_is_the_embedding(load, tmp_path, assert_close):
    """Checks a folder of transformers 4, which stores no tied head; such a model is not written."""
    loaded = load("tied")
    assert not loaded.model.config.llm.tie_word_embeddings
    stored = load_file(loaded.folder / "model.safetensors")
    del stored["language_model.lm_head.weight"]
    (tmp_path / "config.json").write_bytes((loaded.folder / "config.json").read_bytes())
    save_file(stored, tmp_path / "model.safetensors")
    model, params = from_pretrained(tmp_path)
    assert model.config.llm.tie_word_embeddings and "lm_head" not in params["llm"]
    head = loaded.reference.lm_head.weight.data
    loaded.reference.lm_head.weight.data = loaded.reference.model.language_model.embed_tokens.weight.data
    with torch.no_grad():
        theirs = loaded.reference(**loaded.inputs()).logits.numpy()
    loaded.reference.lm_head.weight.data = head
    real = loaded.batch["segments"] > 0
    assert_close(jax.jit(model.apply)({"params": params}, loaded.batch).logits[real], theirs[real], 1e-5)
    with pytest.raises(ConfigError, match="head is the embedding"):
        save_pretrained(model, params, tmp_path / "ours")


# ---- conversations

TALK = [
    {"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": "And this?"}, {"type": "audio"}]},
    {"role": "assistant", "content": "A bell."},
    {"role": "user", "content": [{"type": "text", "text": "This?"}, {"type": "audio"}]},
]


def said(number: int, answer: str) -> Example:
    heard = tuple(Audio(samples, rate=16_000) for samples in SOUNDS[number])
    return Example((Message("user", (*heard, Text("What is it?"))), Message("assistant", answer)))


def test_conversations(load, tmp_path):
    """Checks the template, also in a folder without one, and sounds as parts, as files and given separately."""
    loaded = load("untied")
    text = loaded.theirs.apply_chat_template(TALK, add_generation_prompt=True, tokenize=False)
    wanted = loaded.inputs(texts=[text], sounds=SOUNDS[3:])["input_ids"].numpy()
    for path in loaded.folder.iterdir():
        if "template" not in path.name:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    bare = Processor.from_pretrained(tmp_path)
    assert bare.tokenizer.template == TEMPLATE != loaded.ours.tokenizer.template
    sounds = iter(GIVEN[3])
    parts = [
        {**turn, "content": [{**p, "audio": next(sounds)} if p["type"] == "audio" else p for p in turn["content"]]}
        if isinstance(turn["content"], list)
        else turn
        for turn in TALK
    ]
    ours = loaded.ours
    for batch in (bare(TALK, audios=GIVEN[3]), ours(parts), ours([parts]), bare([TALK], audios=GIVEN[3:])):
        np.testing.assert_array_equal(batch["tokens"], wanted)
        assert batch["audio_sounds"].shape == (1, 3, 10, 100)
    with pytest.raises(DataError, match="has '<|AUDIO|>' in it"):
        loaded.ours([{"role": "user", "content": "<|AUDIO|>"}])


def test_a_sound_of_any_length(load):
    """Checks pieces of a long sound: the encoder's vectors of each, one after the other."""
    loaded = load("untied")
    long = sound(2.35)
    batch = loaded.ours(f"{MARK}?", audios=[(long, 16_000)])
    assert batch["audio_sounds"].shape == (1, 3, 10, 100) and batch["audio_masks"][0].sum(axis=1).tolist() == [
        100,
        100,
        35,
    ]
    at = batch["media_index"][0][batch["media_index"][0] >= 0]
    np.testing.assert_array_equal(at, [*range(25), *range(25, 50), *range(50, 59)])
    pieces = [(long[start : start + 16_000], 16_000) for start in range(0, len(long), 16_000)]
    apart = loaded.ours(f"{MARK}{MARK}{MARK}?", audios=pieces)
    np.testing.assert_array_equal(apart["audio_sounds"], batch["audio_sounds"])
    # 10 ms more than two seconds are no media token.
    assert loaded.ours(f"{MARK}?", audios=[(sound(2.01), 16_000)])["audio_sounds"].shape[1] == 2
    silence = loaded.ours(f"{MARK}?", audios=[(np.zeros(1600, np.float32), 16_000)])
    assert np.isfinite(loaded.apply({"params": loaded.params}, silence).logits).all()
    for wrong, message in (
        ((sound(0.02), 16_000), "a sound of 0.020 s"),
        ((np.full(9000, np.nan, np.float32), 16_000), "sample 0"),
        (sound(1.0), "without a rate|sound given as"),
    ):
        with pytest.raises(DataError, match=message):
            loaded.ours(f"{MARK}?", audios=[wrong])
    with pytest.raises(DataError, match="1 placeholder.s. for media, and 2"):
        loaded.ours(f"{MARK}?", audios=GIVEN[0])
    with pytest.raises(DataError, match="audios: the model reads nothing else"):
        loaded.ours("what?", images=[np.zeros((8, 8, 3), np.uint8)])
    with pytest.raises(DataError, match="4 audio pieces"):
        loaded.ours(f"{MARK}{MARK}{MARK}{MARK}", audios=GIVEN[3] + GIVEN[2], slots={"audio": 3})


def test_loss_and_gradients_of_a_packed_row(load, assert_close):
    """Checks two examples in one row against the sum over each alone."""
    loaded = load("untied")
    encoded = [loaded.ours.encode(said(0, "Two bells."), 200), loaded.ours.encode(said(2, "A drum, once."), 200)]
    loaded.reference.zero_grad()
    count = sum(e.loss_weights.sum() for e in encoded)
    total = 0.0
    for e, number in zip(encoded, (0, 2), strict=True):
        inputs = loaded.inputs(texts=[MARK * len(SOUNDS[number])], sounds=[SOUNDS[number]])
        ids = torch.tensor(e.tokens)[None]
        labels = torch.where(torch.tensor(e.loss_weights)[None] > 0, ids, -100)
        heard = {name: inputs[name] for name in ("input_features", "feature_attention_mask")}
        out = loaded.reference(input_ids=ids, attention_mask=torch.ones_like(ids), **heard)
        loss = torch.nn.functional.cross_entropy(out.logits[0, :-1], labels[0, 1:], reduction="sum") / count
        loss.backward()
        total += loss.item()

    batch = loaded.ours.pack([encoded], sum(e.length for e in encoded) + 9, {"audio": 4})
    assert batch["segments"].max() == 2 and batch["audio_masks"][0].any(axis=1).tolist() == [True, True, True, False]

    def ours(params):
        apply = lambda p, b, **how: loaded.model.apply({"params": p}, b, **how)  # noqa: E731
        return NextToken().loss(apply, params, batch, None)[0]

    value, grads = jax.jit(jax.value_and_grad(ours))(loaded.params)
    assert_close(value, total, 1e-5, "loss")
    table = family_of_config(loaded.model.config).table(loaded.model.config)
    found = {name: make() for name, make in hub_tensors(table, grads).items()}
    theirs = {}
    for name, parameter in loaded.reference.named_parameters():
        for pattern, spelling in table.spellings:
            name = re.sub(pattern, spelling, name)
        theirs[name] = parameter.grad
    assert found.keys() == theirs.keys()
    frozen = "audio_tower.embed_positions.weight"
    assert theirs.pop(frozen) is None and not found.pop(frozen).any()
    for name, gradient in theirs.items():
        assert_close(found[name], gradient.numpy(), 1e-4, name)


@dataclass(frozen=True)
class Clips:
    """Conversations about one, two or three sounds."""

    name: str = "clips"

    def build(self) -> ClipSource:
        return ClipSource(self)


class ClipSource:
    def __init__(self, config: Clips):
        self.config, self.name = config, config.name

    def __len__(self) -> int:
        return 6

    def example(self, index: int) -> Example:
        return said((2, 0, 3)[index % 3], f"{index} bells")

    def fingerprint(self) -> str:
        return repr(self.config)


def test_a_run_from_the_folder(load, tmp_path):
    """Checks two steps on measured and packed rows, and that the run, as a folder, opens in transformers."""
    loaded = load("untied")
    folder = str(loaded.folder)
    data = Mixture((Weighted(Clips()),), rows=2, length=160, slots={"audio": 4})
    trained = ("encoder_audio/*", "projector_*", "llm/*")
    experiment = Experiment(
        name="sounds",
        model=loaded.model.config,
        tokenizer=TokenizerConfig(folder=folder),
        pretrained=(Pretrained("*", folder),),
        stages=(Stage("all", NextToken(), trained, data, 2, AdamW(1e-3, warmup_steps=0)),),
    )
    train(experiment, tmp_path / "run", devices=jax.devices()[:1])
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any(np.isfinite(line.get("loss", np.nan)) for line in lines)
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "hf")]) == 0
    opened, info = type(loaded.reference).from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    moved = {name for name, x in opened.state_dict().items() if not torch.equal(x, loaded.reference.state_dict()[name])}
    assert moved == opened.state_dict().keys() - {"model.audio_tower.embed_positions.weight"}
    assert transformers.AutoProcessor.from_pretrained(tmp_path / "hf").audio_token == "<|AUDIO|>"


# ---- answers, from Python and from the command line


def write_wav(path: Path, samples: np.ndarray) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes((samples * 32767).astype("<i2").tobytes())
    return path


def test_answers_about_sounds(load, tmp_path, capsys):
    """Checks the Assistant, `mllm generate --audio`, chat and files of prompts: equal answers to equal questions."""
    loaded = load("untied")
    first, second = (write_wav(tmp_path / f"{i}.wav", samples) for i, samples in enumerate(SOUNDS[0]))
    how = dict(max_new_tokens=5, ignore_eos=True)
    assistant = Assistant(loaded.model, loaded.params, loaded.ours)
    asked = Message("user", (Audio(first), Audio(second), Text("What?")))
    answers = assistant.generate([[asked], "What?", [Message("user", (Audio(second), Text("What?")))]], **how)
    assert answers[0].tokens == assistant.generate(asked, **how).tokens
    assert len({answer.tokens for answer in answers}) == 3
    text = loaded.theirs.apply_chat_template(
        [{"role": "user", "content": [{"type": "audio"}, {"type": "audio"}, {"type": "text", "text": "What?"}]}],
        add_generation_prompt=True,
        tokenize=False,
    )
    inputs = loaded.inputs(texts=[text], sounds=[[as_audio(path) for path in (first, second)]])
    with torch.no_grad():
        settings = transformers.GenerationConfig(max_new_tokens=5, do_sample=False, pad_token_id=0)
        out = loaded.reference.generate(**inputs, generation_config=settings)
    assert list(answers[0].tokens) == out[0, inputs["input_ids"].shape[1] :].tolist()

    said = assistant.generate(asked, max_new_tokens=5).text
    command = ["generate", str(loaded.folder), "--audio", str(first), str(second), "What?", "--max-new-tokens", "5"]
    assert main(command) == 0 and capsys.readouterr().out.rstrip("\n") == said
    (tmp_path / "asked.jsonl").write_text('{"prompt": "What?", "audio": ["0.wav", "1.wav"]}')
    (prompt,) = PromptFile(tmp_path / "asked.jsonl")
    assert assistant.generate(list(prompt.messages), **how).tokens == answers[0].tokens
    dialogue = Dialogue(assistant, Options(5, ignore_eos=True), Sampling())
    lines = iter([f"/audio {first}", "/audio absent.wav", f"/audio {second}", "What?", "/exit"])
    shown = io.StringIO()
    assert chat(dialogue, read=lambda _: next(lines), console=Console(file=shown, width=200)) == 0
    assert "absent.wav" in shown.getvalue() and dialogue.turns[1].content == answers[0].text
    first.write_text("no sound")
    assert main(command) != 0 and "0.wav" in capsys.readouterr().err


# ---- configs


def test_refusals(load, tmp_path):
    loaded = load("odd")
    config = loaded.model.config
    values = json.loads((loaded.folder / "config.json").read_text())
    family = family_of_config(config)
    heard = values["audio_config"]
    for change, message in (
        (dict(audio_config=heard | dict(model_type="whisper")), "an audio encoder 'whisper'"),
        (dict(audio_config=heard | dict(pooling="max")), "pooling='max'"),
        (dict(text_config=values["text_config"] | dict(model_type="opt")), "an LLM"),
        (dict(adapter=3), "adapter=3"),
    ):
        with pytest.raises(ConfigError, match=message):
            family.from_hf(values | change)
    with pytest.raises(ConfigError, match="projector"):
        family.to_hf(config.with_branch("audio", projector=MLPProjectorConfig()))
    with pytest.raises(ConfigError, match="with inputs .*'image'"):
        replace(config, inputs={"image": config.inputs["audio"]})
    with pytest.raises(ConfigError, match="8 x 100 values"):
        Qwen2AudioLayout(config, LogMel(feature_size=8, chunk_length=1))
    with pytest.raises(ConfigError, match="max_source_positions 1"):
        Qwen2AudioEncoderConfig(max_source_positions=1)
    with pytest.raises(ConfigError, match="a sound of 31 seconds"):
        Qwen2AudioEncoderConfig().inputs(31.0)
    assert Qwen2AudioEncoderConfig().inputs(30.0) == (128, 3000)


def test_the_published_size():
    """Checks the number of parameters and the config of Qwen2-Audio-7B, whose config.json leaves defaults out."""
    config = load_config(Path(__file__).parents[2] / "configs" / "qwen2_audio_7b.py").model
    values = dict(
        architectures=["Qwen2AudioForConditionalGeneration"],
        model_type="qwen2_audio",
        audio_token_index=151646,
        ignore_index=-100,
        vocab_size=156032,
        audio_config=dict(model_type="qwen2_audio_encoder", num_mel_bins=128, d_model=1280, encoder_layers=32),
        text_config=dict(
            model_type="qwen2", intermediate_size=11008, vocab_size=156032, max_position_embeddings=8192,
            rms_norm_eps=1e-5, rope_theta=10000, sliding_window=32768, use_mrope=False, bos_token_id=151643,
            eos_token_id=151645,
        ),
    )  # fmt: skip
    read = family_of_config(config).from_hf(values)
    assert replace(config, compute=read.compute) == read
    with torch.device("meta"):
        reference = transformers.Qwen2AudioForConditionalGeneration(transformers.Qwen2AudioConfig(**values))
    theirs = sum(parameter.numel() for parameter in reference.parameters())
    ours = sum(leaf.size for leaf in jax.tree.leaves(abstract_params(config, family_of_config(config))))
    assert ours == theirs == 8_397_094_912
