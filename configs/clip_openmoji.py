"""CLIP from scratch on emoji: an image encoder and a text encoder, minutes on two CPU cores.

mllm train configs/clip_openmoji.py
mllm train configs/siglip_openmoji.py   the same with the sigmoid loss
"""

import runpy
from dataclasses import replace
from pathlib import Path

from mllm_jax.data.pipeline import Mixture, Weighted
from mllm_jax.datasets.openmoji import OpenMojiCaptions
from mllm_jax.encoders.text_encoder import TextTowerConfig
from mllm_jax.evaluation.tasks.openmoji import openmoji_retrieval
from mllm_jax.models.clip import DualEncoderConfig
from mllm_jax.training.config import AdamW, Experiment, Stage, TokenizerConfig
from mllm_jax.training.objectives.contrastive import Contrastive

SIZE = 64
SUBSET = "full"
STEPS = 1000
WIDTH = 256  # of a word, and of the space in which images and texts are compared


def experiment(name: str, kind: str) -> Experiment:
    """Returns the training of both encoders with the loss of this kind, "softmax" or "sigmoid"."""
    scenes = runpy.run_path(str(Path(__file__).with_name("openmoji_scenes.py")))["MODEL"]
    captions = OpenMojiCaptions(config=SUBSET, image_size=SIZE, augment=True, variants=32)
    return Experiment(
        name=name,
        model=DualEncoderConfig(
            vision=replace(scenes.image.encoder, regions=None),
            # A bag of words: the vector of an unseen name is the sum of the vectors of its words.
            text=TextTowerConfig(hidden_size=WIDTH, num_layers=0),
            projection_size=WIDTH,
            kind=kind,
            pooling="patches",  # the position of a part of an emoji is as informative as its shape
            compute=scenes.compute,
        ),
        tokenizer=TokenizerConfig(vocab_size=2048),
        cpu_devices=2,  # two devices on two cores are twice as fast as one
        evaluation=openmoji_retrieval(config=SUBSET, image_size=SIZE),
        stages=(
            Stage(
                name="contrastive",
                objective=Contrastive(kind=kind),
                trainable=("*",),
                # Four forms of a base in one group are hard negatives of each other.
                data=Mixture((Weighted(captions),), rows=128, length=32, slots={"image": 1}, layout="caption", group=4),
                optimizer=AdamW(learning_rate=1.5e-3, warmup_steps=50),
                steps=STEPS,
            ),
        ),
    )


def config() -> Experiment:
    return experiment("clip_openmoji", "softmax")
