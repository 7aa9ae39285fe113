"""InstructBLIP with Vicuna and Flan-T5 against InstructBlipForConditionalGeneration, and LAVIS' loss and gradients."""

from __future__ import annotations

import numpy as np
import pytest
from blip_reference import IMAGES, LLAMA, T5, TEXTS, Checks, build

CASES = {
    "vicuna": dict(text=LLAMA, qformer={}, queries=5, eos=7, seed=0),
    "vicuna, every third layer": dict(
        text=LLAMA | dict(num_key_value_heads=4),
        qformer=dict(cross_attention_frequency=3, num_hidden_layers=3),
        queries=2,
        eos=20,
        seed=1,
    ),
    "flan-t5": dict(text=T5, qformer={}, queries=3, eos=31, seed=2),
}


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory, randomise):
    return build("InstructBlip", **CASES[request.param], randomise=randomise, folder=tmp_path_factory.mktemp("folder"))


class TestInstructBlip(Checks):
    """Runs the tests shared with BLIP-2."""


def test_the_instruction_for_the_queries(case):
    """Checks that every image's queries get the ids of the text from the Q-Former's own tokenizer."""
    batch = case.batch()
    assert batch["query_tokens"].shape[:2] == batch["images"].shape[:2]
    for row in range(len(TEXTS)):
        theirs = case.theirs(row)["qformer_input_ids"].numpy()
        for slot in range(len(IMAGES[row])):
            real = batch["query_segments"][row, slot] > 0
            np.testing.assert_array_equal(batch["query_tokens"][row, slot][real], theirs[slot])
    assert "query_tokens" not in case.processor(TEXTS[:2])


def test_a_place_for_an_image_is_no_part_of_the_instruction(case):
    with_place = case.processor("<image> " + TEXTS[1], images=IMAGES[0])
    without = case.processor(TEXTS[1], images=IMAGES[0])
    np.testing.assert_array_equal(with_place["query_segments"], without["query_segments"])
    np.testing.assert_array_equal(with_place["query_tokens"], without["query_tokens"])


def test_the_instruction_is_what_a_message_says(case, monkeypatch):
    template = "{% for p in messages[0]['content'] %}{{ p['text'] if p['type'] == 'text' else '' }}{% endfor %}"
    monkeypatch.setattr(case.processor.tokenizer.backend, "chat_template", template)
    said = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": TEXTS[1]}]}]
    batch, wanted = case.processor(said, images=IMAGES[0]), case.processor(TEXTS[1], images=IMAGES[0])
    for name in ("query_tokens", "query_segments", "images"):
        np.testing.assert_array_equal(batch[name], wanted[name])
