"""Values that a composition sets in its parts: the computation, and open sizes."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from mllm_jax import Branch, Compute, ConfigError, DecoderConfig, MLPProjectorConfig, MultimodalConfig, ViTConfig
from mllm_jax.checkpoints.description import describe, rebuild
from mllm_jax.checkpoints.fields import change_fields
from mllm_jax.encoders.qwen_vit import QwenViTConfig
from mllm_jax.encoders.sam import SamConfig
from mllm_jax.encoders.siglip_sam import SiglipSamConfig
from mllm_jax.encoders.text_encoder import TextTowerConfig
from mllm_jax.models.blip2_stage1 import QFormerPretrainingConfig
from mllm_jax.models.clip import DualEncoderConfig
from mllm_jax.models.part_names import part_differences
from mllm_jax.models.pformer_pretraining import PFormerPretrainingConfig
from mllm_jax.models.prompt_guided import PromptGuidedConfig
from mllm_jax.projectors.paired import PairedProjectorConfig
from mllm_jax.projectors.pformer import PFormerConfig
from mllm_jax.projectors.qformer import QFormerConfig
from mllm_jax.projectors.resampler import ResamplerConfig

VIT = ViTConfig(image_size=8, patch_size=4, hidden_size=8, num_layers=1, num_heads=2, mlp_size=8)
LLM = DecoderConfig(vocab_size=20, hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, mlp_size=16)
PROMPTER = PFormerConfig(hidden_size=8, num_layers=1, num_heads=2, mlp_size=8, num_queries=4, max_length=8)
QFORMER = QFormerConfig(hidden_size=8, num_layers=1, num_heads=2, mlp_size=8, num_queries=4, vocab_size=20)


MLP = MLPProjectorConfig()


def composed(projector=MLP, encoder=VIT, llm=LLM, **more):
    return MultimodalConfig({"image": Branch(encoder, projector)}, llm, **more)


BF16 = Compute(dtype="bfloat16", remat="full")
COMPOSITIONS = {
    "multimodal": composed(compute=BF16),
    "prompt-guided": PromptGuidedConfig(composed(), PROMPTER, compute=BF16),
    "p-former": PFormerPretrainingConfig(PROMPTER, LLM, compute=BF16),
    "q-former": QFormerPretrainingConfig(VIT, QFORMER, compute=BF16),
    "dual": DualEncoderConfig(VIT, TextTowerConfig(vocab_size=20), compute=BF16),
}


@pytest.mark.parametrize("model", COMPOSITIONS.values(), ids=COMPOSITIONS)
def test_what_a_composition_says_holds_for_parts_that_say_nothing(model):
    assert {(part.dtype, part.remat, part.scan_unroll) for part in model.parts.values()} == {("bfloat16", "full", 1)}
    assert rebuild(describe(model)) == model


def test_a_part_that_says_otherwise_wins_and_stores_nothing_else():
    model = composed(compute=BF16, llm=replace(LLM, compute=Compute(remat="dots")))
    assert model.parts["llm"].compute == Compute("bfloat16", "dots") and model.llm.compute == Compute(remat="dots")
    assert model.dtype == "bfloat16" and model.with_dtype("float32").parts["llm"].compute == Compute("float32", "dots")
    everywhere = replace(model, llm=replace(LLM, compute=Compute(dtype="float32"))).with_dtype("bfloat16")
    assert {part.dtype for part in everywhere.parts.values()} == {"bfloat16"}


def test_a_composed_module_computes_so():
    module = composed(compute=Compute(dtype="bfloat16")).make()
    batch = module.config.batch_spec().empty()

    def read():
        params = module.init(jax.random.key(0), batch)
        return module.apply(params, batch, method="encode_media").tokens, module.apply(
            params, batch, method="head_inputs"
        ).x

    media, text = jax.eval_shape(read)
    assert media.dtype == text.dtype == jnp.bfloat16


def test_parts_of_one_name_are_one_part_however_they_are_computed():
    model = composed(compute=BF16)
    assert not part_differences(model.parts["encoder_image"], VIT)
    assert part_differences(model.parts["encoder_image"], replace(VIT, patch_size=2, compute=BF16)) == [
        "patch_size: 4 -> 2"
    ]


SAM = SiglipSamConfig(
    change_fields(VIT, pooler="none"),
    SamConfig(image_size=16, patch_size=4, hidden_size=8, num_layers=1, num_heads=2, mlp_size=8, global_layers=(0,)),
    (4, 6),
)
WIDE = {
    "mlp": (MLPProjectorConfig(), VIT),
    "q-former": (replace(QFORMER, vocab_size=None), VIT),
    "resampler": (ResamplerConfig(num_queries=4, head_dim=8), VIT),
    "paired": (PairedProjectorConfig(), SAM),
    "packed": (None, QwenViTConfig(4, hidden_size=8, num_layers=1, num_heads=2, mlp_size=16)),
}


@pytest.mark.parametrize("projector,encoder", WIDE.values(), ids=WIDE)
def test_the_llm_decides_the_width_of_what_it_reads(projector, encoder):
    for width in (16, 32):
        model = composed(projector, encoder, replace(LLM, hidden_size=width))
        last = model.image.projector or model.image.encoder
        assert last.output_size == width and rebuild(describe(model)) == model
        assert (model.inputs["image"].projector or model.inputs["image"].encoder).output_size is None


def test_the_encoder_decides_what_its_projector_reads():
    assert composed(QFORMER).image.projector.feature_size == 8
    regions = replace(VIT, regions=1, region_size=24)
    assert composed(QFORMER, regions).image.projector.feature_size == 24
    assert composed(PairedProjectorConfig(), SAM).image.projector.widths == SAM.widths
    assert QFormerPretrainingConfig(regions, QFORMER).parts["projector_image"].feature_size == 24


def test_the_llm_decides_what_a_prompter_is():
    for model in (COMPOSITIONS["prompt-guided"], COMPOSITIONS["p-former"]):
        assert (model.parts["prompter"].output_size, model.parts["prompter"].vocab_size) == (16, 20)


def test_sizes_that_clash_are_refused_as_before():
    with pytest.raises(ConfigError, match="projector.output_size 12"):
        composed(MLPProjectorConfig(12))
    with pytest.raises(ConfigError, match="encoder.output_size 12"):
        composed(None, replace(WIDE["packed"][1], output_size=12))
    with pytest.raises(ConfigError, match="prompter.output_size 12"):
        PFormerPretrainingConfig(replace(PROMPTER, output_size=12), LLM)
    with pytest.raises(ConfigError, match="width 20 in heads of 8"):
        composed(ResamplerConfig(num_queries=4, head_dim=8), llm=replace(LLM, hidden_size=20))


@pytest.mark.parametrize(
    "part",
    [
        MLPProjectorConfig(),
        PairedProjectorConfig(),
        ResamplerConfig(),
        PROMPTER,
        TextTowerConfig(),
        WIDE["packed"][1],
        DualEncoderConfig(),
        DualEncoderConfig(VIT),
        PromptGuidedConfig(),
    ],
    ids=lambda part: type(part).__name__,
)
def test_a_part_by_itself_needs_its_sizes(part):
    with pytest.raises(ConfigError, match="None, of a part by itself"):
        part.make()
