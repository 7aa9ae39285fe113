"""TMRoPE (arXiv 2503.20215): a video and its sound, interleaved, share positions in time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mllm_jax.data.processing.media import PreparedMedia, Row


@dataclass(frozen=True)
class Timing:
    """The numbers that map time to positions.

    Attributes:
        steps: positions of a second.
        chunk: seconds of a video whose media tokens come before those of its sound in the same seconds.
        merge_size: side of the square of patches that is one media token.
    """

    steps: int
    chunk: int
    merge_size: int


def interleaved(video: PreparedMedia, sound_tokens: int, timing: Timing) -> list[tuple[int, slice]]:
    """Returns the chunks of a video's and its sound's media tokens in the order of the text.

    Returns:
        (0 for the video or 1 for the sound, the slice of its media tokens) of each chunk.
    """
    frames, height, width = video.grid
    tokens_a_frame = height * width // timing.merge_size**2
    seen = np.repeat(np.arange(frames) * video.seconds * timing.steps, tokens_a_frame)
    size = int(timing.steps * timing.chunk)
    chunks = [_chunks(times, size) for times in (seen, np.arange(sound_tokens))]
    return [(kind, own[i]) for i in range(max(map(len, chunks))) for kind, own in enumerate(chunks) if i < len(own)]


def _chunks(times: np.ndarray, size: int) -> list[slice]:
    """Returns the slices of the first `size` steps, of the next, and so on.

    As in the reference, a slice also ends at the second token of a step that lies beyond several such bounds.
    """
    found, start = [], 0
    for place, time in enumerate(times):
        if time >= (len(found) + 1) * size:
            found.append(slice(start, place))
            start = place
    return [*found, slice(start, len(times))]


def tmrope_positions(row: Row, media: Sequence[PreparedMedia], timing: Timing) -> np.ndarray:
    """Returns positions int[L, 3]: time, height and width; equal for text and for sound by itself.

    After an image or a video, positions continue after its largest. A video with sound shares its first position with
    the token before it, and its last with the token after it: with those that begin and end an image.
    """
    positions = np.zeros((len(row.tokens), 3), np.int32)
    inside = np.asarray([*(m.inside for m in media), False])
    groups = row.owners - inside[row.owners]  # of a sound inside a video, the video; -1 is text
    here = start = 0
    while here < len(groups):
        owner = groups[here]
        stop = here + int(np.argmin(np.append(groups[here:] == owner, False)))
        if owner < 0 or media[owner].grid is None:
            positions[here:stop] = (start + np.arange(stop - here))[:, None]
            start += stop - here
        elif media[owner].owners is None:
            positions[here:stop] = start + _grid(media[owner], timing)
            start = int(positions[here:stop].max()) + 1
        else:
            heard = int((row.owners[here:stop] == owner + 1).sum())
            kinds = start + _grid(media[owner], timing), start + np.repeat(np.arange(heard)[:, None], 3, axis=1)
            chunks = [kinds[kind][part] for kind, part in interleaved(media[owner], heard, timing)]
            positions[here] = max(start - 1, 0)
            positions[here + 1 : stop - 1] = np.concatenate(chunks)
            start = int(chunks[-1].max()) + 1
            positions[stop - 1] = start
        here = stop
    return positions


def _grid(media: PreparedMedia, timing: Timing) -> np.ndarray:
    """Returns int[n, 3]: time, height and width of an image's or a video's media tokens, each from 0."""
    frames, height, width = media.grid
    sides = height // timing.merge_size, width // timing.merge_size
    grid = np.indices((frames, *sides)).reshape(3, math.prod((frames, *sides))).T
    if media.seconds is not None:  # in float32 and cut off, as in the reference
        grid[:, 0] = (grid[:, 0].astype(np.float32) * np.float32(media.seconds) * np.float32(timing.steps)).astype(int)
    return grid
