"""Signal tokens of a pretrained LLM: new rows of its tables, which train while all other rows stay bit for bit."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from tiny_drawing import GENERATOR, MAPPER, SIZE, WIDTH, Drawings
from tiny_language import WITH_IMAGES, random_params, write_folder
from toy_data import MODEL, kept_programs, quick_compilation

from mllm_jax import AdamW, Experiment, Mixture, NextToken, Pretrained, Stage, TokenizerConfig, Weighted
from mllm_jax.checkpoints.run import RunFolder
from mllm_jax.errors import ConfigError
from mllm_jax.generators.unet import UNetConfig, UNetDialect
from mllm_jax.models.multimodal import MultimodalConfig
from mllm_jax.models.output import Output
from mllm_jax.models.params import placed_params
from mllm_jax.models.part_sources import read_source
from mllm_jax.models.reshape import NOISE
from mllm_jax.models.run_weights import initial_meta, load_run, params_of
from mllm_jax.planning.plan import make_plan
from mllm_jax.planning.topologies import topology
from mllm_jax.sharding.mesh import MeshConfig, make_mesh
from mllm_jax.training.config import CheckpointConfig
from mllm_jax.training.loop import train
from mllm_jax.training.objectives.output_alignment import OutputAlignment
from mllm_jax.training.own_tokenizer import vocabulary_of

LLM = replace(WITH_IMAGES, hidden_size=32, num_layers=1, max_position_embeddings=128)
DATA = Mixture((Weighted(Drawings(reads=False)),), rows=2, length=112, slots={"image_targets": 5})
# The smallest generator, of which only the text encoder computes anything here.
UNET = UNetConfig(
    sample_size=(SIZE,),
    in_channels=3,
    out_channels=3,
    channels=(4,),
    layers=(1,),
    num_heads=(1,),
    text_sizes=((WIDTH,),),
    depths=(1,),
    down_blocks=("CrossAttnDownBlock2D",),
    mid_block=None,
    up_blocks=("UpBlock2D",),
    dialect=UNetDialect(norm_groups=4, only_cross=(False,)),
)
OUTPUT = Output(MAPPER, replace(GENERATOR, unet=UNET))
HELD, SIGNALS, TOKENS = LLM.vocab_size, 3, 268  # rows of the folder, signal tokens, rows of the model
TABLES = {
    True: {"llm/token_embedding/embedding": 0},
    False: {"llm/token_embedding/embedding": 0, "llm/lm_head/kernel": 1},
}
OPTIMIZER = AdamW(learning_rate=3e-2, warmup_steps=0, weight_decay=0.3, schedule="constant")


@pytest.fixture(scope="module", autouse=True)
def quick(tmp_path_factory):
    """Compiles quickly, and what several runs have in common once."""
    with quick_compilation(), kept_programs(tmp_path_factory.mktemp("programs")):
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Returns the folders of the LLM with a tied head and with one of its own."""
    base = tmp_path_factory.mktemp("folders")
    return {tied: write_folder(base / str(tied), replace(LLM, tie_word_embeddings=tied)) for tied in (True, False)}


def experiment(folder, tied: bool, size: int = TOKENS, **stage) -> Experiment:
    how = dict(
        name="signals",
        objective=OutputAlignment(),
        trainable=("output_projector_image/*",),
        data=DATA,
        steps=3,
        optimizer=OPTIMIZER,
        signal_tokens=True,
    )
    llm = replace(LLM, vocab_size=size, tie_word_embeddings=tied)
    return Experiment(
        name="signals",
        model=MultimodalConfig({}, llm, outputs={"image": OUTPUT}),
        tokenizer=TokenizerConfig(folder=str(folder)),
        pretrained=(Pretrained("llm", str(folder)),),
        stages=(Stage(**how | stage),),
        seed=4,
        log_every=1,
    )


def of_source(made: Experiment) -> dict:
    """Returns what the LLM's folder gives."""
    mesh, [source] = make_mesh(MeshConfig(), jax.devices()[:1]), made.pretrained
    placed = placed_params(made.model_of().make(), mesh)
    return read_source(source, made, mesh, placed, vocabulary=vocabulary_of(made, source))


def flat(params) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in flatten_dict(params, sep="/").items()}


def begin(made: Experiment, run: RunFolder) -> dict:
    """Returns the parameters with which a run began."""
    return params_of(made, run, made.compositions, make_mesh(MeshConfig(), jax.devices()[:1]), 0)[0]


def of_run(run) -> dict[str, np.ndarray]:
    return flat(load_run(RunFolder(run), jax.devices()[:1])[2])


def rows(leaves: dict[str, np.ndarray], tied: bool) -> dict[str, np.ndarray]:
    """Returns the tables with their tokens first."""
    return {path: np.moveaxis(leaves[path], axis, 0) for path, axis in TABLES[tied].items()}


# ---- the rows of a larger vocabulary


@pytest.mark.parametrize("tied", [True, False])
def test_a_stored_llm_gets_more_tokens(folders, tied):
    """Checks that old rows are the stored ones, and that new ones are near their mean and differ from each other."""
    made = experiment(folders[tied], tied)
    found = flat(of_source(made))
    stored = rows(flat({"llm": random_params(replace(LLM, tie_word_embeddings=tied))}), tied)
    for path, table in rows(found, tied).items():
        assert len(table) == TOKENS
        np.testing.assert_array_equal(table[:HELD], stored[path], err_msg=path)
        noise = (table[HELD:] - stored[path].mean(axis=0)) / stored[path].std()
        assert 0.5 * NOISE < noise.std() < 2 * NOISE, path
        assert len(np.unique(table[HELD:], axis=0)) == TOKENS - HELD, path
    others = [path for path in found if path.startswith("llm/") and path not in TABLES[tied]]
    plain = flat({"llm": random_params(replace(LLM, tie_word_embeddings=tied))})
    assert others and all(np.array_equal(found[path], plain[path]) for path in others)


def test_fewer_tokens_than_the_folder_are_refused(folders):
    with pytest.raises(ConfigError, match="model.llm, which is another model:\n  vocab_size"):
        made = experiment(folders[True], True)
        small = replace(made.model, llm=replace(made.model.llm, vocab_size=HELD - 1))
        of_source(replace(made, model=small))


# ---- training


@pytest.fixture(scope="module")
def runs(folders, tmp_path_factory):
    """Trains three steps with both heads, on one device and on a mesh that splits the tables both ways."""
    base, found = tmp_path_factory.mktemp("runs"), {}
    meshes = {1: MeshConfig(), 4: MeshConfig(data=1, fsdp=2, tensor=2)}
    for tied, devices in ((True, 1), (False, 4)):
        run = base / f"{tied}-{devices}"
        made = replace(experiment(folders[tied], tied), mesh=meshes[devices])
        if tied:  # in another dtype, and with a later stage, which begins with the trained rows
            first = replace(made.stages[0], frozen_dtype="bfloat16")
            later = replace(first, name="later", trainable=("llm/final_norm/*",), signal_tokens=False, steps=1)
            made = replace(made, stages=(first, later))
        train(made, run, devices=jax.devices()[:devices])
        begun = flat(begin(made, RunFolder(run)))
        found[tied, devices] = SimpleNamespace(run=RunFolder(run), made=made, begun=begun, ended=of_run(run))
    return found


@pytest.mark.parametrize("tied,devices", [(True, 1), (False, 4)])
def test_only_the_rows_of_signal_tokens_change(runs, tied, devices):
    run = runs[tied, devices]
    tokens = range(HELD, HELD + SIGNALS)
    before, after = rows(run.begun, tied), rows(run.ended, tied)
    for path in TABLES[tied]:
        changed = np.flatnonzero((before[path] != after[path]).any(axis=1))
        assert changed.tolist() == list(tokens), path
    trained = (*TABLES[tied], "output_projector_image/", *["llm/final_norm/"] * tied)
    others = [path for path in run.begun if not path.startswith(trained)]
    assert not [path for path in others if not np.array_equal(run.begun[path], run.ended[path])]


def test_checkpoints_and_optimizer_hold_the_rows_alone(runs):
    """Checks the leaves of the last checkpoint; the finished stage has whole tables, which later stages continue."""
    run = runs[False, 4].run
    [record] = (run.path / "checkpoints").rglob("00000003/record.json")
    leaves = json.loads(record.read_text())["leaves"]
    ours = {path: shape for path, (shape, _) in leaves.items() if "/llm/" in path}
    assert len(ours) == 6 and all(SIGNALS in shape and TOKENS not in shape for shape in ours.values()), ours
    assert set(initial_meta(run)["stored"]) >= set(TABLES[False]), "the rows are drawn once"


def test_gradients_are_those_of_the_whole_tables(folders):
    """Checks a step's gradient of the rows against the gradient of whole tables, at the rows."""
    from mllm_jax.training.features import stage_spec
    from mllm_jax.training.partition import Partition, join
    from mllm_jax.training.stage import build_stage, partition_of
    from mllm_jax.training.step import make_apply

    made = experiment(folders[False], False)
    [stage], mesh, model = made.stages, make_mesh(MeshConfig(), jax.devices()[:1]), made.model_of().make()
    spec, rng = stage_spec(made, stage), np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: jax.device_put(np.float32(0.3 * rng.normal(size=x.shape)), x.sharding), placed_params(model, mesh)
    )
    batch = spec.empty()
    ids = np.arange(HELD, HELD + SIGNALS)
    batch["tokens"] = rng.integers(0, HELD, batch["tokens"].shape).astype(np.int32)
    batch["tokens"][:, 10:13] = ids
    batch["segments"][:] = 1
    batch["loss_weights"][:] = 1
    batch["image_signals"][:] = -1
    batch["image_signals"][:, 0] = [10, 11, 12]
    batch["image_captions"] = rng.integers(0, 250, batch["image_captions"].shape).astype(np.int32)
    partition = partition_of(stage, model, SimpleNamespace(id_of=lambda name: HELD + int(name[-2])))
    assert partition.rows.ids == tuple(ids) and partition.rows.axes == TABLES[False]
    apply, key = make_apply(model), jax.random.key(0)

    def gradient(joined, trees):
        loss = lambda ours, frozen: stage.objective.loss(apply, joined(ours, frozen), batch, key)[0]  # noqa: E731
        return flat(jax.jit(jax.grad(loss))(*trees))

    found = gradient(partition.join, partition.split(params))
    whole = Partition(("output_projector_image/*", "llm/token_embedding/*", "llm/lm_head/*"))
    expected = gradient(join, whole.split(params))
    for path, axis in TABLES[False].items():
        ours, theirs = (
            found[path.replace("embedding/e", "embedding/new_e").replace("/kernel", "/new_kernel")],
            expected[path],
        )
        assert np.abs(ours).max() > 1e-6
        np.testing.assert_allclose(ours, np.take(theirs, ids, axis=axis), rtol=1e-4, atol=1e-7, err_msg=path)
    program = build_stage(made, 0, mesh, spec)
    assert jax.tree.leaves(program.state.params["llm"])[0].dtype == jnp.float32


def test_a_run_that_goes_on_gives_the_same_bits(folders, runs, tmp_path):
    parts = [experiment(folders[True], True, steps=steps, frozen_dtype="bfloat16") for steps in (2, 3)]
    one = jax.devices()[:1]
    train(replace(parts[0], checkpoint=CheckpointConfig(every_steps=1)), tmp_path / "parts", devices=one)
    train(parts[1], tmp_path / "parts", devices=one)
    found, expected = of_run(tmp_path / "parts"), runs[True, 1].ended
    for path, leaf in expected.items():
        if not path.startswith("llm/final_norm/"):  # a later stage of that run
            np.testing.assert_array_equal(found[path], leaf, err_msg=path)


# ---- plans and refusals


def test_a_plan_counts_rows(folders):
    """Checks trained parameters and the optimizer of a plan: the projector's and the rows of both tables."""
    made = replace(experiment(folders[False], False), mesh=MeshConfig(data=1, fsdp=1))
    plans = [make_plan(made, topology("1xh100")) for made in (made, _without(made))]
    rows = 4 * 2 * SIGNALS * LLM.hidden_size
    assert plans[0].memory.parameters - plans[1].memory.parameters == rows
    assert plans[0].memory.optimizer - plans[1].memory.optimizer == 2 * rows
    assert plans[0].memory.frozen == plans[1].memory.frozen
    assert plans[0].model_flops["llm"].backward > plans[1].model_flops["llm"].backward


def _without(made: Experiment) -> Experiment:
    return replace(made, stages=(replace(made.stages[0], signal_tokens=False),))


def test_what_cannot_be_is_refused(folders):
    whole = replace(experiment(folders[True], True, trainable=("llm/*",)), mesh=MeshConfig(data=1, fsdp=1))
    with pytest.raises(ConfigError, match="token_embedding/embedding, which then trains with all rows"):
        make_plan(whole, topology("1xh100"))
    with pytest.raises(ConfigError, match="signal_tokens of a MultimodalConfig that writes none"):
        stage = Stage("s", NextToken(), ("llm/*",), replace(DATA, slots={"image": 1}), 1, signal_tokens=True)
        Experiment(name="e", model=MODEL, stages=(stage,))
