"""configs/nextgpt_7b.py: its sizes, part by part, and what each stage trains."""

from __future__ import annotations

import jax
from tiny_runs import ROOT

from mllm_jax.models.params import placed_params
from mllm_jax.sharding.mesh import MeshConfig, make_mesh
from mllm_jax.training.config_file import load_config
from mllm_jax.training.partition import num_parameters, trains

GENERATORS = {
    "image": {"text_encoder": 123_060_480, "unet": 859_520_964, "vae": 83_653_863},
    "video": {"text_encoder": 340_387_840, "unet": 1_411_233_860, "vae": 83_653_863},
    "audio": {
        "text_encoder": 125_302_016,
        "text_encoder_2": 341_231_104,
        "projection_model": 1_184_256,
        "language_model": 124_439_808,
        "unet": 346_943_496,
        "vae": 55_376_873,
        "vocoder": 55_265_025,
    },
}


def test_the_parts_have_the_published_sizes():
    experiment = load_config(ROOT / "configs" / "nextgpt_7b.py")
    placed = placed_params(experiment.model_of().make(), make_mesh(MeshConfig(), jax.devices()[:1]))
    for modality, wanted in GENERATORS.items():
        assert {n: num_parameters(tree) for n, tree in placed[f"generator_{modality}"].items()} == wanted, modality
    counts = {name: num_parameters(tree) for name, tree in placed.items()}
    assert sum(counts.values()) == 11_254_009_400
    assert counts["llm"] == 6_738_415_616 + 2 * 64 * 4096, "Vicuna with 64 more rows in embedding and head"
    tokens = {m: output.projector.tokens for m, output in experiment.model_of().outputs.items()}
    assert tokens == {"image": 4, "video": 24, "audio": 8}
    trained = [{name for name in counts if trains(stage.trainable, name)} for stage in experiment.stages]
    inputs, outputs = (
        {name for name in counts if name.startswith(kind)} for kind in ("projector_", "output_projector_")
    )
    assert trained == [inputs, outputs, {*inputs, *outputs, "llm"}]
    assert [stage.signal_tokens for stage in experiment.stages] == [False, True, False]
