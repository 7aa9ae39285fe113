"""A tokenizer that is trained here, with the interface of `ChatTokenizer`; a run needs no transformers for it."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from mllm_jax.data.chat_template import (
    ASSISTANT,
    BOS,
    EOS,
    IMAGE,
    OWN_TEMPLATE,
    PAD,
    SEAM,
    SPECIAL_TOKENS,
    USER,
    own_text,
    parted,
    spaced,
)
from mllm_jax.data.chat_tokenizer import ChatTokenizer, not_encodable, rendered
from mllm_jax.errors import DataError
from mllm_jax.files import read_json, write_atomic

TOKENIZER, SETTINGS, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"


class Tokenizer:
    """Encodes and decodes text; a thin wrapper of `tokenizers.Tokenizer`.

    Args:
        template: the chat template.
    """

    has_template = True
    longest = sys.maxsize  # ids of a text: it is trained for no length

    def __init__(self, backend, template: str = OWN_TEMPLATE):
        ids = [backend.token_to_id(token) for token in SPECIAL_TOKENS]
        if None in ids:
            missing = [t for t, i in zip(SPECIAL_TOKENS, ids, strict=True) if i is None]
            raise DataError(
                f"a tokenizer without {missing}",
                f"the special tokens {SPECIAL_TOKENS}",
                "add them to it, or name a chat model's folder: TokenizerConfig(folder=...)",
            )
        self.backend, self.template = backend, template
        self.pad_token_id, self.bos_token_id, self.eos_token_id, self.image_token_id, *_ = ids
        self.stop_ids: tuple[int, ...] = (self.eos_token_id,)
        self.special_tokens = (*SPECIAL_TOKENS, *_others(backend))
        # Where the backend splits a text first, so that the pieces have the same ids alone; SEAMs are left out.
        self._pieces = re.compile(f"({'|'.join(map(re.escape, self.special_tokens))})|{SEAM}")
        self.vocab_size = backend.get_vocab_size()
        self.answer_id = backend.token_to_id(ASSISTANT) if template == OWN_TEMPLATE else None
        self._piece = lru_cache(maxsize=1 << 17)(self._encoded)

    def __getstate__(self) -> dict[str, Any]:
        """Returns the state for a copy in another process: all but the cached pieces."""
        return {name: value for name, value in vars(self).items() if name != "_piece"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._piece = lru_cache(maxsize=1 << 17)(self._encoded)

    def token_of(self, token_id: int) -> str:
        """Returns the token as text."""
        return self.backend.id_to_token(int(token_id))

    def id_of(self, token: str) -> int | None:
        return self.backend.token_to_id(token)

    def ids(self, text: str) -> list[int]:
        """Encodes a text with special tokens, without adding any; a SEAM splits those that are plain text."""
        return [i for piece in self._pieces.split(text) if piece for i in self._piece(piece)]

    def _encoded(self, piece: str) -> tuple[int, ...]:
        """Encodes a text between special tokens, or one such token; cached, because questions and answers repeat."""
        try:
            return tuple(self.backend.encode(piece, add_special_tokens=False).ids)
        except Exception as error:  # half a surrogate pair is a TypeError to tokenizers
            raise not_encodable(piece, error) from error

    def encode(self, text: str) -> list[int]:
        """Encodes <bos> and a text, which may contain special tokens."""
        return [self.bos_token_id, *self.ids(spaced(text))]

    def words(self, text: str) -> list[int]:
        """Encodes plain text at any position of a conversation; special tokens that it spells are text."""
        return self.ids(parted(spaced(text), self.special_tokens))

    def caption_ids(self, text: str) -> list[int]:
        """Encodes <bos> caption <eos>."""
        return [self.bos_token_id, *self.words(text), self.eos_token_id]

    def render_chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """Renders a conversation with the template; takes and raises the same as `ChatTokenizer.render_chat`."""
        if self.answer_id is not None:
            return own_text(messages, add_generation_prompt)
        return rendered(self.template, messages, add_generation_prompt, bos_token=BOS, eos_token=EOS, pad_token=PAD)

    def decode(self, ids: Iterable[int]) -> str:
        """Decodes ids, without special tokens."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=True).strip()

    def fingerprint(self) -> str:
        """Returns a short hash that differs if ids or rows would."""
        return hashlib.sha256((self.backend.to_str() + self.template).encode()).hexdigest()[:16]

    def save(self, folder: Path) -> None:
        """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja; transformers can read them."""
        folder.mkdir(parents=True, exist_ok=True)
        names = dict(bos_token=BOS, eos_token=EOS, pad_token=PAD, additional_special_tokens=[IMAGE, USER, ASSISTANT])
        settings = dict(tokenizer_class="PreTrainedTokenizerFast", clean_up_tokenization_spaces=False, **names)
        write_atomic(folder / SETTINGS, json.dumps(settings, indent=1) + "\n")
        write_atomic(folder / TEMPLATE, self.template)
        write_atomic(folder / TOKENIZER, self.backend.to_str(pretty=True))

    @staticmethod
    def is_in(folder: Path) -> bool:
        """Returns whether a folder holds a tokenizer that was trained here."""
        try:
            settings = read_json(folder / SETTINGS, DataError)
        except (OSError, DataError):
            return False
        return settings.get("additional_special_tokens") == [IMAGE, USER, ASSISTANT]

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Reads a tokenizer.json, or the one in a folder, with the chat template beside it if there is one.

        Raises:
            DataError: no such file, or not a tokenizer.
        """
        from tokenizers import Tokenizer as Backend

        path = Path(path)
        path = path / TOKENIZER if path.is_dir() else path
        if not path.is_file():
            raise DataError(
                f"no tokenizer at {path}", "a tokenizer.json", "train first, or copy it into the run folder"
            )
        template = path.with_name(TEMPLATE)
        try:
            return cls(
                Backend.from_file(str(path)), template.read_text("utf-8") if template.is_file() else OWN_TEMPLATE
            )
        except DataError:
            raise
        except Exception as error:
            raise DataError(f"{path}: {error}", "a tokenizer.json of the tokenizers library", "restore it") from error

    @classmethod
    def train(
        cls, texts: Iterable[str], vocab_size: int, phrases: Sequence[str] = (), special: Sequence[str] = ()
    ) -> Tokenizer:
        """Trains byte-level BPE (arXiv 1508.07909) of at most `vocab_size` entries, with special tokens and phrases.

        Args:
            phrases: sequences of words, each of which becomes one token wherever it occurs.
            special: further special tokens, such as those of media that a model produces.
        """
        from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
        from tokenizers import Tokenizer as Backend

        backend = Backend(models.BPE())
        # Texts come with their leading space; text after a special token or a phrase gets none.
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - len(phrases),
            special_tokens=[*SPECIAL_TOKENS, *special],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        backend.train_from_iterator(map(spaced, texts), trainer)
        backend.add_tokens([AddedToken(f" {phrase}") for phrase in phrases])
        return cls(backend)


def _others(backend: Any) -> list[str]:
    """Returns the special tokens besides SPECIAL_TOKENS, in the order of their ids."""
    added = sorted(backend.get_added_tokens_decoder().items())
    return [token.content for _, token in added if token.special and token.content not in SPECIAL_TOKENS]


def tokenizer_in(folder: Path) -> Tokenizer | ChatTokenizer:
    """Reads the tokenizer in a folder, of either class. Raises DataError: see both classes' `load`."""
    return Tokenizer.load(folder) if Tokenizer.is_in(folder) else ChatTokenizer.load(folder)
