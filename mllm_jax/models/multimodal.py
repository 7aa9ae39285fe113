"""A multimodal LLM as one module: encoder -> projector -> LLM (MM-LLMs survey, arXiv 2401.13601)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, is_dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from flax.core import FrozenDict

from mllm_jax.checkpoints.fields import field_value
from mllm_jax.data.batch import ArraySpec, BatchSpec, target_spec, text_spec
from mllm_jax.errors import ConfigError
from mllm_jax.layers.compute import WithCompute, within
from mllm_jax.layers.head import HeadInputs
from mllm_jax.models.branch import KINDS, Branch
from mllm_jax.models.branch import Connection as Connection
from mllm_jax.models.encodes import Encodes
from mllm_jax.models.hidden import hide
from mllm_jax.models.media_tokens import MediaTokens, placed
from mllm_jax.models.output import KINDS as OUTPUT_KINDS
from mllm_jax.models.output import Output, slots_of
from mllm_jax.models.produces import Produces
from mllm_jax.models.sound_targets import Heard
from mllm_jax.sharding.logical import constrain


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
        outputs: an output branch for each modality that the model produces, such as {"image": Output(projector, ...)}.
    """

    inputs: Mapping[str, Branch]
    llm: Any
    newline: bool = False
    family: str | None = None
    outputs: Mapping[str, Output] = field(default_factory=FrozenDict, kw_only=True)

    reads = ("image",)  # the modalities of a named model

    def __post_init__(self):
        object.__setattr__(self, "inputs", FrozenDict(self.inputs))
        object.__setattr__(self, "outputs", FrozenDict(self.outputs))
        if self.family is not None and set(self.inputs) != set(self.reads):
            raise ConfigError(
                f"{self.family} with inputs {sorted(self.inputs)}",
                " and ".join(f"{modality}s" for modality in self.reads),
                "compose a MultimodalConfig instead",
            )
        for modality in self.inputs:
            self.branch(modality).check(self.llm.hidden_size)
        if self.fires and field_value(self.llm, "sliding_window") is not None:
            raise ConfigError(
                "an LLM with a sliding window after a projector that hides positions of a row",
                "an LLM whose tokens see all tokens before them: a window counts hidden positions too",
                "take another LLM, or a projector with a fixed number of media tokens",
            )
        for modality in self.outputs:
            self.output(modality).check(modality, self.llm.hidden_size)
        if self.outputs and self.encoder_decoder:
            raise ConfigError(
                f"outputs {sorted(self.outputs)} of a model with an encoder-decoder",
                "a decoder, whose hidden states at signal tokens are the conditions",
                "take another LLM, or leave out the outputs",
            )

    def output(self, modality: str) -> Output:
        """Returns the output branch of a modality, with open widths filled in.

        Raises:
            ConfigError: the model does not produce this modality.
        """
        if modality not in self.outputs:
            raise ConfigError(
                f"{modality}s from a model that produces {', '.join(('text', *self.outputs))}",
                f"an output branch outputs[{modality!r}]",
                "take a model that produces them",
            )
        return self.outputs[modality].joined(self.llm.hidden_size, self.llm.vocab_size)

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
        found |= {name: part for m in self.outputs for name, part in self.output(m).parts(m).items()}
        return {name: within(part, self.compute) for name, part in found.items()}

    @property
    def fires(self) -> bool:
        """True if the projector of a branch decides the number of its media tokens."""
        return any(self.branch(modality).fires for modality in self.inputs)

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
        produced = {slots_of(modality): modality for modality in self.outputs}
        if slots is None:
            slots = {m: b.encoder.merge_unit if b.packed else 1 for m, b in branches.items()} | dict.fromkeys(
                produced, 1
            )
        spec = text_spec(rows, length, width=self.neighbours, axes=self.position_axes)
        if self.encoder_decoder:
            spec |= target_spec(rows, length)
        for modality, count in slots.items():
            if count and modality in produced:
                spec |= self.output(produced[modality]).batch_spec(produced[modality], rows, count)
            elif count:
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

        inputs = {modality: own(modality, branch) for modality, branch in self.inputs.items()}
        return replace(self, inputs=inputs, outputs={modality: self.output(modality) for modality in self.outputs})

    def make(self) -> Multimodal:
        return Multimodal(self)


@struct.dataclass
class MultimodalOutput:
    """The output for a batch.

    Attributes:
        logits: float32[B, S, V], of the next token at each position; [B, M, V] if only M positions are requested.
        cache: the updated cache, if one was given.
    """

    logits: jax.Array
    cache: Any = None


@dataclass(frozen=True)
class _Read:
    """The part of a batch that the LLM reads.

    Attributes:
        text: tokens, positions and segments, see `mllm_jax.llms.protocol.LLM`.
        embeddings: dtype[B, S, E].
        deepstack: further arguments of the LLM.
        last: see `Visible`; None: no position is hidden.
    """

    text: tuple
    embeddings: jax.Array
    deepstack: dict[str, tuple[jax.Array, ...]]
    last: jax.Array | None


class Multimodal(Encodes, Produces, nn.Module):
    """A module that maps a batch of packed rows to logits."""

    config: MultimodalConfig

    def setup(self):
        c = self.config
        made = {name: part.make() for name, part in c.parts.items()}
        # A mapping of submodules becomes parts with the names of both, such as encoder_image.
        parts = {kind: {} for kind in (*KINDS, *OUTPUT_KINDS)}
        for name, module in made.items():
            kind = next((kind for kind in parts if name.startswith(f"{kind}_")), None)
            if kind is not None:
                parts[kind][name.removeprefix(f"{kind}_")] = module
        self.encoder, self.projector, self.output_projector, self.generator = parts.values()
        self.llm = made["llm"]
        if c.newline:
            init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("embed",))
            self.newline = self.param("newline", init, (c.llm.hidden_size,), jnp.float32)

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
        there = placed(media, media_index, media_weights, newline)
        return constrain(jnp.where(here[..., None], there.astype(text.dtype), text), "batch", "seq", None)

    def __call__(self, batch, cache=None, logits_at=None) -> MultimodalOutput:
        """Computes next-token logits of a batch of packed rows.

        Args:
            batch: tokens, segments int[B, S]; positions int[B, S], or int[B, S, 3] for M-RoPE; media_index and
                media_weights, see `merge`; the media, see `encode_media`. An encoder-decoder reads all of these in its
                encoder, and also needs decoder_tokens, decoder_positions and decoder_segments int[B, T].
            cache: KVCache, for generation.
            logits_at: int[B, M], the positions of the requested logits; None: all.
        """
        if cache is None:
            return MultimodalOutput(self._language(batch, logits_at))
        return MultimodalOutput(*self._language(batch, logits_at, cache=cache))

    def head_inputs(self, batch) -> HeadInputs:
        """Returns the inputs of the LLM's output head for a batch."""
        return self._language(batch, project=False)

    def hear(self, batch) -> tuple[HeadInputs, tuple[Heard, ...]]:
        """Returns the inputs of the output head, and the facts about sounds of projectors that fire."""
        media = self.encode_media(batch)
        return self._language(batch, media=media, project=False), () if media is None else media.heard

    def _language(self, batch, logits_at=None, media: MediaTokens | None = None, **more):
        """Applies the LLM to a batch, whose media may be encoded already."""
        read = self._read(batch, media)
        if "decoder_tokens" in batch:
            more |= {n: batch.get(n) for n in ("decoder_tokens", "decoder_positions", "decoder_segments")}
        if read.last is not None:  # what follows a hidden position is predicted from the last visible one
            logits_at = read.last if logits_at is None else jnp.take_along_axis(read.last, logits_at, axis=1)
        if logits_at is not None and not self.config.encoder_decoder:
            more["logits_at"] = logits_at
        return self.llm(*read.text, embeddings=read.embeddings, **more, **read.deepstack)

    def _read(self, batch, media: MediaTokens | None = None) -> _Read:
        """Encodes and merges the media of a batch, and hides positions without a media token."""
        media = self.encode_media(batch) if media is None else media
        index, weights = batch["media_index"], batch.get("media_weights")
        embeddings = self.merge(batch["tokens"], media and media.tokens, index, weights)
        text = batch.get("positions"), batch["segments"]
        first = index if index.ndim == 2 else index[..., 0]
        last, deepstack = None, {}
        if media is not None and media.mask is not None:
            fired = placed(media.mask[..., None], first, None)[..., 0]
            hidden = (first >= 0) & (first < media.mask.shape[1]) & ~fired
            seen = hide(hidden, *text)
            text, last = (seen.positions, seen.segments), seen.last
        if media is not None and media.deepstack:
            here = first[..., None] >= 0
            deepstack["deepstack"] = tuple(jnp.where(here, placed(x, index, weights), 0) for x in media.deepstack)
        return _Read((batch["tokens"], *text), embeddings, deepstack, last)

    def start(self, batch, size: int):
        """Encodes a batch with an encoder-decoder and returns the cache for generation; see `T5.start`."""
        read = self._read(batch)
        return self.llm.start(*read.text, embeddings=read.embeddings, size=size)

    def step(self, tokens, cache):
        """Reads one more token of each row, int[B, 1]; returns (float32[B, 1, V], cache)."""
        return self.llm(tokens, cache=cache)

    def touch(self, batch):
        """Runs every part once, so that `init` creates all parameters."""
        return self(batch), *self.produced(batch)
