"""What several objectives check of a stage and its model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mllm_jax.errors import ConfigError
from mllm_jax.models.multimodal import MultimodalConfig
from mllm_jax.training.partition import trains

if TYPE_CHECKING:
    from mllm_jax.training.config import Stage


def require_model(stage: Stage, model: Any, *kinds: type) -> None:
    """Raises ConfigError: a model's config that is of none of these classes."""
    if not isinstance(model, kinds):
        raise ConfigError(
            f"stage {stage.name!r}: {type(stage.objective).__name__} for a {type(model).__name__}",
            f"a {' or a '.join(kind.__name__ for kind in kinds)}",
            "change the stage's objective, or the model",
        )


def check_features(stage: Stage, model: Any, *, read: bool) -> None:
    """Checks that precomputed features make sense, if the stage asks for them.

    Args:
        read: whether the objective's loss takes `features` instead of `images`.

    Raises:
        ConfigError: they are not read, or the encoder that makes them is trained or reads packed patches.
    """
    if not stage.cache_features:
        return
    whole = isinstance(model, MultimodalConfig) and not model.packed
    if not (read and whole) or trains(stage.trainable, "encoder"):
        raise ConfigError(
            f"stage {stage.name!r}: cache_features of {type(model).__name__}, trainable {stage.trainable}",
            "next-token or prompt-guided training of a model with a frozen encoder of whole pictures",
            "freeze the encoder, or drop cache_features",
        )


def check_captions(stage: Stage, model: Any) -> None:
    """Raises ConfigError: more or longer captions than a model's contrastive heads and text tower, if any, take."""
    tower = model.text_tower
    for mixture in stage.mixtures:
        if mixture.layout != "caption" or tower is None:
            continue
        if mixture.captions > model.captions:
            raise ConfigError(
                f"stage {stage.name!r}: up to {mixture.captions} captions a picture for heads of {model.captions}",
                "heads for as many captions",
                "raise the number of captions of the model's contrastive heads",
            )
        if tower.num_layers and mixture.length > tower.max_length:
            raise ConfigError(
                f"stage {stage.name!r}: captions of {mixture.length} places for a text tower of {tower.max_length}",
                "rows that the tower's positions hold",
                "lower the mixture's length, or raise max_length of the model's text tower",
            )
