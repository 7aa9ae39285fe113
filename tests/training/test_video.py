"""A composed model that reads images and videos: layout, two steps of training, answers, and the command line."""

from __future__ import annotations

import io
from dataclasses import dataclass, replace

import jax
import numpy as np
import pytest
from clips import clip, shades
from rich.console import Console
from toy_data import MODEL, SIZE, Toy, quick_compilation, tokenizer

from mllm_jax import AdamW, Experiment, Mixture, NextToken, Stage, TokenizerConfig, Video, Weighted
from mllm_jax.cli import main
from mllm_jax.data.message import Example, Image, Message, Text
from mllm_jax.data.pipeline import training_texts
from mllm_jax.data.source_encoder import without_pixels
from mllm_jax.data.video import FrameSampling
from mllm_jax.errors import ConfigError, DataError
from mllm_jax.generation.assistant import Assistant
from mllm_jax.generation.conversation import Dialogue, chat
from mllm_jax.generation.options import Options
from mllm_jax.generation.prompts import PromptFile
from mllm_jax.generation.sampling import Sampling
from mllm_jax.models.branch import Branch
from mllm_jax.models.composed_layout import composed_layout
from mllm_jax.models.multimodal import MultimodalConfig
from mllm_jax.models.processor import Processor
from mllm_jax.projectors.pool import PoolProjectorConfig
from mllm_jax.projectors.qformer import QFormerConfig
from mllm_jax.projectors.resampler import ResamplerConfig
from mllm_jax.training.loop import train

IMAGE_TOKENS, FRAME_TOKENS, FRAMES = MODEL.media_tokens, 1, 3
# One encoder for both; the patches of a frame become their mean.
SEEING = replace(MODEL, inputs={**MODEL.inputs, "video": Branch("image", PoolProjectorConfig())})
FILM = clip(12, 4, (16, 16))


@dataclass(frozen=True)
class Films:
    """Clips of a grey that the answer names; with and without an image before them, as a file or as frames."""

    size: int = 12
    name: str = "films"

    def build(self) -> FilmSource:
        return FilmSource(self)


class FilmSource:
    def __init__(self, config: Films):
        self.config, self.name = config, config.name

    def __len__(self) -> int:
        return self.config.size

    def example(self, index: int) -> Example:
        grey = np.full((5, 12, 10, 3), 20 * index, np.uint8)
        film = Video(grey[:FRAMES], fps=2) if index % 2 else Video(FILM)
        shown = (Image(grey[0]), film) if index % 3 else (film,)
        answer = Message("assistant", f"{index} red")
        return Example((Message("user", (*shown, Text("what colour"))), answer))

    def fingerprint(self) -> str:
        return repr(self.config)


def processor(config: MultimodalConfig = SEEING, time: str = "", frames: int = FRAMES) -> Processor:
    words = tokenizer()
    return Processor(config, words, composed_layout(config, words, sampling=FrameSampling(frames), frame_time=time))


def test_frames_follow_each_other_after_the_images():
    grey = np.random.default_rng(0).integers(0, 256, (2, SIZE, SIZE, 3), np.uint8)
    ours, token = processor(), tokenizer().image_token_id
    batch = ours("<image> what <image>", images=[grey[0]], videos=[Video(FILM)])
    assert batch["images"].shape[:2] == (1, 1) and batch["video_images"].shape[:2] == (1, FRAMES)
    assert shades(batch["video_images"][0]) == [0, 4, 8]
    index = batch["media_index"][0][batch["tokens"][0] == token].tolist()
    assert index == list(range(IMAGE_TOKENS)) + [IMAGE_TOKENS + n for n in range(FRAMES * FRAME_TOKENS)]
    # In a message the order is the user's; the second row has no image, and the same shapes.
    said = Message("user", (Video(FILM), Image(grey[0]), Text("what")))
    batch = ours([(said,), (Message("user", (Video(grey, fps=1), Text("what"))),)])
    here = batch["tokens"] == token
    assert batch["media_index"][0][here[0]].tolist() == [IMAGE_TOKENS, IMAGE_TOKENS + 1, IMAGE_TOKENS + 2, 0, 1, 2, 3]
    assert batch["media_index"][1][here[1]].tolist() == [IMAGE_TOKENS, IMAGE_TOKENS + 1]
    np.testing.assert_array_equal(batch["video_images"][1, :2], grey)
    alone = ours("<image> what", videos=[FILM])
    assert "images" not in alone and alone["media_index"].max() == FRAMES - 1


def test_the_times_of_frames_in_the_text():
    ours, words = processor(time="{:.1f} s"), tokenizer()
    batch = ours("<image> what", videos=[Video(np.zeros((2, 9, 9, 3), np.uint8), times=[0.5, 12.25])])
    mark = [words.image_token_id]
    shown = [*words.words("0.5 s"), *mark, *words.words("12.2 s"), *mark]
    assert batch["tokens"][0, 2 : 2 + len(shown)].tolist() == shown  # after <bos> and a space
    assert batch["media_index"][0].max() == 1
    moved = ours("<image> what", videos=[Video(clip(6, times=[0, 0.3, 0.4, 2, 3, 7], codec="mpeg4"), num_frames=2)])
    assert words.decode(moved["tokens"][0]).startswith("0.0 s 2.0 s")
    with pytest.raises(ConfigError, match="a frame's time as 'second'"):
        processor(time="second")


@pytest.mark.parametrize("time", ["", "{:.1f} s"])
@pytest.mark.parametrize("film", [FILM, clip(5, times=[0, 0.3, 0.4, 9.9, 12], codec="mpeg4")], ids=["even", "uneven"])
def test_measured_as_encoded(time, film):
    ours, samplings = processor(time=time), (Video(film), Video(film, fps=1.5), Video(film, num_frames=8))
    for video in (*samplings, Video(np.zeros((4, 9, 9, 3), np.uint8), fps=3)):
        example = Example((Message("user", (video, Text("what"))), Message("assistant", "red")))
        encoded = ours.encode(example, 200)
        measured = ours.encode(without_pixels(example, ours.layout), 200)
        assert encoded.slots == measured.slots == {"video": len(encoded.media[0].arrays["video_images"])}
        np.testing.assert_array_equal(encoded.tokens, measured.tokens)


@pytest.mark.parametrize(
    "projector,tokens",
    [
        ("image", IMAGE_TOKENS),
        (PoolProjectorConfig(), 1),
        (ResamplerConfig(hidden_size=16, num_queries=4, num_heads=2, head_dim=8), 4),
        (
            QFormerConfig(
                hidden_size=16, num_layers=1, num_heads=2, mlp_size=16, num_queries=2, cross_attention_frequency=1
            ),
            2,
        ),
    ],
    ids=["shared", "pool", "resampler", "Q-Former"],
)
def test_each_frame_is_compressed_by_the_projector(projector, tokens):
    config = replace(MODEL, inputs={**MODEL.inputs, "video": Branch("image", projector)})
    batch = processor(config)("<image> what", videos=[FILM])
    assert (batch["media_index"] >= 0).sum() == FRAMES * tokens == batch["media_index"].max() + 1
    module = config.make()
    params = jax.eval_shape(module.init, jax.random.key(0), batch)
    media = jax.eval_shape(lambda p: module.apply(p, batch, method="encode_media").tokens, params)
    assert media.shape == (1, FRAMES * tokens, MODEL.llm.hidden_size)


def test_logits_are_those_of_the_frames_as_images():
    """Checks a video whose branch shares encoder and projector: its frames count as images in order."""
    shared = replace(SEEING, inputs={**MODEL.inputs, "video": Branch("image", "image")})
    ours, frames = processor(shared), np.random.default_rng(1).integers(0, 256, (2, SIZE, SIZE, 3), np.uint8)
    video = ours("<image> what", videos=[Video(frames, fps=1)])
    images = Processor(MODEL, tokenizer(), composed_layout(MODEL, tokenizer()))(
        "<image><image> what", images=list(frames)
    )
    np.testing.assert_array_equal(video["media_index"], images["media_index"])
    params = shared.make().init(jax.random.key(0), video)
    logits = jax.jit(lambda model, batch: model.apply(params, batch).logits, static_argnums=0)
    np.testing.assert_allclose(logits(shared.make(), video), logits(MODEL.make(), images), atol=1e-5)
    turned = video | {"video_images": video["video_images"][:, ::-1]}
    assert np.abs(logits(shared.make(), turned) - logits(shared.make(), video))[0, -1].max() > 1e-4


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Trains two steps."""
    base = tmp_path_factory.mktemp("films")
    words = base / "words" / "tokenizer.json"
    type(tokenizer()).train(training_texts([Films().build(), Toy().build()]), 320).save(words.parent)
    data = Mixture((Weighted(Films()),), rows=2, length=48, slots={"image": 2, "video": 2 * FRAMES})
    experiment = Experiment(
        name="films",
        model=SEEING,
        tokenizer=TokenizerConfig(path=str(words), frames=FrameSampling(FRAMES), frame_time="{:.0f} s"),
        stages=(Stage("all", NextToken(), ("projector_*", "llm/*"), data, 2, AdamW(warmup_steps=0)),),
    )
    with quick_compilation():
        train(experiment, base / "run", devices=jax.devices()[:1])
    return base / "run"


def test_a_run_answers_about_a_video(run, tmp_path, capsys):
    path = tmp_path / "a.mp4"
    path.write_bytes(FILM)
    assistant = Assistant.load(run)
    how = dict(max_new_tokens=4, ignore_eos=True)
    asked = [{"role": "user", "content": [{"type": "video", "path": str(path)}, {"type": "text", "text": "what"}]}]
    answer = assistant.generate(asked, **how)
    other = (Message("user", (Video(np.full((3, 9, 9, 3), 255, np.uint8), fps=1), Text("what"))),)
    assert len(assistant.generate(other, **how).tokens) == len(answer.tokens) == 4
    assert main(["generate", str(run), "--video", str(path), "what", "--max-new-tokens", "4"]) == 0
    shown = capsys.readouterr().out.strip()
    assert shown == assistant.generate(asked, max_new_tokens=4).text
    six = [{"role": "user", "content": [{"type": "video", "path": str(path), "num_frames": 6}, asked[0]["content"][1]]}]
    assert main(["generate", str(run), "what", "--video", str(path), "--frames", "6", "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out.strip() == assistant.generate(six, max_new_tokens=4).text
    path.write_text("no video")
    assert main(["generate", str(run), "--video", str(path), "what"]) != 0
    assert "cannot be opened as a video" in capsys.readouterr().err


def test_chat_and_prompts_with_videos(run, tmp_path):
    path, absent = tmp_path / "a.mp4", tmp_path / "absent.mp4"
    path.write_bytes(FILM)
    assistant = Assistant.load(run)
    dialogue = Dialogue(assistant, Options(4, ignore_eos=True), Sampling())
    lines, said = iter([f"/video {absent}", f"/video {path}", "what", "/exit"]), io.StringIO()
    assert chat(dialogue, read=lambda _: next(lines), console=Console(file=said, width=200)) == 0
    assert "absent.mp4 cannot be read" in said.getvalue() and said.getvalue().count("shown with your next") == 1
    asked = Message("user", (Video(path), Text("what")))
    assert dialogue.turns[1].content == assistant.generate(asked, max_new_tokens=4, ignore_eos=True).text
    (tmp_path / "asked.jsonl").write_text('{"prompt": "what", "video": "a.mp4"}\n{"prompt": "what", "video": ["b", 7]}')
    first, second = PromptFile(tmp_path / "asked.jsonl")
    assert assistant.prompt(first.messages).slots == {"video": FRAMES}
    assert isinstance(second.messages, DataError)


def test_models_without_videos_refuse_them():
    alone = Processor(MODEL, tokenizer(), composed_layout(MODEL, tokenizer()))
    with pytest.raises(DataError, match="a part of type 'video'"):
        alone((Message("user", (Video(FILM), Text("what"))),))
    with pytest.raises(DataError, match="a medium of type Video\n  expected: images: the model reads nothing else"):
        alone("<image> what", videos=[FILM])
    with pytest.raises(DataError, match="2 frames without their times"):
        processor()("<image> what", videos=[[np.zeros((8, 8, 3), np.uint8)] * 2])
