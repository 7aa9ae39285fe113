"""`mllm convert` and `mllm models`: every direction, the printed proof, and refusals."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import linen as nn
from safetensors.numpy import load_file

from mllm_jax import DecoderConfig, save_pretrained
from mllm_jax.checkpoints.hf import write_weights
from mllm_jax.checkpoints.native import read_native_config
from mllm_jax.cli import main
from mllm_jax.models import convert as conversion
from mllm_jax.models.registry import abstract_params, family_of, family_of_config

CONFIG = DecoderConfig(vocab_size=32, hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, mlp_size=24)
BESIDE = {"tokenizer.json": "{}", "chat_template.jinja": "{{ messages }}", "generation_config.json": '{"top_k": 3}'}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Returns a Hugging Face folder in two files, with tokenizer, template, code and a pickle."""
    folder = tmp_path_factory.mktemp("models") / "hub"
    rng = np.random.default_rng(0)
    abstract = nn.meta.unbox(abstract_params(CONFIG, family_of_config(CONFIG)))
    # Also subnormal numbers: a conversion that promises every bit must keep them.
    scales = [0.3, 1e-40]
    params = jax.tree.map(lambda x: rng.normal(0, rng.choice(scales, x.shape), x.shape).astype(np.float32), abstract)
    save_pretrained(CONFIG.make(), params, folder, max_shard_bytes=10_000)
    for name, text in (BESIDE | {"modeling_x.py": "evil()", "training_args.bin": "pickle"}).items():
        (folder / name).write_text(text)
    return folder


def tensors(folder: Path) -> dict:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def run(capsys, *arguments) -> list[str]:
    code = main(["convert", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert (code, err) == (0, ""), err
    return out.splitlines()


def refusal(capsys, *arguments) -> str:
    code = main(["convert", *map(str, arguments)])
    _, err = capsys.readouterr()
    assert code == 2 and err.count("to do: ") == 1
    return err


def checksums(lines: list[str]) -> list[str]:
    return re.findall(r"\d+ tensors, [\d,]+ bytes, sha256 [0-9a-f]{64}", "\n".join(lines))


def test_there_and_back_with_a_proof(tmp_path, source, capsys):
    lines = run(capsys, source, tmp_path / "native")
    assert read_native_config(tmp_path / "native") == CONFIG
    assert lines[-1] == "round trip identical"
    assert any("LlamaForCausalLM" in line for line in lines) and any("bytes in buffers" in line for line in lines)
    there = checksums(lines)
    assert len(there) == 2 and there[0] == there[1]
    size = sum(t.nbytes for t in tensors(source).values())
    assert there[0].startswith(f"{len(tensors(source))} tensors, {size:,} bytes")

    lines = run(capsys, tmp_path / "native", tmp_path / "back")
    assert lines[-1] == "round trip identical" and checksums(lines) == there
    before, after = tensors(source), tensors(tmp_path / "back")
    assert before.keys() == after.keys() and all(after[n].tobytes() == before[n].tobytes() for n in before)
    for folder in ("native", "back"):
        kept = {p.name: p.read_text() for p in (tmp_path / folder).iterdir() if p.name in BESIDE}
        assert kept == BESIDE
        assert not list((tmp_path / folder).rglob("*.py")) and not list((tmp_path / folder).rglob("*.bin"))
    theirs, ours = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "back"))
    assert theirs == ours


@pytest.mark.parametrize("to", ["huggingface", "native"])
def test_another_dtype_is_proven_against_the_cast_source(tmp_path, source, capsys, to):
    lines = run(capsys, source, tmp_path / "half", "--to", to, "--dtype", "bfloat16")
    before, expected, after = checksums(lines)
    assert before != expected == after and lines[-1] == "identical to the source cast to bfloat16"
    again = run(capsys, tmp_path / "half", tmp_path / "again", "--to", "huggingface")
    assert checksums(again) == [after, after]
    casts = {name: t.astype("bfloat16") for name, t in tensors(source).items()}
    assert {n: t.tobytes() for n, t in tensors(tmp_path / "again").items()} == {
        n: t.tobytes() for n, t in casts.items()
    }
    assert json.loads((tmp_path / "again" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_a_native_folder_in_another_dtype(tmp_path, source, capsys):
    run(capsys, source, tmp_path / "native")
    lines = run(capsys, tmp_path / "native", tmp_path / "half", "--to", "native", "--dtype", "float16")
    before, expected, after = checksums(lines)
    assert before != expected == after
    assert read_native_config(tmp_path / "half").dtype == "float16"


def test_a_target_that_reads_back_otherwise_is_no_success(tmp_path, source, capsys, monkeypatch):
    write = conversion.save_pretrained

    def careless(module, params, folder, **options):
        params["final_norm"]["scale"] = params["final_norm"]["scale"].at[0].add(1e-3)
        write(module, params, folder, **options)

    monkeypatch.setattr(conversion, "save_pretrained", careless)
    message = refusal(capsys, source, tmp_path / "out", "--to", "huggingface")
    assert "reads back with" in message and "do not use it" in message


def test_refusals(tmp_path, source, capsys):
    assert "as source and as target" in refusal(capsys, source, source)
    assert "config.json" in refusal(capsys, tmp_path / "gone", tmp_path / "out")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").write_text("years")
    assert "is not empty" in refusal(capsys, source, tmp_path / "taken")
    assert "holds no model" in refusal(capsys, source, tmp_path / "taken", "--overwrite")
    assert [p.name for p in (tmp_path / "taken").iterdir()] == ["thesis.tex"]
    run(capsys, source, tmp_path / "out")
    assert "is not empty" in refusal(capsys, source, tmp_path / "out", "--to", "huggingface")
    run(capsys, source, tmp_path / "out", "--to", "huggingface", "--overwrite")
    assert (tmp_path / "out" / "config.json").exists() and not (tmp_path / "out" / "model.json").exists()


def test_the_models_are_listed_without_starting_a_device():
    code = """
import sys
from mllm_jax.cli import main
assert main(["models"]) == 0
import jax._src.xla_bridge
print(jax._src.xla_bridge._backends, [n for n in ("torch", "transformers", "orbax") if n in sys.modules])
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    table, last = done.stdout.rsplit("\n", 2)[:2]
    assert last == "{} []"
    for name in ("LLaMA, Vicuna", "MistralForCausalLM", "Qwen3", "GlmForCausalLM", "OPT", "T5ForConditionalGeneration"):
        assert name in table


def test_a_model_that_is_written_as_another_architecture(tmp_path, capsys):
    """Checks that ChatGLM2 is written as GlmForCausalLM, whose names are in the proof."""
    values = dict(
        architectures=["ChatGLMModel"],
        padded_vocab_size=32,
        hidden_size=16,
        ffn_hidden_size=24,
        num_layers=2,
        num_attention_heads=4,
        multi_query_attention=True,
        multi_query_group_num=2,
        kv_channels=4,
        layernorm_epsilon=1e-5,
        seq_length=64,
        add_qkv_bias=True,
    )
    family = family_of(values)
    config = family.from_hf(values)
    rng = np.random.default_rng(0)
    abstract = nn.meta.unbox(abstract_params(config, family))
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), abstract)
    write_weights(tmp_path / "chatglm", family.table(config), params, config=values)
    lines = run(capsys, tmp_path / "chatglm", tmp_path / "glm", "--to", "huggingface")
    assert lines[-1] == "round trip identical"
    assert json.loads((tmp_path / "glm" / "config.json").read_text())["architectures"] == ["GlmForCausalLM"]
    before, after = tensors(tmp_path / "chatglm"), tensors(tmp_path / "glm")
    fused = before["transformer.encoder.layers.1.self_attention.query_key_value.weight"]
    assert np.array_equal(fused[16:24], after["model.layers.1.self_attn.k_proj.weight"])
    assert checksums(lines)[1].startswith(f"{len(after)} tensors")
