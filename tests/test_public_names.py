"""Every name that configs need or pages mention is in `mllm_jax` itself."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

import mllm_jax

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(path for path in (ROOT / "configs").rglob("*.py"))
PAGES = ("README.md", "CONTRIBUTING.md", "launch/README.md", "docs/models.md", "docs/planning.md")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_classes_that_configs_use(path):
    """Checks that they are the same objects by the same name; constants and helpers stay in their modules."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    used = [
        (node.module, alias.name)
        for node in nodes
        if (node.module or "").startswith("mllm_jax")
        for alias in node.names
    ]
    for module, name in used:
        if re.fullmatch(r"[A-Z]\w*[a-z]\w*", name):
            assert getattr(mllm_jax, name) is getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("page", PAGES)
def test_names_on_a_page(page):
    text = (ROOT / page).read_text()
    for name in set(re.findall(r"\b(?:mllm_jax|mj)\.([A-Za-z]\w*)", text)):
        module = (ROOT / "mllm_jax" / name).is_dir() or (ROOT / "mllm_jax" / f"{name}.py").is_file()
        assert module or getattr(mllm_jax, name), name
    for names in re.findall(r"^\s*from mllm_jax import ([\w, ]+)$", text, re.M):
        assert all(getattr(mllm_jax, name.strip()) for name in names.split(","))


def test_every_kind_of_config_has_a_public_name():
    """Checks that `mllm_jax/__init__.py` has every family; a protocol's name is no config."""
    folders = ("encoders", "projectors", "llms", "output_projectors")
    found = {
        name
        for folder in folders
        for path in (ROOT / "mllm_jax" / folder).glob("*.py")
        for name in re.findall(r"^class (\w+(?:Config|Dialect))\b(?!\(Protocol)", path.read_text(), re.M)
    }
    assert found and found <= set(mllm_jax.__all__), found - set(mllm_jax.__all__)


def test_type_checkers_read_the_same_names():
    text = (ROOT / "mllm_jax" / "__init__.py").read_text()
    said = re.findall(r"^    from (mllm_jax\.[\w.]+) import (\w+) as \2$", text, re.M)
    assert {name: module for module, name in said} == mllm_jax._HOMES
