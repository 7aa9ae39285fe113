"""The one registry of architectures: a model's name in config.json, and the module that reads and writes it.

A new family is a file with its `FAMILIES` and a line here for each of its architectures. A part of diffusers is one
line with its class: `Architecture("UNet2DConditionModel", "mllm_jax.generators.unet", diffusers=True)`. Nothing is
imported: modules are names, which `mllm_jax.models.registry` and `mllm_jax.models.parts` look up.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mllm_jax.checkpoints.config_options import named_as
from mllm_jax.errors import ConfigError

# The version whose meaning of the options is read and written.
DIFFUSERS_VERSION = "0.42.1"
# The possible positions of a named model's media in the text of its LLM.
AMONG, BEFORE = "among", "before"


@dataclass(frozen=True)
class Architecture:
    """One architecture.

    Attributes:
        name: its name in the families of its module, and in config.json under `architectures`, or `_class_name`.
        module: name of the module with its `FAMILIES`.
        model_type: its name in a part of a config.json without `architectures`.
        media: for an LLM that may be a part of a named model: whether such models put media AMONG the tokens, BEFORE
            them, or some AMONG and some BEFORE.
        diffusers: whether it is a class of diffusers, whose folders differ from those of transformers.
        called: another architecture's name, if config.json has that instead.
        option: the option that then distinguishes it, which the other architecture lacks.
    """

    name: str
    module: str
    model_type: str = ""
    media: tuple[str, ...] = ()
    diffusers: bool = False
    called: str = ""
    option: str = ""


ARCHITECTURES: tuple[Architecture, ...] = (
    # language models
    Architecture("LlamaForCausalLM", "mllm_jax.llms.llama", "llama", media=(AMONG, BEFORE)),
    Architecture("MistralForCausalLM", "mllm_jax.llms.llama", "mistral", media=(AMONG,)),
    Architecture("Qwen2ForCausalLM", "mllm_jax.llms.qwen", "qwen2", media=(AMONG,)),
    Architecture("Qwen3ForCausalLM", "mllm_jax.llms.qwen", "qwen3", media=(AMONG,)),
    Architecture("QWenLMHeadModel", "mllm_jax.llms.qwen_v1", "qwen"),
    Architecture("GlmForCausalLM", "mllm_jax.llms.glm", "glm"),
    Architecture("OPTForCausalLM", "mllm_jax.llms.opt", "opt", media=(BEFORE,)),
    Architecture("GPT2LMHeadModel", "mllm_jax.llms.gpt2", "gpt2"),
    Architecture("GPT2Model", "mllm_jax.llms.gpt2", "gpt2"),
    Architecture("T5ForConditionalGeneration", "mllm_jax.llms.t5", "t5", media=(BEFORE,)),
    Architecture("T5WithLMHeadModel", "mllm_jax.llms.t5", "t5", media=(BEFORE,)),
    Architecture("T5EncoderModel", "mllm_jax.llms.t5_encoder", "t5"),
    Architecture("ChatGLMModel", "mllm_jax.llms.chatglm", "chatglm"),
    Architecture("ChatGLMForConditionalGeneration", "mllm_jax.llms.chatglm", "chatglm"),
    # ChatGLM 2 and 3 have the same name as the first.
    Architecture("ChatGLMModel", "mllm_jax.llms.glm", called="ChatGLMModel", option="padded_vocab_size"),
    # encoders, and whole models
    Architecture("ViTModel", "mllm_jax.encoders.vit_hf", "vit"),
    Architecture("CLIPVisionModel", "mllm_jax.encoders.clip_vision", "clip_vision_model"),
    Architecture("CLIPTextModel", "mllm_jax.encoders.clip_text", "clip_text_model"),
    Architecture("CLIPTextModelWithProjection", "mllm_jax.encoders.clip_text", "clip_text_model"),
    Architecture("ClapTextModelWithProjection", "mllm_jax.encoders.clap_text", "clap_text_model"),
    # The whole CLAP, of which the text encoder is read.
    Architecture("ClapModel", "mllm_jax.encoders.clap_text", "clap"),
    Architecture("CLIPModel", "mllm_jax.models.clip", "clip"),
    Architecture("SiglipVisionModel", "mllm_jax.encoders.siglip_vision", "siglip_vision_model"),
    Architecture("SamVisionModel", "mllm_jax.encoders.sam", "sam_vision_model"),
    Architecture("SiglipTextModel", "mllm_jax.encoders.siglip_text", "siglip_text_model"),
    Architecture("SiglipModel", "mllm_jax.models.clip", "siglip"),
    Architecture("LlavaForConditionalGeneration", "mllm_jax.models.llava", "llava"),
    Architecture("LlavaNextForConditionalGeneration", "mllm_jax.models.llava", "llava_next"),
    Architecture("LlavaOnevisionForConditionalGeneration", "mllm_jax.models.llava", "llava_onevision"),
    Architecture("Dinov2Model", "mllm_jax.encoders.dinov2", "dinov2"),
    Architecture("Blip2VisionModel", "mllm_jax.encoders.eva", "blip_2_vision_model"),
    Architecture("InternVLVisionModel", "mllm_jax.encoders.internvit", "internvl_vision"),
    Architecture("InternVisionModel", "mllm_jax.encoders.internvit", "intern_vit_6b"),
    Architecture("Qwen2VisionTransformerPretrainedModel", "mllm_jax.encoders.qwen_vit", "qwen2_vl_vision"),
    Architecture("Qwen2_5_VisionTransformerPretrainedModel", "mllm_jax.encoders.qwen_vit", "qwen2_5_vl_vision"),
    Architecture("Qwen3VLVisionModel", "mllm_jax.encoders.qwen_vit", "qwen3_vl_vision"),
    Architecture("Qwen2_5OmniVisionEncoder", "mllm_jax.encoders.qwen_vit", "qwen2_5_omni_vision_encoder"),
    Architecture("Qwen2_5OmniAudioEncoder", "mllm_jax.encoders.omni_audio", "qwen2_5_omni_audio_encoder"),
    Architecture("QWenVisionTransformer", "mllm_jax.models.qwen_vl_v1"),
    # Its folders give the class of its language model.
    Architecture("QWenVL", "mllm_jax.models.qwen_vl_v1", called="QWenLMHeadModel", option="visual"),
    Architecture("BEATs", "mllm_jax.encoders.beats", "beats"),
    Architecture("CFormer", "mllm_jax.encoders.cformer_hub", "cformer"),
    Architecture("InternVLForConditionalGeneration", "mllm_jax.models.internvl", "internvl"),
    Architecture("InternVLChatModel", "mllm_jax.models.internvl", "internvl_chat"),
    Architecture("DeepseekVLForConditionalGeneration", "mllm_jax.models.deepseek_vl", "deepseek_vl"),
    Architecture("DeepseekVLHybridForConditionalGeneration", "mllm_jax.models.deepseek_vl", "deepseek_vl_hybrid"),
    Architecture("Blip2ForConditionalGeneration", "mllm_jax.models.blip2", "blip-2"),
    Architecture("Blip2ForImageTextRetrieval", "mllm_jax.models.blip2_stage1", "blip-2"),
    Architecture("InstructBlipForConditionalGeneration", "mllm_jax.models.instructblip", "instructblip"),
    Architecture("Qwen2VLForConditionalGeneration", "mllm_jax.models.qwen_vl", "qwen2_vl"),
    Architecture("Qwen2_5_VLForConditionalGeneration", "mllm_jax.models.qwen_vl", "qwen2_5_vl"),
    Architecture("Qwen3VLForConditionalGeneration", "mllm_jax.models.qwen_vl", "qwen3_vl"),
    Architecture("Qwen2_5OmniThinkerForConditionalGeneration", "mllm_jax.models.qwen_omni", "qwen2_5_omni_thinker"),
    # The folder of the whole model, of which the thinker is read.
    Architecture("Qwen2_5OmniForConditionalGeneration", "mllm_jax.models.qwen_omni", "qwen2_5_omni"),
    Architecture("Qwen2_5OmniModel", "mllm_jax.models.qwen_omni", "qwen2_5_omni"),
    Architecture("HubertModel", "mllm_jax.encoders.hubert", "hubert"),
    Architecture("HubertForCTC", "mllm_jax.encoders.hubert", "hubert"),
    Architecture("WhisperForConditionalGeneration", "mllm_jax.models.whisper", "whisper"),
    Architecture("WhisperModel", "mllm_jax.models.whisper", "whisper"),
    Architecture("WhisperEncoder", "mllm_jax.encoders.whisper", "whisper"),
    Architecture("Qwen2AudioEncoder", "mllm_jax.encoders.qwen2_audio", "qwen2_audio_encoder"),
    Architecture("Qwen2AudioForConditionalGeneration", "mllm_jax.models.qwen2_audio", "qwen2_audio"),
    Architecture("SpeechT5HifiGan", "mllm_jax.generators.vocoder", "speecht5_hifigan"),
    # parts of diffusers
    Architecture("AutoencoderKL", "mllm_jax.generators.vae_hub", diffusers=True),
    Architecture("UNet2DConditionModel", "mllm_jax.generators.unet_hub", diffusers=True),
    Architecture("AudioLDM2UNet2DConditionModel", "mllm_jax.generators.unet_audio", diffusers=True),
    Architecture("AudioLDM2ProjectionModel", "mllm_jax.generators.audioldm2_projection", diffusers=True),
    Architecture("UNet3DConditionModel", "mllm_jax.generators.unet_video_hub", diffusers=True),
    Architecture("SD3Transformer2DModel", "mllm_jax.generators.sd3_hub", diffusers=True),
    # pipelines of diffusers
    Architecture("StableDiffusionPipeline", "mllm_jax.models.stable_diffusion", diffusers=True),
    Architecture("TextToVideoSDPipeline", "mllm_jax.models.text_to_video", diffusers=True),
    Architecture("AudioLDM2Pipeline", "mllm_jax.models.audioldm2", diffusers=True),
    # timm's names
    Architecture("eva_giant_patch14_clip_224", "mllm_jax.encoders.eva"),
    Architecture("eva02_base_patch16_clip_224", "mllm_jax.encoders.eva"),
    Architecture("eva02_large_patch14_clip_224", "mllm_jax.encoders.eva"),
    Architecture("eva02_large_patch14_clip_336", "mllm_jax.encoders.eva"),
    Architecture("eva02_enormous_patch14_clip_224", "mllm_jax.encoders.eva"),
    *(
        Architecture(f"{origin}nfnet_f{size}", "mllm_jax.encoders.nfnet_timm")
        for origin in ("dm_", "")
        for size in range(7)
    ),
)


def find(name: str, values: Mapping[str, Any] = {}) -> Architecture | None:  # noqa: B006
    """Returns the architecture of a name, or the one with that `called` and `option`; None if it is not supported.

    Args:
        values: the dictionary in config.json.
    """
    marked = [a for a in ARCHITECTURES if a.option and name == a.called and values.get(a.option)]
    return next(iter(marked + [a for a in ARCHITECTURES if a.name == name]), None)


def known(name: str, values: Mapping[str, Any] = {}) -> Architecture:  # noqa: B006
    """Does the same. Raises ConfigError, with the nearest name, if it is not supported."""
    if (found := find(name, values)) is not None:
        return found
    names = list(dict.fromkeys(a.name for a in ARCHITECTURES))
    near = difflib.get_close_matches(str(name), names, n=1)
    raise ConfigError(
        f"architecture {name!r}",
        f"one of {', '.join(names)}",
        f"did you mean {near[0]!r}?" if near else "convert another checkpoint; `mllm models` lists what is supported",
    )


def of_type(model_type: str | None) -> Architecture | None:
    """Returns the first architecture with that `model_type`, or None."""
    return next((a for a in ARCHITECTURES if model_type and a.model_type == model_type), None)


def model_type(name: str) -> str:
    """Returns the `model_type` of an architecture. Raises ConfigError if it is unknown."""
    return known(name).model_type


def kind_of(name: str) -> dict[str, Any]:
    """Returns the entries of a config.json that name an architecture. Raises ConfigError if it is unknown."""
    if known(name).diffusers:
        return dict(_class_name=name, _diffusers_version=DIFFUSERS_VERSION)
    return dict(architectures=[name], model_type=model_type(name))


def nameless(part: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a config.json as a part of a larger one, without its architecture."""
    return {name: value for name, value in part.items() if name != "architectures"}


def llms_inside(media: str) -> tuple[Architecture, ...]:
    """Returns the LLMs of named models that put media AMONG the tokens, or BEFORE them."""
    return tuple(a for a in ARCHITECTURES if media in a.media)


def architecture(values: Mapping[str, Any], *names: str) -> str:
    """Returns which of `names` is the architecture of a config.json, or of a part of one.

    Reads `architectures`, else `model_type`.

    Raises:
        ConfigError: it is another architecture.
    """
    named, kind = named_as(values)
    by_type = {model_type(name): name for name in names}
    found = named[0] if named else by_type.get(kind)
    if found not in names:
        raise ConfigError(
            f"a config.json with architectures={values.get('architectures')}, model_type={kind!r}",
            " or ".join(names),
            "read it with the family that knows it: mllm_jax.supported_models()",
        )
    return found
