"""The parts of a multimodal LLM as one module: encoder -> projector -> LLM (MM-LLMs survey, arXiv 2401.13601)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from flax import struct

from mllm_jax.data.batch import ROW, SLOTS, ArraySpec, BatchSpec, images_spec, instruction_spec, target_spec, text_spec
from mllm_jax.encoders.text import TextTowerConfig
from mllm_jax.encoders.vit import select_layers
from mllm_jax.errors import ConfigError
from mllm_jax.layers.context_gather import take_along_rows
from mllm_jax.layers.head import HeadInputs
from mllm_jax.layers.pixels import normalise_pixels
from mllm_jax.models.caption_row import caption_row
from mllm_jax.models.contrastive import ContrastiveConfig
from mllm_jax.projectors.pformer import PFormerConfig
from mllm_jax.sharding.logical import constrain, part_of_model, split_sizes

INSTRUCTION = 128  # the most tokens of one in training: max_txt_len in LAVIS' configs


@dataclass(frozen=True)
class Connection:
    """Which of the encoder's features the projector reads.

    Attributes:
        layers: hidden states, side by side when there are several: 0 is what entered the first layer, -1 what left the
            last. None: the encoder's last hidden state, behind its final norm.
        class_token: whether vectors that stand for the whole picture are read too.
    """

    layers: tuple[int, ...] | None = None
    class_token: bool = False


@dataclass(frozen=True)
class MultimodalConfig:
    """The parts' configs and what joins them. A named model is a subclass that adds what its config.json says.

    Attributes:
        encoder: of one size of pictures, or of packed patches, which come out merged and projected.
        projector: None for an encoder of packed patches.
        llm: a decoder or an encoder-decoder, which reads media in its encoder.
        newline: a learned vector that stands in the text where a row of patches ends (LLaVA-NeXT); it is the media
            token behind all others of a row.
        text_tower, contrastive: both or neither; they serve the contrastive stage only.
        prompter: a P-Former, which serves the stage that draws a picture's media tokens to its caption's prompts.
        family: None, or the Hugging Face architecture that it is written as.
    """

    encoder: Any
    projector: Any
    llm: Any
    connection: Connection = Connection()
    newline: bool = False
    text_tower: TextTowerConfig | None = None
    contrastive: ContrastiveConfig | None = None
    prompter: PFormerConfig | None = None
    family: str | None = None

    def __post_init__(self):
        if (self.text_tower is None) != (self.contrastive is None):
            raise ConfigError(
                "a text tower without contrastive heads, or the reverse", "both or neither", "add or drop"
            )
        if self.packed != (self.projector is None):
            raise ConfigError(
                f"encoder {type(self.encoder).__name__} with projector {type(self.projector).__name__}",
                "a projector for an encoder of whole pictures, and None for one of packed patches, which projects",
                "change the projector",
            )
        where, width = ("encoder", self.encoder) if self.packed else ("projector", self.projector)
        if width.output_size != self.llm.hidden_size:
            raise ConfigError(
                f"{where}.output_size {width.output_size}",
                f"the LLM's hidden_size {self.llm.hidden_size}",
                "make the two equal",
            )
        if not self.packed:
            self.media_tokens  # noqa: B018 - refuses a grid that the projector cannot divide
        if self.prompter is not None:
            self._check_prompts()

    def _check_prompts(self):
        """Each media token is compared with the prompt in its place."""
        made = (self.prompter.num_queries, self.prompter.output_size)
        media = ("any number" if self.packed else self.media_tokens, self.llm.hidden_size)
        if made != media:
            raise ConfigError(
                "a prompter of {} prompts of width {}".format(*made),
                "as many as a picture has media tokens, in the LLM's width: {} of {}".format(*media),
                "change num_queries or output_size of the prompter or the projector"
                if not self.packed
                else "leave the prompter out: pictures of any size have no fixed number of media tokens",
            )

    @property
    def packed(self) -> bool:
        """Whether the encoder reads patches of pictures of any size, packed in rows, instead of tiles of one size."""
        return getattr(self.encoder, "packed", False)

    @property
    def encoder_decoder(self) -> bool:
        """Whether the LLM reads text and media in an encoder of its own and answers from a decoder."""
        return self.llm.encoder_decoder

    @property
    def media_tokens(self) -> int:
        """Tokens that one picture, or tile of one, takes in the LLM's row."""
        kept = self.connection.class_token and self.encoder.class_token
        if kept and getattr(self.projector, "needs_grid", False):
            raise ConfigError(
                f"connection.class_token with projector {type(self.projector).__name__}, which reads squares",
                "patches alone",
                "leave out the class token, or change the projector",
            )
        return self.projector.num_tokens(self.encoder.grid) + int(kept and self.projector.pointwise)

    @property
    def vocab_sizes(self) -> dict[str, int]:
        """How many tokens each embedding holds, by its place in an experiment."""
        parts = {name: getattr(self, name) for name in ("llm", "text_tower", "prompter")}
        return {f"model.{name}.vocab_size": part.vocab_size for name, part in parts.items() if part is not None}

    @property
    def captions(self) -> int | None:
        """The most captions that contrastive training may give a picture; None: there are no heads for any."""
        return self.contrastive and self.contrastive.captions

    @property
    def dtype(self) -> str:
        """What most of the model computes in."""
        return self.llm.dtype

    def with_dtype(self, dtype: str) -> MultimodalConfig:
        """The same model with every part computing in `dtype`."""
        parts = {name: getattr(self, name) for name in ("encoder", "projector", "llm", "text_tower", "prompter")}
        return replace(self, **{name: replace(part, dtype=dtype) for name, part in parts.items() if part is not None})

    @property
    def image_size(self) -> int:
        """Side of the images that a batch holds."""
        return self.encoder.image_size

    @property
    def neighbours(self) -> int:
        """The most media tokens whose weighted sum stands at one position."""
        return 1

    def batch_spec(self, rows: int = 1, length: int = 8, slots: int | None = None) -> BatchSpec:
        """The arrays of a batch.

        Args:
            slots: of a row: tiles, or patches of an encoder that packs them; None: the fewest that hold an image.
        """
        slots = (self.encoder.merge_unit if self.packed else 1) if slots is None else slots
        spec = text_spec(rows, length, width=self.neighbours, axes=self.position_axes)
        if self.encoder_decoder:
            spec |= target_spec(rows, length)
        if not slots:
            return spec
        media = (rows, slots)
        if self.packed:
            spec |= dict(
                patches=ArraySpec((*media, self.encoder.patch_values), "float32", axes=(ROW, SLOTS)),
                patch_segments=ArraySpec(media, axes=(ROW, SLOTS)),
                patch_coordinates=ArraySpec((*media, 2), axes=(ROW, SLOTS)),
                patch_grids=ArraySpec((*media, 2), axes=(ROW, SLOTS)),
            )
        else:
            spec |= images_spec(rows, slots, self.encoder.image_size)
        if self.instruction_length:
            spec |= instruction_spec(rows, slots, self.instruction_length)
        return spec

    def target_spec(self, rows: int, length: int) -> BatchSpec:
        """The arrays of what an encoder-decoder's decoder writes."""
        return target_spec(rows, length) | dict(loss_weights=ArraySpec((rows, length), "float32"))

    @property
    def position_axes(self) -> int:
        """Numbers of a position: 3 for M-RoPE."""
        return 3 if getattr(self.llm, "mrope_sections", ()) else 1

    @property
    def instruction_length(self) -> int:
        """Tokens of an instruction that the projector reads in training; 0: it reads none."""
        return min(INSTRUCTION, self.projector.max_length) if getattr(self.projector, "reads_text", False) else 0

    def make(self) -> Multimodal:
        return Multimodal(self)


@struct.dataclass
class MediaTokens:
    """Encoded media of a batch of rows.

    Attributes:
        tokens: dtype[B, N, E], every slot's media tokens in the order of the slots.
        deepstack: of each of the LLM's first layers what is added behind it where these tokens stand (arXiv
            2406.04334); empty for most encoders.
    """

    tokens: jax.Array
    deepstack: tuple[jax.Array, ...] = ()


@struct.dataclass
class MultimodalOutput:
    """What a batch gives.

    Attributes:
        logits: float32[B, S, V], of what follows each place; [B, M, V] where only M places were asked for.
        cache: what was read, where a cache was given.
    """

    logits: jax.Array
    cache: Any = None


@struct.dataclass
class GuidedMedia:
    """Pictures and what a P-Former makes of their captions.

    Attributes:
        media, prompts: dtype[B, T, E], of each row's picture and of its caption.
        row: media and captions as the LLM reads them; see `caption_row`.
    """

    media: jax.Array
    prompts: jax.Array
    row: dict


class Multimodal(nn.Module):
    """One batch of packed rows to logits; also the two towers for contrastive training."""

    config: MultimodalConfig

    def setup(self):
        c = self.config
        self.encoder = c.encoder.make()
        self.llm = c.llm.make()
        if c.projector is not None:
            self.projector = c.projector.make()
        if c.newline:
            init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("embed",))
            self.newline = self.param("newline", init, (c.llm.hidden_size,), jnp.float32)
        if c.contrastive is not None:
            self.text_tower = c.text_tower.make()
            self.contrastive = c.contrastive.make()
        if c.prompter is not None:
            self.prompter = c.prompter.make()

    def encode_media(self, batch) -> MediaTokens | None:
        """The media of a batch as the LLM reads them; None where it has none.

        Args:
            batch: `images` uint8[B, M, H, W, 3], or float where they are normalised already, with `query_tokens` and
                `query_segments` int[B, M, L] for a projector that reads text; or `features` dtype[B, M, P, E] that
                `encode_images` gave before; or `patches` [B, N, D] with
                `patch_segments`, `patch_coordinates` and `patch_grids` as `QwenViT` takes them; or `media`
                dtype[B, N, E], encoded before; or none of these.
        """
        if "media" in batch:
            return MediaTokens(batch["media"])
        if "patches" in batch:
            where = (batch[f"patch_{name}"] for name in ("segments", "coordinates", "grids"))
            out = self.encoder(batch["patches"], *where)
            return MediaTokens(out.pooler_output, out.deepstack_features)
        if "images" not in batch and "features" not in batch:
            return None
        given = "features" if "features" in batch else "images"
        # One picture after the other, so ordered that each device's are those of its own rows and slots.
        sizes = dict(zip("rs", split_sizes(("batch", "slots"), batch[given].shape[:2]), strict=True))
        names = (given, "query_tokens", "query_segments")
        flat = [rearrange(batch[n], "(r b) (s m) ... -> (r s b m) ...", **sizes) for n in names if n in batch]
        features = flat[0] if given == "features" else self._features(flat[0])
        media = self.projector(features, *flat[1:])
        slots = batch[given].shape[1] // sizes["s"]
        return MediaTokens(rearrange(media, "(r s b m) t e -> (r b) (s m t) e", m=slots, **sizes))

    def encode_images(self, batch):
        """The features that the projector reads: dtype[B * M, P, E] of `images` [B, M, H, W, 3]."""
        return self._features(rearrange(batch["images"], "b m h w c -> (b m) h w c"))

    def _features(self, images):
        """[N, H, W, 3] -> dtype[N, P, E]"""
        c = self.config
        pixels = normalise_pixels(images, self.config.encoder) if images.dtype == jnp.uint8 else images
        with part_of_model("encoder"):
            pixels = constrain(pixels, "batch", None, None, None)  # before the tower's first layer, which is no block
        chosen, keep = c.connection.layers, c.connection.class_token
        if chosen is not None:
            return select_layers(self.encoder(pixels, output_hidden_states=True), chosen, keep)
        out = self.encoder(pixels)
        return out.last_hidden_state if keep else out.last_hidden_state[:, out.class_tokens :]

    def merge(self, tokens, media, media_index, media_weights=None):
        """Media tokens in the places of the text that ask for them: a gather inside each row.

        No shard of the batch is crossed. Where a mesh splits rows along the sequence, each device's media pass the
        others once; see `take_along_rows`.

        Args:
            tokens: int[B, S].
            media: dtype[B, N, E] or None; with a newline vector index N means that.
            media_index: int[B, S], -1 for text; or int[B, S, K] with `media_weights` float[B, S, K], where a place
                holds the weighted sum of K media tokens.

        Returns:
            dtype[B, S, E].
        """
        here = (media_index if media_index.ndim == 2 else media_index[..., 0]) >= 0
        text = self.llm.embed(jnp.where(here, 0, tokens))  # the id that stands for a picture may be beyond the table
        if media is None:
            return text
        newline = self.newline.astype(media.dtype) if self.config.newline else None
        placed = _placed(media, media_index, media_weights, newline)
        return constrain(jnp.where(here[..., None], placed.astype(text.dtype), text), "batch", "seq", None)

    def __call__(self, batch, cache=None, logits_at=None) -> MultimodalOutput:
        """Next-token logits of a batch of packed rows.

        Args:
            batch: tokens, segments int[B, S]; positions int[B, S], or int[B, S, 3] for M-RoPE; media_index and
                media_weights, see `merge`; the media, see `encode_media`. An encoder-decoder reads all this in its
                encoder and has decoder_tokens, decoder_positions and decoder_segments int[B, T] besides.
            cache: KVCache, for generation.
            logits_at: int[B, M], the places whose logits are wanted; None is all.
        """
        more = {} if logits_at is None or self.config.encoder_decoder else {"logits_at": logits_at}
        if cache is None:
            return MultimodalOutput(self._language(batch, **more))
        return MultimodalOutput(*self._language(batch, cache=cache, **more))

    def head_inputs(self, batch) -> HeadInputs:
        """What the LLM's output head makes the logits of a batch from."""
        return self._language(batch, project=False)

    def _language(self, batch, **more):
        """The LLM on a batch."""
        embeddings, deepstack = self._read(batch)
        places = batch["tokens"], batch.get("positions"), batch["segments"]
        if "decoder_tokens" in batch:
            more |= {n: batch.get(n) for n in ("decoder_tokens", "decoder_positions", "decoder_segments")}
        return self.llm(*places, embeddings=embeddings, **more, **deepstack)

    def _read(self, batch):
        """The LLM's input dtype[B, S, E], and what its first layers get besides."""
        media, index, weights = self.encode_media(batch), batch["media_index"], batch.get("media_weights")
        embeddings = self.merge(batch["tokens"], media and media.tokens, index, weights)
        if media is None or not media.deepstack:
            return embeddings, {}
        here = (index if index.ndim == 2 else index[..., 0])[..., None] >= 0
        return embeddings, {"deepstack": tuple(jnp.where(here, _placed(x, index, weights), 0) for x in media.deepstack)}

    def start(self, batch, size: int):
        """Lets an encoder-decoder read a batch and makes the cache to generate from; see `T5.start`."""
        embeddings, _ = self._read(batch)
        places = batch["tokens"], batch.get("positions"), batch["segments"]
        return self.llm.start(*places, embeddings=embeddings, size=size)

    def step(self, tokens, cache):
        """One more token of each row, int[B, 1]: (float32[B, 1, V], cache)."""
        return self.llm(tokens, cache=cache)

    def embed_pairs(self, batch):
        """The captions of each row and what they describe of its first picture, as unit vectors.

        A caption stands in the row as a segment of its own. `media_index` at its first token names the media token
        that it describes, -1 the whole picture.

        Returns:
            float32[B, C, P] of pictures or their places, float32[B, C, P] of captions, scale, bias; C is
            `contrastive.captions`.
        """
        vision = self.encoder(normalise_pixels(batch["images"][:, 0], self.config.encoder))
        count = self.config.contrastive.captions
        text = self.text_tower(batch["tokens"], batch["positions"], batch["segments"], count)
        first = (batch["segments"][:, None] == jnp.arange(1, count + 1)[None, :, None]).argmax(axis=-1)
        place = jnp.take_along_axis(batch["media_index"], first, axis=1)
        return self.contrastive(vision, place, text)

    def guide(self, batch) -> GuidedMedia:
        """A picture and its caption, which are tokens and segments int[B, L], in each row; see `PromptGuided`."""
        media, caption = self.encode_media(batch).tokens, (batch["tokens"], batch["segments"])
        return GuidedMedia(media, self.prompter(*caption), caption_row(self.config.llm, media, *caption))

    def touch(self, batch):
        """Runs every part once: what `init` traces so that all parameters exist."""
        out = self(batch)
        if self.config.contrastive is not None:
            self.embed_pairs(batch)
        if self.config.prompter is not None:
            self.prompter(*(batch[name][:, : self.config.prompter.max_length] for name in ("tokens", "segments")))
        return out


def _placed(media, index, weights, newline=None):
    """dtype[B, N, E] gathered to [B, S, E]; index N means the newline [E], if there is one. See `Multimodal.merge`."""

    def take(index):
        found = take_along_rows(media, jnp.clip(index, 0, media.shape[1] - 1))
        return found if newline is None else jnp.where((index == media.shape[1])[..., None], newline, found)

    if index.ndim == 2:
        return take(index)
    found = rearrange(take(rearrange(index, "b s k -> b (s k)")), "b (s k) e -> b s k e", k=index.shape[-1])
    return jnp.einsum("bske,bsk->bse", found, weights.astype(media.dtype))
