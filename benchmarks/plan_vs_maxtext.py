"""Our training step compared with MaxText's, both compiled ahead of time for TPU slices: memory, FLOPs, bytes sent.

    python benchmarks/plan_vs_maxtext.py [llama2_7b:v5e-256:full ...] [--again]   makes missing rows python
    benchmarks/plan_vs_maxtext.py --live                                  MaxText's too, if installed python
    benchmarks/plan_vs_maxtext.py --print                                 the table in Markdown

Both have FSDP over all chips, bf16 compute, float32 masters, AdamW and scanned layers. Rows are made one at a time,
each in its own process, and kept in benchmarks/plan_vs_maxtext.json. No TPU is needed; a row takes one to five minutes
of two cores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).parents[1]
OUT = Path(__file__).with_suffix(".json")
sys.path.insert(0, str(ROOT))
GIB = 2**30


@dataclass(frozen=True)
class Row:
    """The cost of MaxText's step, per chip and step.

    Attributes:
        model: a model of `configs/plans/language.py`, or "gemma3_4b", with images.
        maxtext: MaxText's name of the model.
        rows: rows per chip.
        dots: TFLOP of matrix products, without attention kernels.
        temporaries, peak: GiB, as reported by `memory_analysis`.
        gather, reduce, scatter: GB of all-gathers, all-reduces and reduce-scatters by the cost of a ring.
    """

    model: str
    maxtext: str
    slice: str
    length: int
    rows: int
    remat: str
    dots: float
    temporaries: float
    peak: float
    gather: float
    reduce: float
    scatter: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.model}:{self.slice}:{self.remat}"

    @property
    def wire(self) -> float:
        return self.gather + self.reduce + self.scatter


# MaxText 0.2.5, its `train_compile` on a machine without a TPU, jax 0.10.2; counted in the compiled HLO with trip
# counts. An asynchronous collective counts once, an all-reduce followed by a slice as an all-reduce.
PROVENANCE = "MaxText 0.2.5 ahead-of-time"
PUBLISHED = (
    Row("llama2_7b", "llama2-7b", "v5e-256", 2048, 4, "full", 407.2, 5.40, 4.13, 26.1, 26.3),
    Row("llama2_7b", "llama2-7b", "v5e-256", 2048, 2, "minimal", 162.4, 12.19, 11.66, 26.1, 26.3),
    Row("llama2_7b", "llama2-7b", "v5p-128", 4096, 8, "full", 1628.9, 24.47, 17.14, 26.0, 26.5),
    Row("llama2_7b", "llama2-7b", "v5p-128", 4096, 4, "minimal", 649.5, 49.64, 46.77, 25.8, 26.0),
    Row("gemma3_4b", "gemma3-4b", "v5e-128", 2048, 1, "full", 64.7, 5.33, 7.76, 15.7, 9.1, 8.0),
)
# MaxText's "minimal" keeps the results of the layers' matrix products; ours is called "dots". "full" keeps the input of
# each layer, "offload" the same in the host's memory. MaxText has "offload" too, but the published rows do not use it.
OURS = {"full": ("full", "offload"), "minimal": ("dots",)}


def experiment(row: Row, remat: str):
    """Returns the experiment that is compiled."""
    from configs.plans import language
    from mllm_jax.planning.topologies import topology

    chips = topology(row.slice).devices
    if row.model != "gemma3_4b":
        return language.experiment(row.model, rows=row.rows * chips, length=row.length, remat=remat)
    return gemma3_4b(language.experiment("llama2_7b", rows=row.rows * chips, length=row.length, remat=remat), remat)


def gemma3_4b(base, remat: str):
    """Returns a model of the size of Gemma 3 4B (arXiv 2503.19786): SigLIP so400m, one image a row as 256 tokens.

    The decoder is ours with Gemma's sizes, without its norms after each block and with one kind of layer: it has the
    same size but is another model. As by MaxText's default, the image encoder is frozen.
    """
    from mllm_jax.encoders.vit import ViTConfig
    from mllm_jax.llms.decoder import DecoderConfig
    from mllm_jax.models.multimodal import Branch, MultimodalConfig
    from mllm_jax.projectors.pool import PoolProjectorConfig
    from mllm_jax.training.config import TokenizerConfig

    encoder = ViTConfig(
        image_size=896,
        patch_size=14,
        hidden_size=1152,
        num_layers=27,
        num_heads=16,
        mlp_size=4304,
        activation="gelu_tanh",
        pooler="none",
        dtype="bfloat16",
        remat="full",
    )
    llm = DecoderConfig(
        vocab_size=262_144,
        hidden_size=2560,
        num_layers=34,
        num_heads=8,
        num_kv_heads=4,
        head_dim=256,
        mlp_size=10_240,
        activation="gelu_tanh",
        qk_norm=True,
        tie_word_embeddings=True,
        dtype="bfloat16",
        remat=remat,
    )
    projector = PoolProjectorConfig(output_size=2560, factor=4, dtype="bfloat16")
    stage = base.stages[0]
    stage = replace(
        stage, trainable=("projector_image/*", "llm/*"), frozen_dtype=None, data=replace(stage.data, slots={"image": 1})
    )
    return replace(
        base,
        name="gemma3_4b",
        model=MultimodalConfig({"image": Branch(encoder, projector)}, llm),
        tokenizer=TokenizerConfig(vocab_size=llm.vocab_size),
        stages=(stage,),
    )


def ours(row: Row, remat: str) -> dict:
    """Compiles our step in this process; returns the figures in the units of `Row`."""
    from mllm_jax.planning.compile import abstract_step, compile_step, topology_mesh
    from mllm_jax.planning.topologies import topology

    where, config = topology(row.slice), experiment(row, remat)
    found = compile_step(abstract_step(config, 0, topology_mesh(config.mesh, where)), where)
    counted = found.account

    def wire(*kinds):
        return counted.wire_bytes(*kinds) / 1e9 if kinds else counted.wire_bytes() / 1e9

    # Counted as in the published rows: a fused all-reduce and slice costs as much as the all-reduce.
    fused = wire("all-reduce-scatter")
    return dict(
        dots=counted.dot_flops / 1e12,
        kernels=counted.kernel_flops / 1e12,
        temporaries=found.temporaries / GIB,
        peak=found.peak / GIB,
        gather=wire("all-gather"),
        reduce=wire("all-reduce") + 2 * fused,
        scatter=wire("reduce-scatter"),
        other=wire() - wire("all-gather") - wire("all-reduce") - wire("reduce-scatter") - fused,
        compile_seconds=found.compile_seconds,
    )


def maxtext(row: Row) -> dict:
    """Compiles MaxText's step in this process by its own entry point; counted as ours.

    Raises:
        SystemExit: MaxText is not installed.
    """
    try:
        from maxtext.trainers.pre_train import train_compile
    except ImportError:
        try:
            from MaxText import train_compile
        except ImportError:
            raise SystemExit("MaxText is not installed: pip install maxtext, or leave out --live") from None
    from mllm_jax.planning.hlo import account
    from mllm_jax.planning.topologies import topology

    held = {}
    # The entry point compiles and returns nothing, so a patch keeps the compiled step.
    compiled_by = train_compile.jit_and_compile

    def keep(*args, **kwargs):
        held["compiled"] = compiled_by(*args, **kwargs)
        return held["compiled"]

    train_compile.jit_and_compile = keep
    options = dict(
        compile_topology=row.slice,
        compile_topology_num_slices=1,
        model_name=row.maxtext,
        per_device_batch_size=row.rows,
        max_target_length=row.length,
        remat_policy=row.remat,
        attention="flash",
        dtype="bfloat16",
        weight_dtype="float32",
        dataset_type="synthetic",
        enable_checkpointing=False,
        ici_fsdp_parallelism=topology(row.slice).devices,
    )
    options |= dict(use_multimodal=True) if row.model == "gemma3_4b" else {}
    config = Path(train_compile.__file__)
    found = [
        folder / "configs" / "base.yml" for folder in config.parents if (folder / "configs" / "base.yml").is_file()
    ]
    if not found:
        raise SystemExit("MaxText's configs/base.yml was not found beside its train_compile")
    train_compile.main(["train_compile", str(found[0]), *(f"{name}={value}" for name, value in options.items())])
    memory, counted = held["compiled"].memory_analysis(), account(held["compiled"].as_text())
    fused = counted.wire_bytes("all-reduce-scatter") / 1e9
    return dict(
        dots=counted.dot_flops / 1e12,
        temporaries=memory.temp_size_in_bytes / GIB,
        peak=memory.peak_memory_in_bytes / GIB,
        gather=counted.wire_bytes("all-gather") / 1e9,
        reduce=counted.wire_bytes("all-reduce") / 1e9 + 2 * fused,
        scatter=counted.wire_bytes("reduce-scatter") / 1e9,
    )


def read() -> dict:
    return json.loads(OUT.read_text()) if OUT.is_file() else {}


def make(names, again: bool, live: bool) -> None:
    for row in PUBLISHED:
        for which in (*OURS[row.remat], *(("maxtext",) if live else ())):
            key = f"{row.name}:{which}"
            if (names and row.name not in names and key not in names) or (key in read() and not again):
                continue
            command = [sys.executable, __file__, "--one", row.name, which]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
            if not lines:
                print(f"{key}: {done.stderr.strip()[-1500:]}", file=sys.stderr, flush=True)
                continue
            OUT.write_text(json.dumps(read() | {key: json.loads(lines[-1])}, indent=1) + "\n")
            print(key, lines[-1], flush=True)


def table() -> str:
    """Returns the table of existing rows, ours over MaxText's."""
    lines = [
        "| step | remat, ours | temporaries GiB | peak GiB | on the wire GB | dot TFLOP | compiled in |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in PUBLISHED:
        live = read().get(f"{row.name}:maxtext")
        theirs = replace(row, **live) if live else row
        for remat in OURS[row.remat]:
            found = read().get(f"{row.name}:{remat}")
            if found is None:
                continue
            sent = found["gather"] + found["reduce"] + found["scatter"] + found["other"]
            pairs = (
                (found["temporaries"], theirs.temporaries),
                (found["peak"], theirs.peak),
                (sent, theirs.wire),
                (found["dots"], theirs.dots),
            )
            cells = [f"{ours:.2f} / {them:.2f} = {ours / them:.2f}" for ours, them in pairs]
            what = f"{row.maxtext}, {row.slice}, {row.rows} x {row.length:,}, {row.remat}{', live' if live else ''}"
            lines.append(f"| {what} | {remat} | {' | '.join(cells)} | {found['compile_seconds']:.0f} s |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help="MODEL:SLICE:REMAT, or MODEL:SLICE:REMAT:OURS")
    parser.add_argument("--again", action="store_true", help="make existing rows again")
    parser.add_argument("--live", action="store_true", help="compile MaxText's rows here, if it is installed")
    parser.add_argument("--print", action="store_true", help="print the table of existing rows")
    parser.add_argument("--one", nargs=2, metavar=("ROW", "WHICH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        [row] = [row for row in PUBLISHED if row.name == options.one[0]]
        print(json.dumps(maxtext(row) if options.one[1] == "maxtext" else ours(row, options.one[1])))
        return
    if not options.print:
        make(options.rows, options.again, options.live)
    print(f"Ours / {PROVENANCE}\n\n{table()}")


if __name__ == "__main__":
    main()
