"""What tests of the emoji data share."""

import pytest

from mllm_jax.data.openmoji import load


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder in which the quickstart's data lies."""
    path = str(tmp_path_factory.mktemp("data"))
    load("quickstart", path)
    return path
