"""The C-Former of X-LLM (arXiv 2305.04160): vectors of a speech encoder become one media token for each word or so.

Continuous integrate-and-fire (CIF, arXiv 1905.11235) gives each input vector a weight between 0 and 1 and sums the
weighted vectors. Whenever the weights reach 1, the sum is fired as one vector. A BERT reads the fired vectors, and a
linear map makes them as wide as the LLM. The number of tokens is the number of fires, so it depends on the speech.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct

from mllm_jax.encoders.audio_output import AudioOutput
from mllm_jax.errors import ConfigError, DataError
from mllm_jax.layers.attention import Attention
from mllm_jax.layers.compute import WithCompute
from mllm_jax.layers.linear import Embedding, Linear
from mllm_jax.layers.mlp import ACTIVATIONS, MLP
from mllm_jax.layers.norms import LayerNorm
from mllm_jax.layers.requirements import Requirements
from mllm_jax.layers.stack import layers_of
from mllm_jax.sharding.logical import constrain

WEIGHTS = ("conv", "dense", "linear")
INIT_STD = 0.02  # BERT's, of its linear maps and tables


# ---- integrate and fire


@struct.dataclass
class CIFOutput:
    """The output of `cif`.

    Attributes:
        vectors: dtype[B, N, E], the fired vectors in order, and then zeros.
        mask: bool[B, N], True for fired vectors.
        fires: int32[B], the number of fires; with max_fires it may be larger than N.
        quantity: float32[B], the sum of the weights before scaling, for `quantity_loss`.
    """

    vectors: jax.Array
    mask: jax.Array
    fires: jax.Array
    quantity: jax.Array


def cif(
    features: jax.Array,
    alphas: jax.Array,
    mask: jax.Array | None,
    target_lengths: jax.Array | None = None,
    threshold: float = 1.0,
    *,
    tail_threshold: float | None = 0.5,
    max_fires: int | None = None,
) -> CIFOutput:
    """Integrates weighted vectors and fires a vector whenever the sum of the weights reaches the threshold.

    A vector fires at most once, also with a weight above 1. So T vectors fire at most T times, and N = T.

    Two properties are those of the reference. A fired vector takes the weight that completes 1, for any threshold. The
    tail fires at the first padded vector, so a sample without padding has none; append a vector with mask 0 to give it
    one.

    Args:
        features: dtype[B, T, E].
        alphas: float[B, T], the weights.
        mask: [B, T], 1 for valid vectors, which come before the others; None: all are valid.
        target_lengths: for training: [B], the sums to which the weights are scaled; the tail does not fire. The scaled
            weights sum to a whole number, so rounding decides whether the last vector fires. None: evaluation.
        threshold: the sum at which a vector fires.
        tail_threshold: the sum above which the vectors after the last fire are fired too, divided by their sum. None:
            the tail never fires.
        max_fires: static bound of N, if it is smaller than T: later fires are left out, and only counted.

    Returns:
        CIFOutput; the sums are computed in float32.

    Raises:
        ConfigError: shapes that do not fit.
    """
    shape = features.shape[:2]
    if features.ndim != 3 or alphas.shape != shape or (mask is not None and mask.shape != shape):
        masked = "" if mask is None else f" and a mask {mask.shape}"
        raise ConfigError(
            f"cif: features {features.shape} with alphas {alphas.shape}{masked}",
            "[B, T, E], [B, T] and [B, T]",
            "give each vector one weight and one value of the mask",
        )
    alphas = alphas.astype(jnp.float32)
    end = jnp.full(shape[0], shape[1])
    if mask is not None:
        alphas = jnp.where(mask != 0, alphas, 0.0)
        end = jnp.where(mask != 0, jnp.arange(1, shape[1] + 1), 0).max(axis=1)
    quantity = alphas.sum(axis=1)
    if target_lengths is not None:
        total = jnp.where(quantity > 0, quantity, 1.0)
        alphas = alphas * (target_lengths / total)[:, None]
        tail_threshold = None

    def step(carry, now):
        weight, state = carry
        x, alpha, i = now
        x, fires, rest = x.astype(jnp.float32), weight + alpha >= threshold, 1.0 - weight
        fired = state + rest[:, None] * x
        weight = jnp.where(fires, alpha - rest, alpha + weight)
        state = jnp.where(fires[:, None], weight[:, None] * x, state + alpha[:, None] * x)
        if tail_threshold is not None:
            at_end, kept = i == end, weight > tail_threshold
            tail = state / (jnp.where(kept, weight, 1.0) + 1e-10)[:, None]
            fired, fires = jnp.where(at_end[:, None], tail, fired), jnp.where(at_end, kept, fires)
        return (weight, state), (fired, fires & (i <= end))

    start = jnp.zeros(shape[0]), jnp.zeros((shape[0], features.shape[2]))
    by_time = jnp.moveaxis(features, 1, 0), alphas.T, jnp.arange(shape[1])
    fired, fires = (jnp.moveaxis(each, 0, 1) for each in jax.lax.scan(step, start, by_time)[1])
    size = shape[1] if max_fires is None else min(max_fires, shape[1])
    order = jnp.argsort(~fires, axis=1, stable=True)[:, :size]
    count = fires.sum(axis=1, dtype=jnp.int32)
    kept = jnp.arange(size) < count[:, None]
    vectors = jnp.where(kept[..., None], jnp.take_along_axis(fired, order[..., None], axis=1), 0.0)
    return CIFOutput(vectors.astype(features.dtype), kept, count, quantity)


def quantity_loss(quantity: jax.Array, target_lengths: jax.Array) -> jax.Array:
    """Returns the mean distance of float[B] sums of unscaled weights to the target lengths [B]."""
    return jnp.abs(quantity - target_lengths).mean()


# ---- the module


@dataclass(frozen=True)
class CFormerConfig(WithCompute):
    """Sizes of a C-Former; the defaults are those of X-LLM, whose transformer is BERT-base.

    Attributes:
        output_size: width of a media token; None takes the LLM's hidden size.
        input_size: width of the speech encoder's vectors.
        cif_size: width of the fired vectors; a linear map without bias follows if it differs from input_size.
        weights: the layer before the linear map to one weight: "conv" (a convolution over time), "dense" (a linear map
            and ReLU) or "linear" (none).
        conv_width: number of vectors that the convolution reads.
        threshold, tail_threshold, max_fires: see `cif`. `max_fires` is also bounded by max_length.
        scale: whether training scales the weights to the target lengths.
        fire_tail: whether the tail fires in evaluation.
        hidden_size, num_layers, num_heads, mlp_size, activation, norm_eps: of the transformer.
        max_length: number of positions of the transformer.
        num_types: number of rows of BERT's table of token types; all tokens have the first.
    """

    output_size: int | None = None
    input_size: int = 512
    cif_size: int = 512
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_size: int = 3072
    activation: str = "gelu"
    norm_eps: float = 1e-12
    max_length: int = 512
    num_types: int = 2
    weights: str = "conv"
    conv_width: int = 3
    threshold: float = 1.0
    tail_threshold: float = 0.5
    max_fires: int | None = None
    scale: bool = True
    fire_tail: bool = True
    family: str = "CFormer"

    def __post_init__(self):
        require = Requirements("C-Former", self)
        require.one_of("activation", ACTIVATIONS)
        require.one_of("weights", WEIGHTS)
        require.heads()
        require(self.conv_width % 2 == 1, f"conv_width {self.conv_width}", "an odd number", "change conv_width")
        require(self.threshold > 0, f"threshold {self.threshold}", "a number above 0", "change threshold")
        require(
            self.max_fires is None or 0 < self.max_fires <= self.max_length,
            f"max_fires {self.max_fires} with {self.max_length} positions",
            "1 to max_length",
            "change max_fires or max_length",
        )

    @property
    def feature_size(self) -> int | None:
        """The width of the output vectors."""
        return self.output_size

    def frames(self, n: int | np.ndarray) -> int | np.ndarray:
        """Returns the most output vectors for n input vectors: the static size of the output."""
        most = n if self.max_fires is None else np.minimum(n, self.max_fires)
        return int(most) if isinstance(n, int) else most

    def make(self) -> CFormer:
        Requirements("C-Former", self).given("output_size")
        return CFormer(self)


@struct.dataclass
class CFormerOutput(AudioOutput):
    """The output of a C-Former: that of an audio encoder, with a mask, and the output of `cif`.

    Attributes:
        cif: None if the transformer was called alone.
    """

    cif: CIFOutput | None = None


class CIF(nn.Module):
    """The weights of input vectors, integrate-and-fire, and the map of the fired vectors (`CifMiddleware`)."""

    config: CFormerConfig

    def setup(self):
        c = self.config
        wide = dict(use_bias=True, dtype=jnp.dtype(c.dtype))
        if c.weights == "conv":
            self.conv = Linear((c.input_size,), (None, "embed", "channels"), in_ndim=2, **wide)
        elif c.weights == "dense":
            self.dense = Linear((c.input_size,), ("embed", "channels"), **wide)
        self.weight = Linear((1,), ("channels", None), **wide)
        if c.cif_size != c.input_size:
            self.output = Linear((c.cif_size,), ("embed", "channels"), dtype=jnp.dtype(c.dtype))

    def __call__(self, features, mask=None, target_lengths=None) -> CIFOutput:
        """Fires vectors of width cif_size; see `cif`."""
        c, training = self.config, target_lengths is not None
        fired = cif(
            features.astype(c.dtype),
            self.weigh(features),
            mask,
            target_lengths if c.scale else None,
            c.threshold,
            tail_threshold=c.tail_threshold if c.fire_tail and not training else None,
            max_fires=c.max_fires,
        )
        return fired if c.cif_size == c.input_size else fired.replace(vectors=self.output(fired.vectors))

    def weigh(self, features):
        """Returns the weights float32[B, T] of vectors dtype[B, T, input_size], padded vectors included.

        The convolution reads padded vectors beside valid ones, as in the reference.
        """
        c, x = self.config, features
        if c.weights == "conv":
            half = c.conv_width // 2
            padded = jnp.pad(x, ((0, 0), (half, half), (0, 0)))
            x = self.conv(jnp.stack([padded[:, i : i + x.shape[1]] for i in range(c.conv_width)], axis=2))
        elif c.weights == "dense":
            x = jax.nn.relu(self.dense(x))
        return jax.nn.sigmoid(self.weight(x)[..., 0].astype(jnp.float32))


class SpeechLayer(nn.Module):
    """A layer of BERT: attention and MLP, each with a residual connection and then a norm."""

    config: CFormerConfig
    capture: bool = False

    @nn.compact
    def __call__(self, x, _, keys):
        """Applies the layer to dtype[B, N, E]; keys are int[B, N], 0 at hidden vectors, or None."""
        c = self.config
        common = dict(out_init_std=INIT_STD, dtype=jnp.dtype(c.dtype))
        segments = None if keys is None else jnp.ones_like(keys)
        y, _ = Attention(c.num_heads, **common, name="attention")(x, segments=segments, k_segments=keys)
        x = LayerNorm(c.norm_eps, common["dtype"], name="attention_norm")(x + y)
        y = MLP(c.mlp_size, c.activation, **common, name="mlp")(x)
        x = LayerNorm(c.norm_eps, common["dtype"], name="mlp_norm")(x + y)
        x = constrain(x, "batch", "patches", None)
        return x, x if self.capture else None


class SpeechTransformer(nn.Module):
    """The transformer from fired vectors to the LLM's width: linear map, ReLU, BERT, linear map, ReLU."""

    config: CFormerConfig

    @nn.compact
    def __call__(self, vectors, mask=None, output_hidden_states: bool = False) -> CFormerOutput:
        """Reads dtype[B, N, cif_size]; see `CFormer.transform`."""
        c = self.config
        dtype = jnp.dtype(c.dtype)
        if vectors.shape[1] > c.max_length:
            raise ConfigError(
                f"C-Former: {vectors.shape[1]} vectors for a transformer of {c.max_length} positions",
                f"at most {c.max_length}",
                "set max_fires, or read shorter audio",
            )
        common = dict(use_bias=True, init_std=INIT_STD, dtype=dtype)
        x = jax.nn.relu(Linear((c.hidden_size,), ("channels", "embed"), **common, name="input")(vectors))
        table = dict(names=(None, "embed"), dtype=dtype)
        x = x + Embedding(c.max_length, c.hidden_size, **table, name="position")(jnp.arange(x.shape[1]))
        x = x + Embedding(c.num_types, c.hidden_size, **table, name="type")(jnp.zeros((), jnp.int32))
        x = embedded = constrain(LayerNorm(c.norm_eps, dtype, name="embedding_norm")(x), "batch", "patches", None)
        keys = None if mask is None else (mask != 0).astype(jnp.int32)
        x, states = layers_of(c, SpeechLayer, 1)(c, output_hidden_states, name="layers")(x, None, keys)
        y = jax.nn.relu(Linear((c.output_size,), ("embed", "channels"), **common, name="output")(x))
        valid = None if mask is None else mask != 0
        return CFormerOutput(y, valid, (embedded, *states) if output_hidden_states else None)


class CFormer(nn.Module):
    """The C-Former from the vectors of a speech encoder to media tokens."""

    config: CFormerConfig

    def setup(self):
        self.cif = CIF(self.config)
        self.transformer = SpeechTransformer(self.config)

    def __call__(self, features, mask=None, target_lengths=None, output_hidden_states: bool = False) -> CFormerOutput:
        """Maps the vectors of a speech encoder to one media token for each fire.

        Args:
            features: dtype[B, T, input_size].
            mask: [B, T], 1 for valid vectors, which come before the others; None: all are valid.
            target_lengths: [B], numbers of tokens to which training scales the weights; None: evaluation, in which the
                tail fires.

        Returns:
            CFormerOutput with last_hidden_state [B, N, output_size]; the mask is True for the fired tokens, and N is
            `config.frames(T)`.

        Raises:
            ConfigError: more vectors than positions.
            DataError: vectors of another width.
        """
        if features.shape[-1] != self.config.input_size:
            raise DataError(
                f"features of width {features.shape[-1]}",
                f"{self.config.input_size}",
                "change the C-Former's input_size, or the encoder",
            )
        fired = self.cif(features, mask, target_lengths)
        return self.transformer(fired.vectors, fired.mask, output_hidden_states).replace(cif=fired)

    def weigh(self, features):
        """Returns the weights float32[B, T] of all vectors, padded ones included."""
        return self.cif.weigh(features)

    def fire(self, features, mask=None, target_lengths=None) -> CIFOutput:
        """Returns the vectors that the transformer reads, dtype[B, N, cif_size]."""
        return self.cif(features, mask, target_lengths)

    def transform(self, vectors, mask=None, output_hidden_states: bool = False) -> CFormerOutput:
        """Applies the transformer alone.

        Args:
            vectors: dtype[B, N, cif_size].
            mask: [B, N], 0 for vectors that no vector attends to; None: all are visible.
        """
        return self.transformer(vectors, mask, output_hidden_states)
