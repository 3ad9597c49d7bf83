"""Sources: local ones without a network, faults with file and line, and one sentence for the rest."""

from __future__ import annotations

import json
import socket

import datasets
import pytest

from truetune.data.sources import Rows, distinct, load
from truetune.errors import UserError

ROWS = [{"text": "one", "n": 1}, {"text": "zwölf", "n": 2}, {"text": "three", "n": 3}]


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """In an empty folder, with an empty cache, and without a network."""

    def connect(*_):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)


def write(path, rows=ROWS):
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    return str(path)


def test_jsonl(tmp_path):
    rows = load(write(tmp_path / "data.jsonl"))
    assert list(rows.rows) == ROWS and len(rows) == 3
    assert rows.name == str(tmp_path / "data.jsonl") and rows.held_out_split is None


def test_digest_is_of_the_content_and_the_order(tmp_path):
    a = load(write(tmp_path / "a.jsonl"))
    spelled = '\ufeff{"n":1,  "text":"one"}\r\n\r\n{"n":2,"text":"zw\\u00f6lf"}\n{"n":3,"text":"three"}'
    (tmp_path / "b.jsonl").write_bytes(spelled.encode())
    b = load(str(tmp_path / "b.jsonl"))
    assert list(b.rows) == ROWS and b.digest == a.digest
    assert load(write(tmp_path / "c.jsonl", ROWS[::-1])).digest != a.digest
    assert Rows.of(iter(ROWS), "elsewhere").digest == a.digest


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"text": }', r":3 is not JSON \(Expecting value at column 10\)"),
        (b'{"text": "a"} {"text": "b"}', ":3 is not JSON"),
        (b'["a"]', r":3 is no JSON object with columns but \[\"a\"\]"),
        (b"null", ":3 is no JSON object"),
        (b"{}", ":3 is no JSON object"),
        (b'{"text": "\xff"}', ":3 is not UTF-8"),
    ],
)
def test_jsonl_faults_name_file_and_line(tmp_path, line, said):
    (tmp_path / "bad.jsonl").write_bytes(b'{"text": "a"}\n\n' + line + b"\n")
    with pytest.raises(UserError, match=f"bad.jsonl{said}.*; "):
        load(str(tmp_path / "bad.jsonl"))


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_empty_file(tmp_path, content):
    (tmp_path / "empty.jsonl").write_text(content)
    with pytest.raises(UserError, match=r"empty.jsonl has no rows; "):
        load("empty.jsonl")


def test_a_file_has_only_the_split_train(tmp_path):
    with pytest.raises(UserError, match="no split 'test'; choose among: train"):
        load(write(tmp_path / "data.jsonl"), "test")


def test_other_files_are_refused_with_the_conversion(tmp_path):
    (tmp_path / "data.xlsx").write_text("a")
    with pytest.raises(UserError, match=r"data.xlsx is no file of rows \(.jsonl, .json, .csv, .*\); convert it"):
        load("data.xlsx")
    (tmp_path / "data.jsonl.gz").write_text("a")
    with pytest.raises(UserError, match=r"data.jsonl.gz is no file of rows .*; unpack it"):
        load("data.jsonl.gz")


def test_saved_datasets(tmp_path):
    train, test = datasets.Dataset.from_list(ROWS), datasets.Dataset.from_list(ROWS[:1])
    train.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=train, test=test).save_to_disk(tmp_path / "two")
    one, two = load("one"), load("two")
    assert list(one.rows) == list(two.rows) == ROWS and one.digest == two.digest
    assert one.held_out_split is None and two.held_out_split == "test"
    assert list(load("two", "test").rows) == ROWS[:1] and load("two", "test").held_out_split is None
    with pytest.raises(UserError, match="no split 'dev'; choose among: train, test"):
        load("two", "dev")


def test_folder_of_files(tmp_path):
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder" / "train.jsonl")
    write(tmp_path / "folder" / "validation.jsonl", ROWS[:1])
    write(tmp_path / "folder" / "test.jsonl", ROWS[:2])
    rows = load("folder")
    assert list(rows.rows) == ROWS and rows.held_out_split == "validation"
    assert load("folder", "validation").held_out_split == "test"


def test_folder_without_data(tmp_path):
    (tmp_path / "hollow").mkdir()
    with pytest.raises(UserError, match=r"hollow holds no data that can be read; give a folder"):
        load("hollow")
    (tmp_path / "hollow" / "state.json").write_text("{}")
    with pytest.raises(UserError, match=r"hollow holds no data"):
        load("hollow")


@pytest.mark.parametrize(
    ("source", "meant"),
    [("python-doc", "python-docs"), ("pythondocs", "python-docs"), ("trian.jsonl", "train.jsonl")],
)
def test_did_you_mean(tmp_path, source, meant):
    write(tmp_path / "train.jsonl")
    with pytest.raises(UserError, match=f"no data at '{source}'; did you mean '{meant}'"):
        load(source)


def test_a_path_that_is_not_there_never_asks_the_hub(tmp_path):
    write(tmp_path / "train.jsonl")
    for source in ("./absent", str(tmp_path / "absent"), "a/b/c", "absent.jsonl"):
        with pytest.raises(UserError, match="there is no data at"):
            load(source)
    with pytest.raises(UserError, match=f"did you mean '{tmp_path}/train.jsonl'"):
        load(f"{tmp_path}/trian.jsonl")


def test_hub_id(monkeypatch):
    asked = []

    def load_dataset(*arguments):
        asked.append(arguments)
        return datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(load("owner/name").rows) == list(load("owner/name:small").rows) == ROWS
    assert asked == [("owner/name", None), ("owner/name", "small")]


def test_hub_ids_keep_their_owner_in_a_name():
    assert distinct([("us/rows", "train")]) == ["us/rows"]
    assert distinct([("us/rows", "train"), ("them/rows", "train")]) == ["us/rows", "them/rows"]


@pytest.mark.parametrize(
    "fault",
    [
        ConnectionError("Couldn't reach 'owner/name' on the Hub.\nmore"),
        datasets.exceptions.DatasetNotFoundError("Dataset 'owner/name' doesn't exist"),
        ValueError("Config name is missing. Please pick one."),
        RuntimeError("Dataset scripts are no longer supported"),
    ],
)
def test_hub_that_cannot_help(monkeypatch, tmp_path, fault):
    (tmp_path / "owner").mkdir()
    write(tmp_path / "owner" / "names.jsonl")

    def load_dataset(*_):
        raise fault

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError) as caught:
        load("owner/name")
    said = str(caught.value)
    assert str(fault).splitlines()[0].rstrip(".") in said and "\n" not in said
    assert "did you mean 'owner/names.jsonl'?" in said
