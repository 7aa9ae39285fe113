"""The P-Former alone: its sizes, the rows of LLMs of both kinds, and sources without their images."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mllm_jax.datasets.openmoji import OpenMojiCaptions
from mllm_jax.datasets.text_only import TextOnly
from mllm_jax.encoders.vit import ViTConfig
from mllm_jax.errors import ConfigError, DataError
from mllm_jax.llms.decoder import DecoderConfig
from mllm_jax.llms.t5 import T5Config
from mllm_jax.models.branch import Branch
from mllm_jax.models.caption_row import caption_row
from mllm_jax.models.multimodal import MultimodalConfig
from mllm_jax.models.pformer_pretraining import PFormerPretrainingConfig
from mllm_jax.models.prompt_guided import PromptGuidedConfig
from mllm_jax.projectors.mlp import MLPProjectorConfig
from mllm_jax.projectors.pformer import PFormerConfig
from mllm_jax.training.objectives.pformer_losses import PFormerObjective, PromptGuided
from mllm_jax.training.step import make_apply

TINY = PFormerConfig(12, 20, hidden_size=8, num_layers=2, num_heads=2, mlp_size=16, num_queries=3, max_length=6)
BATCH = dict(
    tokens=jnp.asarray([[1, 5, 6, 2, 0], [1, 7, 2, 1, 2]], jnp.int32),
    segments=jnp.asarray([[1, 1, 1, 1, 0], [1, 1, 1, 2, 2]], jnp.int32),
)
LLMS = {
    "decoder": DecoderConfig(20, 12, num_layers=1, num_heads=2, num_kv_heads=1, mlp_size=16),
    "t5": T5Config(20, 12, head_dim=6, num_layers=1, num_decoder_layers=1, num_heads=2, mlp_size=16),
}


def count(tree) -> int:
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(nn.meta.unbox(tree)))


def test_full_size_is_that_of_bert_base_and_three_maps():
    """Checks the size: BERT-base has 109,482,240 parameters, 590,592 in its pooler, 768 for the second of two texts."""
    config = PFormerConfig(2560, 30_522)
    made = jax.eval_shape(config.make().init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    bert = 109_482_240 - 590_592 - 2 * 768
    maps = 769 * 32 * 768 + 769 * 768 + 769 * 2560
    # Plus the vector of a masked token: BERT's own is in its vocabulary.
    assert count(made) == bert + maps + 768
    own = PFormerConfig(2560, 30_522, mask_token_id=103)
    made = jax.eval_shape(own.make().init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    assert count(made) == bert + maps


def test_padding_changes_nothing_and_masked_tokens_are_not_read():
    module = TINY.make()
    tokens, segments = BATCH["tokens"], BATCH["segments"]
    params = module.init(jax.random.key(0), tokens, segments)
    run = jax.jit(lambda t, s, m: module.apply(params, t, s, m, method="read"))
    none = jnp.zeros(tokens.shape, bool)
    before = run(tokens, segments, none)
    np.testing.assert_array_equal(run(tokens.at[0, 4].set(9), segments, none), before)
    assert np.abs(run(tokens.at[0, 3].set(9), segments, none) - before)[0].max() > 1e-4
    hidden = none.at[0, 3].set(True)
    np.testing.assert_array_equal(run(tokens.at[0, 3].set(9), segments, hidden), run(tokens, segments, hidden))
    assert module.apply(params, tokens, segments).shape == (2, 3, 12)


@pytest.mark.parametrize("changes", [dict(num_heads=3), dict(num_queries=0), dict(mask_token_id=20)], ids=str)
def test_sizes_that_cannot_be_are_refused(changes):
    with pytest.raises(ConfigError, match="P-Former"):
        PFormerConfig(**{**dict(output_size=12, vocab_size=20, hidden_size=8, num_heads=2), **changes})


def test_captions_beyond_its_positions_are_refused():
    with pytest.raises(DataError, match="7 tokens for a P-Former of 6 positions"):
        jax.eval_shape(TINY.make().init, jax.random.key(0), jnp.zeros((1, 7), jnp.int32))


def test_a_decoder_reads_media_and_then_the_whole_caption():
    row = caption_row(LLMS["decoder"], jnp.ones((2, 3, 12)), **BATCH)
    assert row["tokens"].tolist() == [[0, 0, 0, 1, 5, 6, 2, 0], [0, 0, 0, 1, 7, 2, 1, 2]]
    assert row["segments"].tolist() == [[1] * 7 + [0], [1] * 8]
    assert row["media_index"].tolist() == [[0, 1, 2] + [-1] * 5] * 2
    assert row["loss_weights"].tolist() == [[0] * 3 + [1] * 4 + [0], [0] * 3 + [1] * 5]


def test_an_encoder_decoder_reads_media_and_writes_the_caption():
    row = caption_row(LLMS["t5"], jnp.ones((2, 3, 12)), **BATCH)
    start = LLMS["t5"].decoder_start_token_id
    assert row["segments"].tolist() == [[1, 1, 1]] * 2 and row["media_index"].tolist() == [[0, 1, 2]] * 2
    assert row["decoder_tokens"].tolist() == [[start, 1, 5, 6, 2, 0], [start, 1, 7, 2, 1, 2]]
    assert row["decoder_segments"].tolist() == [[1] * 5 + [0], [1] * 6]
    assert row["loss_weights"].tolist() == [[0, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1]]


@pytest.mark.parametrize("kind", LLMS)
def test_every_kind_of_llm_is_prompted(kind):
    """Checks that the P-Former and the media of a model that it guides get a gradient from the LLM."""
    llm = LLMS[kind]
    config = PFormerPretrainingConfig(TINY, llm, projection_size=4)
    module, objective = config.make(), PFormerObjective()
    params = nn.meta.unbox(module.init(jax.random.key(0), module.config.batch_spec(length=5).empty(), method="touch"))[
        "params"
    ]

    def language(params):
        return objective.loss(make_apply(module), params, BATCH, jax.random.key(0))[1]["loss_language"]

    loss, grads = jax.jit(jax.value_and_grad(language))(params)
    assert np.isfinite(loss) and 0.5 < loss / np.log(20) < 3
    assert jax.tree.all(jax.tree.map(lambda g: bool(np.abs(g).max() > 0), grads["prompter"]["language_projection"]))
    encoder = ViTConfig(8, 4, 8, num_layers=1, num_heads=2, mlp_size=8)
    model = MultimodalConfig({"image": Branch(encoder, MLPProjectorConfig(12))}, llm)
    composed = PromptGuidedConfig(model, replace(TINY, num_queries=4)).make()
    images = dict(images=jnp.zeros((2, 1, 8, 8, 3), jnp.uint8))
    batch = composed.config.batch_spec(2, 5).empty() | BATCH | images
    theirs = nn.meta.unbox(composed.init(jax.random.key(1), batch, method="touch"))["params"]
    assert set(theirs) == {"encoder_image", "projector_image", "llm", "prompter"}

    def guided(media):
        apply = make_apply(composed)
        total, metrics = PromptGuided(weight=2).loss(apply, theirs, BATCH | dict(media=media), None)
        return total, metrics

    prompts = composed.apply(
        {"params": theirs}, BATCH["tokens"], BATCH["segments"], method=lambda m, *x: m.prompter(*x)
    )
    (total, metrics), on_media = jax.jit(jax.value_and_grad(guided, has_aux=True))(prompts + 0.5)
    assert metrics["loss_alignment"] == pytest.approx(2 * 0.25, rel=1e-5)
    assert total == pytest.approx(float(metrics["loss_alignment"] + metrics["loss_language"]), rel=1e-6)
    assert np.abs(on_media).max() > 0


def test_the_nearest_embedded_token_is_found():
    config = PFormerPretrainingConfig(TINY, LLMS["decoder"], projection_size=4)
    module = config.make()
    params = nn.meta.unbox(module.init(jax.random.key(0), module.config.batch_spec().empty(), method="touch"))["params"]
    table = np.asarray(params["llm"]["token_embedding"]["embedding"])
    x = np.random.default_rng(0).normal(0, 0.03, (2, 3, 12)).astype(np.float32)
    wanted = table[np.square(x[..., None, :] - table).sum(axis=-1).argmin(axis=-1)]
    np.testing.assert_array_equal(module.apply({"params": params}, x, method="nearest"), wanted)


def test_images_are_left_out():
    config = OpenMojiCaptions(image_size=16, variants=1)
    whole, text = config.build(), TextOnly(config).build()
    assert len(text) == len(whole) and text.fingerprint() != whole.fingerprint() and text.name != whole.name
    assert [m.text for m in text.example(3).messages] == [m.text for m in whole.example(3).messages]
    assert not text.example(3).media and len(whole.example(3).media) == 1
