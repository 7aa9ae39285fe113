"""Renders chat templates, which are untrusted programs, within a budget of time, text and memory.

Jinja's sandbox restricts the objects that a template can reach, but not its time. Here every loop step, call, filter
and operator takes from a budget, and operations that would make a large value are refused before they run. No thread,
signal or process is needed. Templates get the same options, filters and names as in transformers, except for filters
of web pages and dummy text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from datetime import datetime
from functools import lru_cache, wraps
from typing import Any

import jinja2
import numpy as np
from jinja2 import nodes
from jinja2.compiler import CodeGenerator
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedEscapeFormatter, SandboxedFormatter
from jinja2.utils import Namespace, pass_context

from mllm_jax.data.template_budget import (
    Budget,
    BudgetError,
    before_filter,
    before_join,
    before_method,
    before_operator,
    require_width,
)

MAX_TEMPLATE = (
    100_000  # characters, which take up to 2 s to compile; the longest templates of well-known models have 30,000
)
_UNKNOWN = ("lipsum", "pprint", "striptags", "urlize", "wordwrap", "xmlattr")  # slow, and useless in a chat
# Filters that read only the first level of a value; all others may write it out.
_SHALLOW = {
    "attr", "batch", "count", "d", "default", "dictsort", "first", "groupby", "items", "join", "last", "length", "list",
    "map", "max", "min", "random", "reject", "rejectattr", "reverse", "select", "selectattr", "slice", "sort", "sum",
    "unique",
}  # fmt: skip


def render(template: str, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
    """Renders messages with a chat template.

    Raises:
        Exception: any that the template raises; among others BudgetError and RecursionError.
    """
    if len(template) > MAX_TEMPLATE:
        raise BudgetError(f"a template of {len(template):,} characters, more than {MAX_TEMPLATE:,}")
    given = _plain({"messages": [dict(message) for message in messages], **variables})
    given["messages"] = [_aliased(message) for message in given["messages"]]
    compiled = _compiled(template)
    budget = Budget(given)
    token = _BUDGET.set(budget)
    try:
        return budget.written(compiled.render(**given))
    finally:
        _BUDGET.reset(token)


@lru_cache(maxsize=64)
def _compiled(template: str) -> jinja2.Template:
    return _Environment().from_string(template)


def _plain(value: Any) -> Any:
    """Returns a value with only JSON's types, as transformers gives it to templates; others become their names."""
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return (tuple if isinstance(value, tuple) else list)(_plain(item) for item in value)
    if isinstance(value, np.generic):
        return _plain(value.item())
    return str(value) if isinstance(value, str) else f"<{type(value).__name__}>"


def _aliased(message: dict[str, Any]) -> dict[str, Any]:
    """Returns a message without empty keys, and with the names of reasoning that templates use, as in transformers."""
    message = {key: value for key, value in message.items() if value is not None}
    reasoning = next((message[key] for key in ("reasoning_content", "thinking", "reasoning") if key in message), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


_BUDGET: ContextVar[Budget] = ContextVar("budget")


# ---- Jinja with a budget


class _Code(CodeGenerator):
    """Generates Python code that counts the steps of loops and each output of the template's text."""

    def visit_For(self, node: nodes.For, frame: Any) -> None:
        node.body = [nodes.Output([]).set_lineno(node.lineno), *node.body]
        if node.test is not None:  # an item that the test leaves out is a step too
            step = nodes.Call(nodes.EnvironmentAttribute("step"), [], [], None, None)
            node.test = nodes.And(step, node.test).set_lineno(node.lineno)
        super().visit_For(node, frame)

    def visit_Output(self, node: nodes.Output, frame: Any) -> None:
        written = sum(len(child.data) for child in node.nodes if isinstance(child, nodes.TemplateData))
        if written or not node.nodes:  # an empty one begins a loop's body
            self.writeline(f"environment.spend({written})", node)
        if node.nodes:
            super().visit_Output(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Any) -> None:
        self.write("environment.joined(context, (")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_List(self, node: nodes.List, frame: Any) -> None:
        self._made(super().visit_List, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Any) -> None:
        self._made(super().visit_Dict, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Any) -> None:
        if node.ctx == "load":
            self._made(super().visit_Tuple, node, frame)
        else:
            super().visit_Tuple(node, frame)

    def _made(self, visit: Any, node: nodes.Node, frame: Any) -> None:
        self.write("environment.made(")
        visit(node, frame)
        self.write(")")


class _Bounded:
    """Formats the fields of `str.format` within the budget."""

    def format_field(self, value: Any, spec: str) -> str:
        for width in re.findall(r"\d+", spec):
            require_width(width)
        _BUDGET.get().text(value)
        return _BUDGET.get().made(super().format_field(value, spec))


class _Formatter(_Bounded, SandboxedFormatter):
    pass


class _EscapeFormatter(_Bounded, SandboxedEscapeFormatter):
    pass


class _Environment(ImmutableSandboxedEnvironment):
    """The environment that transformers makes for chat templates, with a budget."""

    code_generator_class = _Code
    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self):
        # Nothing is computed while a template is compiled.
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            finalize=_finalize,
            extensions=[_Generation, loopcontrols],
        )
        for name in _UNKNOWN:
            self.filters.pop(name, None)
            self.globals.pop(name, None)
        self.filters["tojson"] = _tojson
        self.filters = {name: _counted(name, function) for name, function in self.filters.items()}
        self.globals |= dict(raise_exception=_refuse, strftime_now=_now, dict=_Dict(), namespace=_Namespace)

    def step(self) -> bool:
        """Counts a step of a loop over an item that it leaves out; `call` does the counting."""
        return True

    def spend(self, amount: int) -> None:
        """Counts a step of a loop, or text of the template."""
        _BUDGET.get().spend(amount)

    def made(self, value: Any) -> Any:
        """Counts a list, tuple or mapping literal of the template."""
        return _BUDGET.get().made(value)

    def joined(self, context: Any, parts: tuple) -> str:
        """Implements the operator `~`."""
        budget = _BUDGET.get()
        for part in parts:
            budget.text(part)
        budget.spend(sum(len(part) for part in parts if isinstance(part, str)))
        join = jinja2.runtime.markup_join if context.eval_ctx.autoescape else jinja2.runtime.str_join
        return budget.made(join(parts))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        budget = _BUDGET.get()
        before_operator(budget, operator, left, right)
        return budget.made(super().call_binop(context, operator, left, right))

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        budget = _BUDGET.get()
        budget.spend()
        owner, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        if isinstance(owner, (str, bytes)) and name == "join" and args:
            args = (before_join(budget, args[0], owner), *args[1:])
        elif isinstance(owner, (str, bytes, int)):
            before_method(budget, owner, name, args, kwargs)
        return budget.made(super().call(context, obj, *args, **kwargs))

    def getitem(self, obj: Any, argument: Any) -> Any:
        return (
            _BUDGET.get().made(super().getitem(obj, argument))
            if isinstance(argument, slice)
            else super().getitem(obj, argument)
        )

    def wrap_str_format(self, value: Any) -> Any:
        if super().wrap_str_format(value) is None:
            return None
        text, is_mapping = value.__self__, value.__name__ == "format_map"
        escape = getattr(text, "escape", None)
        formatter = _Formatter(self) if escape is None else _EscapeFormatter(self, escape=escape)

        def wrapper(*args: Any, **kwargs: Any) -> str:
            if is_mapping:
                (kwargs,), args = args, ()
            return type(text)(formatter.vformat(text, args, kwargs))

        return wrapper


def _counted(name: str, function: Any) -> Any:
    """Returns a filter that takes from the budget. It asks for the context, so that it never runs at compile time."""
    wanted = getattr(getattr(function, "jinja_pass_arg", None), "name", None)

    @pass_context
    @wraps(function, assigned=("__name__", "__doc__"), updated=())
    def counted(context: Any, value: Any, /, *args: Any, **kwargs: Any) -> Any:
        budget = _BUDGET.get()
        if name not in _SHALLOW:
            budget.text(value)
        if name == "join" and not isinstance(value, jinja2.Undefined):
            between = args[0] if args else kwargs.get("d", "")
            value = before_join(budget, value, between if isinstance(between, str) else "")
        before_filter(budget, name, value, args, kwargs)
        first = {"context": context, "eval_context": context.eval_ctx, "environment": context.environment}.get(wanted)
        result = function(value, *args, **kwargs) if first is None else function(first, value, *args, **kwargs)
        return budget.made(result)

    return counted


@pass_context
def _finalize(context: Any, value: Any) -> Any:
    """Counts the output of the template."""
    budget = _BUDGET.get()
    budget.text(value)
    budget.spend(len(value) if isinstance(value, str) else 0)
    return value


class _Generation(Extension):
    """{% generation %}...{% endgeneration %}, which marks the assistant's text: written unchanged here."""

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return nodes.CallBlock(self.call_method("_written"), [], [], body).set_lineno(line)

    def _written(self, caller: Any) -> str:
        return caller()


class _Dict:
    """`dict` in a template, without access to the class itself."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict:
        return dict.fromkeys(*args, **kwargs)


class _Namespace(Namespace):
    """`namespace` in a template: no names that begin with an underscore, and written out as one word."""

    def __init__(*args: Any, **kwargs: Any):
        self, values = args[0], dict(*args[1:], **kwargs)
        for name in values:
            _require_public(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _require_public(name)
        Namespace.__setitem__(self, name, value)

    def __repr__(self) -> str:
        return "<Namespace>"


def _require_public(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace with {name[:60]!r}, which begins with an underscore")


def _tojson(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    for separator in separators or ():
        require_width(str(len(separator)))
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str):
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)
