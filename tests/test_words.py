"""The words of docstrings, comments, messages and Markdown: plain English, with one word for one thing."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Folders and files that the test reads, relative to the repository.
READ = (
    *("mllm_jax", "configs", "launch", "tests", "benchmarks", "docs"),
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md"),
)
# A pattern -> what to write instead. Technical uses have other words beside them, such as "stands for".
BANNED = {
    r"(?i)\bpictures?\b": "image",
    r"(?i)\b(text|picture|image|vision|audio) towers?\b": "text encoder, image encoder, audio encoder",
    r"(?i)\bbehind\b": "after",
    r"(?i)\bstands?\b(?! for\b|-)|\bstood\b": "is, has",
    r"(?i)\b(tells?|told)\b": "report, print; distinguish",
    r"(?i)\b(hangs?|hung) on\b": "depends on",
    r"(?i)\bso many\b": "n, a number",
    r"(?i)\bthe reverse\b(?! (order|direction|pass|mode))": "the inverse",
    r"(?i)\bheed(s|ed|ing)?\b": "read, follow",
    r"(?i)\bthe like\b": "and so on",
    r"(?i)\blearnt\b": "learned; for a position: carries loss",
    r"\bOf several\b": "Every, each: begin with the subject",
    r"(?i)\b(nowhere|whither|whence|thereby|therein|thereof)\b": "a plain word: in no file, by this, in it",
    r"(?i)\bbesides(?=[.;:!?)]|$)": "also, too",
    r"(?i)\bmust needs\b": "must",
    r"(?i)\bof its own accord\b": "by itself",
    r"(?i)\b(sees?|seen|saw) to (it|that|them|itself|themselves)\b": "ensure, check",
    r"(?i)\bwhat is more\b": "also",
}
# No docstring begins with these. The docstring of a function begins with a verb in the third person.
OPENINGS = {"What", "Whether", "How", "Where", "Those", "That", "Which", "Who", "When"}
PROPERTIES = {"property", "cached_property", "setter"}
MESSAGE = re.compile(r"(Error|Exit|Warning|Failed|print|say|warn|warning|info|error|exit|fail|skip)$")

ARGUMENT = re.compile(r"(?m)^ +[a-z_]\w*(, [a-z_]\w*)*:")  # a name in Args or Attributes

Line = tuple[int, str]


def faults(text: str) -> Iterator[str]:
    """Yields each banned word in a text, with what to write instead."""
    prose = re.sub(r"`[^`]*`", "``", text)
    for pattern, instead in BANNED.items():
        for found in re.finditer(pattern, prose):
            yield f"{found.group()!r}: write {instead}"


def opening_faults(node: ast.AST, docstring: str) -> Iterator[str]:
    """Yields the first word of a docstring if it cannot be a function's verb, or a noun phrase of anything else."""
    first = re.match(r"\W?\w*", docstring.strip()).group()
    decorators = {name_of(decorator) for decorator in getattr(node, "decorator_list", ())}
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not PROPERTIES & decorators:
        if not re.fullmatch(r"(?!Args|Attributes)[A-Z]\w*s", first):
            yield f"{first!r} opens the docstring of a function: begin with a verb, such as Returns, Reads, Checks"
    elif first in OPENINGS:
        yield f"{first!r} opens a docstring: begin with a noun, or a verb in the third person"


def name_of(node: ast.expr) -> str:
    """Returns the last name of an expression: "error" of `parser.error(...)`."""
    if isinstance(node, ast.Call):
        return name_of(node.func)
    return getattr(node, "attr", getattr(node, "id", ""))


def strings(node: ast.AST) -> Iterator[Line]:
    """Yields the strings inside a node; the values in an f-string become {}."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.lineno, node.value
    elif isinstance(node, ast.JoinedStr):
        yield node.lineno, "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
    else:
        for child in ast.iter_child_nodes(node):
            yield from strings(child)


def python_faults(source: str) -> Iterator[Line]:
    """Yields the faults of comments, docstrings, and messages: of errors, print, warnings and help texts."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield from ((token.start[0], fault) for fault in faults(token.string))
    texts: set[Line] = set()
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        first = body[0] if isinstance(body, list) and body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            texts.add((first.lineno, ARGUMENT.sub("", first.value.value)))
            yield from ((first.lineno, fault) for fault in opening_faults(node, first.value.value))
        if isinstance(node, ast.Raise) or (isinstance(node, ast.Call) and MESSAGE.search(name_of(node))):
            texts.update(strings(node))
        if isinstance(node, ast.keyword) and node.arg == "help":
            texts.update(strings(node.value))
    for line, text in sorted(texts):
        yield from ((line, fault) for fault in faults(text))


def markdown_faults(source: str) -> Iterator[Line]:
    """Yields the faults of Markdown outside of code."""
    fenced = False
    for number, line in enumerate(source.splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced and not line.startswith("    "):
            yield from ((number, fault) for fault in faults(line))


def files() -> list[Path]:
    """Returns the Python and Markdown files in READ."""
    found = set()
    for path in (ROOT / entry for entry in READ):
        found |= set(path.rglob("*.py")) | set(path.rglob("*.md")) if path.is_dir() else {path}
    return sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(ROOT).parts))


def test_the_words_are_plain():
    wrong = []
    for path in files():
        source = path.read_text(encoding="utf-8")
        found = markdown_faults(source) if path.suffix == ".md" else python_faults(source)
        wrong += [f"{path.relative_to(ROOT)}:{line}: {fault}" for line, fault in found]
    assert not wrong, f"{len(wrong)} faults:\n" + "\n".join(wrong)


@pytest.mark.parametrize(
    "source,count",
    [
        ("# two pictures\n", 1),
        ("x = 1  # what stands here; n stands for a number, as a stand-in\n", 1),
        ('def f():\n    """Returns what it is told."""\n', 1),
        ('def f():\n    """Whether it is."""\n', 1),
        ('def f():\n    """The size."""\n', 1),
        ('class A:\n    """What it is."""\n\n    @property\n    def f(self):\n        """The size."""\n', 1),
        ('"""How it works."""\n', 1),
        ('def f(x):\n    """\n    Args:\n        x: a number.\n    """\n', 1),
        ('def f(tell):\n    """Reads.\n\n    Args:\n        tell: the function.\n    """\n', 0),
        ('raise ValueError(f"{n} pictures", "the `pictures` of `picture`")\n', 1),
        ('parser.add_argument("--picture", help="a picture")\n', 1),
        ('print("the reverse order")\n', 0),
        ('prompt = "Describe the picture behind you."\n', 0),
        ('warn("it is said nowhere, or elsewhere besides.")\n', 2),
        ("# x goes behind; besides this, a likelihood\n", 1),
    ],
)
def test_words_are_found_in_prose_and_not_in_data(source, count):
    assert len(list(python_faults(source))) == count


def test_words_are_found_in_markdown_and_not_in_code():
    source = "Two pictures, `picture`.\n\n```\npicture\n```\n\n    picture\n"
    assert [line for line, _ in markdown_faults(source)] == [1]
