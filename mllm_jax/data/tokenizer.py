"""A tokenizer and the special tokens around a conversation's parts: of our own, or those of a chat model."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

from mllm_jax.data.chat import ChatTokenizer, not_encodable
from mllm_jax.data.chat_format import ChatFormat
from mllm_jax.errors import DataError
from mllm_jax.files import write_atomic

PAD, BOS, EOS, IMAGE, USER, ASSISTANT = "<pad>", "<bos>", "<eos>", "<image>", "<user>", "<assistant>"
SPECIAL_TOKENS = (PAD, BOS, EOS, IMAGE, USER, ASSISTANT)
CHAT_FORMAT = "chat_format.json"  # beside tokenizer.json, where the special tokens are not ours


class Tokenizer:
    """Text to ids and back; a thin cover over `tokenizers.Tokenizer` that remembers what it has seen.

    Args:
        chat: how conversations are written; None: with the special tokens of this file, which must be there.
    """

    def __init__(self, backend, chat: ChatFormat | None = None):
        # Text that spells a special token stays text: no record or question can end an answer or forge a picture.
        backend.encode_special_tokens = True
        self.backend = backend
        if chat is None:
            ids = [backend.token_to_id(token) for token in SPECIAL_TOKENS]
            if None in ids:
                missing = [t for t, i in zip(SPECIAL_TOKENS, ids, strict=True) if i is None]
                raise DataError(
                    f"a tokenizer without {missing}",
                    f"the special tokens {SPECIAL_TOKENS}",
                    "add them to it, or name a chat model's folder: TokenizerConfig(folder=...)",
                )
            chat = ChatFormat.own(*ids)
        self.chat = chat
        self.pad, self.bos, self.eos, self.image = chat.pad, chat.bos, chat.eos, chat.image
        self.vocab_size = backend.get_vocab_size()
        self.encode = lru_cache(maxsize=1 << 17)(self._encode)

    def _encode(self, text: str) -> tuple[int, ...]:
        """The ids of plain text, without special tokens; remembered, as questions repeat."""
        text = text if self.chat.template else _spaced(text)
        try:
            return tuple(self.backend.encode(text, add_special_tokens=False).ids)
        except Exception as error:  # half a pair of surrogates is a TypeError to tokenizers
            raise not_encodable(text, error) from error

    def decode(self, ids: Iterable[int]) -> str:
        """Ids to text, special tokens left out."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=True).strip()

    def fingerprint(self) -> str:
        """A short text that differs where ids or rows would."""
        own = repr(self.chat) if self.chat.template or self.chat.picture else ""
        return hashlib.sha256((self.backend.to_str() + own).encode()).hexdigest()[:16]

    def naming_places(self, words: Sequence[str]) -> Tokenizer:
        """The same tokenizer, for pictures whose media tokens stand behind words: "top left", "top right", ..."""
        picture = tuple(i for word in words for i in (*self.encode(word), self.image))
        return Tokenizer(self.backend, dataclasses.replace(self.chat, picture=picture))

    def save(self, path: Path) -> None:
        """Writes tokenizer.json, whole or not at all; before it, a chat model's format as chat_format.json."""
        path = Path(path)
        if self.chat.template or self.chat.picture:
            self.chat.save(path.with_name(CHAT_FORMAT))
        write_atomic(path, self.backend.to_str(pretty=True))

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Reads a tokenizer.json, with the chat_format.json beside it if there is one.

        Raises:
            DataError: no such file, or not a tokenizer.
        """
        from tokenizers import Tokenizer as Backend

        if not Path(path).is_file():
            raise DataError(
                f"no tokenizer at {path}", "a tokenizer.json", "train first, or copy it into the run folder"
            )
        try:
            beside = Path(path).with_name(CHAT_FORMAT)
            chat = ChatFormat.load(beside) if beside.is_file() else None
            return cls(Backend.from_file(str(path)), chat)
        except DataError:
            raise
        except Exception as error:
            raise DataError(f"{path}: {error}", "a tokenizer.json of the tokenizers library", "restore it") from error

    @classmethod
    def from_folder(cls, folder: Path, system: str | None = None) -> Tokenizer:
        """The tokenizer of a chat model, its conversations written as its own template has them.

        Args:
            system: the system message; see `ChatFormat.of_template`.

        Raises:
            DataError: no tokenizer or template there, or one that cannot be used for training.
        """
        from tokenizers import Tokenizer as Backend

        chat = ChatTokenizer.load(folder)
        fast = getattr(chat.backend, "backend_tokenizer", None)
        if fast is None:
            raise DataError(
                f"the tokenizer in {folder}, a {type(chat.backend).__name__}",
                "one that the tokenizers library has",
                "convert it to a tokenizer.json",
            )
        backend = Backend.from_str(fast.to_str())  # a copy: what is set on it changes nobody else's
        backend.no_padding()
        backend.no_truncation()
        return cls(backend, ChatFormat.of_template(chat, system))

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, phrases: Sequence[str] = ()) -> Tokenizer:
        """Byte-level BPE (arXiv 1508.07909) with at most `vocab_size` entries, special tokens and phrases included.

        Args:
            phrases: of several words, each of which becomes one token wherever a text has it.
        """
        from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
        from tokenizers import Tokenizer as Backend

        backend = Backend(models.BPE())
        # What stands behind a phrase is a text of its own to the backend, and gets no space that is not there.
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=not phrases)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - len(phrases),
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        backend.train_from_iterator(map(_spaced, texts), trainer)
        backend.add_tokens([AddedToken(f" {phrase}") for phrase in phrases])
        return cls(backend)


def _spaced(text: str) -> str:
    """With a space before the first word, so that a word or phrase has the same ids wherever it stands."""
    return text if text.startswith(" ") else f" {text}"
