"""The built-in data: what is kept of docstrings, and a split that shares no module."""

import statistics
import textwrap

import pytest

from truetune.data import python_docs, sources


def test_rows_are_questions_and_short_answers():
    rows = python_docs.rows("train") + python_docs.rows("test")
    assert 3700 < len(rows) < 4200
    answers = [row["messages"][1]["content"] for row in rows]
    for row, answer in zip(rows, answers, strict=True):
        assert [m["role"] for m in row["messages"]] == ["user", "assistant"]
        assert row["name"] in row["messages"][0]["content"]
        assert len(answer.split()) >= 5 and len(answer) <= 450 and "\n" not in answer and ">>>" not in answer
    assert 10 <= statistics.median(len(a.split()) for a in answers) <= 16
    assert len({a.lower() for a in answers}) > 0.99 * len(answers)


def test_all_phrasings_are_asked_with_and_without_signature():
    asked = [row["messages"][0]["content"] for row in python_docs.rows("train")]
    for phrasing in python_docs.QUESTIONS:
        assert sum(q.startswith(phrasing.split("`")[0] + "`") for q in asked) > 0.15 * len(asked)
    assert 0.3 < sum("(" in q for q in asked) / len(asked) < 0.6
    assert not any(" at 0x" in q for q in asked)


def test_no_module_is_on_both_sides():
    train, test = (python_docs.rows(s) for s in python_docs.SPLITS)
    tops = [{row["module"].split(".")[0] for row in part} for part in (train, test)]
    assert not tops[0] & tops[1] and len(tops[1]) > 8
    assert 0.07 < len(test) / (len(train) + len(test)) < 0.12


def test_rows_are_the_same_whatever_surrounds_the_library(monkeypatch, tmp_path):
    """Other packages put functions of their own into it or replace some; a user's file may hide a module."""

    def intruder():
        """Return something that the standard library would never return."""

    intruder.__module__ = "textwrap"
    before = python_docs.rows("train")
    monkeypatch.setattr(textwrap, "intruder", intruder, raising=False)
    monkeypatch.delattr(textwrap, "fill")
    (tmp_path / "textwrap.py").write_text('raise SystemExit("the user\'s file was run")')
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    python_docs._collected.cache_clear()
    assert python_docs.rows("train") == before


def test_source_knows_its_held_out_split():
    train = sources.load("python-docs")
    assert train.held_out_split == "test" and train.name == "python-docs (train)"
    assert sources.load("python-docs", "test").held_out_split is None


@pytest.mark.parametrize(
    ("doc", "answer"),
    [
        ("Return the length of the path", "Return the length of the path."),
        ("Return it.", None),  # under five words
        ("the number of things in there", None),  # a fragment
        ("f(x) -> y\n\nReturn the y that belongs to x.", "Return the y that belongs to x."),
        ("f(x, [y]) -- return the sum of both.", "Return the sum of both."),
        ("Sum the numbers up.\n\nArgs:\n  x: the first\n\nNever seen.", None),
        ("Sum all of the numbers up.\n\n>>> f(1)\n1", "Sum all of the numbers up."),
        ("Sum all of the numbers.  For example:\n\n    f(1)\n", "Sum all of the numbers."),
        ("Sum all of the numbers.\n:param x: a number", "Sum all of the numbers."),
        ("Sum all of the\nnumbers.\n\nIt is fast.", "Sum all of the numbers. It is fast."),
        ("Sum all of the numbers.\n\n" + "It is slow. " * 50, "Sum all of the numbers."),
        ("Alias for field number 3 of it", None),
        ("A :class:`Thing` that holds ``other`` things", "A `Thing` that holds `other` things."),
    ],
)
def test_answer_is_the_opening_prose(doc, answer):
    assert python_docs._answer(doc) == answer


def test_near_duplicates_are_dropped():
    words = [f"word{i}" for i in range(20)]
    sets = [words, words[:19], words[:15], words[::-1], ["a", "b"]]
    assert python_docs._distinct([frozenset(s) for s in sets]) == [True, False, True, False, False]
