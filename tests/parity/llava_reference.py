"""Tiny LLaVA models of transformers, with tokenizer and processors, as folders; and batches for both sides."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

MARKS = ("<pad>", "<s>", "</s>", "user:", "assistant:", "?")
WORDS = (*MARKS, "what", "is", "in", "this", "and", "that", "picture", "left", "right", "red", "cat", "dog")
ID = {word: i for i, word in enumerate(WORDS)}
IMAGE, VIDEO = len(WORDS), len(WORDS) + 1  # ids, after the words
TEMPLATE = """{% for m in messages %}{{ m['role'] + ': ' }}{% if m['content'] is string %}{{ m['content'] + ' ' }}\
{% else %}{% for p in m['content'] %}{{ ('<' + p['type'] + '>' if p['type'] != 'text' else p['text']) + ' ' }}\
{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"""

SIDE = 12
CLIP = dict(
    model_type="clip_vision_model",
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=2,
    image_size=SIDE,
    patch_size=4,
    layer_norm_eps=1e-2,
)
SIGLIP = CLIP | dict(model_type="siglip_vision_model", vision_use_head=False)
TEXT = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=len(WORDS) + 2,
    max_position_embeddings=512,
    rms_norm_eps=1e-3,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
LLAMA, MISTRAL = TEXT | dict(model_type="llama"), TEXT | dict(model_type="mistral", sliding_window=9)
QWEN2 = TEXT | dict(model_type="qwen2")
WIDE, SQUARE, TALL = [SIDE, 2 * SIDE], [2 * SIDE, 2 * SIDE], [3 * SIDE, SIDE]
GRIDS = [WIDE, WIDE[::-1], SQUARE, TALL, TALL[::-1]]
# The class, its vision_config and text_config, and the rest of config.json.
CASES = {
    "llava": ("Llava", CLIP, LLAMA, {}),
    "llava, all tokens of two layers": (
        "Llava",
        CLIP | dict(hidden_act="gelu"),
        MISTRAL,
        dict(
            vision_feature_layer=[-1, 1],
            vision_feature_select_strategy="full",
            multimodal_projector_bias=False,
            projector_hidden_act="relu",
        ),
    ),
    "llava, siglip and qwen2": (
        "Llava",
        SIGLIP,
        QWEN2 | dict(tie_word_embeddings=True),
        dict(vision_feature_select_strategy="full", vision_feature_layer=-2),
    ),
    "next": ("LlavaNext", CLIP, LLAMA, dict(image_grid_pinpoints=GRIDS)),
    "next, two layers and mistral": (
        "LlavaNext",
        CLIP,
        MISTRAL,
        dict(image_grid_pinpoints=GRIDS[2:], vision_feature_layer=[-2, 2], multimodal_projector_bias=False),
    ),
    "next, qwen2": (
        "LlavaNext",
        CLIP | dict(image_size=16),
        QWEN2,
        dict(image_grid_pinpoints=[[16, 32], [32, 16], [32, 32]], tie_word_embeddings=True),
    ),
    "onevision": (
        "LlavaOnevision",
        SIGLIP,
        QWEN2,
        dict(image_grid_pinpoints=GRIDS, vision_aspect_ratio="anyres_max_2"),
    ),
    "onevision, two layers, tied": (
        "LlavaOnevision",
        SIGLIP | dict(image_size=16),
        QWEN2 | dict(tie_word_embeddings=True),
        dict(
            image_grid_pinpoints=[[16, 32], [32, 32], [16, 16]],
            vision_feature_layer=[-1, -3],
            projector_hidden_act="silu",
        ),
    ),
    "onevision, clip and llama": (
        "LlavaOnevision",
        CLIP,
        LLAMA,
        dict(
            image_grid_pinpoints=GRIDS,
            vision_aspect_ratio="anyres_max_1",
            vision_feature_select_strategy="default",
            vision_feature_layer=-2,
        ),
    ),
}


def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel(ID, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    fast.add_special_tokens({"additional_special_tokens": ["<image>", "<video>"]})
    fast.chat_template = TEMPLATE
    assert fast.convert_tokens_to_ids(["<image>", "<video>"]) == [IMAGE, VIDEO]
    return fast


class _OneVisionProcessor(transformers.LlavaOnevisionProcessor):
    """A processor without a video processor, which would need torchvision; it is unused without videos."""

    def check_argument_for_proper_class(self, argument_name, argument):
        return None


def build(case: str, folder: Path, randomise):
    """Builds the reference model and processor, and saves both in the folder."""
    name, vision, text, options = CASES[case]
    options = dict(image_token_index=IMAGE) | options
    if name == "LlavaOnevision":
        options |= dict(video_token_index=VIDEO)
    config = getattr(transformers, f"{name}Config")(vision_config=dict(vision), text_config=dict(text), **options)
    reference = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
    randomise(reference)
    reference.tie_weights()
    reference.save_pretrained(folder)
    reference.generation_config.eos_token_id = None  # always 32 tokens
    side, strategy = vision["image_size"], config.vision_feature_select_strategy
    grid, clip = (side // vision["patch_size"]) ** 2, vision["model_type"] == "clip_vision_model"
    common = dict(tokenizer=tokenizer(), vision_feature_select_strategy=strategy, chat_template=TEMPLATE)
    patches = dict(patch_size=vision["patch_size"], num_additional_image_tokens=int(clip))
    means = {} if clip else dict(image_mean=[0.5] * 3, image_std=[0.5] * 3)
    if name == "Llava":
        images = LlavaImageProcessorPil(size=side, crop_size=side, **means)
        processor = transformers.LlavaProcessor(images, **common, **patches)
    elif name == "LlavaNext":
        images = LlavaNextImageProcessorPil(
            size=side, crop_size=side, image_grid_pinpoints=config.image_grid_pinpoints, **means
        )
        processor = transformers.LlavaNextProcessor(images, **common, **patches)
    else:
        images = LlavaOnevisionImageProcessorPil(
            size=dict(height=side, width=side), image_grid_pinpoints=config.image_grid_pinpoints, **means
        )
        aspect = config.vision_aspect_ratio
        grid += strategy == "default"  # of which it removes one for the class token
        processor = _OneVisionProcessor(images, num_image_tokens=grid, vision_aspect_ratio=aspect, **common)
    processor.tokenizer.save_pretrained(folder)
    images.save_pretrained(folder)
    return reference, processor


TEXTS = (
    "user: what is in <image> and that <image> ? assistant:",
    "what is red ?",
    "<image> left",
    "in this <image> cat and <image> right <image> dog",
)
SIZES = (((9, 30), (26, 24)), (), ((14, 14),), ((40, 11), (1, 33), (25, 70)))


def make_images() -> list[list[np.ndarray]]:
    """Returns the images of each text: all but one not square, none of the encoder's size."""
    rng = np.random.default_rng(3)
    return [[rng.integers(0, 256, (*size, 3), np.uint8) for size in sizes] for sizes in SIZES]


def reference_inputs(processor, texts, images, side: str) -> dict[str, torch.Tensor]:
    """Returns the inputs that the reference's own processor makes of texts and images."""
    processor.tokenizer.padding_side = side
    if not isinstance(processor, _OneVisionProcessor):
        images = [image for row in images for image in row]
    given = dict(padding=True, return_tensors="pt", input_data_format="channels_last")
    return dict(processor(images=images or None, text=list(texts), **given))
