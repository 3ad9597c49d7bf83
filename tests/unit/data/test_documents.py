"""Documents in columns, on disk and through processes: the same as one by one in memory, or made again."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from truetune.data import dataset, documents, rendering
from truetune.data.batch import Document
from truetune.data.chat import Renderer
from truetune.data.dataset import tokenize
from truetune.data.documents import MANIFEST, Documents, EndToEnd, Spool, lengths, stored
from truetune.data.sources import Rows
from truetune.errors import UserError

CHATS = rendering.Shape("messages")


def some(count: int, seed: int = 0, weighed: bool = False) -> list[Document]:
    generator = np.random.default_rng(seed)
    made = []
    for row in range(count):
        n = int(generator.integers(1, 9))
        weights = generator.random(n).astype(np.float32) if weighed else None
        ends = tuple(range(row % 3))
        made.append(
            Document(generator.integers(0, 99, n).astype(np.int32), generator.random(n) < 0.5, row, ends, weights)
        )
    return made


def assert_same(a: Sequence[Document], b: Sequence[Document]) -> None:
    assert len(a) == len(b) and lengths(a).tolist() == lengths(b).tolist()
    for x, y in zip(a, b, strict=True):
        assert (x.tokens.tolist(), x.targets.tolist(), x.row, x.ends) == (
            y.tokens.tolist(),
            y.targets.tolist(),
            y.row,
            y.ends,
        )
        assert (x.tokens.dtype, x.targets.dtype) == (y.tokens.dtype, y.targets.dtype)
        assert (x.weights is None) == (y.weights is None)
        assert x.weights is None or y.weights is None or x.weights.tolist() == y.weights.tolist()


def test_columns_hold_documents() -> None:
    made = some(20)
    assert_same(Documents.of(made), made)
    assert_same(EndToEnd([Documents.of(made[:7]), Documents.of(made[7:])]), made)
    assert_same(Documents.of(made)[3:6], made[3:6])
    assert Documents.of(made)[-1].row == 19
    with pytest.raises(IndexError):
        Documents.of(made)[20]


@pytest.mark.parametrize("weighed", [(False, False), (False, True), (True, False), (True, True)])
def test_on_disk_they_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weighed: tuple[bool, bool]) -> None:
    monkeypatch.setattr(documents, "MEMORY", 20)
    made = [*some(9, weighed=weighed[0]), *some(9, 1, weighed=weighed[1])]
    spool = Spool(tmp_path / "store")
    for start in (0, 9):
        spool.add(Documents.of(made[start : start + 9]))
    kept = spool.keep(spool.done(), {"a": 1})
    assert_same(kept, made)
    assert isinstance(kept.columns["tokens"], np.memmap)
    found = stored(tmp_path / "store")
    assert found and found[1] == {"a": 1}
    assert_same(found[0], made)
    assert [p.name for p in tmp_path.iterdir()] == ["store"]


@pytest.mark.parametrize("name", [*documents.COLUMNS, documents.REPORT, MANIFEST])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_store_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, damage: str) -> None:
    monkeypatch.setattr(documents, "MEMORY", 1)
    spool = Spool(tmp_path / "store")
    spool.add(Documents.of(some(9, weighed=True)))
    spool.keep(spool.done(), {"a": 1})
    file = tmp_path / "store" / name
    content = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(content[:-1] + (bytes([content[-1] ^ 1]) if damage == "flip" else b""))
    assert stored(tmp_path / "store") is None


def test_what_nobody_has_read_for_long_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "MEMORY", 1)

    def keep(name: str) -> None:
        spool = Spool(tmp_path / name)
        spool.add(Documents.of(some(9)))
        spool.keep(spool.done(), {})

    keep("read")
    keep("unread")
    (tmp_path / ".half").mkdir()
    for old in (tmp_path / "read" / MANIFEST, tmp_path / "unread" / MANIFEST, tmp_path / ".half"):
        os.utime(old, (0, 0))
    assert stored(tmp_path / "read")
    keep("new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "read"]


def chats(count: int, bad: int | None = None) -> Rows:
    rows: list[dict[str, Any]] = [
        {
            "messages": [
                {"role": "user", "content": f"Is {i} in?"},
                {"role": "assistant", "content": "Yes. " * (i % 9 + 1)},
            ]
        }
        for i in range(count)
    ]
    if bad is not None:
        rows[bad]["messages"][1]["content"] = None
    return Rows.of(rows, "chats")


def renderer(make_tokenizer: Any, max_length: int = 4096, **changes: Any) -> Renderer:
    tokenizer = make_tokenizer("bytes", "chatml")
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return Renderer(tokenizer, frozenset([tokenizer.eos_token_id]), max_length)


@pytest.fixture
def on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "MEMORY", 2000)
    monkeypatch.setattr(rendering, "PORTION", 16)


@pytest.fixture
def rendered(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of every portion that is rendered in this process, its rows."""
    counts: list[int] = []
    real = rendering.render

    def counting(rows: Any, *rest: Any) -> Any:
        counts.append(len(rows))
        return real(rows, *rest)

    monkeypatch.setattr(rendering, "render", counting)
    return counts


def test_the_cache_gives_the_same_and_is_made_again_when_damaged(
    make_tokenizer: Any, tmp_path: Path, on_disk: None, rendered: list[int]
) -> None:
    rows, words = chats(100), renderer(make_tokenizer)
    plain, report = tokenize(rows, "auto", words, 0.05)
    made, again = (
        tokenize(rows, "auto", words, 0.05, cache=tmp_path),
        tokenize(rows, "auto", words, 0.05, cache=tmp_path),
    )
    assert sum(rendered) == 200 and made[1] == again[1] == report
    assert_same(made[0], plain)
    assert_same(again[0], plain)
    (folder,) = tmp_path.iterdir()
    tokens = np.fromfile(folder / "tokens", np.int32)
    tokens[5] += 1
    del made, again
    tokens.tofile(folder / "tokens")
    assert_same(tokenize(rows, "auto", words, 0.05, cache=tmp_path)[0], plain)
    assert sum(rendered) == 300 and [p.name for p in tmp_path.iterdir()] == [folder.name]
    named = Rows(rows.rows, "elsewhere", rows.numbers)
    assert tokenize(named, "auto", words, 0.05, cache=tmp_path)[1].source == "elsewhere" and sum(rendered) == 300


def test_few_documents_stay_in_memory(make_tokenizer: Any, tmp_path: Path) -> None:
    tokenize(chats(20), "auto", renderer(make_tokenizer), 0.05, cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_whatever_changes_documents_changes_the_key(make_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    words, rows = renderer(make_tokenizer), chats(9)
    other = make_tokenizer("bytes", "chatml")
    other.add_tokens(["Yes"])
    changed = [
        (chats(8), CHATS, words, 0.05),
        (rows.at([0, 1, 2, 3, 4, 5, 6, 8]), CHATS, words, 0.05),
        (rows, rendering.Shape("text"), words, 0.05),
        (rows, rendering.Shape("messages", None), words, 0.05),
        (rows, CHATS, words, 0.1),
        (rows, CHATS, renderer(make_tokenizer, 99), 0.05),
        (rows, CHATS, renderer(make_tokenizer, chat_template="{{ messages[0].content }}"), 0.05),
        (rows, CHATS, renderer(make_tokenizer, bos_token="</s>"), 0.05),
        (rows, CHATS, Renderer(other, words.stop_ids, 4096), 0.05),
        (rows, CHATS, Renderer(words.tokenizer, frozenset([1, 2]), 4096), 0.05),
    ]
    keys = [dataset._key(rows, CHATS, words, 0.05), *(dataset._key(*parts) for parts in changed)]
    assert dataset._key(chats(9), CHATS, renderer(make_tokenizer), 0.05) == keys[0]
    monkeypatch.setattr(dataset, "DOCUMENTS", 99)
    keys.append(dataset._key(rows, CHATS, words, 0.05))
    assert len(set(keys)) == len(keys) == 12


def test_a_template_with_the_date_is_never_kept(
    make_tokenizer: Any, tmp_path: Path, on_disk: None, rendered: list[int]
) -> None:
    template = make_tokenizer("bytes", "chatml").chat_template + "{% if false %}{{ strftime_now('%d') }}{% endif %}"
    words = renderer(make_tokenizer, chat_template=template)
    plain, _ = tokenize(chats(100), "auto", words, 0.05)
    made, _ = tokenize(chats(100), "auto", words, 0.05, cache=tmp_path)
    assert_same(made, plain)
    assert isinstance(made.columns["tokens"], np.memmap)
    tokenize(chats(100), "auto", words, 0.05, cache=tmp_path)
    assert sum(rendered) == 300
    del made
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fault", [KeyboardInterrupt, UserError("no"), OSError(28, "No space left on device")])
def test_what_stops_tokenising_leaves_nothing(
    make_tokenizer: Any, tmp_path: Path, on_disk: None, monkeypatch: pytest.MonkeyPatch, fault: BaseException
) -> None:
    real, calls = rendering.render, []

    def stopping(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 5:
            assert list(tmp_path.iterdir())
            raise fault
        return real(*arguments)

    monkeypatch.setattr(rendering, "render", stopping)
    expected = KeyboardInterrupt if fault is KeyboardInterrupt else UserError
    with pytest.raises(expected) as caught:
        tokenize(chats(100), "auto", renderer(make_tokenizer), 0.05, cache=tmp_path)
    assert not list(tmp_path.iterdir())
    if isinstance(fault, OSError):
        assert "No space left on device); free some space there" in str(caught.value)


def numbered(rows: Rows, portion: int = 16) -> list[rendering.Numbered]:
    pairs = list(enumerate(rows.rows))
    return [pairs[i : i + portion] for i in range(0, len(pairs), portion)]


def test_processes_make_the_same_portions_in_their_order(make_tokenizer: Any, rendered: list[int]) -> None:
    rows, short = chats(150), renderer(make_tokenizer, 45)
    rows.rows[40]["odd"] = {1: "no JSON"}  # type: ignore[index]  # a key that JSON would make text
    told = CHATS._replace(traits=True)
    expected = [rendering.render(portion, told, short) for portion in numbered(rows)]
    rendered.clear()
    with rendering.Processes(2, told, short) as processes:
        made = list(processes.map(iter(numbered(rows))))
        assert rendered == [16]  # the portion with the odd row
        with pytest.raises(UserError, match=r"^row 70 \(the first is 0\): messages\[1\].content is empty"):
            list(processes.map(iter(numbered(chats(100, bad=70)))))
        several = chats(100, bad=70)
        several.rows[90]["messages"] = {1: "no JSON, and no messages"}  # type: ignore[index]
        with pytest.raises(UserError, match=r"^row 70 "):  # though the later one is found first, in this process
            list(processes.map(iter(numbered(several))))
        for helper in processes._helpers:
            helper._process.kill()
        with pytest.raises(UserError, match="a process that tokenises ended before its rows were done; see what"):
            list(processes.map(iter(numbered(chats(9)))))
    assert all(helper._process.returncode is not None for helper in processes._helpers)
    assert sum(portion.account.truncated for portion in made) > 0
    for (found, account, traits), (wanted, other, expected_traits) in zip(made, expected, strict=True):
        assert_same(found, wanted)
        assert account.cut.tolist() == other.cut.tolist()
        assert {**vars(account), "cut": 0} == {**vars(other), "cut": 0}
        assert traits is not None and np.array_equal(traits, expected_traits)


class Here:
    """Stands for processes, and renders here."""

    def __init__(self, count: int, shape: rendering.Shape, words: Renderer) -> None:
        self.shape, self.words = shape, words

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def map(self, some: Any) -> Any:
        return (rendering.render(portion, self.shape, self.words) for portion in some)


@pytest.mark.parametrize("cores", [1, 2])
def test_processes_take_over_only_where_the_rest_is_long(
    make_tokenizer: Any, on_disk: None, monkeypatch: pytest.MonkeyPatch, cores: int
) -> None:
    began: list[int] = []
    monkeypatch.setattr(rendering, "cores", lambda: cores)
    monkeypatch.setattr(rendering, "Processes", lambda *parts: began.append(1) or Here(*parts))
    plain, report = tokenize(chats(100), "auto", renderer(make_tokenizer), 0.05)
    assert not began
    monkeypatch.setattr(rendering, "SOON", 0.0)
    monkeypatch.setattr(rendering, "LONG", 0.0)
    made, again = tokenize(chats(100), "auto", renderer(make_tokenizer), 0.05)
    assert len(began) == cores - 1 and report == again
    assert_same(made, plain)


def test_a_tokenizer_that_would_be_another_one_stays_here(make_tokenizer: Any) -> None:
    words = renderer(make_tokenizer)
    assert rendering.can_move(words)
    other = make_tokenizer("bytes", "no stop")
    real = words.tokenizer.save_pretrained
    words.tokenizer.save_pretrained = other.save_pretrained
    assert not rendering.can_move(words)
    words.tokenizer.save_pretrained = real
    words.tokenizer.__class__ = type("Own", (type(words.tokenizer),), {"__module__": "transformers_modules.own"})
    assert not rendering.can_move(words)
