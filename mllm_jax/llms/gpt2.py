"""GPT-2 (arXiv 2005.14165, section 2.1; "Language Models are Unsupervised Multitask Learners", 2019).

A decoder with LayerNorm, learned positions, a plain MLP and biases. Its folders store matrices as [inputs, outputs],
and queries, keys and values in one.
"""

from __future__ import annotations

from mllm_jax.checkpoints.architectures import architecture, kind_of
from mllm_jax.checkpoints.config_json import Fields, read_fields, write_activation, write_fields
from mllm_jax.checkpoints.config_options import ConfigOptions
from mllm_jax.checkpoints.fields import make_config
from mllm_jax.checkpoints.table import Table, Weight, families, linear, norm, token_sample
from mllm_jax.llms.decoder import DecoderConfig
from mllm_jax.llms.decoder_hub import IDS, faithful

# With the head, which is the transposed embedding or has its own weights; and without its name, as in AudioLDM-2.
WITH_HEAD, MODEL = "GPT2LMHeadModel", "GPT2Model"
# Defaults of the options that config.json leaves out.
_DEFAULTS = dict(
    vocab_size=50257,
    n_embd=768,
    n_layer=12,
    n_head=12,
    n_positions=1024,
    activation_function="gelu_new",
    layer_norm_epsilon=1e-5,
    bos_token_id=50256,
    eos_token_id=50256,
)
_FIELDS: Fields = IDS | {
    "vocab_size": ("vocab_size", "size"),
    "hidden_size": ("n_embd", "size"),
    "num_layers": ("n_layer", "size"),
    "num_heads": ("n_head", "size"),
    "max_position_embeddings": ("n_positions", "size"),
    "norm_eps": ("layer_norm_epsilon", "number", ..., 0.0),
}
# Options of heads for other tasks.
_OTHER_HEADS = tuple(f"summary_{n}" for n in ("type", "use_proj", "activation", "proj_to_labels", "first_dropout"))
# What every GPT-2 has of the decoder's options.
_SWITCHES = dict(
    gated=False,
    norm="layer",
    positions="learned",
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
)


def from_hf_config(values: dict) -> DecoderConfig:
    """Reads config.json of GPT2LMHeadModel or GPT2Model; every option is honoured or refused by name."""
    family = architecture(values, WITH_HEAD, MODEL)
    options = ConfigOptions(_DEFAULTS | values, f"config.json of {family}")
    read = read_fields(options, _FIELDS)
    options.divided("n_embd", "n_head")
    # Without a head there is nothing to tie, and the logits are those of the embedding.
    tied = options.only("tie_word_embeddings", True, *[False] * (family == WITH_HEAD))
    config = make_config(
        DecoderConfig,
        **read,
        num_kv_heads=read["num_heads"],
        mlp_size=options.size("n_inner", 4 * read["hidden_size"]),
        activation=options.activation("activation_function"),
        tie_word_embeddings=tied,
        family=family,
        **_SWITCHES,
    )
    options.only("scale_attn_weights", True)
    options.only("scale_attn_by_inverse_layer_idx", False)
    options.only("add_cross_attention", False)
    options.flag("reorder_and_upcast_attn", False)  # scores are computed in float32 either way
    options.skip("n_ctx", "attn_pdrop", *_OTHER_HEADS)
    options.done()
    return config


def to_hf_config(config: DecoderConfig) -> dict:
    """Returns config.json, the inverse of `from_hf_config`; refuses switches that the family does not have."""
    c = config
    written = dict(
        **kind_of(c.family),
        n_inner=c.mlp_size,
        activation_function="gelu_new" if c.activation == "gelu_tanh" else write_activation(c.activation),
        tie_word_embeddings=c.tie_word_embeddings,
        **write_fields(c, _FIELDS),
    )
    return faithful(c, written, from_hf_config)


def table(config: DecoderConfig) -> Table:
    """Returns the table of the weights."""
    c, prefix = config, "" if config.family == MODEL else "transformer."
    layer = f"{prefix}h.{{layer}}"
    sizes = dict(p=3, h=c.size_per_head)
    weights = [
        Weight(f"{prefix}wte.weight", "token_embedding/embedding"),
        Weight(f"{prefix}wpe.weight", "position_embedding/embedding"),
        *norm(f"{layer}.ln_1", "layers/attention_norm"),
    ]
    for part, letter in enumerate("qkv"):
        name, path = f"{layer}.attn.c_attn", f"layers/attention/{letter}"
        weights.append(Weight(f"{name}.weight", f"{path}/kernel", "e (p n h) -> p e n h", sizes, part=part))
        weights.append(Weight(f"{name}.bias", f"{path}/bias", "(p n h) -> p n h", sizes, part=part))
    weights += [
        *linear(f"{layer}.attn.c_proj", "layers/attention/out", "(n h) e -> n h e", {"h": c.size_per_head}),
        *norm(f"{layer}.ln_2", "layers/mlp_norm"),
        *linear(f"{layer}.mlp.c_fc", "layers/mlp/up", ""),
        *linear(f"{layer}.mlp.c_proj", "layers/mlp/down", ""),
        *norm(f"{prefix}ln_f", "final_norm"),
    ]
    # Masks, which old folders store.
    ignored = [f"{layer}.attn.bias", f"{layer}.attn.masked_bias"]
    if not c.tie_word_embeddings:
        weights += linear("lm_head", "lm_head", bias=False)
    else:
        ignored.append("lm_head.weight")
    # Either class opens the other's folders, as in the reference.
    spelling = (r"^transformer\.", "") if c.family == MODEL else (r"^(wte|wpe|h|ln_f)\.", r"transformer.\1.")
    return Table(tuple(weights), (spelling,), tuple(ignored))


FAMILIES = families(
    {WITH_HEAD: "GPT-2", MODEL: "GPT-2 without a head"},
    from_hf=from_hf_config,
    to_hf=to_hf_config,
    table=table,
    sample=token_sample,
)
