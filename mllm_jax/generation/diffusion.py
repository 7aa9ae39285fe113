"""The sampling loop of a diffusion model, from the text to the image or the sound, as one compiled program.

    text condition -> a scan over the scheduler's steps, with classifier-free guidance (arXiv 2207.12598) -> decoder

A video is an "image" whose arrays have an axis of frames before their height.

Guidance doubles the batch: each image has a row with its negative text beside the row with its own. Steps outside
`SamplingPlan.guided` compute the second row alone, which takes half the time.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat
from flax import linen as nn
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mllm_jax.generation.decode_step import on_mesh
from mllm_jax.generators.schedulers import Scheduler, State
from mllm_jax.sharding.hosts import fetch
from mllm_jax.sharding.logical import constrain

OnStep = Callable[[int, float, np.ndarray], Any]
# The noises of an image: folded into the key of its seed.
FIRST, POSTERIOR, STEPS = 0, 1, 2


@dataclass(frozen=True)
class SamplingPlan:
    """The static arguments of a program, which is compiled for these and for the shapes of its arrays.

    Attributes:
        steps: as asked for; a scheduler may call the model more often, see `calls`.
        latents: height, width and channels of an image's latents; of a video's with the frames before these.
        first: the call that begins, above 0 for an image that starts from another one.
        guided: the first call with guidance and the first one after them.
        watched: whether each step is reported.
    """

    scheduler: Scheduler
    steps: int
    latents: tuple[int, ...]
    first: int = 0
    guided: tuple[int, int] = (0, 0)
    watched: bool = False


@struct.dataclass
class SamplerInputs:
    """The images of one batch.

    Attributes:
        tokens, negatives: int32[B, L], of the texts and the negative texts, or a tree of such arrays if the model reads
            texts in several ways; the latter None without guidance.
        conditions: float32[B, L, E] instead of tokens, or a tree of such arrays.
        seeds: uint32[B].
        guidance: float32 scalar.
        latents: float32[B, h, w, C], the unit noise that an image begins with; None: from the seed.
        start: float32[B, H, W, 3], images to start from, or None. The unit noise is then added to their latents.
        posterior: float32[B, h, w, C], noise of the distribution of the start's latents; None: from the seed.
        noise: float32[N, B, h, w, C], of the steps of a stochastic scheduler; None: from the seed.
        mean: whether the start's latents are the mean of their distribution.
    """

    tokens: Any
    seeds: Any
    guidance: Any
    negatives: Any = None
    conditions: Any = None
    latents: Any = None
    start: Any = None
    posterior: Any = None
    noise: Any = None
    mean: bool = struct.field(pytree_node=False, default=False)


def calls(scheduler: Scheduler, steps: int) -> int:
    """Returns the number of a model's calls. Raises ConfigError: the scheduler cannot take that number of steps."""
    return len(scheduler.init(steps).timesteps)


class Sampler:
    """A model's compiled sampling loop.

    Args:
        module: has `condition`, `denoise`, `encode` and `decode`, such as a `StableDiffusion`.
        params: its parameters, sharded if there is a mesh.
    """

    def __init__(self, module: nn.Module, params: dict | None, mesh: Mesh | None = None):
        self.module, self.params, self.mesh = module, params, mesh
        self._compiled = jax.jit(self._images, static_argnames="plan")
        self._watcher = _Watcher(alone=mesh is None or mesh.size == 1)

    def of(self, params: dict) -> Sampler:
        """Returns the same with other parameters; both share the compiled program."""
        other = copy.copy(self)
        other.params = params
        return other

    def __call__(self, asked: SamplerInputs, plan: SamplingPlan, on_step: OnStep | None = None) -> np.ndarray:
        """Returns what `decode` makes: images float32[B, H, W, 3] in [0, 1], videos with frames after B, or sounds.

        Sounds are float32[B, samples].

        Args:
            on_step: called after each step with its number from 0, its timestep and the latents float32[B, h, w, C]. An
                exception ends the loop, over several devices after its last step, and is raised.
        """
        whole = None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec())
        with self._watcher.reporting(on_step):
            images = fetch(self._compiled(self.params, jax.device_put(asked, whole), plan=plan))
        return images

    def _images(self, params: dict, asked: SamplerInputs, plan: SamplingPlan) -> jax.Array:
        """Computes a batch of images; traced once for each plan and shape."""
        with on_mesh(self.mesh):
            call = lambda method, *inputs: self.module.apply({"params": params}, *inputs, method=method)  # noqa: E731
            pair, text = _conditions(call, asked, guided=plan.guided[0] < plan.guided[1])
            noise = partial(_noise, asked.seeds, plan.latents)
            state, latents = self._begin(call, asked, plan, noise)

            def step(carry, number, *, guided: bool):
                state, latents = carry
                timestep, model_input = state.timestep, plan.scheduler.scale(state, latents)
                if guided:
                    model_input = _by_rows(repeat(model_input, "b ... -> (b two) ...", two=2))
                times = jnp.broadcast_to(timestep, model_input.shape[:1])
                output = call("denoise", model_input, times, pair if guided else text).astype(jnp.float32)
                if guided:
                    without, with_text = rearrange(output, "(b two) ... -> two b ...", two=2)
                    output = without + asked.guidance * (with_text - without)
                fresh = None
                if plan.scheduler.stochastic:
                    fresh = noise(STEPS + number) if asked.noise is None else asked.noise[number]
                state, stepped = plan.scheduler.step(state, *map(_by_frame, (output, latents, fresh)))
                latents = _by_rows(stepped.reshape(latents.shape))
                if plan.watched:
                    jax.debug.callback(self._watcher, number, timestep, latents)
                return (state, latents), None

            carry, total = (state, latents), len(state.timesteps) - plan.first
            start, stop = (min(max(edge - plan.first, 0), total) for edge in plan.guided)
            for begin, end, guided in ((0, start, False), (start, stop, True), (stop, total, False)):
                if begin < end:
                    carry, _ = jax.lax.scan(partial(step, guided=guided), carry, jnp.arange(begin, end))
            return call("decode", carry[1])

    def _begin(
        self, call: Callable, asked: SamplerInputs, plan: SamplingPlan, noise: Callable
    ) -> tuple[State, jax.Array]:
        """Returns the scheduler's state and the latents that the first call reads."""
        scheduler = plan.scheduler
        first = noise(FIRST) if asked.latents is None else asked.latents
        state = scheduler.init(plan.steps, _by_frame(first).shape)
        if asked.start is None:
            return state, _by_rows(first * scheduler.initial_scale_of(state))
        posterior = noise(POSTERIOR) if asked.posterior is None and not asked.mean else asked.posterior
        latents = call("encode", asked.start, posterior)
        state = scheduler.start(state, plan.first)
        return state, _by_rows(scheduler.noised(state, latents, first))


def _conditions(call: Callable, asked: SamplerInputs, guided: bool) -> tuple[Any, Any]:
    """Returns the conditions of images: each beside that of its negative text [2 B, ...] if guided, and alone."""
    text = lambda tokens: _by_rows(call("condition", _by_rows(tokens)))  # noqa: E731
    if not guided:
        return None, text(asked.tokens) if asked.conditions is None else _by_rows(asked.conditions)
    if asked.conditions is None:
        pair = text(jax.tree.map(_alternating, asked.negatives, asked.tokens))
    else:
        without = text(asked.negatives)
        own = jax.tree.map(lambda own, empty: own.astype(empty.dtype), asked.conditions, without)
        pair = _by_rows(jax.tree.map(_alternating, without, own))
    return pair, _by_rows(jax.tree.map(lambda states: states[1::2], pair))


def _by_frame(x: jax.Array | None) -> jax.Array | None:
    """Returns images [B, h, w, C] as they are, and videos with a row for each frame: a scheduler limits each alone."""
    return None if x is None else rearrange(x, "b ... h w c -> (b ...) h w c")


def _by_rows(tree: Any) -> Any:
    """Splits the rows of arrays over the mesh."""
    return jax.tree.map(lambda x: constrain(x, "batch", *(None,) * (x.ndim - 1)), tree)


def _alternating(one: jax.Array, other: jax.Array) -> jax.Array:
    """Returns rows of both, [2 * B, ...], one after the other."""
    return rearrange(jnp.stack([one, other]), "two b ... -> (b two) ...")


def _noise(seeds: jax.Array, shape: tuple[int, ...], number: jax.Array | int) -> jax.Array:
    """Returns float32[B, *shape]: each image's noise of that number, which depends on its seed alone."""

    def one(seed):
        return jax.random.normal(jax.random.fold_in(jax.random.key(seed), number), shape, jnp.float32)

    return _by_rows(jax.vmap(one)(seeds))


class _Watcher:
    """Reports a compiled loop's steps to a function that each call of the program may replace.

    `jax.debug.callback` promises no order, so a report waits for those before it. (`io_callback`, which does, cannot be
    in one program with the gathers of sharding/fsdp.py.)

    Args:
        alone: whether the program runs on one device. Others would wait forever for one that has failed.
    """

    def __init__(self, alone: bool):
        self._alone, self._lock = alone, threading.Lock()

    @contextmanager
    def reporting(self, on_step: OnStep | None) -> Iterator[None]:
        """Reports the steps of the programs that run inside; raises what `on_step` raised."""
        self._on_step, self._failure, self._waiting, self._next = on_step, None, {}, 0
        try:
            yield
            jax.effects_barrier()
        except jax.errors.JaxRuntimeError:
            if self._failure is None:
                raise
        if self._failure is not None:
            raise self._failure

    def __call__(self, number: Any, timestep: Any, latents: Any) -> None:
        with self._lock:
            self._waiting[int(number)] = float(timestep), np.asarray(latents)
            while self._failure is None and (report := self._waiting.pop(self._next, None)) is not None:
                try:
                    self._on_step(self._next, *report)
                except BaseException as error:
                    self._failure = error
                    if self._alone:
                        raise
                self._next += 1
