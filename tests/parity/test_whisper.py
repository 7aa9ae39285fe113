"""Whisper against transformers: encoder, logits, gradients, greedy and beam generation, folders both ways."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from toy_data import quick_compilation
from transformers.models.whisper.modeling_whisper import WhisperEncoder

import mllm_jax
from mllm_jax.checkpoints.hf import hub_tensors
from mllm_jax.encoders.whisper import ConvStem
from mllm_jax.errors import ConfigError, DataError
from mllm_jax.generation.decode_step import steps_of
from mllm_jax.generation.engine import Engine, Request
from mllm_jax.generation.options import Options
from mllm_jax.generation.program import Program
from mllm_jax.layers.compute import with_compute
from mllm_jax.models.registry import abstract_params, family_of, family_of_config

START, ENDS = 57, [2, 5, 8, 17, 33, 40, 51]
SIZES = dict(
    vocab_size=61,
    num_mel_bins=8,
    d_model=30,
    encoder_layers=3,
    encoder_attention_heads=6,  # of 5 dimensions; the decoder's of 15
    encoder_ffn_dim=44,
    decoder_layers=2,
    decoder_attention_heads=2,
    decoder_ffn_dim=52,
    max_source_positions=10,
    max_target_positions=48,
    decoder_start_token_id=START,
    bos_token_id=1,
    eos_token_id=ENDS,
    pad_token_id=0,
    begin_suppress_tokens=None,
    suppress_tokens=[3, 12],
    median_filter_width=5,
)
DEEP = dict(d_model=24, encoder_layers=1, encoder_attention_heads=3, decoder_layers=3, decoder_attention_heads=4)
# `scale_embedding` is read and not applied there.
CASES = {
    "unequal": ("WhisperForConditionalGeneration", SIZES | dict(scale_embedding=True)),
    "untied": (
        "WhisperForConditionalGeneration",
        SIZES | DEEP | dict(num_mel_bins=13, max_source_positions=7, tie_word_embeddings=False),
    ),
    "no head": (
        "WhisperModel",
        SIZES | dict(activation_function="gelu_pytorch_tanh", decoder_layers=1, encoder_layers=2, pad_token_id=None),
    ),
}
TARGETS = (9, 4)  # lengths of two texts
MADE = {}


@pytest.fixture(autouse=True)
def _quickly():
    with quick_compilation():
        yield


@pytest.fixture
def load(randomise, tmp_path_factory):
    """Returns a function that makes (torch model, its folder, our module, our parameters), each case once."""

    def make(case: str):
        if case not in MADE:
            name, options = CASES[case]
            reference = getattr(transformers, name)
            config = transformers.WhisperConfig(**options)
            reference = randomise(reference._from_config(config, attn_implementation="eager"), seed=3)
            folder = tmp_path_factory.mktemp("whisper")
            reference.save_pretrained(folder)
            MADE[case] = reference, folder, *mllm_jax.from_pretrained(folder)
        return MADE[case]

    return make


def features(config, rows: int = 2) -> np.ndarray:
    shape = rows, config.audio.num_mel_bins, 2 * config.audio.max_source_positions
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def texts() -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens of two texts, padded after them, and their mask."""
    mask = (np.arange(max(TARGETS)) < np.array(TARGETS)[:, None]).astype(np.int32)
    tokens = np.where(mask, np.random.default_rng(1).integers(3, 57, mask.shape), 0)
    tokens[:, 0] = START
    return tokens, mask


def reference_outputs(reference, audio, tokens, mask) -> dict[str, np.ndarray]:
    given = dict(decoder_input_ids=torch.tensor(tokens), decoder_attention_mask=torch.tensor(mask))
    with torch.no_grad():
        out = reference(torch.tensor(audio), **given, output_hidden_states=True, output_attentions=True)
        logits = out.logits if hasattr(out, "logits") else out[0] @ reference.decoder.embed_tokens.weight.T
    states = {f"hidden {i}": x for i, x in enumerate(out.encoder_hidden_states)}
    attention = {f"attention {i}": x for i, x in enumerate(out.cross_attentions)}
    found = states | attention | dict(encoder=out.encoder_last_hidden_state, logits=logits)
    return {name: x.numpy() for name, x in found.items()}


def our_outputs(module, params, audio, tokens, mask) -> dict[str, np.ndarray]:
    """Returns the same; logits once of the whole, once in two steps from a cache with the attention to the audio."""
    variables, c = {"params": params}, module.config.llm
    heads = [(layer, head) for layer in range(c.num_layers) for head in range(c.num_heads)]

    @jax.jit
    def run(variables):
        encoded = module.apply(variables, audio, output_hidden_states=True, method="encode")
        logits = module.apply(variables, audio, tokens, None, mask)
        cache = module.apply(variables, encoded=encoded.last_hidden_state, size=tokens.shape[1], method="start")
        first, cache = module.apply(variables, tokens[:, :3], cache, method="step")
        rest = dict(heads=heads, method="step")
        second, _, weights = module.apply(variables, tokens[:, 3:], cache, mask[:, 3:], **rest)
        last = np.array(TARGETS)[:, None] - 4
        at, *_ = module.apply(variables, tokens[:, 3:], cache, mask[:, 3:], logits_at=last, method="step")
        return encoded, logits, jnp.concatenate([first, second], axis=1), weights, at

    encoded, logits, cached, weights, at = run(variables)
    weights = weights.reshape(2, c.num_layers, c.num_heads, *weights.shape[2:])
    found = {f"hidden {i}": x for i, x in enumerate(encoded.hidden_states)}
    found |= {f"attention {i}": weights[:, i] for i in range(c.num_layers)}
    return found | dict(encoder=encoded.last_hidden_state, logits=logits, cached=cached, at=at)


@pytest.mark.parametrize("case", CASES)
def test_all_outputs_and_the_folder_written(case, load, assert_close, tmp_path):
    reference, folder, module, params = load(case)
    c, (tokens, mask) = module.config, texts()
    audio, real = features(c), mask > 0
    theirs, ours = reference_outputs(reference, audio, tokens, mask), our_outputs(module, params, audio, tokens, mask)
    assert len(theirs) == 3 + c.audio.num_layers + c.llm.num_layers
    for name, value in theirs.items():
        if name == "logits":
            assert_close(ours[name][real], value[real], 1e-5, name)
            assert_close(ours["cached"][real], value[real], 1e-5, "from a cache")
            assert_close(ours["at"][:, 0], value[[0, 1], np.array(TARGETS) - 1], 1e-5, "at the last token")
        elif name.startswith("attention"):
            longest = ours[name].shape[2]  # the second step's
            assert_close(ours[name][real[:, 3:].nonzero()[0][0]], value[0, :, -longest:], 1e-5, name)
        else:
            assert_close(ours[name], value, 1e-5, name)
    assert np.isfinite(ours["logits"]).all() and np.isfinite(ours["cached"]).all()

    mllm_jax.save_pretrained(module, params, tmp_path / "ours")
    stored = load_file(tmp_path / "ours" / "model.safetensors")
    assert stored.keys() == load_file(folder / "model.safetensors").keys()
    how = dict(attn_implementation="eager", output_loading_info=True)
    opened, info = type(reference).from_pretrained(tmp_path / "ours", **how)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, value in reference_outputs(opened, audio, tokens, mask).items():
        np.testing.assert_array_equal(value, theirs[name], name)
    options = {name: value for name, value in CASES[case][1].items() if name != "scale_embedding"}
    assert {name: getattr(opened.config, name) for name in options} == options
    assert mllm_jax.pretrained_config(tmp_path / "ours") == c
    assert family_of_config(c).from_hf(family_of_config(c).to_hf(c)) == c


def test_a_mask_marks_vectors_and_changes_none(load):
    reference, _, module, params = load("unequal")
    audio, lengths = features(module.config), np.array([13, 20])
    mask = np.arange(20) < lengths[:, None]
    plain, masked = (module.apply({"params": params}, audio, m, method="encode") for m in (None, mask))
    np.testing.assert_array_equal(masked.last_hidden_state, plain.last_hidden_state)
    assert plain.mask is None and masked.hidden_states is None
    frames = reference.model._get_feat_extract_output_lengths(torch.tensor(lengths)).numpy()
    np.testing.assert_array_equal(masked.mask.sum(axis=1), frames)
    c = module.config.audio
    np.testing.assert_array_equal(c.frames(lengths), frames)
    assert c.inputs(0.2) == audio.shape[1:]
    with pytest.raises(ConfigError, match="30 seconds(?s:.*)at most 0.2 seconds"):
        c.inputs(30)
    assert [c.frames(n) for n in (0, 1, 2, 3)] == [0, 1, 1, 2] and (c.rate, c.feature_size) == (16_000, 30)


def test_the_encoder_alone(randomise, assert_close, tmp_path):
    """Checks a folder of the encoder, both ways, and its layers on audio of two lengths in one row."""
    config = transformers.WhisperConfig(**SIZES)
    reference = randomise(WhisperEncoder._from_config(config, attn_implementation="eager"), seed=4)
    reference.save_pretrained(tmp_path / "theirs")
    module, params = mllm_jax.from_pretrained(tmp_path / "theirs")
    audio = np.random.default_rng(0).normal(size=(2, 8, 20)).astype(np.float32)
    with torch.no_grad():
        theirs = reference(torch.tensor(audio)).last_hidden_state.numpy()
    assert_close(module.apply({"params": params}, audio).last_hidden_state, theirs, 1e-5)
    mllm_jax.save_pretrained(module, params, tmp_path / "ours")
    opened = WhisperEncoder.from_pretrained(tmp_path / "ours")
    assert all(torch.equal(x, opened.state_dict()[name]) for name, x in reference.state_dict().items())

    stem = {"params": params["stem"]}
    short = np.where(np.arange(20) < 13, audio, 0.0)
    mask = np.broadcast_to(np.arange(20) < 13, (2, 20))
    padded = ConvStem(30).apply(stem, short, mask)[:, :7]
    assert_close(padded, ConvStem(30).apply(stem, audio[..., :13]), 1e-6, "a masked stem")


# ---- generation

PROMPTS = ([START], [START, 20, 31], [START, 9], [START, 3, 44, 7, 29], [START, 11])


@pytest.fixture
def engine(load):
    """Returns (torch model, our program, features of each prompt); a tied head of random weights repeats one token."""
    reference, _, module, params = load("untied")
    if "engine" not in MADE:
        MADE["engine"] = Program(module, params)
    return reference, MADE["engine"], features(module.config, len(PROMPTS))


def collate(prompts: Sequence[dict], rows: int, length: int) -> dict[str, np.ndarray]:
    batch = {name: np.zeros((rows, length), np.int32) for name in ("tokens", "segments")}
    batch["segments"][:, 0] = 1
    for row, prompt in enumerate(prompts):
        batch["tokens"][row, : len(prompt["tokens"])] = prompt["tokens"]
        batch["segments"][row, : len(prompt["tokens"])] = 1
    name = next(name for name in prompts[0] if name != "tokens")
    audio = np.stack([prompt[name] for prompt in prompts])
    return batch | {name: np.pad(audio, [(0, rows - len(prompts)), (0, 0), (0, 0)])}


def encoded(audio: np.ndarray) -> np.ndarray:
    """Returns audio that is encoded once, as for several attempts at a text."""
    module, params = MADE["untied"][2:]
    return np.asarray(module.apply({"params": params}, audio, method="encode").last_hidden_state)


def generated(program, prompts, name: str, audio, options: Options, stops=()) -> list[list[int]]:
    """Returns the tokens after each prompt, two rows at a time, so that prompts are read into rows that ended."""
    asked = [{"tokens": tokens, name: one} for tokens, one in zip(prompts, audio, strict=True)]
    requests = [
        Request(prompt, len(prompt["tokens"]), options.max_new_tokens, str, i, tuple(stops), options)
        for i, prompt in enumerate(asked)
    ]
    return [list(answer.tokens) for answer in Engine(program, collate, 2).answer(requests)]


def wanted(reference, prompts, audio, **options) -> list[list[int]]:
    """Returns the tokens that `generate` of transformers adds, without the end token."""
    found = []
    for tokens, one in zip(prompts, audio, strict=True):
        ids = torch.tensor([tokens])
        how = dict(decoder_input_ids=ids, do_sample=False, **options)
        out = transformers.GenerationMixin.generate(reference, torch.tensor(one[None]), **how)[
            0, len(tokens) :
        ].tolist()
        ends = options["eos_token_id"] or ()
        found.append(out[: min((i for i, token in enumerate(out) if token in ends), default=len(out))])
    return found


def test_32_greedy_tokens(engine):
    reference, program, audio = engine
    theirs = wanted(reference, PROMPTS, audio, max_new_tokens=32, eos_token_id=None)
    assert all(len(ids) == 32 for ids in theirs) and len(set(theirs[0])) > 4
    assert generated(program, PROMPTS, "encoded", encoded(audio), Options(32)) == theirs


@pytest.mark.parametrize("length_penalty", [1.0, 0.3])
def test_beams(engine, length_penalty):
    reference, program, audio = engine
    how = dict(num_beams=4, length_penalty=length_penalty)
    theirs = wanted(reference, PROMPTS, audio, max_new_tokens=20, eos_token_id=ENDS, **how)
    assert generated(program, PROMPTS, "features", audio, Options(20, **how), ENDS) == theirs
    greedy = wanted(reference, PROMPTS, audio, max_new_tokens=20, eos_token_id=ENDS)
    assert theirs != greedy and any(len(ids) < 20 for ids in theirs)


@pytest.mark.parametrize("forced", [None, [(1, 20), (2, 31)]], ids=["plain", "forced"])
@pytest.mark.parametrize("beams", [1, 4])
def test_whispers_own_generate(engine, forced, beams):
    """Checks `WhisperForConditionalGeneration.generate`, which returns neither prompt nor end."""
    reference, program, audio = engine
    settings = reference.generation_config
    settings.forced_decoder_ids, settings.eos_token_id, settings.suppress_tokens = forced, ENDS, None
    prompt = [START, *(token for _, token in forced or ())]
    how = dict(max_new_tokens=20, num_beams=beams)
    theirs = [reference.generate(torch.tensor(one[None]), **how)[0].tolist() for one in audio[:2]]
    theirs = [ids[:-1] if ids[-1] in ENDS else ids for ids in theirs]
    given = ("features", audio[:2]) if beams > 1 else ("encoded", encoded(audio[:2]))
    assert generated(program, [prompt] * 2, *given, Options(**how), ENDS) == theirs and len(theirs[0]) > 3


# ---- training, and other precisions


def test_loss_and_every_gradient_with_teacher_forcing(load, assert_close):
    reference, _, module, params = load("untied")
    audio, (tokens, mask) = features(module.config), texts()
    labels = np.where(mask, np.random.default_rng(2).integers(3, 57, mask.shape), -100)
    reference.zero_grad()
    given = dict(decoder_input_ids=torch.tensor(tokens), decoder_attention_mask=torch.tensor(mask))
    loss = reference(torch.tensor(audio), **given, labels=torch.tensor(labels)).loss
    loss.backward()

    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    batch = dict(features=audio, tokens=tokens, positions=positions, segments=mask)

    def ours(p):
        logs = jax.nn.log_softmax(steps_of(module, by_layer=False).logits(p, batch))
        return -(jnp.take_along_axis(logs, np.maximum(labels, 0)[..., None], axis=-1)[..., 0] * mask).sum() / mask.sum()

    value, grads = jax.jit(jax.value_and_grad(ours))(params)
    assert_close(value, loss.item(), 1e-5, "loss")
    found = {
        name: make() for name, make in hub_tensors(family_of_config(module.config).table(module.config), grads).items()
    }
    theirs = {name: p.grad for name, p in reference.named_parameters()}
    assert found.keys() == theirs.keys()
    frozen = "model.encoder.embed_positions.weight"
    assert theirs.pop(frozen) is None and not found.pop(frozen).any()
    for name, gradient in theirs.items():
        assert_close(found[name], gradient.numpy(), 1e-4, name)


def test_bfloat16(load, tmp_path):
    """Compares with the same bfloat16 weights in a float32 computation, by root mean square."""
    _, folder, *_ = load("unequal")
    module, params = mllm_jax.from_pretrained(folder, dtype="bfloat16")
    audio, (tokens, mask) = features(module.config), texts()
    exact = with_compute(module.config, dtype="float32").make()
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    ours, theirs = (
        jax.jit(m.apply)({"params": p}, audio, tokens, None, mask) for m, p in ((module, params), (exact, wide))
    )
    assert ours.dtype == jnp.float32 and ours.shape == theirs.shape
    assert 0 < np.linalg.norm(ours - theirs) <= 3e-2 * np.linalg.norm(theirs)


# ---- folders

# Options without effect that the published folders have.
OLD = dict(
    _name_or_path="openai/whisper",
    activation_dropout=0.0,
    begin_suppress_tokens=[220, 50257],
    decoder_layerdrop=0.0,
    encoder_layerdrop=0.0,
    forced_decoder_ids=[[1, 50259], [2, 50359], [3, 50363]],
    init_std=0.02,
    is_encoder_decoder=True,
    max_length=448,
    model_type="whisper",
    scale_embedding=False,
    suppress_tokens=[1, 2, 7],
    torch_dtype="float16",
    transformers_version="4.27.0.dev0",
    use_cache=True,
)
# encoder and decoder layers, width, heads, vocabulary, mels -> parameters of the reference class
FULL = {
    "tiny": (4, 384, 6, 51865, 80, 37_760_640),
    "base": (6, 512, 8, 51865, 80, 72_593_920),
    "small": (12, 768, 12, 51865, 80, 241_734_912),
    "medium": (24, 1024, 16, 51865, 80, 763_857_920),
    "large-v3": (32, 1280, 20, 51866, 128, 1_543_490_560),
}


@pytest.mark.parametrize("size", FULL)
def test_full_sizes_to_the_last_parameter(size):
    layers, width, heads, vocabulary, mels, published = FULL[size]
    options = dict(vocab_size=vocabulary, num_mel_bins=mels, d_model=width)
    for side in ("encoder", "decoder"):
        options |= {f"{side}_layers": layers, f"{side}_attention_heads": heads, f"{side}_ffn_dim": 4 * width}
    values = dict(architectures=["WhisperForConditionalGeneration"], num_hidden_layers=layers) | OLD | options
    family = family_of(values)
    c = family.from_hf(values)
    params = abstract_params(c, family)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == published
    boxes = jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda x: hasattr(x, "names"))
    assert {"/".join(key.key for key in path) for path, _ in boxes} == {
        weight.path for weight in family.table(c).weights
    }
    assert all(len(box.names) == box.value.ndim for _, box in boxes)
    with torch.device("meta"):
        reference = transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**options))
    assert sum(parameter.numel() for parameter in reference.parameters()) == published


def test_files_beside_the_weights_and_spellings(load, tmp_path):
    _, folder, module, params = load("unequal")
    beside = tmp_path / "beside"
    beside.mkdir()
    for name in ("generation_config.json", "preprocessor_config.json", "normalizer.json", "vocab.json"):
        (beside / name).write_text(json.dumps({"alignment_heads": [[1, 0]], "name": name}))
    mllm_jax.save_pretrained(module, params, tmp_path / "ours", companions=beside)
    for path in beside.iterdir():
        assert (tmp_path / "ours" / path.name).read_text() == path.read_text()

    # As a WhisperModel has them in memory, with a copy of the tied head.
    tensors = {name.removeprefix("model."): x for name, x in load_file(folder / "model.safetensors").items()}
    save_file(
        tensors | {"proj_out.weight": tensors["decoder.embed_tokens.weight"].clone()}, beside / "model.safetensors"
    )
    (beside / "config.json").write_text((folder / "config.json").read_text())
    _, again = mllm_jax.from_pretrained(beside)
    jax.tree.map(np.testing.assert_array_equal, again, params)


@pytest.mark.parametrize(
    "case,change,message",
    [
        ("unequal", dict(num_hidden_layers=4), "num_hidden_layers=4"),
        ("unequal", dict(is_encoder_decoder=False), "is_encoder_decoder=False"),
        ("unequal", dict(activation_function="mish"), "activation_function='mish'"),
        ("unequal", dict(decoder_attention_heads=4), "4 heads"),
        ("unequal", dict(d_model=15, encoder_attention_heads=5, decoder_attention_heads=3), "hidden_size 15"),
        ("no head", dict(tie_word_embeddings=False), "tie_word_embeddings=False"),
        ("unequal", dict(encoder_no_such=1), "encoder_no_such=1"),
    ],
)
def test_options_that_are_refused(case, change, message):
    name, options = CASES[case]
    values = options | dict(architectures=[name]) | change
    with pytest.raises(ConfigError, match=message):
        family_of(values).from_hf(values)


def test_calls_that_are_refused(load):
    _, _, module, params = load("unequal")
    audio, (tokens, _) = features(module.config), texts()
    variables = {"params": params}
    with pytest.raises(DataError, match=r"\(2, 8, 19\)(?s:.*)\[B, 8, 20\]"):
        module.apply(variables, audio[..., :19], method="encode")
    with pytest.raises(DataError, match=r"mask of shape \(2, 10\)"):
        module.apply(variables, audio, np.ones((2, 10)), method="encode")
    with pytest.raises(ConfigError, match="without decoder_tokens"):
        module.apply(variables, audio)
    with pytest.raises(ConfigError, match="49 tokens(?s:.*)at most 48"):
        module.apply(variables, audio, np.ones((2, 49), int))
    cache = jax.eval_shape(lambda: module.config.llm.make_cache(2, 9, 10))
    with pytest.raises(ConfigError, match=r"\(2, 0\)(?s:.*)layers below 2"):
        jax.eval_shape(lambda c: module.apply(variables, tokens, c, heads=((2, 0),), method="step"), cache)
    with pytest.raises(ConfigError, match="neither source nor cache"):
        module.config.llm.make().apply({"params": params["llm"]}, tokens)
