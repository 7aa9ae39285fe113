"""A named model that continues with images of another size, or with another tokenizer than its own."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import torch
import transformers
from flax import linen as nn
from flax.traverse_util import flatten_dict
from tiny_llava import WORDS, write_llava
from tokenizers import Tokenizer, models, pre_tokenizers
from toy_data import Toy, quick_compilation
from transformers import PreTrainedTokenizerFast

import mllm_jax
from mllm_jax import AdamW, Experiment, Mixture, NextToken, Pretrained, Stage, TokenizerConfig, Weighted
from mllm_jax.errors import CheckpointError, ConfigError
from mllm_jax.models.run_weights import initial_meta, load_run
from mllm_jax.models.vocabulary import _spelled, own_tokenizer
from mllm_jax.training.loop import train
from mllm_jax.training.run_processor import export_run

DATA = Mixture((Weighted(Toy(size=12), 1.0),), rows=2, length=64, slots={"image": 2})
CHATML = "{% for m in messages %}{{ '<|im_start|> ' + m['role'] + ' ' + m['content'] + ' <|im_end|> ' }}{% endfor %}"
OTHERS = ("<unk>", "<|im_start|>", "<|im_end|>", "user", "assistant", "what", "colour", "cat", "red", "blue", "bird")


@pytest.fixture(scope="module")
def llava(tmp_path_factory) -> Path:
    return write_llava(tmp_path_factory.mktemp("own") / "llava")


def write_words(folder: Path, words=OTHERS, template: str | None = CHATML, special=(), **names: str) -> Path:
    """Writes a chat model's tokenizer; its template takes only texts and has no token for images."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = dict(pad_token="<|im_end|>", bos_token="<|im_start|>", eos_token="<|im_end|>") | names
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    if special:
        fast.add_special_tokens({"additional_special_tokens": list(special)})
    fast.chat_template = template
    fast.save_pretrained(folder)
    return folder


def experiment(folder: Path, words: Path | None = None, model=None, **changes) -> Experiment:
    return Experiment(
        **dict(
            name="own",
            model=model or mllm_jax.pretrained_config(folder),
            tokenizer=TokenizerConfig(folder=str(words or folder)),
            pretrained=(Pretrained("*", str(folder)),),
            stages=(Stage("all", NextToken(), ("projector_image/*",), DATA, 1, AdamW(warmup_steps=0)),),
        )
        | changes
    )


@pytest.fixture(scope="module")
def made(llava, tmp_path_factory):
    """Trains a run with both changes; returns it, its output, its final weights and the exported folder.

    The model is read through a link, so that a test can move it.
    """
    base = tmp_path_factory.mktemp("made")
    (base / "llava").symlink_to(llava)
    words = write_words(base / "words")
    model = mllm_jax.pretrained_config(llava)
    wide = model.with_branch("image", encoder=replace(model.image.encoder, image_size=16))
    one, said = jax.devices()[:1], io.StringIO()
    with quick_compilation(), redirect_stdout(said):
        run = train(experiment(base / "llava", words, wide), base / "run", devices=one)
        train(experiment(base / "llava", words, wide), base / "run", devices=one)  # the same run: nothing to train
        _, _, params, _, _ = load_run(run, one)
        export_run(run, base / "out")
    leaves = {path: np.asarray(leaf) for path, leaf in flatten_dict(params, sep="/").items()}
    return SimpleNamespace(run=run, said=said.getvalue(), leaves=leaves, out=base / "out", source=base / "llava")


def test_another_image_size(llava, made):
    assert made.said.count("positions of encoder_image resampled from 2 x 2 to 4 x 4\n") == 1
    table = "encoder_image/position_embedding"
    _, ours = mllm_jax.from_pretrained(llava, image_size=16)
    np.testing.assert_array_equal(made.leaves[table], ours["encoder_image"]["position_embedding"])
    # Resampled parameters are kept with the run: a computer that resamples differently can open it too.
    assert (
        table in initial_meta(made.run)["stored"]
        and "encoder_image/class_token" not in initial_meta(made.run)["stored"]
    )
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(made.out)
    assert theirs.config.vision_config.image_size == 16
    settings = json.loads((made.out / "preprocessor_config.json").read_text())
    assert settings["crop_size"] == 16 and settings["size"] == {"shortest_edge": 16}
    assert mllm_jax.Processor.from_pretrained(made.run.path).layout.tokens_a_tile == 16


@pytest.mark.parametrize("size,near", [(18, "16 or 20"), (7, "4 or 8")])
def test_a_size_that_the_patch_does_not_divide(llava, tmp_path, size, near):
    model = mllm_jax.pretrained_config(llava)
    model = model.with_branch("image", encoder=replace(model.image.encoder, image_size=size))
    with pytest.raises(ConfigError, match=f"{size} pixels a side in patches of 4") as refusal:
        train(experiment(llava, model=model), tmp_path / "run")
    assert refusal.value.todo == f"set image_size to {near}"


def test_models_without_one_image_size(tmp_path):
    from mllm_jax import DecoderConfig, ViTConfig
    from mllm_jax.models.reshape import reshaped, with_image_size

    with pytest.raises(ConfigError, match="image_size=64 for a DecoderConfig"):
        with_image_size(DecoderConfig(8), 64)
    pooled = ViTConfig(8, 4, 24, 1, 2, 32, regions=2, region_size=8)
    wide = with_image_size(pooled, 16)
    params, wanted = (
        jax.eval_shape(lambda c=c: c.make().init(jax.random.key(0), np.zeros((1, c.image_size, c.image_size, 3))))
        for c in (pooled, wide)
    )
    zeros = jax.tree.map(lambda x: jax.numpy.zeros(x.shape), nn.meta.unbox(params["params"]))
    with pytest.raises(ConfigError, match="fit only one size") as refusal:
        reshaped(zeros, wanted["params"], wide)
    assert "region_pooling/kernel" in refusal.value.given and "position_embedding" not in refusal.value.given


def test_another_tokenizer(llava, made):
    """Checks that rows follow their tokens, new ones begin at the mean, and transformers opens the folder."""
    assert made.said.count("vocabulary of 14 tokens changed to 12: 4 rows kept by their token's text, 8 new") == 1
    config = made.run.experiment().model
    tokens = mllm_jax.ChatTokenizer.load(made.run.processor_folder)
    assert (config.llm.vocab_size, config.image_token_id) == (12, tokens.id_of("<image>")) == (12, 11)
    assert config.llm.eos_token_id == (2,) and config.llm.bos_token_id == 1 and config.llm.pad_token_id == 2
    stored = flatten_dict(mllm_jax.from_pretrained(llava)[1], sep="/")
    for path, axis in (("llm/token_embedding/embedding", 0), ("llm/lm_head/kernel", 1)):
        new, old = (np.moveaxis(np.asarray(each[path]), axis, 0) for each in (made.leaves, stored))
        assert len(new) == 12 and path in initial_meta(made.run)["stored"]
        for word in ("what", "cat", "red", "<image>"):
            np.testing.assert_array_equal(new[tokens.id_of(word)], old[WORDS.index(word)], err_msg=word)
        for word in ("bird", "colour", "<|im_end|>"):
            np.testing.assert_allclose(new[tokens.id_of(word)], old.mean(axis=0), atol=1e-6, err_msg=word)
    # The template took only texts; now its messages may have images, in transformers too.
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what colour"}]}]
    batch = mllm_jax.Processor.from_pretrained(made.run.path)(asked, images=[np.zeros((9, 9, 3), np.uint8)])
    model, params = mllm_jax.from_pretrained(made.out)
    logits = np.asarray(model.apply({"params": params}, batch).logits)
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(made.out).eval()
    their_words = transformers.AutoTokenizer.from_pretrained(made.out)
    text = their_words.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    ids = their_words(text.replace("<image>", "<image> " * 16))["input_ids"]
    assert ids == batch["tokens"][0].tolist() and ids.count(11) == 16
    pixels = (np.zeros((1, 16, 16, 3)) - model.config.image.encoder.image_mean) / model.config.image.encoder.image_std
    with torch.no_grad():
        out = theirs(input_ids=torch.tensor([ids]), pixel_values=torch.tensor(np.moveaxis(pixels, 3, 1)).float())
    np.testing.assert_allclose(logits, out.logits.numpy(), atol=1e-4 * np.abs(logits).max())


def test_what_did_not_change_is_read_where_it_was(made):
    made.source.unlink()
    with pytest.raises(CheckpointError, match=str(made.source)):
        load_run(made.run, jax.devices()[:1])


@pytest.mark.parametrize(
    "words,match",
    [
        (dict(words=(*OTHERS, "<image>")), "'<image>' \\(id 11\\).*an ordinary word"),
        (dict(special=("<image>",), eos_token="<image>"), "the end of an answer"),
        (dict(special=("<image>",), pad_token="<image>"), "padding"),
        (dict(template=None), "without a chat template"),
    ],
)
def test_tokenizers_that_cannot_serve(llava, tmp_path, words, match):
    folder = write_words(tmp_path / "words", **words)
    with pytest.raises(ConfigError, match=match) as refusal:
        train(experiment(llava, folder), tmp_path / "run")
    assert str(folder) in refusal.value.given and str(tmp_path / "run") not in str(refusal.value)


def test_a_model_whose_prompts_need_its_own_tokenizer(llava, tmp_path):
    from mllm_jax.models.internvl import InternVLConfig

    with pytest.raises(ConfigError, match="InternVLForConditionalGeneration with the tokenizer of") as refusal:
        own_tokenizer(object.__new__(InternVLConfig), tmp_path, llava)
    assert f"set tokenizer.folder to {str(llava)!r}" in refusal.value.todo


def test_a_tokenizer_without_a_model_to_begin_with(llava, tmp_path):
    """Checks that the refusal has only paths that the config names, and no files of the run."""
    words = write_words(tmp_path / "words")
    with pytest.raises(ConfigError, match="no settings of an image processor there") as refusal:
        train(experiment(llava, words, pretrained=()), tmp_path / "run")
    assert str(words) in refusal.value.given and "tmp" not in refusal.value.expected
    assert str(tmp_path / "run") not in str(refusal.value)


def test_texts_are_compared_whichever_way_they_are_kept(tmp_path):
    """Checks that a byte-level "Ġcat" equals a sentencepiece "▁cat", and that a special token is no word."""
    from tokenizers import decoders

    byte_level, pieces = (
        PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab, []))) for vocab in (
            {"Ġcat": 0, "Ċ": 1, "Ã©": 2, "x": 3}, {"▁cat": 3, "<0x0A>": 2, "é": 1, "x": 0}
        )
    )  # fmt: skip
    byte_level.backend_tokenizer.decoder = decoders.ByteLevel()
    pieces.add_special_tokens({"additional_special_tokens": ["x!"]})
    one, other = (_spelled(mllm_jax.ChatTokenizer(each)) for each in (byte_level, pieces))
    assert [text for _, text in one] == [b" cat", b"\n", "é".encode(), b"x"]
    assert {text: (one[text], other[text]) for text in one} == {
        (False, b" cat"): (0, 3), (False, b"\n"): (1, 2), (False, "é".encode()): (2, 1), (False, b"x"): (3, 0),
    }  # fmt: skip
    assert (True, b"x!") in other
