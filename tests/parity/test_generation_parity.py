"""Generated tokens against transformers' `generate`: prompts of unequal length in one batch here, each alone there."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from tiny_language import answers, language

import mllm_jax
from mllm_jax.generation.options import Options
from mllm_jax.generation.sampling import Sampling

VOCABULARY, EOS = 61, [2, 5, 8, 17, 33, 40, 51]
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, VOCABULARY, n).tolist() for n in (9, 2, 40, 17)]


def llama(randomise):
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        intermediate_size=52,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=EOS,
        pad_token_id=0,
    )
    return randomise(transformers.LlamaForCausalLM(config))


def t5(randomise):
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=24,
        d_kv=6,
        d_ff=40,
        num_layers=3,
        num_decoder_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
        eos_token_id=EOS,
        pad_token_id=0,
    )
    model = transformers.T5ForConditionalGeneration(config)
    # transformers 5 always ties the head; Flan-T5's checkpoints do not.
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(VOCABULARY, config.d_model))
    return randomise(model)


MADE = {}  # each model is made and compiled once for all tests


@pytest.fixture(params=[llama, t5], ids=["llama", "t5"])
def pair(request, randomise, tmp_path):
    """Returns (torch model, our assistant), from one folder."""
    if request.param not in MADE:
        theirs = request.param(randomise)
        theirs.save_pretrained(tmp_path)
        module, params = mllm_jax.from_pretrained(tmp_path)
        MADE[request.param] = theirs, language(module, params)
    theirs, assistant = MADE[request.param]
    theirs.generation_config.eos_token_id = EOS
    return theirs, assistant


def wanted(theirs, prompt: list[int], **options) -> tuple[list[int], list[float] | None]:
    """Returns the tokens that transformers adds, without the end token, and the log probability of each."""
    ids = torch.tensor([prompt])
    options |= dict(return_dict_in_generate=True, output_logits=True, do_sample=False)
    out = theirs.generate(ids, attention_mask=torch.ones_like(ids), **options)
    new = out.sequences[0, 1 if theirs.config.is_encoder_decoder else len(prompt) :].tolist()
    logprobs = None
    if options.get("num_beams", 1) == 1:
        scores = [torch.log_softmax(step[0].float(), -1) for step in out.logits]
        logprobs = [float(s[i]) for s, i in zip(scores, new, strict=True)]
    ends = [i for i, token in enumerate(new) if token in EOS]
    return (new[: ends[0]] if ends and options.get("eos_token_id", EOS) else new), logprobs


def check(pair, options: Options, sampling: Sampling = Sampling(), **theirs) -> list[list[int]]:
    reference, assistant = pair
    ours = answers(assistant, PROMPTS, options, sampling)
    for prompt, answer in zip(PROMPTS, ours, strict=True):
        tokens, logprobs = wanted(reference, prompt, max_new_tokens=options.max_new_tokens, **theirs)
        assert list(answer.tokens) == tokens
        assert answer.reason == ("length" if len(tokens) == options.max_new_tokens else "stop")
        if options.logprobs:
            np.testing.assert_allclose(answer.logprobs, logprobs[: len(tokens)], rtol=1e-3, atol=1e-4)
    return [list(answer.tokens) for answer in ours]


def never_ends(pair):
    """Returns options without end tokens for both."""
    pair[0].generation_config.eos_token_id = None
    return dict(ignore_eos=True)


def test_greedy_32_tokens(pair):
    found = check(pair, Options(32, logprobs=True, **never_ends(pair)), eos_token_id=None)
    assert len({tuple(ids) for ids in found}) == len(PROMPTS) and len(set(found[0])) > 2


def test_greedy_until_an_end_token(pair):
    found = check(pair, Options(48, logprobs=True))
    assert any(len(ids) < 48 for ids in found), "no answer ended"


def test_repetition_penalty(pair):
    plain = answers(pair[1], PROMPTS, Options(24, **never_ends(pair)))
    found = check(
        pair,
        Options(24, ignore_eos=True),
        Sampling(repetition_penalty=1.7),
        eos_token_id=None,
        repetition_penalty=1.7,
    )
    assert found != [list(answer.tokens) for answer in plain]


@pytest.mark.parametrize(
    "options",
    [{}, {"length_penalty": 0.0}, {"length_penalty": 2.5}, {"early_stopping": True}, {"length_penalty": -0.5}],
    ids=str,
)
def test_beam_search(pair, options):
    found = check(pair, Options(20, num_beams=4, **options), num_beams=4, **options)
    greedy = answers(pair[1], PROMPTS, Options(20))
    assert found != [list(answer.tokens) for answer in greedy], "the search finds the same as greedy decoding"


def test_beam_search_without_end_tokens_and_with_a_penalty(pair):
    never = never_ends(pair)
    check(pair, Options(12, num_beams=3, **never), num_beams=3, eos_token_id=None)
    check(
        pair,
        Options(12, num_beams=3),
        Sampling(repetition_penalty=1.4),
        num_beams=3,
        repetition_penalty=1.4,
        eos_token_id=EOS,
    )
