"""BLIP-2 and InstructBLIP: published files, published sizes, and refusals."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from fnmatch import fnmatchcase
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict

from mllm_jax.errors import ConfigError, DataError
from mllm_jax.layers.compute import with_compute
from mllm_jax.models import blip2, blip2_stage1, instructblip
from mllm_jax.models.blip2_stage1 import QFormerPretrainingConfig
from mllm_jax.models.registry import abstract_init, abstract_params, family_of_config
from mllm_jax.projectors.qformer import QFormerConfig
from mllm_jax.projectors.qformer_hub import read_qformer

CONFIGS = Path(__file__).parents[2] / "configs"
# As in the folders on the hub since they have the image token.
BLIP2_FLAN_T5_XL = dict(
    architectures=["Blip2ForConditionalGeneration"],
    image_text_hidden_size=256,
    image_token_index=32100,
    initializer_factor=1.0,
    initializer_range=0.02,
    model_type="blip-2",
    num_query_tokens=32,
    qformer_config=dict(_attn_implementation_autoset=True, classifier_dropout=None, model_type="blip_2_qformer"),
    text_config=dict(
        architectures=["T5ForConditionalGeneration"],
        bos_token_id=1,
        classifier_dropout=0.0,
        d_ff=5120,
        d_kv=64,
        d_model=2048,
        decoder_start_token_id=0,
        dense_act_fn="gelu",
        dropout_rate=0.1,
        eos_token_id=1,
        feed_forward_proj="gated-gelu",
        initializer_factor=1.0,
        is_encoder_decoder=True,
        is_gated_act=True,
        layer_norm_epsilon=1e-06,
        model_type="t5",
        num_decoder_layers=24,
        num_heads=32,
        num_layers=24,
        output_past=True,
        pad_token_id=0,
        relative_attention_max_distance=128,
        relative_attention_num_buckets=32,
        tie_word_embeddings=False,
        torch_dtype="float32",
        vocab_size=32128,
    ),
    torch_dtype="float32",
    use_decoder_only_language_model=False,
    vision_config=dict(
        _attn_implementation_autoset=True,
        dropout=0.0,
        initializer_factor=1.0,
        model_type="blip_2_vision_model",
        num_channels=3,
        projection_dim=512,
    ),
)
INSTRUCTBLIP_VICUNA_7B = dict(
    architectures=["InstructBlipForConditionalGeneration"],
    image_token_index=32001,
    initializer_factor=1.0,
    initializer_range=0.02,
    model_type="instructblip",
    num_query_tokens=32,
    qformer_config=dict(_attn_implementation_autoset=True, model_type="instructblip_qformer", vocab_size=30523),
    text_config=dict(
        architectures=["LLaMAForCausalLM"],
        attention_bias=False,
        bos_token_id=0,
        eos_token_id=1,
        head_dim=128,
        hidden_act="silu",
        hidden_size=4096,
        initializer_range=0.02,
        intermediate_size=11008,
        max_sequence_length=2048,
        mlp_bias=False,
        model_type="llama",
        num_attention_heads=32,
        num_hidden_layers=32,
        num_key_value_heads=32,
        pad_token_id=32000,
        pretraining_tp=1,
        rms_norm_eps=1e-06,
        rope_scaling=None,
        rope_theta=10000.0,
        tie_word_embeddings=False,
        torch_dtype="float16",
        vocab_size=32064,
    ),
    tie_word_embeddings=False,
    torch_dtype="float32",
    use_decoder_only_language_model=True,
    vision_config=dict(_attn_implementation_autoset=True, model_type="instructblip_vision_model"),
)
BLIP2_OPT = BLIP2_FLAN_T5_XL | dict(
    image_token_index=50265,
    use_decoder_only_language_model=True,
    text_config=dict(
        _name_or_path="facebook/opt-2.7b",
        activation_dropout=0.0,
        architectures=["OPTForCausalLM"],
        eos_token_id=50118,
        ffn_dim=10240,
        hidden_size=2560,
        model_type="opt",
        num_attention_heads=32,
        num_hidden_layers=32,
        prefix="</s>",
        vocab_size=50304,
        word_embed_proj_dim=2560,
    ),
)


def config_file(name: str):
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def plain(config):
    """Returns the config with open widths filled in, and without `compute`, which no folder has."""
    return with_compute(config.with_branch("image", projector=config.image.projector), dtype=None, remat=None)


def sizes(config) -> dict[str, int]:
    """Returns the number of parameters of each part."""
    abstract = abstract_params(config, family_of_config(config))
    return {part: sum(math.prod(x.shape) for x in jax.tree.leaves(tree)) for part, tree in abstract.items()}


def reference_size(values: dict, kind: str, task: str = "ConditionalGeneration") -> int:
    """Returns the number of parameters of transformers' class, without allocating any."""
    import torch
    import transformers

    config = getattr(transformers, f"{kind}Config")(**{n: v for n, v in values.items() if n != "architectures"})
    with torch.device("meta"):
        reference = getattr(transformers, f"{kind}For{task}")(config)
    parameters = dict(reference.named_parameters())
    # transformers 5 always ties T5's head; the checkpoint has its own.
    head = 0
    if kind == "Blip2" and task == "ConditionalGeneration":
        assert not any(name.startswith("language_model.lm_head") for name in parameters)
        head = config.text_config.vocab_size * config.text_config.d_model
    return head + sum(parameter.numel() for parameter in parameters.values())


def test_blip2_flan_t5_xl():
    """Checks 15.77 GB of float32 in its folder; 107 million parameters are trained (arXiv 2301.12597, table 2)."""
    ours = config_file("blip2_flant5xl").model()
    assert blip2.from_hf_config(BLIP2_FLAN_T5_XL) == plain(ours)
    count = sizes(ours)
    assert sum(count.values()) == reference_size(BLIP2_FLAN_T5_XL, "Blip2")
    assert round(sum(count.values()) * 4 / 1e9, 2) == 15.77
    assert round(count["projector_image"] / 1e6) == 107


def test_instructblip_vicuna_7b():
    """Checks 7.9 billion parameters, of which 188 million are trained (arXiv 2305.06500, section 2.6)."""
    ours = config_file("instructblip_vicuna7b").model()
    assert instructblip.from_hf_config(INSTRUCTBLIP_VICUNA_7B) == plain(ours)
    count = sizes(ours)
    assert sum(count.values()) == reference_size(INSTRUCTBLIP_VICUNA_7B, "InstructBlip")
    assert round(sum(count.values()) / 1e9, 1) == 7.9
    assert count["projector_image"] // 10**6 == 188


def test_blip2_for_retrieval():
    values = BLIP2_OPT | dict(qformer_config=dict(use_qformer_text_input=True, vocab_size=30523))
    ours = blip2_stage1.from_hf_config(values)
    assert sum(sizes(ours).values()) == reference_size(values, "Blip2", "ImageTextRetrieval")


def test_the_first_stages_model():
    """Checks that `represent` trains everything except the image encoder."""
    file = config_file("blip2_flant5xl")
    config = file.stage1_model()
    module = config.make()
    abstract = abstract_init(module, module.config.batch_spec().empty(), method="touch")
    paths = flatten_dict(nn.meta.unbox(abstract), sep="/")
    patterns = file.represent(_NoData()).trainable
    left = {path.split("/")[0] for path in paths if not any(fnmatchcase(path, p) for p in patterns)}
    assert left == {"encoder_image"}
    assert file.align(_NoData()).steps == 80_000 and file.represent(_NoData()).optimizer.b2 == 0.98


class _NoData:
    """The attributes of a mixture that a stage reads."""

    rows = 1680


def test_blip2_opt_ends_at_a_newline():
    config = blip2.from_hf_config(BLIP2_OPT)
    assert config.llm.eos_token_id == (50118,) and not config.encoder_decoder
    again = blip2.from_hf_config(blip2.to_hf_config(config))
    assert again == config


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(text_config=dict(model_type="gpt2")), "model_type='gpt2'"),
        (dict(qformer_config=dict(use_qformer_text_input=True)), "use_qformer_text_input=True"),
        (dict(qformer_config=dict(cross_attention_frequency=0)), "cross_attention_frequency=0"),
        (dict(qformer_config=dict(position_embedding_type="relative_key")), "position_embedding_type='relative_key'"),
        (dict(video_token_index=3), "video_token_index=3"),
    ],
)
def test_options_that_are_not_supported_are_named(change, message):
    with pytest.raises(ConfigError, match=message):
        blip2.from_hf_config(BLIP2_OPT | change)


def test_configs_that_no_folder_can_say_are_refused():
    config = blip2.from_hf_config(BLIP2_OPT)
    with pytest.raises(ConfigError, match="use_qformer_text_input=True"):
        blip2.to_hf_config(
            config.with_branch("image", projector=dataclasses.replace(config.image.projector, vocab_size=9))
        )
    with pytest.raises(ConfigError, match="connection"):
        blip2.to_hf_config(config.with_branch("image", connection=blip2.Connection()))
    retrieval = blip2_stage1.from_hf_config(BLIP2_OPT | dict(qformer_config=dict(use_qformer_text_input=True)))
    with pytest.raises(ConfigError, match="captioning=True"):
        blip2_stage1.to_hf_config(dataclasses.replace(retrieval, captioning=True))
    with pytest.raises(ConfigError, match="reads no text"):
        QFormerPretrainingConfig(config.image.encoder, config.image.projector)


def test_texts_that_a_qformer_cannot_read_are_refused():
    config = QFormerConfig(8, 6, hidden_size=8, num_layers=2, num_heads=2, mlp_size=8, num_queries=2)
    features, tokens = jnp.zeros((1, 3, 6)), jnp.zeros((1, 5), int)
    with pytest.raises(ConfigError, match="a Q-Former without vocab_size"):
        jax.eval_shape(config.make().init, jax.random.key(0), features, tokens)
    short = dataclasses.replace(config, vocab_size=9, max_length=4)
    with pytest.raises(DataError, match="a text of 5 tokens for a Q-Former of 4 positions"):
        jax.eval_shape(short.make().init, jax.random.key(0), features, tokens)
    with pytest.raises(DataError, match="features of width 5"):
        jax.eval_shape(config.make().init, jax.random.key(0), features[..., :5])


def test_options_of_a_qformer_default_to_the_published_ones():
    read = read_qformer({}, "config.json", text=None, output_size=4096, feature_size=1408, num_queries=32)
    assert read == QFormerConfig(4096, 1408, vocab_size=30522)
