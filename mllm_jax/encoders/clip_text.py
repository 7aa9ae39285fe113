"""CLIP's text encoder (arXiv 2103.00020, section 2.4): causal, pooled at the end of the text."""

from __future__ import annotations

from mllm_jax.checkpoints.config_options import ConfigOptions, named_as
from mllm_jax.checkpoints.table import Table, families, token_sample
from mllm_jax.encoders.text_encoder import TextTowerConfig
from mllm_jax.encoders.text_hub import faithful, read_tower, tower_table, write_tower
from mllm_jax.errors import ConfigError

MODEL, WITH_PROJECTION = "CLIPTextModel", "CLIPTextModelWithProjection"
# Defaults of the options that config.json leaves out.
_DEFAULTS = dict(
    vocab_size=49408,
    hidden_size=512,
    intermediate_size=2048,
    num_hidden_layers=12,
    num_attention_heads=8,
    max_position_embeddings=77,
    hidden_act="quick_gelu",
    layer_norm_eps=1e-5,
    eos_token_id=49407,
)
_IDS = dict(pad_token_id=1, bos_token_id=49406, eos_token_id=49407)


def from_hf_config(values: dict) -> TextTowerConfig:
    """Reads config.json of CLIPTextModel or CLIPTextModelWithProjection, or the text_config of CLIPModel.

    Every option is honoured or refused by name.
    """
    family = (*named_as(values)[0], MODEL)[0]
    if family not in (MODEL, WITH_PROJECTION):
        raise ConfigError(
            f"architecture {family!r} as CLIP's text encoder", f"{MODEL} or {WITH_PROJECTION}", "name one"
        )
    values = {name: value for name, value in _IDS.items() if name not in values} | values
    # Folders from before mid-2023 have a wrong end of text, 2; their texts are pooled at the largest id.
    eos = _DEFAULTS["eos_token_id"] if values["eos_token_id"] is None else values["eos_token_id"]
    return read_tower(
        values,
        _DEFAULTS,
        f"config.json of {family}",
        mask="causal",
        pooling="largest" if eos == 2 else "eos",
        projection_size=ConfigOptions(values, family).size("projection_dim", 512)
        if family == WITH_PROJECTION
        else None,
        family=family,
    )


def to_hf_config(config: TextTowerConfig) -> dict:
    """Returns config.json, the inverse of `from_hf_config`; refuses switches that the family does not have."""
    c = config
    projection = {} if c.dialect.projection_size is None else dict(projection_dim=c.dialect.projection_size)
    return faithful(c, write_tower(c) | projection, from_hf_config)


def table(config: TextTowerConfig) -> Table:
    return tower_table(config, "" if config.dialect.projection_size is None else "text_projection")


FAMILIES = families(
    {MODEL: "CLIP text", WITH_PROJECTION: "CLIP text with projection"},
    from_hf=from_hf_config,
    to_hf=to_hf_config,
    table=table,
    sample=token_sample,
)
