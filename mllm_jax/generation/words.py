"""Splits the tokens of a text into words, as transformers' Whisper tokenizer does."""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence

Group = tuple[str, list[int]]  # a text, and the positions of its tokens

BEFORE = "\"'“¡¿([{-"  # punctuation that belongs to the next word
AFTER = "\"'.。,，!！?？:：”)]}、"  # punctuation that belongs to the word before it
BROKEN = "\ufffd"


def split_words(tokens: Sequence[int], decode: Callable[[Sequence[int]], str], spaces: bool = True) -> list[Group]:
    """Returns the words with their punctuation and spaces.

    Args:
        tokens: of text alone.
        decode: tokens to text, spaces kept.
        spaces: the language has spaces between words; without, each character is a word.
    """
    characters = _characters(tokens, decode)
    return _punctuated(_spaced(characters) if spaces else characters)


def _characters(tokens: Sequence[int], decode: Callable[[Sequence[int]], str]) -> list[Group]:
    """Returns the smallest groups of tokens that are whole characters."""
    whole, found, begun, done = decode(tokens), [], 0, 0
    for end in range(1, len(tokens) + 1):
        text = decode(tokens[begun:end])
        at = done + text.find(BROKEN) if BROKEN in text else None
        if at is None or at >= len(whole) or whole[at] == BROKEN:
            found.append((text, list(range(begun, end))))
            begun, done = end, done + len(text)
    return found


def _spaced(characters: list[Group]) -> list[Group]:
    """Joins groups up to the next space or punctuation."""
    found: list[Group] = []
    for text, places in characters:
        if not found or text.startswith(" ") or text.strip() in string.punctuation:
            found.append((text, places))
        else:
            found[-1] = found[-1][0] + text, found[-1][1] + places
    return found


def _punctuated(words: list[Group]) -> list[Group]:
    """Joins punctuation with the word that it belongs to."""
    found: list[Group] = []
    for text, places in reversed(words):
        if found and text.startswith(" ") and text.strip() in BEFORE:
            found[-1] = text + found[-1][0], places + found[-1][1]
        else:
            found.append((text, places))
    joined: list[Group] = []
    for text, places in reversed(found):
        if joined and text in AFTER and not joined[-1][0].endswith(" "):
            joined[-1] = joined[-1][0] + text, joined[-1][1] + places
        else:
            joined.append((text, places))
    return joined
