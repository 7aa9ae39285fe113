"""The forward pass of BEATs in torch from the original's tensors and config, for variants without a golden.

test_beats.py proves it on the goldens first.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

ACTIVATIONS = dict(
    gelu=F.gelu,
    gelu_fast=lambda x: F.gelu(x, approximate="tanh"),
    gelu_accurate=lambda x: F.gelu(x, approximate="tanh"),
    relu=F.relu,
    tanh=torch.tanh,
)


def fbank(waveform: np.ndarray, num_mel: int = 128) -> np.ndarray:
    """Returns transformers' log-mel energies of int16-scaled samples float[N], with Kaldi's settings."""
    filters = mel_filter_bank(
        257, num_mel, 20, 8000, 16000, norm=None, mel_scale="kaldi", triangularize_in_mel_space=True
    )
    return spectrogram(
        waveform,
        window_function(400, "povey", periodic=False),
        frame_length=400,
        hop_length=160,
        fft_length=512,
        power=2.0,
        center=False,
        preemphasis=0.97,
        mel_filters=filters,
        log_mel="log",
        mel_floor=1.192092955078125e-07,
        remove_dc_offset=True,
    ).T


def normalised_fbank(waveform: np.ndarray) -> np.ndarray:
    """Maps float[B, N] in [-1, 1] to float[B, frames, 128]."""
    return (np.stack([fbank(row * 2**15) for row in waveform]) - 15.41663) / (2 * 6.55582)


def chunks(padding: torch.Tensor, parts: int) -> torch.Tensor:
    """Returns bool[B, parts]: whether all samples of each chunk are padding."""
    if extra := padding.shape[1] % parts:
        padding = padding[:, :-extra]
    return padding.view(padding.shape[0], parts, -1).all(-1)


class Reference:
    """The original with its tensors by name and the dictionary of its config, all fields given."""

    def __init__(self, weights: dict[str, np.ndarray], config: dict):
        self.w = {name: torch.tensor(array) for name, array in weights.items()}
        self.c = config

    def linear(self, x, name):
        return F.linear(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"))

    def norm(self, x, name):
        return F.layer_norm(x, x.shape[-1:], self.w[f"{name}.weight"], self.w[f"{name}.bias"])

    def bias(self, length):
        """Returns the ungated bias, float[N, T, T], or None."""
        if not self.c["relative_position_embedding"]:
            return None
        half = self.c["num_buckets"] // 2
        exact = half // 2
        relative = torch.arange(length)[None] - torch.arange(length)[:, None]
        distance = relative.abs()
        wide = torch.log(distance.float() / exact) / math.log(self.c["max_distance"] / exact) * (half - exact)
        wide = (exact + wide.clamp(min=0).long()).clamp(max=half - 1)
        bucket = (relative > 0) * half + torch.where(distance < exact, distance, wide)
        return self.w["encoder.layers.0.self_attn.relative_attention_bias.weight"][bucket].permute(2, 0, 1)

    def attention(self, x, layer, padding, bias):
        heads, name = self.c["encoder_attention_heads"], f"encoder.layers.{layer}.self_attn"
        q, k, v = (self.linear(x, f"{name}.{part}_proj").unflatten(-1, (heads, -1)).transpose(1, 2) for part in "qkv")
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        if padding is not None:
            scores = scores.masked_fill(padding[:, None, None], float("-inf"))
        if bias is not None:
            gate = torch.ones(())
            if self.c["gru_rel_pos"]:
                gates = self.linear(q, f"{name}.grep_linear").unflatten(-1, (2, 4)).sum(-1).sigmoid()
                gate = gates[..., :1] * (gates[..., 1:] * self.w[f"{name}.grep_a"] - 1) + 2
            scores = scores + gate * bias
        return self.linear((scores.softmax(-1) @ v).transpose(1, 2).flatten(2), f"{name}.out_proj")

    def mlp(self, x, layer):
        name = f"encoder.layers.{layer}"
        if self.c["activation_fn"] == "glu":
            up, gate = self.linear(x, f"{name}.fc1.linear").chunk(2, -1)
            return self.linear(up * F.silu(gate), f"{name}.fc2")
        return self.linear(ACTIVATIONS[self.c["activation_fn"]](self.linear(x, f"{name}.fc1")), f"{name}.fc2")

    def position(self, x):
        name, size = "encoder.pos_conv.0", self.c["conv_pos"]
        direction = self.w[f"{name}.weight_v"]
        kernel = direction * self.w[f"{name}.weight_g"] / direction.norm(dim=(0, 1), keepdim=True)
        groups = self.c["conv_pos_groups"]
        y = F.conv1d(x.transpose(1, 2), kernel, self.w[f"{name}.bias"], padding=size // 2, groups=groups)
        return F.gelu(y[..., : x.shape[1]].transpose(1, 2))

    @torch.no_grad()
    def __call__(self, spectrum: np.ndarray, padding: np.ndarray | None) -> dict[str, np.ndarray]:
        """Maps the normalised filterbank and a padding mask (True is padding) to the outputs by the goldens' names."""
        c, found = self.c, {}
        x = torch.tensor(spectrum, dtype=torch.float32)
        if padding is not None:
            padding = chunks(torch.tensor(padding), x.shape[1])
        x = F.conv2d(
            x[:, None], self.w["patch_embedding.weight"], self.w.get("patch_embedding.bias"), c["input_patch_size"]
        )
        x = found["patch_layer_norm"] = self.norm(x.flatten(2).transpose(1, 2), "layer_norm")
        if padding is not None:
            padding = found["padding_mask_out"] = chunks(padding, x.shape[1])
        if c["embed_dim"] != c["encoder_embed_dim"]:
            x = self.linear(x, "post_extract_proj")
        if padding is not None:
            x = x.masked_fill(padding[..., None], 0)
        x = x + self.position(x)
        first, scale = c["layer_norm_first"], (2 * c["encoder_layers"]) ** 0.25 if c["deep_norm"] else 1
        if not first:
            x = self.norm(x, "encoder.layer_norm")
        bias = self.bias(x.shape[1])
        for layer in range(c["encoder_layers"]):
            norms = (f"encoder.layers.{layer}.{name}layer_norm" for name in ("self_attn_", "final_"))
            parts = (lambda h, n=layer: self.attention(h, n, padding, bias), lambda h, n=layer: self.mlp(h, n))
            for name, part in zip(norms, parts, strict=True):
                x = x + part(self.norm(x, name)) if first else self.norm(scale * x + part(x), name)
            found[f"layer{layer}"] = x
        if first:
            x = self.norm(x, "encoder.layer_norm")
        if c["finetuned_model"]:
            valid = torch.ones(x.shape[:2]) if padding is None else (~padding).float()
            logits = (self.linear(x, "predictor") * valid[..., None]).sum(1) / valid.sum(1, keepdim=True)
            found["probs"] = logits.sigmoid()
        found["features"] = x
        return {name: value.numpy() for name, value in found.items()}


def random_weights(config: dict, seed: int = 0) -> dict[str, np.ndarray]:
    """Returns random tensors of the original's shapes by its names, none near its initial value."""
    rng = np.random.default_rng(seed)
    found = {}
    for name, shape in shapes(config).items():
        noise = rng.normal(size=shape)
        if "norm" in name or name.endswith(("grep_a", "weight_g")):
            noise = 0.3 * noise + (not name.endswith("bias"))
        elif len(shape) > 1:
            noise = 0.8 * noise if "relative" in name else 1.5 * noise / math.prod(shape[1:]) ** 0.5
        else:
            noise = 0.3 * noise
        found[name] = noise.astype(np.float32)
    return found


def shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the original's parameters by its names, shared ones once."""
    c, found = config, {}
    width, wide, heads = c["encoder_embed_dim"], c["encoder_ffn_embed_dim"], c["encoder_attention_heads"]

    def linear(name, out, inputs, bias=True):
        found[f"{name}.weight"] = (out, *inputs) if isinstance(inputs, tuple) else (out, inputs)
        if bias:
            found[f"{name}.bias"] = (out,)

    def norm(name, size):
        found[f"{name}.weight"] = found[f"{name}.bias"] = (size,)

    linear("patch_embedding", c["embed_dim"], (1, *[c["input_patch_size"]] * 2), c["conv_bias"])
    norm("layer_norm", c["embed_dim"])
    if c["embed_dim"] != width:
        linear("post_extract_proj", width, c["embed_dim"])
    position = "encoder.pos_conv.0"
    found[f"{position}.weight_g"] = (1, 1, c["conv_pos"])
    found[f"{position}.weight_v"] = (width, width // c["conv_pos_groups"], c["conv_pos"])
    found[f"{position}.bias"] = (width,)
    norm("encoder.layer_norm", width)
    for layer in range(c["encoder_layers"]):
        name = f"encoder.layers.{layer}"
        for part in ("k_proj", "v_proj", "q_proj", "out_proj"):
            linear(f"{name}.self_attn.{part}", width, width)
        if c["gru_rel_pos"]:
            linear(f"{name}.self_attn.grep_linear", 8, width // heads)
            found[f"{name}.self_attn.grep_a"] = (1, heads, 1, 1)
        if layer == 0 and c["relative_position_embedding"]:
            found[f"{name}.self_attn.relative_attention_bias.weight"] = (c["num_buckets"], heads)
        glu = c["activation_fn"] == "glu"
        linear(f"{name}.fc1.linear" if glu else f"{name}.fc1", (1 + glu) * wide, width)
        linear(f"{name}.fc2", width, wide)
        norm(f"{name}.self_attn_layer_norm", width)
        norm(f"{name}.final_layer_norm", width)
    if c["finetuned_model"]:
        linear("predictor", c["predictor_class"], width)
    return found
