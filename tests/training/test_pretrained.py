"""Runs whose parts come from checkpoints: read onto their devices, named, checked, and found after a move."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from dataclasses import replace

import jax
import numpy as np
import pytest
import toy_data
from flax.traverse_util import flatten_dict
from tiny_language import WITH_IMAGES as CONFIG
from tiny_language import random_params, write_folder
from toy_data import DUAL, IMAGES, MODEL, PAIRS, quick_compilation

import mllm_jax
from mllm_jax.checkpoints.fields import change_fields
from mllm_jax.checkpoints.run import RunFolder
from mllm_jax.data.message import Image, Message, Text
from mllm_jax.errors import CheckpointError, ConfigError, RunFolderError
from mllm_jax.generation.assistant import Assistant
from mllm_jax.layers.compute import Compute
from mllm_jax.models.run_weights import load_run
from mllm_jax.sharding.mesh import MeshConfig
from mllm_jax.training.config import AdamW, CheckpointConfig, Experiment, Pretrained, Stage, TokenizerConfig
from mllm_jax.training.config_file import load_config
from mllm_jax.training.loop import train
from mllm_jax.training.objectives.contrastive import Contrastive
from mllm_jax.training.objectives.next_token import NextToken
from mllm_jax.training.operations.run_folder import open_run

pytestmark = pytest.mark.slow

ADAMW = AdamW(learning_rate=1e-2, warmup_steps=1)
ROWS = replace(IMAGES, length=128)

TOWER = Experiment(
    name="tower",
    model=MODEL,
    tokenizer=TokenizerConfig(vocab_size=320),
    mesh=MeshConfig(),
    seed=5,
    stages=(
        Stage("pairs", Contrastive(), ("encoder_image/*", "encoder_text/*", "heads/*"), PAIRS, 2, ADAMW, model=DUAL),
        Stage("later", NextToken(), ("llm/*",), IMAGES, 1, ADAMW),
    ),
)


def experiment(llm, tower, **changes) -> Experiment:
    """Makes an experiment: a new projector for a frozen LLM and image encoder, then the LLM too."""
    config = mllm_jax.pretrained_config(llm)
    projector = replace(MODEL.image.projector, output_size=config.hidden_size)
    made = Experiment(
        name="joined",
        model=replace(MODEL, inputs={"image": replace(MODEL.image, projector=projector)}, llm=config),
        tokenizer=TokenizerConfig(vocab_size=CONFIG.vocab_size, folder=str(llm)),
        pretrained=(Pretrained("llm", str(llm)), Pretrained("encoder_image", str(tower), "pairs", made_by=TOWER)),
        checkpoint=CheckpointConfig(every_steps=1),
        stages=(
            Stage("align", NextToken(), ("projector_image/*",), ROWS, 2, ADAMW),
            Stage("instruct", NextToken(), ("projector_image/*", "llm/*"), ROWS, 2, ADAMW),
        ),
    )
    return replace(made, **changes)


@pytest.fixture(scope="module", autouse=True)
def setting():
    """Compiles quickly; the toy source poses as a class of the package, as stored configs name only those."""
    with quick_compilation(), pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "mllm_jax.toy_data", toy_data)
        patch.setattr(toy_data.Toy, "__module__", "mllm_jax.toy_data")
        yield


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Returns (LLM folder, folder of the run that makes the image encoder)."""
    folder = tmp_path_factory.mktemp("sources")
    return write_folder(folder / "llm", CONFIG), folder / "tower"


@pytest.fixture(scope="module")
def run(sources, tmp_path_factory):
    """Trains the whole run, once, on two devices."""
    return train(experiment(*sources), tmp_path_factory.mktemp("runs") / "run", devices=jax.devices()[:2])


@pytest.fixture
def copy(run, sources, tmp_path):
    """Copies of the run and its sources, with the config that names them: a test may break them."""
    shutil.copytree(sources[0].parent, tmp_path / "sources")
    shutil.copytree(run.path, tmp_path / "run")
    moved = experiment(tmp_path / "sources" / "llm", tmp_path / "sources" / "tower")
    return moved, tmp_path / "run", tmp_path / "sources"


def snapshot(folder: RunFolder, index: int, stage: str) -> dict[str, np.ndarray]:
    """Reads every leaf that a stage trained, without the library."""
    import orbax.checkpoint as ocp

    where = folder.snapshot(index, stage)
    paths = list(json.loads((where / "record.json").read_text())["leaves"])
    request = ocp.args.PyTreeRestore(
        item=dict.fromkeys(paths, 0), restore_args={p: ocp.RestoreArgs(restore_type=np.ndarray) for p in paths}
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        return reader.restore(where / "arrays", args=request)


def meta(folder: RunFolder, index: int, stage: str) -> dict:
    return json.loads((folder.snapshot(index, stage) / "record.json").read_text())["meta"]


def flat(tree: dict) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in flatten_dict(tree, sep="/").items()}


def assert_equal(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    assert ours.keys() == theirs.keys()
    for path in ours:
        np.testing.assert_array_equal(ours[path], theirs[path], err_msg=path)


def test_parts_begin_with_what_their_sources_hold(run, sources):
    """Checks a run cut after its first stage, which trained only the projector: its other parts equal the sources."""
    shutil.rmtree(run.snapshot(1, "instruct"))  # `load_run` then gives the parameters before the second stage
    _, _, params, _, _ = load_run(run, jax.devices()[:2])
    assert_equal(flat(params["llm"]), flat(random_params(CONFIG)))
    tower = snapshot(RunFolder(sources[1]), 0, "pairs")
    assert_equal(
        flat({"encoder_image": params["encoder_image"]}),
        {k: v for k, v in tower.items() if k.startswith("encoder_image/")},
    )
    # The same command trains the missing stage.
    train(experiment(*sources), run.path, devices=jax.devices()[:2])
    after = snapshot(run, 1, "instruct")
    changed = [k for k, v in after.items() if k.startswith("llm/") and (v != flat(params)[k]).any()]
    assert len(changed) == len(flat(params["llm"])), "the second stage did not train the LLM"


def test_the_tower_was_made_by_its_own_experiment_up_to_its_stage(run, sources):
    tower = RunFolder(sources[1])
    assert tower.experiment() == TOWER and tower.unfinished(TOWER) == ["later"]
    train(TOWER, tower.path, devices=jax.devices()[:2])  # continues it, like any run
    assert tower.unfinished(TOWER) == []


def test_checkpoints_name_the_sources_and_what_they_held(run, sources):
    llm, tower = (f"pretrained({folder})" for folder in (sources[0], f"{sources[1]}, stage pairs"))
    align, instruct = meta(run, 0, "align"), meta(run, 1, "instruct")
    assert align["frozen"]["sources"] == {"": "init(seed=0)", "llm/*": llm, "encoder_image/*": tower}
    named = instruct["frozen"]["sources"]
    assert named["encoder_image/*"] == tower and named["projector_image/*"] == "stages/0-align"
    for found, parts in ((align, {"llm", "encoder_image"}), (instruct, {"encoder_image"})):
        assert {path.split("/")[0] for path in found["frozen"]["fingerprint"]} == parts
    assert json.loads((run.path / "run.json").read_text())["pretrained"] == {"llm/*": llm, "encoder_image/*": tower}
    assert not any(path.startswith(("llm", "encoder")) for path in snapshot(run, 0, "align")), "frozen, yet written"


def test_a_finished_run_answers_with_the_models_own_tokens(run, sources):
    _, model, params, processor, mesh = load_run(run, jax.devices()[:2])
    assert processor.tokenizer.vocab_size == CONFIG.vocab_size and "messages" in processor.tokenizer.template
    pixels = np.zeros((MODEL.image.encoder.image_size,) * 2 + (3,), np.uint8)
    asked = Message("user", (Image(pixels), Text("what colour")))
    answer = Assistant(model, params, processor, mesh=mesh).generate([asked], max_new_tokens=3)
    assert len(answer.tokens) == 3 or answer.reason == "stop"


def test_sources_may_move(copy):
    moved, run, sources = copy
    shutil.rmtree(run / "stages" / "1-instruct")
    train(moved, run, devices=jax.devices()[:2])  # resumes from its checkpoint of step 1
    assert RunFolder(run).experiment() == moved
    assert meta(RunFolder(run), 1, "instruct")["frozen"]["sources"]["llm/*"].startswith("pretrained(")
    with pytest.raises(RunFolderError, match=r"tokenizer.system"):
        train(replace(moved, tokenizer=replace(moved.tokenizer, system="be brief")), run)


@pytest.mark.parametrize("part", ["llm", "encoder_image"])
def test_sources_may_not_change(copy, part):
    """Checks that no stage, finished or begun, continues with other weights, and that none can be evaluated."""
    moved, run, sources = copy
    if part == "llm":
        shutil.rmtree(run / "stages" / "1-instruct")  # it trained the LLM: after it, the LLM's source does not matter
        mllm_jax.save_pretrained(CONFIG.make(), random_params(CONFIG, seed=1), sources / "llm", overwrite=True)
        moved = replace(moved, tokenizer=TokenizerConfig(vocab_size=CONFIG.vocab_size, folder=moved.tokenizer.folder))
    else:
        shutil.rmtree(sources / "tower")
        other = replace(moved.pretrained[1], made_by=replace(TOWER, seed=6))
        moved = replace(moved, pretrained=(moved.pretrained[0], other))
    with pytest.raises(CheckpointError, match=f"{part}/"):
        train(moved, run, devices=jax.devices()[:2])
    with pytest.raises(CheckpointError, match=f"{part}/"):
        load_run(RunFolder(run), jax.devices()[:2])
    shutil.rmtree(run / "stages")  # now the first stage has only begun
    with pytest.raises(CheckpointError, match=f"{part}/"):
        train(moved, run, devices=jax.devices()[:2])


def test_a_run_opens_by_what_it_holds_and_draws_nothing_again(copy, monkeypatch):
    """Checks that nothing is drawn twice, with other last bits under another jax or CPU (TRIAL, row 2)."""
    moved, run, sources = copy
    open_run(run, moved)  # it now refers to the copies
    whole = flat(load_run(RunFolder(run), jax.devices()[:2])[2])
    held = json.loads((run / "initial" / "record.json").read_text())
    assert {path.split("/")[0] for path in held["meta"]["stored"]} == {"projector_image"}, (
        "what sources hold is referred to"
    )
    assert held["meta"]["fingerprint"].keys() == whole.keys()

    def draw(*_, **__):
        raise AssertionError("drawn again")

    monkeypatch.setattr("mllm_jax.training.pretrained.init_params", draw)
    shutil.rmtree(sources / "llm")  # trained by the last stage: no longer needed
    assert_equal(flat(load_run(RunFolder(run), jax.devices()[:1])[2]), whole)
    shutil.rmtree(sources / "tower" / "stages")
    with pytest.raises(CheckpointError, match="stage pairs has not ended"):
        load_run(RunFolder(run), jax.devices()[:1])


def test_a_self_contained_run_needs_no_sources(copy):
    moved, run, sources = copy
    whole = flat(load_run(RunFolder(run), jax.devices()[:2])[2])
    shutil.rmtree(run / "stages" / "1-instruct")
    train(moved, run, devices=jax.devices()[:2], self_contained=True)
    for folder in (sources / "llm", sources / "tower"):
        shutil.rmtree(folder)
    assert_equal(flat(load_run(RunFolder(run), jax.devices()[:2])[2]), whole)
    shutil.rmtree(run / "stages" / "1-instruct")  # the LLM then comes from the copy
    frozen = flat(load_run(RunFolder(run), jax.devices()[:2])[2])
    assert_equal({k: v for k, v in frozen.items() if k.startswith("llm/")}, flat({"llm": random_params(CONFIG)}))


@pytest.mark.parametrize("change", ["permuted", "template", "absent"])
def test_another_tokenizer_is_refused_by_name(copy, change):
    """Checks another tokenizer, whose ids have other words (ATTACK, F9)."""
    _, run, _ = copy
    file = run / "processor" / ("chat_template.jinja" if change == "template" else "tokenizer.json")
    if change == "template":
        file.write_text(file.read_text() + " ")
    if change == "permuted":
        stored = json.loads(file.read_text())
        vocabulary = stored["model"]["vocab"]
        first, second = list(vocabulary)[40:42]
        vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
        file.write_text(json.dumps(stored))
    if change == "absent":
        file.unlink()
    with pytest.raises(RunFolderError, match=file.name) as refusal:
        load_run(RunFolder(run), jax.devices()[:2])
    assert "was not trained with" in refusal.value.given


@pytest.mark.parametrize("damage", ["swapped", "initial", "a byte"])
def test_stages_of_another_run_are_refused(copy, damage, tmp_path):
    moved, run, _ = copy
    if damage == "swapped":
        other = train(replace(moved, seed=7), tmp_path / "other", devices=jax.devices()[:2], until="align")
        shutil.rmtree(run / "stages" / "0-align")
        shutil.copytree(other.path / "stages" / "0-align", run / "stages" / "0-align")
    elif damage == "initial":
        shutil.rmtree(run / "initial")
    else:
        file = max((run / "stages" / "1-instruct" / "arrays").rglob("*"), key=lambda p: p.stat().st_size * p.is_file())
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    with pytest.raises((CheckpointError, RunFolderError)):
        load_run(RunFolder(run), jax.devices()[:2])
    if damage == "initial":
        with pytest.raises(RunFolderError, match="initial"):
            train(moved, run, devices=jax.devices()[:2])


def test_strangers_files_in_a_snapshot_change_nothing(copy):
    _, run, _ = copy
    whole = flat(load_run(RunFolder(run), jax.devices()[:2])[2])
    for folder in (run / "stages" / "1-instruct", run / "initial"):
        for owner in (folder, folder / "arrays"):
            (owner / "notes.txt").write_text("mine")
    assert_equal(flat(load_run(RunFolder(run), jax.devices()[:2])[2]), whole)


def test_read_onto_a_mesh_each_part_lies_as_its_axes_say(run, sources, devices):
    from mllm_jax.models.registry import abstract_init
    from mllm_jax.sharding.mesh import make_mesh, param_shardings
    from mllm_jax.training.pretrained import initial_params

    config = experiment(*sources, mesh=MeshConfig(data=2, fsdp=2, tensor=2))
    mesh, model = make_mesh(config.mesh, devices), config.model.make()
    params, shardings = initial_params(config, mesh)
    assert shardings == param_shardings(abstract_init(model, model.config.batch_spec().empty(), method="touch"), mesh)
    assert jax.tree.map(lambda x: x.sharding, params) == shardings
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(params["llm"]))
    assert_equal(flat(params["llm"]), flat(random_params(CONFIG)))
    # Parts without a source begin as in a run without sources.
    assert_equal(
        flat(params["projector_image"]),
        flat(initial_params(replace(config, pretrained=()), mesh)[0]["projector_image"]),
    )


# ---- refusals


def refused(error, config: Experiment, folder) -> str:
    with pytest.raises(error) as refusal:
        train(config, folder, devices=jax.devices()[:2])
    assert refusal.value.given and refusal.value.expected and refusal.value.todo
    return refusal.value.given


def test_another_model_is_refused_by_the_fields_that_differ(run, sources, tmp_path):
    config = experiment(*sources)
    llm = change_fields(config.model.llm, rope_theta=5e5, compute=Compute(scan_unroll=2, remat="full"))
    wide = replace(config.model, llm=llm)
    given = refused(ConfigError, replace(config, model=wide), tmp_path / "run")
    assert "rope_theta: 10000.0 -> 500000.0" in given and "remat" not in given
    deep = config.model.with_branch("image", encoder=replace(config.model.image.encoder, num_layers=2))
    given = refused(ConfigError, replace(config, model=deep), tmp_path / "other")
    assert "num_layers: 1 -> 2" in given


def test_absent_sources_are_refused(run, sources, tmp_path):
    config = experiment(*sources)
    llm, tower = config.pretrained
    absent = str(tmp_path / "nothing")
    assert absent in refused(
        CheckpointError, replace(config, pretrained=(replace(llm, folder=absent),)), tmp_path / "a"
    )
    nowhere = replace(tower, folder=absent, made_by=None)
    assert absent in refused(RunFolderError, replace(config, pretrained=(nowhere,)), tmp_path / "b")
    unknown = replace(tower, stage="dreams", made_by=None)
    assert "'dreams'" in refused(ConfigError, replace(config, pretrained=(unknown,)), tmp_path / "c")
    untrained = replace(tower, stage="later", made_by=None)
    given = refused((CheckpointError, ConfigError), replace(config, pretrained=(untrained,)), tmp_path / "d")
    assert "encoder" in given or "has not ended" in given


@pytest.mark.parametrize(
    "pretrained,given",
    [
        ((Pretrained("brain", "x"),), "['brain']"),
        ((Pretrained("llm", "x"), Pretrained("llm", "y")), "['llm', 'llm']"),
        ((Pretrained("encoder_text", "x"),), "['encoder_text']"),
    ],
    ids=str,
)
def test_parts_that_the_model_has_not_are_refused(sources, pretrained, given):
    with pytest.raises(ConfigError) as refusal:
        experiment(*sources, pretrained=pretrained)
    assert given in refusal.value.given and "projector" in refusal.value.expected


def test_contradictions_are_refused():
    with pytest.raises(ConfigError, match="stage 'dreams' made by experiment 'tower'"):
        Pretrained("encoder_image", "x", "dreams", made_by=TOWER)
    for wrong in ({"path": "a", "folder": "b"}, {"system": "be brief"}):
        with pytest.raises(ConfigError, match="TokenizerConfig"):
            TokenizerConfig(**wrong)


# ---- the command line


def test_sources_are_options_of_the_command_line(sources, tmp_path, monkeypatch):
    """Checks that every leaf of a config can be changed there, those of `pretrained` too."""
    import mllm_jax.training.loop as loop
    from mllm_jax.cli import main
    from mllm_jax.training.operations.stopping import Interrupted

    seen = {}

    def train(config, folder, **_):
        seen["config"] = config
        raise Interrupted("stopped before the first step")

    monkeypatch.setattr(loop, "train", train)
    file = tmp_path / "joined.py"
    file.write_text(
        f"import sys\nsys.path.insert(0, {str(__file__).rpartition('/')[0]!r})\nimport test_pretrained as t\n"
        f"def config():\n    return t.experiment({str(sources[0])!r}, 'somewhere')\n"
    )
    assert dataclasses.asdict(load_config(file))["pretrained"][1]["folder"] == "somewhere"
    arguments = [
        "--run-dir",
        str(tmp_path / "run"),
        "--pretrained.1.folder",
        "elsewhere",
        "--tokenizer.system",
        "brief",
    ]
    assert main(["train", str(file), *arguments]) == 130
    assert seen["config"].pretrained[1].folder == "elsewhere" and seen["config"].pretrained[1].stage == "pairs"
    assert seen["config"].tokenizer.system == "brief" and seen["config"].pretrained[1].made_by == TOWER
