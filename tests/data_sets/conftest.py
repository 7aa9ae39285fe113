"""What tests of the emoji data share.

This folder is not named datasets: tests/ is on sys.path, and transformers asks for a package of that name.
"""

import pytest

from mllm_jax.datasets.openmoji import load


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder in which the quickstart's data lies."""
    path = str(tmp_path_factory.mktemp("data"))
    load("quickstart", path)
    return path
