"""Chat templates of hostile and honest fragments, and mutated tokenizer, template and generation JSON."""

from __future__ import annotations

import json
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fuzzing import _faults as faults

SPECIAL = ("<|end|>", "<|user|>", "<|assistant|>", "<|system|>")
TEMPLATE = (
    "{% for m in messages %}{% if loop.index0 and m.role == messages[loop.index0 - 1].role %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}{% if m.role == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TURNS = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]},
    {"role": "assistant", "content": "<think>hm</think>a cat"},
    {"role": "user", "content": "grüße 🦊"},
]
ONE_IN = 12  # cases read files of a tokenizer
# Expressions; E is another expression.
EXPRESSIONS = (
    "messages", "messages[0].content", "ns.x", "x", "m", "loop", "nowhere", "'a'", "'<>%{}'", "1", "0", "-1", "2.5",
    "99999", "10**9", "[]", "{}", "[E, E]", "(E, E)", "{'a': E}", "namespace(x=E)", "dict(a=E)", "range(E)",
    "range(99999)", "cycler(E)", "E + E", "E ~ E", "E * E", "E ** E", "E / E", "E // E", "E % E", "E - E", "E == E",
    "E in E", "E < E", "not E", "E if E else E", "E[E]", "E[1:]", "E.x", "E.__class__", "E.role", "f(E)", "f(E, E)",
    "loop(E)", "caller()", "m.content", "E | length", "E | list", "E | join(E)", "E | join", "E | upper", "E | title",
    "E | trim", "E | replace(E, E)", "E | tojson", "E | tojson(indent=E)", "E | map('upper')",
    "E | map(attribute='role') | list", "E | select | list", "E | sort", "E | first", "E | batch(E, E) | list",
    "E | slice(E) | list", "E | round(E, 'ceil')", "E | int", "E | float", "E | string", "E | center(E)",
    "E | indent(E)", "E | format(E)", "E | sum(start=E)", "E | groupby('role')", "E | dictsort", "E | items | list",
    "E | unique | list", "E | default(E)", "E | attr('x')", "E | reverse", "E | min", "E | escape", "E | safe",
    "E | urlencode", "E | wordcount", "E | truncate(E)", "E | random", "E | abs", "E | filesizeformat", "E.split(E)",
    "E.join(E)", "E.replace(E, E)", "E.strip(E)", "E.ljust(E)", "E.zfill(E)", "E.format(E, x=E)",
    "'{:>{}}'.format(E, E)", "'%s' % E", "'%*d' % (E, E)", "E.encode()", "E.items()", "E.keys()", "E.get(E)",
    "E.startswith(E)", "E.count(E)", "E.translate(E)", "E.expandtabs(E)", "E.splitlines()", "E.append(E)",
    "(1).to_bytes(E, 'big')", "strftime_now(E)", "raise_exception(E)", "lipsum(n=E)", "joiner(E)()", "E is string",
    "E is iterable", "E is defined", "E is divisibleby E",
)  # fmt: skip
# Statements; S is a list of statements.
STATEMENTS = (
    "text ", "{{ E }}", "{{ E }}", "{% set x = E %}", "{% set ns.x = E %}", "{% set x %}S{% endset %}",
    "{% if E %}S{% else %}S{% endif %}", "{% for m in E %}S{% endfor %}", "{% for m in messages %}S{% endfor %}",
    "{% for m in E if E %}S{% else %}S{% endfor %}", "{% for m in E recursive %}S{% endfor %}",
    "{% for m in range(99999) %}S{% endfor %}", "{% macro f(x, m=1) %}S{% endmacro %}",
    "{% call f(E) %}S{% endcall %}", "{% filter upper %}S{% endfilter %}", "{% with x = E %}S{% endwith %}",
    "{% include E %}", "{% import E as y %}", "{% extends E %}", "{% block b %}S{% endblock %}",
    "{% generation %}S{% endgeneration %}", "{# note #}", "{% autoescape true %}S{% endautoescape %}", "{% break %}",
    "{% continue %}", "{% raw %}S{% endraw %}", "{%- if E -%}S{%- endif -%}", "{% set ns.x = [ns.x, ns.x] %}",
    "{% set ns.x = ns.x ~ ns.x %}", "{% set ns.x = ns.x + ns.x %}", "{% set x, y = E %}", "{% do E %}",
)  # fmt: skip


def cases(rng: Any, n: int) -> Iterator[tuple[str, Callable[[], object]]]:
    from mllm_jax.data.chat_tokenizer import ChatTokenizer

    rng = random.Random(rng.random())
    with tempfile.TemporaryDirectory() as temporary:
        whole = Path(temporary) / "whole"
        tokenizer = ChatTokenizer(_backend())
        tokenizer.save(whole)
        (whole / "generation_config.json").write_text('{"eos_token_id": [256, 7], "top_k": 3}')
        (whole / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
        ChatTokenizer.load(whole)  # its imports are not part of a case
        for number in range(n):
            if number % ONE_IN == 0:
                folder = Path(temporary) / f"{number % (2 * ONE_IN)}"
                shutil.rmtree(folder, ignore_errors=True)
                what = _damage(rng, shutil.copytree(whole, folder))
                yield f"{number} {what}", lambda folder=folder: _load(folder)
            else:
                template = _template(rng)
                yield f"{number} {template!a}", lambda template=template: _render(tokenizer, template)


def _backend(template: str = TEMPLATE) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=letters, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL))
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")
    made.chat_template = template
    return made


def _template(rng: random.Random) -> str:
    if rng.random() < 0.1:
        return faults.data(rng, TEMPLATE.encode()).decode("utf-8", rng.choice(("replace", "surrogateescape")))
    text = "{% set ns = namespace(x='a') %}" + _statements(rng, rng.randrange(1, 5))
    return text if rng.random() < 0.9 else faults.data(rng, text.encode()).decode("utf-8", "replace")


def _statements(rng: random.Random, levels: int) -> str:
    made = []
    for _ in range(rng.randrange(1, 4)):
        pieces = rng.choice(STATEMENTS if levels else STATEMENTS[:5]).split("S")
        text = pieces[0] + "".join(_statements(rng, levels - 1) + piece for piece in pieces[1:])
        made.append("".join(_filled(rng, part) for part in _between(text)))
    return "".join(made)


def _between(text: str) -> Iterator[str]:
    """Yields the pieces of a text, and each " E" between them."""
    for number, piece in enumerate(text.split(" E")):
        yield from ([" E"] if number else [])
        yield piece


def _filled(rng: random.Random, part: str) -> str:
    return f" {_expression(rng, 3)}" if part == " E" else part


def _expression(rng: random.Random, levels: int) -> str:
    pieces = rng.choice(EXPRESSIONS if levels else EXPRESSIONS[:15]).split("E")
    return pieces[0] + "".join(f"({_expression(rng, levels - 1)}){piece}" for piece in pieces[1:])


def _render(tokenizer: Any, template: str) -> None:
    tokenizer.backend.chat_template = template
    tokenizer.encode_chat(TURNS)


def _damage(rng: random.Random, folder: Path) -> str:
    """Damages one file of a tokenizer; returns a description."""
    path = rng.choice(sorted(path for path in folder.iterdir() if path.suffix == ".json"))
    if path.name == "tokenizer_config.json":
        (folder / "chat_template.json").unlink()
    content = path.read_bytes()
    how = rng.randrange(8)
    if how < 6:
        content = json.dumps(faults.values(rng, json.loads(content))).encode()
    elif how == 6:
        content = faults.data(rng, content)
    else:
        content = rng.choice((b"", b"[]", b"null", b"[" * 100_000, b"\xff\xfe", b'{"a":' * 100_000, b"{}"))
    path.write_bytes(content)
    return f"{path.name}: {content[:300]!a}"


def _load(folder: Path) -> None:
    from mllm_jax.data.chat_tokenizer import ChatTokenizer

    tokenizer = ChatTokenizer.load(folder)
    tokenizer.decode(tokenizer.encode("a text"))
    if tokenizer.has_template:
        tokenizer.encode_chat(TURNS)
