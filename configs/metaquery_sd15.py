"""MetaQuery (arXiv 2504.06256) from LLaVA-OneVision-0.5B to Stable Diffusion 1.5, at its real size.

mllm train configs/metaquery_sd15.py
mllm plan configs/metaquery_sd15.py --topology v5e-256

A prompt is followed by <begin_image>, 77 queries <image_0> ... <image_76> and <end_image>. A connector of 24 layers
maps the frozen LLM's last states at the queries to the condition of the frozen UNet, 77 x 768. Trained are the
connector and the rows of these 79 tokens in the embedding, which is also the head.

Of the paper's LLMs this one has the form of a composed model: one tile of 384 pixels an image, ordinary positions
(Qwen2.5-VL needs M-RoPE and packed patches, and so its own layout), and its width of 896 is 14 heads of 64, which the
connector takes over. Its embedding has 151,936 rows and its tokenizer 151,648 tokens, so that the new tokens take rows
that are there already; of another LLM raise `vocab_size`, and new rows begin near the mean.

Published: 77 queries, the connector, AdamW with 1e-4 after 5,000 steps of warm-up, a cosine to 1e-5, gradients clipped
at 1.0, captions dropped for guidance. Ours, without a published source: one loss more, that of the tokens which the LLM
writes, so that it learns to begin an image itself; 1,024 rows of up to two images; 8 epochs; a tenth of the captions
dropped; no weight decay; the wording of the request. No full run has been made.

You provide, under the names at the top of this file (relative paths of data begin in MLLM_DATA_DIR, if it is set):

- LLAVA, the folder of llava-hf/llava-onevision-qwen2-0.5b-ov-hf, and STABLE_DIFFUSION, that of
  stable-diffusion-v1-5/stable-diffusion-v1-5.
- Conceptual 12M as RECORDS, a file of LLaVA's plain records with an image and a caption each: the library has no source
  of WebDataset's tar files yet.
"""

import runpy
from pathlib import Path
from typing import Any

from mllm_jax.data.pipeline import Mixture, Weighted
from mllm_jax.datasets.draw_captions import DrawCaptions
from mllm_jax.datasets.llava import LLaVARecords
from mllm_jax.encoders.text_encoder import TextTowerConfig, TextTowerDialect
from mllm_jax.generators.schedulers.pndm import PNDM
from mllm_jax.generators.unet import UNetConfig
from mllm_jax.generators.vae import AutoencoderKLConfig
from mllm_jax.models.multimodal import MultimodalConfig
from mllm_jax.models.output import Output
from mllm_jax.models.stable_diffusion import StableDiffusionConfig
from mllm_jax.output_projectors.query_connector import QueryConnectorConfig
from mllm_jax.sharding.mesh import MeshConfig
from mllm_jax.training.config import AdamW, Experiment, Pretrained, Stage, TokenizerConfig
from mllm_jax.training.objectives.diffusion import Diffusion

_ONEVISION = runpy.run_path(str(Path(__file__).with_name("llava_next.py")))["onevision_500m"]

LLAVA, STABLE_DIFFUSION = "runs/llava-onevision-qwen2-0.5b-ov-hf", "runs/stable-diffusion-v1-5"
RECORDS = LLaVARecords(path="cc12m/cc12m.json", image_folder="cc12m/images", version="plain")
ROWS, LENGTH, IMAGES = 1024, 256, 2  # a request of a caption takes about 120 positions, 79 of them for the image
STEPS = 8 * 12_423_374 // (ROWS * IMAGES)


def stable_diffusion() -> StableDiffusionConfig:
    """Returns Stable Diffusion 1.5: text encoder 123,060,480 parameters, UNet 859,520,964, autoencoder 83,653,863."""
    text_encoder = TextTowerConfig(
        vocab_size=49_408,
        max_length=77,
        hidden_size=768,
        num_layers=12,
        num_heads=12,
        mlp_size=3072,
        activation="quick_gelu",
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
        dialect=TextTowerDialect(norm_eps=1e-5, mask="causal", pooling="largest", family="CLIPTextModel"),
    )
    scheduler = PNDM(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
    )
    return StableDiffusionConfig(text_encoder, UNetConfig(), AutoencoderKLConfig(), scheduler)


def model(dtype: str = "bfloat16") -> MultimodalConfig:
    """Returns the model; LLaVA-OneVision-0.5B has 893,618,208 parameters with its vector of a new line."""
    llava = _ONEVISION(dtype)
    connector = QueryConnectorConfig(tokens=77, output_size=768, num_layers=24)
    output = Output(connector, stable_diffusion(), queries=True, tokenizer=f"{STABLE_DIFFUSION}/tokenizer")
    return MultimodalConfig(llava.inputs, llava.llm, outputs={"image": output}, compute=llava.compute)


def experiment(records: Any, steps: int = STEPS, rows: int = ROWS) -> Experiment:
    """Returns the only stage.

    Args:
        records: a source of images with captions.
    """
    parts = dict.fromkeys(("encoder_image", "projector_image", "llm"), LLAVA) | {"generator_image": STABLE_DIFFUSION}
    stage = Stage(
        name="connect",
        objective=Diffusion(drop=0.1),
        trainable=("output_projector_image/*",),
        signal_tokens=True,
        data=Mixture((Weighted(DrawCaptions(records)),), rows=rows, length=LENGTH, slots={"image_targets": IMAGES}),
        optimizer=AdamW(1e-4, warmup_steps=5_000, end_factor=0.1, weight_decay=0.0, b2=0.999, clip_norm=1.0),
        steps=steps,
        frozen_dtype="bfloat16",
    )
    return Experiment(
        name="metaquery_sd15",
        model=model(),
        pretrained=tuple(Pretrained(part, folder) for part, folder in parts.items()),
        tokenizer=TokenizerConfig(folder=LLAVA),
        mesh=MeshConfig(data=1, fsdp=-1),
        stages=(stage,),
    )


def config() -> Experiment:
    return experiment(RECORDS)
