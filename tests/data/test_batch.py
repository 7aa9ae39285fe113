"""The declared batch: its empty arrays, its refusals, and rows assembled by hand."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from mllm_jax.data.batch import (
    ROW,
    SEQ,
    SLOTS,
    ArraySpec,
    BatchSpec,
    assemble,
    images_spec,
    instruction_spec,
    target_spec,
    text_spec,
)
from mllm_jax.data.message import Image
from mllm_jax.data.processing.composed import ComposedLayout, ImageTokens
from mllm_jax.data.processing.media import Encoded, lay_out_row
from mllm_jax.errors import DataError

IMAGE, PAD = 9, 5
SPEC = text_spec(2, 12) | {"tokens": ArraySpec((2, 12), fill=PAD)} | images_spec(2, 3, 4)
LAYOUT = ComposedLayout({"image": ImageTokens(4, 2)}, IMAGE)


def test_nothing_in_it():
    batch = SPEC.empty()
    assert list(batch) == list(SPEC) == ["tokens", "positions", "segments", "media_index", "loss_weights", "images"]
    assert {name: (x.shape, str(x.dtype)) for name, x in batch.items()} == {
        name: (spec.shape, spec.dtype) for name, spec in SPEC.items()
    }
    assert (batch["tokens"] == PAD).all() and (batch["media_index"] == -1).all()
    assert not any(batch[name].any() for name in ("positions", "segments", "loss_weights", "images"))
    assert all(x.shape == (5, *SPEC[name].shape[1:]) for name, x in SPEC.empty(5).items())
    assert (SPEC.empty(5)["media_index"] == -1).all()
    assert batch["images"].dtype == np.uint8 and batch["loss_weights"].dtype == np.float32


def test_shapes_alone():
    abstract = SPEC.abstract()
    assert abstract.keys() == SPEC.keys()
    for name, x in abstract.items():
        assert isinstance(x, jax.ShapeDtypeStruct)
        assert (x.shape, str(x.dtype)) == (SPEC[name].shape, SPEC[name].dtype)


def test_the_arrays_of_each_kind():
    assert images_spec(2, 0, 4) == BatchSpec() and len(BatchSpec()) == 0
    assert SPEC["images"].axes == (ROW, SLOTS) and SPEC["tokens"].axes == (ROW, SEQ)
    wide = text_spec(2, 6, width=4, axes=3)
    assert wide["positions"].shape == (2, 6, 3) and wide["media_index"].shape == (2, 6, 4)
    assert wide["media_weights"] == ArraySpec((2, 6, 4), "float32") and "media_weights" not in text_spec(2, 6)
    assert set(target_spec(2, 6)) == {"decoder_tokens", "decoder_segments", "decoder_positions"}
    assert {spec.shape for spec in instruction_spec(2, 3, 7).values()} == {(2, 3, 7)}
    both = SPEC | target_spec(2, 6)
    assert set(both) == set(SPEC) | set(target_spec(2, 6)) and isinstance(both, BatchSpec)
    assert set(SPEC.without("images", "nothing")) == set(SPEC) - {"images"}


def test_a_batch_as_declared_passes_with_any_number_of_rows():
    SPEC.check(SPEC.empty())
    SPEC.check(SPEC.empty(7))
    SPEC.check(SPEC.without("images").empty())  # arrays may be absent


def test_keys_that_are_not_declared_and_other_sizes_are_refused_together():
    batch = SPEC.empty() | {"pixels": np.zeros((2, 3)), "tokens": np.zeros((2, 13), np.int32)}
    with pytest.raises(DataError) as refusal:
        SPEC.check(batch)
    assert "pixels, which is not declared" in refusal.value.given
    assert "tokens [2, 13], declared as [2, 12]" in refusal.value.given
    assert refusal.value.expected == f"the arrays {sorted(SPEC)}" and refusal.value.todo
    with pytest.raises(DataError, match=r"images \[2, 3, 4, 4\]"):
        SPEC.check({"images": np.zeros((2, 3, 4, 4), np.uint8)})


def encoded(ids, images=(), segments=None, **more) -> Encoded:
    media = LAYOUT.prepare([Image(np.full((4, 4, 3), shade, np.uint8)) for shade in images])
    row = lay_out_row(ids, media, [IMAGE], "a text")
    weights = (np.arange(len(row.tokens)) % 2).astype(np.float32)
    segments = None if segments is None else np.asarray(segments, np.int32)
    return Encoded(row, more.pop("loss_weights", weights), media, segments=segments, **more)


def test_two_rows_by_hand():
    rows = [
        [encoded([1, IMAGE, 2], [10]), encoded([IMAGE, 3, IMAGE], [20, 30])],
        [encoded([6, 7, 8]), encoded([1, 2, 1, 3, 4], segments=[1, 1, 2, 2, 2]), encoded([IMAGE], [50])],
    ]
    batch = assemble(rows, SPEC, LAYOUT, {"image": 3})
    wanted = dict(
        tokens=[[1, 9, 9, 2, 9, 9, 3, 9, 9, 5, 5, 5], [6, 7, 8, 1, 2, 1, 3, 4, 9, 9, 5, 5]],
        positions=[[0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 0, 0], [0, 1, 2, 0, 1, 0, 1, 2, 0, 1, 0, 0]],
        segments=[[1, 1, 1, 1, 2, 2, 2, 2, 2, 0, 0, 0], [1, 1, 1, 2, 2, 3, 3, 3, 4, 4, 0, 0]],
        media_index=[[-1, 0, 1, -1, 2, 3, -1, 4, 5, -1, -1, -1], [-1] * 8 + [0, 1, -1, -1]],
        loss_weights=[[0, 1, 0, 1, 0, 1, 0, 1, 0, 0, 0, 0], [0, 1, 0, 0, 1, 0, 1, 0, 0, 1, 0, 0]],
    )
    for name, values in wanted.items():
        np.testing.assert_array_equal(batch[name], values, err_msg=name)
    assert batch["images"][:, :, 0, 0, 0].tolist() == [[10, 20, 30], [50, 0, 0]]
    assert {name: (x.shape, str(x.dtype)) for name, x in batch.items()} == {
        name: (spec.shape, spec.dtype) for name, spec in SPEC.items()
    }
    SPEC.check(batch)


def test_rows_without_an_image_keep_their_slots():
    batch = assemble([[encoded([1, 2])], [encoded([3])]], SPEC, LAYOUT, {"image": 3})
    assert batch["images"].shape == (2, 3, 4, 4, 3) and not batch["images"].any()
    assert (batch["media_index"] == -1).all()


def test_more_images_than_slots_are_refused():
    with pytest.raises(DataError, match="a row with 4 images"):
        assemble([[encoded([IMAGE] * 4, [1, 2, 3, 4])]], SPEC, LAYOUT, {"image": 3})


def test_what_a_decoder_writes_and_a_projector_reads():
    """Checks fields beside the text: a target in the segment of its text, an instruction in the slots of its image."""
    spec = SPEC | target_spec(2, 6) | instruction_spec(2, 3, 4)
    targets = [np.asarray([0, 7, 8]), np.asarray([0, 6])]
    rows = [
        [
            encoded([1, IMAGE], [10], target=targets[0], loss_weights=np.float32([0, 1, 1]), instruction=np.int32([4])),
            encoded([2], target=targets[1], loss_weights=np.float32([0, 1]), instruction=np.int32([])),
        ],
        [
            encoded(
                [IMAGE, IMAGE], [1, 2], target=targets[1], loss_weights=np.float32([0, 1]), instruction=np.int32([5, 6])
            )
        ],
    ]
    batch = assemble(rows, spec, LAYOUT, {"image": 3})
    assert batch["tokens"][0, :4].tolist() == [1, IMAGE, IMAGE, 2]
    assert batch["decoder_tokens"].tolist() == [[0, 7, 8, 0, 6, 0], [0, 6, 0, 0, 0, 0]]
    assert batch["decoder_segments"].tolist() == [[1, 1, 1, 2, 2, 0], [1, 1, 0, 0, 0, 0]]
    assert batch["decoder_positions"].tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 0, 0, 0, 0]]
    assert batch["loss_weights"][:, :6].tolist() == [[0, 1, 1, 0, 1, 0], [0, 1, 0, 0, 0, 0]]
    assert batch["query_tokens"].tolist() == [
        [[4, 0, 0, 0], [0] * 4, [0] * 4],
        [[5, 6, 0, 0], [5, 6, 0, 0], [0] * 4],
    ]
    np.testing.assert_array_equal(batch["query_segments"], batch["query_tokens"] > 0)


def test_a_weighted_sum_at_a_position():
    """Checks media with one token a position, in a batch with room for the weighted sums of others."""
    spec = text_spec(1, 6, width=3) | images_spec(1, 1, 4)
    batch = assemble([[encoded([1, IMAGE], [10])]], spec, LAYOUT, {"image": 1})
    assert batch["media_index"][0].tolist() == [[-1] * 3, [0] * 3, [1] * 3, [-1] * 3, [-1] * 3, [-1] * 3]
    assert batch["media_weights"][0].tolist() == [[0.0] * 3, [1, 0, 0], [1, 0, 0], [0] * 3, [0] * 3, [0] * 3]
