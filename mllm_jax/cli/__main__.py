"""Runs `mllm` as `python -m mllm_jax.cli`."""

import sys

from mllm_jax.cli import main

sys.exit(main())
