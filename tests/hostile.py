"""A real run on rows, names and a template that try to break out of whatever shows them."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

from folders import CHATML, invoke, keys, write_model, write_rows

BREAK_OUT = (
    "</td></div></pre></text></svg></script><script>document.title='owned'</script>"
    "<img src={url}img onerror=\"document.title='owned'\"><svg onload=\"document.title='owned'\">"
    "<link rel=stylesheet href={url}css><iframe src={url}frame></iframe>]]>-->{{{{ 7*7 }}}}{{% raw %}}'\"` &amp; "
)
MARK_UP = "| a |\n# title\n<b>b</b> [l]({url}link) ![i]({url}image) `` ``` *e* _e_ ~~s~~ @you {url}plain "
NAME = "n<img src=x onerror=document.title='owned'> [l](u) |c| `q` &lt; {{ 7*7 }}"
"""What a file may be called: no slash."""


class Page(HTMLParser):
    """Elements, names and values of attributes, and the text of a page as a reader sees it."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def hostile_texts(url: str) -> tuple[str, str]:
    return BREAK_OUT.format(url=url), MARK_UP.format(url=url)


def hostile_files(place: Path, url: str = "http://evil.example/") -> tuple[Path, Path]:
    """A model whose template, and a file whose rows and name, try it."""
    script, mark_up = hostile_texts(url)
    rows = [
        {
            "messages": [
                {"role": "system", "content": f"{i} {mark_up}", script: "of an unknown column"},
                {"role": "user", "content": f"{script} {mark_up} {i}?"},
                {"role": "assistant", "content": f"{mark_up} {i} {script}"},
            ],
            script: mark_up,
        }
        for i in range(24)
    ]
    template = script.replace("{", "").replace("}", "") + CHATML
    model = write_model(place / f"model {NAME}", template=template)
    return model, write_rows(place / f"rows {NAME}.jsonl", rows)


def hostile_run(place: Path, url: str = "http://evil.example/") -> Path:
    """The folder of a run that finished; then it was failed by a check of a hostile figure, and its page made again."""
    model, data = hostile_files(place, url)
    folder = place / f"run {NAME}"
    more = ("train.steps=2", "data.max_length=2048", "train.tokens_per_micro_batch=2048", "train.tokens_per_step=3000")
    result = invoke("train", *keys(model, data, folder, *more, "output.merged=false"))
    assert result.exit_code == 0, result.output
    return folder


def squeezed(text: str) -> str:
    return re.sub(r"\s+", "", text)
