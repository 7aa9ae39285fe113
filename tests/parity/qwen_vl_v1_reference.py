"""The first Qwen-VL for configs that its golden lacks: its vision encoder in torch, and its LLM as transformers' Qwen2.

It follows the paper (arXiv 2308.12966, section 2.1) and the golden's description of the released code, whose stored
outputs the encoder reproduces first.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import transformers
from einops import rearrange
from torch.nn import functional as F

EPS, HEAD, POSITIONS = 1e-6, 128, 256  # fixed by the code, not by options


def media_tokens(
    w: Mapping[str, torch.Tensor], config: Mapping, pixels: torch.Tensor, head: int = HEAD
) -> torch.Tensor:
    """Computes float[B, queries, E] of normalised float[B, 3, S, S].

    Args:
        w: the encoder's tensors, named as in visual.py.
        config: the part `visual` of config.json.
        head: dimensions of the resampler's heads.
    """

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], EPS)

    def linear(x, name):
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    x = rearrange(F.conv2d(pixels, w["conv1.weight"], stride=config["patch_size"]), "b e h w -> b (h w) e")
    x = norm(x + stretched(w["positional_embedding"], x.shape[1]), "ln_pre")
    for i in range(config["layers"]):
        block = f"transformer.resblocks.{i}"
        fused = linear(norm(x, f"{block}.ln_1"), f"{block}.attn.in_proj")
        q, k, v = rearrange(fused, "b s (n p h) -> p b n s h", n=config["heads"], p=3)
        read = rearrange(F.scaled_dot_product_attention(q, k, v), "b n s h -> b s (n h)")
        x = x + linear(read, f"{block}.attn.out_proj")
        wide = F.gelu(linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc"))
        x = x + linear(wide, f"{block}.mlp.c_proj")

    if "attn_pool.kv_proj.weight" in w:
        x = F.linear(x, w["attn_pool.kv_proj.weight"])
    values, places = norm(x, "attn_pool.ln_kv"), w["attn_pool.pos_embed"]
    keys = values + stretched(places, x.shape[1])
    queries = (norm(w["attn_pool.query"], "attn_pool.ln_q") + places).expand(len(x), -1, -1)
    maps = zip(w["attn_pool.attn.in_proj_weight"].chunk(3), w["attn_pool.attn.in_proj_bias"].chunk(3), strict=True)
    q, k, v = (
        rearrange(F.linear(part, *each), "b s (n h) -> b n s h", h=head)
        for part, each in zip((queries, keys, values), maps, strict=True)
    )
    read = rearrange(F.scaled_dot_product_attention(q, k, v), "b n s h -> b s (n h)")
    return norm(linear(read, "attn_pool.attn.out_proj"), "ln_post") @ w["proj"]


def stretched(table: torch.Tensor, patches: int) -> torch.Tensor:
    """Interpolates learned or fixed positions [R * R, E] to a square grid of `patches` patches."""
    side, wanted = round(len(table) ** 0.5), round(patches**0.5)
    image = rearrange(table, "(r c) e -> 1 e r c", r=side)
    return rearrange(F.interpolate(image, size=(wanted, wanted), mode="bicubic"), "1 e h w -> (h w) e")


def random_tower(config: Mapping, seed: int) -> dict[str, torch.Tensor]:
    """Returns every tensor of the encoder, far from a new model's."""
    generator = torch.Generator().manual_seed(seed)
    width, out = config["width"], config["output_dim"]
    wide = int(width * config["mlp_ratio"])

    def normal(*shape, std):
        return std * torch.randn(shape, generator=generator)

    found = {
        "conv1.weight": normal(width, 3, config["patch_size"], config["patch_size"], std=0.1),
        "positional_embedding": normal(POSITIONS, width, std=0.7),
        "proj": normal(out, out, std=1.5 * out**-0.5),
        "attn_pool.query": normal(config["n_queries"], out, std=0.7),
        "attn_pool.pos_embed": normal(config["n_queries"], out, std=0.7),
        "attn_pool.attn.in_proj_weight": normal(3 * out, out, std=2.0 * out**-0.5),
        "attn_pool.attn.in_proj_bias": normal(3 * out, std=0.3),
    }
    if width != out:
        found["attn_pool.kv_proj.weight"] = normal(out, width, std=1.5 * width**-0.5)
    norms = {"ln_pre": width, "attn_pool.ln_q": out, "attn_pool.ln_kv": out, "ln_post": out}
    maps = {"attn_pool.attn.out_proj": (out, out)}
    for i in range(config["layers"]):
        block = f"transformer.resblocks.{i}"
        norms |= {f"{block}.ln_1": width, f"{block}.ln_2": width}
        maps |= {f"{block}.attn.in_proj": (3 * width, width), f"{block}.attn.out_proj": (width, width)}
        maps |= {f"{block}.mlp.c_fc": (wide, width), f"{block}.mlp.c_proj": (width, wide)}
    for name, size in norms.items():
        found |= {f"{name}.weight": 1 + normal(size, std=0.3), f"{name}.bias": normal(size, std=0.3)}
    for name, (rows, columns) in maps.items():
        found |= {f"{name}.weight": normal(rows, columns, std=1.5 * columns**-0.5)}
        found |= {f"{name}.bias": normal(rows, std=0.3)}
    return found


def llm_config(model: transformers.Qwen2ForCausalLM, length: int, stretched: bool) -> dict:
    """Returns the first Qwen's config.json for a Qwen2 with as many key heads as heads."""
    c = model.config
    return dict(
        architectures=["QWenLMHeadModel"],
        model_type="qwen",
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        num_hidden_layers=c.num_hidden_layers,
        num_attention_heads=c.num_attention_heads,
        kv_channels=c.hidden_size // c.num_attention_heads,
        intermediate_size=2 * c.intermediate_size,
        layer_norm_epsilon=c.rms_norm_eps,
        rotary_emb_base=c.rope_parameters["rope_theta"],
        rotary_pct=1.0,
        no_bias=True,
        scale_attn_weights=True,
        tie_word_embeddings=False,
        use_dynamic_ntk=stretched,
        use_logn_attn=stretched,
        seq_length=length,
        max_position_embeddings=4 * length,
    )


def renamed(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns Qwen2's tensors under the first Qwen's names."""
    stored = {
        "transformer.wte.weight": tensors["model.embed_tokens.weight"],
        "lm_head.weight": tensors["lm_head.weight"],
        "transformer.ln_f.weight": tensors["model.norm.weight"],
    }
    for i in range(sum(name.endswith("input_layernorm.weight") for name in tensors)):
        theirs, ours = f"model.layers.{i}", f"transformer.h.{i}"
        for kind in ("weight", "bias"):
            parts = [tensors[f"{theirs}.self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
            stored[f"{ours}.attn.c_attn.{kind}"] = np.concatenate(parts)
        for name, other in {
            "ln_1": "input_layernorm",
            "ln_2": "post_attention_layernorm",
            "attn.c_proj": "self_attn.o_proj",
            "mlp.w1": "mlp.up_proj",  # the one without SiLU
            "mlp.w2": "mlp.gate_proj",
            "mlp.c_proj": "mlp.down_proj",
        }.items():
            stored[f"{ours}.{name}.weight"] = tensors[f"{theirs}.{other}.weight"]
    return stored
