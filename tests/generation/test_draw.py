"""Drawing: seeds, counts, steps that are reported, guidance in part of the steps, meshes, and what is refused."""

from __future__ import annotations

import warnings
from functools import partial

import jax
import numpy as np
import pytest
import soundfile
import tiny_diffusion as tiny
from PIL import Image

import mllm_jax
from mllm_jax.errors import ConfigError, DataError, MllmError
from mllm_jax.generation.assistant import Assistant
from mllm_jax.generation.media import Media
from mllm_jax.generation.start_image import start_image
from mllm_jax.sharding.mesh import MeshConfig, make_mesh

FAST = dict(steps=3, guidance_scale=2.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    tiny.write(path, **tiny.SMALL)
    return path


@pytest.fixture(scope="module")
def assistant(folder):
    return Assistant.load(folder)


def drawn(answers) -> np.ndarray:
    return np.stack([answer.media[0].array for answer in answers])


def close(one, other) -> bool:
    """Returns whether images are equal up to rounding, which depends on the size of a batch."""
    return bool(np.abs(one - other).max() < 1e-5)


# ---- seeds and counts


def test_an_image_alone_and_in_a_batch(assistant):
    """Checks that an image depends on its prompt, negative prompt and seed alone; and the order of the answers."""
    answers = assistant.draw(["a red cat", "dog"], ["blurry", ""], seed=3, count=3, **FAST)
    images = drawn(answers)
    assert images.shape == (6, 16, 16, 3) and images.dtype == np.float32
    assert [answer.text for answer in answers] == ["<image 1>"] * 6 and {answer.tokens for answer in answers} == {()}
    media = [answer.media[0] for answer in answers]
    assert [m.metadata["prompt"] for m in media] == ["a red cat"] * 3 + ["dog"] * 3
    assert [m.metadata["seed"] for m in media] == ["3", "4", "5"] * 2
    assert {m.kind for m in media} == {"image"} and {m.rate for m in media} == {None}
    distances = np.abs(images[:, None] - images[None]).max(axis=(2, 3, 4))
    assert distances[~np.eye(6, dtype=bool)].min() > 1e-3

    listed = drawn(assistant.draw(["dog", "a red cat"], ["", "blurry"], seed=[4, 5], **FAST))
    assert close(listed, images[[4, 2]])
    alone = drawn(assistant.draw("dog", seed=4, **FAST))
    assert close(alone, images[[4]])
    each = drawn(assistant.draw("dog", seed=[5, 4, 3], count=3, batch_size=2, **FAST))
    assert close(each, images[[5, 4, 3]])
    with pytest.raises(ConfigError, match="one for each image"):
        assistant.draw("dog", seed=[1, 2], count=3)
    for seed in (-1, 2**32, 1.5):
        with pytest.raises(ConfigError, match="seed="):
            assistant.draw("dog", seed=seed)


def test_latents_and_noise(assistant):
    """Checks that given noise is drawn from instead of the seed's, also by a stochastic scheduler."""
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((2, 8, 8, 4)).astype(np.float32)
    noise = rng.standard_normal((3, 2, 8, 8, 4)).astype(np.float32)
    how = dict(FAST, scheduler="ddpm", latents=latents)
    first = drawn(assistant.draw(["cat", "cat"], noise=noise, seed=1, **how))
    assert close(first, drawn(assistant.draw(["cat", "cat"], noise=noise, seed=2, **how)))
    assert not close(first, drawn(assistant.draw(["cat", "cat"], seed=2, **how)))
    assert not close(first[0], first[1])
    with pytest.raises(DataError, match="latents with NaN"):
        assistant.draw("cat", latents=np.full((1, 8, 8, 4), np.nan))
    for wrong in ((2, 8, 8, 4), (1, 8, 8, 3), (8, 8)):
        with pytest.raises(DataError, match=r"latents \["):
            assistant.draw("cat", latents=np.zeros(wrong))
    with pytest.raises(DataError, match="noise"):
        assistant.draw(["cat", "cat"], noise=noise[:2], **how)
    with pytest.raises(DataError, match="draws no noise"):
        assistant.draw(["cat", "cat"], noise=noise, **FAST, latents=latents)
    with pytest.raises(ConfigError, match="height 32 beside latents of 16"):
        assistant.draw("cat", latents=latents[:1], height=32)


def test_weights_that_make_nan(assistant):
    broken = jax.tree.map(lambda leaf: leaf * np.nan, assistant.params)
    with pytest.raises(DataError, match="image 1 of 1, whose latents became NaN"):
        assistant.with_params(broken).draw("dog", seed=4, **FAST)


# ---- the loop


def test_steps_are_reported(assistant):
    """Checks the reports of each batch, in order; that they change nothing; that an exception ends the loop."""
    seen = []
    how = dict(seed=4, count=3, batch_size=2, **FAST)
    watched = drawn(assistant.draw("dog", on_step=lambda *step: seen.append(step), **how))
    assert [number for number, *_ in seen] == [0, 1, 2, 3] * 2  # PNDM calls the model once more
    assert [time for _, time, _ in seen[:4]] == [667, 334, 334, 1]
    assert [latents.shape for *_, latents in seen] == [(2, 8, 8, 4)] * 4 + [(1, 8, 8, 4)] * 4
    assert close(watched, drawn(assistant.draw("dog", **how)))
    last = np.concatenate([seen[3][2], seen[7][2]])
    decode = partial(assistant.model.apply, method="decode")
    assert np.abs(watched - jax.jit(decode)({"params": assistant.params}, last)).max() < 1e-5

    def stop(number, *_):
        if number == 1:
            raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        assistant.draw("dog", on_step=stop, **how)
    assert close(watched, drawn(assistant.draw("dog", on_step=lambda *_: None, **how)))


def test_guidance_in_part_of_the_steps(assistant):
    """Checks an empty interval, and one inside against a loop by hand."""
    how = dict(seed=4, steps=4, scheduler="ddim")
    inside = drawn(assistant.draw("dog", "cat", guidance_scale=5.0, guidance_interval=(0.25, 0.75), **how))

    drawer, states = assistant._drawer, []
    empty = dict(how, guidance_scale=5.0, guidance_interval=(0.5, 0.5))
    without = drawn(assistant.draw("dog", on_step=lambda *step: states.append(step), **empty))

    @partial(jax.jit, static_argnums=0)
    def call(method, *given):
        return assistant.model.apply({"params": assistant.params}, *given, method=method)

    text, negative = (call("condition", drawer._tokens(words)[None]) for words in ("dog", "cat"))
    scheduler = mllm_jax.generators.schedulers.by_name("ddim", assistant.model.config.scheduler)
    scheduler = mllm_jax.StableDiffusionConfig.sampler(scheduler)
    state, latents = scheduler.start(scheduler.init(4), 1), states[0][2]  # the first step has no guidance
    for guided in (True, True, False):
        output = call("denoise", latents, state.timestep[None], text)
        if guided:
            other = call("denoise", latents, state.timestep[None], negative)
            output = other + 5.0 * (output - other)
        state, latents = scheduler.step(state, output, latents)
    assert np.abs(inside - call("decode", latents)).max() < 1e-4
    assert not close(inside, without)
    with pytest.raises(ConfigError, match="guidance_interval"):
        assistant.draw("dog", guidance_interval=(0.5, 0.2))
    with pytest.warns(UserWarning, match="no effect"):
        assistant.draw("dog", "cat", on_step=print, **empty)


def test_on_a_mesh(folder, assistant, devices):
    """Checks the same images, and the same reports, with weights and rows split over a mesh."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=2), devices[:4])
    sharded, seen = Assistant.load(folder, mesh=mesh), []
    how = dict(seed=4, count=4, **FAST)
    found = sharded.draw("dog", on_step=lambda number, *_: seen.append(number), **how)
    assert close(drawn(found), drawn(assistant.draw("dog", **how)))
    assert seen == [0, 1, 2, 3]

    def stop(number, *_):
        if number == 1:
            raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        sharded.draw("dog", on_step=stop, **how)
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(sharded.params))


# ---- start images


def test_start_images(assistant, tmp_path):
    """Checks the forms of a start image, its size, and that little strength keeps it."""
    pixels = (np.random.default_rng(0).random((18, 23, 3)) * 255).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    forms = [pixels, Image.fromarray(pixels), tmp_path / "a.png", (tmp_path / "a.png").read_bytes()]
    read = [start_image(form, None, None, 2) for form in forms]
    assert read[0].shape == (18, 22, 3) and all(np.array_equal(each, read[0]) for each in read)
    asked = start_image(pixels / 255, 36, 46, 2)
    assert np.array_equal(asked[::2, ::2], (pixels / 255).astype(np.float32))
    how = dict(guidance_scale=1.0, steps=10, seed=1, start_image=tmp_path / "a.png")
    assert drawn(assistant.draw("dog", strength=0.1, **how)).shape == (1, 18, 22, 3)
    sized = dict(how, height=16, width=24)
    weak, strong = (drawn(assistant.draw("dog", strength=strength, **sized)) for strength in (0.1, 0.8))
    assert weak.shape == (1, 16, 24, 3) and not close(weak, strong)
    assert close(strong, drawn(assistant.draw("dog", **sized)))
    for strength in (0.0, 1.1):
        with pytest.raises(ConfigError, match="strength"):
            assistant.draw("dog", strength=strength, **how)
    with pytest.raises(ConfigError, match="strength"):
        assistant.draw("dog", strength=0.05, **how)
    with pytest.raises(ConfigError, match="without a start image"):
        assistant.draw("dog", strength=0.5)
    with pytest.raises(DataError, match="2 start images for 1"):
        assistant.draw("dog", start_image=[pixels, pixels])
    with pytest.raises(DataError, match="none.png"):
        assistant.draw("dog", start_image=tmp_path / "none.png")


# ---- what is refused


def test_prompts(assistant):
    """Checks that the end of a long prompt is left out with a warning that names it."""
    long = "a red cat " * 3 + "on the sofa"
    with pytest.warns(UserWarning, match="left out: 'the sofa'") as warned:
        cut = drawn(assistant.draw(long, seed=4, **FAST))
    assert warned[0].filename == __file__, "the line that called the library"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert close(cut, drawn(assistant.draw("a red cat " * 3 + "on", seed=4, **FAST)))
    with pytest.warns(UserWarning, match="left out: 'sofa'"):
        assistant.draw("dog", "the " * 10 + "sofa", seed=4, **FAST)
    for wrong in ([], [3], None):
        with pytest.raises(DataError):
            assistant.draw(wrong)
    with pytest.raises(DataError, match="1 negative prompts for 2"):
        assistant.draw(["dog", "cat"], ["blurry"])


@pytest.mark.parametrize(
    "asked, named",
    [
        (dict(height=30), "nearest is 32"),
        (dict(width=1), "nearest is 8"),
        (dict(height=0), "nearest is 8"),
        (dict(frames=3), "frames=3"),
        (dict(seconds=1.0), "seconds=1.0"),
        (dict(steps=0), "steps=0"),
        (dict(steps=1001), "1001 steps"),
        (dict(count=0), "count=0"),
        (dict(guidance_scale=float("nan")), "guidance_scale=nan"),
        (dict(scheduler="heun"), "heun"),
        (dict(scheduler="flow"), "flow|Flow"),
    ],
)
def test_options(assistant, asked, named):
    with pytest.raises(ConfigError, match=named):
        assistant.draw("dog", **asked)


def test_other_models(assistant, folder, tmp_path):
    """Checks that a text model does not draw, what a Stable Diffusion does not do, and a folder without tokenizer."""
    from tiny_whisper import make

    with pytest.raises(ConfigError, match="asked to draw"):
        Assistant.load(make(tmp_path / "whisper")).draw("dog")
    for ask in (lambda: assistant.generate("dog"), lambda: assistant.embed("dog"), lambda: assistant.transcribe("a")):
        with pytest.raises(ConfigError, match="StableDiffusionPipeline"):
            ask()
    mllm_jax.save_pretrained(assistant.model.clone(companions=None), assistant.params, tmp_path / "bare")
    with pytest.raises(MllmError, match="tokenizer"):
        Assistant.load(tmp_path / "bare")


# ---- files of media


def test_media_files(tmp_path):
    """Checks files of all kinds, read back, and names that do not fit."""
    av = pytest.importorskip("av")
    rng = np.random.default_rng(0)
    image = Media("image", rng.random((9, 7, 3), dtype=np.float32), metadata={"prompt": "ä cat\nand a dog"})
    image.save(tmp_path / "a.png")
    stored = Image.open(tmp_path / "a.png")
    assert stored.text == {"prompt": "ä cat\nand a dog"}
    assert np.abs(np.asarray(stored) / 255 - image.array).max() <= 0.5 / 255 + 1e-6
    for size in ((16, 24), (9, 7)):
        frames = np.broadcast_to(np.linspace(0, 1, 5, dtype=np.float32)[:, None, None, None], (5, *size, 3))
        Media("video", frames, 8).save(tmp_path / "a.mp4")
        with av.open(str(tmp_path / "a.mp4")) as container:
            read = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
            assert container.streams.video[0].average_rate == 8
        assert read.shape == frames.shape and np.abs(read / 255 - frames).max() < 0.05
    wave = np.sin(np.arange(1600) / 9, dtype=np.float32)
    Media("audio", wave, 16_000).save(tmp_path / "a.wav")
    samples, rate = soundfile.read(tmp_path / "a.wav")
    assert rate == 16_000 and np.abs(samples - wave).max() < 1e-4
    with pytest.raises(DataError, match=".wav, .flac"):
        Media("audio", wave, 16_000).save(tmp_path / "a.png")
    with pytest.raises(DataError, match="NaN"):
        Media("audio", wave * np.nan, 16_000).save(tmp_path / "b.wav")
    for kind, array, rate in (
        ("image", wave, None),
        ("audio", wave, None),
        ("smell", wave, 1),
        ("image", image.array, 3),
    ):
        with pytest.raises(DataError, match="kind"):
            Media(kind, array, rate)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "a.png", "a.wav"]
