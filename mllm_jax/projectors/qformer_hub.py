"""The Q-Former in the Hugging Face folders of BLIP-2 and InstructBLIP: its options and its weights' names."""

from __future__ import annotations

from collections.abc import Mapping

from mllm_jax.checkpoints.config_json import Fields, read_fields, write_fields
from mllm_jax.checkpoints.config_options import ENCODER_ACTIVATIONS, ConfigOptions
from mllm_jax.checkpoints.table import OUT_OF_HEADS, Weight, into_heads, linear
from mllm_jax.checkpoints.table import norm as layer_norm
from mllm_jax.projectors.qformer import QFormerConfig

_FIELDS: Fields = {
    "hidden_size": ("hidden_size", "size", QFormerConfig.hidden_size),
    "num_layers": ("num_hidden_layers", "size", QFormerConfig.num_layers),
    "num_heads": ("num_attention_heads", "size", QFormerConfig.num_heads),
    "mlp_size": ("intermediate_size", "size", QFormerConfig.mlp_size),
    "cross_attention_frequency": ("cross_attention_frequency", "size", QFormerConfig.cross_attention_frequency),
    "max_length": ("max_position_embeddings", "size", QFormerConfig.max_length),
    "norm_eps": ("layer_norm_eps", "number", QFormerConfig.norm_eps, 0.0),
    "activation": ("hidden_act", "activation", ENCODER_ACTIVATIONS, "gelu"),
}
VOCAB_SIZE = 30522


def read_qformer(values: Mapping, what: str, *, text: bool | None, **sizes) -> QFormerConfig:
    """Reads `qformer_config` of a config.json; every option is honoured or refused by name.

    Args:
        what: name of the file in messages.
        text: whether the architecture's Q-Former reads text; None for InstructBLIP's, which reads text and has no
            option for it.
        sizes: the fields that other parts of the file determine: output_size, feature_size, num_queries.
    """
    options = ConfigOptions(values, f"qformer_config of {what}")
    reads = True if text is None else options.only("use_qformer_text_input", text, default=False)
    vocab_size = options.size("vocab_size", VOCAB_SIZE)
    config = QFormerConfig(
        **read_fields(options, _FIELDS),
        vocab_size=vocab_size if reads else None,
        **sizes,
    )
    options.only("position_embedding_type", "absolute")
    # The reference takes the features' width from the image encoder and ignores encoder_hidden_size.
    options.skip("encoder_hidden_size", "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings")
    options.done()
    return config


def write_qformer(c: QFormerConfig, model_type: str) -> dict:
    """Writes `qformer_config`, the inverse of `read_qformer`."""
    written = dict(
        model_type=model_type,
        **write_fields(c, _FIELDS),
        vocab_size=c.vocab_size or VOCAB_SIZE,
        encoder_hidden_size=c.feature_size,
    )
    return written if model_type == "instructblip_qformer" else written | dict(use_qformer_text_input=c.reads_text)


def qformer_weights(
    c: QFormerConfig,
    *,
    query: str = "query_tokens",
    layers: str = "qformer.encoder.layer",
    own: str = "attention",
    norm: str = "qformer.layernorm",
    embeddings: str = "qformer.embeddings",
    projection: str = "language_projection",
    path: str = "projector_image",
) -> tuple[Weight, ...]:
    """Returns the weights of a Q-Former, its queries and its map to the LLM.

    Args:
        own: the name between a layer's "attention." and ".query": transformers' "attention", LAVIS' "self".
        path: of the Q-Former among the model's parameters.
    """
    weights = [Weight(query, f"{path}/query", "1 q e -> q e")]
    head, rows = c.hidden_size // c.num_heads, (c.hidden_size,) * 3
    if c.reads_text:
        for ours, theirs in (("token", "word"), ("position", "position")):
            weights.append(Weight(f"{embeddings}.{theirs}_embeddings.weight", f"{path}/{ours}_embedding/embedding"))
    weights += layer_norm(norm, f"{path}/embedding_norm")
    for i, crosses in enumerate(c.group):
        hub, layer = f"{layers}.{{layer*{len(c.group)}+{i}}}", f"{path}/layers/layer_{i}"
        attentions = {"attention": "attention"} | ({"crossattention": "cross_attention"} if crosses else {})
        for theirs, ours in attentions.items():
            stored = [f"{hub}.{theirs}.{own}.{name}" for name in ("query", "key", "value")]
            weights += into_heads(stored, f"{layer}/{ours}", head, rows)
            weights += linear(f"{hub}.{theirs}.output.dense", f"{layer}/{ours}/out", OUT_OF_HEADS, {"h": head})
            weights += layer_norm(f"{hub}.{theirs}.output.LayerNorm", f"{layer}/{ours}/norm")
        for suffix, ours in (("_query", "query_mlp"), *((("", "text_mlp"),) if c.reads_text else ())):
            weights += linear(f"{hub}.intermediate{suffix}.dense", f"{layer}/{ours}/mlp/up")
            weights += linear(f"{hub}.output{suffix}.dense", f"{layer}/{ours}/mlp/down")
            weights += layer_norm(f"{hub}.output{suffix}.LayerNorm", f"{layer}/{ours}/norm")
    if c.output_size is not None:
        weights += linear(projection, f"{path}/language_projection")
    return tuple(weights)
