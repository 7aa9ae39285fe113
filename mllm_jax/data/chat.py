"""A checkpoint's own tokenizer and chat template, as they lie beside its weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mllm_jax.data.chat_template import SEAM, parted
from mllm_jax.errors import DataError
from mllm_jax.files import read_json

Message = Mapping[str, str]  # {"role": "user", "content": "..."}

GENERATION = "generation_config.json"
PROCESSORS_TEMPLATE = "chat_template.json"  # early folders of models with images keep the one that places them here
# One of these holds the vocabulary; without any, transformers would make up an empty tokenizer.
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json")


class ChatTokenizer:
    """Conversations to ids by the template of the checkpoint's author, and ids to text.

    Args:
        backend: a tokenizer of transformers.
        generation: generation_config.json, whose end tokens count besides the tokenizer's.
    """

    answer_id = None

    def __init__(self, backend: Any, generation: Mapping[str, Any] | None = None):
        self.backend, self.generation = backend, dict(generation or {})
        self._placeholders = 0
        listed = self.generation.get("eos_token_id")
        listed = listed if isinstance(listed, list) else [listed]
        ids = [i for i in (backend.eos_token_id, *listed) if i is not None]
        if not all(type(i) is int and i >= 0 for i in ids):
            raise DataError(
                f"{GENERATION} with eos_token_id={listed!r:.100}", "one id, or a list of them", "restore it"
            )
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

        generation = _json(folder / GENERATION) or {}
        try:
            backend = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        except Exception as error:  # transformers and tokenizers raise many kinds, some of them plain Exception
            raise _unreadable(folder, f"{type(error).__name__}: {str(error)[:1_000]}") from error
        if (template := _json(folder / PROCESSORS_TEMPLATE)) is not None:
            if "chat_template" not in template:
                raise _unreadable(folder, f"{PROCESSORS_TEMPLATE} without chat_template")
            backend.chat_template = template["chat_template"]
        if not _is_template(getattr(backend, "chat_template", None)):
            raise _unreadable(folder, f"a chat template that is {type(backend.chat_template).__name__}")
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

    @property
    def template(self) -> Any:
        """The chat template, or several by name; None without one."""
        return self.backend.chat_template

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """The texts that become special tokens wherever a text has them."""
        return tuple(t.content for t in self.backend.added_tokens_decoder.values() if t.special)

    @property
    def vocab_size(self) -> int:
        """How many ids there are."""
        return len(self.backend) - self._placeholders

    @property
    def bos_token_id(self) -> int | None:
        return self.backend.bos_token_id

    def words(self, text: str) -> list[int]:
        """The ids of plain text; special tokens that it spells are text."""
        return self.ids(parted(text, self.special_tokens))

    def add_placeholder(self, token: str) -> int:
        """Adds a special token that stands for media; its id follows the vocabulary, which does not grow."""
        self._placeholders += self.backend.add_special_tokens({"additional_special_tokens": [token]}, False)
        return self.id_of(token)

    def token_of(self, token_id: int) -> str:
        """The token as text."""
        return self.backend.convert_ids_to_tokens(int(token_id))

    def id_of(self, token: str) -> int | None:
        return self.backend.get_vocab().get(token)

    def fingerprint(self) -> str:
        """A short text that differs where ids or rows would."""
        fast = getattr(self.backend, "backend_tokenizer", None)
        words = sorted(self.backend.get_vocab().items()) if fast is None else fast.to_str()
        told = [self.template, type(self.backend).__name__, self.stop_ids, words]
        return hashlib.sha256(repr(told).encode()).hexdigest()[:16]

    def encode(self, text: str) -> list[int]:
        """Plain text to ids, with the special tokens that the tokenizer puts around a text.

        Raises:
            DataError: a text that is none to the tokenizer, such as half a pair of surrogates.
        """
        return self._ids(text)

    def ids(self, text: str) -> list[int]:
        """The ids of a text in which special tokens are such; a SEAM parts what is none. Nothing is put around it."""
        return [i for piece in text.split(SEAM) for i in self._ids(piece, add_special_tokens=False)]

    def _ids(self, text: str, **how: bool) -> list[int]:
        try:
            return list(self.backend(text, **how)["input_ids"])
        except Exception as error:  # tokenizers raises a TypeError for half a character, and plain Exceptions
            raise not_encodable(text, error) from error

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
        return self.ids(self.render_chat(messages, add_generation_prompt))

    def render_chat(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """A conversation as the template writes it; takes and raises what `encode_chat` does.

        A template is a program of the checkpoint's authors: it has a budget of time and text, see
        `mllm_jax.data.template_sandbox`, and whatever it fails with is a refusal.
        """
        if not self.has_template:
            raise DataError(
                "a conversation for a tokenizer without a chat template",
                "chat_template in tokenizer_config.json, or chat_template.jinja",
                "take an instruction-tuned checkpoint, or give plain text as the prompt",
            )
        find = self.backend.get_chat_template
        return rendered(find, messages, add_generation_prompt, **self.backend.special_tokens_map)

    def decode(self, ids: Sequence[int]) -> str:
        """Ids to text, special tokens left out and spaces as they are."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=True, clean_up_tokenization_spaces=False)


def rendered(
    template: str | Callable[[], str], messages: Sequence[Message], add_generation_prompt: bool, **tokens: Any
) -> str:
    """What a chat template, or the one that a function finds, makes of messages. Raises DataError if it fails."""
    from mllm_jax.data.template_sandbox import render

    variables = dict(tools=None, documents=None, add_generation_prompt=add_generation_prompt)
    try:
        return render(template if isinstance(template, str) else template(), messages, **variables | tokens)
    except Exception as error:  # a template can raise anything: 1/0, a macro that calls itself, no memory
        raise DataError(
            f"roles {[message.get('role') for message in messages]!r:.200}: {type(error).__name__}: {error!s:.500}",
            "a conversation that the chat template accepts, and a template that ends",
            "change the order or the roles of the messages, or take another chat model's tokenizer",
        ) from error


def not_encodable(text: str, error: Exception) -> DataError:
    """The refusal of a text of which a tokenizer makes no ids."""
    return DataError(
        f"the text {text!a:.100}: {type(error).__name__}: {error!s:.200}",
        "text that UTF-8 can write, and a tokenizer that can read it",
        "mend the text, or restore the tokenizer's files",
    )


def _json(path: Path) -> dict[str, Any] | None:
    """The object in a file of a folder, None where there is no such file."""
    try:
        return read_json(path, DataError)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unreadable(path.parent, f"{path.name}: {error}") from error


def _is_template(value: Any) -> bool:
    """Whether it is a chat template, none, or several by name."""
    texts = value.values() if isinstance(value, dict) else [value]
    return value is None or all(isinstance(text, str) for text in texts)


def _unreadable(folder: Path, reason: str) -> DataError:
    return DataError(
        f"the tokenizer in {folder}: {reason}",
        f"files that transformers' AutoTokenizer reads, {GENERATION} and {PROCESSORS_TEMPLATE} in JSON",
        "restore them from the checkpoint's origin",
    )
