"""Chat templates are rendered as in transformers, and none takes more time or memory than its budget."""

from __future__ import annotations

import threading
import time
import tracemalloc

import numpy as np
import pytest
from tiny_language import byte_tokenizer

from mllm_jax.data.template_budget import MAX_MADE, MAX_SECONDS
from mllm_jax.data.template_sandbox import MAX_TEMPLATE
from mllm_jax.errors import DataError

TURNS = [
    {"role": "system", "content": "be brief", "name": None},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is <it>?"}]},
    {"role": "assistant", "content": "a\n\ncat", "thinking": "hm"},
    {"role": "user", "content": "  grüße 🦊 "},
]
HONEST = {
    "loop": "{% for m in messages %}{{ loop.index ~ '/' ~ loop.length ~ m.role }}"
    "{{ loop.nextitem.role if not loop.last }}{% endfor %}",
    "filtered loop": "{% for m in messages if m.role != 'system' %}{{ loop.first }}{{ m['role'] }}{% else %}x"
    "{% endfor %}",
    "recursive loop": "{% for x in [1, [2, [3]]] recursive %}{% if x is iterable %}<{{ loop(x) }}>{% else %}{{ x }}"
    "{% endif %}{% endfor %}",
    "break": "{% for m in messages %}{% if loop.index0 == 2 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
    "namespace": "{% set ns = namespace(n=0, list=[]) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% set ns.list = ns.list + [m.role] %}{% endfor %}{{ ns.n }}{{ ns.list | join(', ') }}",
    "macro": "{% macro say(m, end='!') -%}\n  <{{ m.role }}>{{ caller() if caller }}{{ end }}\n{%- endmacro %}"
    "{{ say(messages[0]) }}{% call say(messages[1], end='') %}in{% endcall %}",
    "set block": "{% set x %}{{ messages[0].content | upper }}{% endset %}{{ x }}{{ x | length }}",
    "filters": "{{ messages[3].content | trim | replace('ü', 'ue') | title }}{{ [3, 1, 2] | sort | first }}"
    "{{ messages | map(attribute='role') | unique | list }}{{ 'a\nb' | indent(4, true) }}{{ 'x' | center(9) }}"
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ 2.567 | round(1) }}{{ [1, 2] | sum }}"
    "{{ {'b': 1, 'a': 2} | dictsort }}{{ {'b': 1}.items() | list }}{{ '%05.1f %s' | format(1.5, 'x') }}"
    "{{ '7' | int + 1 }}"
    "{{ [[1], [2]] | sum(start=[]) }}{{ [1, 2, 3] | batch(2, 0) | list }}{{ messages | groupby('role') | length }}",
    "filter block": "{% filter upper %}abc{{ messages[0].role }}{% endfilter %}",
    "tojson": "{{ messages | tojson }}{{ {'ü': [1, none, true]} | tojson(indent=2) }}"
    "{{ {'b': 1, 'a': 2} | tojson(sort_keys=true) }}",
    "text": "{{ 'a{}b{x:>4}'.format(1, x=2) }}{{ '%s-%d' % ('a', 3) }}{{ 'a,b'.split(',') }}{{ 'ab' * 3 }}"
    "{{ '-'.join(['a', 'b']) }}"
    "{{ 'abc'[1:] }}{{ 'abc'.replace('b', 'xx') }}{{ ' x '.strip() }}{{ 'a'.ljust(4) }}{{ 'x'.startswith('x') }}",
    "numbers": "{{ 7 // 2 }}{{ 2 ** 10 }}{{ 7 % 4 }}{{ -3 + 1.5 }}{{ 1 / 4 }}{{ 3 * 4 }}{{ 10 - 2 }}{{ [0] * 3 }}",
    "undefined": "{{ nowhere }}{{ nowhere is defined }}{{ messages[0].nowhere }}{{ nowhere or 'else' }}{{ bos_token }}",
    "escaping": "{{ '<a>' | e }}{% autoescape true %}{{ '<a>' ~ '<b>' }}{{ '{}'.format('<c>') }}{% endautoescape %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.role }}{% set x = 1 %}{% endgeneration %}{% endfor %}",
    "reasoning": "{{ messages[2].reasoning_content }}{{ messages[2].thinking }}{{ 'name' in messages[0] }}",
    "blocks and blank lines": "  {% if true %}\n  a\n  {% endif %}\n{# note #}\nb {%- if true %} c{% endif %}\n",
    "dict": "{{ dict(a=1).a }}{{ dict([('b', 2)]) }}{{ range(3) | list }}{{ range(1, 7, 2) | last }}"
    "{% set a, b = 1, 2 %}{{ b }}",
    "prompt": "{{ tools is none }}{% if add_generation_prompt %}go{% endif %}",
    "joiner": "{% set c = cycler('a', 'b') %}{{ c.next() }}{{ c.next() }}{% set j = joiner('|') %}{{ j() }}{{ j() }}",
}


def refusal_of(template: str, messages=TURNS) -> str:
    """Returns the message of a refused template."""
    tokenizer = byte_tokenizer(template=template)
    with pytest.raises(DataError) as refusal:
        tokenizer.render_chat(messages)
    return str(refusal.value)


@pytest.mark.parametrize("name", HONEST)
def test_templates_render_as_in_transformers(name):
    tokenizer = byte_tokenizer(template=HONEST[name])
    for prompt in (True, False):
        wanted = tokenizer.backend.apply_chat_template(TURNS, add_generation_prompt=prompt, tokenize=False)
        assert tokenizer.render_chat(TURNS, add_generation_prompt=prompt) == wanted != ""
        ids = tokenizer.backend.apply_chat_template(TURNS, add_generation_prompt=prompt, return_dict=True)["input_ids"]
        assert tokenizer.encode_chat(TURNS, prompt) == ids


GROWS = "{% set ns = namespace(x='aa') %}{% for i in range(99) %}{% set ns.x = "
DEEP = "{% set ns = namespace(x=[1], y=[1]) %}{% for i in range(40) %}{% set ns.x = "
HOSTILE = {
    "two loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "loops that leave all out": "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}"
    "{% endfor %}",
    "text in loops": "{% for i in range(99999) %}" + "x" * 90_000 + "{% endfor %}",
    "text in a macro": "{% macro m() %}" + "x" * 90_000 + "{% endmacro %}{% for i in range(99999) %}"
    "{% set x = m() %}{% endfor %}",
    "a long text": "{% for i in range(99999) %}ten letters{% endfor %}",
    "times": "{{ 'a' * 10**11 }}",
    "times, a list": "{{ ([0] * 10**11) | length }}",
    "times, nested": "{{ ([[0] * 1000] * 100000) | string | length }}",
    "power": "{{ 10 ** (10 ** 10) }}",
    "power step by step": "{% set ns = namespace(x=2) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}"
    "{% endfor %}",
    "doubling": GROWS + "ns.x ~ ns.x %}{% endfor %}",
    "doubling, plus": GROWS + "ns.x + ns.x %}{% endfor %}",
    "doubling, join": GROWS + "[ns.x, ns.x] | join %}{% endfor %}",
    "doubling, percent": GROWS + "'%s%s' % (ns.x, ns.x) %}{% endfor %}",
    "doubling, format": GROWS + "'{0}{0}'.format(ns.x) %}{% endfor %}",
    "doubling, replace": GROWS + "ns.x.replace('a', 'aa') %}{% endfor %}",
    "doubling, lists": DEEP + "[ns.x, ns.x] %}{% set ns.y = [ns.y, ns.y] %}{% endfor %}{{ ns.x == ns.y }}",
    "doubling, tuples": DEEP + "(ns.x, ns.x) %}{% set ns.y = (ns.y, ns.y) %}{% endfor %}{{ ns.x == ns.y }}",
    "doubling, mappings": DEEP + "{1: ns.x, 2: ns.x} %}{% endfor %}{{ ns.x }}",
    "doubling, dict": DEEP + "dict(a=ns.x, b=ns.x) %}{% endfor %}{{ ns.x }}",
    "doubling, filters": DEEP + "[1] | batch(3, ns.x) | list %}{% endfor %}{{ ns.x }}",
    "doubling, written": DEEP + "(ns.x, ns.x) | string %}{% endfor %}",
    "width, percent": "{{ '%999999999d' % 1 }}",
    "width, star": "{{ '%*d' % (10**9, 1) }}",
    "width, format": "{{ '{:999999999}'.format(1) }}",
    "width, nested": "{{ '{:{}}'.format(1, 10**9) }}",
    "width, format_map": "{{ '{a:999999999}'.format_map({'a': 1}) }}",
    "width, filter": "{{ '%999999999d' | format(1) }}",
    "width, ljust": "{{ 'a'.ljust(10**10) }}",
    "width, center": "{{ 'a' | center(10**10) }}",
    "width, indent": "{{ ('a\n' * 1000) | indent(10**9) }}",
    "width, tojson": "{{ [[[1]]] | tojson(indent=10**9) }}",
    "width, zfill": "{{ '1'.zfill(10**10) }}",
    "width, expandtabs": "{{ '\t'.expandtabs(10**10) }}",
    "width, bytes": "{{ (1).to_bytes(10**10, 'big') }}",
    "replace nothing": "{% set x = 'a' * 100000 %}{{ x.replace('', x) }}",
    "replace nothing, filter": "{% set x = 'a' * 100000 %}{{ x | replace('', x) }}",
    "join": "{% set x = 'a' * 100000 %}{{ x.join(x) }}",
    "join, filter": "{% set x = 'a' * 100000 %}{{ x | join(x) }}",
    "translate": "{% set x = 'a' * 100000 %}{{ x.translate({97: x}) }}",
    "strip": "{% set x = 'a' * 1000000 %}{{ x.strip('b' * 1000000 + 'a') }}",
    "trim": "{% set x = 'a' * 1000000 %}{{ x | trim('b' * 1000000 + 'a') }}",
    "sum of lists": "{{ ([[1]] * 100000) | sum(start=[]) | length }}",
    "batch": "{{ [1] | batch(10**10, 0) | list }}",
    "slice": "{{ [1] | slice(10**10) | list | length }}",
    "round": "{{ 2.5 | round(10**9, 'ceil') }}",
    "range": "{{ range(10**12) }}",
    "lipsum": "{{ lipsum(n=10**6) }}",
    "division": "{{ 1/0 }}",
    "types": "{{ 1 + 'a' }}",
    "include": "{% include 'x' %}",
    "import": "{% import 'x' as x %}",
    "extends": "{% extends 'x' %}",
    "a macro that calls itself": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "a macro that calls itself twice": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}"
    "{{ m(60) }}",
    "a loop that calls itself": "{% for x in [1] recursive %}{{ loop([1, 1]) }}{% endfor %}",
    "loops in loops": "{% for x in range(9) recursive %}{% if loop.depth < 40 %}{{ loop(range(9)) }}{% endif %}"
    "{% endfor %}",
    "class": "{{ ''.__class__.__mro__ }}",
    "class by attr": "{{ (''|attr('__class__')).__mro__ }}",
    "class by format": "{{ '{0.__class__.__mro__}'.format('') }}",
    "globals": "{{ raise_exception.__globals__.json }}",
    "code": "{{ namespace.__init__.__globals__ }}",
    "environment": "{{ self._TemplateReference__context.environment.made.__self__ }}",
    "underscore": "{% set ns = namespace() %}{% set ns._x = 1 %}",
    "no such filter": "{{ 'a' | nowhere }}",
    "syntax": "{% for %}",
    "nested brackets": "{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}",
    "nested lists": "{{ " + "[" * 500 + "]" * 500 + " }}",
    "nested ifs": "{% if true %}" * 500 + "{% endif %}" * 500,
    "nested loops": "{% for i in [1] %}" * 40 + "{% endfor %}" * 40,
    "too long": "x" * (MAX_TEMPLATE + 1),
    "raised": "{{ raise_exception('no such role') }}",
    "stopped": "{{ messages.__iter__().__next__() }}",
    "strftime": "{{ strftime_now(messages) }}",
    "half a character": "{{ '\\ud800'.encode() }}",
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_refused_within_its_budget(name):
    byte_tokenizer()  # so that its imports are not measured
    tracemalloc.start()
    before = time.thread_time()
    try:
        text = refusal_of(HOSTILE[name])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "a template that ends" in text and len(text) < 1_500
    assert time.thread_time() - before < 4 * MAX_SECONDS + 1, "tracing memory makes it slower"
    assert peak < 40 * MAX_MADE


def test_a_template_sees_data_alone():
    """Checks objects whose methods a sandbox does not know."""
    template = "{% for key, value in messages[0].items() %}{{ key }}={{ value }} {% endfor %}"
    tokenizer = byte_tokenizer(template=template)
    given = {"role": "user", "a": (1, "x"), "b": np.float32(0.5), "c": np.zeros(3), "d": {"e": [None, True]}, "f": None}
    text = "role=user a=(1, 'x') b=0.5 c=<ndarray> d={'e': [None, True]} "
    assert tokenizer.render_chat([given]) == text
    assert tokenizer.backend.apply_chat_template([given], tokenize=False) == text


def test_the_sandbox_holds():
    for name in ("class", "class by attr", "class by format", "globals", "code", "environment", "underscore"):
        assert "SecurityError" in refusal_of(HOSTILE[name]) or "unsafe" in refusal_of(HOSTILE[name]), name
    tokenizer = byte_tokenizer(template="{{ messages.append(1) }}{{ messages }}")
    with pytest.raises(DataError, match="SecurityError"):
        tokenizer.render_chat(TURNS)


def test_a_long_conversation_is_within_the_budget():
    """Checks that a template linear in the conversation stays within the budget, which grows with it."""
    template = (
        "{% set ns = namespace(last='') %}{% for m in messages %}{% set content = m.content | trim %}"
        "{% set ns.last = content.split('</think>')[-1] %}{{ '<' + m.role + '>' + ns.last ~ '\n' }}{% endfor %}"
    )
    tokenizer = byte_tokenizer(template=template)
    for turns, length in ((3_000, 100), (3, 1_000_000)):
        messages = [{"role": "user", "content": "x" * length}] * turns
        assert tokenizer.render_chat(messages) == ("<user>" + "x" * length + "\n") * turns


def test_the_budget_is_each_renderings_own_in_every_thread():
    tokenizer = byte_tokenizer(template="{% for i in range(40000) %}{{ 'xxxxx' }}{% set x = 'x' * 20 %}{% endfor %}")
    made: list[int] = []

    def render():
        for _ in range(2):
            made.append(len(tokenizer.render_chat(TURNS)))

    threads = [threading.Thread(target=render) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [200_000] * 4
