"""Sounds and videos with sound for Qwen2.5-Omni's thinker: files, measuring, features, refusals."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clips import clip
from composed_checks import make_image
from flax import linen as nn
from omni_reference import HEARD, RATE, SEEN, WATCHED, frames, noise, save_reference

from mllm_jax import Processor, from_pretrained
from mllm_jax.data.audio import as_audio
from mllm_jax.data.message import Audio, Example, Image, Message, Text, Video
from mllm_jax.data.processing.audio import read_audio_processor
from mllm_jax.data.processing.composed import ComposedLayout, ImageTokens
from mllm_jax.data.processing.layouts import Layout
from mllm_jax.data.source_encoder import without_pixels
from mllm_jax.data.video import read_video
from mllm_jax.encoders.omni_audio import OmniAudioConfig
from mllm_jax.errors import ConfigError, DataError
from mllm_jax.models.qwen_omni import QwenOmniLayout
from mllm_jax.models.registry import pretrained_config


@pytest.fixture(scope="module")
def ours(tmp_path_factory, randomise):
    """Returns a processor, and its model's folder."""
    folder = tmp_path_factory.mktemp("omni")
    save_reference(folder, "plain", randomise)
    return Processor.from_pretrained(folder), folder


def equal(batch: dict, wanted: dict) -> None:
    assert batch.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(batch[name], array, err_msg=name)


def test_the_sound_of_a_files_video(ours, tmp_path):
    processor, _ = ours
    film = clip(10, fps=4, size=(16, 24), heard=noise(1.4))
    path = tmp_path / "film.mp4"
    path.write_bytes(film)
    shown, times = read_video(film, processor.layout.sampling)
    apart = Video(list(shown), fps=times.fps, times=times.seconds, use_audio_in_video=Audio(as_audio(film), rate=RATE))
    text = f"what is {WATCHED} ?"
    wanted = processor(text, videos=[apart])
    assert wanted["audio_sounds"].any()
    equal(processor(text, videos=[Video(film, use_audio_in_video=True)]), wanted)
    equal(processor(text, videos=[path], use_audio_in_video=True), wanted)
    # One that is silent is only watched, as in the reference.
    silent = clip(10, fps=4, size=(16, 24))
    equal(processor(text, videos=[silent], use_audio_in_video=True), processor(text, videos=[silent]))
    assert "audio_sounds" not in processor(text, videos=[film])


def test_rows_are_measured_without_decoding(ours, tmp_path):
    processor, _ = ours
    path = tmp_path / "film.mp4"
    path.write_bytes(clip(10, fps=4, size=(16, 24), heard=noise(1.4)))
    parts = (Video(path, use_audio_in_video=True), Image(make_image(20, 61)), Audio((noise(0.5), RATE)), Text("what ?"))
    example, layout = Example((Message("user", parts),)), processor.layout
    measured = layout.prepare(without_pixels(example, layout).media)
    decoded = layout.prepare(example.media)
    assert [m.modality for m in decoded] == ["image", "audio", "image", "audio"]
    for known, wanted in zip(measured, decoded, strict=True):
        assert (known.slots, known.modality, known.inside) == (wanted.slots, wanted.modality, wanted.inside)
        assert known.slots == len(next(iter(wanted.arrays.values())))
        np.testing.assert_array_equal(known.tokens, wanted.tokens)


def test_what_cannot_be_heard_is_refused(ours):
    processor, folder = ours
    text = f"{HEARD} ?"
    with pytest.raises(DataError, match=r"a sound of 0\.010 seconds"):
        processor(text, audios=[(noise(0.01), RATE)])
    with pytest.raises(DataError, match=r"a sound of 4\.1 seconds"):  # the reference's processor would cut it
        processor(text, audios=[(noise(4.1), RATE)])
    with pytest.raises(DataError, match="frames have no sound themselves"):
        Video(frames(2, 8, 8), fps=1, use_audio_in_video=True)
    with pytest.raises(DataError, match="use_audio_in_video='yes'"):
        Video("a.mp4", use_audio_in_video="yes")
    config = pretrained_config(folder)
    settings = read_audio_processor(folder, feature_size=9)
    with pytest.raises(ConfigError, match="9 values"):
        QwenOmniLayout(config, processor.layout.image_processor, settings)
    with pytest.raises(ConfigError, match="images and audios"):
        dataclasses.replace(config, inputs={"image": config.inputs["image"]})


def test_other_models_do_not_hear_videos():
    film = Video("a.mp4", use_audio_in_video=True)
    for layout in (Layout(), ComposedLayout({"image": ImageTokens(8, 1)}, 5)):
        with pytest.raises(DataError, match="does not hear its sound"):
            layout.prepare([film])
        assert without_pixels(Example((Message("user", (film,)),)), layout).media == [film]


def test_features_are_those_of_the_padded_sound(ours):
    layout = ours[0].layout
    for seconds in (0.03, 0.5, 3.97, 3.99, 4.0):
        wanted = layout.audio_processor([noise(seconds)])["input_features"][0]
        found = layout._features(noise(seconds))
        np.testing.assert_allclose(found, wanted[:, : found.shape[1]], atol=1e-6)
        assert found.shape[1] == layout.audio_processor.steps(round(seconds * RATE))


def test_slots_that_stay_empty_change_nothing(ours, assert_close):
    ours, folder = ours
    (module, params), text = from_pretrained(folder), f"{HEARD} a {SEEN} dog {HEARD} ?"
    apply = jax.jit(module.apply)
    media = dict(images=[make_image(20, 61)], audios=[(noise(0.5), RATE), (noise(1.21), RATE)])
    batch = ours(text, **media)
    slots = {name: batch[array].shape[1] for name, array in (("image", "patches"), ("audio", "audio_sounds"))}
    padded = ours(text, **media, slots={"image": slots["image"] + 8, "audio": slots["audio"] + 3})
    assert padded["audio_sounds"].shape[1] == slots["audio"] + 3
    wanted = apply({"params": params}, batch).logits
    assert_close(apply({"params": params}, padded).logits, wanted, 1e-5, "empty slots")
    silent = ours("what is it ?", slots=slots)
    assert silent.keys() == batch.keys()
    assert np.isfinite(apply({"params": params}, silent).logits).all()


def test_packed_examples_are_answered_as_alone(ours, assert_close):
    ours, folder = ours
    module, params = from_pretrained(folder)
    apply = jax.jit(module.apply)
    heard = Video(frames(6, 16, 16), fps=2, use_audio_in_video=Audio(noise(1.3), rate=RATE))
    asked = [
        (Text("<|vision_bos|>"), heard, Text("<|vision_eos|> what ?"), Audio((noise(0.3), RATE))),
        (Image(make_image(20, 61)), Text("a cat"), Audio((noise(0.5), RATE)), Text("?"), Video(frames(4, 8, 8), fps=2)),
    ]
    rows = [ours.prompt((Message("user", parts),), plain=True) for parts in asked]
    length = sum(len(row.tokens) for row in rows)
    slots = {name: sum(row.slots[name] for row in rows) for name in ("image", "audio")}
    packed = apply({"params": params}, ours.pack([rows], length, slots)).logits[0]
    apart = apply({"params": params}, ours.batch(rows, slots, length)).logits
    first, second = (len(row.tokens) for row in rows)
    assert_close(packed[:first], apart[0, :first], 1e-5, "the first")
    assert_close(packed[first:], apart[1, :second], 1e-5, "the second")


@pytest.mark.parametrize("window", [3, 4])
def test_gradients_are_finite_and_zero_after_the_end(window):
    sizes = dict(num_mel_bins=4, hidden_size=8, num_layers=2, num_heads=2, mlp_size=8, output_size=8)
    module = OmniAudioConfig(n_window=window, **sizes).make()
    features = np.random.default_rng(0).normal(size=(3, 4, 24)).astype(np.float32)
    mask = np.arange(24) < np.asarray([[24], [5], [0]])  # chunks that are empty, and a sound that is
    params = nn.meta.unbox(module.init(jax.random.key(0), features)["params"])

    def heard(params, features):
        out = module.apply({"params": params}, features, mask)
        return jnp.where(out.mask[..., None], out.last_hidden_state, 0).sum()

    own, given = jax.jit(jax.grad(heard, (0, 1)))(params, features)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(own))
    assert np.isfinite(given).all() and (given.swapaxes(1, 2)[~mask] == 0).all() and given[0].any()
