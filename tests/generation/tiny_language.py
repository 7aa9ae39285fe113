"""A random decoder and a tokenizer of bytes with a chat template, small enough to compile fast; and prompts of ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from mllm_jax.data.chat_tokenizer import ChatTokenizer
from mllm_jax.data.processing.layouts import TextLayout
from mllm_jax.data.processing.media import Encoded, lay_out_row
from mllm_jax.generation.assistant import Assistant
from mllm_jax.generation.options import Answer, Options
from mllm_jax.generation.program import Asked, Rows, bucket, placed_batch
from mllm_jax.generation.sampling import Sampling
from mllm_jax.llms.decoder import DecoderConfig
from mllm_jax.models.processor import Processor
from mllm_jax.models.protocol import LanguageOnly

SPECIAL = ("<|end|>", "<|user|>", "<|assistant|>", "<|system|>")
TEMPLATE = (
    "{% for m in messages %}{% if loop.index0 and m.role == messages[loop.index0 - 1].role %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}{% if m.role == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_tokenizer(template: str | None = TEMPLATE, special: Sequence[str] = SPECIAL) -> ChatTokenizer:
    """Returns a tokenizer of 256 bytes and the special tokens: by default ids 0 to 259."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=letters, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(special))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")
    tokenizer.chat_template = template
    return ChatTokenizer(tokenizer)


CONFIG = DecoderConfig(
    vocab_size=260,
    hidden_size=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    mlp_size=24,
    max_position_embeddings=96,
    tie_word_embeddings=False,  # a tied head on random weights repeats the last token
)


def random_params(config=CONFIG, seed: int = 0, scale: float = 0.5) -> dict:
    """Returns random parameters without compiling `init`."""
    init = config.make().init
    abstract = nn.meta.unbox(jax.eval_shape(lambda: init(jax.random.key(0), jnp.ones((1, 4), jnp.int32))))["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(scale * rng.normal(size=x.shape).astype(np.float32)), abstract)


class Numbers:
    """A tokenizer that writes ids as numbers, so that different answers differ as text."""

    has_template = False
    stop_ids = special_tokens = ()
    pad_token_id = None

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(str(int(i)) for i in ids)


def language(module: Any, params: dict, tokenizer: Any = None, **options: Any) -> Assistant:
    """Returns the assistant of a language model; without a tokenizer it answers only ids."""
    processor = Processor(LanguageOnly(module.config), tokenizer or Numbers(), TextLayout())
    return Assistant(module, params, processor, **options)


def encoded(assistant: Assistant, rows: Sequence[Sequence[int]]) -> list[Encoded]:
    """Returns prompts of ids."""
    start = [assistant.llm.decoder_start_token_id] if assistant.llm.encoder_decoder else None
    target = None if start is None else np.asarray(start)
    return [Encoded(lay_out_row(ids, [], [], "ids"), np.zeros(len(ids), np.float32), target=target) for ids in rows]


def answers(
    assistant: Assistant,
    rows: Sequence[Sequence[int]],
    options: Options = Options(),
    sampling: Sampling = Sampling(),
    batch_size: int = 4,
) -> list[Answer]:
    """Returns the answers to ids."""
    return assistant.complete(encoded(assistant, rows), options, sampling, batch_size=batch_size)


def started(assistant: Assistant, rows: Sequence[Sequence[int]]) -> tuple[Any, Rows]:
    """Returns the model's state and the rows after the compiled program has read ids, for 32 more tokens."""
    count, length = len(rows), bucket(max(map(len, rows)))
    batch = placed_batch(assistant._batch(encoded(assistant, rows), count, length), assistant.mesh)
    numbers = np.array([[0] * count, range(count), [32] * count], np.int32)
    program = assistant.program
    asked = program.place(Asked(*numbers, np.full((count, 8), -1, np.int32)))
    return program.start(program.params, batch, asked, rows=count, room=length + 32, new=32, sampling=Sampling())


# A language model whose tokenizer has a token for images, as a composed model needs.
WITH_IMAGES = replace(CONFIG, vocab_size=261)


def write_folder(folder: Path, config: DecoderConfig = CONFIG) -> Path:
    """Writes a model and its tokenizer as a Hugging Face folder."""
    import mllm_jax

    mllm_jax.save_pretrained(config.make(), random_params(config), folder)
    byte_tokenizer(special=SPECIAL if config == CONFIG else (*SPECIAL, "<image>")).save(folder)
    return folder
