"""Another tokenizer for a named model: the ids of its media, and each token's row in the stored vocabulary."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from mllm_jax.data.chat_tokenizer import ChatTokenizer
from mllm_jax.errors import ConfigError, DataError

_IDS = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
# A prefix for a chat template that takes only texts: a list of parts becomes a text with the tokens of media.
_FLAT = """\
{%- set flat = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- if message['content'] is string -%}
{%- set flat.messages = flat.messages + [message] -%}
{%- else -%}
{%- set said = namespace(text='') -%}
{%- for part in message['content'] -%}
{%- set said.text = said.text + (part['text'] if part['type'] == 'text' else MARKS[part['type']] + '\\n') -%}
{%- endfor -%}
{%- set flat.messages = flat.messages + [{'role': message['role'], 'content': said.text}] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = flat.messages -%}
"""


def with_ids_of(stored: Any, config: Any) -> Any:
    """Returns the stored config with the vocabulary and special tokens' ids of another config of the same class."""
    media = {name: getattr(config, name) for name in placeholder_fields(config)}
    own = {field.name for field in fields(stored.llm)} & set(_IDS)
    return replace(stored, llm=replace(stored.llm, **{name: getattr(config.llm, name) for name in own}), **media)


def placeholder_fields(config: Any) -> tuple[str, ...]:
    """Returns the fields with the ids of a named model's media; empty if its layout needs more than ids."""
    named = getattr(config, "placeholder_fields", ())
    return tuple(name for name in named if getattr(config, name) is not None)


def own_tokenizer(config: Any, folder: str | Path, source: str | Path, template: str | None = None) -> ChatTokenizer:
    """Returns the tokenizer of a folder, with the special tokens for a named model's media.

    Args:
        config: the model's, as stored in its folder.
        folder: the other tokenizer's.
        source: the model's folder, with the tokenizer that it was trained with.
        template: a chat template that replaces the other tokenizer's.

    Raises:
        ConfigError: the model's layout needs more of its tokenizer, or special tokens clash.
        DataError: there is no tokenizer, or no chat template.
    """
    names = placeholder_fields(config)
    if not names:
        raise ConfigError(
            f"{config.family} with the tokenizer of {folder}",
            "the model's own, because its prompts need tokens that only that one has",
            f"set tokenizer.folder to {str(source)!r}, or compose a MultimodalConfig of its parts",
        )
    ours, theirs = ChatTokenizer.load(folder), ChatTokenizer.load(source)
    marks = {name.removesuffix("_token_id"): theirs.token_of(getattr(config, name)) for name in names}
    for kind, token in marks.items():
        if token is None:
            raise ConfigError(
                f"{source}: {kind}_token_id {getattr(config, f'{kind}_token_id')}, which its tokenizer does not have",
                "the id of a token",
                "restore config.json and the tokenizer's files",
            )
        if ours.id_of(token) is None:
            ours.backend.add_special_tokens({"additional_special_tokens": [token]}, False)
        check_placeholder(ours, kind, ours.id_of(token), str(folder))
    if template is not None:
        ours.backend.chat_template = template
    elif not ours.has_template:
        raise ConfigError(
            f"{folder}: a tokenizer without a chat template",
            "a chat template for questions and answers",
            "give TokenizerConfig.template, or take the tokenizer of a chat model",
        )
    elif not _takes_parts(ours, marks):
        mapping = "{" + ", ".join(f"{kind!r}: {token!r}" for kind, token in marks.items()) + "}"
        ours.backend.chat_template = _FLAT.replace("MARKS", mapping) + str(ours.template)
    return ours


def check_placeholder(tokenizer: Any, kind: str, token_id: int, where: str) -> None:
    """Refuses a token for media that a text could contain for another reason.

    Raises:
        ConfigError: it is a word, or a token that pads, begins or ends a text.
    """
    token = tokenizer.token_of(token_id)
    given = f"{where}: {token!r} (id {token_id}), which stands for a medium of kind {kind!r} and is also "
    todo = "give the tokenizer a special token of its own for it, or name another tokenizer"
    meant = {"padding": [tokenizer.pad_token_id], "the beginning of a text": [tokenizer.bos_token_id]}
    for what, ids in (meant | {"the end of an answer": tokenizer.stop_ids}).items():
        if token_id in ids:
            raise ConfigError(given + what, "a token with no other meaning", todo)
    if token not in tokenizer.special_tokens:
        raise ConfigError(given + "an ordinary word", "a special token", todo)


def with_vocabulary(config: Any, ours: ChatTokenizer, theirs: ChatTokenizer) -> Any:
    """Returns the config of a named model with the vocabulary and the special tokens of another tokenizer.

    Args:
        theirs: the tokenizer that the config's ids belong to.
    """
    ids = dict(
        vocab_size=len(ours.backend),
        bos_token_id=ours.bos_token_id,
        eos_token_id=ours.stop_ids,
        pad_token_id=ours.pad_token_id,
    )
    own = {field.name for field in fields(config.llm)} & set(_IDS)
    media = {name: ours.id_of(theirs.token_of(getattr(config, name))) for name in placeholder_fields(config)}
    return replace(config, llm=replace(config.llm, **{name: ids[name] for name in own}), **media)


def rows_of(ours: ChatTokenizer, theirs: ChatTokenizer, held: int) -> np.ndarray:
    """Returns int[n], for each of our tokens the id of theirs with the same text; -1: no such token, or no row for it.

    Args:
        held: the number of rows of the stored vocabulary.
    """
    known = {text: number for text, number in _spelled(theirs).items() if number < held}
    rows = np.full(len(ours.backend), -1, np.int64)
    for text, number in _spelled(ours).items():
        rows[number] = known.get(text, -1)
    return rows


def _spelled(tokenizer: ChatTokenizer) -> dict[tuple[bool, bytes], int]:
    """Returns {(whether it is special, its bytes): id} of the tokens, independent of the tokenizer's spelling."""
    backend = getattr(tokenizer.backend, "backend_tokenizer", None)
    bytewise = backend is not None and '"ByteLevel"' in json.dumps(json.loads(backend.to_str()).get("decoder"))
    special, added = set(tokenizer.special_tokens), set(tokenizer.backend.get_added_vocab())
    table = _byte_letters() if bytewise else {}
    found: dict[tuple[bool, bytes], int] = {}
    for token, number in sorted(tokenizer.backend.get_vocab().items(), key=lambda item: item[1]):
        if token in added:
            text = token.encode()
        elif bytewise:
            text = bytes(table[letter] for letter in token) if set(token) <= table.keys() else token.encode()
        elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            text = bytes([int(token[3:5], 16)])
        else:
            text = token.replace("\u2581", " ").encode("utf-8", "surrogatepass")
        found.setdefault((token in special, text), number)
    return found


def _byte_letters() -> dict[str, int]:
    """Returns the letters that byte-level tokenizers use for bytes (GPT-2)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(b): b for b in plain} | {chr(256 + number): byte for number, byte in enumerate(others)}


def _takes_parts(tokenizer: ChatTokenizer, marks: dict[str, str]) -> bool:
    """Returns whether the chat template writes texts and media tokens for content that is a list of parts."""
    for kind, token in marks.items():
        asked = [{"type": kind}, {"type": "text", "text": "wombat"}]
        try:
            written = tokenizer.render_chat([{"role": "user", "content": asked}])
        except DataError:
            return False
        if token not in written or "wombat" not in written or "'type'" in written:
            return False
    return True
