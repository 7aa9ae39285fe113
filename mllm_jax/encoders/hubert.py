"""HuBERT (arXiv 2106.07447): from samples of speech to a vector each 20 ms, alone or with a CTC head for their letters.

The base model has a group norm over time in its first convolution and norms after each layer; the large ones have layer
norms in all convolutions and norms before each layer (`do_stable_layer_norm`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from mllm_jax.checkpoints.architectures import architecture, kind_of
from mllm_jax.checkpoints.config_json import ELSEWHERE, Fields, check_written, read_fields, stored_fields, write_fields
from mllm_jax.checkpoints.config_options import ENCODER_ACTIVATIONS, ConfigOptions
from mllm_jax.checkpoints.fields import change_fields, make_config
from mllm_jax.checkpoints.table import OUT_OF_HEADS, Family, Table, Weight, into_heads, linear, nested, norm
from mllm_jax.data.processing.audio import Waveform
from mllm_jax.encoders.audio_output import AudioOutput
from mllm_jax.encoders.ctc import CTCOutput
from mllm_jax.errors import ConfigError
from mllm_jax.layers.attention import Attention
from mllm_jax.layers.compute import WithCompute, within
from mllm_jax.layers.convolution import PositionalConvolution, convolve
from mllm_jax.layers.linear import Linear
from mllm_jax.layers.mlp import ACTIVATIONS, MLP
from mllm_jax.layers.norms import LayerNorm
from mllm_jax.layers.requirements import Requirements
from mllm_jax.layers.stack import layers_of
from mllm_jax.sharding.logical import constrain

CONV_NORMS = ("group", "layer")
CONV_NORM_EPS = 1e-5  # the reference has no option for it


@dataclass(frozen=True)
class HubertDialect:
    """Details that distinguish HuBERT's checkpoints; the defaults are the base model's.

    Attributes:
        norm_first: whether norms come before attention and MLP, and one after the last layer; else they come after
            attention and MLP, and one before the first layer.
        conv_norm: "group", a norm over time of each channel after the first convolution only, so that padding changes
            the output; or "layer", a norm over channels after each.
        projection_norm: whether a LayerNorm precedes the projection of the convolutions' output.
        norm_eps: epsilon of all norms but the convolutions'.
        mask_embedding: whether the checkpoint has the vector that replaces masked input in pretraining. It is kept and
            changes no output.
    """

    norm_first: bool = False
    conv_norm: str = "group"
    conv_bias: bool = False
    conv_activation: str = "gelu"
    projection_norm: bool = True
    norm_eps: float = 1e-5
    mask_embedding: bool = True


@dataclass(frozen=True)
class HubertConfig(WithCompute):
    """Sizes of HuBERT, by default those of the base model.

    Attributes:
        conv_channels, conv_kernels, conv_strides: of the convolutions over samples.
        position_kernel, position_groups: of the convolution whose output is added as positions.
    """

    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_size: int = 3072
    activation: str = "gelu"
    conv_channels: tuple[int, ...] = (512,) * 7
    conv_kernels: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)
    conv_strides: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)
    position_kernel: int = 128
    position_groups: int = 16
    dialect: HubertDialect = HubertDialect()

    rate = 16_000  # samples a second
    family = "HubertModel"

    def __post_init__(self):
        require = Requirements("HuBERT", self)
        lengths = [len(each) for each in (self.conv_channels, self.conv_kernels, self.conv_strides)]
        require(
            len(set(lengths)) == 1 and lengths[0] > 0,
            f"{lengths[0]} conv_channels, {lengths[1]} conv_kernels, {lengths[2]} conv_strides",
            "one of each for every convolution",
            "change these three",
        )
        require.heads()
        require(
            self.hidden_size % self.position_groups == 0,
            f"hidden_size {self.hidden_size} in {self.position_groups} position_groups",
            "groups that divide it",
            "change position_groups or hidden_size",
        )
        require.one_of("activation", ACTIVATIONS)
        require.one_of("dialect.conv_activation", ACTIVATIONS)
        require.one_of("dialect.conv_norm", CONV_NORMS)

    @property
    def feature_size(self) -> int:
        """The width of the output vectors."""
        return self.hidden_size

    def inputs(self, seconds: float) -> tuple[int]:
        """Returns the shape of the samples of a sound of that length."""
        return (round(seconds * self.rate),)

    def processor(self, seconds: float) -> Waveform:
        """Returns what scales the samples of each sound to zero mean and unit variance."""
        return Waveform(self.rate, normalise=True)

    def frames(self, n: Any) -> Any:
        """Returns the number of output vectors for n samples, an integer or an array of integers."""
        for kernel, stride in zip(self.conv_kernels, self.conv_strides, strict=True):
            n = (n - kernel) // stride + 1
            n = n * (n > 0)
        return n

    @property
    def least_samples(self) -> int:
        """The number of samples for one output vector."""
        n = 1
        for kernel, stride in zip(self.conv_kernels[::-1], self.conv_strides[::-1], strict=True):
            n = (n - 1) * stride + kernel
        return n

    def make(self) -> Hubert:
        return Hubert(self)


@dataclass(frozen=True)
class HubertCTCConfig(WithCompute):
    """HuBERT with a linear head to the logits of letters.

    Attributes:
        blank: id of CTC's blank.
    """

    encoder: HubertConfig = HubertConfig()
    vocab_size: int = 32
    blank: int = 0

    family = "HubertForCTC"

    def make(self) -> HubertCTC:
        return HubertCTC(self)


class TimeNorm(nn.Module):
    """GroupNorm with one channel a group: each channel is normalised over all T, padding included."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        """Maps dtype[B, T, C] to dtype[B, T, C]."""
        x = x.astype(jnp.float32)
        x = x - x.mean(axis=1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(axis=1, keepdims=True) + CONV_NORM_EPS)
        scale = self.param("scale", nn.with_logical_partitioning(nn.initializers.ones, ("embed",)), x.shape[-1:])
        bias = self.param("bias", nn.with_logical_partitioning(nn.initializers.zeros, ("embed",)), x.shape[-1:])
        return (x * scale + bias).astype(self.dtype)


class WaveConvolutions(nn.Module):
    """The convolutions over samples, each with its norm and activation."""

    config: HubertConfig

    @nn.compact
    def __call__(self, samples):
        """Maps dtype[B, samples] to dtype[B, T, C]."""
        c, dialect = self.config, self.config.dialect
        dtype = jnp.dtype(c.dtype)
        x = samples[..., None]
        for i, (channels, kernel, stride) in enumerate(
            zip(c.conv_channels, c.conv_kernels, c.conv_strides, strict=True)
        ):
            init = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
            init = nn.with_logical_partitioning(init, (None, "channels", "embed"))
            weight = self.param(f"kernel_{i}", init, (kernel, x.shape[-1], channels), jnp.float32)
            # Whole rows: XLA computes a strided convolution wrongly whose input it splits unevenly over time.
            x = convolve(constrain(x, "batch", None, None), weight.astype(dtype), stride)
            if dialect.conv_bias:
                init = nn.with_logical_partitioning(nn.initializers.zeros, ("embed",))
                x = x + self.param(f"bias_{i}", init, (channels,), jnp.float32).astype(dtype)
            if dialect.conv_norm == "layer":
                x = LayerNorm(CONV_NORM_EPS, dtype, name=f"norm_{i}")(x)
            elif i == 0:
                x = TimeNorm(dtype, name="norm_0")(x)
            x = ACTIVATIONS[dialect.conv_activation](x)
        return x


class HubertBlock(nn.Module):
    """Transformer layer in which valid vectors see each other; `capture` also returns its output to the scan."""

    config: HubertConfig
    capture: bool = False

    @nn.compact
    def __call__(self, x, _, segments):
        c, dialect = self.config, self.config.dialect
        dtype = jnp.dtype(c.dtype)
        attention = Attention(c.num_heads, dtype=dtype, name="attention")
        mlp = MLP(c.mlp_size, c.activation, dtype=dtype, name="mlp")
        for part, branch in (("attention", lambda h: attention(h, segments=segments)[0]), ("mlp", mlp)):
            norm = LayerNorm(dialect.norm_eps, dtype, name=f"{part}_norm")
            x = x + branch(norm(x)) if dialect.norm_first else norm(x + branch(x))
        x = constrain(x, "batch", "seq", None)
        return x, x if self.capture else None


class Hubert(nn.Module):
    """HuBERT's encoder (reference: `HubertModel`)."""

    config: HubertConfig

    @nn.compact
    def __call__(self, features, mask=None, output_hidden_states: bool = False) -> AudioOutput:
        """Encodes speech.

        With a mask, a model of the large style returns the same for a padded row as for the row alone. One with a group
        norm over time (`dialect.conv_norm`) does not, like the reference; it was trained on rows without a mask,
        padded with zeros.

        Args:
            features: `input_values` of Wav2Vec2FeatureExtractor, float[B, samples], 16,000 samples a second.
            mask: int or bool[B, samples], 1 for samples and then 0 for padding; None: all are samples.

        Returns:
            AudioOutput: T' = config.frames(samples). Vectors of padding are unspecified. hidden_states are without the
            final norm of the large style, which last_hidden_state has.

        Raises:
            ConfigError: features of another shape or with too few samples for one vector, or a mask of another shape.
        """
        c, dialect = self.config, self.config.dialect
        dtype = jnp.dtype(c.dtype)
        if features.ndim != 2 or features.shape[1] < c.least_samples:
            raise ConfigError(
                f"HuBERT: features of shape {list(features.shape)}",
                f"[B, samples] with at least {c.least_samples} samples",
                "pad the audio with zeros, and mask them",
            )
        if mask is not None and mask.shape != features.shape:
            raise ConfigError(
                f"HuBERT: a mask of shape {list(mask.shape)}",
                f"that of the features, {list(features.shape)}",
                "pass the attention_mask of the same call of the feature extractor",
            )
        x = WaveConvolutions(c, name="convolutions")(features.astype(dtype))
        if dialect.projection_norm:
            x = LayerNorm(dialect.norm_eps, dtype, name="projection_norm")(x)
        x = Linear((c.hidden_size,), ("channels", "embed"), use_bias=True, dtype=dtype, name="projection")(x)
        if dialect.mask_embedding:
            init = nn.with_logical_partitioning(nn.initializers.uniform(1.0), ("embed",))
            self.param("mask_embedding", init, (c.hidden_size,), jnp.float32)
        valid = segments = None
        if mask is not None:
            lengths = c.frames(mask.astype(jnp.int32).sum(axis=-1))
            valid = jnp.arange(x.shape[1]) < lengths[:, None]
            x, segments = jnp.where(valid[..., None], x, 0), valid.astype(jnp.int32)
        positions = PositionalConvolution(
            c.position_kernel, c.position_groups, dialect.conv_activation, dtype, name="positions"
        )
        x = x + positions(x)
        norm = LayerNorm(dialect.norm_eps, dtype, name="norm")
        first = x = x if dialect.norm_first else norm(x)
        x, states = layers_of(c, HubertBlock, 1)(c, output_hidden_states, name="layers")(x, None, segments)
        last = norm(x) if dialect.norm_first else x
        return AudioOutput(last, valid, (first, *states) if output_hidden_states else None)


class HubertCTC(nn.Module):
    """HuBERT with a CTC head (reference: `HubertForCTC`); `ctc_greedy` decodes its logits."""

    config: HubertCTCConfig

    @nn.compact
    def __call__(self, features, mask=None, output_hidden_states: bool = False) -> CTCOutput:
        """Computes float32 logits of each vector; takes and raises the same as `Hubert`."""
        c = self.config
        encoded = Hubert(within(c.encoder, c.compute), name="encoder")(features, mask, output_hidden_states)
        head = Linear((c.vocab_size,), ("embed", "vocab"), use_bias=True, dtype=jnp.dtype(c.dtype), name="head")
        return CTCOutput(head(encoded.last_hidden_state).astype(jnp.float32), encoded)


# ---- Hugging Face folders

_FIELDS: Fields = {
    "hidden_size": ("hidden_size", "size", 768),
    "num_layers": ("num_hidden_layers", "size", 12),
    "num_heads": ("num_attention_heads", "size", 12),
    "mlp_size": ("intermediate_size", "size", 3072),
    "activation": ("hidden_act", "activation", ENCODER_ACTIVATIONS, "gelu"),
    "conv_channels": ("conv_dim", "sizes", (512,) * 7),
    "conv_kernels": ("conv_kernel", "sizes", (10, 3, 3, 3, 3, 2, 2)),
    "conv_strides": ("conv_stride", "sizes", (5, 2, 2, 2, 2, 2, 2)),
    "position_kernel": ("num_conv_pos_embeddings", "size", 128),
    "position_groups": ("num_conv_pos_embedding_groups", "size", 16),
    "norm_first": ("do_stable_layer_norm", "flag", False),
    "conv_norm": ("feat_extract_norm", "only", *CONV_NORMS),
    "conv_bias": ("conv_bias", "flag", False),
    "conv_activation": ("feat_extract_activation", "activation", ENCODER_ACTIVATIONS, "gelu"),
    "projection_norm": ("feat_proj_layer_norm", "flag", True),
    "norm_eps": ("layer_norm_eps", "number", 1e-5, 0.0),
}
# Options of training, of other heads, and of wav2vec 2.0's quantizer, which early folders list.
# fmt: off
_IDLE = (
    "apply_spec_augment", "mask_time_length", "mask_time_min_masks", "mask_feature_length", "mask_feature_min_masks",
    "mask_time_min_space", "mask_time_other", "mask_time_selection", "mask_channel_length", "mask_channel_min_space",
    "mask_channel_other", "mask_channel_prob", "mask_channel_selection", "feat_extract_dropout", "feat_proj_dropout",
    "final_dropout", "ctc_loss_reduction", "ctc_zero_infinity", "use_weighted_layer_sum", "classifier_proj_size",
    "contrastive_logits_temperature", "diversity_loss_weight", "feat_quantizer_dropout", "num_codevector_groups",
    "num_codevectors_per_group", "num_negatives", "codevector_dim", "proj_codevector_dim",
)
# fmt: on
_MASKING = {"mask_time_prob": 0.05, "mask_feature_prob": 0.0}


def from_hf_config(values: dict) -> HubertConfig | HubertCTCConfig:
    """Reads config.json of HubertModel or HubertForCTC.

    Raises:
        ConfigError: another architecture, or an unsupported option.
    """
    family = architecture(values, HubertCTCConfig.family, HubertConfig.family)  # the last if only model_type says it
    options = ConfigOptions(values, f"config.json of {family}")
    read = read_fields(options, _FIELDS)
    masking = [options.number(name, default, 0.0, 1.0) for name, default in _MASKING.items()]
    config = make_config(HubertConfig, **read, mask_embedding=any(masking))
    options.only("num_feat_extract_layers", len(config.conv_channels))
    options.only("conv_pos_batch_norm", False)
    options.only("add_adapter", False)
    options.only("adapter_attn_dim", None)
    vocab_size, blank = options.size("vocab_size", 32), options.id("pad_token_id", 0)
    if family == HubertCTCConfig.family:
        config = HubertCTCConfig(encoder=config, vocab_size=vocab_size, blank=blank)
    options.skip(*ELSEWHERE, *_IDLE)
    options.done()
    return config


def to_hf_config(config: HubertConfig | HubertCTCConfig) -> dict:
    """Returns config.json, the inverse of `from_hf_config`, without options of training.

    Raises:
        ConfigError: some fields cannot be expressed in its options; names them.
    """
    encoder = _encoder(config)
    written = kind_of(config.family) | write_fields(encoder, _FIELDS) | _MASKING
    written["num_feat_extract_layers"] = len(encoder.conv_channels)
    if not encoder.dialect.mask_embedding:
        written["mask_time_prob"] = 0.0
    if isinstance(config, HubertCTCConfig):
        written |= dict(vocab_size=config.vocab_size, pad_token_id=config.blank)
    return check_written(config, written, from_hf_config, "a HuBERT", _facts)


def _facts(config: HubertConfig | HubertCTCConfig) -> dict:
    return stored_fields(config, "encoder") | stored_fields(_encoder(config))


def _encoder(config: HubertConfig | HubertCTCConfig) -> HubertConfig:
    return config.encoder if isinstance(config, HubertCTCConfig) else config


def _settle(config: Any, stored: Any) -> Any:
    """Returns the config with the mask embedding if it is stored; transformers does not write one without masking."""
    kept = any(name.endswith("masked_spec_embed") for name in stored)
    encoder = change_fields(_encoder(config), mask_embedding=kept)
    return replace(config, encoder=encoder) if isinstance(config, HubertCTCConfig) else encoder


# transformers 4 wrote the weight norm with its old names.
_OLD_NORM = tuple(
    (rf"\.conv\.weight_{old}$", f".conv.parametrizations.weight.{new}")
    for old, new in (("g", "original0"), ("v", "original1"))
)


def table(config: HubertConfig | HubertCTCConfig) -> Table:
    """Returns the weights' table."""
    if isinstance(config, HubertCTCConfig):
        inner = nested(table(config.encoder), "hubert.", "encoder/")
        return Table((*inner, *linear("lm_head", "head")), _OLD_NORM)
    c, dialect = config, config.dialect
    weights, head = [], {"h": c.hidden_size // c.num_heads}
    for i in range(len(c.conv_channels)):
        hub = f"feature_extractor.conv_layers.{i}"
        weights.append(Weight(f"{hub}.conv.weight", f"convolutions/kernel_{i}", "o i k -> k i o"))
        if dialect.conv_bias:
            weights.append(Weight(f"{hub}.conv.bias", f"convolutions/bias_{i}"))
        if dialect.conv_norm == "layer" or i == 0:
            weights += norm(f"{hub}.layer_norm", f"convolutions/norm_{i}")
    if dialect.projection_norm:
        weights += norm("feature_projection.layer_norm", "projection_norm")
    weights += linear("feature_projection.projection", "projection")
    if dialect.mask_embedding:
        weights.append(Weight("masked_spec_embed", "mask_embedding"))
    hub = "encoder.pos_conv_embed.conv"
    weights.append(Weight(f"{hub}.parametrizations.weight.original0", "positions/length", "1 1 k -> k"))
    weights.append(Weight(f"{hub}.parametrizations.weight.original1", "positions/direction", "o i k -> k i o"))
    weights.append(Weight(f"{hub}.bias", "positions/bias"))
    weights += norm("encoder.layer_norm", "norm")
    hub, maps = "encoder.layers.{layer}", [f"encoder.layers.{{layer}}.attention.{x}_proj" for x in "qkv"]
    weights += into_heads(maps, "layers/attention", head["h"], (c.hidden_size,) * 3)
    weights += linear(f"{hub}.attention.out_proj", "layers/attention/out", OUT_OF_HEADS, head)
    weights += norm(f"{hub}.layer_norm", "layers/attention_norm")
    weights += linear(f"{hub}.feed_forward.intermediate_dense", "layers/mlp/up")
    weights += linear(f"{hub}.feed_forward.output_dense", "layers/mlp/down")
    weights += norm(f"{hub}.final_layer_norm", "layers/mlp_norm")
    return Table(tuple(weights), ((r"^hubert\.", ""), *_OLD_NORM))


def wave_sample(config: HubertConfig | HubertCTCConfig) -> tuple:
    """Returns one row of samples, enough for one vector."""
    return (jnp.zeros((1, _encoder(config).least_samples)),)


_SHARED = dict(from_hf=from_hf_config, to_hf=to_hf_config, table=table, sample=wave_sample, settle=_settle)
FAMILIES = (
    Family(name="HuBERT", architectures=(HubertConfig.family,), **_SHARED),
    Family(name="HuBERT with a CTC head", architectures=(HubertCTCConfig.family,), **_SHARED),
)
