"""A checkpoint's own tokenizer and chat template, read from the folder of its weights."""

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
PROCESSORS_TEMPLATE = "chat_template.json"  # in early folders, the template that places images
# One of these holds the vocabulary; without any, transformers would create an empty tokenizer.
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json")


class ChatTokenizer:
    """Encodes conversations with the chat template of the checkpoint's author, and decodes ids.

    Args:
        backend: a tokenizer of transformers.
        generation: generation_config.json, whose end tokens are added to the tokenizer's.
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
    def load(cls, folder: str | Path, default_template: str | None = None) -> ChatTokenizer:
        """Reads the tokenizer in a model's folder, without running any code in it.

        Args:
            default_template: the chat template if the folder has none; None: no template.

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
        except Exception as error:  # transformers and tokenizers raise many types, among them plain Exception
            raise _unreadable(folder, f"{type(error).__name__}: {str(error)[:1_000]}") from error
        if (template := _json(folder / PROCESSORS_TEMPLATE)) is not None:
            if "chat_template" not in template:
                raise _unreadable(folder, f"{PROCESSORS_TEMPLATE} without chat_template")
            backend.chat_template = template["chat_template"]
        if not _is_template(getattr(backend, "chat_template", None)):
            raise _unreadable(folder, f"a chat template that is {type(backend.chat_template).__name__}")
        backend.chat_template = backend.chat_template or default_template
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
        """Returns whether there is a chat template."""
        return bool(self.backend.chat_template)

    @property
    def pad_token_id(self) -> int | None:
        """Returns the padding id, or None if the tokenizer defines none."""
        return self.backend.pad_token_id

    @property
    def template(self) -> Any:
        """Returns the chat template, or several by name, or None."""
        return self.backend.chat_template

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """Returns the texts that are encoded as special tokens wherever they occur."""
        return tuple(t.content for t in self.backend.added_tokens_decoder.values() if t.special)

    @property
    def vocab_size(self) -> int:
        """Returns the number of ids."""
        return len(self.backend) - self._placeholders

    @property
    def bos_token_id(self) -> int | None:
        return self.backend.bos_token_id

    @property
    def longest(self) -> int:
        """Returns the most ids of a text that the folder's model reads, a huge number if its files name none."""
        return self.backend.model_max_length

    def caption_ids(self, text: str) -> list[int]:
        """Encodes a caption with the tokens that its text encoder expects around it, which are those of any text."""
        return self.encode(text)

    def words(self, text: str) -> list[int]:
        """Returns the ids of plain text; special tokens that it spells are text."""
        return self.ids(parted(text, self.special_tokens))

    def add_placeholder(self, token: str) -> int:
        """Adds a special token for media; its id follows the vocabulary, which does not grow."""
        self._placeholders += self.backend.add_special_tokens({"additional_special_tokens": [token]}, False)
        return self.id_of(token)

    def token_of(self, token_id: int) -> str:
        """Returns the token as text."""
        return self.backend.convert_ids_to_tokens(int(token_id))

    def id_of(self, token: str) -> int | None:
        return self.backend.get_vocab().get(token)

    def fingerprint(self) -> str:
        """Returns a short hash that differs if ids or rows would."""
        fast = getattr(self.backend, "backend_tokenizer", None)
        words = sorted(self.backend.get_vocab().items()) if fast is None else fast.to_str()
        parts = [self.template, type(self.backend).__name__, self.stop_ids, words]
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def encode(self, text: str) -> list[int]:
        """Encodes plain text, with the special tokens that the tokenizer adds to a text.

        Raises:
            DataError: a text that the tokenizer refuses, such as half a surrogate pair.
        """
        return self._ids(text)

    def ids(self, text: str) -> list[int]:
        """Encodes a text with special tokens, without adding any; a SEAM splits those that are plain text."""
        return [i for piece in text.split(SEAM) for i in self._ids(piece, add_special_tokens=False)]

    def _ids(self, text: str, **how: bool) -> list[int]:
        try:
            return list(self.backend(text, verbose=False, **how)["input_ids"])  # callers check the length
        except Exception as error:  # tokenizers raises TypeError for half a character, and plain Exceptions
            raise not_encodable(text, error) from error

    def encode_chat(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[int]:
        """Encodes a conversation with the chat template.

        Special tokens that a message spells become special tokens, because templates work on text. Do not give
        untrusted text to a model that takes actions.

        Args:
            messages: of role "user", "assistant" and, if the template accepts it, "system".
            add_generation_prompt: whether to end with the beginning of the assistant's answer.

        Raises:
            DataError: no template, or messages that it refuses, such as two questions in a row.
        """
        return self.ids(self.render_chat(messages, add_generation_prompt))

    def render_chat(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """Renders a conversation with the chat template; takes and raises the same as `encode_chat`.

        A template is a program of the checkpoint's authors: its time and text are bounded, see
        `mllm_jax.data.template_sandbox`, and any failure of it is a refusal.
        """
        if not self.has_template:
            raise DataError(
                "a conversation for a tokenizer without a chat template",
                "chat_template in tokenizer_config.json, or chat_template.jinja",
                "use an instruction-tuned checkpoint, or give plain text as the prompt",
            )
        find = self.backend.get_chat_template
        return rendered(find, messages, add_generation_prompt, **self.backend.special_tokens_map)

    def decode(self, ids: Sequence[int]) -> str:
        """Decodes ids, without special tokens and with spaces unchanged."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=True, clean_up_tokenization_spaces=False)


def rendered(
    template: str | Callable[[], str], messages: Sequence[Message], add_generation_prompt: bool, **tokens: Any
) -> str:
    """Renders messages with a chat template, or the one that a function returns. Raises DataError if it fails."""
    from mllm_jax.data.template_sandbox import render

    variables = dict(tools=None, documents=None, add_generation_prompt=add_generation_prompt)
    try:
        return render(template if isinstance(template, str) else template(), messages, **variables | tokens)
    except Exception as error:  # a template can raise anything: 1/0, infinite recursion, no memory
        raise DataError(
            f"roles {[message.get('role') for message in messages]!r:.200}: {type(error).__name__}: {error!s:.500}",
            "a conversation that the chat template accepts, and a template that ends",
            "change the order or the roles of the messages, or use another chat model's tokenizer",
        ) from error


def not_encodable(text: str, error: Exception) -> DataError:
    """Returns the refusal of a text that a tokenizer cannot encode."""
    return DataError(
        f"the text {text!a:.100}: {type(error).__name__}: {error!s:.200}",
        "text that UTF-8 can write, and a tokenizer that can read it",
        "correct the text, or restore the tokenizer's files",
    )


def _json(path: Path) -> dict[str, Any] | None:
    """Reads the object in a JSON file of a folder; None if the file does not exist."""
    try:
        return read_json(path, DataError)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unreadable(path.parent, f"{path.name}: {error}") from error


def _is_template(value: Any) -> bool:
    """Returns whether a value is a chat template, None, or several by name."""
    texts = value.values() if isinstance(value, dict) else [value]
    return value is None or all(isinstance(text, str) for text in texts)


def _unreadable(folder: Path, reason: str) -> DataError:
    return DataError(
        f"the tokenizer in {folder}: {reason}",
        f"files that transformers' AutoTokenizer reads, {GENERATION} and {PROCESSORS_TEMPLATE} in JSON",
        "restore them from the checkpoint's origin",
    )
