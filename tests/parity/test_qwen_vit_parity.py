"""Qwen's vision encoders against transformers: hidden states, media tokens, deepstack features, gradients, names."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
import torch
import transformers
from flax import linen as nn
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel
from transformers.vision_utils import get_vision_window_index

import mllm_jax
from mllm_jax.checkpoints.hf import hub_tensors, read_weights
from mllm_jax.checkpoints.layout import lay_out, named, parameter_view
from mllm_jax.checkpoints.leaves import flatten
from mllm_jax.encoders.qwen_patches import lay_out_patches
from mllm_jax.encoders.qwen_vit import FAMILIES, from_hf_config, table
from mllm_jax.models.registry import abstract_params

QWEN2 = (Qwen2VLVisionConfig, Qwen2VisionTransformerPretrainedModel)
QWEN25 = (Qwen2_5_VLVisionConfig, Qwen2_5_VisionTransformerPretrainedModel)
QWEN3 = (Qwen3VLVisionConfig, Qwen3VLVisionModel)
_WIDTHS = dict(hidden_size=32, intermediate_size=44, out_hidden_size=20)
# fmt: off
CASES = {
    "2": (QWEN2, dict(depth=3, embed_dim=32, num_heads=4, mlp_ratio=2, hidden_size=20, patch_size=4)),
    "2-merge3-grey-still": (QWEN2, dict(
        depth=2, embed_dim=24, num_heads=2, mlp_ratio=3, hidden_size=16, patch_size=3, spatial_merge_size=3,
        temporal_patch_size=1, in_channels=1, hidden_act="gelu")),
    "2-unmerged-theta": (QWEN2, dict(
        depth=2, embed_dim=40, num_heads=2, mlp_ratio=2, hidden_size=20, patch_size=2, spatial_merge_size=1,
        temporal_patch_size=3, hidden_act="silu", rope_parameters=dict(rope_type="axial", rope_theta=50.0))),
    "2.5": (QWEN25, dict(
        **_WIDTHS, depth=3, num_heads=4, patch_size=4, window_size=16, fullatt_block_indexes=[1])),
    "2.5-odd-windows": (QWEN25, dict(
        **_WIDTHS, depth=3, num_heads=2, patch_size=4, window_size=30, fullatt_block_indexes=[0, 2], in_channels=1)),
    "2.5-windows-only": (QWEN25, dict(
        **_WIDTHS, depth=2, num_heads=2, patch_size=5, window_size=12, spatial_merge_size=1, temporal_patch_size=1,
        hidden_act="gelu", tokens_per_second=2, rope_parameters=dict(rope_type="axial", rope_theta=50.0))),
    "3": (QWEN3, dict(
        **_WIDTHS, depth=3, num_heads=4, patch_size=4, num_position_embeddings=16, deepstack_visual_indexes=[0, 2])),
    "3-no-deepstack": (QWEN3, dict(
        **_WIDTHS, depth=2, num_heads=2, patch_size=3, num_position_embeddings=49, deepstack_visual_indexes=[],
        spatial_merge_size=3, hidden_act="gelu")),
    "3-still": (QWEN3, dict(
        **_WIDTHS, depth=3, num_heads=2, patch_size=4, num_position_embeddings=25, deepstack_visual_indexes=[1],
        temporal_patch_size=1, rope_parameters=dict(rope_type="axial", rope_theta=50.0))),
}
# fmt: on
# Time, height and width of images and videos in media tokens: two images, a video beside an image, nothing, and a
# full row. Only the smallest is square.
ROWS = ([(1, 2, 5), (1, 1, 1)], [(2, 3, 2), (1, 1, 3)], [], [(1, 5, 3)])
TOKENS = 15


class Case:
    """A random reference encoder, ours from its folder, and the outputs of both for ROWS."""

    def __init__(self, reference, folder):
        self.reference, self.folder = reference, folder
        reference.save_pretrained(folder)
        self.module, self.params = mllm_jax.from_pretrained(folder)
        c = self.config = self.module.config
        rows = [[(t, h * c.merge_size, w * c.merge_size) for t, h, w in row] for row in ROWS]
        self.layout = c.lay_out(rows, TOKENS * c.merge_unit)
        self.grids = torch.tensor([grid for row in rows for grid in row])
        self.flat = np.random.default_rng(0).normal(size=(int(self.grids.prod(1).sum()), c.patch_values))
        self.flat = self.flat.astype(np.float32)
        self.inputs = (self.layout.gather(self.flat), *self.layout[1:])
        self.order = np.arange(len(self.flat))
        if c.window_size is not None:
            # The reference sorts media tokens by window before its first layer, and merged tokens back after its last.
            index, _ = get_vision_window_index(self.grids, c.merge_size, c.window_size, c.patch_size)
            units = self.order.reshape(-1, c.merge_unit)
            self.order = np.argsort(units[index.numpy()].reshape(-1))

    def taken(self, ours, merged: bool = False) -> np.ndarray:
        """Returns our [B, N or M, E] without padding, in the reference's order of patches or media tokens."""
        return np.asarray(ours)[self.layout.source[:, :: self.config.merge_unit if merged else 1] >= 0]


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """Returns the cases by name, each made once."""
    made: dict[str, Case] = {}

    def get(name: str, randomise) -> Case:
        if name not in made:
            (config, model), options = CASES[name]
            reference = randomise(model(config(**options, attn_implementation="eager")))
            made[name] = Case(reference, tmp_path_factory.mktemp("qwen"))
        return made[name]

    return get


@pytest.mark.parametrize("name", CASES)
def test_every_output(name, cases, randomise, assert_close):
    case = cases(name, randomise)
    with torch.no_grad():
        theirs = case.reference(torch.tensor(case.flat), case.grids, output_hidden_states=True)
    apply = jax.jit(case.module.apply, static_argnames="output_hidden_states")
    ours = apply({"params": case.params}, *case.inputs, output_hidden_states=True)
    assert len(ours.hidden_states) == len(theirs.hidden_states) == case.config.num_layers + 1
    for layer, (a, b) in enumerate(zip(ours.hidden_states, theirs.hidden_states, strict=True)):
        assert_close(case.taken(a), b[case.order], 1e-5, f"hidden state {layer}")
    assert_close(case.taken(ours.last_hidden_state), theirs.last_hidden_state[case.order], 1e-5, "last")
    assert_close(case.taken(ours.pooler_output, merged=True), theirs.pooler_output, 1e-5, "media tokens")
    wanted = getattr(theirs, "deepstack_features", [])
    assert len(wanted) == len(CASES[name][1].get("deepstack_visual_indexes", []))
    for i, (a, b) in enumerate(zip(ours.deepstack_features, wanted, strict=True)):
        assert_close(case.taken(a, merged=True), b, 1e-5, f"deepstack {i}")


@pytest.mark.parametrize("name", ["2", "2.5", "3"])
def test_the_epsilon_of_every_norm(name, randomise, assert_close, tmp_path):
    """Checks a stream so small that epsilon is a part of every norm's divisor."""
    (config, model), options = CASES[name]
    reference = randomise(model(config(**options, attn_implementation="eager")))
    with torch.no_grad():
        for hub, parameter in reference.named_parameters():
            if hub.startswith(("patch_embed", "pos_embed")) or any(
                part in hub for part in ("attn.proj", "fc2", "down_proj")
            ):
                parameter.mul_(1e-3)
    case = Case(reference, tmp_path)
    with torch.no_grad():
        theirs = reference(torch.tensor(case.flat), case.grids)
    assert theirs.last_hidden_state.square().mean() < 1e-4
    ours = jax.jit(case.module.apply)({"params": case.params}, *case.inputs)
    assert_close(case.taken(ours.last_hidden_state), theirs.last_hidden_state[case.order], 1e-5, "last")
    assert_close(case.taken(ours.pooler_output, merged=True), theirs.pooler_output, 1e-5, "media tokens")
    for a, b in zip(ours.deepstack_features, getattr(theirs, "deepstack_features", []), strict=True):
        assert_close(case.taken(a, merged=True), b, 1e-5, "deepstack")


@pytest.mark.parametrize("name", ["2", "2.5", "3"])
def test_gradients(name, cases, randomise, assert_close):
    """Checks gradients of a random weighting of all inputs of the LLM."""
    case = cases(name, randomise)
    rng, merged = np.random.default_rng(1), case.layout.source[:, :: case.config.merge_unit]
    depth = 1 + len(case.config.dialect.deepstack_layers)
    weights = rng.normal(size=(depth, *merged.shape, case.config.output_size)).astype(np.float32)
    theirs = case.reference(torch.tensor(case.flat), case.grids)
    read = [theirs.pooler_output, *getattr(theirs, "deepstack_features", [])]
    case.reference.zero_grad()
    sum((out * torch.tensor(w[merged >= 0])).sum() for out, w in zip(read, weights, strict=True)).backward()
    wanted = {name: parameter.grad.numpy() for name, parameter in case.reference.named_parameters()}

    def loss(params):
        out = case.module.apply({"params": params}, *case.inputs)
        read = [out.pooler_output, *out.deepstack_features]
        return sum((a * w * (merged >= 0)[..., None]).sum() for a, w in zip(read, weights, strict=True))

    ours, checked = flatten_dict(jax.jit(jax.grad(loss))(case.params), sep="/"), set()
    for line in table(case.config).weights:
        grad = np.asarray(ours[line.path])
        for layer in range(len(grad) if "{layer}" in line.name else 1):
            hub = named(line.name, layer)
            a = grad[layer] if "{layer}" in line.name else grad
            assert_close(a, parameter_view(line, wanted[hub]), 1e-4, f"{hub}, {line.path}")
            checked.add(hub)
    assert checked == set(wanted)


@pytest.mark.parametrize("name", CASES)
def test_what_we_write_the_reference_opens(name, cases, randomise, tmp_path):
    case = cases(name, randomise)
    mllm_jax.save_pretrained(case.module, case.params, tmp_path / "ours")
    again, info = type(case.reference).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    kept, found = case.reference.state_dict(), again.state_dict()
    assert kept.keys() == found.keys() and all(torch.equal(kept[name], found[name]) for name in kept)
    neutral = ("transformers_version", "_name_or_path", "dtype", "architectures")
    theirs, ours = (
        {k: v for k, v in config.to_dict().items() if k not in neutral}
        for config in (case.reference.config, again.config)
    )
    assert json.loads(json.dumps(theirs)) == json.loads(json.dumps(ours))


def test_the_layout_is_the_processors():
    """Checks that each patch of the processor is the piece of the image at its coordinates."""
    rng, shapes = np.random.default_rng(0), ((56, 84), (112, 28))
    images = [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]
    options = dict(do_resize=False, do_rescale=False, do_normalize=False, patch_size=14, merge_size=2)
    made = Qwen2VLImageProcessorPil(**options)(images, return_tensors="np")
    layout = lay_out_patches([made["image_grid_thw"].tolist()], 48)
    patches = layout.gather(made["pixel_values"]).reshape(1, 48, 3, 2, 14, 14)
    for i in range(40):
        row, column = 14 * layout.coordinates[0, i]
        piece = images[layout.segments[0, i] - 1][row : row + 14, column : column + 14]
        for frame in range(2):
            np.testing.assert_array_equal(patches[0, i, :, frame], piece.transpose(2, 0, 1))
    assert not patches[0, 40:].any()


WHOLE = {
    "2": (transformers.Qwen2VLConfig, transformers.Qwen2VLForConditionalGeneration),
    "2.5": (transformers.Qwen2_5_VLConfig, transformers.Qwen2_5_VLForConditionalGeneration),
    "3": (transformers.Qwen3VLConfig, transformers.Qwen3VLForConditionalGeneration),
}


@pytest.mark.parametrize("spelling", ["as saved", "visual.", "model.visual."])
@pytest.mark.parametrize("name", WHOLE)
def test_an_encoder_from_a_whole_model(name, spelling, randomise, tmp_path):
    """Checks both spellings of its names: those of the hub's files, and those of a new save and the model in memory."""
    rope = dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 2, 2])
    text = dict(hidden_size=20, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    text |= dict(vocab_size=9, head_dim=10, rope_parameters=rope, bos_token_id=1, eos_token_id=2)
    config, model = WHOLE[name]
    whole = randomise(model(config(vision_config=CASES[name][1], text_config=text)))
    whole.save_pretrained(tmp_path)
    if spelling != "as saved":
        stored = load_file(tmp_path / "model.safetensors")
        llm = "model.language_model." if spelling == "model.visual." else "model."
        renamed = {}
        for key, array in stored.items():
            key = key.removeprefix("model.").removeprefix("language_model.")
            key = spelling + key.removeprefix("visual.") if key.startswith("visual.") else key
            renamed[key if key.startswith(("model.", "visual.", "lm_head.")) else llm + key] = array
        assert any(key.startswith(spelling) for key in renamed) and any(key.startswith(llm) for key in renamed)
        save_file(renamed, tmp_path / "model.safetensors")
    tower = from_hf_config(json.loads((tmp_path / "config.json").read_text("utf-8")))
    family = next(family for family in FAMILIES if tower.family in family.architectures)
    assert tower.family == type(whole.model.visual).__name__
    params = read_weights(tmp_path, table(tower), abstract_params(tower, family))
    ours = {hub: get() for hub, get in hub_tensors(table(tower), params).items()}
    theirs = whole.model.visual.state_dict()
    assert ours.keys() == theirs.keys()
    for hub, array in ours.items():
        np.testing.assert_array_equal(array, theirs[hub].numpy(), err_msg=hub)


# Of transformers' default encoders, on torch's meta device; 2 and 2.5 with the hub's widths are those of the 7B models.
@pytest.mark.parametrize(
    "kind,options,count",
    [
        (QWEN2, {}, 675_759_104),
        (QWEN25, dict(hidden_size=1280), 676_550_144),
        (QWEN3, {}, 566_949_104),
    ],
)
def test_full_size_parameter_counts(kind, options, count):
    config, model = kind
    with torch.device("meta"):
        reference = model(config(**options))
    assert sum(parameter.numel() for parameter in reference.parameters()) == count
    c = from_hf_config(reference.config.to_dict() | {"architectures": [model.__name__]})
    family = next(family for family in FAMILIES if c.family in family.architectures)
    abstract = abstract_params(c, family)
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract)) == count
    shapes = {name: tuple(tensor.shape) for name, tensor in reference.named_parameters()}
    leaves = flatten(nn.meta.unbox(abstract))[0]
    layouts = lay_out(table(c), {path: leaf.shape for path, leaf in leaves.items()})
    assert {name: layout.shape for layout in layouts for name in layout.names()} == shapes
