"""Runs every fenced code block of README.md and docs/*.md, so that the documentation cannot rot.

The blocks of one file run in their order, in an empty folder that holds ``my-model`` (a tiny Hugging Face model
with a chat template) and ``my-data.jsonl`` (rows of messages). By the tag of the block:

``python``        is executed; the blocks of a file share their names. If the first line is ``# name.py``, the block
                  is also written to that file, and so can be named in a recipe as ``name:attribute``.
``bash``          line by line; ``\\`` continues a line and ``.venv/bin/`` before a command is dropped.
                  ``truetune ...`` runs in process and must end with status 0, or with another one if the line ends
                  in ``# fails``. ``python SCRIPT ...`` likewise, from this folder or the repository's.
                  ``make X`` must be a target of the Makefile. Lines that install or fetch are checked for shape.
                  ``RUN`` is replaced by the newest folder under runs/.
``yaml, toml``    is a recipe or a part of one. If the first line is ``# name.yaml``, it is written to that file, for
                  the blocks that follow. Required keys may be absent.
``text``          is output, and is not run.

Any other tag, none, or a fence that is not closed is a fault.
"""

from __future__ import annotations

import importlib
import os
import re
import runpy
import shlex
import sys
from collections.abc import Callable, Iterator
from itertools import takewhile
from pathlib import Path
from textwrap import dedent
from typing import Any, NamedTuple
from unittest import mock

import pytest
from typer.testing import CliRunner

from truetune import spelling
from truetune.cli import app

ROOT = Path(__file__).parents[2]
DOCUMENTS = [*ROOT.glob("README.md"), *sorted(ROOT.glob("docs/*.md"))]
SHAPES = [
    r"(python3? -m )?pip install \S.*",
    r"git clone https://\S+( \S+)?",
    r"cd \S+",
    r"python3? -m venv \S+",
    r"(source|\.) \S+/activate",
]


class Block(NamedTuple):
    """The text between two fences, its tag, and the number of its first line in the file."""

    tag: str
    text: str
    line: int


def blocks(text: str) -> Iterator[Block]:
    """Raises ValueError for a fence that is not closed."""
    opened: tuple[str, str, int] | None = None
    inside: list[str] = []
    for number, line in enumerate(text.splitlines(), start=1):
        fence = re.fullmatch(r" *(`{3,}|~{3,}) *(.*)", line)
        if opened is None:
            if fence:
                opened, inside = (fence[1], fence[2].strip(), number + 1), []
        elif fence and not fence[2] and fence[1].startswith(opened[0]):
            yield Block(opened[1], dedent("\n".join(inside)), opened[2])
            opened = None
        else:
            inside.append(line)
    if opened:
        raise ValueError(f"the fence of line {opened[2] - 1} is not closed")


def run_blocks(path: Path) -> int:
    """Run the blocks of one file in the working folder; how many there were.

    Raises AssertionError, with file and line, for the first that does not do what it says.
    """
    names: dict[str, Any] = {"__name__": "__main__"}
    found = list(blocks(path.read_text(encoding="utf-8")))
    for block in found:
        try:
            if block.tag == "python":
                run_python(block, path, names)
            elif block.tag == "bash":
                run_bash(block)
            elif block.tag in ("yaml", "toml"):
                read_recipe(block)
            elif block.tag != "text":
                raise ValueError(f"a block is python, bash, yaml, toml or text, not {block.tag!r}")
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{path.name}:{block.line}: {type(error).__name__}: {error}") from error
    return len(found)


def run_python(block: Block, path: Path, names: dict[str, Any]) -> None:
    if file := named_file(block, ".py"):
        file.write_text(block.text, encoding="utf-8")
        importlib.invalidate_caches()
    # Empty lines before it, so that a traceback shows the line of the document.
    exec(compile("\n" * (block.line - 1) + block.text, str(path), "exec"), names)


def read_recipe(block: Block) -> None:
    suffix = f".{block.tag}"
    file = named_file(block, suffix) or Path(f"block{suffix}")
    file.write_text(block.text, encoding="utf-8")
    missing = [d.key for d in spelling.describe(str(file)) if d.value == "required"]
    spelling.read(str(file), [f"{key}=x" for key in missing])


def named_file(block: Block, suffix: str) -> Path | None:
    name = re.match(rf"# *([\w.-]+{re.escape(suffix)})\s*$", block.text.partition("\n")[0])
    return Path(name[1]) if name else None


def run_bash(block: Block) -> None:
    for line in block.text.replace("\\\n", " ").splitlines():
        if line.strip() and not line.strip().startswith("#"):
            run_line(line.strip())


def run_line(line: str) -> None:
    fails = line.endswith("# fails")
    words = shlex.split(re.sub(r"\bRUN\b", lambda _: newest_run(), line), comments=True)
    settings = dict(word.split("=", 1) for word in takewhile(re.compile("[A-Z_]+=").match, words))
    program, *arguments = words[len(settings) :]
    program = program.removeprefix(".venv/bin/")
    with mock.patch.dict(os.environ, settings):
        if program == "truetune":
            status, output = run_truetune(arguments)
        elif program == "python" and arguments[0].endswith(".py"):
            status, output = run_script(arguments), ""
        else:
            check_shape(program, arguments)
            return
    if (status != 0) != fails:
        raise ValueError(f"{line!r} ended with status {status}\n{output}")


def run_truetune(arguments: list[str]) -> tuple[int, str]:
    """Exit status and output; raises what is no fault of the user."""
    result = CliRunner().invoke(app, arguments)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def run_script(arguments: list[str]) -> int:
    """Exit status of a Python script, run in process."""
    script = Path(arguments[0]) if Path(arguments[0]).is_file() else ROOT / arguments[0]
    with mock.patch.object(sys, "argv", arguments):
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def check_shape(program: str, arguments: list[str]) -> None:
    """For what is not run: a target of the Makefile, or a known way to install or fetch."""
    command = " ".join([program, *arguments])
    if program == "make":
        targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        if unknown := {a for a in arguments if "=" not in a} - targets:
            raise ValueError(f"the Makefile has no target {', '.join(sorted(unknown))}")
    elif not any(re.fullmatch(shape, command) for shape in SHAPES):
        raise ValueError(f"{command!r} is no command that the documentation may show")


def newest_run() -> str:
    runs = sorted(Path("runs").glob("*/"), key=lambda folder: folder.stat().st_mtime_ns)
    if not runs:
        raise ValueError("RUN stands for the newest folder under runs/, but no run came before")
    return str(runs[-1])


# Where the blocks run.


@pytest.fixture
def workplace(my_model: Path, my_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working folder of one document."""
    (tmp_path / "my-model").symlink_to(my_model)
    (tmp_path / "my-data.jsonl").symlink_to(my_data)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_code_block_does_what_it_says(document: Path, workplace: Path) -> None:
    run_blocks(document)


# That a block which does not do what it says is seen.


@pytest.fixture
def sample(workplace: Path) -> Callable[[str], Path]:
    """Writes a document whose fences are spelled with ' instead of `."""

    def write(text: str) -> Path:
        file = workplace / "sample.md"
        file.write_text(text.replace("'''", "```"), encoding="utf-8")
        return file

    return write


GOOD = """
# A sample

'''bash
git clone https://example.com/truetune
cd truetune
pip install -e .
.venv/bin/pip install -e '.[gguf]'
make quickstart PYTHON=python3.11
'''

'''python
# halving.py
def halving(total: int, *, minimum: float = 0.0):
    return lambda step: max(0.5 ** step, minimum)
'''

1. In a list:

   '''yaml
   # recipe.yaml
   data:
     source: my-data.jsonl
     max_length: 128
   schedule:
     name: halving:halving
     minimum: 0.1
   evaluation:
     rows: 4
     samples: 1
     sample_tokens: 4
   '''

'''toml
train.clip = 0.5
'''

'''bash
# First look, then train.
TRUETUNE_REFERENCE=1 truetune show recipe recipe.yaml
truetune train recipe.yaml model.path=my-model \\
    train.steps=2 output.merged=true
truetune train recipe.yaml model.path=nowhere  # fails
truetune generate RUN --prompt "What is 2 and 2?" --max-tokens 4
truetune report RUN
python tools/verify_run.py RUN
'''

'''text
$ this is output, and is not run
'''

'''python
from pathlib import Path

run, = Path("runs").iterdir()
assert (run / "report.html").is_file()
assert halving(9)(1) == 0.5  # a name of an earlier block
'''
"""


def test_a_good_document_runs_whole(sample: Callable[[str], Path]) -> None:
    assert run_blocks(sample(GOOD)) == 7


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("'''python\nx = 1\nassert x == 2\n'''", "sample.md:2: AssertionError"),
        ("a\n\n'''python\nmissing\n'''", "sample.md:4: NameError"),
        ("'''python\nraise SystemExit(0)\n'''", "sample.md:2: SystemExit"),
        ("'''bash\ntruetune show nothing\n'''", "ended with status 2"),
        ("'''bash\ntruetune show recipes  # fails\n'''", "ended with status 0"),
        ("'''bash\ntruetune report RUN\n'''", "no run came before"),
        ("'''bash\nmake coffee\n'''", "no target coffee"),
        ("'''bash\npython tools/missing.py\n'''", "FileNotFoundError"),
        ("'''bash\ncurl https://example.com | sh\n'''", "no command that the documentation may show"),
        ("'''bash\ngit clone x\n'''", "no command that the documentation may show"),
        ("'''yaml\ntrain:\n  stepz: 2\n'''", 'unknown key "train.stepz"'),
        ("'''yaml\nschedule:\n  name: linear\n  decay: 2\n'''", "decay"),
        ("'''toml\ntrain.steps = 'two'\n'''", "train.steps"),
        ("'''json\n{}\n'''", "not 'json'"),
        ("'''\nx\n'''", "not ''"),
    ],
)
def test_a_bad_block_is_seen(sample: Callable[[str], Path], text: str, says: str) -> None:
    with pytest.raises(AssertionError, match=re.escape(says)):
        run_blocks(sample(text))


def test_a_fence_that_is_not_closed_is_seen(sample: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match="line 2 is not closed"):
        run_blocks(sample("x\n'''text\ny\n"))


def test_fences_inside_longer_fences_are_text() -> None:
    assert list(blocks("````text\n```bash\n````\n~~~python\nx\n~~~")) == [
        Block("text", "```bash", 2),
        Block("python", "x", 5),
    ]
