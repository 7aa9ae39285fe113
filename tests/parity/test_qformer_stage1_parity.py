"""BLIP-2's first stage against losses and gradients recorded from LAVIS: tests/goldens/blip2_qformer_stage1.json."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from qformer_reference import LAVIS, golden, golden_config
from safetensors.numpy import save_file

from mllm_jax.checkpoints.hf import hub_tensors, read_weights
from mllm_jax.checkpoints.table import Table, Weight
from mllm_jax.encoders.vit import VisionOutput
from mllm_jax.layers.norms import LayerNorm
from mllm_jax.models.blip2_stage1 import QFormerPretrainingConfig
from mllm_jax.projectors.qformer_hub import qformer_weights
from mllm_jax.training.objectives.qformer import QFormerStage1
from mllm_jax.training.step import make_apply


@dataclasses.dataclass(frozen=True)
class LastNorm:
    """An encoder with only its last norm: the reference was recorded from the input of that norm."""

    grid: int = 2
    dtype: str = "float32"

    def make(self):
        return LastNormModule()


class LastNormModule(nn.Module):
    @nn.compact
    def __call__(self, pixels):
        return VisionOutput(LayerNorm(1e-5, name="norm")(pixels), None, None)


@dataclasses.dataclass(frozen=True)
class Drawn(QFormerStage1):
    """Uses the negatives that the reference drew."""

    picks: tuple = ()

    def negatives(self, key, to_image, to_text):
        return tuple(map(jnp.asarray, self.picks))


def linear(name: str, path: str) -> tuple[Weight, Weight]:
    return Weight(f"{name}.weight", f"{path}/kernel", "o i -> i o"), Weight(f"{name}.bias", f"{path}/bias")


def table(config) -> Table:
    head = "Qformer.cls.predictions"
    return Table(
        (
            *qformer_weights(config.projector, **LAVIS),
            Weight("ln_vision.weight", "encoder_image/norm/scale"),
            Weight("ln_vision.bias", "encoder_image/norm/bias"),
            *linear("vision_proj", "image_projection"),
            *linear("text_proj", "text_projection"),
            *linear("itm_head", "matching"),
            Weight("temp", "temperature"),
            *linear(f"{head}.transform.dense", "caption_dense"),
            Weight(f"{head}.transform.LayerNorm.weight", "caption_norm/scale"),
            Weight(f"{head}.transform.LayerNorm.bias", "caption_norm/bias"),
            Weight(f"{head}.bias", "caption_bias"),
        )
    )


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Returns (arrays, config, parameters, batch)."""
    arrays, sizes = golden("blip2_qformer_stage1")
    config = QFormerPretrainingConfig(
        LastNorm(), golden_config(sizes), sizes["embed_dim"], decode_token_id=sizes["bos_token_id"]
    )
    images = arrays["inputs/image_embeds"][:, None]
    real = arrays["inputs/text_attention_mask"].astype(np.int32)
    tokens = arrays["inputs/text_input_ids"].astype(np.int32)
    batch = {n: jnp.asarray(x) for n, x in dict(images=images, tokens=tokens, segments=real).items()}
    abstract = jax.eval_shape(lambda: config.make().init(jax.random.key(0), batch, method="touch"))["params"]
    folder = tmp_path_factory.mktemp("stage1")
    names = {line.name.split(".{")[0] for line in table(config).weights}
    tensors = {n.removeprefix("weights/"): arrays[n] for n in arrays.files if n.startswith("weights/")}
    kept = {n: t for n, t in tensors.items() if n.startswith(tuple(names))}
    # The tied output table and the two names of its bias are stored too.
    left = sorted(n for n in tensors if n not in kept)
    assert left == ["Qformer.bert.embeddings.position_ids", "Qformer.cls.predictions.decoder.bias",
                    "Qformer.cls.predictions.decoder.weight"]  # fmt: skip
    save_file({n: t.copy(order="C") for n, t in kept.items()}, folder / "model.safetensors")
    return arrays, config, read_weights(folder, table(config), nn.meta.unbox(abstract)), batch


def drawn(arrays, suffix: str = "", **options) -> Drawn:
    picks = (tuple(arrays[f"inputs/itm_neg_{kind}_idx{suffix}"].tolist()) for kind in ("image", "text"))
    return Drawn(picks=tuple(picks), **options)


@pytest.mark.parametrize("gathered,stored", [(False, "ddp_nograd_gather"), (True, "full")])
def test_losses_and_gradients(recorded, gathered, stored, assert_close):
    arrays, config, params, batch = recorded
    objective, apply = drawn(arrays, gathered_gradient=gathered), make_apply(config.make())
    gradient = jax.jit(jax.value_and_grad(lambda p: objective.loss(apply, p, batch, None), has_aux=True))
    (loss, metrics), grads = gradient(params)
    for ours, theirs in (("itc", "itc"), ("itm", "itm"), ("itg", "lm")):
        assert_close(metrics[f"loss_{ours}"], arrays[f"outputs/loss_{theirs}"], 1e-5, ours)
    assert_close(loss, arrays["outputs/loss"], 1e-5, "sum")
    assert metrics["weight"] == 4 and metrics["temperature"] == np.float32(0.07)
    assert metrics["recall_at_1"] == (arrays["outputs/sim_i2t"].argmax(axis=1) == np.arange(4)).mean()
    right = arrays["outputs/itm_logits"].argmax(axis=1) == arrays["outputs/itm_labels"]
    assert_close(metrics["matching_accuracy"], right.mean(), 1e-6, "matching accuracy")
    mine = hub_tensors(table(config), grads)
    names = [name for name in arrays.files if name.startswith(f"grads/{stored}/")]
    assert len(names) == 12
    for name in names:
        assert_close(mine[name.removeprefix(f"grads/{stored}/")](), arrays[name], 1e-4, name)


def test_two_images_of_one_thing_are_no_negatives(recorded, assert_close):
    arrays, config, params, batch = recorded
    objective, apply = drawn(arrays, "_image_id"), make_apply(config.make())
    batch = batch | dict(image_ids=jnp.asarray(arrays["inputs/image_id"], jnp.int32))
    _, metrics = jax.jit(lambda p: objective.loss(apply, p, batch, None))(params)
    for name in ("itc", "itm"):
        assert_close(metrics[f"loss_{name}"], arrays[f"outputs/image_id/loss_{name}"], 1e-5, name)


def test_what_the_heads_say(recorded, assert_close):
    arrays, config, params, batch = recorded
    module = config.make()

    @jax.jit
    def heads(params):
        pairs = module.apply({"params": params}, batch, method="encode_pairs")
        return pairs, module.apply({"params": params}, batch), module.apply(
            {"params": params}, batch | {"cache": pairs.cache}, method="write"
        )  # fmt: skip

    pairs, scores, logits = heads(params)
    assert_close(pairs.features, arrays["outputs/image_embeds_after_ln_vision"], 1e-5, "features")
    assert_close(pairs.image, arrays["outputs/image_feats"], 1e-5, "images")
    assert_close(pairs.text, arrays["outputs/text_feat"], 1e-5, "texts")
    assert_close(scores.similarity / pairs.temperature, arrays["outputs/sim_i2t"], 1e-5, "similarity")
    # The reference gives the logit of a match.
    assert_close(scores.matching[:, 1], arrays["outputs/compute_itm_score"], 1e-5, "matching")
    assert_close(logits, arrays["outputs/itg/logits"], 1e-5, "captions")


def test_negatives_are_drawn_as_the_reference_draws_them(recorded):
    """Compares the shares of 20,000 draws with the reference's probabilities, which are 0 for a pair itself."""
    arrays, _, _, _ = recorded
    own = jnp.eye(4, dtype=bool)
    to_image, to_text = (jnp.where(own, -1e4, arrays[f"outputs/sim_{way}"]) for way in ("t2i", "i2t"))
    keys = jax.random.split(jax.random.key(0), 20_000)
    picks = jax.vmap(lambda key: QFormerStage1().negatives(key, to_image, to_text))(keys)
    for drawn_rows, way in zip(picks, ("t2i", "i2t"), strict=True):
        shares = (np.asarray(drawn_rows)[..., None] == np.arange(4)).mean(axis=0)
        np.testing.assert_allclose(shares, arrays[f"outputs/weights_{way}"], atol=0.015)
        assert not shares[np.eye(4, dtype=bool)].any()
