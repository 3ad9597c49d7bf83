"""The page and the card of a real run on hostile rows: they show the text, and nothing of it becomes more than text."""

from __future__ import annotations

import http.server
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from folders import facts, invoke
from hostile import NAME, Page, hostile_run, hostile_texts, squeezed
from markdown_it import MarkdownIt

from truetune import inspection

URL = "http://evil.example/"
NEVER = {"script", "img", "iframe", "link", "object", "embed", "base", "form", "a"}
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hostile_run(tmp_path_factory.mktemp("hostile"), URL)


@pytest.fixture
def failed(run: Path, tmp_path: Path) -> Path:
    """The same run, whose checks, alarms, exports and roles are named by the rows too."""
    folder = tmp_path / run.name
    shutil.copytree(run, folder)
    script, mark_up = hostile_texts(URL)
    found = facts(folder)
    found["verdicts"].append({"name": script, "passed": False, "figure": mark_up, "advice": script})
    found["data"]["train"]["tokens_by_role"][script] = 7
    found["data"]["train"]["dropped"][mark_up] = 7
    found["exports"].append(
        {"kind": script, "path": script, "difference": 0, "bound": 0, "passed": False, "note": script}
    )
    found |= {"name": script, "command": script, "next": [script], "truetune": script}
    (folder / "run.json").write_text(json.dumps(found))
    with (folder / "metrics.jsonl").open("a") as file:
        alarm = {"kind": "alarm", "step": 2, "name": script, "message": mark_up, "voids": True}
        file.write(json.dumps(alarm) + "\n")
    assert invoke("report", str(folder)).exit_code == 0
    return folder


def assert_only_text(html: str) -> Page:
    page = Page(html)
    assert not NEVER & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on") or name in ("src", "href", "srcset")]
    assert "default-src 'none'" in html
    return page


def test_the_page_shows_rows_as_they_are(run: Path, straight: tuple[Path, str]) -> None:
    page = assert_only_text((run / "report.html").read_text())
    script, mark_up = hostile_texts(URL)
    shown = squeezed(page.text)
    for text in (script, mark_up):  # the prompt and the reference
        assert shown.count(squeezed(text)) >= 2
    for kind in ("model", "rows", "run"):
        assert squeezed(f"{kind} {NAME}") in shown
    own = Page((straight[0] / "report.html").read_text())
    assert set(page.tags) <= set(own.tags)


def test_the_page_of_a_failed_run_shows_names_and_figures_as_they_are(failed: Path) -> None:
    page = assert_only_text((failed / "report.html").read_text())
    assert squeezed(page.text).count(squeezed(hostile_texts(URL)[0])) >= 10


@pytest.mark.parametrize("which", ["run", "failed"])
def test_the_card_is_text_alone(which: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(which)
    from truetune.report import card

    for target in (folder, folder / "adapter"):
        body = card(folder, target).read_text(encoding="utf-8").split("---\n", 2)[2]
        body = re.sub(r"```python\n.*?\n```\n", "", body, flags=re.DOTALL)  # made of names that are ours
        parser = MarkdownIt("commonmark", {"html": True}).enable("table").enable("strikethrough")
        tokens = [t for token in parser.parse(body) for t in (token, *(token.children or ()))]
        wrong = {
            "html_inline",
            "html_block",
            "image",
            "link_open",
            "code_inline",
            "fence",
            "code_block",
            "s_open",
            "em_open",
        }
        assert not {t.type for t in tokens} & wrong
        assert [t.tag for t in tokens if t.type == "heading_open"].count("h1") == 1, "the name of the run"
        assert not re.search(r"https?://|www\.", body), "nothing that a renderer would make a link of"
        told = squeezed("".join(t.content for t in tokens if t.type in ("text", "text_special")))
        assert squeezed(f"rows {NAME}") in told


class Counting(http.server.BaseHTTPRequestHandler):
    asked: list[str] = []  # noqa: RUF012

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """A server that nobody should ask, and what it was asked."""
    Counting.asked.clear()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Counting) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}/", Counting.asked
        listening.shutdown()


@pytest.mark.proof
def test_a_browser_runs_and_loads_nothing(
    tmp_path: Path, server: tuple[str, list[str]], evidence: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does it with the page's own policy taken away: escaping alone holds."""
    program = next(filter(None, map(shutil.which, BROWSERS)), None) or pytest.fail(
        "install it: apt-get install chromium"
    )
    url, asked = server
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--dump-dom")

    def browse(page: Path) -> str:
        command = [program, *options, f"--user-data-dir={tmp_path / 'profile'}", page.as_uri()]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout

    trap = tmp_path / "trap.html"
    trap.write_text(f"<title>own</title>{hostile_texts(url)[0]}")
    assert "<title>owned</title>" in browse(trap) and asked, "the texts would run and load, were they not escaped"
    asked.clear()
    monkeypatch.setattr(inspection.shown, "HEAD", 10_000)  # the rows are long, and shown whole
    report, looked = hostile_run(tmp_path, url) / "report.html", tmp_path / "inspect.html"
    given = (f"model.path={tmp_path / f'model {NAME}'}", f"data.source={tmp_path / f'rows {NAME}.jsonl'}")
    assert (
        invoke(
            "inspect", *given, "train.tokens_per_micro_batch=4096", "data.max_length=4096", "--page", str(looked)
        ).exit_code
        == 0
    )
    pages = {
        f"{file.name} {kind}": change(file.read_text())
        for file in (report, looked)
        for kind, change in (("as it is", str), ("bare", lambda html: re.sub(r"<meta http-equiv[^>]*>", "", html)))
    }
    script, mark_up = hostile_texts(url)
    for number, text in enumerate(pages.values()):
        file = tmp_path / f"{number}.html"
        file.write_text(text)
        dom = Page(browse(file))
        assert not NEVER & set(dom.tags) and not [n for n, _ in dom.attributes if n.startswith("on")]
        shown = squeezed(dom.text.replace("↵", ""))  # with which a page marks the ends of lines
        assert shown.count(squeezed(script)) >= 2 and shown.count(squeezed(mark_up)) >= 2
        assert "owned</title>" not in dom.text and squeezed(f"rows {NAME}") in shown
    assert not asked
    evidence("hostile-rows", pages=len(pages), requests=len(asked))
