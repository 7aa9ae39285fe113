"""`mllm models`: a table of the models that can be read and written."""

from __future__ import annotations

from dataclasses import dataclass

import tyro

from mllm_jax.cli.console import console


@dataclass(frozen=True)
class Models:
    """Lists the models whose Hugging Face folders can be read and written."""


def run(arguments: list[str]) -> int:
    tyro.cli(Models, args=arguments, prog="mllm models")

    from rich.table import Table

    from mllm_jax.models.registry import supported_models

    table = Table("model", "architectures", "reads", "writes", "proven against")
    for row in supported_models():
        marks = ["yes" if able else "no" for able in (row.reading, row.writing)]
        table.add_row(row.name, "\n".join(row.architectures), *marks, row.oracle)
    console().print(table)
    return 0
