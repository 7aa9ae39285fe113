"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL against transformers: logits, positions, answers and written folders."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
import torch
import transformers
from composed_checks import NEW_TOKENS, WORDS, prompts, tokenizer
from einops import rearrange
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from mllm_jax import Processor, Video, from_pretrained, save_pretrained
from mllm_jax.data.image_processors import read_image_processor
from mllm_jax.errors import ConfigError
from mllm_jax.generation.generate import complete
from mllm_jax.models.qwen_vl import QwenVLLayout
from mllm_jax.models.registry import pretrained_config

IMAGE, VIDEO, START, END = (len(WORDS) + i for i in range(4))
TEXT = dict(
    vocab_size=len(WORDS) + 4,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
OLD_ROPE = dict(rope_type="default", rope_theta=1000.0, mrope_section=[2, 1, 1])
TOWER = dict(depth=2, num_heads=2, patch_size=4, spatial_merge_size=2, temporal_patch_size=2)
WINDOWS = dict(hidden_size=24, intermediate_size=40, out_hidden_size=32, window_size=16, fullatt_block_indexes=[1])
# The class; text_config, vision_config, the rest.
CASES = {
    "2": ("Qwen2VL", dict(rope_parameters=OLD_ROPE), TOWER | dict(embed_dim=24, hidden_size=32), {}),
    "2, tied": (
        "Qwen2VL",
        dict(rope_parameters=OLD_ROPE | dict(mrope_section=[1, 1, 2]), num_key_value_heads=4),
        TOWER | dict(embed_dim=16, hidden_size=32, mlp_ratio=2),
        dict(tie_word_embeddings=True),
    ),
    "2, late windows in the LLM": (
        "Qwen2VL",
        dict(rope_parameters=OLD_ROPE, num_key_value_heads=1, hidden_act="gelu")
        | dict(use_sliding_window=True, sliding_window=11, max_window_layers=1),
        TOWER | dict(depth=1, num_heads=4, embed_dim=32, hidden_size=32, hidden_act="gelu"),
        {},
    ),
    "2.5": ("Qwen2_5_VL", dict(rope_parameters=OLD_ROPE), TOWER | WINDOWS, {}),
    "2.5, tied, wider windows": (
        "Qwen2_5_VL",
        dict(rope_parameters=OLD_ROPE | dict(rope_theta=50.0)),
        TOWER | WINDOWS | dict(depth=3, window_size=24, fullatt_block_indexes=[0, 2], tokens_per_second=3),
        dict(tie_word_embeddings=True),
    ),
    "2.5, no layer of the whole image": (
        "Qwen2_5_VL",
        dict(rope_parameters=OLD_ROPE | dict(mrope_section=[2, 0, 2]), num_key_value_heads=1, rms_norm_eps=1e-2),
        TOWER | WINDOWS | dict(num_heads=3, fullatt_block_indexes=[], window_size=8, hidden_act="gelu"),
        {},
    ),
    "3": (
        "Qwen3VL",
        dict(head_dim=12, rope_parameters=dict(rope_type="default", rope_theta=500.0, mrope_section=[2, 2, 2])),
        TOWER
        | dict(hidden_size=24, intermediate_size=40, out_hidden_size=32, num_position_embeddings=16)
        | dict(deepstack_visual_indexes=[0]),
        {},
    ),
    "3, two deepstack layers, tied": (
        "Qwen3VL",
        dict(head_dim=8, rope_parameters=dict(rope_type="default", rope_theta=500.0, mrope_section=[2, 1, 1])),
        TOWER
        | dict(depth=3, hidden_size=16, intermediate_size=24, out_hidden_size=32, num_position_embeddings=9)
        | dict(deepstack_visual_indexes=[0, 2]),
        dict(tie_word_embeddings=True),
    ),
    "3, biases, deepstack from the last layers": (
        "Qwen3VL",
        dict(head_dim=8, rope_parameters=dict(rope_type="default", rope_theta=90.0, mrope_section=[2, 1, 1]))
        | dict(attention_bias=True, num_key_value_heads=4, hidden_act="gelu"),
        TOWER
        | dict(depth=3, num_heads=3, hidden_size=36, intermediate_size=20, out_hidden_size=32, hidden_act="gelu")
        | dict(num_position_embeddings=25, deepstack_visual_indexes=[1, 2]),
        {},
    ),
}
WRAPPED = "<|vision_start|> <|image_pad|> <|vision_end|>"


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory, randomise):
    """Returns (reference, folder, whether it takes videos)."""
    name, text, vision, rest = CASES[request.param]
    folder = tmp_path_factory.mktemp("qwen_vl")
    ids = dict(image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END)
    parts = dict(text_config=TEXT | text, vision_config=vision)
    config = getattr(transformers, f"{name}Config")(**parts, **ids, **rest)
    reference = randomise(getattr(transformers, f"{name}ForConditionalGeneration")(config)).eval()
    reference.tie_weights()
    reference.save_pretrained(folder)
    names = dict(
        image_token="<|image_pad|>",
        video_token="<|video_pad|>",
        vision_bos_token="<|vision_start|>",
        vision_eos_token="<|vision_end|>",
    )
    words = tokenizer(**names)
    assert words.convert_tokens_to_ids(list(names.values())) == [IMAGE, VIDEO, START, END]
    words.save_pretrained(folder)
    image_processor = Qwen2VLImageProcessorPil(
        patch_size=4, temporal_patch_size=2, merge_size=2, size=dict(shortest_edge=128, longest_edge=1024)
    )
    image_processor.save_pretrained(folder)
    return reference, folder, image_processor, name != "Qwen3VL"


def reference_inputs(reference, tokens, image_processor, images, frames=None) -> dict:
    """Returns the inputs of transformers' models for a row whose tokens already have positions for media."""
    kinds = np.where(tokens == IMAGE, 1, np.where(tokens == VIDEO, 2, 0))
    inputs = dict(
        input_ids=torch.tensor(tokens[None].astype(np.int64)),
        mm_token_type_ids=torch.tensor(kinds[None], dtype=torch.int32),
    )
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if images:
        done = image_processor(images=list(images), return_tensors="pt", input_data_format="channels_last")
        inputs |= dict(pixel_values=done["pixel_values"], image_grid_thw=done["image_grid_thw"])
    if frames is not None:
        mean, std = (np.array(x, np.float32) for x in (image_processor.image_mean, image_processor.image_std))
        pixels = (frames.astype(np.float32) / 255 - mean) / std
        cut = "(f t) (h p a) (w q b) c -> (f h w p q) (c t a b)"
        patches = rearrange(pixels, cut, t=2, p=2, q=2, a=4, b=4)
        grid = [[len(frames) // 2, frames.shape[1] // 4, frames.shape[2] // 4]]
        inputs |= dict(pixel_values_videos=torch.tensor(patches), video_grid_thw=torch.tensor(grid))
        if reference.config.model_type == "qwen2_5_vl":
            inputs["second_per_grid_ts"] = torch.tensor([1.0])
    return inputs


def test_logits_answers_and_folder(case, assert_close):
    reference, folder, image_processor, takes_videos = case
    module, params = from_pretrained(folder)
    ours = Processor.from_pretrained(folder)
    texts, images = prompts(WRAPPED)
    videos = None
    frames = np.random.default_rng(5).integers(0, 256, (4, 16, 24, 3), np.uint8)
    if takes_videos:
        texts[2], videos = "<|vision_start|> <|video_pad|> <|vision_end|> is it a dog ?", [Video(frames, fps=2)]
    batch = ours(texts, images=images, videos=videos)
    logits = np.asarray(jax.jit(module.apply)({"params": params}, batch).logits)
    how = dict(max_new_tokens=NEW_TOKENS, ignore_eos=True)
    answers = complete(module, params, batch, ours, **how)
    reference.generation_config.eos_token_id = None
    for row, (text, mine) in enumerate(zip(texts, images, strict=True)):
        length = int(batch["segments"][row].sum())
        shown = frames if takes_videos and row == 2 else None
        inputs = reference_inputs(reference, batch["tokens"][row, :length], image_processor, mine, shown)
        if mine or shown is not None:
            given = {n: x for n, x in inputs.items() if n.endswith(("_thw", "_ts")) or n == "mm_token_type_ids"}
            places, _ = reference.model.get_rope_index(inputs["input_ids"], **given)
            np.testing.assert_array_equal(batch["positions"][row, :length].T, places[:, 0], err_msg=text)
        with torch.no_grad():
            assert_close(logits[row, :length], reference(**inputs).logits[0], 1e-4, f"logits of {text!r}")
            said = reference.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
        assert list(answers[row].tokens) == said[0, length:].tolist(), text
    assert len({answer.tokens for answer in answers}) == len(texts), "equal answers prove nothing"
    for row, (text, mine) in enumerate(zip(texts, images, strict=True)):
        size = dict(slots={"image": batch["patches"].shape[1]}, length=batch["tokens"].shape[1])
        one = ours(text, images=mine, videos=videos if row == 2 else None, **size)
        assert complete(module, params, one, ours, **how)[0].tokens == answers[row].tokens, text

    save_pretrained(module, params, folder / "ours")
    opened, report = type(reference).from_pretrained(folder / "ours", output_loading_info=True)
    assert not any(report[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    kept = reference.state_dict()
    assert opened.state_dict().keys() == kept.keys()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in opened.state_dict().items())
    length = int(batch["segments"][1].sum())
    inputs = reference_inputs(reference, batch["tokens"][1, :length], image_processor, images[1])
    with torch.no_grad():
        assert_close(opened(**inputs).logits, reference(**inputs).logits, 1e-5, "written")


def test_a_processor_of_other_patches_is_refused(case):
    _, folder, _, _ = case
    config, processor = pretrained_config(folder), read_image_processor(folder)
    with pytest.raises(ConfigError, match="do not belong together"):
        QwenVLLayout(config, dataclasses.replace(processor, patch_size=7))
