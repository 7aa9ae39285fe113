"""Fields of a part's config by name, at its top level or in its dialect."""

from dataclasses import fields, replace

import pytest
import tyro

from mllm_jax.checkpoints.config_json import check_written
from mllm_jax.checkpoints.description import describe, rebuild
from mllm_jax.checkpoints.fields import change_fields, field_path, field_value, field_values, make_config
from mllm_jax.encoders.nfnet import NFNetConfig
from mllm_jax.encoders.qwen_vit import QwenViTConfig
from mllm_jax.encoders.sam import SamConfig
from mllm_jax.encoders.text_encoder import TextTowerConfig
from mllm_jax.encoders.vit import ViTConfig, ViTDialect
from mllm_jax.errors import ConfigError
from mllm_jax.llms.chatglm import ChatGLMConfig
from mllm_jax.llms.decoder import DecoderConfig, DecoderDialect
from mllm_jax.llms.t5 import T5Config
from mllm_jax.projectors.resampler import ResamplerConfig

PARTS = (
    DecoderConfig(vocab_size=8),
    NFNetConfig(),
    QwenViTConfig(),
    ResamplerConfig(output_size=8, head_dim=4),
    SamConfig(),
    T5Config(),
    TextTowerConfig(),
    ViTConfig(),
)


@pytest.mark.parametrize("part", PARTS, ids=lambda part: type(part).__name__)
def test_a_part_has_few_fields_at_its_top_and_each_name_once(part):
    own, inner = ({field.name for field in fields(config)} for config in (part, part.dialect))
    assert len(own) <= 17 and len(inner) >= 5 and not own & inner
    assert {*field_values(part)} == own - {"dialect"} | inner
    assert make_config(type(part), **field_values(part)) == part
    assert rebuild(describe(part)) == part


def test_fields_are_set_and_changed_by_name():
    config = make_config(DecoderConfig, vocab_size=8, gated=False, qk_norm=True)
    assert config == DecoderConfig(vocab_size=8, qk_norm=True, dialect=DecoderDialect(gated=False))
    changed = change_fields(config, norm="layer", hidden_size=16)
    assert changed == replace(config, hidden_size=16, dialect=replace(config.dialect, norm="layer"))
    given = change_fields(config, dialect=DecoderDialect(out_bias=True), norm="layer").dialect
    assert given == DecoderDialect(out_bias=True, norm="layer")
    assert make_config(ChatGLMConfig, num_layers=2) == ChatGLMConfig(num_layers=2), "a config without a dialect"


def test_a_name_that_no_field_has_is_refused():
    for attempt in (
        lambda: make_config(DecoderConfig, vocab_size=8, depth=3),
        lambda: change_fields(DecoderConfig(vocab_size=8), depth=3),
        lambda: change_fields(ChatGLMConfig(), gated=False),
    ):
        with pytest.raises(TypeError, match="depth|gated"):
            attempt()


def test_fields_are_found_wherever_they_are():
    config = ViTConfig(image_size=32, dialect=ViTDialect(norm="rms"))
    assert (field_path(config, "image_size"), field_path(config, "norm")) == ("image_size", "dialect.norm")
    assert (field_value(config, "image_size"), field_value(config, "norm")) == (32, "rms")
    assert field_value(config, "depth") is None and field_value(None, "norm", 3) == 3


def test_refusals_name_a_field_by_its_path():
    with pytest.raises(ConfigError, match=r"dialect\.norm 'batch'(.|\n)*change dialect\.norm"):
        ViTConfig(dialect=ViTDialect(norm="batch"))
    config = ViTConfig(num_layers=2, dialect=ViTDialect(norm="rms"))
    with pytest.raises(ConfigError, match=r"a ViT with num_layers=2, dialect\.norm='rms', to be written as ViTModel"):
        check_written(config, {}, lambda written: ViTConfig(), "a ViT")


def test_the_command_line_sets_fields_of_a_dialect():
    read = tyro.cli(DecoderConfig, args=["--vocab-size", "8", "--dialect.no-gated", "--dialect.norm", "layer"])
    assert read == DecoderConfig(vocab_size=8, dialect=DecoderDialect(gated=False, norm="layer"))
