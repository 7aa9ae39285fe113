"""A multimodal LLM as one module: encoder -> projector -> LLM (MM-LLMs survey, arXiv 2401.13601)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from flax import struct
from flax.core import FrozenDict

from mllm_jax.checkpoints.fields import field_value
from mllm_jax.data.batch import ArraySpec, BatchSpec, target_spec, text_spec
from mllm_jax.encoders.vit import select_layers
from mllm_jax.errors import ConfigError
from mllm_jax.layers.compute import WithCompute, within
from mllm_jax.layers.context_gather import take_along_rows
from mllm_jax.layers.head import HeadInputs
from mllm_jax.layers.pixels import normalise_pixels
from mllm_jax.models.branch import ARRAYS, KINDS, MEDIA, Branch, array_name
from mllm_jax.models.branch import Connection as Connection
from mllm_jax.sharding.logical import constrain, part_of_model, split_sizes


@dataclass(frozen=True)
class MultimodalConfig(WithCompute):
    """The configs of the parts and their connections. A named model is a subclass with further fields.

    Attributes:
        inputs: a branch for each modality that the LLM reads, such as {"image": Branch(encoder, projector)}. In a row
            their media tokens follow each other in this order.
        llm: a decoder or an encoder-decoder, which reads media in its encoder.
        newline: whether a learned vector marks the end of each row of patches in the text (LLaVA-NeXT). Its index
            follows those of all media tokens in the batch's row.
        family: the Hugging Face architecture for writing it, or None.
    """

    inputs: Mapping[str, Branch]
    llm: Any
    newline: bool = False
    family: str | None = None

    reads = ("image",)  # the modalities of a named model

    def __post_init__(self):
        object.__setattr__(self, "inputs", FrozenDict(self.inputs))
        if self.family is not None and set(self.inputs) != set(self.reads):
            raise ConfigError(
                f"{self.family} with inputs {sorted(self.inputs)}",
                " and ".join(f"{modality}s" for modality in self.reads),
                "compose a MultimodalConfig instead",
            )
        for modality in self.inputs:
            self.branch(modality).check(self.llm.hidden_size)

    def branch(self, modality: str) -> Branch:
        """Returns the branch of a modality, with the parts that it shares and with open widths filled in.

        Raises:
            ConfigError: the model does not read this modality; or the branch shares a part that does not exist, or
                that its owner shares itself.
        """
        if modality not in self.inputs:
            raise ConfigError(
                f"{modality}s for a model that reads {', '.join(self.inputs) or 'text'}",
                f"a branch inputs[{modality!r}]",
                "take a model that reads them",
            )
        own = self.inputs[modality]
        parts = {kind: getattr(self.inputs[self._owner(kind, modality)], kind) for kind in KINDS}
        return replace(own, **parts).joined(self.llm.hidden_size)

    def part_name(self, kind: str, modality: str) -> str:
        """Returns the name of a branch's part, its own or a shared one, such as encoder_image."""
        return f"{kind}_{self._owner(kind, modality)}"

    def _owner(self, kind: str, modality: str) -> str:
        """Returns the modality of the branch that owns a branch's part."""
        part = getattr(self.inputs[modality], kind)
        if not isinstance(part, str):
            return modality
        other = self.inputs.get(part)
        if other is None or isinstance(getattr(other, kind), str):
            raise ConfigError(
                f"inputs[{modality!r}].{kind}={part!r}",
                f"the modality of a branch with a {kind} of its own",
                f"name one of {', '.join(self.inputs)}",
            )
        return part

    @property
    def image(self) -> Branch:
        """The branch of images. Raises ConfigError if the model reads none."""
        return self.branch("image")

    def with_branch(self, modality: str, **changes: Any) -> MultimodalConfig:
        """Returns the config with changes to one branch, such as another projector; shared parts stay shared.

        Raises:
            ConfigError: the model does not read this modality, or the parts no longer fit.
        """
        self.branch(modality)
        return replace(self, inputs={**self.inputs, modality: replace(self.inputs[modality], **changes)})

    @property
    def parts(self) -> dict[str, Any]:
        """Each part's config, with open fields filled in, by the name of its parameters, such as encoder_image."""
        own = [(kind, m) for kind in KINDS for m, b in self.inputs.items() if is_dataclass(getattr(b, kind))]
        found = {f"{kind}_{m}": getattr(self.branch(m), kind) for kind, m in own} | {"llm": self.llm}
        return {name: within(part, self.compute) for name, part in found.items()}

    @property
    def encoder_decoder(self) -> bool:
        """True if the LLM reads text and media in its encoder, and answers with its decoder."""
        return self.llm.encoder_decoder

    @property
    def media_tokens(self) -> int:
        """The number of tokens of one image, or of one tile, in the LLM's row; 0 for a model without images."""
        return self.image.tokens if "image" in self.inputs else 0

    @property
    def vocab_sizes(self) -> dict[str, int]:
        """The number of tokens of each embedding, by its path in an experiment."""
        return {"model.llm.vocab_size": self.llm.vocab_size}

    @property
    def dtype(self) -> str:
        """The dtype of most of the computation."""
        return self.parts["llm"].dtype

    @property
    def image_size(self) -> int:
        """The side of the images in a batch; 0 for a model without images."""
        return self.image.encoder.image_size if "image" in self.inputs else 0

    @property
    def neighbours(self) -> int:
        """The most media tokens in the weighted sum at one position."""
        return 1

    def batch_spec(self, rows: int = 1, length: int = 8, slots: Mapping[str, int] | None = None) -> BatchSpec:
        """Returns the arrays of a batch.

        Args:
            slots: of a row, by modality: tiles, or patches of an encoder that packs them; None: the fewest that hold
                a medium of each modality.
        """
        branches = {modality: self.branch(modality) for modality in self.inputs}
        if slots is None:
            slots = {m: b.encoder.merge_unit if b.packed else 1 for m, b in branches.items()}
        spec = text_spec(rows, length, width=self.neighbours, axes=self.position_axes)
        if self.encoder_decoder:
            spec |= target_spec(rows, length)
        for modality, count in slots.items():
            if count:
                spec |= self.branch(modality).batch_spec(modality, rows, count)
        return spec

    def target_spec(self, rows: int, length: int) -> BatchSpec:
        """Returns the arrays for the output of an encoder-decoder's decoder."""
        return target_spec(rows, length) | dict(loss_weights=ArraySpec((rows, length), "float32"))

    @property
    def position_axes(self) -> int:
        """The number of coordinates of a position: 3 for M-RoPE."""
        return 3 if field_value(self.llm, "mrope_sections") else 1

    @property
    def instruction_length(self) -> int:
        """The most tokens of an instruction that the projector of images reads in training; 0: it reads none."""
        return self.image.instruction_length if "image" in self.inputs else 0

    def beside(self, model: Any, vocab_size: int) -> MultimodalConfig:
        """Returns the config with open widths filled in; it takes nothing from the experiment."""

        def own(modality: str, branch: Branch) -> Branch:
            kinds = [kind for kind in KINDS if is_dataclass(getattr(branch, kind))]
            return replace(branch, **{kind: getattr(self.branch(modality), kind) for kind in kinds})

        return replace(self, inputs={modality: own(modality, branch) for modality, branch in self.inputs.items()})

    def make(self) -> Multimodal:
        return Multimodal(self)


@struct.dataclass
class MediaTokens:
    """Encoded media of a batch of rows.

    Attributes:
        tokens: dtype[B, N, E], every slot's media tokens in the order of the slots.
        deepstack: for each of the LLM's first layers, dtype[B, N, E] that is added to its output at the positions of
            these tokens (arXiv 2406.04334); empty for most encoders.
    """

    tokens: jax.Array
    deepstack: tuple[jax.Array, ...] = ()


@struct.dataclass
class MultimodalOutput:
    """The output for a batch.

    Attributes:
        logits: float32[B, S, V], of the next token at each position; [B, M, V] if only M positions are requested.
        cache: the updated cache, if one was given.
    """

    logits: jax.Array
    cache: Any = None


class Multimodal(nn.Module):
    """A module that maps a batch of packed rows to logits."""

    config: MultimodalConfig

    def setup(self):
        c = self.config
        made = {name: part.make() for name, part in c.parts.items()}
        self.encoder, self.projector = (
            {m: made[name] for m in c.inputs if (name := f"{kind}_{m}") in made} for kind in KINDS
        )
        self.llm = made["llm"]
        if c.newline:
            init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("embed",))
            self.newline = self.param("newline", init, (c.llm.hidden_size,), jnp.float32)

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
                `media` dtype[B, N, E], encoded before;
                none of these.
        """
        if "media" in batch:
            return MediaTokens(batch["media"])
        found = [self._encode(modality, batch) for modality in self.config.inputs]
        return _side_by_side([media for media in found if media is not None])

    def _encode(self, modality: str, batch) -> MediaTokens | None:
        """Encodes the media of one branch."""
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
        features = read[given] if given == "features" else self._features(read, modality)
        if self.config.branch(modality).projects:
            media = features
        else:
            media = self._part("projector", modality)(features, *flat.values())
        slots = here[given].shape[1] // sizes["s"]
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
        return self._features({name: rearrange(x, "b m ... -> (b m) ...") for name, x in given.items()}, modality)

    def _features(self, given, modality: str):
        """Encodes images [N, H, W, 3], or sounds [N, ...] with masks [N, T], as dtype[N, P, E]."""
        return self._seen(given["images"], modality) if "images" in given else self._heard(**given, modality=modality)

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

    def _heard(self, sounds, masks, modality: str):
        """Encodes sounds [N, ...] as dtype[N, T, E], which is 0 for vectors after a sound's end.

        An empty slot is encoded as valid: a sum over nothing has no gradient. No text refers to it.
        """
        encoder, layers = self._part("encoder", modality), self.config.branch(modality).connection.layers
        with part_of_model(encoder.name):
            sounds = constrain(sounds, "batch", *[None] * (sounds.ndim - 1))
        masks = jnp.where(masks.any(axis=-1, keepdims=True), masks, 1)
        out = encoder(sounds, masks, output_hidden_states=layers is not None)
        found = out.last_hidden_state if layers is None else select_layers(out, layers, True)
        return found if out.mask is None else jnp.where(out.mask[..., None], found, 0)

    def _part(self, kind: str, modality: str) -> nn.Module:
        """Returns the module of a branch's part, its own or a shared one."""
        return getattr(self, kind)[self.config._owner(kind, modality)]

    def merge(self, tokens, media, media_index, media_weights=None):
        """Puts media tokens at their positions in the text: a gather inside each row.

        No shard of the batch is crossed. If a mesh splits rows along the sequence, each device's media pass the
        others once; see `take_along_rows`.

        Args:
            tokens: int[B, S].
            media: dtype[B, N, E] or None; index N is the newline vector, if there is one.
            media_index: int[B, S], -1 for text; or int[B, S, K] with `media_weights` float[B, S, K], if a position
                holds the weighted sum of K media tokens.

        Returns:
            dtype[B, S, E].
        """
        here = (media_index if media_index.ndim == 2 else media_index[..., 0]) >= 0
        text = self.llm.embed(jnp.where(here, 0, tokens))  # the id that stands for an image may be beyond the table
        if media is None:
            return text
        newline = self.newline.astype(media.dtype) if self.config.newline else None
        placed = _placed(media, media_index, media_weights, newline)
        return constrain(jnp.where(here[..., None], placed.astype(text.dtype), text), "batch", "seq", None)

    def __call__(self, batch, cache=None, logits_at=None) -> MultimodalOutput:
        """Computes next-token logits of a batch of packed rows.

        Args:
            batch: tokens, segments int[B, S]; positions int[B, S], or int[B, S, 3] for M-RoPE; media_index and
                media_weights, see `merge`; the media, see `encode_media`. An encoder-decoder reads all of these in its
                encoder, and also needs decoder_tokens, decoder_positions and decoder_segments int[B, T].
            cache: KVCache, for generation.
            logits_at: int[B, M], the positions of the requested logits; None: all.
        """
        more = {} if logits_at is None or self.config.encoder_decoder else {"logits_at": logits_at}
        if cache is None:
            return MultimodalOutput(self._language(batch, **more))
        return MultimodalOutput(*self._language(batch, cache=cache, **more))

    def head_inputs(self, batch) -> HeadInputs:
        """Returns the inputs of the LLM's output head for a batch."""
        return self._language(batch, project=False)

    def _language(self, batch, **more):
        """Applies the LLM to a batch."""
        embeddings, deepstack = self._read(batch)
        text = batch["tokens"], batch.get("positions"), batch["segments"]
        if "decoder_tokens" in batch:
            more |= {n: batch.get(n) for n in ("decoder_tokens", "decoder_positions", "decoder_segments")}
        return self.llm(*text, embeddings=embeddings, **more, **deepstack)

    def _read(self, batch):
        """Returns the LLM's input dtype[B, S, E], and its further arguments for deepstack."""
        media, index, weights = self.encode_media(batch), batch["media_index"], batch.get("media_weights")
        embeddings = self.merge(batch["tokens"], media and media.tokens, index, weights)
        if media is None or not media.deepstack:
            return embeddings, {}
        here = (index if index.ndim == 2 else index[..., 0])[..., None] >= 0
        return embeddings, {"deepstack": tuple(jnp.where(here, _placed(x, index, weights), 0) for x in media.deepstack)}

    def start(self, batch, size: int):
        """Encodes a batch with an encoder-decoder and returns the cache for generation; see `T5.start`."""
        embeddings, _ = self._read(batch)
        text = batch["tokens"], batch.get("positions"), batch["segments"]
        return self.llm.start(*text, embeddings=embeddings, size=size)

    def step(self, tokens, cache):
        """Reads one more token of each row, int[B, 1]; returns (float32[B, 1, V], cache)."""
        return self.llm(tokens, cache=cache)

    def touch(self, batch):
        """Runs every part once, so that `init` creates all parameters."""
        return self(batch)


def _side_by_side(media: Sequence[MediaTokens]) -> MediaTokens | None:
    """Concatenates the media of several branches; deepstack is 0 for branches that have none."""
    if len(media) < 2:
        return media[0] if media else None
    layers = range(max(len(m.deepstack) for m in media))
    added = [[m.deepstack[layer] if m.deepstack else 0 * m.tokens for m in media] for layer in layers]
    tokens = jnp.concatenate([m.tokens for m in media], axis=1)
    return MediaTokens(tokens, tuple(jnp.concatenate(each, axis=1) for each in added))


def _placed(media, index, weights, newline=None):
    """Gathers dtype[B, N, E] to [B, S, E]; index N is the newline [E], if there is one. See `Multimodal.merge`."""

    def take(index):
        found = take_along_rows(media, jnp.clip(index, 0, media.shape[1] - 1))
        return found if newline is None else jnp.where((index == media.shape[1])[..., None], newline, found)

    if index.ndim == 2:
        return take(index)
    found = rearrange(take(rearrange(index, "b s k -> b (s k)")), "b (s k) e -> b s k e", k=index.shape[-1])
    return jnp.einsum("bske,bsk->bse", found, weights.astype(media.dtype))
