"""Videos of Qwen2-VL, Qwen2.5-VL and Qwen3-VL against transformers: ids, positions, pixels and logits.

transformers' processors of videos need torchvision, which the suite does not have. Their text, times and choice of
frames do not: these run as they are, on a processor without its parts. Pixels are cut into patches here, from frames
that need no resizing.
"""

from __future__ import annotations

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import torch
import transformers
from clips import clip
from composed_checks import WORDS
from einops import rearrange
from test_qwen_vl_parity import OLD_ROPE, TEXT, TOWER, WINDOWS
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.video_utils import VideoMetadata

from mllm_jax import Processor, Video, from_pretrained
from mllm_jax.data.video import FrameSampling, read_video
from mllm_jax.data.video_settings import QWEN3, for_video, read_frames, read_sampling
from mllm_jax.errors import ConfigError

VOCABULARY = (*WORDS, "<", ">", ".", *"0123456789", "seconds")  # every time has ids of its own
MARKS = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
IMAGE, VIDEO, START, END = (len(VOCABULARY) + i for i in range(4))
ROPE3 = dict(rope_type="default", rope_theta=500.0, mrope_section=[2, 2, 2])
TOWER3 = dict(hidden_size=24, intermediate_size=40, out_hidden_size=32, num_position_embeddings=16)
CASES = {
    "2": ("Qwen2VL", dict(rope_parameters=OLD_ROPE), TOWER | dict(embed_dim=24, hidden_size=32), Qwen2VLProcessor),
    "2.5": ("Qwen2_5_VL", dict(rope_parameters=OLD_ROPE), TOWER | WINDOWS, Qwen2_5_VLProcessor),
    "2.5, three tokens a second": (
        "Qwen2_5_VL",
        dict(rope_parameters=OLD_ROPE, num_key_value_heads=4),
        TOWER | WINDOWS | dict(tokens_per_second=3),
        Qwen2_5_VLProcessor,
    ),
    "3": (
        "Qwen3VL",
        dict(head_dim=12, rope_parameters=ROPE3),
        TOWER | TOWER3 | dict(deepstack_visual_indexes=[0]),
        Qwen3VLProcessor,
    ),
}
WRITTEN = "what is <|vision_start|> <|video_pad|> <|vision_end|> a dog ?"
# Frames of a file of 30 a second, and the frames a second of the video.
SHOWN = {
    "1 fps": (list(range(0, 150, 30)), 1.0),
    "4 fps": (list(range(7)), 4.0),
    "6 fps": (list(range(0, 45, 5)), 6.0),
    "uneven times": ([0, 9, 100], None),
}


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory, randomise):
    """Returns (reference model, reference processor without parts for pixels, folder)."""
    name, text, vision, processor = CASES[request.param]
    folder = tmp_path_factory.mktemp("video")
    ids = dict(image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END)
    config = getattr(transformers, f"{name}Config")(
        text_config=TEXT | dict(vocab_size=END + 1) | text, vision_config=vision, **ids
    )
    reference = randomise(getattr(transformers, f"{name}ForConditionalGeneration")(config)).eval()
    reference.save_pretrained(folder)
    words = tokenizer()
    assert words.convert_tokens_to_ids(list(MARKS)) == [IMAGE, VIDEO, START, END]
    words.save_pretrained(folder)
    sizes = dict(shortest_edge=128, longest_edge=1024)
    Qwen2VLImageProcessorPil(patch_size=4, temporal_patch_size=2, merge_size=2, size=sizes).save_pretrained(folder)
    made = processor.__new__(processor)
    made.tokenizer, made.video_processor = words, SimpleNamespace(merge_size=2, temporal_patch_size=2)
    made.image_token, made.video_token, made.vision_start_token, made.vision_end_token = MARKS
    return reference, made, folder


def tokenizer() -> PreTrainedTokenizerFast:
    """Returns a tokenizer of words and of the digits of times."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<pad>"))
    digits = pre_tokenizers.Split(Regex(r"[<>.\d]"), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), digits])
    names = ("image_token", "video_token", "vision_start_token", "vision_end_token")
    special = dict(zip(names, MARKS, strict=True))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", extra_special_tokens=special
    )


def reference_inputs(reference, processor, text: str, videos: list[tuple[np.ndarray, VideoMetadata]]) -> dict:
    """Returns the inputs of transformers' model for a text with videos."""
    made = processor.__new__(type(processor))
    vars(made).update(vars(processor))
    mean, std = np.float32([0.48145466, 0.4578275, 0.40821073]), np.float32([0.26862954, 0.26130258, 0.27577711])
    patches, grids = [], []
    for frames, _ in videos:
        frames = np.concatenate([frames, frames[-1:]]) if len(frames) % 2 else frames
        cut = "(f t) (h p a) (w q b) c -> (f h w p q) (c t a b)"
        patches.append(rearrange((frames.astype(np.float32) / 255 - mean) / std, cut, t=2, p=2, q=2, a=4, b=4))
        grids.append([len(frames) // 2, frames.shape[1] // 4, frames.shape[2] // 4])
    done = dict(
        pixel_values_videos=torch.tensor(np.concatenate(patches)),
        video_grid_thw=torch.tensor(grids),
        video_metadata=[metadata for _, metadata in videos],
    )
    # The methods of the processor of the whole model, on what the processor of videos would return.
    made.video_processor = lambda given, **how: done
    for name in ("merge_size", "temporal_patch_size"):
        setattr(made.video_processor, name, 2)
    done, written = made._process_videos([frames for frames, _ in videos])
    (text,), _ = made.get_text_with_replacements([text], [], written, [])
    ids = torch.tensor(processor.tokenizer(text, add_special_tokens=False)["input_ids"])[None]
    inputs = dict(input_ids=ids, mm_token_type_ids=2 * (ids == VIDEO).int(), attention_mask=torch.ones_like(ids))
    inputs |= {name: done[name] for name in ("pixel_values_videos", "video_grid_thw")}
    if "second_per_grid_ts" in done:
        inputs["second_per_grid_ts"] = torch.tensor(done["second_per_grid_ts"])
    return inputs


def check(case, module, params, text: str, shown: list[Video], videos: list, assert_close) -> np.ndarray:
    """Compares a row; returns its tokens and positions."""
    reference, processor, folder = case
    batch = Processor.from_pretrained(folder)(text, videos=shown)
    inputs = reference_inputs(reference, processor, text, videos)
    np.testing.assert_array_equal(batch["tokens"], inputs["input_ids"])
    np.testing.assert_allclose(batch["patches"][0], inputs["pixel_values_videos"], atol=1e-6)
    names = ("mm_token_type_ids", "video_grid_thw", "second_per_grid_ts")
    given = {name: inputs[name] for name in names if name in inputs}
    positions, _ = reference.model.get_rope_index(inputs["input_ids"], **given)
    np.testing.assert_array_equal(batch["positions"][0].T, positions[:, 0])
    logits = jax.jit(module.apply)({"params": params}, batch).logits
    with torch.no_grad():
        assert_close(np.asarray(logits)[0], reference(**inputs).logits[0], 1e-4, text)
    return np.concatenate([batch["tokens"][0, :, None], batch["positions"][0]], axis=1)


def test_rates_odd_numbers_of_frames_and_uneven_times(case, assert_close):
    module, params = from_pretrained(case[2])
    seen = set()
    for number, (name, (indices, fps)) in enumerate(SHOWN.items()):
        frames = np.random.default_rng(number).integers(0, 256, (len(indices), 16, 24, 3), np.uint8)
        total = len(indices) * 30 / fps if fps else (indices[-1] - indices[0]) * len(indices) / (len(indices) - 1)
        metadata = VideoMetadata(total, fps=30.0, frames_indices=list(indices))
        if name == "4 fps":  # 30 is no multiple of 4
            metadata = VideoMetadata(len(indices), fps=4.0, frames_indices=list(indices))
        times = [index / metadata.fps for index in indices]
        video = Video(frames, fps=fps) if fps else Video(frames, times=times)
        seen.add(check(case, module, params, WRITTEN, [video], [(frames, metadata)], assert_close).tobytes())
    assert len(seen) == len(SHOWN), "equal rows prove nothing"


def test_two_videos_of_unequal_lengths(case, assert_close):
    module, params = from_pretrained(case[2])
    shown, videos = [], []
    for seed, (count, side, fps) in enumerate(((3, 16, 6.0), (6, 24, 1.5))):
        frames = np.random.default_rng(seed).integers(0, 256, (count, side, 16, 3), np.uint8)
        shown.append(Video(list(frames), fps=fps))
        videos.append((frames, VideoMetadata(count, fps=fps, frames_indices=list(range(count)))))
    check(case, module, params, f"{WRITTEN} {WRITTEN} two", shown, videos, assert_close)


def test_a_file_is_sampled_as_the_reference_samples_it(case, assert_close):
    """Checks times and positions; the pixels are those of the file's frames as they are decoded."""
    reference, processor, folder = case
    module, params = from_pretrained(folder)
    ours, film = Processor.from_pretrained(folder), clip(25, fps=8, size=(16, 24))
    frames, times = read_video(film, ours.layout.sampling)
    indices = np.rint(times.seconds * 8).astype(int).tolist()
    third = isinstance(processor, Qwen3VLProcessor)
    # 25 / 8 * 2 = 6.25 frames; Qwen3-VL's video processor rounds frames at equal distances, the others' begin parts
    assert indices == ([0, 5, 10, 14, 19, 24] if third else [0, 4, 8, 12, 16, 20])
    metadata = VideoMetadata(25, fps=8.0, frames_indices=indices)
    check(case, module, params, WRITTEN, [Video(film)], [(frames, metadata)], assert_close)


@pytest.mark.parametrize("total", [1, 2, 5, 30, 299, 300, 901])
@pytest.mark.parametrize("fps", [5.0, 24.0, 30000 / 1001])
def test_the_choice_of_frames_is_the_references(total, fps, sample_frames):
    metadata = VideoMetadata(total, fps=fps)
    second = FrameSampling(num_frames=None, fps=2.0, multiple=2)
    third = FrameSampling(num_frames=None, fps=2.0, position="ends")
    for ours, reference in zip((second, third), sample_frames, strict=True):
        if total == 1 and ours is second:
            continue  # the reference takes none
        wanted = np.asarray(reference(metadata))
        np.testing.assert_array_equal(ours.indices(total, ours.count(total, fps)), wanted)


@pytest.fixture(scope="module")
def sample_frames():
    """Returns transformers' functions, read from their files, which torchvision would be needed to import."""
    found = []
    for model in ("qwen2_vl", "qwen3_vl"):
        names = _functions(model)
        own = SimpleNamespace(num_frames=None, fps=2, min_frames=4, max_frames=768, temporal_patch_size=2)
        found.append(lambda metadata, own=own, call=names["sample_frames"]: call(own, metadata))
    return found


def _functions(model: str) -> dict:
    """Returns the functions of a file of transformers, without running its imports."""
    import ast
    import math
    from pathlib import Path

    path = Path(transformers.__file__).parent / "models" / model / f"video_processing_{model}.py"
    tree = ast.parse(path.read_text("utf-8"))
    kept = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name in ("sample_frames", "smart_resize")]
    scope = dict(math=math, np=np, torch=torch, VideoMetadata=VideoMetadata)
    code = ast.Module(kept, [])
    exec(compile(ast.parse("from __future__ import annotations\n" + ast.unparse(code)), str(path), "exec"), scope)
    return scope


@pytest.mark.parametrize("frames", [1, 2, 3, 5, 16])
@pytest.mark.parametrize("size", [(16, 24), (31, 70), (480, 640), (5, 9), (300, 20)])
def test_qwen3_sizes_of_whole_videos(frames, size, tmp_path):
    values = dict(video_processor_type=QWEN3, patch_size=4, size=dict(shortest_edge=2000, longest_edge=40_000))
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(values))
    found = for_video(read_frames(tmp_path, QWEN3, None), frames, size)
    wanted = _functions("qwen3_vl")["smart_resize"](max(frames, 2), *size, 2, 8, 2000, 40_000)
    assert found.output_size(*size) == wanted
    assert found.mean == (0.5,) * 3


def test_settings_of_videos(tmp_path):
    usual = FrameSampling(num_frames=None, fps=2.0, multiple=2)
    assert read_sampling(tmp_path, usual) == usual
    path = tmp_path / "video_preprocessor_config.json"
    path.write_text(json.dumps(dict(fps=1, max_frames=8)))
    assert read_sampling(tmp_path, usual) == FrameSampling(num_frames=None, fps=1, max_frames=8, multiple=2)
    path.write_text(json.dumps(dict(num_frames=8, initial_shift=True)))
    assert read_sampling(tmp_path, usual) == FrameSampling(8, multiple=2, position="middle")
    path.write_text(json.dumps(dict(fps="2")))
    with pytest.raises(ConfigError, match="fps='2'"):
        read_sampling(tmp_path, usual)
