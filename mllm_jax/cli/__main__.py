"""`python -m mllm_jax.cli` is `mllm`."""

import sys

from mllm_jax.cli import main

sys.exit(main())
