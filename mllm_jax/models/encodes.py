"""The part of a multimodal model that reads media: encoder -> projector -> media tokens of a row."""

from __future__ import annotations

from functools import partial

import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from mllm_jax.encoders.vit import select_layers
from mllm_jax.layers.pixels import normalise_pixels
from mllm_jax.models.branch import ARRAYS, MEDIA, array_name
from mllm_jax.models.media_tokens import MediaTokens, side_by_side
from mllm_jax.models.sound_targets import Heard, sound_targets
from mllm_jax.sharding.logical import constrain, part_of_model, split_sizes


class Encodes:
    """Methods of `Multimodal` for its branches, whose parts are `encoder` and `projector`."""

    def encode_media(self, batch) -> MediaTokens | None:
        """Encodes the media of a batch for the LLM; None if it has none.

        Args:
            batch: one of:
                `images` uint8[B, M, H, W, 3], or float if they are normalised already, with `query_tokens` and
                `query_segments` int[B, M, L] for a projector that reads text;
                `sounds` float[B, M, ...], the encoder's inputs, with `masks` int[B, M, T] of their valid steps;
                `features` dtype[B, M, P, E] of `encode_features`;
                `patches` [B, N, D] with `patch_segments`, `patch_coordinates` and `patch_grids`, see `QwenViT`;
                the same of another modality, with its name as a prefix, such as `video_images`;
                `media` dtype[B, N, E], encoded before, with `media_mask` if they have a mask;
                none of these.
                With `answer_lengths` int[B, S], projectors that fire are trained, see `sound_targets`.
        """
        if "media" in batch:
            return MediaTokens(batch["media"], mask=batch.get("media_mask"))
        found, first = [], 0
        for modality in self.config.inputs:
            if (media := self._encode(modality, batch, first)) is not None:
                found.append(media)
                first += media.tokens.shape[1]
        return side_by_side(found)

    def _encode(self, modality: str, batch, first: int) -> MediaTokens | None:
        """Encodes the media of one branch, whose first media token has the index `first`."""
        here = {name: batch[key] for name in ARRAYS if (key := array_name(modality, name)) in batch}
        if "patches" in here:
            where = (here[f"patch_{name}"] for name in ("segments", "coordinates", "grids"))
            out = self._part("encoder", modality)(here["patches"], *where)
            return MediaTokens(out.pooler_output, out.deepstack_features)
        given = next((name for name in ("features", "images", "sounds") if name in here), None)
        if given is None:
            return None
        # Images are ordered so that each device has those of its own rows and slots.
        sizes = dict(zip("rs", split_sizes(("batch", "slots"), here[given].shape[:2]), strict=True))
        names = (given, "masks", "query_tokens", "query_segments")
        flat = {n: rearrange(here[n], "(r b) (s m) ... -> (r s b m) ...", **sizes) for n in names if n in here}
        read = {n: flat.pop(n) for n in (given, "masks") if n in flat}
        features, mask = self._features(read, modality) if given != "features" else (read[given], read.get("masks"))
        branch, slots = self.config.branch(modality), here[given].shape[1] // sizes["s"]
        if branch.fires:
            size = branch.projector.length(features.shape[1])
            targets = sound_targets(batch, first, here[given].shape[1], size)
            wanted = None if targets is None else rearrange(targets, "(r b) (s m) -> (r s b m)", **sizes)
            fired = self._part("projector", modality)(features, mask, wanted)
            apart = partial(rearrange, pattern="(r s b m) ... -> (r b) (s m) ...", m=slots, **sizes)
            tokens, kept = (rearrange(apart(x), "b m t ... -> b (m t) ...") for x in (fired.tokens, fired.mask))
            heard = Heard(*map(apart, (fired.fires, fired.mask.sum(axis=1), fired.quantity)), targets)
            return MediaTokens(tokens, mask=kept, heard=(heard,))
        media = features if branch.projects else self._part("projector", modality)(features, *flat.values())
        return MediaTokens(rearrange(media, "(r s b m) t e -> (r b) (s m t) e", m=slots, **sizes))

    def encode_images(self, batch):
        """Returns the features dtype[B * M, P, E] that the projector reads, of `images` [B, M, H, W, 3]."""
        return self.encode_features(batch, "image")

    def encode_features(self, batch, modality: str):
        """Returns the features dtype[B * M, P, E] that a branch's projector reads, of the branch's media in a batch.

        Args:
            batch: `images`, or `sounds` with `masks`, of that modality; see `encode_media`.
        """
        given = {name: batch[key] for name in MEDIA if (key := array_name(modality, name)) in batch}
        return self._features({name: rearrange(x, "b m ... -> (b m) ...") for name, x in given.items()}, modality)[0]

    def _features(self, given, modality: str):
        """Encodes images [N, H, W, 3], or sounds [N, ...] with masks [N, T]: dtype[N, P, E], and bool[N, P] or None."""
        if "images" in given:
            return self._seen(given["images"], modality), None
        return self._heard(given["sounds"], given["masks"], modality)

    def _seen(self, images, modality: str):
        """Encodes images [N, H, W, 3] as dtype[N, P, E]."""
        branch, encoder = self.config.branch(modality), self._part("encoder", modality)
        pixels = normalise_pixels(images, branch.encoder) if images.dtype == jnp.uint8 else images
        with part_of_model(encoder.name):
            pixels = constrain(pixels, "batch", None, None, None)  # before the encoder's first layer, which is no block
        chosen, keep = branch.connection.layers, branch.connection.class_token
        if chosen is not None:
            return select_layers(encoder(pixels, output_hidden_states=True), chosen, keep)
        out = encoder(pixels)
        return out.last_hidden_state if keep else out.last_hidden_state[:, out.class_tokens :]

    def _heard(self, sounds, mask, modality: str):
        """Encodes sounds [N, ...]: dtype[N, T, E], 0 for vectors after a sound's end, and bool[N, T] or None.

        An empty slot is encoded as valid: a sum over nothing has no gradient. No text refers to it.
        """
        encoder, layers = self._part("encoder", modality), self.config.branch(modality).connection.layers
        with part_of_model(encoder.name):
            sounds = constrain(sounds, "batch", *[None] * (sounds.ndim - 1))
        mask = jnp.where(mask.any(axis=-1, keepdims=True), mask, 1)
        out = encoder(sounds, mask, output_hidden_states=layers is not None)
        found = out.last_hidden_state if layers is None else select_layers(out, layers, True)
        return (found if out.mask is None else jnp.where(out.mask[..., None], found, 0)), out.mask

    def _part(self, kind: str, modality: str) -> nn.Module:
        """Returns the module of a branch's part, its own or a shared one."""
        return getattr(self, kind)[self.config._owner(kind, modality)]
