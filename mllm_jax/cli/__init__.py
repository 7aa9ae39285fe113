"""The command `mllm`, one file a command: train, evaluate, question and convert models."""

from mllm_jax.cli.commands import main as main
