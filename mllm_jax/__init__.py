"""Compose, train, evaluate and run multimodal LLMs in JAX.

Importing the package loads nothing else: the first use of a public name imports its module, and no module starts a
device or loads transformers, orbax or TFDS before that is needed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # for editors and type checkers; `_HOMES` has the same names for Python
    from mllm_jax.checkpoints.run import RunFolder as RunFolder
    from mllm_jax.data.chat_tokenizer import ChatTokenizer as ChatTokenizer
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
    from mllm_jax.data.processing.mel_magnitudes import MelMagnitudes as MelMagnitudes
    from mllm_jax.data.source import Source as Source
    from mllm_jax.data.tokenizer import Tokenizer as Tokenizer
    from mllm_jax.data.video import FrameSampling as FrameSampling
    from mllm_jax.datasets.arcade_sprites import ArcadeSprites as ArcadeSprites
    from mllm_jax.datasets.asterisk_speech import AsteriskSpeech as AsteriskSpeech
    from mllm_jax.datasets.draw_captions import DrawCaptions as DrawCaptions
    from mllm_jax.datasets.foxdot_sounds import FoxDotSounds as FoxDotSounds
    from mllm_jax.datasets.llava import LLaVARecords as LLaVARecords
    from mllm_jax.datasets.openmoji.requests import OpenMojiRequests as OpenMojiRequests
    from mllm_jax.datasets.openmoji.skills import OpenMojiSkills as OpenMojiSkills
    from mllm_jax.datasets.openmoji.sources import OpenMojiCaptions as OpenMojiCaptions
    from mllm_jax.datasets.openmoji.sources import OpenMojiPairs as OpenMojiPairs
    from mllm_jax.datasets.openmoji.sources import OpenMojiQuestions as OpenMojiQuestions
    from mllm_jax.datasets.openmoji.sources import OpenMojiScenes as OpenMojiScenes
    from mllm_jax.datasets.openmoji.sources import OpenMojiText as OpenMojiText
    from mllm_jax.datasets.questions import Questions as Questions
    from mllm_jax.datasets.speech_records import SpeechRecords as SpeechRecords
    from mllm_jax.datasets.text_only import TextOnly as TextOnly
    from mllm_jax.encoders.beats import BEATsConfig as BEATsConfig
    from mllm_jax.encoders.beats import BEATsDialect as BEATsDialect
    from mllm_jax.encoders.cformer import CFormerConfig as CFormerConfig
    from mllm_jax.encoders.clap_text import ClapTextConfig as ClapTextConfig
    from mllm_jax.encoders.hubert import HubertConfig as HubertConfig
    from mllm_jax.encoders.hubert import HubertCTCConfig as HubertCTCConfig
    from mllm_jax.encoders.hubert import HubertDialect as HubertDialect
    from mllm_jax.encoders.nfnet import NFNetConfig as NFNetConfig
    from mllm_jax.encoders.nfnet import NFNetDialect as NFNetDialect
    from mllm_jax.encoders.omni_audio import OmniAudioConfig as OmniAudioConfig
    from mllm_jax.encoders.qwen2_audio import Qwen2AudioEncoderConfig as Qwen2AudioEncoderConfig
    from mllm_jax.encoders.qwen_vit import QwenViTConfig as QwenViTConfig
    from mllm_jax.encoders.qwen_vit import QwenViTDialect as QwenViTDialect
    from mllm_jax.encoders.qwen_vit_v1 import QwenViTV1Config as QwenViTV1Config
    from mllm_jax.encoders.sam import SamConfig as SamConfig
    from mllm_jax.encoders.sam import SamDialect as SamDialect
    from mllm_jax.encoders.siglip_sam import SiglipSamConfig as SiglipSamConfig
    from mllm_jax.encoders.text_encoder import TextTowerConfig as TextTowerConfig
    from mllm_jax.encoders.text_encoder import TextTowerDialect as TextTowerDialect
    from mllm_jax.encoders.vit import ViTConfig as ViTConfig
    from mllm_jax.encoders.vit import ViTDialect as ViTDialect
    from mllm_jax.encoders.whisper import WhisperEncoderConfig as WhisperEncoderConfig
    from mllm_jax.errors import CheckpointError as CheckpointError
    from mllm_jax.errors import ConfigError as ConfigError
    from mllm_jax.errors import DataError as DataError
    from mllm_jax.errors import MllmError as MllmError
    from mllm_jax.errors import RunFolderError as RunFolderError
    from mllm_jax.errors import TrainingError as TrainingError
    from mllm_jax.evaluation.evaluate import evaluate as evaluate
    from mllm_jax.evaluation.metrics import ShuffledMedia as ShuffledMedia
    from mllm_jax.evaluation.task import Task as Task
    from mllm_jax.evaluation.tasks.clips import arcade_tasks as arcade_tasks
    from mllm_jax.evaluation.tasks.clips import asterisk_task as asterisk_task
    from mllm_jax.evaluation.tasks.clips import foxdot_task as foxdot_task
    from mllm_jax.evaluation.tasks.clips import speech_task as speech_task
    from mllm_jax.evaluation.tasks.openmoji import openmoji_questions as openmoji_questions
    from mllm_jax.evaluation.tasks.openmoji import openmoji_retrieval as openmoji_retrieval
    from mllm_jax.evaluation.tasks.openmoji import openmoji_skills as openmoji_skills
    from mllm_jax.evaluation.tasks.openmoji_drawn import openmoji_drawn as openmoji_drawn
    from mllm_jax.evaluation.tasks.questions import questions_task as questions_task
    from mllm_jax.generation.assistant import Assistant as Assistant
    from mllm_jax.generation.generate import generate as generate
    from mllm_jax.generation.media import Media as Media
    from mllm_jax.generation.options import Answer as Answer
    from mllm_jax.generation.options import Options as Options
    from mllm_jax.generation.sampling import Sampling as Sampling
    from mllm_jax.generators.audioldm2_projection import AudioLDM2ProjectionConfig as AudioLDM2ProjectionConfig
    from mllm_jax.generators.griffin_lim import GriffinLimConfig as GriffinLimConfig
    from mllm_jax.generators.sd3 import SD3TransformerConfig as SD3TransformerConfig
    from mllm_jax.generators.unet import UNetConfig as UNetConfig
    from mllm_jax.generators.unet import UNetDialect as UNetDialect
    from mllm_jax.generators.unet_audio import AudioUNetConfig as AudioUNetConfig
    from mllm_jax.generators.unet_video import VideoUNetConfig as VideoUNetConfig
    from mllm_jax.generators.vae import AutoencoderKLConfig as AutoencoderKLConfig
    from mllm_jax.generators.vocoder import VocoderConfig as VocoderConfig
    from mllm_jax.layers.compute import Compute as Compute
    from mllm_jax.layers.rotary import RopeScaling as RopeScaling
    from mllm_jax.llms.chatglm import ChatGLMConfig as ChatGLMConfig
    from mllm_jax.llms.decoder import DecoderConfig as DecoderConfig
    from mllm_jax.llms.decoder import DecoderDialect as DecoderDialect
    from mllm_jax.llms.t5 import T5Config as T5Config
    from mllm_jax.llms.t5 import T5Dialect as T5Dialect
    from mllm_jax.llms.t5_encoder import T5EncoderConfig as T5EncoderConfig
    from mllm_jax.llms.whisper_decoder import WhisperDecoderConfig as WhisperDecoderConfig
    from mllm_jax.models.audioldm2 import AudioLDM2Config as AudioLDM2Config
    from mllm_jax.models.audioldm2_output import AudioLDM2OutputConfig as AudioLDM2OutputConfig
    from mllm_jax.models.blip2 import Blip2Config as Blip2Config
    from mllm_jax.models.blip2_stage1 import QFormerPretrainingConfig as QFormerPretrainingConfig
    from mllm_jax.models.branch import Branch as Branch
    from mllm_jax.models.branch import Connection as Connection
    from mllm_jax.models.cformer_projector import CFormerProjectorConfig as CFormerProjectorConfig
    from mllm_jax.models.clip import DualEncoderConfig as DualEncoderConfig
    from mllm_jax.models.deepseek_vl import DeepseekVLConfig as DeepseekVLConfig
    from mllm_jax.models.generator_only import GeneratorOnlyConfig as GeneratorOnlyConfig
    from mllm_jax.models.instructblip import InstructBlipConfig as InstructBlipConfig
    from mllm_jax.models.internvl import InternVLConfig as InternVLConfig
    from mllm_jax.models.llava import LlavaConfig as LlavaConfig
    from mllm_jax.models.multimodal import Multimodal as Multimodal
    from mllm_jax.models.multimodal import MultimodalConfig as MultimodalConfig
    from mllm_jax.models.output import Output as Output
    from mllm_jax.models.pformer_pretraining import PFormerPretrainingConfig as PFormerPretrainingConfig
    from mllm_jax.models.processor import Processor as Processor
    from mllm_jax.models.prompt_guided import PromptGuidedConfig as PromptGuidedConfig
    from mllm_jax.models.qwen2_audio import Qwen2AudioConfig as Qwen2AudioConfig
    from mllm_jax.models.qwen_omni import QwenOmniConfig as QwenOmniConfig
    from mllm_jax.models.qwen_vl import QwenVLConfig as QwenVLConfig
    from mllm_jax.models.qwen_vl_v1 import QwenVLV1Config as QwenVLV1Config
    from mllm_jax.models.registry import from_pretrained as from_pretrained
    from mllm_jax.models.registry import pretrained_config as pretrained_config
    from mllm_jax.models.registry import save_pretrained as save_pretrained
    from mllm_jax.models.registry import supported_models as supported_models
    from mllm_jax.models.reshape import with_image_size as with_image_size
    from mllm_jax.models.run_weights import load_run as load_run
    from mllm_jax.models.stable_diffusion import StableDiffusionConfig as StableDiffusionConfig
    from mllm_jax.models.text_to_image import TextToImageConfig as TextToImageConfig
    from mllm_jax.models.text_to_sound import TextToSoundConfig as TextToSoundConfig
    from mllm_jax.models.text_to_video import TextToVideoConfig as TextToVideoConfig
    from mllm_jax.models.whisper import WhisperConfig as WhisperConfig
    from mllm_jax.output_projectors.linear import LinearOutputProjectorConfig as LinearOutputProjectorConfig
    from mllm_jax.output_projectors.mlp import MLPOutputProjectorConfig as MLPOutputProjectorConfig
    from mllm_jax.output_projectors.query_connector import QueryConnectorConfig as QueryConnectorConfig
    from mllm_jax.output_projectors.several import SeveralConditionsConfig as SeveralConditionsConfig
    from mllm_jax.output_projectors.states import PromptStatesConfig as PromptStatesConfig
    from mllm_jax.output_projectors.transformer import TransformerMapperConfig as TransformerMapperConfig
    from mllm_jax.projectors.mlp import MLPProjectorConfig as MLPProjectorConfig
    from mllm_jax.projectors.paired import PairedProjectorConfig as PairedProjectorConfig
    from mllm_jax.projectors.pformer import PFormerConfig as PFormerConfig
    from mllm_jax.projectors.pixel_shuffle import PixelShuffleProjectorConfig as PixelShuffleProjectorConfig
    from mllm_jax.projectors.pool import PoolProjectorConfig as PoolProjectorConfig
    from mllm_jax.projectors.qformer import QFormerConfig as QFormerConfig
    from mllm_jax.projectors.resampler import ResamplerConfig as ResamplerConfig
    from mllm_jax.projectors.resampler import ResamplerDialect as ResamplerDialect
    from mllm_jax.projectors.stacked import StackedProjectorConfig as StackedProjectorConfig
    from mllm_jax.sharding.logical import PartRules as PartRules
    from mllm_jax.sharding.logical import data_parallel as data_parallel
    from mllm_jax.sharding.mesh import MeshConfig as MeshConfig
    from mllm_jax.training.config import AdamW as AdamW
    from mllm_jax.training.config import CheckpointConfig as CheckpointConfig
    from mllm_jax.training.config import Experiment as Experiment
    from mllm_jax.training.config import Pretrained as Pretrained
    from mllm_jax.training.config import Stage as Stage
    from mllm_jax.training.config import TokenizerConfig as TokenizerConfig
    from mllm_jax.training.loop import train as train
    from mllm_jax.training.objectives.contrastive import Contrastive as Contrastive
    from mllm_jax.training.objectives.diffusion import Diffusion as Diffusion
    from mllm_jax.training.objectives.next_token import NextToken as NextToken
    from mllm_jax.training.objectives.output_alignment import OutputAlignment as OutputAlignment
    from mllm_jax.training.objectives.pformer_losses import PFormerObjective as PFormerObjective
    from mllm_jax.training.objectives.pformer_losses import PromptGuided as PromptGuided
    from mllm_jax.training.objectives.protocol import Objective as Objective
    from mllm_jax.training.objectives.qformer import QFormerStage1 as QFormerStage1
    from mllm_jax.training.objectives.quantity import QuantityGuided as QuantityGuided
    from mllm_jax.training.operations.stopping import Interrupted as Interrupted

from mllm_jax.version import __version__

_NAMES = {
    "checkpoints.run": ("RunFolder",),
    "data.chat_tokenizer": ("ChatTokenizer",),
    "data.images": ("decode_image",),
    "data.video": ("FrameSampling",),
    "data.message": ("Audio", "Example", "Image", "Message", "Segment", "Text", "Video"),
    "data.pipeline": ("Mixture", "Weighted"),
    "data.processing.mel_magnitudes": ("MelMagnitudes",),
    "data.source": ("Source",),
    "data.tokenizer": ("Tokenizer",),
    "datasets.arcade_sprites": ("ArcadeSprites",),
    "datasets.asterisk_speech": ("AsteriskSpeech",),
    "datasets.draw_captions": ("DrawCaptions",),
    "datasets.foxdot_sounds": ("FoxDotSounds",),
    "datasets.llava": ("LLaVARecords",),
    "datasets.openmoji.requests": ("OpenMojiRequests",),
    "datasets.openmoji.skills": ("OpenMojiSkills",),
    "datasets.openmoji.sources": (
        "OpenMojiCaptions",
        "OpenMojiPairs",
        "OpenMojiQuestions",
        "OpenMojiScenes",
        "OpenMojiText",
    ),
    "datasets.questions": ("Questions",),
    "datasets.speech_records": ("SpeechRecords",),
    "datasets.text_only": ("TextOnly",),
    "encoders.beats": ("BEATsConfig", "BEATsDialect"),
    "encoders.cformer": ("CFormerConfig",),
    "encoders.clap_text": ("ClapTextConfig",),
    "encoders.hubert": ("HubertConfig", "HubertCTCConfig", "HubertDialect"),
    "encoders.nfnet": ("NFNetConfig", "NFNetDialect"),
    "encoders.omni_audio": ("OmniAudioConfig",),
    "encoders.qwen2_audio": ("Qwen2AudioEncoderConfig",),
    "encoders.qwen_vit": ("QwenViTConfig", "QwenViTDialect"),
    "encoders.qwen_vit_v1": ("QwenViTV1Config",),
    "encoders.sam": ("SamConfig", "SamDialect"),
    "encoders.siglip_sam": ("SiglipSamConfig",),
    "encoders.text_encoder": ("TextTowerConfig", "TextTowerDialect"),
    "encoders.vit": ("ViTConfig", "ViTDialect"),
    "encoders.whisper": ("WhisperEncoderConfig",),
    "errors": ("CheckpointError", "ConfigError", "DataError", "MllmError", "RunFolderError", "TrainingError"),
    "evaluation.evaluate": ("evaluate",),
    "evaluation.metrics": ("ShuffledMedia",),
    "evaluation.task": ("Task",),
    "evaluation.tasks.clips": ("arcade_tasks", "asterisk_task", "foxdot_task", "speech_task"),
    "evaluation.tasks.openmoji": ("openmoji_questions", "openmoji_retrieval", "openmoji_skills"),
    "evaluation.tasks.openmoji_drawn": ("openmoji_drawn",),
    "evaluation.tasks.questions": ("questions_task",),
    "generation.assistant": ("Assistant",),
    "generation.generate": ("generate",),
    "generation.media": ("Media",),
    "generation.options": ("Answer", "Options"),
    "generation.sampling": ("Sampling",),
    "generators.audioldm2_projection": ("AudioLDM2ProjectionConfig",),
    "generators.griffin_lim": ("GriffinLimConfig",),
    "generators.sd3": ("SD3TransformerConfig",),
    "generators.unet": ("UNetConfig", "UNetDialect"),
    "generators.unet_audio": ("AudioUNetConfig",),
    "generators.unet_video": ("VideoUNetConfig",),
    "generators.vae": ("AutoencoderKLConfig",),
    "generators.vocoder": ("VocoderConfig",),
    "layers.compute": ("Compute",),
    "layers.rotary": ("RopeScaling",),
    "llms.chatglm": ("ChatGLMConfig",),
    "llms.decoder": ("DecoderConfig", "DecoderDialect"),
    "llms.t5": ("T5Config", "T5Dialect"),
    "llms.t5_encoder": ("T5EncoderConfig",),
    "llms.whisper_decoder": ("WhisperDecoderConfig",),
    "models.audioldm2": ("AudioLDM2Config",),
    "models.audioldm2_output": ("AudioLDM2OutputConfig",),
    "models.blip2": ("Blip2Config",),
    "models.blip2_stage1": ("QFormerPretrainingConfig",),
    "models.branch": ("Branch", "Connection"),
    "models.cformer_projector": ("CFormerProjectorConfig",),
    "models.clip": ("DualEncoderConfig",),
    "models.deepseek_vl": ("DeepseekVLConfig",),
    "models.generator_only": ("GeneratorOnlyConfig",),
    "models.instructblip": ("InstructBlipConfig",),
    "models.internvl": ("InternVLConfig",),
    "models.llava": ("LlavaConfig",),
    "models.multimodal": ("Multimodal", "MultimodalConfig"),
    "models.output": ("Output",),
    "models.pformer_pretraining": ("PFormerPretrainingConfig",),
    "models.processor": ("Processor",),
    "models.prompt_guided": ("PromptGuidedConfig",),
    "models.qwen2_audio": ("Qwen2AudioConfig",),
    "models.qwen_omni": ("QwenOmniConfig",),
    "models.qwen_vl": ("QwenVLConfig",),
    "models.qwen_vl_v1": ("QwenVLV1Config",),
    "models.registry": ("from_pretrained", "pretrained_config", "save_pretrained", "supported_models"),
    "models.reshape": ("with_image_size",),
    "models.run_weights": ("load_run",),
    "models.stable_diffusion": ("StableDiffusionConfig",),
    "models.text_to_image": ("TextToImageConfig",),
    "models.text_to_sound": ("TextToSoundConfig",),
    "models.text_to_video": ("TextToVideoConfig",),
    "models.whisper": ("WhisperConfig",),
    "output_projectors.linear": ("LinearOutputProjectorConfig",),
    "output_projectors.mlp": ("MLPOutputProjectorConfig",),
    "output_projectors.query_connector": ("QueryConnectorConfig",),
    "output_projectors.several": ("SeveralConditionsConfig",),
    "output_projectors.states": ("PromptStatesConfig",),
    "output_projectors.transformer": ("TransformerMapperConfig",),
    "projectors.mlp": ("MLPProjectorConfig",),
    "projectors.paired": ("PairedProjectorConfig",),
    "projectors.pformer": ("PFormerConfig",),
    "projectors.pixel_shuffle": ("PixelShuffleProjectorConfig",),
    "projectors.pool": ("PoolProjectorConfig",),
    "projectors.qformer": ("QFormerConfig",),
    "projectors.resampler": ("ResamplerConfig", "ResamplerDialect"),
    "projectors.stacked": ("StackedProjectorConfig",),
    "sharding.logical": ("PartRules", "data_parallel"),
    "sharding.mesh": ("MeshConfig",),
    "training.config": ("AdamW", "CheckpointConfig", "Experiment", "Pretrained", "Stage", "TokenizerConfig"),
    "training.loop": ("train",),
    "training.objectives.contrastive": ("Contrastive",),
    "training.objectives.diffusion": ("Diffusion",),
    "training.objectives.next_token": ("NextToken",),
    "training.objectives.output_alignment": ("OutputAlignment",),
    "training.objectives.pformer_losses": ("PFormerObjective", "PromptGuided"),
    "training.objectives.protocol": ("Objective",),
    "training.objectives.qformer": ("QFormerStage1",),
    "training.objectives.quantity": ("QuantityGuided",),
    "training.operations.stopping": ("Interrupted",),
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
