"""The library's own exceptions: every refusal says what was given, what was expected and what to do."""

from __future__ import annotations


class MllmError(Exception):
    """An error of the library, with its three parts.

    Args:
        given: what the caller gave, named precisely enough to find it.
        expected: what would be valid.
        todo: what the user should do next.
    """

    def __init__(self, given: str, expected: str, todo: str):
        super().__init__(given, expected, todo)
        self.given, self.expected, self.todo = given, expected, todo

    def __str__(self) -> str:
        return f"{self.given}\n  expected: {self.expected}\n  to do:    {self.todo}"


class ConfigError(MllmError):
    """A configuration that cannot run: unknown key, impossible mesh, contradicting sizes."""


class DataError(MllmError):
    """A record, image or source that cannot be used."""


class TooFewError(DataError):
    """Too few examples, or no model to compare with, for something that can be left out."""


class ReadError(MllmError):
    """A source that could not be read after several attempts; the record is not at fault."""


class CheckpointError(MllmError):
    """A checkpoint that cannot be written, read or trusted."""


class RunFolderError(MllmError):
    """A run folder that belongs to something else or cannot be written."""


class TrainingError(MllmError):
    """A training run that must stop: non-finite loss, too many bad batches."""


class PlanError(MllmError):
    """A plan that cannot be made: an unknown slice, no TPU compiler, a program that cannot be read."""
