"""The chat template of tokenizers that are trained here, and text in it that must stay plain text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mllm_jax.errors import DataError

PAD, BOS, EOS, IMAGE, USER, ASSISTANT = "<pad>", "<bos>", "<eos>", "<image>", "<user>", "<assistant>"
SPECIAL_TOKENS = (PAD, BOS, EOS, IMAGE, USER, ASSISTANT)

# <bos> (media and texts of a question but its last) <user> question <assistant> answer <eos> ...
# A word has the same ids at every position, so each text begins with a space. `own_text` writes the same.
OWN_TEMPLATE = """\
{%- macro spaced(text) -%}{{ text if text.startswith(' ') else ' ' + text }}{%- endmacro -%}
{{- bos_token -}}
{%- for message in messages -%}
{%- set parts = [{'type': 'text', 'text': message.content}] if message.content is string else message.content -%}
{%- if message.role == 'assistant' -%}<assistant>
{%- elif message.role == 'user' and (not parts or parts[-1].type != 'text') -%}
{%- set parts = parts + [{'type': 'end'}] -%}
{%- endif -%}
{%- for part in parts -%}
{%- if message.role == 'user' and loop.last -%}<user>{%- endif -%}
{%- if part.type == 'image' -%}<image>{%- elif part.type == 'text' -%}{{- spaced(part.text) -}}{%- endif -%}
{%- endfor -%}
{%- if message.role == 'assistant' -%}{{- eos_token -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<assistant>{%- endif -%}
"""

_WRITTEN = {"image": IMAGE, "text": None}  # nothing for parts of other types

# A character that occurs in no text (Unicode reserves it for programs). It splits text that spells a special token.
SEAM = "\ufdd0"


def own_text(messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
    """Renders messages as OWN_TEMPLATE does, without the cost of a template: sources have millions of them."""
    pieces = [BOS]
    for message in messages:
        role, content = message["role"], message["content"]
        if isinstance(content, str):
            said = [spaced(content)]
        else:
            said = [_WRITTEN[part["type"]] or spaced(part["text"]) for part in content if part["type"] in _WRITTEN]
            # Parts after the last text belong before the question, which is then empty.
            if role == "user" and (not content or content[-1]["type"] != "text"):
                said.append("")
        if role == "user":
            said.insert(-1, USER)
        pieces += [ASSISTANT, *said, EOS] if role == "assistant" else said
    return "".join(pieces) + (ASSISTANT if add_generation_prompt else "")


def spaced(text: str) -> str:
    """Adds a space before the first word, so that a word or phrase has the same ids at every position."""
    return text if text.startswith(" ") else f" {text}"


def parted(text: str, special: Sequence[str]) -> str:
    """Inserts a SEAM into each special token that a text spells, so that no text can end an answer or forge media.

    Raises:
        DataError: a text that already has a SEAM.
    """
    if SEAM in text:
        raise DataError(f"a text with the character U+{ord(SEAM):X} in it", "text", "remove the character")
    for token in special:
        if token in text:
            text = text.replace(token, f"{token[:1]}{SEAM}{token[1:]}")
    return text
