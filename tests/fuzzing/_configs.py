"""A tiny config.json of every family, by its architecture in the registry."""

from __future__ import annotations

DECODER = dict(
    vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, hidden_act="silu", rms_norm_eps=1e-6, max_position_embeddings=64, rope_theta=10000.0,
    tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
LLAMA = DECODER | dict(model_type="llama")
QWEN2 = DECODER | dict(model_type="qwen2", use_sliding_window=False, sliding_window=32, max_window_layers=2)
OPT = dict(
    model_type="opt", vocab_size=32, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=4,
    word_embed_proj_dim=16, max_position_embeddings=48, activation_function="relu", do_layer_norm_before=True,
)  # fmt: skip
GPT2 = dict(
    model_type="gpt2", vocab_size=32, n_embd=16, n_inner=24, n_layer=2, n_head=4, n_positions=48, n_ctx=48,
    activation_function="gelu_new", layer_norm_epsilon=1e-5, scale_attn_weights=True, reorder_and_upcast_attn=False,
    scale_attn_by_inverse_layer_idx=False, summary_type="cls_index", bos_token_id=1, eos_token_id=2,
)  # fmt: skip
T5 = dict(
    model_type="t5", vocab_size=32, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_decoder_layers=2, num_heads=4,
    feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0, is_encoder_decoder=True,
    relative_attention_num_buckets=8, relative_attention_max_distance=16, layer_norm_epsilon=1e-6,
)  # fmt: skip
WHISPER = dict(
    model_type="whisper", vocab_size=32, num_mel_bins=4, d_model=16, encoder_layers=2, num_hidden_layers=2,
    encoder_attention_heads=4, encoder_ffn_dim=24, decoder_layers=2, decoder_attention_heads=2, decoder_ffn_dim=20,
    activation_function="gelu", max_source_positions=6, max_target_positions=16, scale_embedding=False,
    decoder_start_token_id=3, bos_token_id=1, eos_token_id=2, pad_token_id=2, is_encoder_decoder=True,
    encoder_layerdrop=0.0, apply_spec_augment=False, median_filter_width=7, max_length=16,
    suppress_tokens=[], begin_suppress_tokens=[1, 2],
)  # fmt: skip
QWEN2_AUDIO = dict(
    model_type="qwen2_audio_encoder", num_mel_bins=4, d_model=16, encoder_layers=2, encoder_attention_heads=4,
    encoder_ffn_dim=24, activation_function="gelu", max_source_positions=6, scale_embedding=False,
    encoder_layerdrop=0.0,
)  # fmt: skip
VISION = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8,
    hidden_act="gelu", layer_norm_eps=1e-5, num_channels=3,
)  # fmt: skip
TEXT = dict(
    vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=12, hidden_act="quick_gelu", layer_norm_eps=1e-5,
)  # fmt: skip
CLIP_VISION, SIGLIP_VISION = (
    VISION | dict(model_type="clip_vision_model"),
    VISION | dict(model_type="siglip_vision_model"),
)
DINO = {name: value for name, value in VISION.items() if name != "intermediate_size"} | dict(
    model_type="dinov2", mlp_ratio=2, layerscale_value=1.0, use_swiglu_ffn=False
)
BEATS = dict(
    model_type="beats", input_patch_size=16, embed_dim=8, encoder_layers=2, encoder_embed_dim=16,
    encoder_ffn_embed_dim=24, encoder_attention_heads=4, activation_fn="gelu", deep_norm=True, conv_pos=8,
    conv_pos_groups=4, relative_position_embedding=True, num_buckets=8, max_distance=16, gru_rel_pos=True,
    finetuned_model=True, predictor_class=5,
)  # fmt: skip
SAM = dict(
    model_type="sam_vision_model", hidden_size=16, output_channels=8, num_hidden_layers=2, num_attention_heads=4,
    image_size=32, patch_size=8, mlp_ratio=2.0, window_size=2, global_attn_indexes=[1], hidden_act="gelu",
)  # fmt: skip
UNET = dict(
    _diffusers_version="0.42.1", sample_size=8, in_channels=4, out_channels=4, block_out_channels=[4, 8],
    layers_per_block=1, attention_head_dim=[2, 4], norm_num_groups=2, norm_eps=1e-5, act_fn="silu",
    down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"], mid_block_type="UNetMidBlock2DCrossAttn",
    up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"], transformer_layers_per_block=1, only_cross_attention=False,
    flip_sin_to_cos=True, freq_shift=0, downsample_padding=1, use_linear_projection=False, time_embedding_dim=None,
)  # fmt: skip
HUBERT = dict(
    model_type="hubert", vocab_size=12, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
    num_attention_heads=4, conv_dim=[6, 8], conv_kernel=[10, 3], conv_stride=[5, 2], num_conv_pos_embeddings=4,
    num_conv_pos_embedding_groups=2, feat_extract_norm="layer", do_stable_layer_norm=True, conv_bias=True,
    layer_norm_eps=1e-5, hidden_act="gelu", mask_time_prob=0.05,
)  # fmt: skip
BLIP_VISION = VISION | dict(model_type="blip_2_vision_model", qkv_bias=True)
QFORMER = dict(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24, cross_attention_frequency=2,
    vocab_size=32, max_position_embeddings=16, layer_norm_eps=1e-12, encoder_hidden_size=16,
)  # fmt: skip
INTERN = VISION | dict(
    model_type="internvl_vision", image_size=[16, 16], patch_size=[8, 8], norm_type="layer_norm", attention_bias=True,
    use_qk_norm=False, layer_scale_init_value=0.1,
)  # fmt: skip
INTERN_ORIGINAL = VISION | dict(
    model_type="intern_vit_6b", norm_type="layer_norm", qkv_bias=True, qk_normalization=False, initializer_factor=0.1
)
QWEN2_VIT = dict(
    model_type="qwen2_vl", depth=2, embed_dim=16, hidden_size=16, num_heads=2, mlp_ratio=2, in_channels=3,
    patch_size=4, spatial_merge_size=2, temporal_patch_size=2, hidden_act="quick_gelu",
)  # fmt: skip
QWEN25_VIT = dict(
    model_type="qwen2_5_vl", depth=2, hidden_size=16, intermediate_size=24, out_hidden_size=16, num_heads=2,
    in_channels=3, patch_size=4, spatial_merge_size=2, temporal_patch_size=2, window_size=16, hidden_act="silu",
    fullatt_block_indexes=[1], tokens_per_second=2,
)  # fmt: skip
OMNI_VIT = QWEN25_VIT | dict(model_type="qwen2_5_omni_vision_encoder")
OMNI_AUDIO = dict(
    model_type="qwen2_5_omni_audio_encoder", num_mel_bins=4, d_model=16, encoder_layers=2, encoder_attention_heads=4,
    encoder_ffn_dim=24, activation_function="gelu", max_source_positions=6, scale_embedding=False, n_window=4,
    output_dim=16, num_hidden_layers=2,
)  # fmt: skip
QWEN3_VIT = dict(
    model_type="qwen3_vl", depth=2, hidden_size=16, intermediate_size=24, out_hidden_size=16, num_heads=2,
    in_channels=3, patch_size=4, spatial_merge_size=2, temporal_patch_size=2, num_position_embeddings=16,
    hidden_act="gelu_pytorch_tanh", deepstack_visual_indexes=[0],
)  # fmt: skip
QWEN1 = dict(
    model_type="qwen", vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, kv_channels=4,
    intermediate_size=48, layer_norm_epsilon=1e-6, rotary_emb_base=10000, rotary_pct=1.0, no_bias=True,
    scale_attn_weights=True, use_dynamic_ntk=True, use_logn_attn=True, seq_length=64, tie_word_embeddings=False,
)  # fmt: skip
QWEN1_VISUAL = dict(
    heads=4, image_size=16, image_start_id=20, layers=2, mlp_ratio=2.0, output_dim=128, patch_size=4, width=16
)
MROPE = dict(rope_scaling=dict(type="mrope", mrope_section=[2, 1, 1]))
THINKER = dict(
    model_type="qwen2_5_omni_thinker",
    text_config=QWEN2 | dict(model_type="qwen2_5_omni_text", rope_scaling=dict(type="mrope", mrope_section=[1, 0, 1])),
    vision_config=OMNI_VIT, audio_config=OMNI_AUDIO, image_token_index=30, video_token_index=29, audio_token_index=28,
    vision_start_token_id=27, audio_start_token_id=26, audio_end_token_id=25, user_token_id=24,
    position_id_per_seconds=25, seconds_per_chunk=2,
)  # fmt: skip
TIMM = dict(patch_size=8, embed_dim=16, depth=2, num_heads=4, img_size=16, num_classes=4)


def _named(name: str, *parts: dict, **options) -> dict:
    whole = {"architectures": [name]}
    for part in parts:
        whole |= part
    return whole | options


def _llava(name: str, model_type: str, **options) -> dict:
    common = dict(model_type=model_type, text_config=LLAMA, vision_config=CLIP_VISION, image_token_index=31)
    return _named(name, common | dict(projector_hidden_act="gelu", vision_feature_layer=-2) | options)


def _qwen_vl(name: str, model_type: str, vision: dict) -> dict:
    text = QWEN2 | MROPE | dict(model_type=f"{model_type}_text", head_dim=8)
    return _named(name, dict(model_type=model_type, text_config=text, vision_config=vision, image_token_id=30))


_ALL = [
    _named("LlamaForCausalLM", LLAMA, head_dim=4, attention_bias=False),
    _named("MistralForCausalLM", DECODER, model_type="mistral", sliding_window=16),
    _named("Qwen2ForCausalLM", QWEN2),
    _named("Qwen3ForCausalLM", QWEN2, model_type="qwen3", head_dim=4, attention_bias=False),
    _named("QWenLMHeadModel", QWEN1),
    _named("GlmForCausalLM", DECODER, model_type="glm", head_dim=4, attention_bias=True, partial_rotary_factor=0.5),
    _named("OPTForCausalLM", OPT),
    _named("GPT2LMHeadModel", GPT2),
    _named("GPT2Model", GPT2),
    _named("T5ForConditionalGeneration", T5),
    _named("T5EncoderModel", T5, is_encoder_decoder=False),
    _named(
        "ChatGLMModel", model_type="chatglm", vocab_size=32, hidden_size=16, num_layers=2, num_attention_heads=4,
        inner_hidden_size=24, layernorm_epsilon=1e-5, max_sequence_length=64, bos_token_id=1, eos_token_id=2,
        pad_token_id=3, mask_token_id=4, gmask_token_id=5, position_encoding_2d=True, quantization_bit=0,
        pre_seq_len=None, prefix_projection=False,
    ),
    _named("WhisperForConditionalGeneration", WHISPER),
    _named("WhisperModel", WHISPER),
    _named("WhisperEncoder", WHISPER),
    _named("ViTModel", VISION, model_type="vit"),
    _named("CLIPVisionModel", CLIP_VISION),
    _named("CLIPTextModel", TEXT, model_type="clip_text_model", eos_token_id=2),
    _named("CLIPTextModelWithProjection", TEXT, model_type="clip_text_model", projection_dim=8),
    _named("ClapTextModelWithProjection", TEXT, model_type="clap_text_model", hidden_act="gelu", type_vocab_size=1,
           projection_dim=8, projection_hidden_act="relu", pad_token_id=1),
    # The audio encoder's options are not read.
    _named("ClapModel", model_type="clap", text_config=TEXT | dict(hidden_act="gelu"), projection_dim=8,
           projection_hidden_act="relu"),
    _named("CLIPModel", model_type="clip", text_config=TEXT, vision_config=CLIP_VISION, projection_dim=8,
           text_config_dict=TEXT),
    _named("SiglipVisionModel", SIGLIP_VISION),
    _named("SiglipTextModel", TEXT, model_type="siglip_text_model"),
    _named("SiglipModel", model_type="siglip", text_config=TEXT, vision_config=SIGLIP_VISION),
    _named("SamVisionModel", SAM),
    _named("Dinov2Model", DINO),
    _named("HubertModel", HUBERT),
    _named("HubertForCTC", HUBERT, pad_token_id=0),
    _named("Blip2VisionModel", BLIP_VISION),
    _named("InternVLVisionModel", INTERN),
    _named("InternVisionModel", INTERN_ORIGINAL),
    _named("Qwen2VisionTransformerPretrainedModel", QWEN2_VIT),
    _named("Qwen2_5_VisionTransformerPretrainedModel", QWEN25_VIT),
    _named("Qwen3VLVisionModel", QWEN3_VIT),
    _named("Qwen2_5OmniVisionEncoder", OMNI_VIT),
    _named("Qwen2_5OmniAudioEncoder", OMNI_AUDIO),
    _named("QWenVisionTransformer", QWEN1_VISUAL),
    _named("BEATs", BEATS),
    _llava("LlavaForConditionalGeneration", "llava"),
    _llava("LlavaNextForConditionalGeneration", "llava_next", image_grid_pinpoints=[[16, 32], [32, 16]]),
    _llava("LlavaOnevisionForConditionalGeneration", "llava_onevision", vision_config=SIGLIP_VISION,
           image_grid_pinpoints=[[16, 16], [16, 32]], vision_feature_layer=-1, vision_aspect_ratio="anyres_max_9"),
    _named("InternVLForConditionalGeneration", model_type="internvl", text_config=QWEN2, vision_config=INTERN,
           downsample_ratio=0.5, image_token_id=31),
    _named("InternVLChatModel", model_type="internvl_chat", llm_config=_named("Qwen2ForCausalLM", QWEN2),
           vision_config=INTERN_ORIGINAL, downsample_ratio=0.5, select_layer=-1, ps_version="v2", force_image_size=16,
           dynamic_image_size=True, use_thumbnail=True, max_dynamic_patch=6),
    _named("DeepseekVLForConditionalGeneration", model_type="deepseek_vl", text_config=LLAMA,
           vision_config=SIGLIP_VISION, image_token_id=31),
    _named("DeepseekVLHybridForConditionalGeneration", model_type="deepseek_vl_hybrid", text_config=LLAMA,
           vision_config=SIGLIP_VISION, high_res_vision_config=SAM, image_token_id=31),
    _named("Blip2ForConditionalGeneration", model_type="blip-2", text_config=OPT, vision_config=BLIP_VISION,
           qformer_config=QFORMER, num_query_tokens=4, image_token_index=31),
    _named("Blip2ForImageTextRetrieval", model_type="blip-2", vision_config=BLIP_VISION, num_query_tokens=4,
           qformer_config=QFORMER | dict(use_qformer_text_input=True), image_text_hidden_size=8),
    _named("InstructBlipForConditionalGeneration", model_type="instructblip", text_config=T5,
           vision_config=BLIP_VISION, qformer_config=QFORMER, num_query_tokens=4, image_token_index=31),
    _qwen_vl("Qwen2VLForConditionalGeneration", "qwen2_vl", QWEN2_VIT),
    _qwen_vl("Qwen2_5_VLForConditionalGeneration", "qwen2_5_vl", QWEN25_VIT),
    _qwen_vl("Qwen3VLForConditionalGeneration", "qwen3_vl", QWEN3_VIT),
    _named("Qwen2_5OmniThinkerForConditionalGeneration", THINKER),
    _named("Qwen2AudioEncoder", QWEN2_AUDIO),
    _named("Qwen2AudioForConditionalGeneration", model_type="qwen2_audio", audio_config=QWEN2_AUDIO, text_config=QWEN2,
           audio_token_index=31),
]  # fmt: skip
CONFIGS = {values["architectures"][0]: values for values in _ALL} | {
    "ChatGLM2": _named(
        "ChatGLMModel", model_type="chatglm", padded_vocab_size=32, hidden_size=16, ffn_hidden_size=24, num_layers=2,
        num_attention_heads=4, multi_query_attention=True, multi_query_group_num=2, kv_channels=4, rmsnorm=True,
        layernorm_epsilon=1e-5, seq_length=64, add_qkv_bias=True, add_bias_linear=False, post_layer_norm=True,
        original_rope=True, eos_token_id=2, pad_token_id=0,
    ),
    "QWenVL": _named("QWenLMHeadModel", QWEN1 | dict(hidden_size=128, kv_channels=32), visual=QWEN1_VISUAL),
    "eva02_base_patch16_clip_224": dict(architecture="eva02_base_patch16_clip_224", model_args=TIMM),
    "eva_giant_patch14_clip_224": dict(architecture="eva_giant_patch14_clip_224", model_args=TIMM | dict(mlp_ratio=2)),
    "dm_nfnet_f0": dict(
        architecture="dm_nfnet_f0", num_classes=4,
        model_args=dict(depths=[1, 1, 1, 1], channels=[16, 16, 16, 16], stem_chs=16, group_size=8, num_features=16),
        pretrained_cfg=dict(input_size=[3, 32, 32], mean=[0.5, 0.5, 0.5], std=[0.5, 0.5, 0.5], crop_pct=0.9),
    ),
    "CFormer": _named(
        "CFormer", cif_threshold=0.99, cif_embedding_dim=16, encoder_embed_dim=24, produce_weight_type="conv",
        conv_cif_width=3, apply_scaling=True, apply_tail_handling=True, tail_handling_firing_threshold=0.5,
        llm_hidden_size=16, bert_config={n: v for n, v in TEXT.items() if n not in ("hidden_act", "vocab_size")},
    ),
    "SpeechT5HifiGan": _named(
        "SpeechT5HifiGan", model_type="speecht5_hifigan", model_in_dim=6, upsample_initial_channel=16,
        upsample_rates=[3, 2], upsample_kernel_sizes=[5, 4], resblock_kernel_sizes=[3, 5],
        resblock_dilation_sizes=[[1, 3], [2, 1]], leaky_relu_slope=0.1, normalize_before=True, sampling_rate=16000,
    ),
    "AutoencoderKL": dict(
        _class_name="AutoencoderKL", _diffusers_version="0.42.1", in_channels=3, out_channels=3, latent_channels=4,
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2, layers_per_block=1,
        block_out_channels=[4, 8], norm_num_groups=2, act_fn="silu", sample_size=16, scaling_factor=0.18215,
        shift_factor=None, latents_mean=None, latents_std=None, force_upcast=True, use_quant_conv=True,
        use_post_quant_conv=True, mid_block_add_attention=True,
    ),
    "UNet2DConditionModel": UNET | dict(
        _class_name="UNet2DConditionModel", cross_attention_dim=6, center_input_sample=False,
        num_attention_heads=None, dual_cross_attention=False, attention_type="default", dropout=0.0,
    ),
    "AudioLDM2ProjectionModel": dict(
        _class_name="AudioLDM2ProjectionModel", _diffusers_version="0.42.1", text_encoder_dim=6, text_encoder_1_dim=10,
        langauge_model_dim=8, use_learned_position_embedding=None, max_seq_length=None,
    ),
    "AudioLDM2UNet2DConditionModel": UNET | dict(
        _class_name="AudioLDM2UNet2DConditionModel", cross_attention_dim=[[None, 6, 10]] * 2,
    ),
    "UNet3DConditionModel": dict(
        _class_name="UNet3DConditionModel", _diffusers_version="0.42.1", sample_size=8, in_channels=4, out_channels=4,
        down_block_types=["CrossAttnDownBlock3D", "DownBlock3D"], up_block_types=["UpBlock3D", "CrossAttnUpBlock3D"],
        block_out_channels=[4, 8], layers_per_block=1, downsample_padding=1, mid_block_scale_factor=1, act_fn="silu",
        norm_num_groups=2, norm_eps=1e-5, cross_attention_dim=6, attention_head_dim=2, num_attention_heads=None,
        time_cond_proj_dim=None,
    ),
    "SD3Transformer2DModel": dict(
        _class_name="SD3Transformer2DModel", _diffusers_version="0.42.1", sample_size=8, patch_size=2, in_channels=4,
        num_layers=2, attention_head_dim=4, num_attention_heads=2, joint_attention_dim=6, caption_projection_dim=8,
        pooled_projection_dim=5, out_channels=4, pos_embed_max_size=6, dual_attention_layers=[0], qk_norm="rms_norm",
    ),
}  # fmt: skip
