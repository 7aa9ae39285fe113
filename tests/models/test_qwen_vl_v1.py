"""The first Qwen-VL's configs: reading, writing and refusals."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mllm_jax.data.chat_tokenizer import ChatTokenizer
from mllm_jax.data.message import Example, Image, Message, Text
from mllm_jax.encoders.vit import ViTConfig
from mllm_jax.errors import ConfigError, DataError
from mllm_jax.models.processor import Processor
from mllm_jax.models.qwen_vl_v1 import (
    TOWER,
    QwenVLTowerConfig,
    QwenVLV1Layout,
    from_hf_config,
    read_tower,
    to_hf_config,
    write_tower,
)
from mllm_jax.models.registry import abstract_params, family_of, family_of_config

VISUAL = dict(
    heads=16, image_size=448, image_start_id=151857, layers=48, mlp_ratio=4.9231, output_dim=4096, patch_size=14
)
VISUAL |= dict(width=1664)


def count(config) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_params(config, family_of_config(config))))


def test_the_towers_config():
    config = read_tower(dict(architectures=["QWenLMHeadModel"], visual=VISUAL, vocab_size=9))
    assert config == QwenVLTowerConfig() and config.encoder.mlp_size == 8192 and config.family == TOWER
    assert config.projector.num_tokens(config.encoder.grid) == 256
    assert read_tower(write_tower(config)) == config
    with pytest.raises(ConfigError, match="head_dim=16"):
        write_tower(replace(config, projector=replace(config.projector, head_dim=16)))
    with pytest.raises(ConfigError, match="ls_init_value"):
        read_tower(dict(visual=VISUAL | dict(ls_init_value=0.1)))
    half = config.with_dtype("bfloat16")
    assert half.dtype == half.parts["encoder_image"].dtype == half.parts["projector_image"].dtype == "bfloat16"


def test_the_towers_size():
    """Checks 1,842,770,688 of the ViT (1.9 billion in the paper), 76,054,528 of the resampler (0.08 billion), and the
    last norm and map."""
    assert count(QwenVLTowerConfig()) == 1_935_610_624


# ---- the whole

LLM = dict(
    architectures=["QWenLMHeadModel"], model_type="qwen", vocab_size=151936, hidden_size=4096, num_hidden_layers=32,
    num_attention_heads=32, kv_channels=128, intermediate_size=22016, layer_norm_epsilon=1e-6, rotary_emb_base=10000,
    rotary_pct=1.0, no_bias=True, seq_length=2048, use_dynamic_ntk=True, use_logn_attn=True, tie_word_embeddings=False,
    max_position_embeddings=8192,
)  # fmt: skip
WORDS = ("<pad>", "user:", "assistant:", "</s>", "what", "is", "it", "a", "cat", "cat.png", "<img>", "</img>")
ID = {word: i for i, word in enumerate(WORDS)}
SMALL = LLM | dict(vocab_size=13, hidden_size=128, num_hidden_layers=1, num_attention_heads=1, intermediate_size=48)
SMALL |= dict(visual=dict(image_size=8, patch_size=4, width=8, layers=1, heads=2, mlp_ratio=2.0, n_queries=4))
SMALL["visual"] |= dict(output_dim=128, image_start_id=ID["<img>"])
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' }}{% for p in m['content'] %}"
    "{{ ('<img> cat.png </img>' if p['type'] == 'image' else p['text']) + ' ' }}{% endfor %}"
    "{{ '</s> ' if m['role'] == 'assistant' else '' }}{% endfor %}"
    "{{ 'assistant: ' if add_generation_prompt else '' }}"
)
IMAGE = np.full((5, 9, 3), 70, np.uint8)
SHOWN = [10, 12, 12, 12, 12, 11]


@pytest.fixture(scope="module")
def processor() -> Processor:
    backend = Tokenizer(models.WordLevel(ID, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")
    made.chat_template = TEMPLATE
    config = from_hf_config(SMALL)
    return Processor(config, ChatTokenizer(made), QwenVLV1Layout(config))


def test_the_published_size():
    """Checks 9.6 billion parameters, 7.7 of the LLM and 1.9 of the image encoder (table 1 of the paper)."""
    values = LLM | dict(visual=VISUAL | dict(n_queries=256))
    assert family_of(values).name == "Qwen-VL (first)" != family_of(LLM).name
    config = from_hf_config(values)
    assert count(config) == 7_721_324_544 + 1_935_610_624 and config.media_tokens == 256
    written = to_hf_config(config)
    assert written["architectures"] == LLM["architectures"] and written["visual"]["image_start_id"] == 151857
    assert from_hf_config(written) == config


def test_an_image_has_the_position_of_its_name(processor):
    named = processor("what is <img> cat.png </img> it <img> a cat </img>", images=[IMAGE, IMAGE])
    assert named["tokens"][0].tolist() == [ID["what"], ID["is"], *SHOWN, ID["it"], *SHOWN]
    assert named["media_index"][0].tolist() == [-1, -1, -1, 0, 1, 2, 3, -1, -1, -1, 4, 5, 6, 7, -1]
    assert named["images"].shape == (1, 2, 8, 8, 3) and named["images"].dtype == np.uint8
    begun = processor("what is <img> it <img>", images=[IMAGE, IMAGE])
    for name, array in named.items():
        np.testing.assert_array_equal(begun[name], array)
    assert processor.layout.without_names([10, 10, 9, 11, 11, 4]) == [10, 10, 11, 4], "an end without a beginning stays"


def test_conversations_to_train_on(processor):
    said = [("user", "what is it"), ("assistant", "a cat"), ("user", "is it a cat"), ("assistant", "it is")]
    (_, asked), *rest = said
    messages = (Message("user", (Image(IMAGE), Text(asked))), *(Message(*each) for each in rest))
    encoded = processor.encode(Example(messages), 64)
    first = "user: I what is it assistant: a cat </s> user: is it a cat assistant: it is </s>"
    wanted = [i for word in first.split() for i in (SHOWN if word == "I" else [ID[word]])]
    assert encoded.tokens.tolist() == wanted
    learnt = [i for i, weight in zip(wanted, encoded.loss_weights, strict=True) if weight]
    assert learnt == [ID[word] for word in ["a", "cat", "</s>", "it", "is", "</s>"]]
    with pytest.raises(DataError, match="has '<img>' in it"):
        processor.encode(Example((Message("user", "what is <img>"), Message("assistant", "it"))), 64)


def test_wholes_that_do_not_fit_are_refused():
    config = from_hf_config(SMALL)
    with pytest.raises(ConfigError, match="without a part 'visual'"):
        from_hf_config(LLM)
    with pytest.raises(ConfigError, match="ViTConfig and ResamplerConfig and QWenLMHeadModel"):
        config.with_branch("image", encoder=ViTConfig(8, 4, 8, num_layers=1, num_heads=2, mlp_size=16))
    with pytest.raises(ConfigError, match="head_dim=64"):
        to_hf_config(config.with_branch("image", projector=replace(config.image.projector, head_dim=64)))
    with pytest.raises(ConfigError, match="rotary_pct=0.5"):
        from_hf_config(SMALL | dict(rotary_pct=0.5))
    with pytest.raises(ConfigError, match="newline=True"):
        to_hf_config(replace(config, newline=True))
