"""Measuring and planning a LLaVA json of many records with images: time and memory, killed once in the middle.

    python benchmarks/measure.py [--records 1000000] [--images 300] [--workers 2] [--length 4096] [--folder TMP]

The records are made here: one question about one image and its answer, of 8 to 60 words each, in the form that LLaVA's
are published in. They name `--images` distinct files of distinct sizes over and over: of each record the file's header
is opened and read as if it were its own, but from the system's cache of files, as on a disk that keeps up. Lengths are
those of LLaVA-NeXT's vicuna-7b at its own sizes, whose tokens depend on an image's size (up to 2,880), with a chat
template and a byte-level BPE that is trained here.

Once half of the blocks are on the disk the measuring process is killed (SIGKILL) and started again. "proportional" is
the kernel's PSS summed over the process and those that it started, in which a page that several hold counts once;
"resident" counts it for each. Both are looked at four times a second. CPU seconds are those of all processes: on a
busy machine they say more than the clock.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for p in m['content'] %}{% if p['type'] == 'image' %}<image>\n{% else %}{{ p['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PAGE, TICK = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_CLK_TCK")


# ---- what is measured


def make_images(folder: Path, count: int) -> None:
    from PIL import Image

    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(count):
        height, width = (int(side) for side in rng.integers(160, 1400, 2))
        pixels = np.zeros((height, width, 3), np.uint8) + rng.integers(0, 256, 3, np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:06d}.{('jpg', 'png')[number % 4 == 3]}")


def make_words() -> list[str]:
    """Returns 2,000 words of two to four syllables."""
    rng = np.random.default_rng(1)
    syllables = [a + b for a in "bcdfghklmnprstvw" for b in ("a", "e", "i", "o", "ai", "ea", "or", "an")]
    return sorted({"".join(rng.choice(syllables, rng.integers(1, 4))) for _ in range(2200)})[:2000]


def make_records(folder: Path, count: int, images: int) -> None:
    words, rng = make_words(), np.random.default_rng(2)
    names = sorted(path.name for path in (folder / "images").iterdir())
    with open(folder / "records.json", "w") as file:
        for start in range(0, count, 10_000):
            size = min(10_000, count - start)
            lengths, shown = rng.integers(8, 61, (size, 2)), rng.integers(0, images, size)
            for i in range(size):
                question, answer = (" ".join(words[w] for w in rng.integers(0, len(words), n)) for n in lengths[i])
                turns = [{"from": "human", "value": f"<image>\n{question}?"}, {"from": "gpt", "value": f"{answer}."}]
                record = dict(id=f"{start + i:012d}", image=names[shown[i]], conversations=turns)
                file.write(("[\n" if start + i == 0 else ",\n") + json.dumps(record))
        file.write("\n]\n")


def make_model(folder: Path) -> None:
    """Returns config.json, tokenizer and image processor of LLaVA-NeXT: all of a folder that lengths depend on."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from mllm_jax.models.llava import to_hf_config

    folder.mkdir()
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<pad>", "<|im_start|>", "<|im_end|>", "<image>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=1500, special_tokens=special, initial_alphabet=letters, show_progress=False
    )
    backend.train_from_iterator([" ".join(make_words())], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<pad>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    config = to_hf_config(runpy.run_path(str(ROOT / "configs" / "llava_next.py"))["vicuna_7b"]())
    config["image_token_index"] = backend.token_to_id("<image>")
    (folder / "config.json").write_text(json.dumps(config))
    sizes = dict(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    processor = dict(
        image_processor_type="LlavaNextImageProcessor", image_grid_pinpoints=config["image_grid_pinpoints"]
    )
    (folder / "preprocessor_config.json").write_text(json.dumps(processor | sizes))


# ---- measuring, in a process of its own


def measure(folder: Path, workers: int | None, length: int) -> None:
    import mllm_jax
    from mllm_jax.data.pipeline import Mixture, Pipeline, Weighted
    from mllm_jax.datasets.llava import LLaVARecords
    from mllm_jax.training.operations.progress import Progress

    records = LLaVARecords("records.json", "images", data_dir=str(folder))
    mixture = Mixture((Weighted(records),), rows=64, length=length, slots={"image": 16})
    started = time.perf_counter()
    with Progress() as progress:
        processor = mllm_jax.Processor.from_pretrained(folder / "model")
        data = Pipeline(mixture, processor, seed=0, cache_dir=folder / "lengths", workers=workers, progress=progress)
    made = time.perf_counter()
    steps = [data.plan.step(step) for step in (0, 1, 1_000, 10**6)]
    planned = time.perf_counter() - made
    lengths = data.measured[0].lengths
    found = dict(
        seconds=time.perf_counter() - started,
        planned=planned,
        records=len(lengths),
        shortest=int(lengths.min()),
        longest=int(lengths.max()),
        mean=float(lengths.mean()),
        fill=data.plan.fill,
        examples=len([pair for row in steps[0] for pair in row]),
    )
    (folder / "found.json").write_text(json.dumps(found))


# ---- and watching it


class Watch:
    """Memory and CPU time of a process and of those that it started."""

    def __init__(self, root: int):
        self.root, self.proportional, self.resident, self.cpu = root, 0, 0, {}

    def look(self) -> None:
        parents = {}
        for entry in filter(str.isdigit, os.listdir("/proc")):
            try:
                fields = Path(f"/proc/{entry}/stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            parents[int(entry)] = int(fields[1]), (int(fields[11]) + int(fields[12])) / TICK
        family = {self.root}
        while more := {pid for pid, (parent, _) in parents.items() if parent in family} - family:
            family |= more
        proportional = resident = 0
        for pid in family & parents.keys():
            self.cpu[pid] = parents[pid][1]
            try:
                lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            except OSError:
                continue
            sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines[1:]}
            proportional, resident = proportional + sizes.get("Pss", 0), resident + sizes.get("Rss", 0)
        self.proportional, self.resident = max(self.proportional, proportional), max(self.resident, resident)

    def __str__(self) -> str:
        memory = f"{self.proportional / 1e9:.2f} GB proportional, {self.resident / 1e9:.2f} GB resident"
        return f"{sum(self.cpu.values()):.0f} s of CPU, peak {memory}"


def run(arguments: list[str], folder: Path, blocks: int | None) -> tuple[float, Watch]:
    """Runs the measuring process, and kills it once n blocks are on the disk."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, __file__, "--child", *arguments])
    watch = Watch(process.pid)
    while process.poll() is None:
        watch.look()
        if blocks is not None and len(list(folder.glob("lengths/*/blocks/*.npz"))) >= blocks:
            process.send_signal(signal.SIGKILL)
            blocks = None
        time.sleep(0.25)
    if process.returncode not in (0, -signal.SIGKILL):
        raise SystemExit(process.returncode)
    return time.perf_counter() - started, watch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--workers", type=int, default=None)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        measure(options.folder, options.workers, options.length)
        return
    folder = (options.folder or Path(tempfile.mkdtemp())).resolve()
    if not (folder / "records.json").is_file():
        make_images(folder / "images", options.images)
        make_model(folder / "model")
        make_records(folder, options.records, options.images)
    shutil.rmtree(folder / "lengths", ignore_errors=True)
    size = (folder / "records.json").stat().st_size
    print(f"{options.records:,} records of {size / 1e6:,.0f} MB in {folder}", flush=True)
    arguments = ["--folder", str(folder), "--length", str(options.length)]
    arguments += [] if options.workers is None else ["--workers", str(options.workers)]
    from mllm_jax.data.measured_files import BLOCK

    half = -(-options.records // BLOCK) // 2
    total = 0.0
    for what, blocks in (("killed in the middle", half), ("resumed", None), ("a start with all measured", None)):
        seconds, watch = run(arguments, folder, blocks)
        total += seconds if what != "a start with all measured" else 0
        found = json.loads((folder / "found.json").read_text()) if blocks is None else {}
        planned = f"; four steps planned in {found['planned']:.1f} s" if found else ""
        print(f"{what}: {seconds:.0f} s, {watch}{planned}", flush=True)
    print(f"measured and planned in {total:.0f} s: {found}")
    if options.folder is None:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
