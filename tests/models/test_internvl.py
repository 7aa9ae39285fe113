"""InternVL's published size, refusals of configs and folders, and tiles in texts."""

from __future__ import annotations

import dataclasses
import math
import runpy
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import transformers
from flax import linen as nn
from tokenizers import Tokenizer, models, pre_tokenizers

from mllm_jax.checkpoints.fields import change_fields
from mllm_jax.data.chat_tokenizer import ChatTokenizer
from mllm_jax.data.image_processors import ImageProcessor
from mllm_jax.data.message import Example, Image, Message, Text
from mllm_jax.data.video import FrameTimes
from mllm_jax.errors import ConfigError
from mllm_jax.models.internvl import (
    HUB,
    IMAGE_MEAN,
    IMAGE_STD,
    ORIGINAL,
    InternVLConfig,
    InternVLLayout,
    from_hf_config,
    to_hf_config,
)
from mllm_jax.models.multimodal import Connection
from mllm_jax.models.processor import Processor
from mllm_jax.models.registry import abstract_params, family_of_config

CONFIG = Path(__file__).parents[2] / "configs" / "internvl3_8b.py"
WORDS = ("<pad>", "a", "cat", "Frame1:", "Frame2:")
SPECIAL = ("<img>", "</img>", "<IMG_CONTEXT>", "<video>")


@pytest.fixture(scope="module")
def published() -> dict:
    return runpy.run_path(str(CONFIG))


def test_the_full_size(published):
    """Checks the config, the reference class, and the published 15.9 GB of two-byte numbers."""
    config = published["model"]()
    params = nn.meta.unbox(abstract_params(config, family_of_config(config)))
    count = {name: sum(math.prod(x.shape) for x in jax.tree.leaves(part)) for name, part in params.items()}
    assert count == dict(encoder_image=304_012_288, projector_image=27_540_480, llm=7_612_820_992)
    assert sum(count.values()) == 7_944_373_760 and config.media_tokens == 256
    written = to_hf_config(config)
    assert from_hf_config(written).llm == config.llm and config.parts["llm"].dtype == "bfloat16"
    hf = transformers.AutoConfig.for_model(**{k: v for k, v in written.items() if k != "architectures"})
    with torch.device("meta"):
        reference = transformers.InternVLForConditionalGeneration(hf)
    assert sum(p.numel() for p in reference.parameters()) == sum(count.values())


def test_the_published_stage(published):
    from mllm_jax.data.pipeline import Mixture, Weighted

    rows, slots = published["ROWS"], published["MAX_TILES"] + 1
    stage = published["finetune"](
        Mixture((Weighted(None),), rows=rows, length=16_384, slots={"image": slots}), steps=1000
    )
    assert (stage.data.rows, slots, stage.optimizer.learning_rate, stage.optimizer.warmup_steps) == (128, 13, 2e-5, 30)
    assert stage.trainable == ("projector_image/*", "llm/*")


@pytest.fixture(scope="module")
def config(published) -> InternVLConfig:
    full = published["model"]("float32")
    tower = dataclasses.replace(
        full.image.encoder, image_size=8, patch_size=2, hidden_size=12, num_layers=1, num_heads=2
    )
    llm = dataclasses.replace(full.llm, hidden_size=16, vocab_size=20, num_layers=1, num_heads=2, num_kv_heads=1)
    projector = dataclasses.replace(full.image.projector, output_size=16)
    image = dataclasses.replace(full.image, encoder=tower, projector=projector)
    return dataclasses.replace(full, inputs={"image": image}, llm=llm, image_token_id=len(WORDS) + 2)


def tokenizer(special: tuple[str, ...] = SPECIAL) -> ChatTokenizer:
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>")
    made.add_special_tokens(dict(additional_special_tokens=list(special)))
    made.video_token = "<video>"
    return ChatTokenizer(made)


IMAGES = ImageProcessor("GotOcr2ImageProcessor", (8, 8), tile_range=(1, 6), mean=IMAGE_MEAN, std=IMAGE_STD)
WIDE = np.random.default_rng(0).integers(0, 256, (10, 30, 3), np.uint8)


def test_tiles_in_the_text(config):
    layout = InternVLLayout(config, tokenizer(), IMAGES, IMAGES)
    shown = layout.image(WIDE)
    assert shown.arrays["images"].shape == (4, 8, 8, 3) and shown.arrays["images"].dtype == np.uint8
    assert shown.tokens.tolist() == [5, *[7] * 16, 6]
    assert shown.places.tolist() == [-1, *range(16), -1]
    video = layout.video(np.stack([WIDE, WIDE]), FrameTimes.of(2, 2.0, None))
    assert video.tokens.tolist() == [3, 5, 7, 7, 7, 7, 6, 4, 5, 7, 7, 7, 7, 6]
    assert video.places[video.places >= 0].tolist() == list(range(8)) and video.arrays["images"].shape[0] == 2


TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ' ' }}{% for p in m['content'] %}"
    "{{ ('<IMG_CONTEXT>' if p['type'] == 'image' else p['text']) + ' ' }}{% endfor %}"
    "{{ '</s> ' if m['role'] == 'assistant' else '' }}{% endfor %}"
    "{{ 'assistant ' if add_generation_prompt else '' }}"
)


def test_conversations_to_train_on(config):
    made = tokenizer()
    made.backend.add_special_tokens(dict(eos_token="</s>"))
    made.backend.chat_template, made.stop_ids = TEMPLATE, (made.backend.eos_token_id,)
    processor = Processor(config, made, InternVLLayout(config, made, IMAGES))
    asked = Message("user", (Image(WIDE), Image(WIDE[:, :9]), Text("a")))
    rest = (Message("assistant", "cat"), Message("user", (Text("cat"),)), Message("assistant", (Text("a"),)))
    encoded = processor.encode(Example((asked, *rest)), max_length=64)
    assert encoded.slots == {"image": 4 + 1}, "three tiles and a thumbnail, and an image of one tile"
    assert encoded.tokens[encoded.loss_weights > 0].tolist() == [2, 9, 1, 9]
    assert (encoded.row.places >= 0).sum() == 4 * 4 + 4
    batch = processor.pack([[encoded], []], length=64, slots={"image": 6})
    assert batch["images"].shape == (2, 6, 8, 8, 3) and batch["media_index"].max() == 19


def test_the_config_may_say_how_many_tiles(config):
    for bounds, tiles in (((1, 1), 1), ((1, 2), 3), ((4, 4), 5)):
        layout = InternVLLayout(dataclasses.replace(config, tile_range=bounds), tokenizer(), IMAGES)
        assert len(layout.image(WIDE).arrays["images"]) == tiles
        assert layout.video_token is None


def test_other_colours_become_numbers(config):
    halves = dataclasses.replace(IMAGES, mean=(0.5,) * 3, std=(0.5,) * 3)
    tiles = InternVLLayout(config, tokenizer(), halves).image(WIDE).arrays["images"]
    assert tiles.dtype == np.float32
    np.testing.assert_array_equal(tiles, halves.normalise(IMAGES.tiles(WIDE)))


def test_folders_that_do_not_fit_are_refused(config):
    with pytest.raises(ConfigError, match=r"(?s)tiles of \(9, 8\).*8 x 8 pixels"):
        InternVLLayout(config, tokenizer(), dataclasses.replace(IMAGES, size=(9, 8)))
    with pytest.raises(ConfigError, match=r"(?s)a tokenizer without '</img>'.*end_image_token"):
        InternVLLayout(config, tokenizer(("<img>", "<IMG_CONTEXT>")), IMAGES)


def test_configs_that_do_not_fit_are_refused(config):
    for change, message in (
        (dict(family="InternVL"), "family 'InternVL'"),
        (dict(tile_range=(3, 2)), r"tile_range \(3, 2\)"),
    ):
        with pytest.raises(ConfigError, match=message):
            dataclasses.replace(config, **change)
    projector = config.image.projector
    for change, message in (
        (dict(connection=Connection(class_token=True)), r"class_token with projector PixelShuffle"),
        (dict(projector=dataclasses.replace(projector, factor=3)), "grid of 4 x 4"),
    ):
        with pytest.raises(ConfigError, match=message):
            config.with_branch("image", **change)
    for change, message in (
        (dict(projector=dataclasses.replace(projector, norm_eps=0.1)), "projector="),
        (dict(connection=Connection(layers=(0, 1))), r"vision_feature_layer=\[0, 1\]"),
    ):
        with pytest.raises(ConfigError, match=message):
            to_hf_config(config.with_branch("image", **change))
    for change, message in (
        (dict(image_token_id=None), "image_token_id=None"),
        (dict(llm=change_fields(config.llm, family="OPTForCausalLM")), "a OPTForCausalLM"),
    ):
        with pytest.raises(ConfigError, match=message):
            to_hf_config(dataclasses.replace(config, **change))


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        (HUB, dict(vision_feature_select_strategy="full"), "select_strategy='full'"),
        (HUB, dict(downsample_ratio=0.4), "downsample_ratio=0.4"),
        (HUB, dict(vision_config=dict(model_type="clip_vision_model")), "an image encoder 'clip_vision_model'"),
        (HUB, dict(text_config=dict(model_type="gemma")), "model_type='gemma'"),
        (HUB, dict(use_abs=1), "use_abs=1"),
        (ORIGINAL, dict(pad2square=True), "pad2square=True"),
        (ORIGINAL, dict(force_image_size=9), "force_image_size=9"),
        (ORIGINAL, dict(use_thumbnail=False), "use_thumbnail=False"),
        (ORIGINAL, dict(use_llm_lora=8), "use_llm_lora=8"),
        (ORIGINAL, dict(ps_version="v3"), "ps_version='v3'"),
        (ORIGINAL, dict(llm_config=dict(architectures=["InternLM2ForCausalLM"])), "InternLM2ForCausalLM"),
    ],
)
def test_options_that_cannot_be_honoured_are_refused_by_name(config, family, change, message):
    written = to_hf_config(dataclasses.replace(config, family=family))
    if family == ORIGINAL:
        assert from_hf_config(written).tile_range == (1, 12)
    with pytest.raises(ConfigError, match=message):
        from_hf_config(written | change)
