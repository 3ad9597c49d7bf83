"""The report in a real browser: what hostile rows become there, and whether the page fits narrow windows."""

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from truetune.report import write

pytestmark = pytest.mark.proof
NAMES = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture
def browse(tmp_path):
    """browse(page, *options) -> what Chromium prints."""
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.fail("no Chromium on this machine; install it with: apt-get install -y chromium")

    def run(page: Path, *options: str) -> str:
        command = [
            program,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-background-networking",
            "--hide-scrollbars",
            f"--user-data-dir={tmp_path / 'profile'}",
            *options,
            page.as_uri(),
        ]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout

    return run


class Dom(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))


def test_no_row_becomes_an_element(make_run, browse):
    html = browse(write(make_run(hostile=True)), "--dump-dom")
    elements = Dom(html).elements
    assert not {"script", "img"} & {tag for tag, _ in elements}
    assert not [name for _, attributes in elements for name in attributes if name.startswith("on")]
    plots = [a["aria-label"] for tag, a in elements if tag == "svg" and "aria-label" in a]
    assert plots == ["Loss", "Learning rate", "Gradient norm", "Tokens per second", "Memory, GiB"]
    assert len([tag for tag, _ in elements if tag == "svg"]) == 2 * len(plots), "each with its curves, no other"
    assert html.count("&lt;/script&gt;&lt;script&gt;") > 15
    assert re.search("<title>docs &lt;/script&gt;", html), "the title is what it was"


@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("hostile", [False, True])
def test_nothing_is_wider_than_the_window(make_run, browse, tmp_path, width, hostile):
    html = write(make_run(hostile=hostile)).read_text()
    # The page itself forbids scripts; the ruler needs one, so it is measured without its policy, in a frame.
    html = re.sub(r"<meta http-equiv[^>]*>", "", html).replace("&", "&amp;").replace('"', "&quot;")
    ruler = tmp_path / "ruler.html"
    ruler.write_text(
        f'<iframe style="border:0;width:{width}px;height:900px" srcdoc="{html}" onload="'
        'document.body.dataset.width = this.contentDocument.documentElement.scrollWidth"></iframe>'
    )
    measured = re.search(r'data-width="(\d+)"', browse(ruler, "--dump-dom", "--window-size=1600,1000"))
    assert measured and int(measured[1]) == width


@pytest.mark.parametrize(("scheme", "paper"), [(1, (253, 252, 250)), (0, (21, 22, 23))], ids=["light", "dark"])
def test_the_page_follows_the_colour_scheme(make_run, browse, tmp_path, scheme, paper):
    picture = tmp_path / "page.png"
    options = (
        f"--screenshot={picture}",
        "--window-size=1400,1000",
        f"--blink-settings=preferredColorScheme={scheme}",
    )
    browse(write(make_run()), *options)
    with Image.open(picture) as image:
        assert image.size == (1400, 1000)
        assert image.convert("RGB").getpixel((3, 3)) == paper
        assert len(image.convert("RGB").getcolors(1 << 20)) > 100, "something is drawn"
