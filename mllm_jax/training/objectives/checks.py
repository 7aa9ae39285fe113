"""Checks of a stage and its model that several objectives share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mllm_jax.errors import ConfigError
from mllm_jax.models.output import produced_in, slots_of
from mllm_jax.training.partition import trains

if TYPE_CHECKING:
    from mllm_jax.training.config import Stage


def require_model(stage: Stage, model: Any, *kinds: type) -> None:
    """Raises ConfigError if a model's config is of none of these classes."""
    if not isinstance(model, kinds):
        raise ConfigError(
            f"stage {stage.name!r}: {type(stage.objective).__name__} for a {type(model).__name__}",
            f"a {' or a '.join(kind.__name__ for kind in kinds)}",
            "change the stage's objective, or name such a composition in the stage's `model`",
        )


def check_features(stage: Stage, model: Any, *, read: bool) -> None:
    """Checks that precomputed features make sense, if the stage asks for them.

    Args:
        read: whether the objective's loss takes features instead of media.

    Raises:
        ConfigError: they are not read, or an encoder of the stage's media is trained or reads packed patches.
    """
    if not stage.cache_features:
        return
    if not read or not all(_fixed(stage, model, modality) for modality in stage.modalities):
        raise ConfigError(
            f"stage {stage.name!r}: cache_features of {type(model).__name__}, trainable {stage.trainable}",
            "next-token, prompt-guided or output-alignment training of a model with frozen encoders of whole images or "
            "of sounds",
            "freeze the encoders, or drop cache_features",
        )


def _fixed(stage: Stage, model: Any, modality: str) -> bool:
    """Returns whether each medium of a modality, or each caption of one to produce, has fixed features."""
    if (made := produced_in(modality)) is not None:
        return not trains(stage.trainable, f"generator_{made}")
    branch = model.branch(modality)
    return not (branch.packed or branch.fires) and not trains(stage.trainable, model.part_name("encoder", modality))


def require_targets(stage: Stage, model: Any, *, frozen: bool = False) -> None:
    """Checks that a stage has media to produce.

    Args:
        frozen: whether the generators must be frozen.

    Raises:
        ConfigError: a model without output branches, mixtures without slots for their media, or a trained generator.
    """
    slots = [slots_of(modality) for modality in model.outputs]
    lacking = [m.slots for m in stage.mixtures if not any(m.slots.get(name) for name in slots)]
    if not slots or lacking:
        raise ConfigError(
            f"stage {stage.name!r}: {type(stage.objective).__name__} with slots {lacking} for a model that produces "
            f"{', '.join(model.outputs) or 'no media'}",
            f"slots for media of answers, such as {{{(slots or ['image_targets'])[0]!r}: 2}}, and an output branch",
            "set the mixture's slots, or give the model outputs",
        )
    trained = [m for m in model.outputs if trains(stage.trainable, f"generator_{m}")]
    if frozen and trained:
        raise ConfigError(
            f"stage {stage.name!r}: trainable {stage.trainable} with {type(stage.objective).__name__}",
            f"a frozen generator_{trained[0]}, whose text encoder gives the targets",
            "leave it out of `trainable`",
        )


def check_captions(stage: Stage, captions: int, reader: Any) -> None:
    """Checks the captions of a contrastive stage.

    Args:
        captions: maximum number of captions an image for the model's heads.
        reader: config of the text encoder.

    Raises:
        ConfigError: more or longer captions.
    """
    for mixture in stage.mixtures:
        if mixture.layout != "caption":
            continue
        if mixture.captions > captions:
            raise ConfigError(
                f"stage {stage.name!r}: up to {mixture.captions} captions an image for heads of {captions}",
                "heads for as many captions",
                "raise the model's `captions`",
            )
        if reader.num_layers and mixture.length > reader.max_length:
            raise ConfigError(
                f"stage {stage.name!r}: captions of {mixture.length} positions for a text encoder of"
                f" {reader.max_length}",
                "rows that fit the encoder's positions",
                "lower the mixture's length, or raise max_length of the model's text encoder",
            )
