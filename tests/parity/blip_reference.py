"""Tiny random BLIP-2 and InstructBLIP folders with tokenizers and processors, and the outputs of transformers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

import mllm_jax
from mllm_jax.generation.generate import complete
from mllm_jax.models.processor import Processor

# Images are SIDE wide; answers have NEW tokens; LENGTH fits every text.
SIDE, NEW, LENGTH = 12, 32, 32
VISION = dict(
    hidden_size=20, intermediate_size=36, num_hidden_layers=3, num_attention_heads=2, image_size=SIDE, patch_size=4
)
QFORMER = dict(
    hidden_size=24,
    num_hidden_layers=4,
    num_attention_heads=3,
    intermediate_size=32,
    cross_attention_frequency=2,
    vocab_size=40,
    max_position_embeddings=48,
    layer_norm_eps=1e-3,
)
OPT = dict(
    model_type="opt",
    vocab_size=48,
    hidden_size=32,
    ffn_dim=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    word_embed_proj_dim=32,
    max_position_embeddings=96,
)
T5 = dict(
    model_type="t5",
    vocab_size=48,
    d_model=32,
    d_kv=6,
    d_ff=40,
    num_layers=2,
    num_decoder_layers=2,
    num_heads=4,
    feed_forward_proj="gated-gelu",
    decoder_start_token_id=0,
    tie_word_embeddings=False,
)
LLAMA = dict(
    model_type="llama",
    vocab_size=48,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=96,
    tie_word_embeddings=False,
)
# fmt: off
WORDS = [
    "<pad>", "<s>", "</s>", "question", ":", "what", "is", "the", "colour", "of", "cat", "?", "answer", "a", "dog",
    "red", "two", "pictures", "\n", "which", "one", "left",
]
BERT_WORDS = [
    "[PAD]", "[CLS]", "[SEP]", "question", ":", "what", "is", "the", "colour", "of", "cat", "?", "answer", "a", "dog",
    "red", "two", "pictures", "which", "one",
]
# fmt: on
TEXTS = [
    "question : what is the colour of the cat ? answer :",
    "a dog",
    "two pictures which one is red ? answer :",
    "what is the answer ?",
]


def make_image(seed: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


# One image, wide; one, tall; two; none.
IMAGES = [[make_image(0, 17, 31)], [make_image(1, 40, 13)], [make_image(2, 12, 12), make_image(3, 9, 30)], []]


def tokenizer(words: list[str], begin: str, end: str, unknown: str) -> transformers.PreTrainedTokenizerFast:
    """Returns a tokenizer of words, with tokens around a text."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=unknown))
    backend.normalizer = normalizers.Lowercase() if begin == "[CLS]" else None
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    around = [(token, words.index(token)) for token in (begin, end) if token]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A {end}".strip(), special_tokens=around, pair=None
    )
    bert = begin == "[CLS]"
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=words[0],
        eos_token=None if bert else "</s>",
        bos_token=None if bert else "<s>",
        unk_token=unknown,
        model_input_names=["input_ids", "attention_mask"],
    )


@dataclass
class Case:
    """A reference with its folder, and the processors and models of both sides."""

    reference: Any
    their_processor: Any
    folder: Path
    model: Any
    params: dict
    processor: Processor

    def theirs(self, row: int) -> dict:
        """Returns transformers' inputs for a text and its images, at the positions of a single image."""
        images = IMAGES[row]
        inputs = dict(self.their_processor(images=images[:1] or None, text=TEXTS[row], return_tensors="pt"))
        if len(images) > 1:
            # Its processor places one image; the model takes as many as there are positions.
            queries = self.their_processor.num_query_tokens
            more = torch.full((1, queries * (len(images) - 1)), self.reference.config.image_token_id)
            inputs["input_ids"] = torch.cat([more, inputs["input_ids"]], dim=1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            inputs["pixel_values"] = self.their_processor.image_processor(images, return_tensors="pt")["pixel_values"]
            for name in ("qformer_input_ids", "qformer_attention_mask"):
                if name in inputs:
                    inputs[name] = inputs[name].repeat(len(images), 1)
        return inputs

    def their_logits(self, row: int, target: torch.Tensor | None = None, model=None) -> np.ndarray:
        model, inputs = model or self.reference, self.theirs(row)
        more = {} if target is None else {"decoder_input_ids": target}
        if not IMAGES[row]:
            model = model.language_model
            inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            return model(**inputs, **more).logits[0].numpy()

    def their_tokens(self, row: int, **options) -> list[int]:
        model, inputs = self.reference, self.theirs(row)
        if not IMAGES[row]:
            model = model.language_model
            inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        out = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, **options)[0].tolist()
        # A decoder repeats its prompt, an encoder-decoder its start token.
        return out[1:] if self.model.config.encoder_decoder else out[inputs["input_ids"].shape[1] :]

    def our_tokens(self, rows: list[int], ignore_eos: bool = True, **shape: int) -> list[list[int]]:
        batch = self.processor([TEXTS[r] for r in rows], images=[IMAGES[r] for r in rows], **shape)
        how = dict(max_new_tokens=NEW, ignore_eos=ignore_eos)
        return [list(answer.tokens) for answer in complete(self.model, self.params, batch, self.processor, **how)]

    def batch(self) -> dict:
        return self.processor(TEXTS, images=IMAGES)


def build(kind: str, text: dict, qformer: dict, queries: int, eos: int, seed: int, randomise, folder: Path) -> Case:
    """Builds a case.

    Args:
        kind: "Blip2" or "InstructBlip".
        eos: the token that ends the language model's texts.
    """
    end = "</s>" if text["model_type"] == "t5" else ""
    begin = "" if text["model_type"] == "t5" else "<s>"
    own = tokenizer(WORDS, begin, end, "<pad>")
    image = len(WORDS)
    qformer_class = getattr(transformers, f"{kind}QFormerConfig")
    config = getattr(transformers, f"{kind}Config")(
        vision_config=VISION,
        qformer_config=qformer_class(**QFORMER | qformer).to_dict(),
        text_config=text | dict(eos_token_id=eos, pad_token_id=0, bos_token_id=1),
        num_query_tokens=queries,
        image_token_index=image,
    )
    reference = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
    if text["model_type"] == "t5":  # transformers 5 always ties, checkpoints do not
        reference.language_model.lm_head.weight = torch.nn.Parameter(torch.zeros(text["vocab_size"], text["d_model"]))
    reference = randomise(reference, seed)
    pixels = BlipImageProcessorPil(size=dict(height=SIDE, width=SIDE))
    if kind == "Blip2":
        processor = transformers.Blip2Processor(pixels, own, num_query_tokens=queries)
    else:
        bert = tokenizer(BERT_WORDS, "[CLS]", "[SEP]", "[PAD]")
        processor = transformers.InstructBlipProcessor(pixels, own, bert, num_query_tokens=queries)
    reference.save_pretrained(folder)
    processor.save_pretrained(folder)
    model, params = mllm_jax.from_pretrained(folder)
    return Case(reference, processor, folder, model, params, Processor.from_pretrained(folder))


ROWS = range(len(TEXTS))


class Checks:
    """Tests of every case, a fixture `case` of the class or module."""

    @pytest.fixture(scope="class")
    @classmethod
    def applied(cls, case):
        """Returns (the model's outputs, the batch, the targets of an encoder-decoder)."""
        batch, target = dict(case.batch()), None
        if case.model.config.encoder_decoder:
            target = np.random.default_rng(5).integers(3, 20, (len(TEXTS), 6))
            target[:, 0] = 0
            batch |= dict(decoder_tokens=target.astype(np.int32), decoder_segments=np.ones((len(TEXTS), 6), np.int32))
        logits = jax.jit(lambda p, b: case.model.apply({"params": p}, b).logits)(case.params, batch)
        return np.asarray(logits), batch, target

    def check_logits(self, case, applied, assert_close, model=None):
        logits, batch, target = applied
        for row in ROWS:
            wanted = None if target is None else torch.tensor(target[row : row + 1])
            theirs = case.their_logits(row, wanted, model)
            real = batch["segments"][row] > 0 if target is None else np.ones(6, bool)
            assert_close(logits[row][real], theirs, 1e-4, f"row {row}")

    def test_images_and_places(self, case, assert_close):
        """Checks equal ids, the queries before the first token, and equal pixels once the bytes are normalised."""
        batch = case.batch()
        config = case.model.config.image.encoder
        assert batch["images"].dtype == np.uint8
        pixels = (batch["images"] / 255 - np.array(config.image_mean)) / np.array(config.image_std)
        for row in ROWS:
            theirs = case.theirs(row)
            ids = theirs["input_ids"][0].numpy()
            np.testing.assert_array_equal(batch["tokens"][row][: len(ids)], ids)
            assert batch["segments"][row].sum() == len(ids)
            queries = case.model.config.image.projector.num_queries * len(IMAGES[row])
            assert batch["media_index"][row][: len(ids)].tolist() == [*range(queries), *[-1] * (len(ids) - queries)]
            if IMAGES[row]:
                wanted = theirs["pixel_values"].permute(0, 2, 3, 1).numpy()
                np.testing.assert_allclose(pixels[row, : len(wanted)], wanted, atol=1e-6)

    def test_logits(self, case, applied, assert_close):
        self.check_logits(case, applied, assert_close)

    def test_answers(self, case):
        """Checks answers token for token, in a batch and alone."""
        wanted = [case.their_tokens(row, eos_token_id=None) for row in ROWS]
        together = case.our_tokens(list(ROWS))
        assert together == wanted and len(set(map(tuple, wanted))) == len(wanted)
        # One shape for all, to compile less; the batch had another.
        assert [case.our_tokens([row], slots={"image": 2}, length=LENGTH)[0] for row in ROWS] == wanted

    def test_the_configs_own_token_ends_an_answer(self, case):
        """Checks end tokens such as "\\n" of OPT, which ends no text elsewhere, and the tokenizer's own."""
        (end,) = case.model.config.llm.eos_token_id
        ends = [end, case.processor.tokenizer.backend.eos_token_id]
        wanted = [case.their_tokens(row, eos_token_id=ends) for row in ROWS]
        assert any(tokens[-1] == end and len(tokens) < NEW for tokens in wanted)
        bodies = [tokens[:-1] if tokens[-1] in ends else tokens for tokens in wanted]
        assert case.our_tokens(list(ROWS), ignore_eos=False) == bodies

    def test_folders_both_ways(self, case, applied, assert_close, tmp_path):
        mllm_jax.save_pretrained(case.model, case.params, tmp_path / "ours", companions=case.folder)
        kind = type(case.reference)
        again, info = kind.from_pretrained(tmp_path / "ours", output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        self.check_logits(case, applied, assert_close, again.eval())
        config = mllm_jax.pretrained_config(tmp_path / "ours")
        assert config == mllm_jax.pretrained_config(case.folder)
        # The written tensors equal the original ones.
        stored, written = case.reference.state_dict(), again.state_dict()
        assert stored.keys() == written.keys() and all(torch.equal(stored[name], written[name]) for name in stored)
