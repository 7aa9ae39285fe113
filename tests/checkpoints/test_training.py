"""Checkpoints survive kills, damage, full disks and other meshes, and are restored bit for bit."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mllm_jax.checkpoints import folder as folder_module
from mllm_jax.checkpoints.training import (
    TrainingCheckpoints,
    load_snapshot,
    save_snapshot,
    snapshot_meta,
)
from mllm_jax.errors import CheckpointError, ConfigError

META = {"stage": 1, "key": [0, 2**32 - 1], "config": {"name": "café", "rate": 3e-4, "none": None}, "best": float("inf")}


def state_at(step: int, size: int = 8) -> dict:
    return {"params": {"w": jnp.full((size, size), step, jnp.float32)}, "count": jnp.int32(step)}


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def assert_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def saved(folder: Path, steps, **options) -> TrainingCheckpoints:
    checkpoints = TrainingCheckpoints(folder, **options)
    for step in steps:
        checkpoints.save(step, state_at(step), {"step": step})
    checkpoints.wait()
    return checkpoints


def biggest(folder: Path) -> Path:
    return max((p for p in (folder / "arrays").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def mesh(count: int, *shape: int) -> Mesh:
    if len(jax.devices()) < count:
        pytest.skip(f"needs {count} devices")
    return Mesh(np.array(jax.devices()[:count]).reshape(shape), ("data", "tensor"))


# ---- round trips


def test_round_trip_is_bit_exact_for_every_dtype_and_optax_state(tmp_path):
    bits = np.random.default_rng(0).integers(0, 2**32, (5, 3), np.uint32)  # random bits include NaNs and denormals
    params = {
        "f32": jax.lax.bitcast_convert_type(jnp.array(bits), jnp.float32),
        "bf16": jax.lax.bitcast_convert_type(jnp.array(bits >> 16, jnp.uint16), jnp.bfloat16),
        "layer.0/odd name": {"u32": jnp.array(bits), "i32": jnp.array([-(2**31), 7], jnp.int32)},
        "bool": jnp.array([True, False]),
        "scalar": jnp.float32(-0.0),
        "empty": jnp.zeros((0, 3), jnp.bfloat16),
        "list": [jnp.ones(2), (jnp.zeros(1), None)],
    }
    trained = {"a": jnp.ones((2, 2)), "b": jnp.ones(3)}
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.masked(optax.adamw(1e-3), {"a": True, "b": False}), optax.scale(1.0)
    )
    state = {"params": params, "opt_state": optimizer.init(trained), "nothing": optax.EmptyState()}
    with TrainingCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(3, state, META)
        step, found, meta = checkpoints.restore(abstract(state))
    assert (step, meta) == (3, META)
    assert_bits(found, state)


def test_whole_entries_may_be_left_out_and_leaves_need_no_sharding(tmp_path):
    checkpoints = saved(tmp_path, [1])
    _, found, _ = checkpoints.restore({"params": {"w": jax.ShapeDtypeStruct((8, 8), jnp.float32)}})
    assert_bits(found, {"params": state_at(1)["params"]})
    assert not found["params"]["w"].committed


def test_donating_right_after_save_does_not_change_what_is_written(tmp_path):
    overwrite = jax.jit(lambda x: x * 0 + 7, donate_argnums=0)
    x = jax.random.normal(jax.random.key(0), (2048, 2048))
    overwrite(x + 0).block_until_ready()  # compiled now, so that it runs during the write
    expected, host = np.array(x), np.arange(6.0, dtype=np.float32)
    with TrainingCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"x": x, "host": host}, {})
        host[:] = -1
        overwrite(x).block_until_ready()
        assert not list(tmp_path.glob("00000001")), "the write was over before the donation: the test shows nothing"
        shapes = {
            "x": jax.ShapeDtypeStruct(expected.shape, jnp.float32),
            "host": jax.ShapeDtypeStruct((6,), np.float32),
        }
        _, found, _ = checkpoints.restore(shapes)
    np.testing.assert_array_equal(found["x"], expected)
    np.testing.assert_array_equal(found["host"], np.arange(6.0))


def test_restores_onto_another_mesh_and_device_count(tmp_path):
    eight, four = mesh(8, 4, 2), mesh(4, 2, 2)
    w = jax.random.normal(jax.random.key(1), (16, 8)).astype(jnp.bfloat16)
    state = {
        "w": jax.device_put(w, NamedSharding(eight, P("data", "tensor"))),
        "replicated": jax.device_put(jnp.arange(3), NamedSharding(eight, P())),
        "empty": jax.device_put(jnp.zeros((0, 4)), NamedSharding(eight, P())),
    }
    target = {
        "w": jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=NamedSharding(four, P("tensor", "data"))),
        "replicated": jax.ShapeDtypeStruct((3,), jnp.int32, sharding=NamedSharding(four, P())),
        "empty": jax.ShapeDtypeStruct((0, 4), jnp.float32, sharding=NamedSharding(four, P())),
    }
    with TrainingCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        _, found, _ = checkpoints.restore(target)
    assert_bits(found, state)
    for name, leaf in found.items():
        assert leaf.sharding == target[name].sharding
    assert found["w"].addressable_shards[0].data.shape == (8, 4)


# ---- which steps stay


def test_keeps_the_last_and_the_best(tmp_path):
    checkpoints = TrainingCheckpoints(tmp_path, keep_last=2, keep_best="loss")
    for step, loss in enumerate([5.0, 1.0, float("nan"), 3.0, 4.0]):
        checkpoints.save(step, state_at(step), {}, {"loss": loss})
    checkpoints.save(5, state_at(5), {})  # no evaluation at this step
    checkpoints.wait()
    assert checkpoints.steps() == [1, 4, 5] and checkpoints.latest() == 5 and checkpoints.best() == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00000001", "00000004", "00000005"]
    assert saved(tmp_path, [], keep_best="loss", best_mode="max").best() == 4
    with pytest.raises(CheckpointError, match="'loss'"):
        checkpoints.save(6, state_at(6), {}, {"accuracy": 1.0})


def test_a_step_is_replaced_whole(tmp_path):
    checkpoints = saved(tmp_path, [1])
    checkpoints.save(1, {**state_at(1), "count": jnp.int32(9)}, {"again": True})
    _, found, meta = checkpoints.restore(abstract(state_at(1)))
    assert int(found["count"]) == 9 and meta == {"again": True}
    assert [p.name for p in tmp_path.iterdir()] == ["00000001"]


# ---- damage


def cut(step: Path):
    path = biggest(step)
    os.truncate(path, path.stat().st_size // 2)


def remove(step: Path):
    biggest(step).unlink()


def flip(step: Path):
    path = biggest(step)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def unfinish(step: Path):
    (step / "manifest.json").unlink()


def cut_manifest(step: Path):
    os.truncate(step / "manifest.json", 40)


def other_manifest(step: Path):
    manifest = json.loads((step / "manifest.json").read_text())
    manifest["files"].popitem()
    (step / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "damage, words",
    [
        (cut, "bytes instead of"),
        (remove, "is missing"),
        (flip, "is corrupt"),
        (unfinish, "never finished"),
        (cut_manifest, "cannot be read"),
        (other_manifest, "is corrupt"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path, damage, words):
    checkpoints = saved(tmp_path, [1, 2])
    damage(tmp_path / "00000002")
    with pytest.warns(UserWarning, match=words):
        step, found, meta = checkpoints.restore(abstract(state_at(0)))
    assert (step, meta) == (1, {"step": 1}) and checkpoints.latest() == 1
    assert_bits(found, state_at(1))
    assert len(checkpoints.notes) == 1 and "step 2" in checkpoints.notes[0] and words in checkpoints.notes[0]
    with pytest.raises(CheckpointError, match=words):
        checkpoints.restore(abstract(state_at(0)), step=2)
    checkpoints.save(2, state_at(2), {"step": 2})  # the run continues and reaches that step again
    assert checkpoints.restore(abstract(state_at(0)))[0] == 2 and checkpoints.steps() == [1, 2]


def test_a_checkpoint_that_orbax_cannot_read_is_passed_over(tmp_path, monkeypatch):
    checkpoints = saved(tmp_path, [1, 2])
    whole = folder_module._read_arrays

    def failing(folder, leaves):
        if "00000002" in str(folder):
            raise OSError(errno.EIO, "Input/output error")
        return whole(folder, leaves)

    monkeypatch.setattr(folder_module, "_read_arrays", failing)
    with pytest.warns(UserWarning, match="Input/output error"):
        assert checkpoints.restore(abstract(state_at(0)))[0] == 1
    with pytest.raises(CheckpointError, match="Input/output error"):
        checkpoints.restore(abstract(state_at(0)), step=2)


def test_when_none_is_left_each_is_named_with_its_reason(tmp_path):
    checkpoints = saved(tmp_path, [1, 2])
    cut(tmp_path / "00000001")
    flip(tmp_path / "00000002")
    (tmp_path / "00000003.writing").mkdir()
    with pytest.raises(CheckpointError) as caught:
        checkpoints.restore(abstract(state_at(0)))
    text = str(caught.value)
    assert "step 1: " in text and "bytes instead of" in text and "step 2: " in text and "corrupt" in text
    assert "step 3: its save was interrupted" in text
    with pytest.raises(CheckpointError, match="step 7"):
        checkpoints.restore(abstract(state_at(0)), step=7)


def test_trees_that_do_not_match_are_listed_at_once_and_nothing_is_passed_over(tmp_path):
    checkpoints = saved(tmp_path, [1, 2])
    wanted = {
        "params": {"w": jax.ShapeDtypeStruct((4, 8), jnp.float32), "v": jax.ShapeDtypeStruct((), jnp.float32)},
        "count": jax.ShapeDtypeStruct((), jnp.uint32),
    }
    with pytest.raises(CheckpointError) as caught:
        checkpoints.restore(wanted)
    text = str(caught.value)
    assert "3 of 3 leaves" in text and "count: int32[] in" in text and "params/v: absent" in text
    assert "params/w: float32[8, 8] in the checkpoint, float32[4, 8] asked for" in text
    assert not checkpoints.notes and checkpoints.latest() == 2


def test_what_cannot_be_stored_is_refused_before_anything_is_written(tmp_path):
    checkpoints = TrainingCheckpoints(tmp_path)
    for meta, where in [({"a": [1, (2,)]}, r"meta\['a'\]\[1\] is tuple"), ({"p": tmp_path}, "Path"), ({1: 2}, "dict")]:
        with pytest.raises(CheckpointError, match=where):
            checkpoints.save(1, state_at(1), meta)
    with pytest.raises(CheckpointError, match="key_data"):
        checkpoints.save(1, {"key": jax.random.key(0)}, {})
    with pytest.raises(CheckpointError, match="same path"):
        checkpoints.save(1, {"a/b": jnp.ones(1), "a": {"b": jnp.ones(1)}}, {})
    with pytest.raises(CheckpointError, match="step -1"):
        checkpoints.save(-1, state_at(1), {})
    with pytest.raises(ConfigError):
        TrainingCheckpoints(tmp_path, keep_last=0)
    assert not list(tmp_path.iterdir())


# ---- disks


def test_too_little_room_is_refused_before_writing(tmp_path, monkeypatch):
    checkpoints = saved(tmp_path, [1])
    monkeypatch.setattr(folder_module, "free_bytes", lambda folder: 1000)
    with pytest.raises(CheckpointError, match=r"1,000 bytes.* free"):
        checkpoints.save(2, state_at(2), {})
    assert checkpoints.steps() == [1] and [p.name for p in tmp_path.iterdir()] == ["00000001"]


@pytest.mark.parametrize("enable_async", [True, False])
def test_a_disk_that_fills_up_while_writing_spares_the_checkpoint_before(tmp_path, monkeypatch, enable_async):
    checkpoints = saved(tmp_path, [1], enable_async=enable_async)
    monkeypatch.setattr(folder_module, "_seal", _no_space)
    with pytest.raises(CheckpointError, match="No space left on device.* free on that disk") as caught:
        checkpoints.save(2, state_at(2), {})
        checkpoints.wait()
    assert str(tmp_path) in str(caught.value) and caught.value.__cause__.errno == errno.ENOSPC
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["00000001"]
    assert checkpoints.restore(abstract(state_at(0)))[0] == 1
    checkpoints.save(3, state_at(3), {})  # the error was raised once; saving works again
    checkpoints.wait()
    assert checkpoints.steps() == [1, 3]


def test_the_next_save_raises_what_went_wrong_in_the_background(tmp_path, monkeypatch):
    checkpoints = saved(tmp_path, [1])
    monkeypatch.setattr(folder_module, "_seal", _no_space)
    checkpoints.save(2, state_at(2), {})
    with pytest.raises(CheckpointError, match="00000002 failed"):
        checkpoints.save(3, state_at(3), {})
    assert [p.name for p in tmp_path.iterdir()] == ["00000001"]  # and the save that raised it was not started


def _no_space(folder: Path):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))


def test_a_disk_that_is_really_full(tmp_path, monkeypatch):
    """Checks that orbax's own writer runs out of space on a 6 MiB disk with an overstated free space."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(disk)], capture_output=True
    )
    if not mounted or mounted.returncode:
        pytest.skip("a small disk cannot be mounted here")
    try:
        checkpoints = saved(disk / "run", [1])
        monkeypatch.setattr(folder_module, "free_bytes", lambda folder: 1 << 40)
        noise = {"x": jax.random.bits(jax.random.key(0), (2**21,))}
        with pytest.raises(CheckpointError, match="00000002 failed"):
            checkpoints.save(2, noise, {})
            checkpoints.wait()
        monkeypatch.undo()
        assert [p.name for p in (disk / "run").iterdir()] == ["00000001"]
        assert checkpoints.restore(abstract(state_at(0)))[0] == 1
        checkpoints.save(3, state_at(3), {})
        checkpoints.wait()
        assert checkpoints.steps() == [1, 3]
        with pytest.raises(CheckpointError, match="free on that disk"):  # and with the true figure, before writing
            checkpoints.save(4, noise, {})
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_folder_that_cannot_be_written_is_refused_at_once(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="checkpoint folder .*run"):
        TrainingCheckpoints(tmp_path / "file" / "run")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(CheckpointError, match="no write permission"):
        TrainingCheckpoints(tmp_path / "run")


# ---- kills

SAVER = """
    import os, signal, sys
    from pathlib import Path
    import jax.numpy as jnp
    from mllm_jax.checkpoints import folder
    from mllm_jax.checkpoints.training import TrainingCheckpoints

    checkpoints = TrainingCheckpoints(Path(sys.argv[1]), keep_last=3)
    step, point = int(sys.argv[2]), sys.argv[3]

    def save(step):
        state = {"params": {"w": jnp.full((256, 256), step, jnp.float32)}, "count": jnp.int32(step)}
        checkpoints.save(step, state, {"step": step})

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    def after_rename(source, target):
        rename(source, target)
        if str(target).endswith(folder.REPLACED):  # orbax renames too
            die()

    if point == "endless":
        print("ready", flush=True)
        while True:
            save(step)
            step += 1
    elif point == "before sealing":
        folder._seal = die
    elif point == "before naming":
        folder._publish = die
    elif point == "between the renames":
        rename, os.rename = os.rename, after_rename
    save(step)
    checkpoints.wait()
"""


def saver(folder: Path, step: int, point: str) -> subprocess.Popen:
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    command = [sys.executable, "-c", textwrap.dedent(SAVER), str(folder), str(step), point]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


LAST = 0.52  # of the delays; this kill always comes while a checkpoint is written


def writes(process: subprocess.Popen, folder: Path) -> bool:
    """Stops a process; returns whether it has started a checkpoint and not finished it."""
    process.send_signal(signal.SIGSTOP)
    os.waitpid(process.pid, os.WUNTRACED)
    return bool(list(folder.glob("*.writing")))


@pytest.mark.filterwarnings("ignore:checkpoint of step")
def test_sigkill_at_any_moment_leaves_a_loadable_checkpoint(tmp_path):
    last, cut_off = 0, 0
    for delay in (0.41, 0.237, 0.633, LAST):
        process = saver(tmp_path, last + 1, "endless")
        assert process.stdout.readline() == "ready\n"
        while not (tmp_path / f"{last + 1:08d}").exists():  # after start-up, for any speed of the machine
            assert process.poll() is None
            time.sleep(0.005)
        time.sleep(delay)
        while delay == LAST and not writes(process, tmp_path):
            process.send_signal(signal.SIGCONT)
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        cut_off += bool(list(tmp_path.glob("*.writing")))
        checkpoints = TrainingCheckpoints(tmp_path)
        step, found, meta = checkpoints.restore(abstract(state_at(0, 256)))
        assert step > last and meta == {"step": step}
        assert_bits(found, state_at(step, 256))
        last = step
    assert cut_off, "no save was under way at any kill: the test shows nothing"


@pytest.mark.parametrize("point", ["before sealing", "before naming", "between the renames"])
def test_sigkill_at_the_worst_moments_keeps_the_old_one(tmp_path, point):
    TrainingCheckpoints(tmp_path, enable_async=False).save(5, state_at(5, 256), {"old": True})
    step = 5 if point == "between the renames" else 6
    process = saver(tmp_path, step, point)
    assert process.wait(60) == -signal.SIGKILL
    process.stdout.close()
    assert (tmp_path / f"{step:08d}.writing").exists() and (tmp_path / "00000005").exists() == (step == 6)
    checkpoints = TrainingCheckpoints(tmp_path)
    with pytest.warns(UserWarning, match="interrupted") if step == 6 else _nothing():
        found_step, found, meta = checkpoints.restore(abstract(state_at(0, 256)))
    assert (found_step, meta) == (5, {"old": True})
    assert_bits(found, state_at(5, 256))
    checkpoints.save(7, state_at(7, 256), {})
    checkpoints.wait()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00000005", "00000007"]  # the remains are deleted


class _nothing:
    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


# ---- snapshots


def test_snapshots_are_whole_permanent_and_checked(tmp_path):
    folder, tree = tmp_path / "stages" / "align", [state_at(1), jnp.arange(3)]
    save_snapshot(folder, tree, META)
    assert snapshot_meta(folder) == META
    found, meta = load_snapshot(folder, abstract(tree))
    assert meta == META
    assert_bits(found, tree)
    with pytest.raises(CheckpointError, match="do not match"):
        load_snapshot(folder, abstract(tree[:1]))  # a part is not enough
    save_snapshot(folder, [state_at(2)], {})  # a repeated stage
    assert_bits(load_snapshot(folder, abstract([state_at(2)]))[0], [state_at(2)])
    assert [p.name for p in folder.parent.iterdir()] == ["align"]
    flip(folder)
    with pytest.raises(CheckpointError, match="is corrupt"):
        load_snapshot(folder, abstract([state_at(2)]))
    unfinish(folder)
    for reading in (lambda: snapshot_meta(folder), lambda: load_snapshot(folder, abstract([state_at(2)]))):
        with pytest.raises(CheckpointError, match="never finished"):
            reading()
    with pytest.raises(CheckpointError, match="no such folder"):
        snapshot_meta(tmp_path / "absent")


def test_importing_the_module_does_not_import_orbax():
    root = Path(__file__).resolve().parents[2]
    code = "import sys, mllm_jax.checkpoints.training; sys.exit('orbax.checkpoint' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(root)}).returncode == 0
