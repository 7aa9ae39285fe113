"""SigLIP's text encoder (arXiv 2303.15343): every token sees all 64 positions; the last one represents the text."""

from __future__ import annotations

from mllm_jax.checkpoints.config_options import ConfigOptions, named_as
from mllm_jax.checkpoints.table import Table, families, token_sample
from mllm_jax.encoders.text_encoder import TextTowerConfig
from mllm_jax.encoders.text_hub import faithful, read_tower, tower_table, write_tower
from mllm_jax.errors import ConfigError

MODEL = "SiglipTextModel"
# Defaults of the options that config.json leaves out.
_DEFAULTS = dict(
    vocab_size=32000,
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    max_position_embeddings=64,
    hidden_act="gelu_pytorch_tanh",
    layer_norm_eps=1e-6,
)
_IDS = dict(pad_token_id=1, bos_token_id=49406, eos_token_id=49407)


def from_hf_config(values: dict) -> TextTowerConfig:
    """Reads config.json of SiglipTextModel, or the text_config of SiglipModel; refuses unknown options by name."""
    family = (*named_as(values)[0], MODEL)[0]
    if family != MODEL:
        raise ConfigError(f"architecture {family!r} as SigLIP's text encoder", MODEL, "name it")
    sizes = ConfigOptions(values, f"config.json of {family}")
    width = sizes.size("projection_size", sizes.size("hidden_size", _DEFAULTS["hidden_size"]))
    values = {name: value for name, value in _IDS.items() if name not in values} | values
    return read_tower(values, _DEFAULTS, f"config.json of {family}", pooling="last", head_size=width, family=family)


def to_hf_config(config: TextTowerConfig) -> dict:
    """Returns config.json, the inverse of `from_hf_config`; refuses switches that the family does not have."""
    return faithful(config, write_tower(config) | dict(projection_size=config.dialect.head_size), from_hf_config)


def table(config: TextTowerConfig) -> Table:
    return tower_table(config)


FAMILIES = families(
    {MODEL: "SigLIP text"}, from_hf=from_hf_config, to_hf=to_hf_config, table=table, sample=token_sample
)
