"""BLIP-2 with OPT and Flan-T5 against Blip2ForConditionalGeneration: pictures, logits, answers, folders both ways."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch
import transformers
from blip_reference import NEW, OPT, PICTURES, T5, TEXTS, build

import mllm_jax

ROWS = range(len(TEXTS))
LENGTH = 32
CASES = {
    "opt": dict(text=OPT, qformer={}, queries=5, eos=7, seed=0),
    "opt, cross-attention everywhere": dict(
        text=OPT | dict(num_hidden_layers=3),
        qformer=dict(cross_attention_frequency=1, num_hidden_layers=3, hidden_act="gelu_new"),
        queries=3,
        eos=7,
        seed=1,
    ),
    # BLIP-2's conversion runs Flan-T5 with the exact gelu, as its text_config says.
    "flan-t5": dict(text=T5 | dict(dense_act_fn="gelu"), qformer={}, queries=4, eos=7, seed=2),
}


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory, randomise):
    return build("Blip2", **CASES[request.param], randomise=randomise, folder=tmp_path_factory.mktemp("blip2"))


@pytest.fixture(scope="module")
def applied(case):
    """(what the model says of the batch, the batch, the targets of an encoder-decoder)."""
    return forward(case)


def forward(case):
    batch, target = dict(case.batch()), None
    if case.model.config.encoder_decoder:
        target = np.random.default_rng(5).integers(3, 20, (len(TEXTS), 6))
        target[:, 0] = 0
        batch |= dict(decoder_tokens=target.astype(np.int32), decoder_segments=np.ones((len(TEXTS), 6), np.int32))
    logits = jax.jit(lambda p, b: case.model.apply({"params": p}, b).logits)(case.params, batch)
    return np.asarray(logits), batch, target


def check_logits(case, applied, assert_close, model=None):
    logits, batch, target = applied
    for row in ROWS:
        wanted = None if target is None else torch.tensor(target[row : row + 1])
        theirs = case.their_logits(row, wanted, model)
        real = batch["segments"][row] > 0 if target is None else np.ones(6, bool)
        assert_close(logits[row][real], theirs, 1e-4, f"row {row}")


def test_pictures_and_places(case, assert_close):
    """The same ids, the queries before the first token; the same pixels once the bytes are normalised."""
    batch = case.batch()
    config = case.model.config.encoder
    assert batch["images"].dtype == np.uint8
    pixels = (batch["images"] / 255 - np.array(config.image_mean)) / np.array(config.image_std)
    for row in ROWS:
        theirs = case.theirs(row)
        ids = theirs["input_ids"][0].numpy()
        np.testing.assert_array_equal(batch["tokens"][row][: len(ids)], ids)
        assert batch["segments"][row].sum() == len(ids)
        queries = case.model.config.projector.num_queries * len(PICTURES[row])
        assert batch["media_index"][row][: len(ids)].tolist() == [*range(queries), *[-1] * (len(ids) - queries)]
        if PICTURES[row]:
            wanted = theirs["pixel_values"].permute(0, 2, 3, 1).numpy()
            np.testing.assert_allclose(pixels[row, : len(wanted)], wanted, atol=1e-6)


def test_logits(case, applied, assert_close):
    check_logits(case, applied, assert_close)


def test_answers(case):
    """Token for token, in a batch and alone."""
    wanted = [case.their_tokens(row, eos_token_id=None) for row in ROWS]
    together = case.our_tokens(list(ROWS))
    assert together == wanted and len(set(map(tuple, wanted))) == len(wanted)
    # One shape for all, so that little is compiled; the batch had another.
    assert [case.our_tokens([row], slots=2, length=LENGTH)[0] for row in ROWS] == wanted


def test_the_configs_own_token_ends_an_answer(case):
    """As "\\n" does with OPT, which is no end of a text elsewhere; the tokenizer's own end does so too."""
    (end,) = case.model.config.llm.eos_token_id
    ends = [end, case.processor.tokenizer.backend.eos_token_id]
    wanted = [case.their_tokens(row, eos_token_id=ends) for row in ROWS]
    assert any(tokens[-1] == end and len(tokens) < NEW for tokens in wanted)
    bodies = [tokens[:-1] if tokens[-1] in ends else tokens for tokens in wanted]
    assert case.our_tokens(list(ROWS), ignore_eos=False) == bodies


def test_folders_both_ways(case, applied, assert_close, tmp_path):
    mllm_jax.save_pretrained(case.model, case.params, tmp_path / "ours", companions=case.folder)
    kind = type(case.reference)
    again, info = kind.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    check_logits(case, applied, assert_close, again.eval())
    config = mllm_jax.pretrained_config(tmp_path / "ours")
    assert config == mllm_jax.pretrained_config(case.folder)
    # What was written is what was there, tensor for tensor.
    stored, written = case.reference.state_dict(), again.state_dict()
    assert stored.keys() == written.keys() and all(torch.equal(stored[name], written[name]) for name in stored)


def test_a_stored_processor_of_another_size_is_refused(case, tmp_path):
    pixels = transformers.BlipImageProcessorPil(size=dict(height=8, width=8))
    pixels.save_pretrained(tmp_path)
    with pytest.raises(mllm_jax.errors.ConfigError, match=r"pictures of \(8, 8\) pixels"):
        mllm_jax.models.blip2.pixel_reader(case.model.config.encoder, tmp_path)
