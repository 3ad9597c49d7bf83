"""Files of rows: read by place, values as they are, and every fault with its file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from truetune.data.dataset import first, hold_out
from truetune.data.files import Stored
from truetune.data.sources import Rows, load
from truetune.errors import UserError

CELLS = [{"prompt": "a, b", "completion": 'say "c"'}, {"prompt": "two\nlines", "completion": "007"}]
ODD = [{"text": "a", "arguments": {"x": 1}}, {"text": "b", "arguments": ["y"]}, {"text": "c", "arguments": "z"}]


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_values_differ_from_row_to_row_and_are_not_unified() -> None:
    Path("odd.jsonl").write_text(lines(ODD))
    rows = load("odd.jsonl")
    assert isinstance(rows.rows, Stored) and list(rows.rows) == ODD
    assert [rows.rows[i] for i in (2, 0)] == [ODD[2], ODD[0]]
    with pytest.raises(IndexError):
        rows.rows[3]


def test_rows_are_read_anew_and_a_changed_file_is_told() -> None:
    Path("odd.jsonl").write_text(lines(ODD))
    rows = load("odd.jsonl")
    Path("odd.jsonl").write_text(lines(ODD[::-1]).replace("{", "["))
    with pytest.raises(UserError, match=r"odd.jsonl: row 0 \(the first is 0\) is not JSON"):
        rows.rows[0]


def test_parts_of_stored_rows_are_stored_and_keep_their_numbers() -> None:
    made = [{"text": str(i)} for i in range(40)]
    Path("many.jsonl").write_text("\n".join(map(json.dumps, made)))
    stored, held = load("many.jsonl"), Rows.of(made, "many.jsonl")
    for a, b in zip(hold_out(stored, 0.3, 0), hold_out(held, 0.3, 0), strict=True):
        assert isinstance(a.rows, Stored) and list(a.rows) == b.rows
        assert list(a.numbers) == list(b.numbers) and a.digest == b.digest
        assert [made[i] for i in a.numbers] == b.rows
        assert list(first(first(a, 9), 5).rows) == b.rows[:5]


def test_csv_is_text_and_nothing_else() -> None:
    text = '\ufeffprompt,completion\r\n"a, b","say ""c"""\r\n\r\n"two\nlines",007\r\n'
    Path("data.csv").write_bytes(text.encode())
    rows = load("data.csv")
    assert list(rows.rows) == CELLS and rows.rows[1] == CELLS[1]
    assert rows.digest == Rows.of(CELLS, "elsewhere").digest


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a,b\n1,2\n1,2,3\n", r"data.csv:3 has 3 cells, and the header 2; "),
        ('a,b\n"x\ny",2\n1\n', r"data.csv:4 has 1 cells"),
        ('a,b\n1,"2\n', r"data.csv:2 is no line of CSV \(unexpected end of data\); "),
        ("a,a\n1,2\n", r"first line of data.csv does not name each column once; "),
        ("a,b\n", "data.csv has no rows; "),
        ("", "data.csv has no rows; "),
        (b"a,b\n1,\xff\n", "data.csv:2 is not UTF-8; "),
    ],
)
def test_csv_faults_name_the_line(text: str | bytes, said: str) -> None:
    Path("data.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=said):
        load("data.csv")


def test_json_is_a_list_or_lines() -> None:
    Path("list.json").write_text(json.dumps(ODD, indent=1))
    Path("lines.json").write_text(lines(ODD))
    assert list(load("list.json").rows) == list(load("lines.json").rows) == ODD


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[{"a": 1}, 2]', r"data.json: row 1 \(the first is 0\) is no JSON object with columns but 2; "),
        ('[{"a": 1},\n {"a" 2}]', r"data.json is not JSON \(Expecting ':' delimiter at line 2, column 7\); "),
        ("[" * 100_000, "data.json nests values .* without end; "),
        ('{"rows": [\n1]}', "data.json:1 is not JSON"),
        ("[]", "data.json has no rows; "),
    ],
)
def test_json_faults_name_the_place(text: str, said: str) -> None:
    Path("data.json").write_text(text)
    with pytest.raises(UserError, match=said):
        load("data.json")


def test_parquet() -> None:
    made = [{"text": str(i), "n": i} for i in range(600)]
    datasets.Dataset.from_list(made).to_parquet("data.parquet")
    rows = load("data.parquet")
    assert isinstance(rows.rows, Stored) and list(rows.rows) == made and rows.rows[599] == made[599]
    Path("bad.parquet").write_text("no")
    with pytest.raises(UserError, match=r"bad.parquet is no Parquet that can be read \((\S+ ){3,}.*\); "):  # a reason
        load("bad.parquet")


def test_a_folder_of_texts_is_one_row_per_file_in_the_order_of_their_paths() -> None:
    for name in ("b.txt", "a/test/z.md", "a.txt", ".hidden/c.txt", "picture.png"):
        Path("texts", name).parent.mkdir(parents=True, exist_ok=True)
        Path("texts", name).write_text(name)
    rows = load("texts")
    assert list(rows.rows) == [{"text": name} for name in ("a.txt", "a/test/z.md", "b.txt")]
    assert rows.held_out_split is None and list(load("texts/b.txt").rows) == [{"text": "b.txt"}]
    Path("texts/bad.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"texts/bad.txt is not UTF-8; "):
        list(load("texts").rows)


def test_a_folder_of_files_of_several_kinds() -> None:
    Path("folder/data").mkdir(parents=True)
    Path("folder/README.md").write_text("about")
    Path("folder/dataset_infos.json").write_text("{}")
    Path("folder/data/train-00001-of-00002.jsonl").write_text(lines(ODD[1:]))
    Path("folder/data/train-00000-of-00002.json").write_text(json.dumps(ODD[:1]))
    Path("folder/val.csv").write_text("text\nv\n")
    rows = load("folder")
    assert list(rows.rows) == ODD and rows.held_out_split == "validation"
    assert [rows.rows[i] for i in (2, 0, 1)] == [ODD[2], ODD[0], ODD[1]]
    assert list(load("folder", "validation").rows) == [{"text": "v"}]
    with pytest.raises(UserError, match="no split 'test'; choose among: train, validation"):
        load("folder", "test")
    Path("folder/more.jsonl").write_text('{"text": 1}\n{"text": \n')
    with pytest.raises(UserError, match=r"folder/more.jsonl:2 is not JSON"):
        load("folder")


def test_rows_and_texts_in_one_folder_are_told_apart_by_the_user() -> None:
    Path("mixed").mkdir()
    Path("mixed/a.csv").write_text("text\na\n")
    Path("mixed/b.txt").write_text("b")
    with pytest.raises(UserError, match=r"mixed holds rows \(a.csv\) and texts \(b.txt\); move one kind"):
        load("mixed")
