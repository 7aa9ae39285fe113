"""Rows of a composed model with a chat model's tokenizer: the output of its own template, and refusals by name."""

from __future__ import annotations

import pytest
from tiny_language import byte_tokenizer
from toy_data import MODEL, PIXELS, media_index
from toy_data import conversation as example

from mllm_jax.data.chat_tokenizer import ChatTokenizer
from mllm_jax.data.message import Example, Image, Message, Text
from mllm_jax.errors import ConfigError, DataError
from mllm_jax.models.processor import Processor

MEDIA = MODEL.media_tokens
TURNS = (("what is this?", "a cat"), ("how many?", "2"), ("sure <|end|>?", "yes"))
# Typical templates: ChatML with its own system message, LLaMA-2's, Vicuna's, LLaMA-3's.
CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|system|>be kind<|end|>\n{% endif %}"
    "<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
INST = (
    "{% for m in messages %}{% if m.role == 'user' %}<|user|>[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} <|end|>{% endif %}{% endfor %}{% if add_generation_prompt %} {% endif %}"
)
PLAIN = (
    "A chat. {% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content }} ASSISTANT: "
    "{% else %}{{ m.content }}<|end|>{% endif %}{% endfor %}"
)
TRIMMED = (
    "<|system|>\n\n{% for m in messages %}<|{{ m.role }}|>\n\n{{ m.content | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n\n{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "inst": INST, "plain": PLAIN, "trimmed": TRIMMED}


def tokenizer_of(template: str | None, *special: str) -> ChatTokenizer:
    """Returns a byte tokenizer with the template's special tokens and others."""
    made = byte_tokenizer(template)
    made.backend.add_special_tokens({"additional_special_tokens": list(special)})
    return made


def reader_of(folder, template, *special: str, system: str | None = None) -> Processor:
    tokenizer_of(template, *special or ["<|spare|>"]).save(folder)
    return Processor.of(MODEL, folder, system=system)


@pytest.fixture(params=TEMPLATES, ids=str)
def pair(request, tmp_path):
    """Returns (the model's tokenizer in transformers, our processor of its folder)."""
    ours = reader_of(tmp_path, TEMPLATES[request.param])
    return ChatTokenizer.load(tmp_path), ours


def messages(turns, system: str | None = None) -> list[dict]:
    said = [] if system is None else [{"role": "system", "content": system}]
    for question, answer in turns:
        said += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return said


def test_rows_are_what_the_template_gives(pair):
    theirs, ours = pair
    for count in (1, 2):
        row = ours.encode(example(0, TURNS[:count]), 512)
        assert row.tokens.tolist() == theirs.encode_chat(messages(TURNS[:count]), add_generation_prompt=False)
        # After the last answer's stop token, a template may write a line break, which carries no loss.
        last = max(i for i, weight in enumerate(row.loss_weights) if weight)
        assert row.tokens[last] in theirs.stop_ids and theirs.decode(row.tokens[last + 1 :]).strip() == ""


def test_a_prompt_is_what_the_template_gives_and_what_was_trained(pair):
    theirs, ours = pair
    prompt = ours.prompt(example(0, TURNS).messages[:1]).tokens.tolist()
    assert prompt == theirs.encode_chat(messages(TURNS)[:1])
    for images in (0, 1, 2):
        talk = example(images, TURNS)
        prompt, row = ours.prompt(talk.messages[:1]), ours.encode(talk, 512)
        n = len(prompt.tokens)
        assert prompt.tokens.tolist() == row.tokens[:n].tolist()
        assert media_index(prompt) == media_index(row)[:n]
        assert not row.loss_weights[:n].any() and row.loss_weights[n]


def test_answers_carry_loss_to_their_stop_token_and_nothing_else(pair):
    theirs, ours = pair
    row = ours.encode(example(1, TURNS), 512)
    runs, has_loss = [], row.loss_weights > 0
    for place, token in enumerate(row.tokens):
        if has_loss[place]:
            if not has_loss[place - 1]:
                runs.append([])
            runs[-1].append(int(token))
    assert [ours.decode(run).strip() for run in runs] == [answer for _, answer in TURNS]
    (end,) = theirs.stop_ids
    assert all(run.index(end) == len(run) - 1 for run in runs)
    # A stop token that a question spells is encoded as letters.
    honest = ours.encode(example(1, (*TURNS[:2], ("sure?", "yes"))), 512)
    assert (row.tokens == end).sum() == (honest.tokens == end).sum()
    assert "sure <|end|>?" in ours.decode(row.tokens[~has_loss])


def test_images_precede_the_first_question_and_a_line_break(pair):
    theirs, ours = pair
    image, bare = ours.layout.image_token, ours.encode(example(0, TURNS), 512).tokens.tolist()
    assert image not in bare
    row = ours.encode(example(2, TURNS), 512)
    ids = row.tokens.tolist()
    begin = ids.index(image)
    assert ids[begin : begin + 2 * MEDIA] == [image] * 2 * MEDIA
    assert [i for i in media_index(row) if i >= 0] == list(range(2 * MEDIA))
    after = ids[begin + 2 * MEDIA :]
    assert theirs.decode(after[:1]) == "\n" and bare == ids[:begin] + after[1:]
    assert theirs.decode(after[1:]).startswith(TURNS[0][0])
    text = ours.encode(example(0, TURNS, context="a note"), 512, learn="all")
    assert text.tokens.tolist() == ids[:begin] + theirs.ids("a note\n") + after[1:]
    last = max(i for i, weight in enumerate(text.loss_weights) if weight)
    assert not text.loss_weights[0] and text.loss_weights[1 : last + 1].all()
    assert text.tokens[last] in theirs.stop_ids


def test_an_image_inside_a_text_stays_there(tmp_path):
    ours = reader_of(tmp_path, CHATML)
    image = Image(PIXELS)
    asked = Message("user", (Text("Is "), image, Text(" like\n"), image, Text("\n?")))
    row = ours.encode(Example((asked, Message("assistant", "no"))), 512)
    written = "<|spare|>" * MEDIA
    wanted = f"<|user|>\nIs {written} like\n{written}\n?<|end|>\n<|assistant|>\nno<|end|>\n"
    shown = ours.tokenizer.backend.decode(row.tokens.tolist(), skip_special_tokens=False)
    assert shown == f"<|system|>be kind<|end|>\n{wanted}"


def test_turns_that_do_not_fit_are_dropped_whole(pair):
    theirs, ours = pair
    full, two = ours.encode(example(1, TURNS), 512), ours.encode(example(1, TURNS[:2]), 512)
    short = ours.encode(example(1, TURNS), len(full.tokens) - 1)
    assert short.dropped_turns == 1 and short.tokens.tolist() == two.tokens.tolist()
    assert short.loss_weights.tolist() == two.loss_weights.tolist()
    with pytest.raises(DataError, match="at most 9"):
        ours.encode(example(1, TURNS), 9)


def test_a_system_message_of_ones_own(tmp_path):
    fingerprints = set()
    for system in (None, "", "name emoji"):
        ours = reader_of(tmp_path, CHATML, system=system)
        row = ours.encode(example(0, TURNS[:2]), 512).tokens.tolist()
        theirs = ChatTokenizer.load(tmp_path)
        assert row == theirs.encode_chat(messages(TURNS[:2], system), add_generation_prompt=False)
        own = (Message("system", "of the record"), *example(0, TURNS[:2]).messages)
        wanted = theirs.encode_chat(messages(TURNS[:2], "of the record"), add_generation_prompt=False)
        assert ours.encode(Example(own), 512).tokens.tolist() == wanted, "a record's own goes before"
        fingerprints.add(ours.fingerprint())
    assert len(fingerprints) == 3


def test_what_is_saved_gives_the_same_rows(pair, tmp_path):
    _, ours = pair
    ours.tokenizer.save(tmp_path / "run")
    again = Processor.of(MODEL, tmp_path / "run")
    assert again.fingerprint() == ours.fingerprint() and again.layout.image_token == ours.layout.image_token
    assert "messages" in again.tokenizer.template, "the author's template is kept"
    assert again.encode(example(1, TURNS), 512).tokens.tolist() == ours.encode(example(1, TURNS), 512).tokens.tolist()


def test_a_fingerprint_knows_the_vocabulary(tmp_path):
    """Checks that tokenizers of one size and template differ: they may give rows of different lengths."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    found = []
    for words in (("a", "b", "c"), ("a", "b", "d"), ("a", "b", "c")):
        backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="a"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        found.append(ChatTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend)).fingerprint())
    assert found[0] == found[2] != found[1]


LAST_THINKS = CHATML.replace(
    "{{ m.content }}", "{% if loop.last and m.role == 'assistant' %}hm {% endif %}{{ m.content }}"
)


@pytest.mark.parametrize(
    "template,error,given",
    [
        (None, DataError, "without a chat template"),
        ("{% for m in messages %}{{ m.content }} {% endfor %}", ConfigError, "none of the stop tokens ['<|end|>']"),
        ("{{ messages[-1].content }}<|end|>", DataError, "writes a question differently once it has an answer"),
        (LAST_THINKS, DataError, "writes a question differently once it has an answer"),
        (
            CHATML.replace("<|assistant|>\n{% endif %}", "<|assistant|>\nwell: {% endif %}"),
            DataError,
            "writes a question differently once it has an answer",
        ),
        ("{{ raise_exception('no') }}", DataError, "no"),
    ],
    ids=["none", "no stop", "last only", "differs", "prompt differs", "raises"],
)
def test_templates_that_rewrite_or_do_not_end_are_refused(template, error, given, tmp_path):
    with pytest.raises(error) as refusal:
        reader_of(tmp_path, template).encode(example(0, TURNS), 512)
    assert given in refusal.value.given and refusal.value.expected and refusal.value.todo


def test_a_system_message_that_the_template_refuses(tmp_path):
    template = CHATML.replace(
        "{% for", "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}{% for", 1
    )
    assert reader_of(tmp_path, template).encode(example(0, TURNS), 512)
    with pytest.raises(DataError, match="no system"):
        reader_of(tmp_path, template, system="be kind").encode(example(0, TURNS), 512)


def test_the_token_of_an_image_is_one_that_nothing_else_in_a_row_has(tmp_path):
    """Checks that it is <image> if there is one, else a token that the template never writes, even for odd roles."""
    named = reader_of(tmp_path / "named", CHATML, "<|other|>", "<image>")
    assert named.layout.image_token == named.tokenizer.id_of("<image>")
    free = reader_of(tmp_path / "free", CHATML, "<|other|>")
    assert free.layout.image_token == free.tokenizer.id_of("<|other|>")
    byte_tokenizer(CHATML).save(tmp_path / "none")
    none = Processor.of(MODEL, tmp_path / "none")
    assert none.layout.image_token == none.tokenizer.vocab_size, "the vocabulary that embeddings hold does not grow"
    encoded = none.encode(example(2, TURNS), 512)
    assert (encoded.tokens == none.layout.image_token).sum() == 2 * MODEL.media_tokens
    assert (encoded.tokens[encoded.loss_weights > 0] < none.tokenizer.vocab_size).all()
