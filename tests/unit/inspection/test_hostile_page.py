"""Rows, names and a template that try to break out of the page, the terminal and the JSON of ``inspect``."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from folders import chats, invoke, write_model, write_rows
from hostile import NAME, Page, hostile_files, hostile_texts, squeezed

from truetune.inspection import shown

URL = "http://evil.example/"
MORE = ("data.max_length=2048", "train.tokens_per_micro_batch=2048")


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The page of hostile files, and that of harmless ones with every part of a page."""
    place, made = tmp_path_factory.mktemp("hostile"), []
    harmless = write_model(place / "model"), write_rows(place / "rows.jsonl", chats(30))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shown, "HEAD", 10_000)  # the hostile rows are long, and shown whole
        for files in (hostile_files(place, URL), harmless):
            file = place / "page.html"
            keys = (f"model.path={files[0]}", f"data.source={files[1]}", *MORE)
            assert invoke("inspect", *keys, "--page", str(file)).exit_code == 0
            made.append(file.read_text(encoding="utf-8"))
    return made[0], made[1]


def test_the_page_shows_rows_as_they_are_and_nothing_of_them_becomes_more_than_text(pages: tuple[str, str]) -> None:
    html, harmless = pages
    page, own = Page(html), Page(harmless)
    assert set(page.tags) <= set(own.tags) | {"details", "summary", "ul", "li"}
    assert not {"script", "img", "iframe", "link", "a", "form", "object"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on") or name in ("src", "href", "srcset")]
    assert "default-src 'none'" in html
    seen = squeezed(page.text).replace("↵", "")
    for text in hostile_texts(URL):
        assert seen.count(squeezed(text)) >= 2
    assert squeezed(f"rows {NAME}") in seen and squeezed(f"model {NAME}") in seen


def test_no_row_drives_the_terminal(tmp_path: Path, my_model: Path, my_data: Path) -> None:
    evil = "\x1b[31mred\x1b]0;title\x07 \u202eback [bold]x[/bold] [link=http://evil.example/]y[/link]"
    turns = [{"role": "user", "content": evil}, {"role": "assistant", "content": evil}]
    file = write_rows(tmp_path / "rows.jsonl", [{"messages": turns}, *chats(90)[60:]])
    keys = (f"model.path={my_model}", f"data.source={file}", f"evaluation.source={my_data}", "--row", "0")
    told = invoke("inspect", *keys).stdout
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", told) and "[bold]x[/bold] [link=" in told
    written = invoke("inspect", *keys, "--json").stdout
    assert written.isascii() and "\x1b" not in written
    assert "\x1b[31m" in "".join(token["text"] for token in json.loads(written)["shown"][0]["tokens"])


def test_a_page_that_cannot_be_written_is_one_sentence(tmp_path: Path, my_model: Path, my_data: Path) -> None:
    keys = (f"model.path={my_model}", f"data.source={my_data}", "--page", str(tmp_path / "none" / "page.html"))
    result = invoke("inspect", *keys)
    assert result.exit_code == 2 and result.stderr.startswith("error: can't write") and "--page" in result.stderr
