"""Conservation of targets, the limit on truncation, and parts that share no row."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from truetune.data.chat import Renderer
from truetune.data.dataset import draw, first, hold_out, tokenize
from truetune.data.sources import Rows, canonical
from truetune.errors import UserError


def chats(count: int) -> Rows:
    """Rows whose answers grow with their number."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Is item {i} in the list?"},
                {"role": "assistant", "content": "Yes, and again. " * (i % 7) + "Zero"},
            ]
        }
        for i in range(count)
    ]
    return Rows.of(rows, "chats")


def renderer(make_tokenizer, max_length: int) -> Renderer:
    tokenizer = make_tokenizer("bytes", "chatml")
    return Renderer(tokenizer, frozenset([tokenizer.eos_token_id]), max_length)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(max_length=st.integers(60, 180))
def test_targets_are_conserved(make_tokenizer, max_length):
    rows = chats(20)
    whole, _ = tokenize(rows, "messages", renderer(make_tokenizer, 4096), 0.0)
    documents, report = tokenize(rows, "messages", renderer(make_tokenizer, max_length), 1.0)
    assert report.targets == sum(d.target_count for d in documents)
    assert report.targets + report.targets_cut == sum(d.target_count for d in whole)
    assert report.documents + sum(report.dropped.values()) == report.rows == 20
    assert report.truncated == sum(len(d) > max_length for d in whole)
    assert all(d.target_count and 2 <= len(d) <= max_length for d in documents)
    assert report.tokens == sum(len(d) for d in documents) == sum(report.tokens_by_role.values())
    assert report.targets_by_role == {"assistant": report.targets}


def test_report_says_what_the_documents_are(make_tokenizer):
    rows = chats(9)
    made = renderer(make_tokenizer, 4096)
    documents, report = tokenize(rows, "auto", made, 0.0)
    lengths = [len(d) for d in documents]
    assert (report.source, report.format, report.digest) == ("chats", "messages", rows.digest)
    assert report.template == made.template_digest
    assert (report.shortest, report.longest) == (min(lengths), max(lengths))
    assert (report.median, report.mean) == (np.median(lengths), np.mean(lengths))
    assert [d.row for d in documents] == list(range(9))


def test_bare_text_names_no_template(make_tokenizer):
    rows = Rows.of([{"text": "Ask again later."}, {"text": " "}], "texts")
    documents, report = tokenize(rows, "auto", renderer(make_tokenizer, 64), 0.0)
    assert report.template is None and report.format == "text"
    assert report.dropped == {"empty": 1} and [d.row for d in documents] == [0]
    assert set(report.targets_by_role) == {"text"}


@pytest.mark.parametrize("limit", [0.0, 0.05, 0.3])
def test_cut_limit_stops_with_the_least_length_that_is_enough(make_tokenizer, limit):
    rows = chats(20)
    with pytest.raises(UserError, match=r"would cut \d+\.\d% .* in \d+ of 20 rows") as fault:
        tokenize(rows, "messages", renderer(make_tokenizer, 50), limit)
    enough = int(str(fault.value).split("set data.max_length to ")[1].split()[0])
    tokenize(rows, "messages", renderer(make_tokenizer, enough), limit)
    with pytest.raises(UserError, match="would cut"):
        tokenize(rows, "messages", renderer(make_tokenizer, enough - 1), limit)


def test_no_targets_at_all_stops(make_tokenizer):
    with pytest.raises(UserError, match=r"no row of chats .*targets beyond max_length: 5"):
        tokenize(chats(5), "messages", renderer(make_tokenizer, 8), 1.0)


def test_faults_name_source_and_row(make_tokenizer):
    rows = Rows.of([*chats(2).rows, {"messages": []}], "data.jsonl")
    with pytest.raises(UserError, match=r"^data.jsonl: row 2 "):
        tokenize(rows, "auto", renderer(make_tokenizer, 64), 0.0)


@settings(max_examples=50, deadline=None)
@given(
    texts=st.lists(st.sampled_from("abcdefghij"), min_size=2, max_size=60).filter(lambda t: len(set(t)) > 1),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 3),
)
def test_held_out_rows_are_never_trained_on(texts, fraction, seed):
    rows = Rows.of([{"text": t} for t in texts], "texts")
    train, held = hold_out(rows, fraction, seed)
    assert train.rows and held.rows
    assert not {canonical(r) for r in train.rows} & {canonical(r) for r in held.rows}
    assert sorted(map(canonical, train.rows + held.rows)) == sorted(map(canonical, rows.rows))
    again = hold_out(rows, fraction, seed)
    assert again[0].digest == train.digest and again[1].digest == held.digest


def test_held_out_share_and_seed():
    rows = Rows.of([{"text": str(i)} for i in range(400)], "texts")
    train, held = hold_out(rows, 0.05, 0)
    assert (len(train), len(held)) == (380, 20)
    assert [int(r["text"]) for r in train.rows] == sorted(int(r["text"]) for r in train.rows)
    assert held.digest != hold_out(rows, 0.05, 1)[1].digest


def test_equal_rows_cannot_be_held_out():
    with pytest.raises(UserError, match="texts has only equal rows"):
        hold_out(Rows.of([{"text": "a"}] * 5, "texts"), 0.5, 0)


def test_first_and_draw_limit_rows():
    rows = Rows.of([{"text": str(i)} for i in range(50)], "texts", "test")
    assert first(rows, 3).rows == rows.rows[:3]
    assert first(rows, 50) is rows and draw(rows, 60, 0) is rows
    drawn = [int(r["text"]) for r in draw(rows, 10, 0).rows]
    assert len(drawn) == 10 and drawn == sorted(set(drawn))
    assert drawn == [int(r["text"]) for r in draw(rows, 10, 0).rows]
    assert drawn != [int(r["text"]) for r in draw(rows, 10, 1).rows]
    assert first(rows, 3).digest != rows.digest and first(rows, 3).held_out_split == "test"
