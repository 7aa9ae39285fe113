"""A checkpoint's own tokenizer and chat template, as they lie beside its weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mllm_jax.errors import DataError

Message = Mapping[str, str]  # {"role": "user", "content": "..."}

GENERATION = "generation_config.json"
PROCESSORS_TEMPLATE = "chat_template.json"  # early folders of models with pictures keep the one that places them here
# One of these holds the vocabulary; without any, transformers would make up an empty tokenizer.
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json")


class ChatTokenizer:
    """Conversations to ids by the template of the checkpoint's author, and ids to text.

    Args:
        backend: a tokenizer of transformers.
        generation: generation_config.json, whose end tokens count besides the tokenizer's.
    """

    def __init__(self, backend: Any, generation: Mapping[str, Any] | None = None):
        self.backend, self.generation = backend, dict(generation or {})
        listed = self.generation.get("eos_token_id")
        listed = listed if isinstance(listed, list) else [listed]
        ids = [i for i in (backend.eos_token_id, *listed) if i is not None]
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys(ids))

    @classmethod
    def load(cls, folder: str | Path) -> ChatTokenizer:
        """The tokenizer in a model's folder. No code of the folder is run.

        Raises:
            DataError: there is none, or it cannot be read.
        """
        folder = Path(folder)
        if not any((folder / name).is_file() for name in _VOCABULARIES):
            raise DataError(
                f"no tokenizer in {folder}",
                f"one of {', '.join(_VOCABULARIES)} beside the weights",
                "copy the tokenizer's files there, as its repository has them",
            )
        from transformers import AutoTokenizer

        path = folder / GENERATION
        try:
            generation = json.loads(path.read_text("utf-8")) if path.is_file() else {}
            backend = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
            if (template := folder / PROCESSORS_TEMPLATE).is_file():
                backend.chat_template = json.loads(template.read_text("utf-8"))["chat_template"]
        except Exception as error:  # transformers and tokenizers raise many kinds, some of them plain Exception
            raise DataError(
                f"the tokenizer in {folder}: {type(error).__name__}: {error}",
                f"files that transformers' AutoTokenizer reads, {GENERATION} and {PROCESSORS_TEMPLATE} in JSON",
                "restore them from the checkpoint's origin",
            ) from error
        return cls(backend, generation)

    def save(self, folder: str | Path) -> None:
        """Writes tokenizer, chat template and generation_config.json into a model's folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.backend.save_pretrained(str(folder))
        if self.generation:
            (folder / GENERATION).write_text(json.dumps(self.generation, indent=2) + "\n", "utf-8")

    @property
    def has_template(self) -> bool:
        """Whether conversations can be laid out."""
        return bool(self.backend.chat_template)

    @property
    def pad_token_id(self) -> int | None:
        """What texts are padded with, if the tokenizer says so."""
        return self.backend.pad_token_id

    def encode(self, text: str) -> list[int]:
        """Plain text to ids, with the special tokens that the tokenizer puts around a text."""
        return list(self.backend(text)["input_ids"])

    def encode_chat(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[int]:
        """A conversation to ids, laid out by the template.

        Special tokens that a message spells become special tokens: templates work on text. Give no text of strangers
        to a model that acts on it.

        Args:
            messages: of role "user", "assistant" and, where the template knows it, "system".
            add_generation_prompt: end with the beginning of the assistant's answer.

        Raises:
            DataError: no template, or messages that it refuses, such as two questions in a row.
        """
        laid_out = self._lay_out(messages, add_generation_prompt, tokenize=True, return_dict=True)
        return list(laid_out["input_ids"])

    def render_chat(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """A conversation as the template writes it; takes and raises what `encode_chat` does."""
        return self._lay_out(messages, add_generation_prompt, tokenize=False)

    def _lay_out(self, messages: Sequence[Message], add_generation_prompt: bool, **how: bool):
        if not self.has_template:
            raise DataError(
                "a conversation for a tokenizer without a chat template",
                "chat_template in tokenizer_config.json, or chat_template.jinja",
                "take an instruction-tuned checkpoint, or give plain text as the prompt",
            )
        from jinja2 import TemplateError

        try:
            return self.backend.apply_chat_template(
                [dict(message) for message in messages], add_generation_prompt=add_generation_prompt, **how
            )
        except TemplateError as error:
            raise DataError(
                f"roles {[message['role'] for message in messages]}: {error}",
                "a conversation that the chat template accepts",
                "change the order or the roles of the messages, or take another chat model's tokenizer",
            ) from error

    def decode(self, ids: Sequence[int]) -> str:
        """Ids to text, special tokens left out and spaces as they are."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=True, clean_up_tokenization_spaces=False)
