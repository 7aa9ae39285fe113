"""A tokenizer with the special tokens that conversations need, kept as one tokenizer.json."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from mllm_jax.errors import DataError

PAD, BOS, EOS, IMAGE, USER, ASSISTANT = "<pad>", "<bos>", "<eos>", "<image>", "<user>", "<assistant>"
SPECIAL_TOKENS = (PAD, BOS, EOS, IMAGE, USER, ASSISTANT)


class Tokenizer:
    """Text to ids and back; a thin cover over `tokenizers.Tokenizer` that remembers what it has seen."""

    def __init__(self, backend):
        # Text that spells a special token stays text: no record or question can end an answer or forge a picture.
        backend.encode_special_tokens = True
        self.backend = backend
        ids = [backend.token_to_id(token) for token in SPECIAL_TOKENS]
        if None in ids:
            missing = [t for t, i in zip(SPECIAL_TOKENS, ids, strict=True) if i is None]
            raise DataError(f"a tokenizer without {missing}", f"the special tokens {SPECIAL_TOKENS}", "add them to it")
        self.pad, self.bos, self.eos, self.image, self.user, self.assistant = ids
        self.vocab_size = backend.get_vocab_size()
        self.encode = lru_cache(maxsize=1 << 17)(self._encode)

    def _encode(self, text: str) -> tuple[int, ...]:
        """The ids of plain text, without special tokens; remembered, as questions repeat."""
        return tuple(self.backend.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Iterable[int]) -> str:
        """Ids to text, special tokens left out."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=True).strip()

    def fingerprint(self) -> str:
        return hashlib.sha256(self.backend.to_str().encode()).hexdigest()[:16]

    def save(self, path: Path) -> None:
        self.backend.save(str(path))

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Reads a tokenizer.json.

        Raises:
            DataError: no such file, or not a tokenizer.
        """
        from tokenizers import Tokenizer as Backend

        if not Path(path).is_file():
            raise DataError(
                f"no tokenizer at {path}", "a tokenizer.json", "train first, or copy it into the run folder"
            )
        try:
            return cls(Backend.from_file(str(path)))
        except DataError:
            raise
        except Exception as error:
            raise DataError(f"{path}: {error}", "a tokenizer.json of the tokenizers library", "restore it") from error

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Byte-level BPE (arXiv 1508.07909) with at most `vocab_size` entries, special tokens included."""
        from tokenizers import Tokenizer as Backend
        from tokenizers import decoders, models, pre_tokenizers, trainers

        backend = Backend(models.BPE())
        # A space before the first word too, so that a word has the same ids wherever it stands.
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        return cls(backend)
