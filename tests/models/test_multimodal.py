"""The parts as one module: positions of media, separation of examples, and refusals."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mllm_jax.encoders.text_encoder import TextTowerConfig
from mllm_jax.encoders.vit import ViTConfig
from mllm_jax.errors import ConfigError
from mllm_jax.llms.decoder import DecoderConfig
from mllm_jax.models.branch import Branch, Connection
from mllm_jax.models.clip import DualEncoderConfig
from mllm_jax.models.multimodal import MultimodalConfig
from mllm_jax.projectors.mlp import MLPProjectorConfig

CONFIG = MultimodalConfig(
    inputs={
        "image": Branch(
            ViTConfig(8, 4, 12, num_layers=1, num_heads=2, mlp_size=16, class_token=True),
            MLPProjectorConfig(output_size=16),
        )
    },
    llm=DecoderConfig(vocab_size=29, hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, mlp_size=24),
)
MEDIA = CONFIG.media_tokens  # 4 for each image


def random_params(config: MultimodalConfig):
    """Returns random parameters, without compiling `init`."""
    module = config.make()
    abstract = jax.eval_shape(
        lambda: module.init(jax.random.key(0), module.config.batch_spec().empty(), method="touch")
    )
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: 0.4 * rng.normal(size=x.shape).astype(np.float32), nn.meta.unbox(abstract))


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG)


@pytest.fixture(scope="module")
def forward(params):
    return jax.jit(lambda batch: CONFIG.make().apply(params, batch).logits)


@pytest.fixture
def batch():
    """Packs two examples of one image each in row 0; row 1 uses the image of slot 1 only."""
    rng = np.random.default_rng(1)
    media_index = np.full((2, 16), -1, np.int32)
    media_index[0, 1:5], media_index[0, 9:13] = np.arange(4), np.arange(4, 8)
    media_index[1, 2:6] = np.arange(4, 8)
    segments = np.array([[1] * 8 + [2] * 7 + [0], [1] * 10 + [0] * 6], np.int32)
    return {
        "tokens": rng.integers(0, 29, (2, 16)).astype(np.int32),
        "positions": np.array([[*range(8), *range(7), 0], [*range(10), *[0] * 6]], np.int32),
        "segments": segments,
        "media_index": media_index,
        "images": rng.integers(0, 256, (2, 2, 8, 8, 3)).astype(np.uint8),
    }


def test_media_land_exactly_where_media_index_says(params):
    rng = np.random.default_rng(2)
    tokens = rng.integers(0, 29, (2, 9)).astype(np.int32)
    media = rng.normal(size=(2, 2 * MEDIA, 16)).astype(np.float32)
    # Any order, gaps and repeats: the index alone decides, and it counts within the row.
    media_index = np.array([[-1, 7, 0, 0, -1, 3, 5, -1, 2], [6, -1, -1, 1, 4, -1, -1, 7, 0]], np.int32)
    merged = CONFIG.make().apply(params, tokens, media, media_index, method="merge")
    table = params["params"]["llm"]["token_embedding"]["embedding"]
    for row in range(2):
        for place, index in enumerate(media_index[row]):
            wanted = media[row, index] if index >= 0 else table[tokens[row, place]]
            np.testing.assert_array_equal(merged[row, place], wanted)


def test_media_are_the_projected_patches_in_the_order_of_the_slots(params, batch):
    model = CONFIG.make()
    media = jax.jit(lambda x: model.apply(params, x, method="encode_media").tokens)({"images": batch["images"]})
    assert media.shape == (2, 2 * MEDIA, 16)
    encoder, projector = CONFIG.image.encoder.make(), CONFIG.image.projector.make()

    @jax.jit
    def one(image):
        pixels = (image.astype(jnp.float32) / 255 - 0.5) / 0.5
        features = encoder.apply({"params": params["params"]["encoder_image"]}, pixels[None]).last_hidden_state
        return projector.apply({"params": params["params"]["projector_image"]}, features[:, 1:])[
            0
        ]  # without the class token

    for row in range(2):
        for slot in range(2):
            wanted = one(batch["images"][row, slot])
            np.testing.assert_allclose(media[row, slot * MEDIA : (slot + 1) * MEDIA], wanted, atol=1e-5)


def test_gradient_reaches_only_the_media_used(params, batch):
    media = np.random.default_rng(3).normal(size=(2, 2 * MEDIA, 16)).astype(np.float32)
    text = {name: array for name, array in batch.items() if name != "images"}

    @jax.jit
    def gradient(media, weights):
        def total(media):
            return (CONFIG.make().apply(params, text | {"media": media}).logits * weights[..., None]).sum()

        return jnp.abs(jax.grad(total)(media)).max(axis=-1)

    used = np.array([[True] * 8, [False] * 4 + [True] * 4])
    # The sum over the vocabulary is weighted only by position, so every token of a used image has a gradient.
    assert ((gradient(media, np.float32(batch["segments"] > 0)) > 0) == used).all()
    second = np.zeros((2, 16), np.float32)
    second[0, 8:15] = 1
    assert ((gradient(media, second) > 0) == np.array([[False] * 4 + [True] * 4, [False] * 8])).all()


def test_packed_examples_do_not_see_each_others_images_or_text(forward, batch):
    before = np.asarray(forward(batch))
    images = batch["images"].copy()
    images[0, 0] = 255 - images[0, 0]
    after = np.asarray(forward(batch | {"images": images}))
    assert np.abs(after[0, :8] - before[0, :8]).max() > 1e-3
    np.testing.assert_array_equal(after[0, 8:15], before[0, 8:15])
    np.testing.assert_array_equal(after[1], before[1])

    tokens = batch["tokens"].copy()
    tokens[0, 13] = (tokens[0, 13] + 1) % 29
    after = np.asarray(forward(batch | {"tokens": tokens}))
    assert np.abs(after[0, 13:15] - before[0, 13:15]).max() > 1e-3
    np.testing.assert_array_equal(after[0, :13], before[0, :13])


def test_projected_media_stand_in_for_images(params, forward, batch):
    """Checks that encoded media can replace images, as in later steps of a generation."""
    media = CONFIG.make().apply(params, {"images": batch["images"]}, method="encode_media").tokens
    assert media.shape == (2, 2 * MEDIA, 16)
    others = {name: array for name, array in batch.items() if name != "images"}
    wanted = forward(batch)
    np.testing.assert_allclose(forward(others | {"media": media}), wanted, atol=2e-5)
    assert np.abs(forward(others | {"media": -media}) - wanted).max() > 1e-3
    assert np.abs(forward(others) - wanted).max() > 1e-3, "without either there is only text"


def test_an_unused_slot_has_no_part(forward, batch):
    images = batch["images"].copy()
    images[1, 0] = 0
    np.testing.assert_array_equal(forward(batch | {"images": images})[1], forward(batch)[1])


def test_text_without_images_needs_none(params, forward, batch):
    """Compares the logits of a text in a batch with images, in one without, and from the LLM alone."""
    text = batch | {"media_index": np.full((2, 16), -1, np.int32)}
    with_slots = forward(text)
    without = forward({name: array for name, array in text.items() if name != "images"})
    np.testing.assert_allclose(with_slots, without, atol=1e-6)
    alone = jax.jit(CONFIG.llm.make().apply)(
        {"params": params["params"]["llm"]}, text["tokens"], text["positions"], text["segments"]
    )
    np.testing.assert_allclose(without, alone, atol=1e-6)


@pytest.mark.parametrize("pooling,width", [("pooler", 12), ("patches", 60)])
def test_contrastive_encoders(pooling, width, batch):
    words = TextTowerConfig(vocab_size=29, max_length=16, hidden_size=8, num_layers=1, num_heads=2, mlp_size=8)
    config = DualEncoderConfig(CONFIG.image.encoder, words, projection_size=6, pooling=pooling)
    params = random_params(config)
    assert set(params["params"]) == {"encoder_image", "encoder_text", "heads"}
    assert params["params"]["heads"]["image_projection"]["kernel"].shape == (width, 6)
    params["params"]["heads"]["log_scale"] = np.float32(50.0)
    apply = jax.jit(lambda b: config.make().apply(params, b, method="embed_pairs"))

    def embed(b):
        image, text, scale, bias = apply(b)
        return image[:, 0], text[:, 0], scale, bias

    image, text, scale, _ = embed(batch)
    np.testing.assert_allclose(np.linalg.norm(image, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(text, axis=1), 1, atol=1e-5)
    assert float(scale) == pytest.approx(100, rel=1e-5), "the scale is bounded as in CLIP"
    second_slot = batch["images"].copy()
    second_slot[:, 1] = 0
    np.testing.assert_array_equal(embed(batch | {"images": second_slot})[0], image)
    first_slot = batch["images"].copy()
    first_slot[0, 0] = 0
    moved = np.abs(embed(batch | {"images": first_slot})[0] - image).max(axis=1)
    assert moved[0] > 1e-3 and moved[1] == 0


def test_a_caption_is_compared_with_the_region_it_describes(batch):
    encoder = ViTConfig(8, 2, 12, num_layers=1, num_heads=2, mlp_size=16, regions=2, region_size=10)
    words = TextTowerConfig(vocab_size=29, max_length=16, hidden_size=8, num_layers=0)
    config = DualEncoderConfig(encoder, words, projection_size=6, captions=3)
    params = random_params(config)
    batch = batch | {
        "segments": np.array([[1] * 4 + [2] * 4 + [3] * 4 + [0] * 4, [1] * 5 + [0] * 11], np.int32),
        "positions": np.array([[*range(4)] * 3 + [0] * 4, [*range(5), *[0] * 11]], np.int32),
        "media_index": np.array([[2] * 4 + [-1] * 4 + [0] * 4 + [-1] * 4, [-1] * 16], np.int32),
    }
    model = config.make()
    image, text, *_ = jax.jit(lambda b: model.apply(params, b, method="embed_pairs"))(batch)
    assert image.shape == text.shape == (2, 3, 6)
    pixels = (batch["images"][:1, 0].astype(np.float32) / 255 - 0.5) / 0.5
    tokens = encoder.make().apply({"params": params["params"]["encoder_image"]}, pixels).last_hidden_state[0]
    kernel = params["params"]["heads"]["image_projection"]["kernel"]
    for number, feature in enumerate([tokens[2], tokens.mean(axis=0), tokens[0]]):
        wanted = feature @ kernel
        np.testing.assert_allclose(image[0, number], wanted / np.linalg.norm(wanted), atol=1e-5)


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(projector=MLPProjectorConfig(output_size=15)), "projector.output_size 15"),
        (dict(projector=MLPProjectorConfig(output_size=16, merge=3)), "projector.merge 3"),
        (dict(projector=None), "a projector for an encoder of whole images"),
        (dict(projector="video"), r"inputs\['image'\].projector='video'"),
        (dict(encoder="image"), r"inputs\['image'\].encoder='image'"),
    ],
)
def test_parts_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        CONFIG.with_branch("image", **change)


def test_a_named_model_reads_images_alone():
    with pytest.raises(ConfigError, match="X with inputs"):
        dataclasses.replace(CONFIG, inputs={**CONFIG.inputs, "video": CONFIG.image}, family="X")
    with pytest.raises(ConfigError, match="audios for a model that reads image"):
        CONFIG.branch("audio")


def test_branches_share_an_encoder_and_follow_one_after_the_other(params, batch):
    """Checks frames with the images' encoder and their own projector; the row counts media over both."""
    frames = Branch("image", MLPProjectorConfig(output_size=16, num_layers=1))
    config = dataclasses.replace(CONFIG, inputs={**CONFIG.inputs, "video": frames})
    assert list(config.parts) == ["encoder_image", "projector_image", "projector_video", "llm"]
    wide = config.with_branch("video", connection=Connection(layers=(-1,)))
    assert wide.inputs["video"].encoder == "image" and list(wide.parts) == list(config.parts), "still shared"
    spec = config.batch_spec(2, 16, {"image": 2, "video": 3})
    assert spec["video_images"].shape == (2, 3, 8, 8, 3) and spec["images"].shape == (2, 2, 8, 8, 3)
    both = random_params(config)
    assert set(both["params"]) == set(config.parts)
    shown = batch | {"video_images": np.random.default_rng(2).integers(0, 256, (2, 3, 8, 8, 3), dtype=np.uint8)}
    encode = jax.jit(lambda model, p, x: model.apply(p, x, method="encode_media").tokens, static_argnums=0)
    media = encode(config.make(), both, shown)
    assert media.shape == (2, (2 + 3) * MEDIA, 16)
    own = {name: both["params"][name] for name in CONFIG.parts}
    images = {"images": batch["images"]}
    np.testing.assert_allclose(media[:, : 2 * MEDIA], encode(CONFIG.make(), {"params": own}, images), atol=1e-6)
    alone = CONFIG.with_branch("image", projector=frames.projector)
    own["projector_image"] = both["params"]["projector_video"]
    videos = {"images": shown["video_images"]}
    np.testing.assert_allclose(media[:, 2 * MEDIA :], encode(alone.make(), {"params": own}, videos), atol=1e-6)
    # Logits depend on the frames only if a position refers to a frame's token.
    logits = jax.jit(lambda x: config.make().apply(both, x).logits)
    other = shown | {"video_images": shown["video_images"][:, ::-1]}
    np.testing.assert_array_equal(logits(shown), logits(other))
    index = np.where(batch["media_index"] >= 0, batch["media_index"] + 2 * MEDIA, -1)
    moved = np.abs(logits(shown | {"media_index": index}) - logits(other | {"media_index": index}))
    assert moved.max() > 1e-3
