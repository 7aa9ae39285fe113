"""Tokens to text while they come."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

UNFINISHED = "\ufffd"  # what a tokenizer gives for the bytes of a character that are not all there

Decode = Callable[[Sequence[int]], str]


class TextStream:
    """The text of one answer, piece by piece; the pieces together are the text.

    A piece is held back while its last character lacks bytes, and while its end may be the beginning of a stop string.

    Args:
        decode: ids to text, spaces kept as they are.
        stop_strings: the text ends before the first place where one of them stands.
    """

    def __init__(self, decode: Decode, stop_strings: Sequence[str] = ()):
        self._decode, self._stops = decode, tuple(stop_strings)
        self.ids: list[int] = []
        self.text = ""  # what is decoded, held back or not
        self.stopped = False
        self._given = 0  # characters handed out
        # Ids before `_start` are settled; those from `_start` to `_read` are decoded again with what follows, as some
        # tokenizers write a token differently at the beginning of a text.
        self._start = self._read = 0
        self._ahead = 0  # characters of what follows `_read` that are in the text, as a later one lacks bytes

    def push(self, ids: Iterable[int]) -> str:
        """Takes the next tokens, up to the one that completes a stop string; gives the text that is safe to show."""
        ids = [int(i) for i in ids]
        each = 1 if self._stops else max(len(ids), 1)  # one by one only where the place matters
        for i in range(0, len(ids), each):
            if not self.stopped:
                self.ids += ids[i : i + each]
                self._grow(final=False)
        return self._give(len(self.text) if self.stopped else len(self.text) - self._suspects())

    def finish(self) -> str:
        """What was held back, as no token follows."""
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
        """How many characters at the end begin a stop string."""
        ends = (n for stop in self._stops for n in range(1, len(stop)) if self.text.endswith(stop[:n]))
        return max(ends, default=0)

    def _give(self, until: int) -> str:
        piece = self.text[self._given : until]
        self._given = max(self._given, until)
        return piece
