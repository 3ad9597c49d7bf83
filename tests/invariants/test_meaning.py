"""What the keys of ``data`` that say what is learned do to a real job: targets, weights, over-long rows, formats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from folders import chats, invoke, keys, tokenizer, write_rows

from truetune import spelling
from truetune.assembly import Job, assemble
from truetune.data.batch import IGNORE
from truetune.data.chat import Renderer
from truetune.data.dataset import tokenize
from truetune.data.sources import Rows
from truetune.errors import UserError
from truetune.training.record import Evaluation, Step

ASKED, ANSWERED = "What is 3 and 4?", "It is 7, of course."
FORMS: dict[str, dict[str, Any]] = {
    "messages": {
        "messages": [{"role": "user", "content": ASKED}, {"role": "assistant", "content": ANSWERED}],
    },
    "sharegpt": {"conversations": [{"from": "human", "value": ASKED}, {"from": "gpt", "value": ANSWERED}]},
    "alpaca": {"instruction": ASKED, "input": "", "output": ANSWERED},
    "prompt-completion": {"prompt": ASKED, "completion": ANSWERED},
}


@pytest.mark.parametrize("form", FORMS)
def test_one_conversation_is_the_same_documents_in_every_format(form: str) -> None:
    words = tokenizer()
    renderer = Renderer(words, frozenset([words.eos_token_id]), 64)
    (document,), report = tokenize(Rows.of([FORMS[form]], form), "auto", renderer, 0.0)
    (plain,), _ = tokenize(Rows.of([FORMS["messages"]], form), "messages", renderer, 0.0)
    assert report.format == form
    assert document.tokens.tolist() == plain.tokens.tolist() and document.targets.tolist() == plain.targets.tolist()
    assert words.decode(document.tokens[document.targets]) == ANSWERED + "<|im_end|>"


def job_of(model: Path, folder: Path, rows: list[dict[str, Any]], *more: str) -> Job:
    data = write_rows(folder / "data.jsonl", rows)
    return assemble(spelling.read(None, keys(model, data, folder / "out", *more)))


def rows_of_two_answers(count: int = 40) -> list[dict[str, Any]]:
    return [
        {"messages": [*a["messages"], *b["messages"]], "importance": 1 + i % 3}
        for i, (a, b) in enumerate(zip(chats(count), reversed(chats(count)), strict=True))
    ]


def test_weights_of_a_named_column_reach_the_loss_but_not_the_evaluation(my_model: Path, tmp_path: Path) -> None:
    rows = rows_of_two_answers()
    plain = job_of(my_model, tmp_path, rows)
    weighed = job_of(my_model, tmp_path, rows, "data.weight_column=importance")
    assert all(batch.weights is None for batch in plain.trainer.batches(0))
    found = weighed.trainer.batches(0)
    weights = [batch.weights for batch in found]
    assert all(w is None or ((w > 0) == (b.labels != IGNORE)).all() for w, b in zip(weights, found, strict=True))
    assert {2.0, 3.0} <= {float(x) for w in weights if w is not None for x in w.unique()} <= {0.0, 1.0, 2.0, 3.0}
    by_row = {row: rows[row]["importance"] for row in range(len(rows))}
    for d in weighed.train.documents:
        assert d.weights is None if by_row[d.row] == 1 else set(d.weights[d.targets].tolist()) == {by_row[d.row]}
    (step, before), (other, other_before) = (started(job) for job in (plain, weighed))
    assert abs(step.loss - other.loss) > 1e-5 and step.targets == other.targets
    assert before.loss == other_before.loss and before.targets == other_before.targets
    documents = [weighed.trainer.documents[i] for i in weighed.trainer.stream.step(0)]
    assert sum(map(weighed.trainer.objective.count, found)) == sum(d.target_count * by_row[d.row] for d in documents)


def started(job: Job) -> tuple[Step, Evaluation]:
    """The first step, and the evaluation before it."""
    records = job.trainer.steps()
    evaluation = next(r for r in records if isinstance(r, Evaluation))
    return next(r for r in records if isinstance(r, Step)), evaluation


def test_last_and_all_change_what_is_learned(my_model: Path, tmp_path: Path) -> None:
    counts = {}
    for targets in ("last", "assistant", "all"):
        report = job_of(my_model, tmp_path, rows_of_two_answers(), f"data.targets={targets}").train.report
        counts[targets] = report.targets
        assert targets != "all" or report.targets == report.tokens - report.documents
    assert counts["last"] < counts["assistant"] < counts["all"]


@pytest.mark.parametrize("too_long", ["truncate", "drop", "split", "error"])
def test_what_becomes_of_long_rows(too_long: str, my_model: Path, tmp_path: Path) -> None:
    more = ("data.max_length=100", f"data.too_long={too_long}", "evaluation.rows=2", "evaluation.fraction=0.1")
    more += ("data.cut_limit=1.0",) if too_long == "truncate" else ()
    rows = rows_of_two_answers()
    rows += [{"messages": [*row["messages"], *chats(4)[3]["messages"] * 3]} for row in rows_of_two_answers(20)]
    if too_long == "error":
        with pytest.raises(UserError, match=r"row \d+ .*more than 100 tokens.*; set data\.max_length to \d+, or"):
            job_of(my_model, tmp_path, rows, *more)
        return
    job = job_of(my_model, tmp_path, rows, *more)
    report = job.train.report
    assert report.truncated and report.longest <= 100
    assert (report.targets_cut == 0) == (too_long == "split")
    assert report.dropped == ({"longer than max_length": report.truncated} if too_long == "drop" else {})
    assert (report.documents > report.rows) == (too_long == "split")
    assert len(job.train.used(range(len(job.train.documents)))) == len({d.row for d in job.train.documents})


def test_a_run_on_pieces_of_rows_is_proven_and_sampled(my_model: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "data.jsonl", rows_of_two_answers())
    more = ("data.max_length=60", "data.too_long=split", "data.weight_column=importance", "evaluation.samples=3")
    result = invoke("prove", *keys(my_model, data, tmp_path / "out", *more))
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("data.weight_column=score",), "no column score; name the column of the weights in data.weight_column"),
        (("data.too_long=drop", "data.cut_limit=0.2"), "data.cut_limit means nothing with data.too_long=drop"),
        (("data.format=alpaca",), "row 0 .*column instruction is missing"),
    ],
)
def test_keys_that_mean_nothing_are_refused(more: tuple[str, ...], said: str, my_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        job_of(my_model, tmp_path, chats(), *more)


def test_preferences_are_read_and_refused(my_model: Path, tmp_path: Path) -> None:
    rows = [{"prompt": str(i), "chosen": "a", "rejected": "b"} for i in range(9)]
    with pytest.raises(UserError, match=r"row 0 .*is a preference, of which next-token .*; name the better answer"):
        job_of(my_model, tmp_path, rows)
