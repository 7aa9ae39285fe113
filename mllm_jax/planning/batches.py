"""The shapes of a stage's batches, from its config alone: no data is read, no tokenizer, no folder."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mllm_jax.models.instructblip import INSTRUCTION, InstructBlipConfig
from mllm_jax.models.llava import ONEVISION
from mllm_jax.models.registry import has_layout
from mllm_jax.training.config import Experiment, Stage


def batch_shapes(experiment: Experiment, stage: Stage) -> dict[str, jax.ShapeDtypeStruct]:
    """What `data.pipeline.Pipeline.shapes()` says once the data is there, with pictures as bytes."""
    config, mixture = experiment.model, stage.data
    shapes = dict.fromkeys(("tokens", "segments", "positions", "media_index"), _array(mixture, dtype="int32"))
    shapes["loss_weights"] = _array(mixture)
    if has_layout(config):
        shapes |= _named_media(config, mixture)
    elif mixture.slots:
        side = _image_size(config, stage)
        shapes["images"] = jax.ShapeDtypeStruct((mixture.rows, mixture.slots, side, side, 3), jnp.uint8)
    if stage.cache_features and "images" in shapes:
        shapes["features"] = _features(config.make(), shapes.pop("images"))
    return shapes


def _array(mixture, *more: int, dtype: str = "float32") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((mixture.rows, mixture.length, *more), jnp.dtype(dtype))


def _named_media(config, mixture) -> dict[str, jax.ShapeDtypeStruct]:
    """What a named model's layout adds, see `mllm_jax.data.dialogues.pack_dialogues`."""
    shapes = {}
    if config.family == ONEVISION:  # a place may be the weighted sum of four media tokens
        shapes = {"media_index": _array(mixture, 4, dtype="int32"), "media_weights": _array(mixture, 4)}
    if getattr(config.llm, "mrope_sections", ()):
        shapes["positions"] = _array(mixture, 3, dtype="int32")
    if config.encoder_decoder:
        shapes |= {f"decoder_{name}": _array(mixture, dtype="int32") for name in ("tokens", "segments", "positions")}
    if isinstance(config, InstructBlipConfig):
        longest = min(INSTRUCTION, config.projector.max_length)
        read = jax.ShapeDtypeStruct((mixture.rows, mixture.slots, longest), jnp.int32)
        shapes |= dict(query_tokens=read, query_segments=read)
    if not mixture.slots:
        return shapes
    # `slots` counts patches where an encoder packs them, and `sample_batch` what they are merged to.
    slots = mixture.slots // config.encoder.merge_unit if config.packed else mixture.slots
    sample = jax.eval_shape(lambda: config.make().sample_batch(mixture.rows, 8, slots))
    return shapes | {name: shape for name, shape in sample.items() if name.startswith(("images", "patch"))}


def _image_size(config, stage: Stage) -> int:
    encoder = getattr(config, "encoder", None) or getattr(config, "vision", None)
    if encoder is not None:
        return encoder.image_size
    return max(weighted.source.image_size for weighted in stage.data.sources)


def _features(model, images: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """What `training.features.FeatureCache` puts in the place of pictures."""
    one = jax.ShapeDtypeStruct((1, 1, *images.shape[2:]), images.dtype)

    def encode(images):
        return model.init_with_output(jax.random.key(0), {"images": images}, method="encode_images")[0]

    made = jax.eval_shape(encode, one)
    return jax.ShapeDtypeStruct((*images.shape[:2], *made.shape[1:]), made.dtype)
