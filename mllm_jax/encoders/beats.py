"""BEATs (arXiv 2212.09058), an audio encoder: patches of a log-mel spectrogram, as a transformer's sequence.

There is no class of it in transformers. Its folder here is `config.json` with the fields of the original's config, and
safetensors with the original's names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn

from mllm_jax.checkpoints.architectures import kind_of
from mllm_jax.checkpoints.config_json import Fields, check_written, read_fields, write_fields
from mllm_jax.checkpoints.config_options import ConfigOptions
from mllm_jax.checkpoints.fields import make_config
from mllm_jax.checkpoints.table import OUT_OF_HEADS, Family, Table, Weight, beside, into_heads, linear, norm
from mllm_jax.data.processing.audio import Waveform
from mllm_jax.encoders.audio_output import AudioOutput
from mllm_jax.encoders.beats_blocks import NORM_EPS, BEATsBlock
from mllm_jax.errors import ConfigError, DataError
from mllm_jax.layers.compute import WithCompute
from mllm_jax.layers.convolution import PositionalConvolution
from mllm_jax.layers.fbank import FRAME, RATE, SHIFT, fbank, num_frames
from mllm_jax.layers.linear import Linear
from mllm_jax.layers.mlp import ACTIVATIONS
from mllm_jax.layers.norms import LayerNorm
from mllm_jax.layers.relative_bias import RelativeBias, bucket_of_distance
from mllm_jax.layers.requirements import Requirements
from mllm_jax.layers.stack import layers_of
from mllm_jax.sharding.logical import constrain

Count = TypeVar("Count", int, np.ndarray)

MEL = 128  # mel bins
SCALE = 2.0**15  # Kaldi reads 16-bit samples
MEAN, STD = 15.41663, 6.55582  # of the filterbank on AudioSet
MOST_DISTANCE = 1 << 20  # the bucket of each distance is computed separately


@dataclass(frozen=True)
class BEATsDialect:
    """Details of the architecture; the defaults are the published models'.

    Attributes:
        patch_bias: whether the patch projection has a bias.
        norm_first: whether norms come before attention and MLP, and one after the last layer; otherwise they come
            after the sums, and one before the first layer.
        deep_norm: whether what a layer adds to is multiplied by (2 * num_layers)^(1/4).
        gated: whether the MLP is gated (SwiGLU, with activation "silu").
        conv_size, conv_groups: kernel and groups of the convolution that gives positions.
        num_buckets: of distances, for the relative position bias of all layers; None is no bias.
        max_distance: from which distances share the last bucket.
        gated_bias: whether each query scales its biases.
        family: the architecture of the saved folder.
    """

    patch_bias: bool = False
    norm_first: bool = False
    deep_norm: bool = True
    gated: bool = False
    conv_size: int = 128
    conv_groups: int = 16
    num_buckets: int | None = 320
    max_distance: int = 800
    gated_bias: bool = True
    family: str = "BEATs"


@dataclass(frozen=True)
class BEATsConfig(WithCompute):
    """Sizes of BEATs; other details are in its dialect.

    Attributes:
        patch_size: side of the square patches, in frames of 10 ms and in mel bins.
        embedding_size: width of the embedded patches, which a linear map brings to hidden_size if that is another.
        num_classes: outputs of a fine-tuned model's predictor; 0 is no predictor.
    """

    patch_size: int = 16
    embedding_size: int = 512
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_size: int = 3072
    activation: str = "gelu"
    num_classes: int = 0
    dialect: BEATsDialect = BEATsDialect()

    rate = RATE  # samples a second of the waveforms

    def __post_init__(self):
        dialect = self.dialect
        require = Requirements("BEATs", self)
        require.one_of("activation", ACTIVATIONS)
        require.heads()
        require(
            1 <= self.patch_size <= MEL,
            f"patch_size {self.patch_size}",
            f"1 to {MEL}: there are {MEL} mel bins",
            "change patch_size",
        )
        require(
            self.hidden_size % dialect.conv_groups == 0,
            f"hidden_size {self.hidden_size} in {dialect.conv_groups} groups of the convolution",
            "groups that divide it",
            "change hidden_size or dialect.conv_groups",
        )
        require(
            not (dialect.deep_norm and dialect.norm_first),
            "deep_norm with norms before attention and MLP (norm_first, layer_norm_first)",
            "one of the two",
            "set one of them to false",
        )
        require(
            dialect.num_buckets is not None or not dialect.gated_bias,
            "a gate of the relative position bias (gated_bias, gru_rel_pos) without a bias",
            "a relative position bias for it",
            "set num_buckets (relative_position_embedding), or leave out the gate",
        )
        if dialect.num_buckets is not None:
            bucket_of_distance(dialect.num_buckets // 2, dialect.max_distance)

    @property
    def family(self) -> str:
        """The architecture of the saved folder."""
        return self.dialect.family

    @property
    def feature_size(self) -> int:
        """The width of the output vectors."""
        return self.hidden_size

    def inputs(self, seconds: float) -> tuple[int]:
        """Returns the shape of a waveform of that length."""
        return (round(seconds * RATE),)

    def processor(self, seconds: float) -> Waveform:
        """Returns what collects waveforms with their masks."""
        return Waveform(RATE)

    def frames(self, samples: Count, row: int | None = None) -> Count:
        """Returns the number of output vectors for n samples, for an int or an integer array.

        Args:
            row: samples of the row that holds them, padding included; None: they are a row by themselves. The number
                of valid vectors depends on the row, because the model divides a row's mask into equal chunks.

        Raises:
            DataError: see `chunks`.
        """
        if row is None:
            return num_frames(samples) // self.patch_size * (MEL // self.patch_size)
        for size, parts in self.chunks(row):
            samples = -(-samples // size)
            samples -= (samples - parts) * (samples > parts)
        return samples

    def chunks(self, row: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Returns the (size, number) of the chunks of a row's mask: of samples, one a frame; of frames, one a vector.

        A chunk is valid if any of its entries is; those at the end of the row are in no chunk.

        Raises:
            DataError: a row for which the model cannot read a mask.
        """
        frames, vectors = num_frames(row), self.frames(row)
        if not 0 < vectors <= frames:
            raise DataError(
                f"BEATs: a mask for {vectors} patches of {frames} frames",
                "patches, and at most as many as frames: the model assigns whole frames to each patch",
                "leave out the mask, pass longer waveforms, or choose a model with larger patches",
            )
        return (row // frames, frames), (frames // vectors, vectors)

    def make(self) -> BEATs:
        return BEATs(self)


class BEATs(nn.Module):
    """BEATs from waveforms to vectors, eight for each 160 ms, or to the probabilities of classes."""

    config: BEATsConfig

    def __call__(self, features, mask=None, output_hidden_states: bool = False) -> AudioOutput:
        """Encodes waveforms.

        Args:
            features: float[B, samples] at 16 kHz, in [-1, 1].
            mask: [B, samples], 1 (or True) for valid samples and 0 for padding; None: all are valid. The original's
                padding mask is the inverse.

        Returns:
            AudioOutput with `config.frames(samples)` vectors a row, the mel bands of one time after the other. The last
            hidden state is what a fine-tuned model's predictor reads. With norm_first it is normalised, and the last of
            the hidden states is not.

        Raises:
            DataError: no waveforms, fewer samples than one row of patches, or a mask that does not fit.
        """
        return self.run(features, mask, output_hidden_states)[0]

    def classify(self, features, mask=None):
        """Returns the probability of each class in each waveform, independently: float32[B, num_classes].

        They are sigmoids of the mean of the predictor's outputs at valid vectors. Arguments are those of the call:
        `module.apply({"params": params}, features, mask, method="classify")`.

        Raises:
            ConfigError: the model has no predictor.
            DataError: see the call.
        """
        if not self.config.num_classes:
            raise ConfigError(
                "BEATs without a predictor (num_classes 0, finetuned_model false)",
                "a fine-tuned model with a predictor of classes",
                "load a fine-tuned checkpoint, or read `last_hidden_state`",
            )
        return self.run(features, mask)[1]

    @nn.compact
    def run(self, features, mask=None, output_hidden_states: bool = False):
        """Returns the output, and the probabilities of classes, None without a predictor; see the methods above."""
        c, dialect = self.config, self.config.dialect
        dtype = jnp.dtype(c.dtype)
        self._check(features, mask)
        spectrum = ((fbank(features.astype(jnp.float32) * SCALE, MEL) - MEAN) / (2 * STD)).astype(dtype)
        x = LayerNorm(NORM_EPS, dtype, axis="channels", name="patch_norm")(self._patches(spectrum))
        if c.embedding_size != c.hidden_size:
            names = ("channels", "embed")
            x = Linear((c.hidden_size,), names, use_bias=True, dtype=dtype, name="projection")(x)
        segments = None
        if mask is not None:
            mask = mask != 0
            for size, parts in c.chunks(mask.shape[1]):
                mask = rearrange(mask[:, : size * parts], "b (parts size) -> b parts size", size=size).any(axis=-1)
            x = jnp.where(mask[..., None], x, 0)
            # Padding sees valid vectors too, as in the original.
            segments = jnp.ones_like(mask, jnp.int32), mask.astype(jnp.int32)
        x = x + PositionalConvolution(dialect.conv_size, dialect.conv_groups, dtype=dtype, name="position")(x)
        final_norm = LayerNorm(NORM_EPS, dtype, name="norm")
        first = x = constrain(x if dialect.norm_first else final_norm(x), "batch", "patches", None)
        bias = self._bias(x.shape[1])
        x, states = layers_of(c, BEATsBlock, 2)(c, output_hidden_states, name="layers")(x, None, segments, bias)
        if output_hidden_states:
            states = (first, *states)
        x = final_norm(x) if dialect.norm_first else x
        return AudioOutput(x, mask, states), self._probabilities(x, mask)

    def _check(self, features, mask) -> None:
        c = self.config
        least = FRAME + (c.patch_size - 1) * SHIFT
        if features.ndim != 2 or features.shape[1] < least:
            raise DataError(
                f"BEATs: waveforms of shape {features.shape}",
                f"[B, samples] with at least {least} samples ({least / RATE:g} s at {RATE:,} Hz), one row of patches",
                "pass a batch, and pad short waveforms with zeros, with a mask",
            )
        if mask is not None and mask.shape != features.shape:
            raise DataError(
                f"BEATs: a mask of shape {mask.shape} for waveforms of shape {features.shape}",
                "one entry a sample, 1 for valid samples",
                "pass a mask over samples",
            )

    def _patches(self, spectrum):
        """Embeds dtype[B, frames, MEL] as dtype[B, T, embedding_size], the patches of a time from low to high mel."""
        size = self.config.patch_size
        whole = (each // size * size for each in spectrum.shape[1:])
        x = spectrum[:, : next(whole), : next(whole)]
        x = rearrange(x, "b (t p) (m q) -> b (t m) (p q)", p=size, q=size)
        return Linear(
            (self.config.embedding_size,),
            (None, "channels"),
            use_bias=self.config.dialect.patch_bias,
            dtype=x.dtype,
            name="patch_embedding",
        )(x)

    def _bias(self, length: int):
        """Returns the bias of all layers before their gates, float32[1, N, T, T], or None."""
        c, dialect = self.config, self.config.dialect
        if dialect.num_buckets is None:
            return None
        std = (2 / (dialect.num_buckets + c.num_heads)) ** 0.5
        buckets = dialect.num_buckets, dialect.max_distance
        positions = jnp.arange(length)[None]
        return RelativeBias(c.num_heads, *buckets, init_std=std, name="relative_bias")(positions, positions)

    def _probabilities(self, x, mask):
        c = self.config
        if not c.num_classes:
            return None
        names = ("embed", "vocab")
        predictor = Linear((c.num_classes,), names, use_bias=True, dtype=jnp.dtype(c.dtype), name="predictor")
        logits = predictor(x).astype(jnp.float32)
        share = jnp.ones(x.shape[:2]) if mask is None else mask.astype(jnp.float32)
        total = jnp.einsum("bt,btc->bc", share, logits)
        return jax.nn.sigmoid(total / jnp.maximum(share.sum(axis=1), 1.0)[:, None])


_FIELDS: Fields = {
    "patch_size": ("input_patch_size", "size"),
    "embedding_size": ("embed_dim", "size", 512),
    "patch_bias": ("conv_bias", "flag", False),
    "num_layers": ("encoder_layers", "size", 12),
    "hidden_size": ("encoder_embed_dim", "size", 768),
    "mlp_size": ("encoder_ffn_embed_dim", "size", 3072),
    "num_heads": ("encoder_attention_heads", "size", 12),
    "norm_first": ("layer_norm_first", "flag", False),
    "deep_norm": ("deep_norm", "flag", False),
    "conv_size": ("conv_pos", "size", 128),
    "conv_groups": ("conv_pos_groups", "size", 16),
    "max_distance": ("max_distance", "size", 1280, MOST_DISTANCE),
    "gated_bias": ("gru_rel_pos", "flag", False),
}
# The original's names of activations, the first of those of one function is written; "glu" is a gated MLP with SiLU.
_ACTIVATIONS = {"gelu": "gelu", "gelu_accurate": "gelu_tanh", "gelu_fast": "gelu_tanh", "relu": "relu", "tanh": "tanh"}
_GATED = "glu"
# Options of training.
_TRAINING = ("encoder_layerdrop", "dropout_input", "predictor_dropout", "layer_wise_gradient_decay_ratio")


def from_hf_config(values: dict) -> BEATsConfig:
    """Reads config.json with the fields of the original's `BEATsConfig` and its defaults.

    Raises:
        ConfigError: an unsupported option, by name.
    """
    options = ConfigOptions(values, "config.json of BEATs")
    read = read_fields(options, _FIELDS)
    activation = options.activation("activation_fn", _ACTIVATIONS | {_GATED: "silu"}, "gelu")
    buckets = options.size("num_buckets", 320, MOST_DISTANCE)
    classes = options.size("predictor_class", 527)
    options.skip(*_TRAINING)
    config = make_config(
        BEATsConfig,
        **read,
        activation=activation,
        gated=activation == "silu",
        num_buckets=buckets if options.flag("relative_position_embedding", False) else None,
        num_classes=classes if options.flag("finetuned_model", False) else 0,
    )
    options.done()
    return config


def to_hf_config(config: BEATsConfig) -> dict:
    """Returns config.json with the fields of the original's `BEATsConfig`.

    Raises:
        ConfigError: fields that those cannot express, by name.
    """
    c, dialect = config, config.dialect
    names = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}
    activation = _GATED if dialect.gated else names.get(c.activation, c.activation)
    written = dict(**kind_of(c.family), **write_fields(c, _FIELDS), activation_fn=activation)
    written |= dict(relative_position_embedding=dialect.num_buckets is not None, finetuned_model=bool(c.num_classes))
    if dialect.num_buckets is not None:
        written["num_buckets"] = dialect.num_buckets
    if c.num_classes:
        written["predictor_class"] = c.num_classes
    return check_written(c, written, from_hf_config, "BEATs")


def table(config: BEATsConfig) -> Table:
    """Returns the table of the weights under the original's names.

    The original stores the table of the relative position bias, which is one, under every layer; here it is read from
    the first layer and written there.
    """
    c, dialect = config, config.dialect
    layer, head, side = "encoder.layers.{layer}", c.hidden_size // c.num_heads, {"p": c.patch_size, "q": c.patch_size}
    own, ours = f"{layer}.self_attn", "layers/attention"
    shared = f"{own}.relative_attention_bias.weight"
    weights = linear("patch_embedding", "patch_embedding", "e 1 p q -> (p q) e", side, bias=dialect.patch_bias)
    weights += norm("layer_norm", "patch_norm")
    if c.embedding_size != c.hidden_size:
        weights += linear("post_extract_proj", "projection")
    weights.append(Weight("encoder.pos_conv.0.weight_g", "position/length", "1 1 k -> k"))
    weights.append(Weight("encoder.pos_conv.0.weight_v", "position/direction", "o i k -> k i o"))
    weights.append(Weight("encoder.pos_conv.0.bias", "position/bias"))
    weights += norm("encoder.layer_norm", "norm")
    if dialect.num_buckets is not None:
        weights.append(Weight(shared.format(layer=0), "relative_bias/embedding"))
    weights += into_heads([f"{own}.{part}_proj" for part in "qkv"], ours, head, (c.hidden_size,) * 3)
    weights += linear(f"{own}.out_proj", f"{ours}/out", OUT_OF_HEADS, {"h": head})
    if dialect.gated_bias:
        weights += linear(f"{own}.grep_linear", f"{ours}/gate")
        weights.append(Weight(f"{own}.grep_a", f"{ours}/gate_scale", "1 n 1 1 -> n"))
    weights += norm(f"{layer}.self_attn_layer_norm", "layers/attention_norm")
    wide = [(f"{layer}.fc1.linear", "up"), (f"{layer}.fc1.linear", "gate")]
    wide = wide if dialect.gated else [(f"{layer}.fc1", "up")]
    for end, leaf, pattern in ((".weight", "kernel", "o i -> i o"), (".bias", "bias", "")):
        weights += beside([(name + end, f"layers/mlp/{part}/{leaf}", c.mlp_size) for name, part in wide], pattern)
    weights += linear(f"{layer}.fc2", "layers/mlp/down")
    weights += norm(f"{layer}.final_layer_norm", "layers/mlp_norm")
    if c.num_classes:
        weights += linear("predictor", "predictor")
    # PyTorch's newer names of a normalised kernel.
    new = r"^(encoder\.pos_conv\.0)\.parametrizations\.weight\.original"
    spellings = ((f"{new}0$", r"\1.weight_g"), (f"{new}1$", r"\1.weight_v"))
    return Table(tuple(weights), spellings, (shared,) if dialect.num_buckets is not None else ())


def sample(config: BEATsConfig) -> tuple:
    """Returns arguments with which `init` creates every parameter."""
    return (jnp.zeros((1, FRAME + (config.patch_size - 1) * SHIFT)),)


FAMILIES = (
    Family(
        name="BEATs",
        architectures=("BEATs",),
        from_hf=from_hf_config,
        to_hf=to_hf_config,
        table=table,
        sample=sample,
        oracle="golden: the original's own code",
    ),
)
