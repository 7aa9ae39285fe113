"""AudioLDM-2 against an uncached loop over diffusers' and transformers' parts, from tiny folders; saved folders."""

from __future__ import annotations

import dataclasses
import json

import diffusers
import jax
import numpy as np
import pytest
import tiny_audioldm2 as tiny
import torch
from toy_data import quick_compilation

import mllm_jax
from mllm_jax.checkpoints.hf import hub_tensors
from mllm_jax.errors import ConfigError, DataError
from mllm_jax.models.audioldm2 import from_parts, roll_out
from mllm_jax.models.registry import family_of_config, from_pretrained, pretrained_config, save_pretrained

PROMPTS, NEGATIVES = ["a cat", "a small dog, far"], ["", "a noisy room"]
STEPS, TOLERANCE = 10, 1e-4
SECONDS = 0.155  # which is no whole number of latents, or of frames


@pytest.fixture(scope="module", autouse=True)
def _quickly():
    with quick_compilation():
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Returns a folder, its pipeline of diffusers and our assistant."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, tiny.write(folder), mllm_jax.Assistant.load(folder)


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def unrolled(language_model, states, mask, count: int = 8) -> torch.Tensor:
    """Returns the vectors that a GPT-2 writes, by reading everything again for each."""
    base = language_model.base_model
    for _ in range(count):
        last = base(inputs_embeds=states, attention_mask=mask).last_hidden_state[:, -1:]
        states, mask = torch.cat([states, last], 1), torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    return states[:, -count:]


def conditions(pipeline, text: str, longest: int | None = None) -> tuple[torch.Tensor, ...]:
    """Returns the language model's vectors, T5's states and their mask, for one text of `longest` of T5's tokens."""
    ids = pipeline.tokenizer(
        [text], padding="max_length", max_length=tiny.LONGEST, truncation=True, return_tensors="pt"
    )
    clap = pipeline.text_encoder
    pooled = clap.text_model(ids.input_ids, attention_mask=ids.attention_mask).pooler_output
    vector = torch.nn.functional.normalize(clap.text_projection(pooled), dim=-1)[:, None]
    padding = True if longest is None else "max_length"
    ids = pipeline.tokenizer_2(
        [text], padding=padding, max_length=longest or tiny.LONGEST_T5, truncation=True, return_tensors="pt"
    )
    t5 = pipeline.text_encoder_2(ids.input_ids, attention_mask=ids.attention_mask).last_hidden_state
    projected = pipeline.projection_model(vector, t5, ids.attention_mask.new_ones(1, 1), ids.attention_mask)
    vectors = unrolled(pipeline.language_model, projected.hidden_states, projected.attention_mask)
    return vectors, t5, ids.attention_mask


@torch.no_grad()
def reference(pipeline, text: str, negative: str, latents: np.ndarray, guidance: float, seconds: float) -> np.ndarray:
    """Returns the samples of one text, from latents [t, m, C]."""
    vectors, t5, mask = conditions(pipeline, text)
    both = [conditions(pipeline, negative, t5.shape[1]), (vectors, t5, mask)]
    x = torch.tensor(np.moveaxis(latents, -1, 0)[None])
    pipeline.scheduler.set_timesteps(STEPS)
    for t in pipeline.scheduler.timesteps:
        outputs = [
            pipeline.unet(x, t, v, encoder_hidden_states_1=s, encoder_attention_mask_1=m).sample for v, s, m in both
        ]
        x = pipeline.scheduler.step(outputs[0] + guidance * (outputs[1] - outputs[0]), t, x).prev_sample
    mel = pipeline.vae.decode(x / pipeline.vae.config.scaling_factor).sample
    return pipeline.vocoder(mel[:, 0])[0, : int(seconds * pipeline.vocoder.config.sampling_rate)].numpy()


def drawn(answers) -> np.ndarray:
    return np.stack([answer.media[0].array for answer in answers])


def test_sounds_and_the_saved_folder(whole, assert_close, tmp_path):
    """Checks ten guided steps from the same noise for texts of unequal length in a batch, each alone in the loop."""
    folder, pipeline, assistant = whole
    latents = noise(2, 8, 4, 4)
    how = dict(negative=NEGATIVES, steps=STEPS, guidance_scale=3.5, latents=latents)
    answers = assistant.draw(PROMPTS, seconds=SECONDS, **how)
    each = zip(PROMPTS, NEGATIVES, latents, strict=True)
    wanted = np.stack([reference(pipeline, *one, 3.5, SECONDS) for one in each])
    assert wanted.shape == (2, 155) and 0.02 < np.abs(wanted).max() < 0.99 and np.ptp(wanted[0] - wanted[1]) > 1e-3
    assert_close(drawn(answers), wanted, TOLERANCE)
    sound = answers[1].media[0]
    assert answers[1].text == "<audio 1>" and (sound.kind, sound.rate) == ("audio", 1000.0)
    assert sound.metadata["prompt"] == PROMPTS[1] and sound.metadata["seconds"] == "0.155"
    # A text alone is the same as in a batch; without seconds the sound is as long as the latents.
    alone = assistant.draw(PROMPTS[0], NEGATIVES[0], steps=STEPS, guidance_scale=3.5, latents=latents[0])
    assert alone[0].media[0].array.shape == (160,)
    assert_close(alone[0].media[0].array[:155], wanted[0], TOLERANCE, "alone")

    save_pretrained(assistant.model, assistant.params, tmp_path / "ours")
    again = tiny.quiet(diffusers.AudioLDM2Pipeline.from_pretrained(tmp_path / "ours"))
    assert again.components.keys() == pipeline.components.keys()
    for name in ("text_encoder_2", "projection_model", "language_model", "unet", "vae", "vocoder"):
        kept, found = (getattr(p, name).state_dict() for p in (pipeline, again))
        assert kept.keys() == found.keys() and all(torch.equal(tensor, found[n]) for n, tensor in kept.items()), name
    assert again.language_model.config.max_new_tokens == 8
    # Of a whole CLAP, the text part is read and written.
    kept, found = pipeline.text_encoder.state_dict(), again.text_encoder.state_dict()
    assert all(torch.equal(kept[name], tensor) for name, tensor in found.items())
    assert_close(reference(again, PROMPTS[0], "", latents[0], 3.5, SECONDS), wanted[0], 1e-5, "the folder written here")
    assert pretrained_config(tmp_path / "ours") == pretrained_config(folder)


def test_another_scheduler_one_seed_a_sound_and_the_own_length(whole, assert_close):
    assistant = whole[2]
    how = dict(steps=3, scheduler="euler", guidance_scale=1.0)
    both = assistant.draw(PROMPTS, seed=[3, 4], **how)
    assert drawn(both).shape == (2, 160)  # 8 latents of 2 frames of 10 samples
    alone = assistant.draw(PROMPTS[1], seed=4, **how)
    assert_close(drawn(alone)[0], drawn(both)[1], 1e-5)
    assert np.ptp(drawn(alone)[0] - drawn(assistant.draw(PROMPTS[1], seed=5, **how))[0]) > 1e-3
    assert both[0].media[0].metadata["scheduler"] == "EulerDiscreteScheduler"


@pytest.mark.parametrize("head", [True, False])
def test_the_vectors_of_the_language_model(head, randomise, assert_close, tmp_path):
    """Checks the compiled loop with a cache, for texts with padding inside, against reading everything again."""
    language_model = randomise(tiny.parts(head=head)["language_model"])
    language_model.save_pretrained(tmp_path)
    module, params = from_pretrained(tmp_path)
    states = noise(3, 9, 8)
    mask = np.ones((3, 9), np.int64)
    mask[1, 5:8] = mask[2, 2:8] = 0
    found = jax.jit(lambda p, *inputs: roll_out(module, p, *inputs))(params, states, mask)
    with torch.no_grad():
        wanted = unrolled(language_model, torch.tensor(states), torch.tensor(mask))
    assert np.abs(np.diff(wanted, axis=1)).max() > 0.1
    assert_close(found, wanted, 1e-4)
    if not head:
        return
    # Padding without positions is as if it were absent.
    positions = np.minimum(np.arange(9), np.array([[8], [5], [2]]))
    found = roll_out(module, params, states, mask, positions)
    for row, kept in ((1, [0, 1, 2, 3, 4, 8]), (2, [0, 1, 8])):
        assert_close(found[row], roll_out(module, params, states[[row]][:, kept], mask[[row]][:, kept])[0], 1e-5)


def test_the_text_part_of_clap_a_model_without_a_head_and_a_long_prompt(assert_close, tmp_path):
    """Checks a folder whose text encoder is CLAP's text part, and whose language model is GPT2Model."""
    pipeline = tiny.write(tmp_path, whole_clap=False, head=False)
    assistant = mllm_jax.Assistant.load(tmp_path)
    latents = noise(1, 4, 4, 4)
    text = "much longer than this tiny model can read"
    wanted = reference(pipeline, text, "no", latents[0], 2.0, 0.08)
    with pytest.warns(UserWarning, match="reads 20 tokens"):
        found = assistant.draw(text, "no", steps=STEPS, guidance_scale=2.0, latents=latents)
    assert_close(drawn(found)[0], wanted, TOLERANCE)
    tensors = hub_tensors(family_of_config(assistant.model.config).table(assistant.model.config), assistant.params)
    kept = {f"{n}.{k}" for n in ("vae", "language_model") for k in getattr(pipeline, n).state_dict()}
    assert kept <= tensors.keys()


@pytest.mark.parametrize(
    "options,error,message",
    [
        (dict(height=64), ConfigError, "height=64 for a model that draws sounds"),
        (dict(start_image=np.zeros((8, 8, 3))), ConfigError, "start_image"),
        (dict(frames=3), ConfigError, "frames"),
        (dict(seconds=0.01), ConfigError, "a number from 0.02"),
        (dict(seconds=float("nan")), ConfigError, "seconds=nan"),
        (dict(seconds=0.1, latents=noise(1, 8, 4, 4)), ConfigError, "beside latents of 0.16 seconds"),
        (dict(latents=noise(1, 8, 8, 4)), DataError, "latents"),
    ],
)
def test_options_that_are_refused(whole, options, error, message):
    with pytest.raises(error, match=message):
        whole[2].draw("a", steps=2, **options)


def test_parts_that_do_not_fit_are_named(whole, tmp_path):
    config = whole[2].model.config
    parts = {field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.name != "compute"}
    assert from_parts(parts) == config

    def change(name: str, **values):
        return parts | {name: dataclasses.replace(parts[name], **values)}

    for wrong, message in (
        ({name: part for name, part in parts.items() if name != "vocoder"}, "no vocoder"),
        (parts | dict(text_encoder=config.vae), "text_encoder of class AutoencoderKL"),
        (parts | dict(safety_checker=config.vae), "safety_checker"),
        (change("projection_model", text_size=7), "a projection of 7 and 10"),
        (change("projection_model", learned_positions=True, max_length=5), "learned_positions"),
        (change("unet", text_sizes=((None, 8, 12),)), r"widths \[8, 12\]"),
        (change("vae", out_channels=3), "channels"),
        (change("vocoder", num_mel_bins=7), "7 mel bins"),
        (change("language_model", max_position_embeddings=12), "12 positions"),
    ):
        with pytest.raises(ConfigError, match=message):
            from_parts(wrong)
    index = json.loads((whole[0] / "model_index.json").read_text())
    index["text_encoder_2"] = ["transformers", "VitsModel"]
    for path in whole[0].iterdir():
        if path.is_dir():
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match="VitsModel|T5EncoderModel"):
        pretrained_config(tmp_path)
