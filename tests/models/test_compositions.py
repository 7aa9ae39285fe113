"""Compositions of any encoder, projector and LLM: their shapes, numbers of media tokens, and refusals.

Only shapes are traced. Each encoder is tested with each projector, and each of these parts with each LLM.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from mllm_jax.checkpoints.fields import change_fields
from mllm_jax.encoders.nfnet import NFNetConfig, NFNetInput
from mllm_jax.encoders.qwen_vit import QwenViTConfig
from mllm_jax.encoders.qwen_vit_v1 import QwenViTV1Config
from mllm_jax.encoders.sam import SamConfig
from mllm_jax.encoders.siglip_sam import SiglipSamConfig
from mllm_jax.encoders.vit import ViTConfig, ViTDialect
from mllm_jax.errors import ConfigError
from mllm_jax.llms.chatglm import ChatGLMConfig
from mllm_jax.llms.decoder import DecoderConfig, DecoderDialect
from mllm_jax.llms.t5 import T5Config
from mllm_jax.models.branch import Branch
from mllm_jax.models.multimodal import Connection, MultimodalConfig
from mllm_jax.projectors.mlp import MLPProjectorConfig
from mllm_jax.projectors.paired import PairedProjectorConfig
from mllm_jax.projectors.pixel_shuffle import PixelShuffleProjectorConfig
from mllm_jax.projectors.pool import PoolProjectorConfig
from mllm_jax.projectors.qformer import QFormerConfig
from mllm_jax.projectors.resampler import ResamplerConfig, ResamplerDialect
from mllm_jax.sharding.logical import use_mesh
from mllm_jax.sharding.mesh import MeshConfig, make_mesh

WIDTH, VOCAB, SLOTS = 16, 23, 2  # of the LLMs; images in a row
_VIT = dict(num_layers=1, num_heads=2, mlp_size=16)
_SAM = SamConfig(32, 4, 8, 1, 2, 16, output_channels=6, window=3, global_layers=(0,))
_SIGLIP = ViTConfig(16, 4, 8, **_VIT)
# Each with a grid of 4 x 4 vectors, and the width of its output.
ENCODERS = {
    "vit": (_SIGLIP, 8),
    "clip": (
        ViTConfig(
            16,
            4,
            8,
            class_token=True,
            dialect=ViTDialect(pre_norm=True, norm_output=False),
            activation="quick_gelu",
            **_VIT,
        ),
        8,
    ),
    "regions": (ViTConfig(32, 4, 8, regions=4, region_size=12, **_VIT), 12),
    "stem": (ViTConfig(16, 4, 8, stem_channels=(4,), **_VIT), 8),
    "eva": (
        ViTConfig(16, 4, 8, class_token=True, dialect=ViTDialect(rope_grid=4, gated=True), activation="silu", **_VIT),
        8,
    ),
    "internvit": (
        ViTConfig(16, 4, 8, class_token=True, dialect=ViTDialect(layer_scale=0.1, norm="rms", qk_norm=True), **_VIT),
        8,
    ),
    "sam": (dataclasses.replace(_SAM, image_size=16), 6),
    "siglip and sam": (SiglipSamConfig(_SIGLIP, _SAM, (5, 10)), 18),
    "nfnet": (
        NFNetConfig((1, 1), (8, 8), (4, 4), (4, 4, 4, 4), final_size=10, num_classes=0, input=NFNetInput((32, 32))),
        10,
    ),
    "qwen_vit_v1": (QwenViTV1Config(16, 4, 8, 1, 2, 2.0, num_positions=9), 8),
}
# The width of the input -> a projector, and its media tokens.
PROJECTORS = {
    "linear": (lambda width: MLPProjectorConfig(WIDTH, num_layers=1), 16),
    "mlp": (lambda width: MLPProjectorConfig(WIDTH, 12, place_embedding=True), 16),
    "merge": (lambda width: MLPProjectorConfig(WIDTH, merge=2, num_layers=3, input_norm=True), 4),
    "pool": (lambda width: PoolProjectorConfig(WIDTH, 2), 4),
    "pixel shuffle v1": (lambda width: PixelShuffleProjectorConfig(WIDTH, 4, "v1"), 1),
    "pixel shuffle v2": (lambda width: PixelShuffleProjectorConfig(WIDTH, 2), 4),
    "resampler": (lambda width: ResamplerConfig(WIDTH, num_queries=9, head_dim=4), 9),
    "perceiver": (
        lambda width: ResamplerConfig(
            WIDTH, 8, 5, 2, head_dim=4, mlp_size=8, residual=True, dialect=ResamplerDialect("none", attends_itself=True)
        ),
        5,
    ),
    "q-former": (lambda width: QFormerConfig(WIDTH, width, 8, 2, 2, 16, num_queries=3), 3),
    "q-former with text": (lambda width: QFormerConfig(WIDTH, width, 8, 2, 2, 16, num_queries=6, vocab_size=VOCAB), 6),
    "paired": (lambda width: PairedProjectorConfig(WIDTH, (2, width - 2)), 16),
}
_DECODER = DecoderConfig(VOCAB, WIDTH, 1, 4, 2, mlp_size=24)
LLMS = {
    "llama": _DECODER,
    "mistral": change_fields(_DECODER, sliding_window=6),
    "qwen2": change_fields(_DECODER, qkv_bias=True, tie_word_embeddings=False),
    "qwen3": dataclasses.replace(_DECODER, qk_norm=True, head_dim=8),
    "glm": change_fields(_DECODER, partial_rotary_factor=0.5, rotary_interleaved=True, qkv_bias=True),
    "opt": DecoderConfig(
        VOCAB,
        WIDTH,
        1,
        4,
        4,
        None,
        24,
        "relu",
        dialect=DecoderDialect(gated=False, norm="layer", positions="learned", position_offset=2, embedding_size=6),
    ),
    "chatglm": ChatGLMConfig(VOCAB, WIDTH, 1, 2, 24),
    "t5": T5Config(VOCAB, WIDTH, 4, 24, 1, 1, 2),
}

KINDS = {"encoder": ENCODERS, "projector": PROJECTORS, "llm": LLMS}


def read(module, batch):
    """Returns the media tokens, and the logits of a text with them."""
    media = module.encode_media(batch)
    text = {name: array for name, array in batch.items() if name not in ("images", "patches")}
    return media.tokens, module(text | {"media": media.tokens}).logits


def shapes(config: MultimodalConfig, length: int = 24):
    module = config.make()
    a_slot = config.image.encoder.merge_unit if config.image.packed else 1  # patches: slots of a packing encoder
    batch = module.config.batch_spec(2, length, {"image": SLOTS * a_slot}).empty()
    batch["media_index"] = jnp.broadcast_to(jnp.arange(length), (2, length)) - 1
    out = jax.eval_shape(lambda: module.init_with_output(jax.random.key(0), batch, method=read))[0]
    return [(x.shape, x.dtype) for x in out]


def compositions():
    """Returns encoder, projector and LLM of each test: every two parts of different kinds occur together."""
    llms = list(LLMS)
    for i, encoder in enumerate(ENCODERS):
        for j, projector in enumerate(PROJECTORS):
            yield encoder, projector, llms[(i + j) % len(llms)]


def test_the_square_is_full():
    met = {pair for made in compositions() for pair in (made[:2], made[1:], made[::2])}
    kinds = ENCODERS, PROJECTORS, LLMS
    assert len(met) == sum(
        len(a) * len(b) for a, b in ((kinds[0], kinds[1]), (kinds[1], kinds[2]), (kinds[0], kinds[2]))
    )


@pytest.mark.parametrize(("encoder", "projector", "llm"), list(compositions()))
def test_any_three_compose(encoder, projector, llm):
    (encoder, width), (make, tokens) = ENCODERS[encoder], PROJECTORS[projector]
    assert encoder.grid == 4
    config = MultimodalConfig({"image": Branch(encoder, make(width))}, LLMS[llm])
    assert config.media_tokens == tokens
    media, logits = shapes(config)
    assert media == ((2, SLOTS * tokens, WIDTH), jnp.float32)
    assert logits == ((2, 24, VOCAB), jnp.float32)


@pytest.mark.parametrize("kind,name", [(kind, name) for kind, all_of_it in KINDS.items() for name in all_of_it])
def test_each_part_is_traced_on_a_mesh(kind, name, devices):
    """Checks that a part's constraints have as many names as its arrays have dimensions."""
    parts = {"encoder": "vit", "projector": "linear", "llm": "llama"} | {kind: name}
    encoder, width = ENCODERS[parts["encoder"]]
    projector, tokens = PROJECTORS[parts["projector"]]
    config = MultimodalConfig({"image": Branch(encoder, projector(width))}, LLMS[parts["llm"]])
    with use_mesh(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), devices)):
        media, logits = shapes(config)
    assert (media[0], logits[0]) == ((2, SLOTS * tokens, WIDTH), (2, 24, VOCAB))


@pytest.mark.parametrize("llm", LLMS)
def test_an_encoder_of_packed_patches_composes(llm):
    tower = QwenViTConfig(4, hidden_size=8, num_layers=1, num_heads=2, mlp_size=16, output_size=WIDTH)
    media, logits = shapes(MultimodalConfig({"image": Branch(tower)}, LLMS[llm]))
    assert (media[0], logits[0]) == ((2, SLOTS, WIDTH), (2, 24, VOCAB))


@pytest.mark.parametrize("name", ["clip", "eva", "internvit"])
def test_the_class_token_goes_where_it_has_a_place(name):
    encoder, width = ENCODERS[name]
    for projector, (make, tokens) in PROJECTORS.items():
        branch = Branch(encoder, make(width), Connection((-1,), True))
        if projector in ("merge", "pool", "pixel shuffle v1", "pixel shuffle v2", "resampler"):
            with pytest.raises(ConfigError, match="connection.class_token with projector"):
                MultimodalConfig({"image": branch}, LLMS["llama"])
            continue
        wanted = tokens + (tokens == 16)  # one more where each vector becomes one media token
        if projector == "mlp":  # whose positions are counted at construction
            branch = dataclasses.replace(branch, projector=dataclasses.replace(branch.projector, place_embedding=False))
        config = MultimodalConfig({"image": branch}, LLMS["llama"])
        assert config.media_tokens == wanted
        if name == "clip":
            assert shapes(config)[0][0] == (2, SLOTS * wanted, WIDTH)


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize(
    "projector",
    [
        MLPProjectorConfig(WIDTH, merge=3),
        PoolProjectorConfig(WIDTH, 3),
        PixelShuffleProjectorConfig(WIDTH, 3),
        PixelShuffleProjectorConfig(WIDTH, 3, "v1"),
    ],
    ids=["merge", "pool", "pixel shuffle v2", "pixel shuffle v1"],
)
def test_a_grid_that_does_not_divide_is_refused(encoder, projector):
    with pytest.raises(ConfigError, match=r"3 x 3 patches on a grid of 4 x 4|merge 3 on 4 patches"):
        MultimodalConfig({"image": Branch(ENCODERS[encoder][0], projector)}, LLMS["llama"])


@pytest.mark.parametrize("llm", LLMS)
@pytest.mark.parametrize("projector", PROJECTORS)
def test_another_width_than_the_llms_is_refused(projector, llm):
    other = dataclasses.replace(LLMS[llm], hidden_size=2 * WIDTH)
    with pytest.raises(ConfigError, match=f"projector.output_size {WIDTH}"):
        MultimodalConfig({"image": Branch(ENCODERS["vit"][0], PROJECTORS[projector][0](8))}, other)
