"""The one registry of architectures: found by name, by model_type, by an option; the LLMs inside named models."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import mllm_jax
from mllm_jax.checkpoints import architectures
from mllm_jax.checkpoints.architectures import (
    AMONG,
    ARCHITECTURES,
    BEFORE,
    Architecture,
    architecture,
    find,
    known,
    llms_inside,
    model_type,
    of_type,
)
from mllm_jax.errors import ConfigError

TYPED = [entry for entry in ARCHITECTURES if entry.model_type]


def names(entries):
    return [entry.name for entry in entries]


@pytest.mark.parametrize("entry", TYPED, ids=lambda entry: entry.name)
def test_a_model_type_says_what_the_name_says(entry):
    assert architecture({"model_type": entry.model_type}, entry.name) == entry.name
    assert architecture({"architectures": [entry.name]}, entry.name) == entry.name
    assert of_type(entry.model_type).model_type == entry.model_type
    assert model_type(entry.name) == entry.model_type


@pytest.mark.parametrize("values", [{}, {"model_type": None}, {"model_type": "bert"}, {"architectures": ["BertModel"]}])
def test_what_a_caller_does_not_read_is_refused(values):
    with pytest.raises(ConfigError) as refusal:
        architecture(values, "LlamaForCausalLM", "MistralForCausalLM")
    assert "LlamaForCausalLM or MistralForCausalLM" in str(refusal.value) and "supported_models" in str(refusal.value)
    assert of_type(values.get("model_type")) is None


def test_an_option_distinguishes_two_of_one_name():
    assert find("ChatGLMModel").module == "mllm_jax.llms.chatglm"
    assert find("ChatGLMModel", {"padded_vocab_size": 64}).module == "mllm_jax.llms.glm"
    assert find("QWenLMHeadModel", {"visual": None}).name == "QWenLMHeadModel"
    assert find("QWenLMHeadModel", {"visual": {"width": 8}}).name == "QWenVL" == find("QWenVL").name


@pytest.mark.parametrize("name,near", [("LlamaForCausalLm", "did you mean 'LlamaForCausalLM'"), (None, "mllm models")])
def test_an_unknown_name_is_refused_with_what_is_nearest(name, near):
    assert find(name) is None
    with pytest.raises(ConfigError, match=near):
        known(name)


def test_which_llms_may_be_inside():
    among = ["LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"]
    assert names(llms_inside(AMONG)) == among
    assert {entry.model_type for entry in llms_inside(BEFORE)} == {"llama", "opt", "t5"}


def test_an_llm_may_be_inside_by_its_line_alone(monkeypatch, tmp_path):
    from mllm_jax.models.parts import read_llm

    (tmp_path / "my_llm.py").write_text(
        "from mllm_jax.checkpoints.table import Family\n"
        "FAMILIES = (Family(name='mine', architectures=('MyForCausalLM',), from_hf=lambda values: values['size'], "
        "to_hf=dict, table=dict),)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="model_type='mine'"):
        read_llm({"model_type": "mine", "size": 3}, "a toy")
    line = Architecture("MyForCausalLM", "my_llm", "mine", media=(AMONG,))
    monkeypatch.setattr(architectures, "ARCHITECTURES", (*ARCHITECTURES, line))
    assert read_llm({"model_type": "mine", "size": 3}, "a toy") == 3
    assert read_llm({"architectures": ["MyForCausalLM"], "size": 4}, "a toy") == 4
    with pytest.raises(ConfigError, match="Qwen3ForCausalLM, MyForCausalLM"):
        read_llm({"model_type": "opt"}, "a toy")


def test_the_registry_imports_no_model():
    code = (
        "import sys, mllm_jax.checkpoints.architectures\n"
        "print([m for m in sys.modules if m.startswith(('mllm_jax.models', 'mllm_jax.llms', 'mllm_jax.encoders'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_file_has_a_table_of_modules_beside_it():
    root = Path(mllm_jax.__file__).parent
    strings = {f'"{entry.module}"' for entry in ARCHITECTURES}
    others = [
        p for p in root.rglob("*.py") if p.name != "architectures.py" and any(s in p.read_text() for s in strings)
    ]
    assert others == []
