"""Compares a composed model with its reference class: folders, texts with images, logits, answers."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import torch
from einops import rearrange
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mllm_jax import Processor, from_pretrained, save_pretrained
from mllm_jax.generation.generate import complete

WORDS = ("<pad>", "<s>", "</s>", "user", "what", "is", "it", "?", "a", "cat", "dog", "Frame1:", "Frame2:", "two")
NEW_TOKENS = 32


def tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """Returns a tokenizer of words, with special tokens under the names that transformers' processors use."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = dict(pad_token="<pad>", eos_token="</s>")
    return PreTrainedTokenizerFast(tokenizer_object=backend, **ends, extra_special_tokens=special)


def make_image(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * 100 + width).integers(0, 256, (height, width, 3), np.uint8)


def prompts(placeholder: str) -> tuple[list[str], list[list[np.ndarray]]]:
    """Returns four texts of unequal length: one image, several of all shapes, none, one in the middle."""
    texts = [
        f"user {placeholder} what is it ?",
        f"{placeholder} a {placeholder} dog {placeholder} ?",
        "what is a cat ?",
        f"a cat is it {placeholder} two",
    ]
    return texts, [
        [make_image(16, 16)],
        [make_image(20, 61), make_image(50, 17), make_image(33, 30)],
        [],
        [make_image(9, 40)],
    ]


def check_composed(reference, processor, folder: Path, placeholder: str, assert_close):
    """Checks logits, answers of the batch and of each row alone, and the written folder.

    Args:
        reference: a model of transformers with random weights, saved in `folder` beside its processor's files.
        processor: transformers' own, with the image processor that needs no torchvision.

    Returns:
        The module and its parameters.
    """
    module, params = from_pretrained(folder)
    ours = Processor.from_pretrained(folder)
    texts, images = prompts(placeholder)
    batch = ours(texts, images=images)
    logits = np.asarray(jax.jit(module.apply)({"params": params}, batch).logits)
    how = dict(max_new_tokens=NEW_TOKENS, ignore_eos=True)
    answers = complete(module, params, batch, ours, **how)
    reference.generation_config.eos_token_id = None
    shown = []
    for row, (text, mine) in enumerate(zip(texts, images, strict=True)):
        inputs = processor(
            text=text, images=[Image.fromarray(each) for each in mine] or None, return_tensors="pt", padding=False
        )
        inputs.pop("num_patches", None)
        length = inputs["input_ids"].shape[1]
        np.testing.assert_array_equal(batch["tokens"][row, :length], inputs["input_ids"][0], err_msg=text)
        assert batch["segments"][row].sum() == length
        with torch.no_grad():
            assert_close(logits[row, :length], reference(**inputs).logits[0], 1e-4, f"logits of {text!r}")
            said = reference.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
        assert list(answers[row].tokens) == said[0, length:].tolist(), text
        shown.append(inputs)
    assert len({answer.tokens for answer in answers}) == len(texts), "equal answers prove nothing"

    # Padded to the batch's shapes, so that one compiled program answers all four.
    for text, mine, wanted in zip(texts, images, answers, strict=True):
        one = ours(text, images=mine, slots={"image": batch["images"].shape[1]}, length=batch["tokens"].shape[1])
        assert complete(module, params, one, ours, **how)[0].tokens == wanted.tokens, text

    save_pretrained(module, params, folder / "ours")
    opened, report = type(reference).from_pretrained(folder / "ours", output_loading_info=True)
    assert not any(report[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    kept = reference.state_dict()
    assert opened.state_dict().keys() == kept.keys()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in opened.state_dict().items())
    with torch.no_grad():
        assert_close(opened(**shown[1]).logits, reference(**shown[1]).logits, 1e-5, "written")
    return module, params, batch, shown


def tiles_of(shown: dict, name: str = "pixel_values") -> np.ndarray:
    """Returns transformers' pixels of a row's images: [tiles, H, W, 3]."""
    return rearrange(shown[name].numpy(), "n c h w -> n h w c")
