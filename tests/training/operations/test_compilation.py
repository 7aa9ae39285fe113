"""The cache of compiled programs."""

from __future__ import annotations

import jax
import pytest

from mllm_jax.errors import ConfigError
from mllm_jax.training.operations.compilation import keep_compiled, machine


@pytest.fixture
def unset(monkeypatch):
    """Unsets the cache, and undoes a test's settings."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    before = jax.config.jax_compilation_cache_dir
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_in_the_users_cache_for_this_kind_of_machine(unset, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = keep_compiled()
    assert folder == tmp_path / "mllm_jax" / "compiled" / machine() and folder.is_dir()
    assert jax.config.jax_compilation_cache_dir == str(folder)


def test_the_environment_has_the_last_word(unset, monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "mine"))
    before = jax.config.jax_compilation_cache_dir
    assert keep_compiled(tmp_path / "other") is None and not (tmp_path / "other").exists()
    assert jax.config.jax_compilation_cache_dir == before


def test_a_folder_that_cannot_be_made_is_refused(unset, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="XDG_CACHE_HOME"):
        keep_compiled(tmp_path / "file" / "cache")
