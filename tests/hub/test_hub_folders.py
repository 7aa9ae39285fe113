"""Reading of popular checkpoints' folders, with config files as on the hub; README.md here names their owners."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from mllm_jax.checkpoints.fields import field_value, field_values
from mllm_jax.data.chat_tokenizer import ChatTokenizer
from mllm_jax.data.image_processors import read_image_processor
from mllm_jax.errors import ConfigError, DataError
from mllm_jax.models.registry import abstract_params, family_of_config, pretrained_config

CHECKPOINTS = {path.stem: json.loads(path.read_text("utf-8")) for path in sorted(Path(__file__).parent.glob("*.json"))}
# Unsupported: a classification head, quantized weights. Each is refused by name.
REFUSED = {
    "google__vit-base-patch16-224": "ViTForImageClassification",
    "Qwen__Qwen2-VL-2B-Instruct-AWQ": "quantization_config",
}
OPEN = [name for name in CHECKPOINTS if name not in REFUSED]
WITH_IMAGES = [name for name, files in CHECKPOINTS.items() if "preprocessor_config.json" in files]
PARAMETERS = {  # as published on the hub, and in README
    "HuggingFaceTB__SmolLM2-135M-Instruct": 134_515_008,
    "mistralai__Mistral-7B-v0.1": 7_241_732_096,
    "Qwen__Qwen-7B-Chat": 7_721_324_544,
    "THUDM__glm-4-9b-chat": 9_399_951_360,
    "facebook__opt-350m": 331_196_416,
    "google-t5__t5-small": 60_506_624,
    "google__vit-base-patch16-224-in21k": 86_389_248,
    "openai__clip-vit-base-patch32": 151_277_313,
    "google__siglip-base-patch16-224": 203_155_970,
    "timm__eva02_large_patch14_clip_336.merged2b": 304_432_832,
    "timm__eva_giant_patch14_clip_224.laion400m": 1_012_588_928,
    "Salesforce__blip2-opt-2.7b@2023": 3_744_679_936,
    "Salesforce__blip2-itm-vit-g": 1_172_032_258,
    "llava-hf__llava-1.5-7b-hf": 7_063_427_072,
    "llava-hf__llava-v1.6-mistral-7b-hf": 7_566_747_648,
    "OpenGVLab__InternVL3-8B-hf": 7_944_373_760,
    "OpenGVLab__InternVL3-8B": 7_944_373_760,
    "Qwen__Qwen-VL-Chat": 9_656_935_168,
    "Qwen__Qwen2.5-VL-7B-Instruct": 8_292_166_656,
    "Qwen__Qwen3-VL-4B-Instruct": 4_437_815_808,
    "deepseek-community__deepseek-vl-7b-chat": 7_331_390_721,
}
# A config's field -> the spellings of its option, in order of precedence.
SPELLINGS = {
    "vocab_size": ("padded_vocab_size", "vocab_size"),
    "hidden_size": ("hidden_size", "d_model", "width"),
    "num_layers": ("num_hidden_layers", "num_layers", "depth", "layers"),
    "num_decoder_layers": ("num_decoder_layers",),
    "num_heads": ("num_attention_heads", "num_heads", "heads"),
    "num_kv_heads": ("multi_query_group_num", "num_key_value_heads"),
    "head_dim": ("head_dim", "d_kv"),
    "mlp_size": ("intermediate_size", "ffn_hidden_size", "ffn_dim", "d_ff", "inner_hidden_size", "mlp_dim"),
    "norm_eps": ("rms_norm_eps", "layer_norm_eps", "layernorm_epsilon", "layer_norm_epsilon"),
    "rope_theta": ("rope_theta",),
    "image_size": ("image_size",),
    "patch_size": ("patch_size",),
    "output_size": ("out_hidden_size", "output_dim"),
}
# Sizes that no file states, or only timm's name, are checked by the numbers of parameters above.
STATES_LITTLE = ("google__siglip-base-patch16-224", "Salesforce__blip2-itm-vit-g")


@pytest.fixture
def write(tmp_path):
    """Returns a function that writes files {name: content of the JSON} and returns their folder."""

    def write_files(files: Mapping[str, Any]) -> Path:
        for name, values in files.items():
            (tmp_path / name).write_text(json.dumps(values), "utf-8")
        return tmp_path

    return write_files


def nested(config: Mapping[str, Any]) -> list[str]:
    """Returns the options that are configs of parts, except those of other tools and of an absent LLM."""
    idle = {"transformers.js_config"}
    if config.get("architectures") == ["Blip2ForImageTextRetrieval"]:
        idle.add("text_config")
    names = [name for name, value in config.items() if isinstance(value, dict) and name.endswith(("_config", "visual"))]
    return [name for name in names if name not in idle]


# ---- config.json


def parts(ours: Any, theirs: Mapping[str, Any]) -> Iterator[tuple[Any, Mapping[str, Any]]]:
    """Yields each part of the config with the part of config.json that describes it."""
    text, vision = theirs.get("text_config", theirs.get("llm_config")), theirs.get("vision_config")
    if hasattr(ours, "vision"):
        yield from ((ours.vision, vision), (ours.text, text))
    elif hasattr(ours, "inputs") or hasattr(ours, "encoder"):
        image = ours.image if hasattr(ours, "inputs") else ours
        if hasattr(ours, "llm"):
            yield ours.llm, theirs if text is None else text
        yield getattr(image.encoder, "low", image.encoder), theirs["visual"] if vision is None else vision
        if high := theirs.get("high_res_vision_config"):
            yield image.encoder.high, high
        if qformer := theirs.get("qformer_config"):
            yield image.projector, qformer
    else:
        yield ours, theirs


def stated(part: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Returns the sizes that a part of config.json states, by the names of our fields."""
    found = {
        field: next(part[name] for name in names if name in part)
        for field, names in SPELLINGS.items()
        if any(part.get(name) is not None for name in names)
    }
    if kind == "QWenLMHeadModel" and "mlp_size" in found:
        found["mlp_size"] //= 2  # there it includes gate and up
    if "embed_dim" in part:  # Qwen2-VL's image encoder, whose hidden_size is the LLM's
        found |= dict(hidden_size=part["embed_dim"], output_size=part["hidden_size"])
    if part.get("rope_ratio"):
        found["rope_theta"] = 10_000 * part["rope_ratio"]
    return {name: value[0] if isinstance(value, list) else value for name, value in found.items()}


@pytest.mark.parametrize("name", OPEN)
def test_config_json_opens_with_the_sizes_that_it_states(name, write):
    theirs = CHECKPOINTS[name]["config.json"]
    ours = pretrained_config(write(CHECKPOINTS[name]))
    compared = 0
    for part, options in parts(ours, theirs):
        for field, value in stated(options, theirs.get("architectures", [""])[0]).items():
            if hasattr(part, field) or field in field_values(part):
                found = field_value(part, field)
                if found is None and field == "head_dim":
                    found = part.hidden_size // part.num_heads
                if found is None and "qformer" in options.get("model_type", "") and field == "vocab_size":
                    continue  # it reads no text
                assert found == value, f"{type(part).__name__}.{field}"
                compared += 1
    assert compared >= 2 or name in STATES_LITTLE or name.startswith("timm__")


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_those_that_are_published(name, write):
    config = pretrained_config(write(CHECKPOINTS[name]))
    params = jax.tree.leaves(abstract_params(config, family_of_config(config)))
    assert sum(math.prod(leaf.shape) for leaf in params) == PARAMETERS[name]


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_library_does_not_have_is_refused_by_name(name, write):
    with pytest.raises(ConfigError, match=REFUSED[name]):
        pretrained_config(write(CHECKPOINTS[name]))


@pytest.mark.parametrize("name", OPEN)
def test_an_option_that_nobody_knows_is_refused_in_each_config(name, write):
    config = CHECKPOINTS[name]["config.json"]
    option = {"made_up_option": 7}
    changed = [config | option, *(config | {part: config[part] | option} for part in nested(config))]
    for values in changed:
        with pytest.raises(ConfigError, match="made_up_option=7"):
            pretrained_config(write({"config.json": values}))


# ---- preprocessor_config.json

IMAGE = np.random.default_rng(0).integers(0, 256, (120, 200, 3), np.uint8)


def side(values: Mapping[str, Any]) -> int:
    """Returns the side of the square images that the settings produce."""
    size = values["crop_size"] if values.get("do_center_crop") else values["size"]
    if isinstance(size, int):
        return size
    return size.get("height", size.get("shortest_edge"))


@pytest.mark.parametrize("name", WITH_IMAGES)
def test_preprocessor_config_opens_and_makes_what_it_says(name, write):
    values = CHECKPOINTS[name]["preprocessor_config.json"]
    processor = read_image_processor(write(CHECKPOINTS[name]))
    if processor.patch_size:
        low, high = processor.pixel_range
        size = values.get("size", {})
        assert (low, high) == (
            values.get("min_pixels", size.get("shortest_edge")),
            values.get("max_pixels", size.get("longest_edge")),
        )
        patches, grid = processor.patches(IMAGE)
        assert len(patches) == math.prod(grid) and low <= len(patches) * processor.patch_size**2 <= high
        made = processor
    else:
        made = processor.low or processor
        pixels = made(processor.prepare(IMAGE)) if processor.low else processor(IMAGE)
        assert pixels.shape == (side(values),) * 2 + (3,) == (*made.output_size(*IMAGE.shape[:2]), 3)
        tiles = processor.tiles(IMAGE)
        assert (len(tiles) > 1) == bool(values.get("image_grid_pinpoints"))
    assert (made.mean, made.std) == (tuple(values["image_mean"]), tuple(values["image_std"]))
    assert made.resample == values.get("resample", made.resample)


def different() -> list[str]:
    """Returns one checkpoint for each spelling of settings."""
    seen = {}
    for name in WITH_IMAGES:
        text = json.dumps(CHECKPOINTS[name]["preprocessor_config.json"], sort_keys=True)
        seen.setdefault(text, name)
    return list(seen.values())


@pytest.mark.parametrize("name", different())
def test_pixels_are_those_of_transformers(name, write):
    auto = pytest.importorskip("transformers.models.auto.image_processing_auto").AutoImageProcessor
    folder = write(CHECKPOINTS[name])
    processor, reference = read_image_processor(folder), auto.from_pretrained(folder, backend="pil")
    assert type(reference).__name__ == f"{processor.kind}Pil"
    wanted = np.asarray(reference(IMAGE, return_tensors="np", input_data_format="channels_last")["pixel_values"])
    if processor.patch_size:
        found = processor.patches(IMAGE)[0]
    elif processor.low is not None:
        found = processor.low(processor.prepare(IMAGE)).transpose(2, 0, 1)[None]
    else:
        found = processor.normalise(processor.tiles(IMAGE)).transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(found, wanted[0] if wanted.ndim == 5 else wanted)


@pytest.mark.parametrize("name", different())
def test_a_setting_that_nobody_knows_is_refused(name, write):
    values = CHECKPOINTS[name]["preprocessor_config.json"] | {"made_up_option": 7}
    with pytest.raises(ConfigError, match="made_up_option=7"):
        read_image_processor(write(CHECKPOINTS[name] | {"preprocessor_config.json": values}))


def test_the_type_of_each_model_is_that_of_transformers():
    auto = pytest.importorskip("transformers.models.auto.image_processing_auto")
    from mllm_jax.data.image_processors import OF_MODELS

    theirs = {name: auto.IMAGE_PROCESSOR_MAPPING_NAMES[name]["pil"] for name in OF_MODELS}
    assert theirs == {name: f"{kind}Pil" for name, kind in OF_MODELS.items()}


@pytest.mark.parametrize(
    "config",
    [None, {}, {"model_type": "unheard_of"}, {"model_type": ["vit"]}],
    ids=["no config.json", "no model_type", "another model_type", "a list"],
)
def test_without_a_type_and_a_known_model_there_is_a_refusal(config, write):
    files = {"preprocessor_config.json": CHECKPOINTS["google__vit-base-patch16-224-in21k"]["preprocessor_config.json"]}
    with pytest.raises(ConfigError, match=r"image_processor_type='None'.*(?s:.)*one of ViTImageProcessor"):
        read_image_processor(write(files if config is None else files | {"config.json": config}))


@pytest.mark.parametrize(
    "spelling",
    [
        {"image_processor_type": "CLIPImageProcessor"},
        {"image_processor_type": "CLIPImageProcessorFast"},
        {"feature_extractor_type": "CLIPFeatureExtractor"},
        {"image_processor_type": "CLIPFeatureExtractor"},
        {"image_processor_type": "CLIPImageProcessor", "feature_extractor_type": "ViTFeatureExtractor"},
        {"image_processor_type": None, "feature_extractor_type": "CLIPFeatureExtractor"},
    ],
    ids=str,
)
def test_what_a_file_names_goes_before_the_model(spelling, write):
    folder = write({"preprocessor_config.json": spelling, "config.json": {"model_type": "vit"}})
    assert read_image_processor(folder).kind == "CLIPImageProcessor"


# ---- tokenizer_config.json

TOKENIZERS = {
    name: files["tokenizer_config.json"] for name, files in CHECKPOINTS.items() if "tokenizer_config.json" in files
}
OWN_CODE = [name for name, values in TOKENIZERS.items() if "auto_map" in values]
SENTENCE_PIECES = [name for name, values in TOKENIZERS.items() if values.get("tokenizer_class") == "SiglipTokenizer"]


def content(token: Any) -> str | None:
    """Returns the text of a token, in either spelling."""
    return token["content"] if isinstance(token, dict) else token


def small_tokenizer(values: Mapping[str, Any]) -> Any:
    """Makes a tokenizer.json of bytes, or for T5 of letters, with the special tokens that the settings name."""
    backend = pytest.importorskip("tokenizers")
    named = [content(value) for option, value in values.items() if option.endswith("_token")]
    named = [token for token in named if isinstance(token, str)]
    named += [token["content"] for token in values.get("added_tokens_decoder", {}).values()]
    if "extra_ids" in values:
        letters = [(token, -1.0) for token in dict.fromkeys([*named, "\u2581", *"Hi there"])]
        return backend.Tokenizer(backend.models.Unigram(letters, unk_id=letters.index(("<unk>", -1.0))))
    pieces = [*named, *sorted(backend.pre_tokenizers.ByteLevel.alphabet())]
    pieces += [f"{piece}</w>" for piece in pieces]  # as CLIP ends words
    made = backend.Tokenizer(backend.models.BPE({piece: i for i, piece in enumerate(dict.fromkeys(pieces))}, []))
    made.pre_tokenizer = backend.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = backend.decoders.ByteLevel()
    return made


@pytest.mark.parametrize("name", [name for name in TOKENIZERS if name not in (*OWN_CODE, *SENTENCE_PIECES)])
def test_tokenizer_config_opens_with_the_tokens_that_it_names(name, write):
    values = TOKENIZERS[name]
    folder = write(CHECKPOINTS[name])
    small_tokenizer(values).save(str(folder / "tokenizer.json"))
    chat = ChatTokenizer.load(folder)
    for option in ("eos_token", "pad_token", "bos_token"):
        if values.get(option):
            assert getattr(chat.backend, option) == content(values[option])
    ids = chat.encode("Hi there")
    assert len(ids) >= 7 and chat.decode(ids).strip().lower() == "hi there"
    assert chat.has_template == ("chat_template" in values)
    if chat.has_template:
        shown = chat.render_chat([{"role": "user", "content": "Hi there"}])
        assert "Hi there" in shown and "assistant" in shown


@pytest.mark.parametrize("name", OWN_CODE)
def test_a_tokenizer_of_the_folders_own_code_is_refused(name, write):
    folder = write(CHECKPOINTS[name])
    small_tokenizer(TOKENIZERS[name]).save(str(folder / "tokenizer.json"))
    with pytest.raises(DataError, match="custom code"):
        ChatTokenizer.load(folder)
