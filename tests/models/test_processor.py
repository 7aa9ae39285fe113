"""Batches of texts with images: positions, shapes, refusals; and answers that do not depend on the batch."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mllm_jax import Video, generate
from mllm_jax.data import pixels
from mllm_jax.data.chat_tokenizer import ChatTokenizer
from mllm_jax.data.image_steps import ImageProcessor
from mllm_jax.data.processing.layouts import TileLayout
from mllm_jax.data.processing.media import NEWLINE, PreparedMedia
from mllm_jax.encoders.vit import ViTConfig
from mllm_jax.errors import DataError
from mllm_jax.llms.decoder import DecoderConfig
from mllm_jax.llms.t5 import T5Config
from mllm_jax.models.branch import Branch
from mllm_jax.models.multimodal import Connection, MultimodalConfig
from mllm_jax.models.processor import Processor
from mllm_jax.projectors.mlp import MLPProjectorConfig

WORDS = (
    "<pad>",
    "<s>",
    "</s>",
    "<image>",
    "<video>",
    "user:",
    "assistant:",
    "what",
    "is",
    "it",
    "a",
    "cat",
    "dog",
    "?",
)
ID = {word: i for i, word in enumerate(WORDS)}
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' }}"
    "{% if m['content'] is string %}{{ m['content'] + ' ' }}{% else %}"
    "{% for p in m['content'] %}{{ ('<' + p['type'] + '>' if p['type'] != 'text' else p['text']) + ' ' }}{% endfor %}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
LLM = DecoderConfig(
    vocab_size=len(WORDS), hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, mlp_size=24, eos_token_id=(2,)
)
ENCODER = ViTConfig(8, 4, 12, num_layers=2, num_heads=2, mlp_size=16, class_token=True)
CONFIG = MultimodalConfig(
    inputs={"image": Branch(ENCODER, MLPProjectorConfig(output_size=16), Connection(layers=(-2,)))},
    llm=LLM,
    newline=True,
)


@dataclass(frozen=True)
class Sums(MultimodalConfig):
    """A model with sums of two media tokens at a position."""

    @property
    def neighbours(self) -> int:
        return 2


class TwoTiles(TileLayout):
    """A layout of an image as two halves with a newline between them, and of a video as one tile of its mean."""

    image_token, video_token = ID["<image>"], ID["<video>"]
    tokens_a_tile = 4

    def image(self, image):
        halves = np.split(np.asarray(Image.fromarray(image).resize((16, 8))), 2, axis=1)
        places = np.array([0, 1, 2, 3, NEWLINE, 4, 5, 6, 7])
        return PreparedMedia({"images": np.stack(halves)}, np.full(9, self.image_token), places)

    def video(self, frames, times):
        tile = np.asarray(Image.fromarray(frames.mean(axis=0).astype(np.uint8)).resize((8, 8)))
        places, weights = np.array([[0, 1], [2, 3]]), np.array([[0.25, 0.75], [0.5, 0.5]], np.float32)
        return PreparedMedia({"images": tile[None]}, np.full(2, self.video_token), places, weights)


def word_tokenizer(template: str = TEMPLATE) -> ChatTokenizer:
    backend = Tokenizer(models.WordLevel(ID, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    fast.add_special_tokens({"additional_special_tokens": ["<image>", "<video>"]})
    fast.chat_template = template
    return ChatTokenizer(fast)


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


@pytest.fixture(scope="module")
def processor(tokenizer):
    return Processor(CONFIG, tokenizer, TwoTiles())


def make_image(seed: int, height: int = 9, width: int = 13) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def random_params(config):
    module = config.make()
    abstract = jax.eval_shape(lambda: module.init(jax.random.key(0), module.config.batch_spec().empty()))["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: 0.4 * rng.normal(size=x.shape).astype(np.float32), nn.meta.unbox(abstract))


def test_images_have_the_positions_of_the_text(processor):
    batch = processor(["what is <image> ? <image>", "a dog"], images=[make_image(0), make_image(1)])
    assert batch["images"].shape == (2, 4, 8, 8, 3) and batch["images"].dtype == np.uint8
    assert not batch["images"][1].any()
    one, two = [0, 1, 2, 3, 16, 4, 5, 6, 7], [8, 9, 10, 11, 16, 12, 13, 14, 15]
    assert batch["media_index"][0].tolist() == [-1, -1, *one, -1, *two]
    assert batch["media_index"][1].tolist() == [-1] * 21
    assert batch["tokens"][0].tolist() == [7, 8, *[3] * 9, 13, *[3] * 9]
    assert batch["segments"].sum(axis=1).tolist() == [21, 2]
    assert batch["positions"][0].tolist() == list(range(21))
    alone = processor("what is <image> ? <image>", images=[make_image(0), make_image(1)])
    np.testing.assert_array_equal(alone["images"][0], batch["images"][0])


def test_a_conversation_has_images_in_messages_or_beside(processor, tmp_path):
    Image.fromarray(make_image(0)).save(tmp_path / "cat.png")
    said = [{"type": "image", "image": tmp_path / "cat.png"}, {"type": "text", "text": "what is it ?"}]
    brought = processor([{"role": "user", "content": said}])
    bare = [{"type": "image"}, {"type": "text", "text": "what is it ?"}]
    beside = processor([{"role": "user", "content": bare}], images=[Image.fromarray(make_image(0))])
    for name, array in brought.items():
        np.testing.assert_array_equal(array, beside[name])
    assert brought["tokens"][0].tolist() == [5, *[3] * 9, 7, 8, 9, 13, 6]
    plain = processor([{"role": "user", "content": "what is it ?"}])
    assert plain["tokens"][0].tolist() == [5, 7, 8, 9, 13, 6] and "images" not in plain


def test_a_template_that_reads_lists_only_gets_texts_as_parts():
    """Checks a template like LLaVA's on the hub, which silently leaves out content that is a text."""
    lists = TEMPLATE.replace("m['content'] is string", "false").replace(
        "in m['content'] %}", "in m['content'] if p['type'] is defined %}"
    )
    written = Processor(CONFIG, word_tokenizer(lists), TwoTiles())([{"role": "user", "content": "what is it ?"}])
    assert written["tokens"][0].tolist() == [5, 7, 8, 9, 13, 6]


def test_sums_of_media_tokens(processor, tokenizer):
    """Checks a video with sums of two tokens at a position; an image, with one, is padded to two."""
    shown = dict(images=[make_image(0)], videos=[Video([make_image(1), make_image(2)], fps=1)])
    with pytest.raises(DataError, match="sums of 2 media tokens"):
        processor("<video> what <image>", **shown)
    batch = Processor(Sums(**vars(CONFIG)), tokenizer, TwoTiles())("<video> what <image>", **shown)
    assert batch["media_index"].shape == batch["media_weights"].shape == (1, 12, 2)
    assert batch["media_index"][0, :2].tolist() == [[0, 1], [2, 3]]
    assert batch["media_index"][0, 2].tolist() == [-1, -1]
    assert batch["media_index"][0, 3:5].tolist() == [[4, 4], [5, 5]] and batch["media_index"][0, 7, 0] == 12
    assert batch["media_weights"][0, 3:].tolist() == [[1, 0]] * 9
    params, model = random_params(CONFIG), CONFIG.make()
    media = model.apply({"params": params}, batch, method="encode_media").tokens
    ask = dict(media_index=batch["media_index"], media_weights=batch["media_weights"])
    merged = model.apply({"params": params}, batch["tokens"], media, **ask, method="merge")
    np.testing.assert_allclose(merged[0, 0], 0.25 * media[0, 0] + 0.75 * media[0, 1], atol=1e-6)
    np.testing.assert_array_equal(merged[0, 2], params["llm"]["token_embedding"]["embedding"][ID["what"]])
    np.testing.assert_allclose(merged[0, 7], params["newline"], atol=1e-6)


def test_batches_without_images_have_the_shapes_of_others(processor):
    some = processor(["what <image>", "a"], images=[make_image(0)], slots={"image": 2}, length=12)
    none = processor(["what", "a"], slots={"image": 2}, length=12)
    assert {name: (a.shape, a.dtype) for name, a in some.items()} == {n: (a.shape, a.dtype) for n, a in none.items()}
    assert not none["images"].any() and "images" not in processor(["what", "a"])


def test_the_connection_chooses_the_layer(processor):
    params, model = random_params(CONFIG), CONFIG.make()
    batch = processor("<image>", images=[make_image(0)])
    features = model.apply({"params": params}, batch, method="encode_images")
    pixels = (jnp.asarray(batch["images"][0], jnp.float32) / 255 - 0.5) / 0.5
    wanted = (
        ENCODER.make().apply({"params": params["encoder_image"]}, pixels, output_hidden_states=True).hidden_states[-2]
    )
    np.testing.assert_allclose(features, wanted[:, 1:], atol=1e-5)


@pytest.mark.parametrize("llm", [LLM, T5Config(len(WORDS), 16, 8, 24, 1, 1, 2)], ids=["decoder", "encoder-decoder"])
def test_an_answer_is_the_same_in_any_company(tokenizer, llm):
    config = MultimodalConfig({"image": Branch(ENCODER, MLPProjectorConfig(16), Connection((-2,)))}, llm, newline=True)
    processor = Processor(config, tokenizer, TwoTiles())
    model, params = config.make(), random_params(config)
    texts = ["what is <image> ?", "a dog", "<image> <image>", "<image> a cat is what ?"]
    shown = [[make_image(0)], [], [make_image(1), make_image(2)], [make_image(3, 20, 5)]]
    options = dict(max_new_tokens=8, ignore_eos=True)
    together = generate(model, params, processor(texts, images=shown), processor, **options)
    assert len(set(together)) > 1
    for text, images, wanted in zip(texts, shown, together, strict=True):
        assert generate(model, params, processor(text, images=images, slots={"image": 4}), processor, **options) == [
            wanted
        ]


def test_answers_to_learn(processor, tokenizer):
    batch = processor(["what is <image>", "a"], images=[make_image(0)], answers=["a cat", "dog ?"])
    assert batch["tokens"][0, -3:].tolist() == [ID["a"], ID["cat"], 2]
    assert batch["loss_weights"].tolist() == [[0] * 11 + [1] * 3, [0, 1, 1, 1] + [0] * 10]
    t5 = MultimodalConfig(
        {"image": Branch(ENCODER, MLPProjectorConfig(16))}, T5Config(len(WORDS), 16, 8, 24, 1, 1, 2), newline=True
    )
    batch = Processor(t5, tokenizer, TwoTiles())(["<image>", "a"], images=[make_image(0)], answers=["a cat", "dog"])
    assert batch["decoder_tokens"].tolist() == [[0, 10, 11, 1], [0, 12, 1, 0]]
    assert batch["loss_weights"].tolist() == [[0, 1, 1, 1], [0, 1, 1, 0]]


@pytest.mark.parametrize(
    "text,given,message",
    [
        ("what <image>", {}, r"1 placeholder\(s\) for media, and 0 of them"),
        ("what", dict(images=[make_image(0)]), r"0 placeholder\(s\) for media, and 1 of them"),
        (["<image>", "<image>"], dict(images=[make_image(0)] * 3), r"3 image\(s\) for 2 texts that ask for \[1, 1\]"),
        ([{"role": "user", "content": "what <image> ?"}], dict(images=[make_image(0)]), "text has '<image>' in it"),
        ([{"role": "user", "content": [{"type": "audio"}]}], {}, "part of type 'audio'"),
        ("a", dict(audios=[np.zeros(9)]), r"a medium of type Audio"),
        ("what <image>", dict(images=[make_image(0)], length=8), "a text of 10 tokens, media included"),
        ("what <image>", dict(images=[make_image(0)], slots={"image": 1}), "a row with 2 images"),
        ("what <image>", dict(images=[np.zeros((4, 4))]), r"given as float64\[4, 4\]"),
        (["a", "a"], dict(answers=["a"]), "2 texts and 1 answers"),
        ("", {}, "an empty text"),
        (["a", ""], {}, "an empty text"),
        ([], {}, "no text"),
    ],
)
def test_what_does_not_fit_is_refused(processor, text, given, message):
    with pytest.raises(DataError, match=message):
        processor(text, **given)


class Prepared(TwoTiles):
    """The layout TwoTiles with image processors, which know the sizes of their outputs."""

    image_processor = ImageProcessor("ViTImageProcessor", size=(8, 16))
    frames = ImageProcessor("ViTImageProcessor", size=(8, 8))

    def image(self, image):
        raise AssertionError("an image was prepared")

    def video(self, frames, times):
        raise AssertionError("a video was prepared")


@pytest.mark.parametrize(
    ("layout", "given", "message"),
    [
        # Decoded: 9 x 13 pixels each; prepared: 128 for an image, 64 for a frame.
        (TwoTiles, dict(images=[make_image(i) for i in range(9)]), "images and frames of one text of 1,053 pixels"),
        (TwoTiles, dict(videos=[Video([make_image(0)] * 9, fps=1)]), "images and frames of one text of 1,053 pixels"),
        (Prepared, dict(images=[make_image(i, 1, 1) for i in range(8)]), "prepared images and frames of 1,024 pixels"),
        (
            Prepared,
            dict(videos=[Video([make_image(0, 1, 1)] * 16, fps=1)]),
            "prepared images and frames of 1,024 pixels",
        ),
        (
            Prepared,
            dict(images=[make_image(i, 1, 1) for i in range(4)], videos=[Video([make_image(0, 1, 1)] * 8, fps=1)]),
            "prepared images and frames of 1,024 pixels",
        ),
    ],
)
def test_all_media_of_a_call_are_bounded_together(tokenizer, monkeypatch, layout, given, message):
    monkeypatch.setattr(pixels, "MAX_CALL_PIXELS", 1_000)
    text = "<image> " * len(given.get("images", ())) + "<video>" * ("videos" in given)
    with pytest.raises(DataError, match=f"{message} together"):
        Processor(CONFIG, tokenizer, layout())(text, **given)


def test_texts_of_a_call_are_decoded_one_by_one_and_prepared_together(processor, tokenizer, monkeypatch):
    monkeypatch.setattr(pixels, "MAX_CALL_PIXELS", 1_000)
    texts, images = ["what is <image>"] * 9, [make_image(i) for i in range(9)]
    assert processor(texts, images=images)["images"].shape[0] == 9, "117 pixels of one text at a time"
    layout = TwoTiles()
    layout.image_processor = Prepared.image_processor
    with pytest.raises(DataError, match="prepared images and frames of 1,024 pixels together"):
        Processor(CONFIG, tokenizer, layout)(texts, images=images)
