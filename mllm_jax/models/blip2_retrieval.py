"""`Blip2ForImageTextRetrieval`: BLIP-2's first stage as it ranks, without the head that writes."""

from __future__ import annotations

from mllm_jax.checkpoints.architectures import model_type
from mllm_jax.checkpoints.config_json import check_written, stored_fields
from mllm_jax.checkpoints.options import Options
from mllm_jax.checkpoints.table import Family, Table, Weight, nested
from mllm_jax.encoders import eva
from mllm_jax.models.blip2 import read_encoder
from mllm_jax.models.blip2_stage1 import QFormerPretrainingConfig
from mllm_jax.projectors.qformer_hub import qformer_weights, read_qformer, write_qformer

FAMILY = "Blip2ForImageTextRetrieval"


def from_hf_config(values: dict) -> QFormerPretrainingConfig:
    """config.json of Blip2ForImageTextRetrieval, every option honoured or refused by name."""
    options = Options(values, f"config.json of {FAMILY}")
    encoder = read_encoder(options.part("vision_config", {}))
    projector = read_qformer(
        options.part("qformer_config", {}),
        FAMILY,
        text=True,
        feature_size=encoder.hidden_size,
        num_queries=options.size("num_query_tokens", 32),
    )
    config = QFormerPretrainingConfig(
        encoder,
        projector,
        projection_size=options.size("image_text_hidden_size", 256),
        captioning=False,
        image_token_id=options.id("image_token_index", options.id("image_token_id")),
        family=FAMILY,
    )
    # A language model is described there, but there is none.
    options.skip("vision_config", "qformer_config", "text_config", "use_decoder_only_language_model")
    options.skip("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
    options.done()
    return config


def to_hf_config(config: QFormerPretrainingConfig) -> dict:
    """The reverse; refuses switches that the family does not have."""
    vision = {name: value for name, value in eva.to_hf_config(config.encoder).items() if name != "architectures"}
    written = dict(
        architectures=[FAMILY],
        model_type=model_type(FAMILY),
        vision_config=vision,
        qformer_config=write_qformer(config.projector, "blip_2_qformer"),
        num_query_tokens=config.projector.num_queries,
        image_text_hidden_size=config.projection_size,
        image_token_index=config.image_token_id,
    )

    def facts(c):
        return stored_fields(c, "encoder", "init_temperature") | dict(projector=stored_fields(c.projector))

    return check_written(config, written, from_hf_config, "a model that compares pictures and texts", facts)


def table(config: QFormerPretrainingConfig) -> Table:
    weights = nested(eva.table(config.encoder), "vision_model.", "encoder_image/")
    weights += qformer_weights(config.projector, embeddings="embeddings")
    heads = {"vision_projection": "image_projection", "text_projection": "text_projection", "itm_head": "matching"}
    for theirs, ours in heads.items():
        weights += (
            Weight(f"{theirs}.weight", f"{ours}/kernel", "o i -> i o"),
            Weight(f"{theirs}.bias", f"{ours}/bias"),
        )
    return Table(weights, (), ("embeddings.position_ids",))


FAMILIES = (
    Family(
        name="BLIP-2 retrieval",
        architectures=(FAMILY,),
        from_hf=from_hf_config,
        to_hf=to_hf_config,
        table=table,
        oracle=FAMILY,
    ),
)
