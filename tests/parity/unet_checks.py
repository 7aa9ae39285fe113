"""Compares a denoiser with diffusers' class: output, gradients, folders both ways, with one compilation for each."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import jax
import numpy as np
import torch
from flax import linen as nn

from mllm_jax.checkpoints.hf import hub_tensors
from mllm_jax.checkpoints.layout import lay_out
from mllm_jax.checkpoints.leaves import flatten
from mllm_jax.models.registry import abstract_params, family_of_config, from_pretrained, save_pretrained

# Names of the arguments of a call, and of the reference's.
NAMES = dict(
    text="encoder_hidden_states", text_1="encoder_hidden_states_1", text_mask="encoder_attention_mask",
    text_1_mask="encoder_attention_mask_1", class_labels="class_labels", timestep_cond="timestep_cond",
    pooled="pooled_projections",
)  # fmt: skip


def inputs(config, size: tuple[int, ...], rows: int = 2) -> dict[str, np.ndarray]:
    """Returns the arguments of a call, with another time for each row, in a UNet of two texts of another length."""
    rng, kind = np.random.default_rng(sum(size)), config.spatial.dialect.class_embedding

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    found = dict(latents=normal(rows, *size, config.in_channels), timesteps=rng.permutation(1000)[:rows])
    for i, width in enumerate(config.text_widths):
        found[f"text_{i}" if i else "text"] = normal(rows, 5 + i, width or 12)
    if kind == "index":
        found["class_labels"] = rng.integers(config.class_size, size=rows)
    elif kind is not None:
        width = config.time_width if kind == "identity" else config.class_size
        found["class_labels"] = 100 * normal(rows) if kind == "timestep" else normal(rows, width)
    if config.condition_size is not None:
        found["timestep_cond"] = normal(rows, config.condition_size)
    return found


def masks(call: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns a mask for each text, which leaves 4 positions of the first row and 2 of the second."""
    ends = {name: np.array([[4], [2]]) for name, text in call.items() if name.startswith("text")}
    return {f"{name}_mask": (np.arange(call[name].shape[1]) < end).astype(np.int32) for name, end in ends.items()}


def theirs(model: torch.nn.Module, latents, timesteps, **more) -> torch.Tensor:
    """Returns the reference's output, channels last."""
    more = {NAMES[name]: torch.tensor(value) for name, value in more.items()}
    x = torch.tensor(np.moveaxis(latents, -1, 1))
    return model(x, timestep=torch.tensor(timesteps), **more).sample.movedim(1, -1)


def check(reference, size, folder, assert_close, masked: bool):
    """Checks a UNet as `check_call` does."""

    def make_call(config):
        call = inputs(config, size)
        return call | (masks(call) if masked else {})

    return check_call(reference, make_call, folder, assert_close)


def check_call(reference, make_call, folder, assert_close, without_effect=frozenset()):
    """Checks output, gradients of the mean squared error, and the written folder; returns (module, parameters).

    Args:
        make_call: config -> the arguments of a call.
        without_effect: names of weights that do not change the output. Buffers have no gradient either.
    """
    reference.save_pretrained(folder / "theirs")
    module, params = from_pretrained(folder / "theirs")
    config, family = module.config, family_of_config(module.config)
    call = make_call(config)
    wanted = theirs(reference, **call)
    noise = np.random.default_rng(7).normal(size=wanted.shape).astype(np.float32)
    # Gradients in float64: torch's own in float32 are off by up to 1e-3 where they nearly cancel.
    exact = copy.deepcopy(reference).double()
    precise = {n: np.float64(x) if isinstance(x, np.ndarray) and x.dtype == np.float32 else x for n, x in call.items()}
    torch.mean((theirs(exact, **precise) - torch.tensor(noise)) ** 2).backward()

    def loss(params, call):
        out = module.apply({"params": params}, **call)
        return ((out - noise) ** 2).mean(), out

    gradients, out = jax.jit(jax.grad(loss, has_aux=True))(params, call)
    wanted = wanted.detach()
    assert_close(out, wanted, 1e-4, "output")
    mine, parameters = hub_tensors(family.table(config), gradients), dict(exact.named_parameters())
    buffers = dict(exact.named_buffers())
    assert mine.keys() == parameters.keys() | buffers.keys() and without_effect <= parameters.keys()
    largest = max(float(parameter.grad.abs().max()) for parameter in parameters.values())
    for name, parameter in parameters.items():
        if name in without_effect:
            assert parameter.grad.abs().max() <= 1e-9 * largest and np.abs(mine[name]()).max() <= 1e-6 * largest, name
        else:
            assert_close(mine[name](), parameter.grad.numpy(), 1e-3, name)
    assert not any(mine[name]().any() for name in buffers)

    save_pretrained(module, params, folder / "ours")
    opened, report = type(reference).from_pretrained(folder / "ours", output_loading_info=True)
    assert not any(report[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    written = opened.state_dict()  # weights without effect included
    assert all(torch.equal(written[name], tensor) for name, tensor in reference.state_dict().items())
    with torch.no_grad():
        assert_close(theirs(opened.eval(), **call), wanted, 1e-6, "the folder written here")
    before, after = (json.loads((folder / by / "config.json").read_text("utf-8")) for by in ("theirs", "ours"))
    assert family.from_hf(after) == family.from_hf(before) == replace(config, compute=family.from_hf(before).compute)
    return module, params


def check_full_size(reference: torch.nn.Module, from_hf_config, count: int):
    """Checks names and shapes against a module on the meta device, and their sum; returns the config."""
    config = from_hf_config(json.loads(reference.to_json_string()))
    family = family_of_config(config)
    shapes = {path: leaf.shape for path, leaf in flatten(nn.meta.unbox(abstract_params(config, family)))[0].items()}
    stored = {name: layout.shape for layout in lay_out(family.table(config), shapes) for name in layout.names()}
    assert stored == {name: tuple(tensor.shape) for name, tensor in reference.state_dict().items()}
    assert sum(map(np.prod, shapes.values())) == count
    return config
