"""The whole first Qwen-VL: its encoder in torch, which reproduces the golden first, and a renamed Qwen2."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
import torch
import transformers
from composed_checks import NEW_TOKENS, WORDS, prompts, tokenizer
from PIL import Image
from qwen_vl_v1_reference import llm_config, media_tokens, random_tower, renamed
from safetensors.numpy import load_file, save_file
from vision_checks import GOLDENS

from mllm_jax import Processor, from_pretrained, pretrained_config, save_pretrained
from mllm_jax.generation.generate import complete

START, END, FILLING = (len(WORDS) + i for i in range(3))
LENGTH = 96  # length that the LLM was trained on
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# The encoder's part of config.json; heads and layers of the LLM; whether its code scales longer texts.
CASES = {
    "two patches a side": (
        dict(image_size=28, patch_size=14, width=24, layers=2, heads=2, mlp_ratio=2.6, n_queries=4, output_dim=128),
        (2, 2),
        True,
    ),
    "two heads that read, without a map": (
        dict(image_size=28, patch_size=7, width=256, layers=1, heads=4, mlp_ratio=1.5, n_queries=9, output_dim=256),
        (4, 1),
        True,
    ),
    "more queries than patches, and an LLM for any length": (
        dict(image_size=42, patch_size=14, width=36, layers=3, heads=3, mlp_ratio=2.0, n_queries=16, output_dim=128),
        (4, 3),
        False,
    ),
}


def test_the_reference_gives_the_stored_outputs(assert_close):
    golden = np.load(GOLDENS / "qwenvl_v1_visual.npz")
    config = json.loads((GOLDENS / "qwenvl_v1_visual.json").read_text("utf-8"))["config"]
    weights = {n.removeprefix("weights/"): torch.tensor(golden[n]) for n in golden.files if n.startswith("weights/")}
    pixels = torch.tensor(golden["inputs/pixel_values"])
    found = media_tokens(weights, config, pixels, head=config["resampler_head_dim"])
    assert_close(found, golden["outputs/output"], 1e-5)


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory, randomise, to_numpy):
    """Returns (the encoder's part of config.json, its tensors, the LLM of transformers, folder)."""
    visual, (heads, layers), stretched = CASES[request.param]
    folder = tmp_path_factory.mktemp("qwen_vl")
    llm = randomise(
        transformers.Qwen2ForCausalLM(
            transformers.Qwen2Config(
                vocab_size=len(WORDS) + 3,
                hidden_size=visual["output_dim"],
                num_hidden_layers=layers,
                num_attention_heads=heads,
                num_key_value_heads=heads,
                intermediate_size=48,
                rms_norm_eps=1e-3,
                max_position_embeddings=512,
                rope_parameters=dict(rope_type="default", rope_theta=3000.0),
                tie_word_embeddings=False,
                bos_token_id=None,
                eos_token_id=None,
                pad_token_id=None,
            )
        ),
        seed=4,
    )
    weights = random_tower(visual, seed=5)
    stored = {f"transformer.visual.{name}": tensor.numpy() for name, tensor in weights.items()}
    save_file(stored | renamed(to_numpy(llm.state_dict())), folder / "model.safetensors")
    config = llm_config(llm, LENGTH, stretched) | dict(visual=visual | dict(image_start_id=START))
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    words = tokenizer(image_start="<img>", image_end="</img>", image_pad="<imgpad>")
    assert words.convert_tokens_to_ids(["<img>", "</img>", "<imgpad>"]) == [START, END, FILLING]
    words.save_pretrained(folder)
    return visual, weights, llm, folder


def reference_row(case, text: str, images: list[np.ndarray]) -> tuple[list[int], torch.Tensor]:
    """Returns the ids of a text and the LLM's inputs at them: `WORDS` by hand, images resized by Pillow."""
    visual, weights, llm, _ = case
    side, count = visual["image_size"], visual["n_queries"]
    ids = []
    for word in text.split():
        ids += [START, *[FILLING] * count, END] if word == "<img>" else [] if word == "</img>" else [WORDS.index(word)]
    embedded = llm.get_input_embeddings()(torch.tensor([ids]))
    if images:
        resized = [Image.fromarray(each).resize((side, side), Image.Resampling.BICUBIC) for each in images]
        pixels = (np.stack([np.asarray(each) for each in resized]) / np.float32(255) - MEAN) / STD
        media = media_tokens(weights, visual, torch.tensor(np.moveaxis(pixels, -1, 1), dtype=torch.float32))
        embedded[0, torch.tensor(ids) == FILLING] = media.flatten(0, 1)
    return ids, embedded


@torch.no_grad()
def test_logits_answers_and_folder(case, assert_close, tmp_path):
    visual, _, llm, folder = case
    texts, images = prompts("<img> </img>")
    module, params = from_pretrained(folder)
    ours = Processor.from_pretrained(folder)
    # An image may be named, as the authors' code requires, or only begun.
    written = [texts[0].replace("<img>", "<img> a cat"), texts[1].replace("</img>", ""), *texts[2:]]
    batch = ours(written, images=images)
    logits = np.asarray(jax.jit(module.apply)({"params": params}, batch).logits)
    how = dict(max_new_tokens=NEW_TOKENS, ignore_eos=True)
    answers = complete(module, params, batch, ours, **how)
    for row, (text, mine) in enumerate(zip(texts, images, strict=True)):
        ids, embedded = reference_row(case, text, mine)
        assert batch["tokens"][row, : len(ids)].tolist() == ids, text
        assert batch["segments"][row].sum() == len(ids)
        theirs = llm(inputs_embeds=embedded).logits[0]
        assert_close(logits[row, : len(ids)], theirs, 1e-4, f"logits of {text!r}")
        mask = torch.ones(1, len(ids), dtype=torch.long)
        theirs_how = dict(max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
        said = llm.generate(inputs_embeds=embedded, attention_mask=mask, **theirs_how)[0].tolist()
        assert list(answers[row].tokens) == said and len(said) == NEW_TOKENS, text
        size = dict(slots={"image": batch["images"].shape[1]}, length=batch["tokens"].shape[1])
        alone = complete(module, params, ours(text, images=mine, **size), ours, **how)
        assert alone[0].tokens == answers[row].tokens, text
    assert len({answer.tokens for answer in answers}) == len(texts), "equal answers prove nothing"

    save_pretrained(module, params, tmp_path / "ours", companions=folder)
    stored, found = load_file(folder / "model.safetensors"), load_file(tmp_path / "ours" / "model.safetensors")
    assert stored.keys() == found.keys() and all((found[name] == array).all() for name, array in stored.items())
    theirs, own = (json.loads((place / "config.json").read_text("utf-8")) for place in (folder, tmp_path / "ours"))
    assert own["visual"] == visual | dict(image_start_id=START) and own["architectures"] == theirs["architectures"]
    assert pretrained_config(tmp_path / "ours") == pretrained_config(folder) == module.config
    assert Processor.from_pretrained(tmp_path / "ours").layout.image_token == START
