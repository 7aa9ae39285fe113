"""The first Qwen-VL's vision encoder against numbers from its own code, see tests/goldens/qwenvl_v1_visual.json."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from einops import rearrange
from safetensors.numpy import save_file

from mllm_jax.checkpoints.hf import hub_tensors, read_weights
from mllm_jax.layers.interpolation import bicubic_grid
from mllm_jax.layers.sincos import sincos_positions
from mllm_jax.models.qwen_vl_v1 import FAMILIES, read_tower, tower_table
from mllm_jax.models.registry import abstract_params
from mllm_jax.projectors.resampler import ResamplerLayer

GOLDEN = Path(__file__).parents[1] / "goldens" / "qwenvl_v1_visual"


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN.with_suffix(".npz")) as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def weights(golden):
    return {name.removeprefix("weights/"): array for name, array in golden.items() if name.startswith("weights/")}


@pytest.fixture(scope="module")
def config():
    """Returns the config of the recording, with sizes made small that the reference has fixed: positions and heads."""
    values = json.loads(GOLDEN.with_suffix(".json").read_text("utf-8"))["config"]
    positions, head_dim = values.pop("pos_grid") ** 2, values.pop("resampler_head_dim")
    read = read_tower({"visual": values | {"output_dim": 128}})
    projector = replace(read.projector, output_size=values["output_dim"], head_dim=head_dim)
    return replace(read, encoder=replace(read.encoder, num_positions=positions), projector=projector)


@pytest.fixture(scope="module", params=["", "transformer.visual."], ids=["alone", "in a whole model"])
def params(request, weights, config, tmp_path_factory):
    folder, prefix = tmp_path_factory.mktemp("qwen"), request.param
    stored = {prefix + name: np.ascontiguousarray(array) for name, array in weights.items()}
    if prefix:
        language = (
            "transformer.wte.weight",
            "transformer.h.0.ln_1.weight",
            "transformer.ln_f.weight",
            "lm_head.weight",
        )
        stored |= {name: np.ones(3, np.float32) for name in language}
    save_file(stored, folder / "model.safetensors")
    return read_weights(folder, tower_table(config), abstract_params(config, FAMILIES[0]))


def test_every_stage(params, config, golden, assert_close):
    pixels = rearrange(golden["inputs/pixel_values"], "b c h w -> b h w c")

    @jax.jit
    def run(params):
        return config.make().apply(
            {"params": params}, pixels, output_hidden_states=True, capture_intermediates=True, mutable="intermediates"
        )

    out, kept = run(params)
    assert len(out.hidden_states) == 4
    for layer, name in enumerate(("ln_pre", "block0", "block1", "block2")):
        assert_close(out.hidden_states[layer], golden[f"outputs/{name}"], 1e-5, name)
    assert_close(out.last_hidden_state, golden["outputs/block2"], 1e-5)
    normed = kept["intermediates"]["projector_image"]["output_norm"]["__call__"][0]
    assert_close(normed, golden["outputs/ln_post"], 1e-5, "post norm")
    assert_close(out.pooler_output, golden["outputs/output"], 1e-5, "media tokens")


def test_every_stage_of_the_resampler(params, config, golden, assert_close):
    """Checks its one layer alone: a scan hides its intermediate values."""
    own = params["projector_image"]
    positions = own["positions"]
    features = golden["outputs/block2"] @ own["kv_projection"]["kernel"]
    queries = np.broadcast_to(own["query"], (2, 9, 64))
    layer = jax.tree.map(lambda x: x[0], own["layers"])
    places = positions, bicubic_grid(positions, 4, 4)

    @jax.jit
    def run(layer):
        module = ResamplerLayer(config.projector)
        return module.apply(
            {"params": layer}, queries, None, features, *places, capture_intermediates=True, mutable="intermediates"
        )

    (found, _), kept = run(layer)
    kept = {name: value["__call__"][0] for name, value in kept["intermediates"].items() if name != "__call__"}
    assert_close(kept["query_norm"] + positions, golden["outputs/resampler_q_in"], 1e-5, "queries")
    assert_close(kept["kv_norm"], golden["outputs/resampler_v_in"], 1e-5, "values")
    assert_close(kept["kv_norm"] + places[1], golden["outputs/resampler_k_in"], 1e-5, "keys")
    assert_close(found, golden["outputs/attn_pool"], 1e-5, "resampler")


def test_the_names_are_written_as_they_were_read(params, config, weights):
    written = {name: get() for name, get in hub_tensors(tower_table(config), params).items()}
    assert written.keys() == weights.keys()
    for name, array in weights.items():
        np.testing.assert_array_equal(written[name], array, err_msg=name)


def test_fixed_positions(golden, assert_close):
    assert_close(sincos_positions(3, 64), golden["weights/attn_pool.pos_embed"], 1e-6)


@pytest.mark.parametrize("grid", [(4, 4), (2, 7), (5, 5), (9, 3)])
def test_positions_are_stretched_as_torch_does(grid, assert_close):
    positions = np.random.default_rng(0).normal(size=(25, 6)).astype(np.float32)
    image = torch.tensor(rearrange(positions, "(r c) e -> 1 e r c", r=5))
    theirs = torch.nn.functional.interpolate(image, size=grid, mode="bicubic", align_corners=False)
    assert_close(bicubic_grid(positions, *grid), rearrange(theirs.numpy(), "1 e h w -> (h w) e"), 1e-5)
