"""Word and character error rates: micro-averaged, as jiwer counts them, and as metrics of a task."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import jiwer
import numpy as np
import pytest

from mllm_jax import Answer, Example, Message, Task
from mllm_jax.data.processing.text_normalizer import BasicNormalizer
from mllm_jax.errors import ConfigError, DataError
from mllm_jax.evaluation.metrics import ErrorRate, cer, wer


def test_wer_is_an_average_over_all_words():
    answers, targets = ["a b c x", "d"], ["a b c d", "e"]
    assert wer(answers, targets) == 2 / 5 != (1 / 4 + 1) / 2
    assert wer(["one two three"], ["one three"]) == 1 / 2  # added
    assert wer(["one"], ["one two three"]) == 2 / 3  # missing
    assert wer(["a\n b\tc "], [" a  b c"]) == 0, "any white space separates words"
    assert wer(["A"], ["a"]) == 1, "texts are compared as they are"
    assert wer(["x y z"], ["a"]) == 3


def distance(one: list, other: list) -> int:
    """Returns the Levenshtein distance, as in a textbook."""
    row = list(range(len(other) + 1))
    for i, left in enumerate(one, 1):
        before, row[0] = row[0], i
        for j, right in enumerate(other, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (left != right))
    return row[-1]


def test_rates_equal_a_plain_count():
    rng = np.random.default_rng(0)
    words = np.asarray(["ab", "ba", "abc", "c"])
    answers, targets = ([" ".join(rng.choice(words, rng.integers(1, 9))) for _ in range(30)] for _ in range(2))
    errors = sum(distance(a.split(), t.split()) for a, t in zip(answers, targets, strict=True))
    assert wer(answers, targets) == pytest.approx(errors / sum(len(t.split()) for t in targets))
    assert wer(answers, targets) == pytest.approx(jiwer.wer(targets, answers))
    for a, t in zip(answers, targets, strict=True):
        assert cer(a, t) == pytest.approx(distance(list(a), list(t)) / len(t))


def test_empty_targets():
    assert wer(["x y", "a"], ["", "a b"]) == 3 / 2, "the words of its answer are added ones"
    assert wer(["", "a b"], ["", "a b"]) == 0
    assert wer([""], ["a b"]) == 1
    assert wer(["", ""], ["", " "]) == 0 and wer(["", "x y"], ["", ""]) == 1
    assert cer("", "") == 0 and cer("abc", "") == 1 and cer("", "abc") == 1 and cer(" ", "") == 0


@pytest.mark.parametrize(
    ("answers", "targets"), [([], []), (["a"], ["a", "b"]), (["a", "b"], ["a"]), ("ab", "ab"), (["a"], "a")]
)
def test_wrong_numbers_of_texts(answers, targets):
    with pytest.raises(DataError, match="one answer for each target"):
        wer(answers, targets)


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "jiwer", None)
    for rate in (
        lambda: wer(["a"], ["a"]),
        lambda: cer("a", "a"),
        lambda: ErrorRate()([Answer("a", ())], [{"answer": "a"}]),
    ):
        with pytest.raises(DataError, match="pip install 'mllm-jax"):
            rate()


EXAMPLES = [
    {"question": "1", "answer": "The cat sat."},
    {"question": "2", "answers": ("on a mat", "elsewhere")},
]


class Listener:
    """An assistant with fixed answers."""

    model = SimpleNamespace(config=None)

    def generate(self, conversations, *, batch_size, max_new_tokens):
        return [Answer({"1": "the, cat SAT", "2": "on the mat"}[c[-1].text], ()) for c in conversations]


def test_as_metrics_of_a_task():
    metrics = {
        "wer": ErrorRate(),
        "wer_plain": ErrorRate(normalise=BasicNormalizer()),
        "cer": ErrorRate("character", BasicNormalizer()),
    }
    found = Task("speech", EXAMPLES, lambda example: example["question"], metrics).measure(Listener()).metrics
    assert found == {"wer": 2 / 6, "wer_plain": 1 / 6, "cer": pytest.approx(3 / 19)}
    examples = [Example((Message("user", "?"), Message("assistant", "a b")))]
    assert ErrorRate()([Answer("a", ())], examples) == 1 / 2


def test_refusals_as_metrics():
    with pytest.raises(DataError, match="an example without an answer"):
        ErrorRate()([Answer("a", ())], [{"question": "?"}])
    with pytest.raises(ConfigError, match="'word' or 'character'"):
        ErrorRate("letter")
