"""LLaVA's configs at their real sizes, refusals, and images prepared as on the hub and by the authors."""

from __future__ import annotations

import math
import runpy
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import transformers
from flax import linen as nn

from mllm_jax.checkpoints.native import read_native_config, write_native
from mllm_jax.data.batch import assemble
from mllm_jax.data.image_processors import image_processor
from mllm_jax.data.processing.media import NEWLINE, Encoded, lay_out_row
from mllm_jax.data.video import FrameTimes
from mllm_jax.encoders.vit import ViTConfig, ViTDialect
from mllm_jax.errors import ConfigError
from mllm_jax.llms.decoder import DecoderConfig, DecoderDialect
from mllm_jax.models.branch import Branch
from mllm_jax.models.llava import LLAVA, NEXT, ONEVISION, LlavaConfig, LlavaLayout, from_hf_config, to_hf_config
from mllm_jax.models.multimodal import Connection
from mllm_jax.models.registry import abstract_params, family_of_config
from mllm_jax.projectors.mlp import MLPProjectorConfig
from mllm_jax.training.partition import split

CONFIGS = Path(__file__).parents[2] / "configs"
SIDE, GRID = 12, 3
TINY = LlavaConfig(
    inputs={
        "image": Branch(
            ViTConfig(
                SIDE,
                4,
                24,
                num_layers=2,
                num_heads=2,
                mlp_size=40,
                class_token=True,
                dialect=ViTDialect(
                    norm_output=False, norm_pooled=True, pre_norm=True, patch_bias=False, family="CLIPVisionModel"
                ),
            ),
            MLPProjectorConfig(output_size=32),
            Connection(layers=(-2,)),
        )
    },
    llm=DecoderConfig(vocab_size=20, hidden_size=32, num_layers=2, num_heads=4, mlp_size=40),
)
RESOLUTIONS = ((SIDE, 2 * SIDE), (2 * SIDE, 2 * SIDE))
TILED = replace(TINY, family=NEXT, newline=True, resolutions=RESOLUTIONS)
WIDE = dict(crop_size=SIDE, size=SIDE)


# ---- real sizes

SIZES = {  # config file, its function -> the published number of parameters
    ("llava15_7b", "model"): 7_063_427_072,
    ("llava_next", "vicuna_7b"): 7_063_431_168,
    ("llava_next", "mistral_7b"): 7_566_747_648,
    ("llava_next", "onevision_7b"): 8_030_348_832,
    ("llava_next", "onevision_500m"): 893_618_208,
}


@pytest.mark.parametrize("source", SIZES, ids="/".join)
def test_full_size_models_have_the_published_parameters(source):
    """Checks the config, the reference class for its config.json, and the number published on the hub."""
    file, name = source
    config = runpy.run_path(str(CONFIGS / f"{file}.py"))[name]()
    count = sum(
        math.prod(x.shape) for x in jax.tree.leaves(nn.meta.unbox(abstract_params(config, family_of_config(config))))
    )
    assert count == SIZES[source]
    written = to_hf_config(config)
    hf = transformers.AutoConfig.for_model(**{k: v for k, v in written.items() if k != "architectures"})
    with torch.device("meta"):
        reference = getattr(transformers, config.family)(hf)
    reference.tie_weights()
    assert sum(p.numel() for p in reference.parameters()) == SIZES[source]
    assert config.media_tokens == {LLAVA: 576, NEXT: 576, ONEVISION: 729}[config.family]


def test_published_stages():
    """Checks the steps of the authors' runs: 558,128 / 256 and 665,298 / 128."""
    found = runpy.run_path(str(CONFIGS / "llava15_7b.py"))
    experiment = found["experiment"](None, None, "runs/vicuna")
    align, instruct = experiment.stages
    assert (align.steps, align.data.rows, align.optimizer.learning_rate) == (2181, 256, 1e-3)
    assert (instruct.steps, instruct.data.rows, instruct.optimizer.learning_rate) == (5198, 128, 2e-5)
    assert instruct.optimizer.warmup_steps == 156 and align.trainable == ("projector_image/*",)


def test_published_stages_of_next():
    """Checks 558,128 / 256 and 760,000 / 128 steps, and the encoder's rate of 2e-6."""
    experiment = runpy.run_path(str(CONFIGS / "llava_next.py"))["config"]()
    align, instruct = experiment.stages
    assert (align.steps, align.trainable, align.optimizer.factors) == (2181, ("projector_image/*",), ())
    [(pattern, factor)] = instruct.optimizer.factors
    assert (instruct.steps, instruct.optimizer.learning_rate, instruct.optimizer.warmup_steps) == (5938, 1e-5, 179)
    assert pattern == "encoder_image/*" and factor * instruct.optimizer.learning_rate == pytest.approx(2e-6)
    params = abstract_params(experiment.model, family_of_config(experiment.model))
    assert not split(nn.meta.unbox(params), instruct.trainable)[1], "everything is trained"


# ---- images


def random_image(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)


def layout_of(config: LlavaConfig, **options) -> LlavaLayout:
    kind = {LLAVA: "Llava", NEXT: "LlavaNext", ONEVISION: "LlavaOnevision"}[config.family]
    more = dict(image_grid_pinpoints=config.resolutions) if config.resolutions else {}
    values = dict(image_processor_type=f"{kind}ImageProcessor", **WIDE) | more | options
    return LlavaLayout(config, image_processor(values), image_processor(values) if config.video_token_id else None)


def test_the_authors_pad_to_squares_and_cut_without_rounding():
    shown, means = random_image(10, 30), dict(image_mean=[0.5] * 3, image_std=[0.5] * 3)
    hub, own = (
        layout_of(replace(TINY, preprocessing=how), **means).image(shown).arrays["images"][0]
        for how in ("hub", "original")
    )
    padded = image_processor(dict(image_processor_type="LlavaImageProcessor", do_pad=True, **WIDE, **means))
    np.testing.assert_array_equal(own, padded.prepare(shown))
    assert (own[0] == 127).all() and not (hub[0] == 127).any()
    image = replace(TINY.image, encoder=replace(TINY.image.encoder, image_size=96))
    many = replace(TILED, inputs={"image": image}, resolutions=((96, 96), (192, 192)))
    wide = dict(crop_size=96, size=96)
    lengths = [
        len(layout_of(replace(many, preprocessing=how), **wide).image(random_image(55, 176)).places)
        for how in ("hub", "original")
    ]
    assert lengths == [24 * 24 + 16 * 49, 24 * 24 + 14 * 49]


def test_other_means_than_the_encoders_are_taken_on_the_host():
    """Checks bytes if the folder has the encoder's mean and deviation, and normalised numbers otherwise."""
    image = random_image(20, 31)
    layout = layout_of(TINY, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    assert layout.image(image).arrays["images"].dtype == np.uint8
    other = layout_of(TINY, image_mean=[0.4] * 3, image_std=[0.5] * 3)
    found = other.image(image).arrays["images"]
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found[0], other.image_processor(image))


def test_positions_and_tokens():
    layout = layout_of(replace(TILED, family=ONEVISION, max_tiles=9, image_token_id=7, video_token_id=8))
    alone, (one, two) = layout.images([random_image(20, 40)]), layout.images([random_image(20, 40), random_image(9, 9)])
    assert len(alone) == 1 and len(alone[0].arrays["images"]) == 3
    assert [len(each.arrays["images"]) for each in (one, two)] == [1, 1]
    assert one.places.tolist() == [*range(GRID**2), NEWLINE] and set(one.tokens) == {7}
    film = layout.video(np.stack([random_image(9, 13)] * 3), FrameTimes.of(3, 2.0, None))
    assert len(film.arrays["images"]) == 3 and film.places.shape == (3 * 4 + 1, 4) and set(film.tokens) == {8}
    np.testing.assert_allclose(film.weights.sum(axis=1), 1, atol=1e-6)
    full = layout_of(TINY.with_branch("image", connection=Connection((-2,), class_token=True)))
    assert full.image(random_image(9, 9)).places.tolist() == list(range(GRID**2 + 1))


def test_rows_to_train_on_hold_images_of_all_kinds():
    """Packs an image with reduced features, and an example of two images of one tile each, into a row."""
    config = replace(TILED, family=ONEVISION, max_tiles=2, image_token_id=7, video_token_id=8)
    layout = layout_of(config)
    alone, two = layout.images([random_image(40, 40)]), layout.images([random_image(20, 40), random_image(9, 9)])
    examples = []
    for ids, media in (([1, 7, 2], alone), ([7, 3, 7], two)):
        row = lay_out_row(ids, media, (7, 8), "a text")
        examples.append(Encoded(row, np.ones(len(row.tokens), np.float32), media))
    assert [e.slots["image"] for e in examples] == [5, 2]
    batch = assemble([examples], layout.spec(config.batch_spec(1, 80, {"image": 8})), layout, {"image": 8})
    assert batch["images"].shape == (1, 8, SIDE, SIDE, 3) and batch["media_index"].shape == (1, 80, 4)
    used = int((batch["segments"] > 0).sum())
    held = (batch["media_index"] >= 0).all(axis=-1)
    np.testing.assert_allclose(batch["media_weights"][held].sum(axis=-1), 1, atol=1e-6)
    assert held.sum() == used - 3 and batch["media_index"].max() == 8 * GRID**2  # the newline
    second = batch["media_index"][0, batch["segments"][0] == 2, 0]
    assert second.tolist() == [*range(45, 54), 72, -1, *range(54, 63), 72]


# ---- what is refused


@pytest.mark.parametrize(
    "config,changes,message",
    [
        (TINY, dict(newline=True), "0 resolutions and newline=True"),
        (TINY, dict(resolutions=RESOLUTIONS), "2 resolutions and newline=False"),
        (TILED, dict(resolutions=()), "0 resolutions and newline=True"),
        (TILED, dict(inputs={"image": replace(TINY.image, connection=Connection((-2,), True))}), "class token is read"),
        (TILED, dict(resolutions=((SIDE, 20),)), "for tiles of 12"),
        (TINY, dict(preprocessing="other"), "preprocessing 'other'"),
        (TINY, dict(family="BlipModel"), "family 'BlipModel'"),
    ],
)
def test_what_makes_no_llava_is_refused(config, changes, message):
    with pytest.raises(ConfigError, match=message):
        replace(config, **changes)


@pytest.mark.parametrize(
    "config,options,message",
    [
        (TINY, dict(crop_size=10), r"tiles of \[\(10, 10\)\]"),
        (TINY, dict(do_center_crop=False), r"tiles of \[\(12, 24\), \(24, 12\)\]"),
        (TILED, dict(image_grid_pinpoints=[[SIDE, SIDE]]), r"cuts tiles of 12 out of \(\(12, 12\),\)"),
    ],
)
def test_processors_of_other_models_are_refused(config, options, message):
    with pytest.raises(ConfigError, match=f"(?s){message}.*belong together"):
        layout_of(config, **options)


def _changed(**changes) -> dict:
    return to_hf_config(TINY) | changes


@pytest.mark.parametrize(
    "values,message",
    [
        (_changed(projector_hidden_act="sine"), "projector_hidden_act='sine'"),
        (_changed(vision_config=dict(model_type="pixtral")), "an image encoder 'pixtral'"),
        (_changed(text_config=dict(model_type="mamba")), "model_type='mamba'"),
        (_changed(vision_feature_select_strategy="some"), "strategy='some'"),
        (_changed(qformer=1), "qformer=1"),
        (
            _changed(vision_config=dict(model_type="siglip_vision_model"), vision_feature_select_strategy="default"),
            "would drop a patch",
        ),
    ],
)
def test_options_are_refused_by_name(values, message):
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        from_hf_config(values)


@pytest.mark.parametrize(
    "config,message",
    [
        (TINY.with_branch("image", connection=Connection()), "connection="),
        (TINY.with_branch("image", projector=MLPProjectorConfig(32, num_layers=3)), "projector="),
        (
            replace(
                TINY, llm=DecoderConfig(vocab_size=20, hidden_size=32, dialect=DecoderDialect(family="OPTForCausalLM"))
            ),
            "LLaVA with a OPTForCausalLM",
        ),
    ],
)
def test_what_the_hub_cannot_say_is_not_written(config, message):
    with pytest.raises(ConfigError, match=message):
        to_hf_config(config)


def test_native_folders_keep_all_of_it(tmp_path):
    config = replace(TILED, preprocessing="original")
    params = nn.meta.unbox(abstract_params(config, family_of_config(config)))
    write_native(tmp_path / "model", config, jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), params))
    assert read_native_config(tmp_path / "model") == config
