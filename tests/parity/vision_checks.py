"""Compares a vision encoder with its reference class: through real folders, whole and packed images."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import torch
from einops import rearrange

from mllm_jax.checkpoints.hf import read_config, read_weights, write_weights
from mllm_jax.checkpoints.table import Family
from mllm_jax.models.registry import abstract_params

GOLDENS = Path(__file__).parents[1] / "goldens"


def family_of(home, architecture: str) -> Family:
    return next(family for family in home.FAMILIES if architecture in family.architectures)


def read(family: Family, folder: Path):
    """Returns (module, parameters) of a folder."""
    config = family.from_hf(read_config(folder))
    return config.make(), read_weights(folder, family.table(config), abstract_params(config, family))


def write(family: Family, module, params, folder: Path) -> None:
    write_weights(folder, family.table(module.config), params, config=family.to_hf(module.config))


def make_image(height: int, width: int, rows: int = 1, channels: int = 3) -> np.ndarray:
    """Returns normalised pixels [rows, H, W, C]."""
    rng = np.random.default_rng(height * 100 + width)
    return rng.normal(size=(rows, height, width, channels)).astype(np.float32)


def to_torch(pixels: np.ndarray) -> torch.Tensor:
    return torch.tensor(rearrange(pixels, "b h w c -> b c h w"))


def pack(images: list[np.ndarray], patch: int, class_token: bool, padding: int = 3):
    """Packs single images into one row: pixels, segments, coordinates, grids, and the span of each."""
    parts, spans, start = [], [], 0
    for number, pixels in enumerate(images, start=1):
        grid = np.array(pixels.shape[1:3]) // patch
        whole = pixels[:, : grid[0] * patch, : grid[1] * patch]
        patches = rearrange(whole, "1 (h p) (w q) c -> (h w) (p q c)", p=patch, q=patch)
        places = np.indices(grid).reshape(2, -1).T
        if class_token:
            # The pixels at a class token's position are unused.
            patches = np.concatenate([np.full((1, patches.shape[1]), 5.0), patches])
            places = np.concatenate([[[-1, -1]], places])
        parts.append((patches, np.full(len(patches), number), places, np.broadcast_to(grid, places.shape)))
        spans.append(slice(start, start := start + len(patches)))
    parts.append(
        (np.ones((padding, patches.shape[1])), np.zeros(padding), np.zeros((padding, 2)), np.zeros((padding, 2)))
    )
    pixels, *places = (np.concatenate(part)[None] for part in zip(*parts, strict=True))
    return (pixels.astype(np.float32), *(place.astype(np.int32) for place in places), spans)


def compare(ours, theirs, assert_close, what: str, tolerance: float = 1e-4) -> None:
    """Compares every hidden state, the last and the pooled output; `theirs` is the reference's."""
    assert len(ours.hidden_states) == len(theirs.hidden_states)
    for i, (mine, their) in enumerate(zip(ours.hidden_states, theirs.hidden_states, strict=True)):
        assert_close(mine, their, tolerance, f"{what}: hidden state {i}")
    assert_close(ours.last_hidden_state, theirs.last_hidden_state, tolerance, f"{what}: last hidden state")
    assert (ours.pooler_output is None) == (theirs.pooler_output is None), what
    if theirs.pooler_output is not None:
        assert_close(ours.pooler_output, theirs.pooler_output, tolerance, f"{what}: pooled")


def check_transformers(reference, family, folder: Path, assert_close, sizes, ignored: tuple[str, ...] = (), **call):
    """Checks whole images of two sizes, images of all sizes packed in a row, and the written folder.

    Args:
        reference: a module with randomised weights.
        sizes: (height, width) of images, the native one first; those from the third on are only packed.
        ignored: tensors of the reference that are not kept.
        call: further arguments of the reference's forward.
    """
    reference.save_pretrained(folder / "theirs")
    module, params = read(family, folder / "theirs")
    c = module.config
    assert family.from_hf(family.to_hf(c)) == c
    apply = jax.jit(module.apply, static_argnums=2)

    def theirs(model, pixels):
        with torch.no_grad():
            return model(to_torch(pixels), output_hidden_states=True, **call)

    wanted, ours = [theirs(reference, make_image(*size, 1, c.num_channels)) for size in sizes], []
    for size, want in zip(sizes[:2], wanted, strict=False):
        ours.append(apply({"params": params}, make_image(*size, 1, c.num_channels), True))
        compare(ours[-1], want, assert_close, f"{size}")
        assert ours[-1].class_tokens == c.class_token

    pixels, *places, spans = pack([make_image(*size, 1, c.num_channels) for size in sizes], c.patch_size, c.class_token)
    packed = jax.jit(lambda p, x, s, at, of: module.apply(p, x, True, segments=s, coordinates=at, grids=of))(
        {"params": params}, pixels, *places
    )
    assert packed.pooler_output is None and np.isfinite(packed.last_hidden_state).all()
    for want, span in zip(wanted, spans, strict=True):
        assert_close(packed.last_hidden_state[:, span], want.last_hidden_state, 1e-4, "packed")
        for mine, their in zip(packed.hidden_states, want.hidden_states, strict=True):
            assert_close(mine[:, span], their, 1e-4, "packed, hidden state")

    write(family, module, params, folder / "ours")
    opened, report = type(reference).from_pretrained(folder / "ours", output_loading_info=True)
    assert not any(report[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    kept = {name: tensor for name, tensor in reference.state_dict().items() if name not in ignored}
    assert opened.state_dict().keys() == kept.keys()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in opened.state_dict().items())
    compare(ours[0], theirs(opened, make_image(*sizes[0], 1, c.num_channels)), assert_close, "written")
    return module, params
