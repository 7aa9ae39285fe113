"""Vectors in a file: the model's own for any batch, with names; and refusals, which write nothing."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import linen as nn
from no_torch import hide_torch
from PIL import Image
from tiny_language import CONFIG, language, random_params
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from toy_data import quick_compilation

from mllm_jax import cli
from mllm_jax.checkpoints.fields import change_fields
from mllm_jax.data.image_processors import read_image_processor
from mllm_jax.data.images import read_image
from mllm_jax.encoders import clip_vision, siglip_vision
from mllm_jax.encoders.clip_text import from_hf_config as clip_text
from mllm_jax.encoders.siglip_text import from_hf_config as siglip_text
from mllm_jax.errors import ConfigError, DataError
from mllm_jax.generation.assistant import Assistant
from mllm_jax.generation.embed import Embedder, embed_to_file, find_images
from mllm_jax.models.clip import DualEncoderConfig
from mllm_jax.models.registry import save_pretrained
from mllm_jax.sharding.platform import may_have_accelerator

WORDS = ("a", "red", "blue", "cat", "dog", "and", "big", "<pad>", "<bos>", "<eos>")
PAD, BOS, EOS = 7, 8, 9
VISION = dict(
    hidden_size=16, intermediate_size=20, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
)
TEXT = dict(hidden_size=16, intermediate_size=20, num_hidden_layers=1, num_attention_heads=2, vocab_size=10)
TEXT |= dict(max_position_embeddings=8, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS)
CONFIGS = {
    "clip": DualEncoderConfig(clip_vision.FAMILY.from_hf(VISION), clip_text(TEXT), 12, family="CLIPModel"),
    "siglip": DualEncoderConfig(
        siglip_vision.FAMILY.from_hf(VISION), siglip_text(TEXT), None, "sigmoid", family="SiglipModel"
    ),
    "vision": clip_vision.FAMILY.from_hf(VISION),
    "text": clip_text(TEXT),
}
TEXTS = ("a red cat", "a big blue dog and cat", "dog")  # the second fills all 8 positions


@pytest.fixture(scope="module", autouse=True)
def _quickly():
    with quick_compilation():
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Returns name -> (folder, module, parameters); each folder has its tokenizer and its processor's settings."""
    made = {}
    for name, config in CONFIGS.items():
        folder, module = tmp_path_factory.mktemp(name) / "model", config.make()
        pixels, ids = np.zeros((1, 8, 8, 3), np.float32), np.zeros((1, 8), np.int32)
        given = {"vision": (pixels,), "text": (ids,)}.get(name, (pixels, ids))
        abstract = nn.meta.unbox(jax.eval_shape(module.init, jax.random.key(0), *given))["params"]
        rng = np.random.default_rng(0)
        params = jax.tree.map(lambda x, rng=rng: 0.4 * rng.normal(size=x.shape).astype(np.float32), abstract)
        save_pretrained(module, params, folder)
        tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="a"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A <eos>", special_tokens=[("<bos>", BOS), ("<eos>", EOS)]
        )
        tokenizer.save(str(folder / "tokenizer.json"))
        settings = dict(tokenizer_class="PreTrainedTokenizerFast", pad_token="<pad>", eos_token="<eos>")
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        settings = dict(image_processor_type="CLIPImageProcessor", size=dict(shortest_edge=8), crop_size=8)
        (folder / "preprocessor_config.json").write_text(json.dumps(settings))
        made[name] = folder, module, params
    return made


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    """Returns a folder with three images, one in a subfolder, and a file that is no image."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    (root / "more").mkdir()
    for name, size in (("b.png", (8, 8)), ("a.jpg", (20, 11)), ("more/c.PNG", (9, 30))):
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(root / name)
    (root / "notes.txt").write_text("no image")
    return root


def wanted(folders, name: str, paths) -> tuple[np.ndarray, np.ndarray]:
    """Embeds images and texts one by one, without the code under test."""
    folder, module, params = folders[name]
    processor = read_image_processor(folder)
    images = [module.apply({"params": params}, processor(read_image(p))[None], method="encode_image") for p in paths]
    ids = [[BOS, *(WORDS.index(word) for word in text.split()), EOS] for text in TEXTS]
    if name == "siglip":
        ids = [row + [PAD] * (8 - len(row)) for row in ids]
    texts = [module.apply({"params": params}, np.array([row]), method="encode_text") for row in ids]
    return np.concatenate(images), np.concatenate(texts)


@pytest.mark.parametrize("name", ["clip", "siglip"])
@pytest.mark.parametrize("batch_size", [2, 5])
def test_the_file_holds_names_and_the_models_own_vectors(name, batch_size, folders, image_folder, tmp_path):
    out = tmp_path / "vectors.npz"
    shapes = embed_to_file(folders[name][0], out, images=[image_folder], texts=TEXTS, batch_size=batch_size)
    paths = [image_folder / "a.jpg", image_folder / "b.png", image_folder / "more/c.PNG"]
    images, texts = wanted(folders, name, paths)
    with np.load(out, allow_pickle=False) as stored:
        assert {key: stored[key].shape for key in stored} == shapes
        assert stored["image_names"].tolist() == [str(path) for path in paths]
        assert stored["texts"].tolist() == list(TEXTS)
        assert stored["image_embeds"].dtype == stored["text_embeds"].dtype == np.float32
        np.testing.assert_allclose(stored["image_embeds"], images, atol=1e-5)
        np.testing.assert_allclose(stored["text_embeds"], texts, atol=1e-5)
    assert np.abs(images[0] - images[1]).max() > 1e-2 and np.abs(texts[0] - texts[2]).max() > 1e-2
    assert [path.name for path in tmp_path.iterdir()] == ["vectors.npz"]


def test_an_encoder_alone(folders, image_folder):
    folder, module, params = folders["vision"]
    paths = [image_folder / "b.png"]
    kept, vectors = Embedder.load(folder, texts=False, batch_size=2).images(paths)
    pooled = module.apply({"params": params}, read_image_processor(folder)(read_image(paths[0]))[None]).pooler_output
    np.testing.assert_allclose(vectors, pooled / np.linalg.norm(pooled), atol=1e-5)
    folder, module, params = folders["text"]
    vectors = Embedder.load(folder, images=False, batch_size=2).texts(["a cat"])
    pooled = module.apply({"params": params}, np.array([[BOS, 0, 3, EOS]])).pooler_output
    np.testing.assert_allclose(vectors, pooled / np.linalg.norm(pooled), atol=1e-5)


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_an_assistant_embeds_texts_or_images(name, folders, image_folder):
    assistant = Assistant.load(folders[name][0])
    paths = [image_folder / "a.jpg", image_folder / "b.png", image_folder / "more/c.PNG"]
    images, texts = wanted(folders, name, paths)
    found = assistant.embed(texts=TEXTS)
    assert found.dtype == np.float32 and found.shape == texts.shape
    np.testing.assert_allclose(found, texts, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    sources = [str(paths[0]), read_image(paths[1]), paths[2].read_bytes()]
    found = assistant.embed(images=sources)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, images, atol=1e-5)
    # A single one is a list of one, and a few are not padded to a whole batch.
    np.testing.assert_allclose(assistant.embed(TEXTS[0]), texts[:1], atol=1e-5)
    for one in (paths[1], str(paths[1]), read_image(paths[1]), Image.open(paths[1]), paths[1].read_bytes()):
        np.testing.assert_allclose(assistant.embed(images=one), images[1:2], atol=1e-5)


def test_what_an_assistant_cannot_embed_is_refused_in_words(folders, image_folder):
    assistant = Assistant.load(folders["clip"][0])
    with pytest.raises(
        DataError, match="texts and images at once(.|\n)*would not show which vectors are which(.|\n)*for each"
    ):
        assistant.embed("dog", images=[image_folder / "b.png"])
    with pytest.raises(DataError, match="neither texts nor images"):
        assistant.embed()
    with pytest.raises(DataError, match="no text"):
        assistant.embed([])
    with pytest.raises(DataError, match="no image"):
        assistant.embed(images=[])
    with pytest.raises(DataError, match="absent.png"):
        assistant.embed(images=[image_folder / "absent.png"])
    with pytest.raises(ConfigError, match="CLIPVisionModel, asked for text vectors"):
        Assistant.load(folders["vision"][0]).embed("dog")
    with pytest.raises(ConfigError, match="CLIPTextModel, asked for pooled image vectors"):
        Assistant.load(folders["text"][0]).embed(images=[image_folder / "b.png"])
    assert Assistant.load(folders["text"][0]).embed("dog").shape == (1, 16)


def test_a_model_makes_vectors_or_writes_text(folders):
    dual = Assistant.load(folders["clip"][0])
    for ask in (
        lambda: dual.generate("a dog"),
        lambda: dual.stream("a dog"),
        lambda: dual.score("a dog", "yes"),
        lambda: Assistant.load(folders["clip"][0], int8=True),
        lambda: Assistant.load(folders["clip"][0], max_length=8),
    ):
        with pytest.raises(ConfigError, match="a CLIPModel, asked for text(.|\n)*`embed` makes vectors"):
            ask()
    with pytest.raises(ConfigError, match="a LlamaForCausalLM, asked for vectors(.|\n)*such as CLIP"):
        language(change_fields(CONFIG, family="LlamaForCausalLM").make(), random_params()).embed("a dog")


def test_a_text_that_is_too_long_is_refused_or_keeps_its_end(folders):
    folder = folders["clip"][0]
    long = "a red cat and a big blue dog"
    with pytest.raises(DataError, match="10 tokens"):
        Embedder.load(folder, images=False).texts([long])
    embedder = Embedder.load(folder, images=False, truncate=True, batch_size=2)
    cut, same = embedder.texts([long, "a red cat and a big"])
    np.testing.assert_array_equal(cut, same)


def test_bad_images_are_refused_or_named_and_left_out(folders, image_folder, tmp_path):
    folder, out = folders["clip"][0], tmp_path / "out.npz"
    broken = tmp_path / "broken.png"
    broken.write_bytes((image_folder / "b.png").read_bytes()[:60])
    given = [broken, image_folder / "b.png"]
    with pytest.raises(DataError, match="broken.png"):
        embed_to_file(folder, out, images=given)
    assert not out.exists() and [path.name for path in tmp_path.iterdir()] == ["broken.png"]
    problems = []
    shapes = embed_to_file(folder, out, images=given, bad=problems.append)
    assert shapes["image_embeds"] == (1, 12) and "broken.png" in str(problems[0]) and len(problems) == 1
    with pytest.raises(DataError, match="none of which"):
        embed_to_file(folder, out, images=[broken], bad=problems.append, overwrite=True)
    assert np.load(out)["image_names"].tolist() == [str(image_folder / "b.png")], "the file before is untouched"


def test_a_thin_image_costs_itself_alone(folders, image_folder, tmp_path, capsys):
    """Checks a file of 205 bytes that would take gigabytes with its shorter side resized."""
    Image.new("RGB", (1, 65_000)).save(tmp_path / "thin.png")
    model = shutil.copytree(folders["clip"][0], tmp_path / "model")
    settings = dict(image_processor_type="CLIPImageProcessor", size=dict(shortest_edge=224), crop_size=8)
    (model / "preprocessor_config.json").write_text(json.dumps(settings))
    arguments = ["embed", str(model), "--images", str(tmp_path / "thin.png"), str(image_folder)]
    arguments += ["--out", str(tmp_path / "x.npz")]
    assert cli.main(arguments) == 2
    assert "thin.png: an image of 65,000 x 1 pixels, which would become" in capsys.readouterr().err
    assert cli.main([*arguments, "--skip-bad"]) == 0
    assert "thin.png: an image of 65,000 x 1 pixels" in capsys.readouterr().err
    assert len(np.load(tmp_path / "x.npz")["image_names"]) == 3


@pytest.mark.parametrize("skip_bad", [False, True])
def test_what_is_left_out_of_a_folder_is_named(folders, image_folder, tmp_path, monkeypatch, skip_bad):
    root = tmp_path / "mixed"
    (root / "in").mkdir(parents=True)
    for path in (root / "pipe.png", *(root / f"in/pipe{i:02}.PNG" for i in range(12))):
        os.mkfifo(path)
    (root / "b.png").symlink_to(image_folder / "b.png")
    (root / "zero.png").symlink_to("/dev/zero")
    (root / "broken.png").symlink_to("nowhere.png")
    (root / "in/loop.png").symlink_to("loop.png")
    (root / "in/ring").symlink_to(root)
    (root / "notes.txt").symlink_to("nowhere.txt")
    monkeypatch.chdir(root)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket.png")
    arguments = ["embed", str(folders["clip"][0]), "--images", str(root), "--out", str(tmp_path / "x.npz")]
    with pytest.warns(UserWarning, match="left out") as shown:
        assert cli.main([*arguments, *["--skip-bad"] * skip_bad]) == 0
    assert np.load(tmp_path / "x.npz")["image_names"].tolist() == [str(root / "b.png")], "a link to a file is followed"
    (text,) = [str(one.message) for one in shown]
    assert text.startswith(f"left out of {root}: 18\n") and text.endswith("and 8 more") and "notes" not in text
    assert "broken.png (a broken link)" in text and "loop.png (a broken link)" in text
    for path in (root / "in").glob("pipe*"):
        path.unlink()
    with pytest.warns(UserWarning, match="left out") as shown:
        find_images([root])
    for line in ("pipe.png (a pipe)", "zero.png (a device)", "socket.png (a socket)", "ring (a link to a folder)"):
        assert line in str(shown[0].message)
    assert "more" not in str(shown[0].message)


@pytest.mark.parametrize("name", ["pipe.png", "zero.png", "a\0.png", "\ud800.png"])
def test_what_is_no_file_is_refused_by_name(folders, tmp_path, name):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    with pytest.raises(DataError, match="no file or folder") as shown:
        embed_to_file(folders["clip"][0], tmp_path / "x.npz", images=[tmp_path / name])
    assert any(what in str(shown.value) for what in ("a pipe", "a device", "nothing there"))


REFUSED = {
    "nothing": (dict(), ConfigError, "neither images nor texts"),
    "an empty text": (dict(texts=["a", " "]), DataError, "0 tokens"),
    "half a character": (dict(texts=["a\udcff"]), DataError, r"\\udcff"),
    "no such image": (dict(images=["nowhere.png"]), DataError, "nowhere.png"),
    "another ending": (dict(texts=["a"], out="x.json"), ConfigError, "ending in .npz"),
    "no such folder": (dict(texts=["a"], out="no/x.npz"), ConfigError, "folder that exists"),
    "a batch of nothing": (dict(texts=["a"], batch_size=0), ConfigError, "batch size 0"),
    "texts of a vision tower": (dict(texts=["a"], model="vision"), ConfigError, "CLIPVisionModel"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name, folders, tmp_path):
    given, kind, shown = REFUSED[name]
    given = dict(given)
    folder, out = folders[given.pop("model", "clip")][0], tmp_path / given.pop("out", "x.npz")
    given["images"] = [tmp_path / path for path in given.get("images", [])]
    with pytest.raises(kind, match=shown):
        embed_to_file(folder, out, **given)
    assert not list(tmp_path.rglob("*.npz"))


def test_a_folder_without_images_and_an_image_named_twice(folders, image_folder, tmp_path):
    for images, shown in (([tmp_path], "without images"), ([image_folder, image_folder / "b.png"], "named twice")):
        with pytest.raises(DataError, match=shown):
            embed_to_file(folders["clip"][0], tmp_path / "x.npz", images=images)


def test_the_command(folders, image_folder, tmp_path, capsys):
    folder, out = str(folders["clip"][0]), tmp_path / "x.npz"
    arguments = ["embed", folder, "--images", str(image_folder), "--text", *TEXTS[::2], "--out", str(out)]
    assert cli.main(arguments) == 0
    assert "image_embeds [3, 12]" in capsys.readouterr().out
    assert np.load(out)["texts"].tolist() == list(TEXTS[::2])
    assert cli.main(arguments) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert cli.main([*arguments, "--overwrite"]) == 0


def test_the_command_is_silent_without_torch_and_a_tpu(folders, tmp_path):
    """Runs with libtpu installed and without PyTorch for transformers."""
    hidden = {"JAX_PLATFORMS"} if not may_have_accelerator(os.environ, Path("/dev"), ()) else set()
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    path = [str(hide_torch(tmp_path / "hidden")), str(Path(__file__).parents[2])]
    environment["PYTHONPATH"] = os.pathsep.join(path)
    out = tmp_path / "x.npz"
    words = ["embed", str(folders["clip"][0]), "--text", "a cat", "--out", str(out)]
    command = [sys.executable, "-m", "mllm_jax.cli", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and out.is_file()
