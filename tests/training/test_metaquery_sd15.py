"""configs/metaquery_sd15.py: its sizes, what it trains, and the plan of its step by part."""

from __future__ import annotations

import jax
import pytest
from tiny_runs import ROOT

from mllm_jax.models.params import placed_params
from mllm_jax.planning.plan import make_plan
from mllm_jax.planning.topologies import topology
from mllm_jax.sharding.mesh import MeshConfig, make_mesh
from mllm_jax.training.config_file import load_config
from mllm_jax.training.optimizer import learning_rate
from mllm_jax.training.partition import num_parameters

ROWS, WIDTH, QUERIES = 151_936, 896, 77


@pytest.fixture(scope="module")
def experiment():
    return load_config(ROOT / "configs" / "metaquery_sd15.py")


def test_the_parts_have_the_published_sizes(experiment):
    placed = placed_params(experiment.model_of().make(), make_mesh(MeshConfig(), jax.devices()[:1]))
    counts = {name: num_parameters(tree) for name, tree in placed.items()}
    # LLaVA-OneVision-0.5B counts a vector of a new line too, which a composed model of single tiles does not have.
    assert counts["encoder_image"] + counts["projector_image"] + counts["llm"] + WIDTH == 893_618_208
    generator = {name: num_parameters(tree) for name, tree in placed["generator_image"].items()}
    assert generator == {"text_encoder": 123_060_480, "unet": 859_520_964, "vae": 83_653_863}
    output = experiment.model_of().output("image")
    assert (output.projector.output_tokens, output.projector.output_size, output.projector.num_layers) == (77, 768, 24)
    assert output.projector.width == WIDTH and output.generator.target_shape == (512, 512, 3)


def test_the_learning_rate_is_the_published_one(experiment):
    [stage] = experiment.stages
    schedule = learning_rate(stage.optimizer, stage.steps)
    assert float(schedule(0)) == 0 and float(schedule(5_000)) == pytest.approx(1e-4)
    assert float(schedule(stage.steps)) == pytest.approx(1e-5) and stage.optimizer.clip_norm == 1.0


def test_a_plan_counts_every_part(experiment):
    """Checks the trained parameters, and the FLOPs of the connector, of the frozen LLM, and of the frozen generator."""
    plan = make_plan(experiment, topology("8xh100"))
    flops = plan.model_flops
    layers = 24 * (4 * WIDTH**2 + 3 * 4 * WIDTH**2) + 768 * (WIDTH + 768)
    images = 1024 * 2
    products = 2 * images * QUERIES * (layers + 24 * 2 * QUERIES * WIDTH)
    assert flops["output_projector_image"].forward == pytest.approx(products, rel=0.02)
    assert flops["output_projector_image"].backward == pytest.approx(2 * products, rel=0.02)
    # The UNet's gradient reaches the condition; its own parameters, the text encoder and the autoencoder have none.
    generator, llm = flops["generator_image"], flops["llm"]
    assert generator.forward > generator.backward > 0 and llm.backward > 0
    trained = plan.memory.parameters * 8 / 4
    assert trained == pytest.approx(layers + (QUERIES + 2) * WIDTH, rel=0.02)
    assert plan.memory.optimizer == pytest.approx(2 * plan.memory.parameters, rel=0.01)
