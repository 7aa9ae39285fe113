"""A LLaVA of random weights with its tokenizer and processor, in the hub's format."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
from flax import linen as nn

from mllm_jax.encoders.vit import ViTConfig, ViTDialect
from mllm_jax.llms.decoder import DecoderConfig
from mllm_jax.models.branch import Branch
from mllm_jax.models.llava import LlavaConfig
from mllm_jax.models.multimodal import Connection
from mllm_jax.projectors.mlp import MLPProjectorConfig

WORDS = ("<pad>", "<s>", "</s>", "user:", "assistant:", "?", "what", "is", "it", "a", "cat", "dog", "red", "<image>")
TEMPLATE = (
    "<s> {% for m in messages %}{{ m['role'] + ': ' }}"
    "{% if m['content'] is string %}{{ m['content'] + ' ' }}{% else %}"
    "{% for p in m['content'] %}{{ ('<image>' if p['type'] == 'image' else p['text']) + ' ' }}{% endfor %}{% endif %}"
    "{% if m['role'] == 'assistant' %}</s> {% endif %}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
MODEL = LlavaConfig(
    inputs={"image": Branch(ViTConfig(
        8, 4, 24, num_layers=2, num_heads=2, mlp_size=32, class_token=True, activation="quick_gelu",
        image_mean=(0.48145466, 0.4578275, 0.40821073), image_std=(0.26862954, 0.26130258, 0.27577711),
        dialect=ViTDialect(
            pre_norm=True, patch_bias=False, norm_output=False, norm_pooled=True, norm_eps=1e-5, pooler="token",
            family="CLIPVisionModel",
        ),
    ), MLPProjectorConfig(32), Connection(layers=(-2,)))},
    llm=DecoderConfig(
        vocab_size=len(WORDS), hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, mlp_size=48,
        tie_word_embeddings=False, bos_token_id=1, eos_token_id=(2,), max_position_embeddings=256,
    ),
    image_token_id=WORDS.index("<image>"),
)  # fmt: skip


def write_llava(folder: Path) -> Path:
    """Writes the model, its tokenizer and its image processor's settings."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    import mllm_jax

    module = MODEL.make()
    abstract = jax.eval_shape(lambda: module.init(jax.random.key(0), MODEL.batch_spec().empty()))["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: 0.5 * rng.normal(size=x.shape).astype(np.float32), nn.meta.unbox(abstract))
    mllm_jax.save_pretrained(module, params, folder)
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    fast.add_special_tokens({"additional_special_tokens": ["<image>"]})
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    processor = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 8}, "crop_size": 8}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder
