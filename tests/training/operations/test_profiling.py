"""A trace of three steps, and the message about how to open it."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mllm_jax.training.operations.profiling import Profile


def run(profile: Profile, start: int, stop: int) -> None:
    for step in range(start, stop):
        profile.before(step)
        profile.after(step, jnp.float32(step) * 2, last=step + 1 == stop)


def test_three_steps_after_those_that_compile(tmp_path):
    said = []
    profile = Profile(tmp_path, said.append)
    run(profile, 10, 20)
    run(profile, 0, 9)  # the next stage: one trace is enough
    (text,) = said
    assert "steps 12 to 14" in text and "https://ui.perfetto.dev" in text and f"--logdir {tmp_path}" in text
    trace = next(word for word in text.split() if word.endswith("perfetto_trace.json.gz"))
    assert list(tmp_path.rglob("perfetto_trace.json.gz")) == [tmp_path / trace]


def test_a_stage_that_ends_within_the_trace_ends_it(tmp_path):
    said = []
    run(Profile(tmp_path, said.append), 0, 4)
    assert "steps 2 to 3" in said[0]
    jax.profiler.start_trace(str(tmp_path / "another"))  # refused while one is open
    jax.profiler.stop_trace()


def test_a_stage_too_short_for_a_trace_leaves_it_to_the_next(tmp_path):
    said = []
    profile = Profile(tmp_path, said.append)
    run(profile, 0, 2)
    assert said == [] and profile.folder is not None
    profile.next_stage()
    run(profile, 0, 9)
    assert "steps 2 to 4" in said[0]


def test_none_is_asked_for(tmp_path):
    run(Profile(None, print), 0, 9)
    assert list(tmp_path.iterdir()) == []
