"""Decoding of tokens to text as they arrive."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

UNFINISHED = "\ufffd"  # a tokenizer's output for an incomplete character

Decode = Callable[[Sequence[int]], str]


class TextStream:
    """The text of one answer in pieces, which joined are the text.

    A piece is held back while its last character lacks bytes, and while its end may begin a stop string.

    Args:
        decode: ids to text, spaces kept as they are.
        stop_strings: the text ends before the first of them.
    """

    def __init__(self, decode: Decode, stop_strings: Sequence[str] = ()):
        self._decode, self._stops = decode, tuple(stop_strings)
        self.ids: list[int] = []
        self.text = ""  # all decoded text, held back or not
        self.stopped = False
        self._given = 0  # characters returned
        # Ids before `_start` are final. Those from `_start` to `_read` are decoded again with the ids after them, as
        # some tokenizers decode a token differently at the beginning of a text.
        self._start = self._read = 0
        self._ahead = 0  # characters after `_read` that are in the text while a later one lacks bytes

    def push(self, ids: Iterable[int]) -> str:
        """Takes the next tokens, up to the one that completes a stop string. Returns the text that is safe to show."""
        ids = [int(i) for i in ids]
        each = 1 if self._stops else max(len(ids), 1)  # one by one only if there are stop strings
        for i in range(0, len(ids), each):
            if not self.stopped:
                self.ids += ids[i : i + each]
                self._grow(final=False)
        return self._give(len(self.text) if self.stopped else len(self.text) - self._suspects())

    def finish(self) -> str:
        """Returns the text that was held back, as no token follows."""
        if not self.stopped:
            self._grow(final=True)
        return self._give(len(self.text))

    def _grow(self, final: bool) -> None:
        before = self._decode(self.ids[self._start : self._read])
        after = self._decode(self.ids[self._start :])
        whole = after if final else after.rstrip(UNFINISHED)
        new = whole[len(before) + self._ahead :]
        if new:
            self._ahead += len(new)
        if self._ahead and whole == after:
            self._start, self._read, self._ahead = self._read, len(self.ids), 0
        searched = max(0, len(self.text) - max(map(len, self._stops), default=0))
        self.text += new
        places = [place for stop in self._stops if (place := self.text.find(stop, searched)) >= 0]
        if places:
            self.text, self.stopped = self.text[: min(places)], True

    def _suspects(self) -> int:
        """Returns the number of characters at the end that begin a stop string."""
        ends = (n for stop in self._stops for n in range(1, len(stop)) if self.text.endswith(stop[:n]))
        return max(ends, default=0)

    def _give(self, until: int) -> str:
        piece = self.text[self._given : until]
        self._given = max(self._given, until)
        return piece
