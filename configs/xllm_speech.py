"""X-LLM's speech line (arXiv 2305.04160) at its real size: speech encoder, C-Former, frozen LLM.

mllm plan configs/xllm_speech.py --topology v5e-16

The C-Former is X-LLM's: CIF to vectors of width 512, BERT-base, a map to width 4,096. Two parts are others. X-LLM's
speech encoder, a Conformer of the authors' own recogniser, is not published: HuBERT large takes its place. X-LLM's LLM
is ChatGLM-6B, whose texts need marks that no chat template writes: Vicuna-7B, equally wide, takes its place.

The first stage trains the C-Former with transcripts and the quantity loss. The authors do this inside their recogniser;
here the LLM predicts the transcripts. The second stage trains the C-Former with the number of tokens that it fires
itself, with the optimizer, batch and epochs of the authors' code on AISHELL-2 (1,009,223 sentences). In the authors'
code the LLM also reads the empty vectors after those of a shorter sound of a batch; here they are hidden.

You provide the data, `Mixture((Weighted(source),), ...)`, and the weights: `pretrained=(Pretrained("encoder_audio",
"hubert-large-ll60k"), Pretrained("llm", "vicuna-7b-v1.5"))`, with `tokenizer=TokenizerConfig(folder="vicuna-7b-v1.5")`.
The lengths of sounds and rows and the steps of the first stage are ours.
"""

from mllm_jax.data.pipeline import Mixture
from mllm_jax.encoders.hubert import HubertConfig, HubertDialect
from mllm_jax.layers.compute import Compute
from mllm_jax.llms.decoder import DecoderConfig, DecoderDialect
from mllm_jax.models.branch import Branch
from mllm_jax.models.cformer_projector import CFormerProjectorConfig
from mllm_jax.models.multimodal import MultimodalConfig
from mllm_jax.sharding.mesh import MeshConfig
from mllm_jax.training.config import AdamW, Experiment, Stage
from mllm_jax.training.objectives.next_token import NextToken
from mllm_jax.training.objectives.quantity import QuantityGuided

SECONDS = 15  # of a sound in one slot: 749 vectors, and at most 94 media tokens
ROWS, LENGTH = 128, 192
EPOCH = 1_009_223 // ROWS
NO_CLIPPING = 1e9


def model() -> MultimodalConfig:
    """Returns the model: 7,146,520,961 parameters, HuBERT 315,438,720, C-Former 92,666,625, Vicuna 6,738,415,616."""
    encoder = HubertConfig(
        hidden_size=1024,
        num_layers=24,
        num_heads=16,
        mlp_size=4096,
        dialect=HubertDialect(norm_first=True, conv_norm="layer", conv_bias=True),
    )
    llm = DecoderConfig(
        vocab_size=32_000,
        hidden_size=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=32,
        mlp_size=11_008,
        tie_word_embeddings=False,
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=(2,),
        pad_token_id=0,
        dialect=DecoderDialect(norm_eps=1e-5, family="LlamaForCausalLM"),
    )
    sound = Branch(encoder, CFormerProjectorConfig(factor=8), seconds=SECONDS)
    return MultimodalConfig({"audio": sound}, llm, compute=Compute(dtype="bfloat16", remat="full"))


def config() -> Experiment:
    common = dict(
        trainable=("projector_audio/*",),
        data=Mixture((), rows=ROWS, length=LENGTH, slots={"audio": 1}),
        optimizer=AdamW(
            learning_rate=1e-4,
            warmup_steps=6000,
            end_factor=1e-4,
            weight_decay=0.05,
            b1=0.9,
            b2=0.999,
            clip_norm=NO_CLIPPING,
        ),
        frozen_dtype="bfloat16",
    )
    stages = (
        Stage(name="convert", objective=QuantityGuided(), steps=5 * EPOCH, **common),
        Stage(name="align", objective=NextToken(), steps=30 * EPOCH, **common),
    )
    return Experiment("xllm_speech", model(), stages, mesh=MeshConfig(data=1, fsdp=-1))
