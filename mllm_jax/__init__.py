"""Compose, train, evaluate and run multimodal LLMs in JAX.

Importing the package loads nothing else: a public name brings its module along when it is first used, and no module
starts a device or loads transformers, orbax or TFDS before that is needed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what editors and type checkers read; `_HOMES` says the same to Python
    from mllm_jax.checkpoints.run import RunFolder as RunFolder
    from mllm_jax.data.chat import ChatTokenizer as ChatTokenizer
    from mllm_jax.data.images import decode_image as decode_image
    from mllm_jax.data.message import Audio as Audio
    from mllm_jax.data.message import Example as Example
    from mllm_jax.data.message import Image as Image
    from mllm_jax.data.message import Message as Message
    from mllm_jax.data.message import Segment as Segment
    from mllm_jax.data.message import Text as Text
    from mllm_jax.data.message import Video as Video
    from mllm_jax.data.pipeline import Mixture as Mixture
    from mllm_jax.data.pipeline import Weighted as Weighted
    from mllm_jax.data.source import Source as Source
    from mllm_jax.data.tokenizer import Tokenizer as Tokenizer
    from mllm_jax.datasets.questions import Questions as Questions
    from mllm_jax.datasets.text_only import TextOnly as TextOnly
    from mllm_jax.encoders.text import TextTowerConfig as TextTowerConfig
    from mllm_jax.encoders.text import TextTowerDialect as TextTowerDialect
    from mllm_jax.encoders.vit import ViTConfig as ViTConfig
    from mllm_jax.encoders.vit import ViTDialect as ViTDialect
    from mllm_jax.errors import CheckpointError as CheckpointError
    from mllm_jax.errors import ConfigError as ConfigError
    from mllm_jax.errors import DataError as DataError
    from mllm_jax.errors import MllmError as MllmError
    from mllm_jax.errors import RunFolderError as RunFolderError
    from mllm_jax.errors import TrainingError as TrainingError
    from mllm_jax.evaluation.evaluate import evaluate as evaluate
    from mllm_jax.evaluation.task import Task as Task
    from mllm_jax.generation.assistant import Assistant as Assistant
    from mllm_jax.generation.generate import generate as generate
    from mllm_jax.generation.options import Answer as Answer
    from mllm_jax.generation.options import Options as Options
    from mllm_jax.generation.sampling import Sampling as Sampling
    from mllm_jax.layers.compute import Compute as Compute
    from mllm_jax.llms.decoder import DecoderConfig as DecoderConfig
    from mllm_jax.llms.decoder import DecoderDialect as DecoderDialect
    from mllm_jax.models.branch import Branch as Branch
    from mllm_jax.models.branch import Connection as Connection
    from mllm_jax.models.clip import DualEncoderConfig as DualEncoderConfig
    from mllm_jax.models.multimodal import Multimodal as Multimodal
    from mllm_jax.models.multimodal import MultimodalConfig as MultimodalConfig
    from mllm_jax.models.pformer import PFormerPretrainingConfig as PFormerPretrainingConfig
    from mllm_jax.models.processor import Processor as Processor
    from mllm_jax.models.prompt_guided import PromptGuidedConfig as PromptGuidedConfig
    from mllm_jax.models.registry import from_pretrained as from_pretrained
    from mllm_jax.models.registry import pretrained_config as pretrained_config
    from mllm_jax.models.registry import save_pretrained as save_pretrained
    from mllm_jax.models.registry import supported_models as supported_models
    from mllm_jax.models.run_weights import load_run as load_run
    from mllm_jax.projectors.mlp import MLPProjectorConfig as MLPProjectorConfig
    from mllm_jax.projectors.pformer import PFormerConfig as PFormerConfig
    from mllm_jax.sharding.mesh import MeshConfig as MeshConfig
    from mllm_jax.training.config import AdamW as AdamW
    from mllm_jax.training.config import CheckpointConfig as CheckpointConfig
    from mllm_jax.training.config import Experiment as Experiment
    from mllm_jax.training.config import Pretrained as Pretrained
    from mllm_jax.training.config import Stage as Stage
    from mllm_jax.training.config import TokenizerConfig as TokenizerConfig
    from mllm_jax.training.loop import train as train
    from mllm_jax.training.objectives.contrastive import Contrastive as Contrastive
    from mllm_jax.training.objectives.next_token import NextToken as NextToken
    from mllm_jax.training.objectives.pformer import PFormerObjective as PFormerObjective
    from mllm_jax.training.objectives.pformer import PromptGuided as PromptGuided
    from mllm_jax.training.operations.stopping import Interrupted as Interrupted

__version__ = "0.1.0"

_NAMES = {
    "data.chat": ("ChatTokenizer",),
    "data.message": ("Audio", "Example", "Image", "Message", "Segment", "Text", "Video"),
    "data.images": ("decode_image",),
    "data.pipeline": ("Mixture", "Weighted"),
    "data.source": ("Source",),
    "data.tokenizer": ("Tokenizer",),
    "datasets.questions": ("Questions",),
    "datasets.text_only": ("TextOnly",),
    "encoders.text": ("TextTowerConfig", "TextTowerDialect"),
    "encoders.vit": ("ViTConfig", "ViTDialect"),
    "errors": ("CheckpointError", "ConfigError", "DataError", "MllmError", "RunFolderError", "TrainingError"),
    "evaluation.evaluate": ("evaluate",),
    "evaluation.task": ("Task",),
    "generation.assistant": ("Assistant",),
    "generation.generate": ("generate",),
    "generation.options": ("Answer", "Options"),
    "generation.sampling": ("Sampling",),
    "layers.compute": ("Compute",),
    "llms.decoder": ("DecoderConfig", "DecoderDialect"),
    "models.branch": ("Branch", "Connection"),
    "models.clip": ("DualEncoderConfig",),
    "models.multimodal": ("Multimodal", "MultimodalConfig"),
    "models.pformer": ("PFormerPretrainingConfig",),
    "models.processor": ("Processor",),
    "models.prompt_guided": ("PromptGuidedConfig",),
    "models.registry": ("from_pretrained", "pretrained_config", "save_pretrained", "supported_models"),
    "projectors.mlp": ("MLPProjectorConfig",),
    "projectors.pformer": ("PFormerConfig",),
    "sharding.mesh": ("MeshConfig",),
    "training.config": ("AdamW", "CheckpointConfig", "Experiment", "Pretrained", "Stage", "TokenizerConfig"),
    "training.loop": ("train",),
    "training.objectives.contrastive": ("Contrastive",),
    "training.objectives.next_token": ("NextToken",),
    "training.objectives.pformer": ("PFormerObjective", "PromptGuided"),
    "checkpoints.run": ("RunFolder",),
    "training.operations.stopping": ("Interrupted",),
    "models.run_weights": ("load_run",),
}
_HOMES = {name: f"{__name__}.{module}" for module, names in _NAMES.items() for name in names}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str):
    """Imports the module of a public name when the name is first used (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
