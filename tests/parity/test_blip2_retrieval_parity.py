"""The retrieval head against Blip2ForImageTextRetrieval: similarity, matching, and folders both ways."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch
import transformers
from blip_reference import QFORMER, SIDE, VISION

import mllm_jax

CASES = {
    "every second layer": (QFORMER, 4, 6),
    "every layer": (QFORMER | dict(cross_attention_frequency=1, num_hidden_layers=2), 3, 5),
    "every fourth layer": (QFORMER | dict(cross_attention_frequency=4), 2, 8),
}


@pytest.mark.parametrize("case", CASES)
def test_retrieval(case, randomise, assert_close, tmp_path):
    qformer, queries, width = CASES[case]
    config = transformers.Blip2Config(
        vision_config=VISION,
        qformer_config=qformer | dict(use_qformer_text_input=True),
        num_query_tokens=queries,
        image_text_hidden_size=width,
    )
    reference = randomise(transformers.Blip2ForImageTextRetrieval(config))
    reference.save_pretrained(tmp_path / "theirs")
    module, params = mllm_jax.from_pretrained(tmp_path / "theirs")
    rng = np.random.default_rng(1)
    pixels = rng.normal(size=(3, SIDE, SIDE, 3)).astype(np.float32)
    tokens = rng.integers(0, QFORMER["vocab_size"], (3, 7)).astype(np.int32)
    real = (np.arange(7)[None] < np.array([[7], [3], [5]])).astype(np.int32)
    scores = jax.jit(module.apply)({"params": params}, dict(images=pixels[:, None], tokens=tokens, segments=real))

    def check(model):
        inputs = dict(
            pixel_values=torch.tensor(pixels.transpose(0, 3, 1, 2)),
            input_ids=torch.tensor(tokens),
            attention_mask=torch.tensor(real),
        )
        with torch.no_grad():
            similarity = model(**inputs, use_image_text_matching_head=False).logits_per_image
            matching = model(**inputs, use_image_text_matching_head=True).logits_per_image
        assert_close(scores.similarity, similarity, 1e-4, "similarity")
        assert_close(scores.matching, matching, 1e-4, "matching")

    check(reference)
    mllm_jax.save_pretrained(module, params, tmp_path / "ours")
    again, info = type(reference).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    check(again.eval())
    stored, written = reference.state_dict(), again.state_dict()
    assert stored.keys() == written.keys() and all(torch.equal(stored[name], written[name]) for name in stored)
