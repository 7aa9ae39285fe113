"""AudioLDM-2 (arXiv 2308.05734): texts to sounds; the folders of diffusers' `AudioLDM2Pipeline`.

    CLAP's vector, Flan-T5's states -> projection -> GPT-2 writes 8 vectors -> UNet reads these and Flan-T5's states
    -> autoencoder of mel spectrograms -> vocoder

Its two conditions are those that the UNet reads. The names of the parts are those of the folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from mllm_jax.checkpoints.table import Family, Table, nested
from mllm_jax.encoders.clap_text import ClapTextConfig
from mllm_jax.errors import ConfigError
from mllm_jax.generators.audioldm2_projection import AudioLDM2ProjectionConfig
from mllm_jax.generators.unet_audio import AudioUNetConfig
from mllm_jax.generators.vae import AutoencoderKLConfig
from mllm_jax.generators.vocoder import VocoderConfig
from mllm_jax.layers.compute import WithCompute, within
from mllm_jax.layers.norms import as_unit_vectors
from mllm_jax.layers.requirements import Requirements
from mllm_jax.llms.decoder import Decoder, DecoderConfig
from mllm_jax.llms.t5_encoder import T5EncoderConfig
from mllm_jax.models.parts import part_table

FAMILY = "AudioLDM2Pipeline"
VECTORS = 8  # that the language model writes
PARTS = dict(
    text_encoder=ClapTextConfig,
    text_encoder_2=T5EncoderConfig,
    projection_model=AudioLDM2ProjectionConfig,
    language_model=DecoderConfig,
    unet=AudioUNetConfig,
    vae=AutoencoderKLConfig,
    vocoder=VocoderConfig,
)
# Vectors of the projected texts beside Flan-T5's: CLAP's, and those before and after each text.
AROUND = 5


@dataclass(frozen=True)
class AudioLDM2Config(WithCompute):
    """The parts of an AudioLDM-2, and its sampler.

    Attributes:
        text_encoder, text_encoder_2: CLAP's and Flan-T5's.
        projection_model: from their widths to that of `language_model`.
        language_model: GPT-2, with a head, which is not read, or without.
        unet: predicts noise, or what `scheduler.prediction_type` names, from noised latents and two texts.
        vae: of log-mel spectrograms.
        vocoder: from these to samples.
        scheduler: see `mllm_jax.generators.schedulers`.
    """

    text_encoder: ClapTextConfig
    text_encoder_2: T5EncoderConfig
    projection_model: AudioLDM2ProjectionConfig
    language_model: DecoderConfig
    unet: AudioUNetConfig
    vae: AutoencoderKLConfig
    vocoder: VocoderConfig
    scheduler: Any

    family = FAMILY  # the class of the saved folder
    modality = "audio"  # of what it draws
    carried = ("tokenizer", "tokenizer_2", "feature_extractor")  # subfolders that are copied

    def __post_init__(self):
        require, projection, unet = Requirements("AudioLDM-2", self), self.projection_model, self.unet
        widths = self.text_encoder.projection_size, self.text_encoder_2.hidden_size, self.language_model.hidden_size
        require(
            (projection.text_size, projection.text_1_size, projection.hidden_size) == widths,
            f"a projection of {projection.text_size} and {projection.text_1_size} to {projection.hidden_size}",
            f"{widths[0]} and {widths[1]} to {widths[2]}, as the text encoders and the language model have",
            "change projection_model",
        )
        require(
            all(read in (None, given) for read, given in zip(unet.text_widths, (widths[2], widths[1]), strict=True)),
            f"a UNet that reads texts of widths {list(unet.text_widths)}",
            f"{widths[2]}, the language model's, and {widths[1]}, Flan-T5's",
            "change unet (text_sizes, cross_attention_dim)",
        )
        require(
            not projection.learned_positions,
            "a projection with learned_positions (use_learned_position_embedding)",
            "one without: the model that speaks, whose second text is a transcript, is not supported",
            "take another folder; the projection model can be read by itself",
        )
        require(
            self.language_model.family.startswith("GPT2") and self.longest > 0,
            f"a language model {self.language_model.family} of {self.language_model.max_position_embeddings} positions",
            f"a GPT-2, and more positions than {AROUND + VECTORS}",
            "change language_model",
        )
        require(
            unet.condition_size is None and unet.dialect.class_embedding is None,
            f"a UNet with condition_size={unet.condition_size} (time_cond_proj_dim) and "
            f"class_embedding={unet.dialect.class_embedding!r}",
            "a UNet that reads latents, time and texts",
            "take another folder; the UNet can be read by itself",
        )
        require(
            unet.in_channels == unet.out_channels == self.vae.latent_channels and self.vae.out_channels == 1,
            f"a UNet from {unet.in_channels} to {unet.out_channels} channels, and an autoencoder from "
            f"{self.vae.latent_channels} to {self.vae.out_channels}",
            "equal numbers of channels of latents, and one of spectrograms",
            "change unet or vae",
        )
        require(
            self.vocoder.num_mel_bins % self.vae.factor == 0,
            f"a vocoder of {self.vocoder.num_mel_bins} mel bins",
            f"a multiple of {self.vae.factor}, which the autoencoder makes of one position",
            "change vocoder or vae",
        )

    @property
    def parts(self) -> dict[str, Any]:
        """Each part's config by the name of its parameters and of its folder."""
        return {name: within(getattr(self, name), self.compute) for name in PARTS}

    @property
    def factor(self) -> int:
        """Mel frames, and mel bins, for each position of the latents."""
        return self.vae.factor

    @property
    def longest(self) -> int:
        """The number of Flan-T5's tokens that the language model has positions for."""
        return self.language_model.max_position_embeddings - AROUND - VECTORS + 1

    @property
    def frame(self) -> float:
        """Seconds of a frame of the spectrogram."""
        samples = 1
        for rate in self.vocoder.rates:
            samples *= rate
        return samples / self.vocoder.rate

    @property
    def target_shape(self) -> tuple[int, int]:
        """The shape of the spectrogram of a sound, if nothing else is asked for."""
        rows, _ = self.unet.height_and_width or (256, 16)
        return rows * self.factor, self.vocoder.num_mel_bins

    @staticmethod
    def sampler(scheduler: Any) -> Any:
        """Returns a scheduler as it is."""
        return scheduler

    def make(self) -> AudioLDM2:
        return AudioLDM2(self)


@struct.dataclass
class SoundTexts:
    """Texts as both text encoders read them.

    Attributes:
        clap, clap_mask: int[B, K], CLAP's tokens, and 0 at padding.
        t5, t5_mask: int[B, L], Flan-T5's tokens, and 0 at padding.
        lengths: int[B], how many of Flan-T5's positions count for the language model, padding among them included.
            diffusers pads a negative text to the length of the text.
    """

    clap: Any
    clap_mask: Any
    t5: Any
    t5_mask: Any
    lengths: Any


class AudioLDM2(nn.Module):
    """The parts, and what the sampling loop calls of them.

    Attributes:
        companions: folder of the tokenizers, from which `save_pretrained` copies them if it is given no other.
    """

    config: AudioLDM2Config
    companions: str | None = None

    def setup(self):
        for name, part in self.config.parts.items():
            setattr(self, name, part.make())

    def __call__(self, texts: SoundTexts, latents, timesteps):
        """Returns the output of `denoise` for texts."""
        if self.is_initializing():
            spectrogram = self.vae.decode(latents)
            self.vae.encode(spectrogram), self.vocoder(spectrogram[..., 0])
            self.language_model(texts.t5)
        return self.denoise(latents, timesteps, self.condition(texts))

    def condition(self, texts: SoundTexts) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Encodes texts.

        Returns:
            The language model's vectors dtype[B, 8, E], Flan-T5's states dtype[B, L, F], and their mask [B, L].
        """
        clap = as_unit_vectors(self.text_encoder(texts.clap, texts.clap_mask).text_embeds)[:, None]
        t5 = self.text_encoder_2(texts.t5, texts.t5_mask).last_hidden_state
        mask = jnp.asarray(texts.t5_mask != 0, jnp.int32)
        states, segments = self.projection_model(clap, t5, jnp.ones(clap.shape[:2], jnp.int32), mask)
        counted = jnp.broadcast_to(jnp.arange(states.shape[1]), states.shape[:2])
        # The last vector follows those that count, and padding beyond them has no position.
        positions = jnp.minimum(counted, texts.lengths[:, None] + AROUND - 1)
        language_model, variables = self.language_model.unbind()
        vectors = roll_out(language_model, variables["params"], states, segments, positions)
        return vectors, t5, mask

    def denoise(self, latents, timesteps, text) -> jax.Array:
        """Predicts what the scheduler's `prediction_type` names from noised latents.

        Args:
            latents: float[B, t, m, C].
            timesteps: [B].
            text: see `condition`.

        Returns:
            dtype[B, t, m, C].
        """
        vectors, t5, mask = text
        return self.unet(latents, timesteps, vectors, t5, None, mask)

    def decode(self, latents) -> jax.Array:
        """Decodes latents to sounds, float32[B, samples] in [-1, 1]."""
        spectrogram = self.vae.decode(self.config.vae.unscaled(latents))
        return jnp.clip(self.vocoder(spectrogram[..., 0]).astype(jnp.float32), -1, 1)


def roll_out(module: Decoder, params: Any, states, mask, positions=None, count: int = VECTORS) -> jax.Array:
    """Continues vectors: the hidden state of the last position is the next input, without a token between them.

    Args:
        module, params: the language model.
        states: dtype[B, S, E]; the last one of each row is no padding.
        mask: int[B, S], 0 at padding, which may be anywhere else.
        positions: int[B, S]; None counts from 0, padding included. New vectors continue after the last.
        count: number of new vectors.

    Returns:
        dtype[B, count, E].
    """
    rows, length = states.shape[:2]
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(length), (rows, length))

    def read(states, cache, positions=None, segments=None, **which):
        out, cache = module.apply(
            {"params": params}, None, positions, segments, embeddings=states, cache=cache, project=False, **which
        )
        return out.x, cache

    def step(carry, _):
        last, cache = carry
        return read(last, cache), last[:, 0]

    cache, end = module.config.make_cache(rows, length + count), jnp.full((rows, 1), length - 1)
    begun = read(states, cache, positions, jnp.asarray(mask != 0, jnp.int32), logits_at=end)
    (last, _), before = jax.lax.scan(step, begun, None, length=count - 1)
    return jnp.concatenate([jnp.moveaxis(before, 0, 1), last], axis=1)


# ---- folders of diffusers


def from_parts(parts: Mapping[str, Any]) -> AudioLDM2Config:
    """Builds the config from those of the parts of a folder, by their names.

    Raises:
        ConfigError: a part is missing, is unknown, or is of another class.
    """
    kinds = PARTS | dict(scheduler=object)
    wrong = [f"no {name}" for name in kinds if name not in parts]
    wrong += [
        f"{name} of class {getattr(part, 'family', type(part).__name__)}"
        for name, part in parts.items()
        if not isinstance(part, kinds.get(name, ()))
    ]
    if wrong:
        raise ConfigError(
            f"a {FAMILY} with {', '.join(wrong)}",
            "ClapModel or ClapTextModelWithProjection as text_encoder, T5EncoderModel as text_encoder_2, "
            "AudioLDM2ProjectionModel as projection_model, GPT2Model or GPT2LMHeadModel as language_model, "
            "AudioLDM2UNet2DConditionModel as unet, AutoencoderKL as vae, SpeechT5HifiGan as vocoder, and a scheduler",
            "take another folder; parts can be read by themselves",
        )
    return AudioLDM2Config(**parts)


def table(config: AudioLDM2Config) -> Table:
    """Returns the weights of all parts; names and paths begin with the part's name."""
    return Table(sum((nested(part_table(part), f"{name}.", f"{name}/") for name, part in config.parts.items()), ()))


def sample(config: AudioLDM2Config) -> tuple:
    """Returns arguments with which `init` creates every parameter."""
    side, one = 2 ** len(config.unet.channels), jnp.ones((1, 1), jnp.int32)
    mel = config.vocoder.num_mel_bins // config.vae.factor
    latents = jnp.zeros((1, side, mel, config.unet.in_channels))
    return SoundTexts(one, one, one, one, jnp.ones((1,), jnp.int32)), latents, jnp.zeros((1,), jnp.int32)


FAMILIES = (
    Family(
        name="AudioLDM-2",
        architectures=(FAMILY,),
        from_hf=from_parts,
        to_hf=lambda config: config.parts | dict(scheduler=config.scheduler),
        table=table,
        sample=sample,
        oracle="diffusers.AudioLDM2Pipeline",
    ),
)
