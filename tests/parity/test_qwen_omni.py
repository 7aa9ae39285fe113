"""Qwen2.5-Omni's thinker against transformers: its audio encoder, positions, logits, answers and folders."""

from __future__ import annotations

import json
from itertools import product
from types import MethodType, SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from composed_checks import make_image
from flax import linen as nn
from omni_reference import (
    AUDIO,
    AUDIO_END,
    AUDIO_ID,
    AUDIO_START,
    CASES,
    HEARD,
    IMAGE,
    MARKS,
    RATE,
    SEEN,
    VIDEO,
    VISION_END,
    VISION_START,
    WATCHED,
    Cut,
    frames,
    noise,
    save_reference,
)
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5OmniThinkerConfig
from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import Qwen2_5OmniAudioEncoderConfig
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import (
    Qwen2_5OmniAudioEncoder,
    Qwen2_5OmniThinkerForConditionalGeneration,
)
from transformers.models.qwen2_5_omni.processing_qwen2_5_omni import Qwen2_5OmniProcessor

from mllm_jax import Processor, from_pretrained, save_pretrained
from mllm_jax.data.message import Audio, Video
from mllm_jax.data.processing.media import PreparedMedia, lay_out_row
from mllm_jax.errors import DataError
from mllm_jax.generation.generate import complete
from mllm_jax.models.qwen_omni import FAMILIES, QwenOmniLayout
from mllm_jax.models.registry import abstract_params
from mllm_jax.models.tmrope import Timing

TOWERS = {
    "even": AUDIO,
    # Averages span two chunks of 3 vectors each.
    "odd": AUDIO | dict(n_window=3, num_mel_bins=5, encoder_attention_heads=4, output_dim=20),
    "wide": AUDIO
    | dict(n_window=9, encoder_layers=1, d_model=18, encoder_attention_heads=3, activation_function="relu"),
}
LENGTHS = (33, 1, 2, 3, 24, 7, 16)  # mel frames


@pytest.mark.parametrize("name", TOWERS)
def test_the_audio_tower(name, tmp_path, randomise, assert_close):
    reference = randomise(Qwen2_5OmniAudioEncoder(Qwen2_5OmniAudioEncoderConfig(**TOWERS[name])))
    reference.save_pretrained(tmp_path)
    module, params = from_pretrained(tmp_path)
    mel = TOWERS[name]["num_mel_bins"]
    features = np.random.default_rng(0).normal(size=(len(LENGTHS), mel, max(LENGTHS))).astype(np.float32)
    mask = np.arange(max(LENGTHS)) < np.asarray(LENGTHS)[:, None]
    flat = torch.tensor(features.transpose(0, 2, 1)[mask].T)
    with torch.no_grad():
        wanted = reference(flat, feature_lens=torch.tensor(LENGTHS), output_hidden_states=True)
    out = jax.jit(lambda f, m: module.apply({"params": params}, f, m, output_hidden_states=True))(features, mask)
    counts = [module.config.frames(n) for n in LENGTHS]
    assert counts == module.config.frames(np.asarray(LENGTHS)).tolist() == np.asarray(out.mask).sum(1).tolist()
    assert_close(np.asarray(out.last_hidden_state)[np.asarray(out.mask)], wanted.last_hidden_state, 1e-5, name)
    vectors = -(-np.asarray(LENGTHS) // 2)
    for ours, theirs in zip(out.hidden_states, wanted.hidden_states, strict=True):
        valid = np.arange(ours.shape[1]) < vectors[:, None]
        assert_close(np.asarray(ours)[valid], theirs, 1e-5, f"{name}: hidden states")
    # Each sound alone, without padding or a mask; and in pieces, as a batch of a language model has it.
    piece = module.config.piece
    for row in (0, 4):  # a part of a chunk at the end, and whole chunks
        alone = module.apply({"params": params}, features[row : row + 1, :, : LENGTHS[row]]).last_hidden_state[0]
        assert_close(alone, out.last_hidden_state[row, : counts[row]], 1e-5, f"{LENGTHS[row]} frames alone")
    pieces = np.zeros((-(-33 // piece), mel, piece), np.float32)
    for number in range(len(pieces)):
        cut = features[0, :, number * piece : (number + 1) * piece]
        pieces[number, :, : cut.shape[1]] = cut
    valid = np.arange(pieces.size // mel).reshape(len(pieces), piece) < 33
    joined = module.apply({"params": params}, pieces, valid)
    assert_close(joined.last_hidden_state[joined.mask], out.last_hidden_state[0], 1e-5, "in pieces")

    save_pretrained(module, params, tmp_path / "ours")
    opened, report = Qwen2_5OmniAudioEncoder.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    kept = reference.state_dict()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in opened.state_dict().items())


def test_the_audio_tower_refuses_features_of_another_shape(tmp_path, randomise):
    randomise(Qwen2_5OmniAudioEncoder(Qwen2_5OmniAudioEncoderConfig(**AUDIO))).save_pretrained(tmp_path)
    module, params = from_pretrained(tmp_path)
    with pytest.raises(DataError, match=r"features of shape \(1, 7, 16\)"):
        module.apply({"params": params}, jnp.zeros((1, 7, 16)))


# ---- the whole thinker

NEW_TOKENS = 16
# Text, images, sounds, videos as (frames, frames a second), the sound of the first video.
ROWS = [
    (f"user {HEARD} what is it ?", [], [0.73], [], None),
    (f"{HEARD} a {SEEN} dog {HEARD} ?", [(20, 61)], [0.5, 1.21], [], None),
    (f"what is {WATCHED} ?", [], [], [(5, 16, 24, 3.0)], None),
    ("what is a cat ?", [], [], [], None),
    (f"{SEEN} {WATCHED} it {HEARD} two {WATCHED}", [(16, 16)], [0.31], [(2, 16, 16, 3.0), (6, 8, 24, 3.0)], None),
    (f"what is {WATCHED} it ?", [], [], [(6, 16, 16, 2.0)], 1.3),
    (f"{HEARD} a {WATCHED} {SEEN} ?", [(9, 40)], [0.6], [(4, 8, 16, 1.5)], 3.9),
]


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory, randomise):
    """Returns (reference, its processor without torchvision's part, folder)."""
    folder = tmp_path_factory.mktemp("omni")
    return *save_reference(folder, request.param, randomise), folder


def reference_inputs(case, text, images, sounds, videos, sound) -> dict:
    """Returns the inputs of transformers' model from its own processor."""
    reference, processor, _ = case
    more = dict(seconds_per_chunk=float(reference.config.seconds_per_chunk))
    more |= dict(position_id_per_seconds=reference.config.position_id_per_seconds)
    heard = [noise(seconds) for seconds in sounds]
    if videos:
        more |= dict(videos=[frames(*size) for *size, _ in videos], videos_kwargs=dict(fps=videos[0][-1]))
    if sound is not None:
        more |= dict(audio=[*heard, noise(sound)], audio_from_video_indices=[*[None] * len(heard), 0])
        more |= dict(load_audio_from_video=True)
    elif heard:
        more |= dict(audio=heard)
    inputs = processor(
        text=[text], images=[make_image(*size) for size in images] or None, return_tensors="pt", padding=False, **more
    )
    inputs = dict(inputs, use_audio_in_video=sound is not None)
    if "video_second_per_grid" in inputs:
        inputs["video_second_per_grid"] = torch.as_tensor(inputs["video_second_per_grid"])
    return inputs


def given_rows() -> dict:
    """Returns the media of ROWS for our processor."""
    return dict(
        images=[[make_image(*size) for size in images] for _, images, *_ in ROWS],
        audios=[[(noise(seconds), RATE) for seconds in sounds] for _, _, sounds, *_ in ROWS],
        videos=[
            [
                Video(frames(*size), fps=fps, use_audio_in_video=sound is not None and Audio(noise(sound), rate=RATE))
                for *size, fps in videos
            ]
            for *_, videos, sound in ROWS
        ],
    )


def test_processor_positions_logits_answers_and_folder(case, assert_close):
    reference, _, folder = case
    module, params = from_pretrained(folder)
    ours = Processor.from_pretrained(folder)
    batch = ours([text for text, *_ in ROWS], **given_rows())
    logits = np.asarray(jax.jit(module.apply)({"params": params}, batch).logits)
    answers = complete(module, params, batch, ours, max_new_tokens=NEW_TOKENS, ignore_eos=True)
    for row, (text, *media) in enumerate(ROWS):
        inputs = reference_inputs(case, text, *media)
        length = int(batch["segments"][row].sum())
        np.testing.assert_array_equal(batch["tokens"][row, :length], inputs["input_ids"][0], err_msg=text)
        lengths = inputs["feature_attention_mask"].sum(-1) if "feature_attention_mask" in inputs else None
        grids = inputs.get("image_grid_thw"), inputs.get("video_grid_thw")
        more = inputs["use_audio_in_video"], lengths, inputs.get("video_second_per_grid")
        positions, _ = reference.get_rope_index(inputs["input_ids"], *grids, inputs["attention_mask"], *more)
        np.testing.assert_array_equal(batch["positions"][row, :length].T, positions[:, 0], err_msg=text)
        with torch.no_grad():
            assert_close(logits[row, :length], reference(**inputs).logits[0], 1e-4, f"logits of {text!r}")
            said = reference.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
        assert list(answers[row].tokens) == said[0, length:].tolist(), text
    assert len({answer.tokens for answer in answers}) == len(ROWS), "equal answers prove nothing"

    save_pretrained(module, params, folder / "ours")
    opened, report = type(reference).from_pretrained(folder / "ours", output_loading_info=True)
    assert not any(report[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    kept = reference.state_dict()
    assert opened.state_dict().keys() == kept.keys()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in opened.state_dict().items())
    with torch.no_grad():  # of the last row, which has media of every kind
        assert_close(opened(**inputs).logits, reference(**inputs).logits, 1e-6, "written")


def test_the_thinker_in_the_folder_of_the_whole_model(case, tmp_path):
    reference, _, folder = case
    thinker = json.loads((folder / "config.json").read_text())
    # As the hub's file has them.
    thinker |= dict(architectures=["Qwen2OmniNaViTThinkerForConditionalGeneration"], ignore_index=-100, pad_token_id=0)
    rope = thinker["text_config"].pop("rope_parameters")
    thinker["text_config"] |= dict(rope_theta=rope.pop("rope_theta"), rope_scaling=rope | dict(type="default"))
    vision, audio = thinker["vision_config"], thinker["audio_config"]
    vision |= dict(embed_dim=vision["hidden_size"], in_chans=3, spatial_patch_size=4, tokens_per_second=25)
    audio |= dict(encoder_layerdrop=0.0, num_hidden_layers=audio["encoder_layers"], init_std=0.02)
    whole = dict(architectures=["Qwen2_5OmniModel"], model_type="qwen2_5_omni", enable_audio_output=True)
    whole |= dict(thinker_config=thinker, talker_config=dict(hidden_size=7), token2wav_config={})
    (tmp_path / "config.json").write_text(json.dumps(whole))
    tensors = {f"thinker.{name}": tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    tensors |= {"talker.model.layers.0.weight": torch.ones(3), "token2wav.bias": torch.ones(1)}
    save_file(tensors, tmp_path / "model.safetensors")
    (module, params), (alone, wanted) = from_pretrained(tmp_path), from_pretrained(folder)
    assert module == alone
    jax.tree.map(np.testing.assert_array_equal, params, wanted)


# ---- positions in time

TIMES = dict(image_token_id=IMAGE, video_token_id=VIDEO, audio_token_id=AUDIO_ID, vision_start_token_id=VISION_START)


@pytest.mark.parametrize("steps, chunk", [(25, 2), (25, 1), (13, 3)])
def test_interleaving_and_positions_of_every_length(steps, chunk):
    """Steps of a video that are longer than chunks, sounds that end before and after it, frames of any size."""
    config = SimpleNamespace(
        **TIMES, audio_start_token_id=AUDIO_START, position_id_per_seconds=steps, seconds_per_chunk=chunk
    )
    reference = SimpleNamespace(config=config, spatial_merge_size=2)
    for name in ("get_llm_pos_ids_for_vision", "get_chunked_index"):
        setattr(reference, name, MethodType(getattr(Qwen2_5OmniThinkerForConditionalGeneration, name), reference))
    own = SimpleNamespace(video_processor=Cut, **{name: mark + " " for name, mark in MARKS.items()})
    own.get_chunked_index = MethodType(Qwen2_5OmniProcessor.get_chunked_index, own)
    ids = dict(zip(MARKS.values(), range(IMAGE, AUDIO_END + 1), strict=True))
    layout = QwenOmniLayout.__new__(QwenOmniLayout)
    layout.config = SimpleNamespace(
        timing=Timing(steps, chunk, 2), audio_start_token_id=AUDIO_START, audio_end_token_id=AUDIO_END
    )
    seen = set()
    for fps, grid, mel in product((0.4, 1.0, 2.0, 3.0, 8.0), ((1, 4, 6), (3, 2, 2), (5, 4, 4)), (3, 100, 441, 1023)):
        count, seconds, patches = (mel + 1) // 4, 2 / fps, np.prod(grid) // 4
        video = PreparedMedia({}, np.full(patches, VIDEO), np.arange(patches), grid=grid, seconds=seconds)
        sound = PreparedMedia({}, np.full(count, AUDIO_ID), np.arange(count), modality="audio")
        text = [3, VISION_START, VIDEO, VISION_END, 4, 5]
        row = lay_out_row(text, layout._together(video, sound), [VIDEO, AUDIO_ID], "a text")
        written = Qwen2_5OmniProcessor.replace_video_with_audio_token(
            own,
            dict(video_grid_thw=[np.asarray(grid)], video_second_per_grid=[seconds]),
            0,
            dict(num_audio_tokens=[count]),
            0,
            position_id_per_seconds=steps,
            seconds_per_chunk=chunk,
        )
        wanted = [*text[:2], *(ids[mark] for mark in written.split()), *text[3:]]
        assert row.tokens.tolist() == wanted, (fps, grid, mel)
        assert row.places[row.owners == 1, 0].tolist() == list(range(count))
        positions, _ = Qwen2_5OmniThinkerForConditionalGeneration.get_rope_index(
            reference,
            torch.tensor([wanted]),
            video_grid_thw=torch.tensor([grid]),
            attention_mask=torch.ones(1, len(wanted)),
            use_audio_in_video=True,
            audio_seqlens=torch.tensor([mel]),
            second_per_grids=torch.tensor([seconds]),
        )
        found = layout.positions(row, layout._together(video, sound))
        np.testing.assert_array_equal(found.T, positions[:, 0], err_msg=f"{fps} {grid} {mel}")
        seen.add(found.tobytes())
    assert len(seen) == 44  # one frame has the same positions at every rate


def test_the_published_model_has_every_parameter():
    vision = dict(hidden_size=1280, out_hidden_size=3584)
    settings = Qwen2_5OmniThinkerConfig(vision_config=vision)
    with torch.device("meta"):
        reference = Qwen2_5OmniThinkerForConditionalGeneration(settings)
    family = FAMILIES[0]
    config = family.from_hf(settings.to_dict() | dict(architectures=[family.architectures[0]]))
    wanted = sum(parameter.numel() for parameter in reference.parameters())
    assert (
        wanted
        == 8_931_813_888
        == sum(leaf.size for leaf in jax.tree.leaves(nn.meta.unbox(abstract_params(config, family))))
    )
