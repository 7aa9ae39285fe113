"""Targets of generators, noised and denoised: what their training needs of a model."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn
from flax import struct


@struct.dataclass
class Diffused:
    """The output of a generator for noised targets, [B, M, ...] each.

    Attributes:
        output: the prediction.
        target: its target, which is noise, the velocity, the sample or the flow.
        snr: float32[B, M], the signal-to-noise ratios.
        prediction: the scheduler's prediction type.
    """

    output: jax.Array
    target: jax.Array
    snr: jax.Array
    prediction: str = struct.field(pytree_node=False)


def diffuse(generator: nn.Module, modality: str, batch, condition: Any) -> Diffused:
    """Noises the targets of one modality and denoises them; see `Produces.diffused`.

    Args:
        condition: [B, M, L, E], or a tree of such arrays for a generator with several conditions.
    """
    names = ("latents", "noise", "level", "dropped")
    media = batch[f"{modality}_latents"].shape[:2]
    latents, noise, level, dropped = (rearrange(batch[f"{modality}_{name}"], "b m ... -> (b m) ...") for name in names)
    empty = jax.lax.stop_gradient(generator.condition(batch[f"{modality}_empty"][:1]))
    dropped = dropped.astype(bool)[:, None, None]

    def or_empty(own, empty):
        own = rearrange(own, "b m ... -> (b m) ...")
        return jnp.where(dropped, empty.astype(own.dtype), own)

    condition = jax.tree.map(or_empty, condition, empty)
    scheduler = generator.config.scheduler
    times = (level * scheduler.num_train_timesteps).astype(jnp.int32)
    output = generator.denoise(scheduler.add_noise(latents, noise, times), times, condition)
    target, snr = scheduler.target(latents, noise, times), scheduler.snr(times)
    apart = partial(rearrange, pattern="(b m) ... -> b m ...", m=media[1])
    return Diffused(apart(output), apart(target), apart(snr), scheduler.prediction_type)


def parted(flat: jax.Array, tokens: int | tuple[int, ...], sizes: int | tuple[int, ...]) -> Any:
    """Returns a condition [B, M, tokens, size], or a tuple of several, from its numbers [B, M, P]."""
    one = isinstance(tokens, int)
    pairs = [(tokens, sizes)] if one else list(zip(tokens, sizes, strict=True))
    edges = np.cumsum([count * size for count, size in pairs])[:-1].tolist()
    parts = [
        rearrange(part, "b m (l e) -> b m l e", l=count)
        for part, (count, _) in zip(jnp.split(flat, edges, axis=-1), pairs, strict=True)
    ]
    return parts[0] if one else tuple(parts)


class OfMedia:
    """Methods of a module with the submodules `generator`, by modality, and a method `diffused`."""

    def caption_conditions(self, batch) -> dict[str, Any]:
        """Returns the conditions that the generators' own text encoders make of `<modality>_captions` int[B, M, L].

        `<modality>_conditions` [B, M, P], the result of `flat_conditions`, take the place of captions.
        """
        found = self._of_media(batch, "captions", lambda generator, captions: generator.condition(captions))
        for modality, generator in self.generator.items():
            if (flat := batch.get(f"{modality}_conditions")) is not None:
                found[modality] = parted(flat, generator.config.condition_tokens, generator.config.condition_size)
        return found

    def flat_conditions(self, batch, modality: str) -> jax.Array:
        """Returns the conditions of the captions of one modality as [B * M, P], with all numbers of each in one row."""
        captions = rearrange(batch[f"{modality}_captions"], "b m l -> (b m) l")
        made = jax.tree.leaves(self.generator[modality].condition(captions))
        return jnp.concatenate([rearrange(each, "n l e -> n (l e)") for each in made], axis=1)

    def targets(self, batch) -> dict[str, jax.Array]:
        """Returns what the generators learn to denoise, the latents [B, M, ...] of `<modality>_targets`."""
        return self._of_media(batch, "targets", lambda generator, targets: generator.latents_of(targets))

    def _of_media(self, batch, name: str, function) -> dict[str, jax.Array]:
        """Applies a function of generators to the arrays of a name [B, M, ...], by modality."""
        found = {}
        for modality, generator in self.generator.items():
            if (given := batch.get(f"{modality}_{name}")) is not None:
                made = function(generator, rearrange(given, "b m ... -> (b m) ..."))
                apart = partial(rearrange, pattern="(b m) ... -> b m ...", m=given.shape[1])
                found[modality] = jax.tree.map(apart, made)
        return found

    def produced(self, batch) -> tuple[Any, ...]:
        """Runs every part that produces media once, so that `init` creates all parameters."""
        targets = self.targets(batch)
        for m, latents in targets.items():
            some = jnp.zeros(latents.shape[:2])
            batch = {**batch, f"{m}_latents": latents, f"{m}_noise": latents, f"{m}_level": some, f"{m}_dropped": some}
        made = self.diffused(batch)[1]
        return tuple(self.generator[m].decode(each.output[:, 0]) for m, each in made.items())
