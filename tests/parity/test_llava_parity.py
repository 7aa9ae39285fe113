"""LLaVA-1.5, LLaVA-NeXT and LLaVA-OneVision against transformers through real folders: batches, logits, answers."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch
import transformers
from llava_reference import CASES, ID, IMAGE, TEXTS, VIDEO, build, make_images, reference_inputs
from safetensors.numpy import load_file, save_file
from toy_data import quick_compilation

from mllm_jax import Processor, Video, from_pretrained, save_pretrained
from mllm_jax.generation.generate import complete
from mllm_jax.layers.pixels import normalise_pixels
from mllm_jax.models.registry import family_of_config

ANSWER = dict(max_new_tokens=32, ignore_eos=True)


class Loaded:
    """A reference and the model read from its folder."""

    def __init__(self, case: str, folder, randomise):
        self.case, self.folder = case, folder
        self.reference, self.theirs = build(case, folder, randomise)
        self.model, self.params = from_pretrained(folder)
        self.ours = Processor.from_pretrained(folder)
        self.images = make_images()
        self.batch = self.ours(TEXTS, images=self.images)
        self.apply = jax.jit(self.model.apply)

    def complete(self, batch) -> list[list[int]]:
        found = complete(self.model, self.params, batch, self.ours, **ANSWER)
        return [list(answer.tokens) for answer in found]

    @torch.no_grad()
    def logits(self, reference, **given) -> np.ndarray:
        return reference(**(given or reference_inputs(self.theirs, TEXTS, self.images, "right"))).logits.numpy()

    @torch.no_grad()
    def answers(self, inputs) -> list[list[int]]:
        settings = transformers.GenerationConfig(max_new_tokens=32, do_sample=False, pad_token_id=0)
        out = self.reference.generate(**inputs, generation_config=settings)
        return out[:, inputs["input_ids"].shape[1] :].tolist()


@pytest.fixture(scope="module", params=CASES)
def loaded(request, tmp_path_factory, randomise):
    with quick_compilation():
        yield Loaded(request.param, tmp_path_factory.mktemp("theirs"), randomise)


def test_a_batch_is_what_their_processor_makes(loaded):
    theirs = reference_inputs(loaded.theirs, TEXTS, loaded.images, "right")
    length = theirs["input_ids"].shape[1]
    ours = loaded.batch
    np.testing.assert_array_equal(ours["tokens"][:, :length], theirs["input_ids"])
    np.testing.assert_array_equal(ours["segments"][:, :length], theirs["attention_mask"])
    assert ours["images"].dtype == np.uint8 and not ours["segments"][:, length:].any()
    at = ours["media_index"] if ours["media_index"].ndim == 2 else ours["media_index"][..., 0]
    np.testing.assert_array_equal(at >= 0, (ours["tokens"] == IMAGE) | (ours["tokens"] == VIDEO))


def test_pixels_on_the_device_are_theirs(loaded):
    pixels = reference_inputs(loaded.theirs, TEXTS, loaded.images, "right")["pixel_values"].numpy()
    pixels = pixels if pixels.ndim == 5 else pixels[:, None]
    pixels = iter(np.moveaxis(pixels, 2, -1))
    for row, images in enumerate(loaded.images):
        slot = 0
        for media in loaded.ours.layout.images(images):
            count, theirs = len(media.arrays["images"]), next(pixels)
            mine = normalise_pixels(loaded.batch["images"][row, slot : slot + count], loaded.model.config.image.encoder)
            np.testing.assert_allclose(mine, theirs[:count], atol=1e-6)
            assert not theirs[count:].any(), "the rest is their padding"
            slot += count


def test_logits(loaded, assert_close):
    theirs = loaded.logits(loaded.reference)
    ours = np.asarray(loaded.apply({"params": loaded.params}, loaded.batch).logits)
    for row, segments in enumerate(loaded.batch["segments"]):
        length = int(segments.sum())
        assert_close(ours[row, :length], theirs[row, :length], 1e-4, f"row {row}")


def test_answers(loaded):
    """Checks 32 tokens of each row: in a batch of unequal prompts, one with text alone; and of each row by itself."""
    wanted = loaded.answers(reference_inputs(loaded.theirs, TEXTS, loaded.images, "left"))
    found = loaded.complete(loaded.batch)
    assert found == wanted and len({tuple(ids) for ids in found}) == len(TEXTS)
    shape = dict(slots={"image": loaded.batch["images"].shape[1]}, length=loaded.batch["tokens"].shape[1])
    for text, images, together in zip(TEXTS, loaded.images, found, strict=True):
        assert loaded.complete(loaded.ours(text, images=images, **shape)) == [together]


def test_the_folder_written_opens_there(loaded, tmp_path):
    save_pretrained(loaded.model, loaded.params, tmp_path, companions=loaded.folder)
    names = set(load_file(tmp_path / "model.safetensors"))
    parts = ("vision_tower.vision_model.", "multi_modal_projector.linear_", "language_model.", "image_newline")
    assert all(name.startswith(parts) for name in names) and "language_model.model.norm.weight" in names
    again, report = type(loaded.reference).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    np.testing.assert_array_equal(loaded.logits(again.eval()), loaded.logits(loaded.reference))
    model, params = from_pretrained(tmp_path)
    assert model.config == loaded.model.config
    jax.tree.map(np.testing.assert_array_equal, params, loaded.params)
    assert family_of_config(model.config).layout is not None


def test_all_spellings_of_names(loaded, tmp_path):
    """Checks the reference's names of parameters in memory, and those of early folders on the hub."""
    (tmp_path / "config.json").write_bytes((loaded.folder / "config.json").read_bytes())
    in_memory = {name: value.numpy() for name, value in loaded.reference.state_dict().items()}
    assert any(name.startswith("model.language_model.layers.") for name in in_memory)
    stored = load_file(loaded.folder / "model.safetensors")
    without = {name.replace("vision_tower.vision_model.", "vision_tower."): value for name, value in stored.items()}
    with_it = {
        name.replace("vision_tower.vision_model.", "vision_tower.").replace(
            "vision_tower.", "vision_tower.vision_model."
        ): v
        for name, v in stored.items()
    }
    for spelling in (in_memory, without, with_it):
        save_file(spelling, tmp_path / "model.safetensors")
        _, params = from_pretrained(tmp_path)
        jax.tree.map(np.testing.assert_array_equal, params, loaded.params)


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("onevision")][1:])
def test_videos(case, randomise, assert_close, tmp_path):
    """Checks a video and an image in one text; frames have the encoder's size, so torchvision need not resize them."""
    with quick_compilation():
        reference, processor = build(case, tmp_path, randomise)
        model, params = from_pretrained(tmp_path)
        ours = Processor.from_pretrained(tmp_path)
        side, (image,) = model.config.image.encoder.image_size, make_images()[2]
        frames = np.random.default_rng(5).integers(0, 256, (3, side, side, 3), np.uint8)
        batch = ours("what is in <video> and <image> ?", images=[image], videos=[Video(frames, fps=1)])
        logits = np.asarray(jax.jit(model.apply)({"params": params}, batch).logits)
    film = torch.tensor(np.moveaxis(np.stack([ours.layout.frames(frame) for frame in frames]), -1, 1))[None]
    tokens = processor.replace_video_token({"pixel_values_videos": film}, 0).count("<video>")
    # Without torchvision there is no video processor, so the text has no videos.
    text = "what is in" + " dog" * tokens + " and <image> ?"
    inputs = reference_inputs(processor, [text], [[image]], "right") | dict(pixel_values_videos=film)
    inputs["input_ids"][inputs["input_ids"] == ID["dog"]] = VIDEO
    np.testing.assert_array_equal(batch["tokens"], inputs["input_ids"])
    with torch.no_grad():
        assert_close(logits, reference(**inputs).logits.numpy(), 1e-4, "logits")
