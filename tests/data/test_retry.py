"""Reads that fail for a while succeed in the end; those that keep failing stop the run with the source's name."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import toy_data

from mllm_jax.data import retry
from mllm_jax.data.pipeline import Mixture, Weighted
from mllm_jax.data.retry import RetryPolicy, patiently
from mllm_jax.errors import ConfigError, DataError, ReadError

QUICK = RetryPolicy(attempts=3, first_pause=0.0)


class Flaky:
    """A read that fails a number of times before it succeeds."""

    def __init__(self, failures: int, error: Exception):
        self.failures, self.error, self.calls = failures, error, 0

    def __call__(self):
        self.calls += 1
        if self.calls <= self.failures:
            raise self.error
        return "bytes"


def caused(cause: Exception) -> DataError:
    error = DataError("the image a.png cannot be read", "a file", "see")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), TimeoutError("slow"), caused(OSError(5, "x"))])
def test_a_temporary_failure_is_retried_and_reported(error):
    read = Flaky(2, error)
    with pytest.warns(UserWarning, match=r"toy\[3\].*attempt 2 in"):
        assert patiently(read, "toy[3]", QUICK) == "bytes"
    assert read.calls == 3


def test_pauses_double(monkeypatch):
    pauses = []
    monkeypatch.setattr(retry.time, "sleep", pauses.append)
    with pytest.warns(UserWarning), pytest.raises(ReadError):
        patiently(Flaky(9, OSError(5, "x")), "toy[3]", RetryPolicy(attempts=5, first_pause=1.5))
    assert pauses == [1.5, 3.0, 6.0, 12.0]


@pytest.mark.filterwarnings("ignore:toy")
def test_one_that_goes_on_stops_by_name():
    with pytest.raises(ReadError, match=r"toy\[3\]: 3 attempts.*Input/output") as stop:
        patiently(Flaky(3, OSError(5, "Input/output error")), "toy[3]", QUICK)
    assert not isinstance(stop.value, DataError), "a bad record may be skipped; this may not"


@pytest.mark.parametrize(
    "error", [FileNotFoundError(2, "x"), PermissionError(1, "x"), DataError("a", "b", "c"), ValueError("x")]
)
def test_what_waiting_does_not_change_is_not_tried_again(error):
    read = Flaky(1, error)
    with pytest.raises(type(error)):
        patiently(read, "toy[3]", QUICK)
    assert read.calls == 1


def test_a_slow_read_is_reported():
    with pytest.warns(UserWarning, match=r"toy\[3\]: reading it took"):
        assert patiently(Flaky(0, OSError()), "toy[3]", replace(QUICK, slow_seconds=-1.0)) == "bytes"


def test_patience_that_cannot_be_is_refused():
    for wrong in (dict(attempts=0), dict(first_pause=-1.0), dict(factor=0.5)):
        with pytest.raises(ConfigError):
            RetryPolicy(**wrong)


@dataclass(frozen=True)
class Bucket(toy_data.Toy):
    """A toy source whose images come from a bucket that fails `failures` times, at images 0, 7, 14, ..."""

    failures: int = 0

    def build(self):
        return BucketSource(self)


class BucketSource(toy_data.ToySource):
    def __init__(self, config):
        super().__init__(config)
        self.left = config.failures

    def image(self, index, number=0):
        if index % 7 == 0 and self.left:
            self.left -= 1
            raise OSError(110, "Connection timed out")
        return super().image(index, number)


def make_images(failures: int, **kwargs):
    mixture = Mixture((Weighted(Bucket("bucket", failures=failures)),), rows=8, length=32, slots={"image": 1}, **kwargs)
    return toy_data.pipeline(mixture, patience=QUICK)


def batches(pipeline):
    return [pipeline.batch(step)["images"].sum() for step in range(5)]


def test_batches_are_the_same_after_failures():
    with pytest.warns(UserWarning, match=r"bucket\[\d+\]"):
        assert batches(make_images(2)) == batches(make_images(0))


@pytest.mark.filterwarnings("ignore:bucket")
def test_a_source_that_is_away_stops_the_run_and_counts_as_no_bad_record():
    with pytest.raises(ReadError, match=r"bucket\[\d+\]: 3 attempts.*Connection timed out"):
        batches(make_images(1000))
    with pytest.raises(ReadError, match=r"bucket\[\d+\]"):
        make_images(1000, max_bad_share=0.5)
