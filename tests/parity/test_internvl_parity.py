"""InternVL against InternVLForConditionalGeneration, and OpenGVLab's folders against stored outputs of their code."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest
import torch
import transformers
from composed_checks import WORDS, check_composed, make_image, tiles_of, tokenizer
from einops import rearrange
from safetensors.numpy import save_file
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from vision_checks import GOLDENS

from mllm_jax import Processor, Video, from_pretrained, save_pretrained
from mllm_jax.errors import ConfigError
from mllm_jax.layers.pixels import normalise_pixels
from mllm_jax.models import internvl
from mllm_jax.models.internvl import HUB, IMAGE_MEAN, IMAGE_STD, ORIGINAL

SPECIAL = dict(
    start_image_token="<img>",
    end_image_token="</img>",
    context_image_token="<IMG_CONTEXT>",
    video_token="<video>",
)
CONTEXT = len(WORDS) + 2
VISION = dict(
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=30,
    image_size=[16, 16],
    patch_size=[4, 4],
)
TEXT = dict(
    vocab_size=len(WORDS) + 4,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    max_position_embeddings=256,
)
CASES = {
    "300M and Qwen2": dict(
        vision_config=dict(attention_bias=True),
        text_config=dict(model_type="qwen2"),
        tie_word_embeddings=False,
    ),
    "6B and LLaMA, an earlier layer": dict(
        vision_config=dict(norm_type="rms_norm", use_qk_norm=True),
        text_config=dict(model_type="llama", rope_parameters=dict(rope_type="default", rope_theta=500.0)),
        vision_feature_layer=-2,
        tie_word_embeddings=False,
    ),
    "a last norm and Qwen3, tied, larger squares": dict(
        vision_config=dict(attention_bias=True, use_mean_pooling=False),
        text_config=dict(model_type="qwen3", head_dim=12),
        downsample_ratio=0.25,
        projector_hidden_act="relu",
        tie_word_embeddings=True,
    ),
}


def build(case: str, folder, randomise):
    """Builds the reference and its processor, and saves them."""
    given = CASES[case]
    parts = dict(vision_config=VISION | given["vision_config"], text_config=TEXT | given["text_config"])
    tokens = 16 * int(1 / given.get("downsample_ratio", 0.5)) ** -2
    config = transformers.InternVLConfig(**given | parts, image_token_id=CONTEXT, image_seq_length=int(tokens))
    reference = randomise(transformers.InternVLForConditionalGeneration(config))
    reference.tie_weights()
    images = GotOcr2ImageProcessorPil(
        size=dict(height=16, width=16), max_patches=4, image_mean=list(IMAGE_MEAN), image_std=list(IMAGE_STD)
    )
    # It needs a video processor, which cannot be made without torchvision.
    transformers.InternVLProcessor.check_argument_for_proper_class = lambda *_: None
    made = tokenizer(**SPECIAL)
    processor = transformers.InternVLProcessor(images, made, None, image_seq_length=int(tokens))
    for part in (reference, images, made):
        part.save_pretrained(folder)
    return reference, processor


@pytest.mark.parametrize("case", CASES)
def test_against_transformers(case, randomise, assert_close, tmp_path):
    reference, processor = build(case, tmp_path, randomise)
    module, params, batch, shown = check_composed(reference, processor, tmp_path, "<IMG_CONTEXT>", assert_close)
    config = module.config
    assert internvl.from_hf_config(internvl.to_hf_config(config)) == config
    for row, inputs in enumerate(shown):
        if "pixel_values" in inputs:
            wanted = tiles_of(inputs)
            found = normalise_pixels(batch["images"][row, : len(wanted)], config.image.encoder)
            np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)
    assert batch["images"].shape[1] == len(tiles_of(shown[1]))


def test_videos_and_conversations(randomise, tmp_path):
    _, processor = build("300M and Qwen2", tmp_path, randomise)
    ours = Processor.from_pretrained(tmp_path)
    frames = [make_image(20, 30), make_image(20, 30)[::-1]]
    batch = ours("what <video> <IMG_CONTEXT>", images=[make_image(16, 16)], videos=[Video(frames, fps=1)])
    expanded = processor.replace_video_token(dict(pixel_values_videos=[np.zeros((2, 3, 16, 16))]), 0)
    said = f"what {expanded} {processor.replace_image_token(dict(num_patches=[1]), 0)}"
    assert batch["tokens"][0].tolist() == processor.tokenizer(said)["input_ids"]
    assert batch["images"].shape == (1, 3, 16, 16, 3)
    assert batch["media_index"].max() == 11 and (batch["media_index"] >= 0).sum() == 12


# ---- OpenGVLab's folders


def original(name: str, version: str, folder, randomise) -> torch.nn.Module:
    """Writes a folder in OpenGVLab's format: the golden's encoder and projector, and a Qwen2 with random weights."""
    golden = np.load(GOLDENS / f"{name}.npz")
    facts = json.loads((GOLDENS / f"{name}.json").read_text("utf-8"))["config"]
    tensors = {file.removeprefix("weights/"): golden[file] for file in golden.files if file.startswith("weights/")}
    text = TEXT | dict(hidden_size=facts["llm_hidden"], num_attention_heads=2, num_key_value_heads=1)
    llm = randomise(transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**text)))
    tensors |= {f"language_model.{key}": value.numpy() for key, value in llm.state_dict().items()}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    config = dict(
        architectures=[ORIGINAL],
        model_type="internvl_chat",
        vision_config=facts["vision"] | dict(architectures=["InternVisionModel"], use_flash_attn=True),
        llm_config=llm.config.to_dict() | dict(architectures=["Qwen2ForCausalLM"], early_stopping=False, top_k=50),
        downsample_ratio=0.5,
        dynamic_image_size=True,
        force_image_size=28,
        min_dynamic_patch=1,
        max_dynamic_patch=12,
        pad2square=False,
        ps_version=version,
        select_layer=facts["select_layer"],
        template="internvl2_5",
        use_backbone_lora=0,
        use_llm_lora=0,
        use_thumbnail=True,
    )
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    tokenizer(**SPECIAL).save_pretrained(folder)
    return llm


@pytest.mark.parametrize(("name", "version"), [("internvit_300m_style", "v1"), ("internvit_6b_style", "v2")])
def test_the_original_folders(name, version, randomise, assert_close, tmp_path):
    llm = original(name, version, tmp_path / "theirs", randomise)
    golden = np.load(GOLDENS / f"{name}.npz")
    module, params = from_pretrained(tmp_path / "theirs")
    config = module.config
    assert config.tile_range == (1, 12) and config.image_token_id is None
    assert internvl.from_hf_config(internvl.to_hf_config(config)) == config

    processor = Processor.from_pretrained(tmp_path / "theirs")
    batch = processor("what <IMG_CONTEXT> is <IMG_CONTEXT> ?", images=[make_image(28, 28)] * 2)
    assert (batch["media_index"] >= 0).sum() == 8 and batch["images"].shape == (1, 2, 28, 28, 3)
    assert processor("<IMG_CONTEXT>", images=[make_image(10, 30)])["images"].shape[1] == 4, (
        "three tiles and a thumbnail"
    )
    batch["images"] = rearrange(golden["inputs/pixel_values"], "m c h w -> 1 m h w c")
    media, logits = jax.jit(lambda p, b: (module.apply(p, b, method="encode_media").tokens, module.apply(p, b).logits))(
        {"params": params}, batch
    )
    wanted = rearrange(golden[f"outputs/extract_feature_{version}"], "m t e -> 1 (m t) e")
    assert_close(media, wanted, 1e-4, "media tokens")
    here = torch.tensor(batch["media_index"] >= 0)
    with torch.no_grad():
        embedded = llm.get_input_embeddings()(torch.tensor(batch["tokens"]).long())
        embedded[here] = torch.tensor(wanted[0])
        assert_close(logits, llm(inputs_embeds=embedded).logits, 1e-4, "logits")

    save_pretrained(module, params, tmp_path / "again")
    again, other = from_pretrained(tmp_path / "again")
    assert again.config == config
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), params, other))
    hub = dataclasses.replace(config, family=HUB, image_token_id=CONTEXT)
    if version == "v1":
        with pytest.raises(ConfigError, match="projector="):
            save_pretrained(hub.make(), params, tmp_path / "hub")
        return
    save_pretrained(hub.make(), params, tmp_path / "hub")
    opened = transformers.InternVLForConditionalGeneration.from_pretrained(tmp_path / "hub")
    with torch.no_grad():
        theirs = opened(
            input_ids=torch.tensor(batch["tokens"]).long(), pixel_values=torch.tensor(golden["inputs/pixel_values"])
        )
    assert_close(logits, theirs.logits, 1e-4, "written as Hugging Face's")
