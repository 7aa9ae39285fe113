"""Dual encoders in training, refusals of their configs, and the published numbers of parameters."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from toy_data import PAIRS, SIZE, Toy, processor, quick_compilation

from mllm_jax.checkpoints.fields import change_fields
from mllm_jax.data.pipeline import Pipeline, Weighted
from mllm_jax.encoders.text_encoder import TextTowerConfig, TextTowerDialect
from mllm_jax.encoders.vit import ViTConfig
from mllm_jax.errors import ConfigError
from mllm_jax.layers.pixels import normalise_pixels
from mllm_jax.models.clip import CLIP, SIGLIP, DualEncoderConfig, sample
from mllm_jax.models.params import init_params
from mllm_jax.sharding.mesh import MeshConfig, make_mesh
from mllm_jax.training.config import AdamW
from mllm_jax.training.objectives.contrastive import KINDS, Contrastive
from mllm_jax.training.optimizer import learning_rate, make_optimizer
from mllm_jax.training.step import init_state, make_train_step, place_batch, state_shardings

STEPS = 15
CONFIG = DualEncoderConfig(
    vision=ViTConfig(SIZE, 4, 24, num_layers=1, num_heads=3, mlp_size=32),
    text=TextTowerConfig(320, 24, 24, 1, 2, 32, dialect=TextTowerDialect(mask="causal", pooling="last")),
    projection_size=16,
    captions=2,
)
SIGMOID = replace(CONFIG, kind="sigmoid", projection_size=None, init_log_scale=1.0, init_bias=-2.0)
CONFIGS = {"softmax": CONFIG, "sigmoid": SIGMOID}


@pytest.fixture(scope="module", autouse=True)
def _quickly():
    with quick_compilation():
        yield


@pytest.fixture(scope="module")
def batch():
    mixture = replace(PAIRS, rows=16, sources=(Weighted(Toy(size=16)),))
    return Pipeline(mixture, processor(CONFIG), seed=0).batch(0)


def trained(kind: str, mesh_config: MeshConfig, devices, batch, steps: int) -> tuple[list[dict], dict]:
    """Returns the metrics of some steps on one batch, and the parameters after them."""
    mesh = make_mesh(mesh_config, devices)
    model = CONFIGS[kind].make()
    params, shardings = init_params(model, mesh, seed=0)
    adamw = AdamW(learning_rate=5e-3, warmup_steps=2)
    optimizer, schedule = make_optimizer(adamw, STEPS), learning_rate(adamw, STEPS)
    places = state_shardings(optimizer, params, shardings, mesh)
    state = init_state(optimizer, params, places, jax.random.key(0))
    step = make_train_step(model, Contrastive(kind), optimizer, schedule, mesh=mesh, shardings=places)
    placed = place_batch(batch, mesh, CONFIG.batch_spec(*batch["tokens"].shape), list(range(16)))
    history = []
    for _ in range(steps):
        state, metrics = step(state, {}, placed)
        history.append({name: float(value) for name, value in metrics.items()})
    return history, jax.device_get(state.params)


@pytest.mark.parametrize("kind", KINDS)
def test_the_contrastive_stage_trains_it_alike_on_one_device_and_on_eight(kind, devices, batch):
    alone, params = trained(kind, MeshConfig(data=1), devices[:1], batch, STEPS)
    assert alone[-1]["loss"] < 0.7 * alone[0]["loss"]
    assert alone[-1]["recall_at_1"] > alone[0]["recall_at_1"]
    assert all(metrics["nonfinite"] == 0 for metrics in alone)
    heads = {"image_projection", "text_projection", "log_scale"} if kind == "softmax" else {"log_scale", "bias"}
    assert params["heads"].keys() == heads
    many, _ = trained(kind, MeshConfig(data=2, fsdp=2, tensor=2), devices, batch, 3)
    for one, other in zip(alone, many, strict=False):
        assert other == pytest.approx(one, rel=1e-3)


@pytest.fixture(scope="module")
def ready():
    """Returns (module, random parameters)."""
    module = CONFIG.make()
    abstract = jax.eval_shape(
        lambda: module.init(jax.random.key(0), module.config.batch_spec().empty(), method="touch")
    )
    rng = np.random.default_rng(0)
    return module, jax.tree.map(lambda x: 0.4 * rng.normal(size=x.shape).astype(np.float32), nn.meta.unbox(abstract))


def test_pairs_are_what_each_image_and_text_gives_alone(ready, batch):
    module, params = ready
    image, text, scale, bias = module.apply(params, batch, method="embed_pairs")
    assert image.shape == text.shape == (16, 2, 16) and bias == 0
    assert scale == pytest.approx(float(np.exp(params["params"]["heads"]["log_scale"])))
    pixels = normalise_pixels(batch["images"][:, 0], module.config.vision)
    np.testing.assert_allclose(image[:, 0], module.apply(params, pixels, method="encode_image"), atol=1e-5)
    for row in range(3):
        for number in range(1, 1 + batch["segments"][row].max()):
            ids = batch["tokens"][row][batch["segments"][row] == number]
            alone = module.apply(params, ids[None], method="encode_text")[0]
            np.testing.assert_allclose(text[row, number - 1], alone, atol=1e-5)


def test_a_caption_of_a_patch_is_compared_with_that_patch(ready, batch):
    module, params = ready
    second = (batch["segments"] == 2).any(axis=1)
    assert 0 < second.sum() < 16, "some rows have a second caption, which describes patch 1"
    image = np.asarray(module.apply(params, batch, method="embed_pairs")[0])
    apart = np.abs(image[:, 0] - image[:, 1]).max(axis=1) > 1e-3
    assert apart.tolist() == second.tolist()


def test_the_scale_is_clipped_in_training_by_softmax_only(ready, batch):
    for config, clipped in ((CONFIG, True), (SIGMOID, False)):
        module = config.make()
        params = module.init(jax.random.key(0), module.config.batch_spec().empty(), method="touch")["params"]
        params = nn.meta.unbox(params)
        params["heads"]["log_scale"] = jnp.log(120.0)
        scale = module.apply({"params": params}, batch, method="embed_pairs")[2]
        assert float(scale) == pytest.approx(100 if clipped else 120)


def test_a_new_one_begins_as_its_paper_says():
    for kind, scale, bias in (("softmax", 1 / 0.07, 0), ("sigmoid", 10, -10)):
        module = replace(CONFIG, kind=kind).make()
        out = module.init_with_output(jax.random.key(0), module.config.batch_spec().empty(), method="embed_pairs")[0]
        assert (float(out[2]), float(out[3])) == pytest.approx((scale, bias))


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        (dict(kind="triplet"), "triplet"),
        (dict(pooling="max"), "max"),
        (dict(projection_size=None, text=replace(CONFIG.text, hidden_size=20)), "24 and texts of 20"),
        (dict(vision=change_fields(CONFIG.vision, pooler="none")), "pools nothing"),
    ],
)
def test_what_does_not_fit_is_refused(change, shown):
    with pytest.raises(ConfigError, match=shown):
        replace(CONFIG, **change)


def text_of(width: int, heads: int) -> dict:
    return dict(hidden_size=width, intermediate_size=4 * width, num_attention_heads=heads)


LARGE = dict(hidden_size=1024, intermediate_size=4096, num_attention_heads=16, num_hidden_layers=24, patch_size=14)
SO400M = dict(hidden_size=1152, intermediate_size=4304, num_attention_heads=16, num_hidden_layers=27)
PUBLISHED = {
    "CLIP B/32": (CLIP.from_hf, {}, {}, 512, 151_277_313),
    "CLIP L/14": (CLIP.from_hf, LARGE, text_of(768, 12), 768, 427_616_513),
    "CLIP L/14-336": (CLIP.from_hf, LARGE | dict(image_size=336), text_of(768, 12), 768, 427_944_193),
    "SigLIP B/16-224": (SIGLIP.from_hf, {}, {}, None, 203_155_970),
    "SigLIP so400m/14-384": (SIGLIP.from_hf, SO400M | dict(patch_size=14, image_size=384), SO400M, None, 877_960_498),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_numbers_of_parameters(name):
    read, vision, text, projection, count = PUBLISHED[name]
    config = read(dict(vision_config=vision, text_config=text, projection_dim=projection))
    shapes = jax.eval_shape(config.make().init, jax.random.key(0), *sample(config))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count
