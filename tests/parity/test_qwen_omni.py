"""Qwen2.5-Omni's thinker against transformers: its audio tower, positions, logits, answers and folders."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from composed_checks import WORDS, make_image, tokenizer
from einops import rearrange
from test_qwen_vl_parity import TEXT
from transformers import Qwen2_5OmniThinkerConfig, WhisperFeatureExtractor
from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import Qwen2_5OmniAudioEncoderConfig
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import (
    Qwen2_5OmniAudioEncoder,
    Qwen2_5OmniThinkerForConditionalGeneration,
)
from transformers.models.qwen2_5_omni.processing_qwen2_5_omni import Qwen2_5OmniProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from transformers.processing_utils import VideosKwargs

from mllm_jax import Processor, from_pretrained, save_pretrained
from mllm_jax.data.message import Audio, Image, Message, Text, Video
from mllm_jax.generation.generate import complete
from mllm_jax.errors import ConfigError, DataError
from mllm_jax.models.registry import abstract_params, family_of

AUDIO = dict(
    num_mel_bins=8,
    encoder_layers=2,
    encoder_attention_heads=2,
    encoder_ffn_dim=24,
    d_model=16,
    max_source_positions=9,
    n_window=4,
    output_dim=32,
)
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
    for row, (length, count) in enumerate(zip(LENGTHS, counts, strict=True)):
        if count:
            alone = module.apply({"params": params}, features[row : row + 1, :, :length]).last_hidden_state[0]
            assert_close(alone, out.last_hidden_state[row, :count], 1e-5, f"{length} frames alone")
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

MARKS = dict(
    image_token="<|IMAGE|>",
    video_token="<|VIDEO|>",
    audio_token="<|AUDIO|>",
    vision_bos_token="<|vision_bos|>",
    vision_eos_token="<|vision_eos|>",
    audio_bos_token="<|audio_bos|>",
    audio_eos_token="<|audio_eos|>",
)
IMAGE, VIDEO, AUDIO_ID, VISION_START, VISION_END, AUDIO_START, AUDIO_END = (len(WORDS) + i for i in range(7))
TOWER = dict(
    depth=2,
    num_heads=2,
    patch_size=4,
    hidden_size=24,
    intermediate_size=40,
    out_hidden_size=32,
    window_size=16,
    fullatt_block_indexes=[1],
)
ROPE = dict(rope_type="default", rope_theta=1000.0, mrope_section=[2, 1, 1])
# text_config, vision_config, audio_config, the rest.
CASES = {
    "plain": (dict(), dict(), dict(), dict(seconds_per_chunk=1)),
    "tied, averages over two chunks": (
        dict(num_key_value_heads=4, rope_parameters=ROPE | dict(mrope_section=[1, 1, 2])),
        dict(num_heads=3, fullatt_block_indexes=[]),
        dict(n_window=3, activation_function="relu", encoder_attention_heads=4),
        dict(tie_word_embeddings=True),
    ),
    "other steps of time": (
        dict(num_key_value_heads=1, use_sliding_window=True, sliding_window=50, max_window_layers=1),
        dict(depth=1, hidden_size=32, fullatt_block_indexes=[0], window_size=24),
        dict(n_window=9, encoder_layers=1, num_mel_bins=5),
        dict(seconds_per_chunk=1, position_id_per_seconds=13),
    ),
}
SEEN, HEARD, WATCHED = (
    "<|vision_bos|> <|IMAGE|> <|vision_eos|>",
    "<|audio_bos|> <|AUDIO|> <|audio_eos|>",
    "<|vision_bos|> <|VIDEO|> <|vision_eos|>",
)
RATE, NEW_TOKENS = 16_000, 16


def noise(seconds: float) -> np.ndarray:
    samples = np.random.default_rng(round(1000 * seconds)).normal(size=round(RATE * seconds))
    return (0.1 * samples).astype(np.float32)


def frames(count: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, height, width, 3), np.uint8)


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
    text, vision, audio, rest = CASES[request.param]
    folder = tmp_path_factory.mktemp("omni")
    ids = dict(image_token_index=IMAGE, video_token_index=VIDEO, audio_token_index=AUDIO_ID)
    ids |= dict(vision_start_token_id=VISION_START, vision_end_token_id=VISION_END)
    ids |= dict(audio_start_token_id=AUDIO_START, audio_end_token_id=AUDIO_END)
    config = Qwen2_5OmniThinkerConfig(
        text_config=TEXT | dict(vocab_size=AUDIO_END + 1, rope_parameters=ROPE) | text,
        vision_config=TOWER | vision,
        audio_config=AUDIO | audio,
        **ids,
        **rest,
    )
    reference = randomise(Qwen2_5OmniThinkerForConditionalGeneration(config)).eval()
    reference.tie_weights()
    reference.generation_config.eos_token_id = None
    reference.save_pretrained(folder)
    words = tokenizer(**MARKS)
    assert words.convert_tokens_to_ids(list(MARKS.values())) == list(range(IMAGE, AUDIO_END + 1))
    words.save_pretrained(folder)
    images = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, size=dict(shortest_edge=128, longest_edge=1024))
    sounds = WhisperFeatureExtractor(feature_size=config.audio_config.num_mel_bins, chunk_length=4)
    # One file for both, as the hub's.
    settings = sounds.to_dict() | images.to_dict() | dict(image_processor_type="Qwen2VLImageProcessor")
    settings.pop("mel_filters", None)
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, default=lambda x: x.tolist()))
    made = Qwen2_5OmniProcessor.__new__(Qwen2_5OmniProcessor)
    made.tokenizer, made.image_processor, made.feature_extractor = words, images, sounds
    made.video_processor, made.chat_template = Cut(), None
    for name, mark in MARKS.items():
        setattr(made, name, mark)
        setattr(made, f"{name}_id", words.convert_tokens_to_ids(mark))
    return reference, made, folder


class Cut:
    """The part of transformers' processor of videos that cuts patches from frames that need no resizing."""

    merge_size = temporal_patch_size = 2
    valid_kwargs = VideosKwargs

    def __call__(self, videos, **_) -> dict:
        mean, std = np.float32([0.48145466, 0.4578275, 0.40821073]), np.float32([0.26862954, 0.26130258, 0.27577711])
        patches, grids = [], []
        for shown in videos:
            shown = np.concatenate([shown, shown[-1:]]) if len(shown) % 2 else shown
            cut = "(f t) (h p a) (w q b) c -> (f h w p q) (c t a b)"
            patches.append(rearrange((shown.astype(np.float32) / 255 - mean) / std, cut, t=2, p=2, q=2, a=4, b=4))
            grids.append([len(shown) // 2, shown.shape[1] // 4, shown.shape[2] // 4])
        return dict(pixel_values_videos=torch.tensor(np.concatenate(patches)), video_grid_thw=torch.tensor(grids))


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


def test_processor_positions_logits_and_answers(case, assert_close):
    reference, _, folder = case
    module, params = from_pretrained(folder)
    ours = Processor.from_pretrained(folder)
    given = dict(
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
    batch = ours([text for text, *_ in ROWS], **given)
    logits = np.asarray(jax.jit(module.apply)({"params": params}, batch).logits)
    answers = complete(module, params, batch, ours, max_new_tokens=NEW_TOKENS, ignore_eos=True)
    for row, (text, *media) in enumerate(ROWS):
        inputs = reference_inputs(case, text, *media)
        length = int(batch["segments"][row].sum())
        np.testing.assert_array_equal(batch["tokens"][row, :length], inputs["input_ids"][0], err_msg=text)
        lengths = inputs["feature_attention_mask"].sum(-1) if "feature_attention_mask" in inputs else None
        positions, _ = reference.get_rope_index(
            inputs["input_ids"],
            inputs.get("image_grid_thw"),
            inputs.get("video_grid_thw"),
            inputs["attention_mask"],
            inputs["use_audio_in_video"],
            lengths,
            inputs.get("video_second_per_grid"),
        )
        np.testing.assert_array_equal(batch["positions"][row, :length].T, positions[:, 0], err_msg=text)
        with torch.no_grad():
            assert_close(logits[row, :length], reference(**inputs).logits[0], 1e-4, f"logits of {text!r}")
            said = reference.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
        assert list(answers[row].tokens) == said[0, length:].tolist(), text
    assert len({answer.tokens for answer in answers}) == len(ROWS), "equal answers prove nothing"
