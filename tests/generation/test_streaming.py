"""Text that grows with its tokens: whole characters, and no part of a stop string."""

from __future__ import annotations

import pytest

from mllm_jax.generation.streaming import TextStream

TEXT = "Grüße, 你好 🦊👩‍🚀! Ende"


def from_bytes(ids) -> str:
    """Decodes ids as bytes."""
    return bytes(ids).decode("utf-8", errors="replace")


def in_words(ids) -> str:
    """Decodes ids without the space before the first word, as SentencePiece does."""
    return "".join(f" {chr(i)}" for i in ids).removeprefix(" ")


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 100])
def test_pieces_are_whole_characters_and_add_up(chunk):
    ids = TEXT.encode()
    stream = TextStream(from_bytes)
    pieces = [stream.push(ids[i : i + chunk]) for i in range(0, len(ids), chunk)]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) + stream.finish() == stream.text == TEXT
    if chunk == 1:
        assert sum(map(bool, pieces)) == len(TEXT), "characters should come as soon as they are complete"


def test_half_a_character_at_the_end_is_shown_as_the_tokenizer_shows_it():
    cut = "a🦊".encode()[:3]
    stream = TextStream(from_bytes)
    assert stream.push(cut) == "a", "what is whole need not wait"
    assert stream.finish() == from_bytes(cut)[1:] != ""
    assert stream.finish() == "" and stream.text == from_bytes(cut)


def test_spaces_between_words_are_kept():
    stream = TextStream(in_words)
    assert [stream.push([ord(c)]) for c in "abc"] == ["a", " b", " c"]


@pytest.mark.parametrize("chunk", [1, 2, 5, 100])
@pytest.mark.parametrize("stops", [("Ende",), (" Ende", "e, "), ("🦊",), ("de", "Ende")])
def test_the_text_ends_before_the_first_stop_string(chunk, stops):
    ids = list(TEXT.encode())
    stream = TextStream(from_bytes, stops)
    shown = ""
    for i in range(0, len(ids), chunk):
        shown += stream.push(ids[i : i + chunk])
        assert TEXT.startswith(shown) and not any(stop in shown for stop in stops)
    assert stream.stopped and stream.finish() == ""
    # The tokens end where the first stop string is complete.
    n = next(n for n in range(len(ids) + 1) if any(stop in from_bytes(ids[:n]) for stop in stops))
    assert stream.ids == ids[:n]
    assert shown == stream.text == TEXT[: min(p for stop in stops if (p := from_bytes(ids[:n]).find(stop)) >= 0)]


def test_what_only_looks_like_a_stop_string_comes_out():
    stream = TextStream(from_bytes, ("stop!",))
    assert stream.push(b"do not sto") == "do not "
    assert stream.push(b"re it, st") == "store it, "
    assert stream.finish() == "st" and stream.text == "do not store it, st" and not stream.stopped
