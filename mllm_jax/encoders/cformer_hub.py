"""The C-Former's folders, for which there is no class of transformers.

The architecture is ours. The options and the names of the tensors are those of its authors' code: `CifMiddleware` of
CIF-PyTorch, and X-LLM's speech interface with its BERT.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mllm_jax.checkpoints.architectures import architecture, kind_of
from mllm_jax.checkpoints.config_json import LAYERS, Fields, check_written, read_fields, write_fields
from mllm_jax.checkpoints.config_options import ENCODER_ACTIVATIONS, ConfigOptions
from mllm_jax.checkpoints.table import OUT_OF_HEADS, Family, Table, Weight, into_heads, linear, norm
from mllm_jax.encoders.cformer import WEIGHTS, CFormerConfig

ARCHITECTURE = "CFormer"
_CIF: Fields = {
    "input_size": ("encoder_embed_dim", "size"),
    "cif_size": ("cif_embedding_dim", "size"),
    "weights": ("produce_weight_type", "text"),
    "conv_width": ("conv_cif_width", "size", CFormerConfig.conv_width),
    "threshold": ("cif_threshold", "number", CFormerConfig.threshold),
    "tail_threshold": ("tail_handling_firing_threshold", "number", CFormerConfig.tail_threshold),
    "scale": ("apply_scaling", "flag", True),
    "fire_tail": ("apply_tail_handling", "flag", True),
    "output_size": ("llm_hidden_size", "size"),
    "max_fires": ("max_fires", "size", None),
}
_BERT: Fields = LAYERS | {
    "mlp_size": ("intermediate_size", "size"),
    "activation": ("hidden_act", "activation", ENCODER_ACTIVATIONS, "gelu"),
    "norm_eps": ("layer_norm_eps", "number", 1e-12, 0.0),
    "max_length": ("max_position_embeddings", "size"),
    "num_types": ("type_vocab_size", "size", 2),
}


def from_hf_config(values: dict) -> CFormerConfig:
    """Reads config.json: the options of `CifMiddleware`, `llm_hidden_size`, and BERT's as `bert_config`.

    Raises:
        ConfigError: an option is absent or not supported.
    """
    architecture(values, ARCHITECTURE)
    options = ConfigOptions(values, f"config.json of {ARCHITECTURE}")
    width = options.size("encoder_embed_dim")
    options.only("produce_weight_type", *WEIGHTS)
    options.only("speech_adaptor_type", "bert")
    # Options of the authors' other CIF modules.
    options.only("conv_cif_layer_num", 1)
    options.only("conv_cif_output_channels_num", width)
    options.only("dense_cif_units_num", width)
    options.only("add_cif_ctxt_layers", False)
    options.skip("conv_cif_dropout")
    bert = ConfigOptions(options.part("bert_config"), f"bert_config of {ARCHITECTURE}")
    bert.only("position_embedding_type", "absolute")
    # Options of the words, which are not read, and of the unused pooler.
    bert.skip("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings", "directionality")
    bert.skip(*(f"pooler_{name}" for name in ("fc_size", "num_attention_heads", "num_fc_layers", "size_per_head")))
    bert.skip("pooler_type")
    config = CFormerConfig(**read_fields(options, _CIF), **read_fields(bert, _BERT))
    bert.done()
    options.done()
    return config


def to_hf_config(config: CFormerConfig) -> dict:
    """Returns config.json, the inverse of `from_hf_config`."""
    written = dict(
        **kind_of(config.family),
        **{name: value for name, value in write_fields(config, _CIF).items() if value is not None},
        conv_cif_dropout=0.0,
        speech_adaptor_type="bert",
        bert_config=dict(model_type="bert", **write_fields(config, _BERT)),
    )
    return check_written(config, written, from_hf_config, "a C-Former")


def table(config: CFormerConfig) -> Table:
    """Returns the table of the weights; BERT's word vectors and pooler, which nothing reads, are left out."""
    bert, path = "speech_bert_adaptor.", "transformer"
    layer, layers = f"{bert}encoder.layer.{{layer}}", f"{path}/layers"
    head, width = config.hidden_size // config.num_heads, config.hidden_size
    own = f"{layer}.attention"
    weights: list[Weight] = []
    if config.weights == "conv":
        weights += linear("conv", "cif/conv", "o i w -> w i o")
    elif config.weights == "dense":
        weights += linear("dense_proj", "cif/dense")
    weights += linear("weight_proj", "cif/weight")
    if config.cif_size != config.input_size:
        weights += linear("cif_output_proj", "cif/output", bias=False)
    weights += [
        *linear("pre_bert_proj", f"{path}/input"),
        Weight(f"{bert}embeddings.position_embeddings.weight", f"{path}/position/embedding"),
        Weight(f"{bert}embeddings.token_type_embeddings.weight", f"{path}/type/embedding"),
        *norm(f"{bert}embeddings.LayerNorm", f"{path}/embedding_norm"),
        *into_heads([f"{own}.self.{n}" for n in ("query", "key", "value")], f"{layers}/attention", head, (width,) * 3),
        *linear(f"{own}.output.dense", f"{layers}/attention/out", OUT_OF_HEADS, {"h": head}),
        *norm(f"{own}.output.LayerNorm", f"{layers}/attention_norm"),
        *linear(f"{layer}.intermediate.dense", f"{layers}/mlp/up"),
        *linear(f"{layer}.output.dense", f"{layers}/mlp/down"),
        *norm(f"{layer}.output.LayerNorm", f"{layers}/mlp_norm"),
        *linear("post_bert_proj", f"{path}/output"),
    ]
    unread = (
        "embeddings.word_embeddings.weight",
        "embeddings.position_ids",
        "pooler.dense.weight",
        "pooler.dense.bias",
    )
    return Table(tuple(weights), ignored=tuple(bert + name for name in unread))


def sample(config: CFormerConfig) -> tuple[jax.Array]:
    """Returns one vector, with which `init` creates every parameter."""
    return (jnp.zeros((1, 1, config.input_size), jnp.float32),)


FAMILIES = (
    Family(
        name="C-Former",
        architectures=(ARCHITECTURE,),
        from_hf=from_hf_config,
        to_hf=to_hf_config,
        table=table,
        sample=sample,
        oracle="CIF-PyTorch, X-LLM",
    ),
)
