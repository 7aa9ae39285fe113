"""The common parts of the text encoders' Hugging Face folders: their options and their weights' names."""

from __future__ import annotations

from collections.abc import Callable

from mllm_jax.checkpoints.architectures import kind_of
from mllm_jax.checkpoints.config_json import ELSEWHERE, LAYERS, Fields, check_written, read_fields, write_fields
from mllm_jax.checkpoints.config_options import ENCODER_ACTIVATIONS, ConfigOptions
from mllm_jax.checkpoints.fields import make_config
from mllm_jax.checkpoints.table import OUT_OF_HEADS, Table, Weight, into_heads, linear, norm
from mllm_jax.encoders.text_encoder import TextTowerConfig
from mllm_jax.errors import ConfigError

_FIELDS: Fields = LAYERS | {
    "vocab_size": ("vocab_size", "size"),
    "max_length": ("max_position_embeddings", "size"),
    "mlp_size": ("intermediate_size", "size"),
    "activation": ("hidden_act", "activation", ENCODER_ACTIVATIONS),
    "norm_eps": ("layer_norm_eps", "number", ..., 0.0),
    "bos_token_id": ("bos_token_id", "id"),
    "pad_token_id": ("pad_token_id", "id"),
}


def read_tower(values: dict, defaults: dict, what: str, **switches) -> TextTowerConfig:
    """Reads the options that CLIP's and SigLIP's text encoders have in common; refuses those that nothing has read.

    Args:
        defaults: of the options that the file leaves out.
        what: name of the file in messages.
        switches: fields of the config or of its dialect that the family determines.

    Raises:
        ConfigError: an unsupported option, by name.
    """
    options = ConfigOptions(defaults | {name: value for name, value in values.items() if value is not None}, what)
    eos = _one_id(options.ids("eos_token_id"), what)
    config = make_config(TextTowerConfig, **read_fields(options, _FIELDS), eos_token_id=eos, **switches)
    options.skip("projection_size", *ELSEWHERE)
    options.done()
    return config


def _one_id(ids: tuple[int, ...], what: str) -> int | None:
    if len(ids) > 1:
        raise ConfigError(
            f"{what}: eos_token_id={list(ids)}", "one id, at which a text is pooled", "choose one of them"
        )
    return ids[0] if ids else None


def write_tower(c: TextTowerConfig) -> dict:
    """Writes the options of a text encoder, the inverse of `read_tower`."""
    return dict(**kind_of(c.family), eos_token_id=c.eos_token_id, **write_fields(c, _FIELDS))


def faithful(config: TextTowerConfig, written: dict, read: Callable[[dict], TextTowerConfig]) -> dict:
    """Returns `written`, if reading it gives the same text encoder.

    Raises:
        ConfigError: some fields cannot be expressed in the family's options; names them.
    """
    return check_written(config, written, read, "a text encoder")


def tower_table(c: TextTowerConfig, projection: str = "") -> Table:
    """Returns the table of a text encoder's weights under the names of CLIP and SigLIP, which are the same.

    Args:
        projection: name of the projection's kernel, if the family has one.
    """
    layer, head = "text_model.encoder.layers.{layer}", c.hidden_size // c.num_heads
    weights = [
        Weight("text_model.embeddings.token_embedding.weight", "token_embedding/embedding"),
        Weight("text_model.embeddings.position_embedding.weight", "position_embedding"),
        *norm(f"{layer}.layer_norm1", "layers/attention_norm"),
        *into_heads([f"{layer}.self_attn.{x}_proj" for x in "qkv"], "layers/attention", head, (c.hidden_size,) * 3),
        *linear(f"{layer}.self_attn.out_proj", "layers/attention/out", OUT_OF_HEADS, {"h": head}),
        *norm(f"{layer}.layer_norm2", "layers/mlp_norm"),
        *linear(f"{layer}.mlp.fc1", "layers/mlp/up"),
        *linear(f"{layer}.mlp.fc2", "layers/mlp/down"),
        *norm("text_model.final_layer_norm", "final_norm"),
    ]
    if c.dialect.head_size is not None:
        weights += linear("text_model.head", "head")
    if projection:
        weights += linear(projection, "projection", bias=False)
    # transformers 5 saves a text encoder alone without a prefix; older folders contain position_ids.
    spellings = ((r"^(embeddings|encoder|final_layer_norm|head)\.", r"text_model.\1."),)
    return Table(tuple(weights), spellings, ("text_model.embeddings.position_ids",))
