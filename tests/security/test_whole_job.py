"""A whole job in a process of its own, watched: it unpickles nothing, calls nobody, tells no secret, stays at home."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest
from folders import chats, facts, keys, write_model, write_rows

import truetune
from truetune.kernels.native import build
from truetune.kernels.op import FAST_PATHS

WATCHED = Path(__file__).with_name("watched.py")
CANARY = "cAnArY-31415926535"
SECRETS = (
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "WANDB_API_KEY",
    "OPENAI_API_KEY",
)
SHORT = ("train.steps=4", "evaluation.every=2")


@dataclass(frozen=True)
class Session:
    """``place`` was the current folder, with home, tmp, model and data.jsonl; all else came of the commands."""

    place: Path
    codes: list[int]
    events: list[list[str]]
    printed: str


def session(
    place: Path, *commands: Iterable[str], around: Iterable[str] = (), off: str = ",".join(FAST_PATHS)
) -> Session:
    """Run the commands with secrets in the environment, and with no word that forbids the network.

    off: fast paths that are not taken; in a home without a cache, they would be compiled.
    """
    for name in ("home", "tmp"):
        (place / name).mkdir()
    write_model(place / "model")
    write_rows(place / "data.jsonl", chats())
    kept = {
        k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "TRANSFORMERS", "XDG", "PYTEST"))
    }
    homes = {"HOME": str(place / "home"), "TMPDIR": str(place / "tmp"), "PYTHONDONTWRITEBYTECODE": "1"}
    log = place.with_name(f"{place.name}-log")
    command = [*around, sys.executable, str(WATCHED), str(log), json.dumps([list(c) for c in commands])]
    done = subprocess.run(
        command,
        cwd=place,
        env=kept | homes | {"TRUETUNE_OFF": off} | dict.fromkeys(SECRETS, CANARY),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in log.read_text().splitlines()]
    codes = [int(e[1]) for e in events if e[0] == "exit"]
    return Session(place, codes, [e for e in events if e[0] != "exit"], done.stdout + done.stderr)


def whole_job() -> list[list[str]]:
    asked = ["--prompt", "What is 3?", "--max-tokens", "3"]
    return [
        ["train", *keys(Path("model"), "data.jsonl", Path("out"), *SHORT)],
        ["generate", "out", *asked],
        ["generate", "out/adapter", *asked],
        ["export", "out", "--to", "exported"],
        ["report", "out"],
        ["show", "checkpoints", "out"],
    ]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Session:
    done = session(tmp_path_factory.mktemp("job"), *whole_job())
    assert done.codes == [0] * len(whole_job()), done.printed
    return done


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> Session:
    """A run that becomes infinite, one without a model, one without data, and recipes that are wrong."""
    done = session(
        tmp_path_factory.mktemp("failures"),
        [
            "train",
            *keys(
                Path("model"), "data.jsonl", Path("nan"), "optimizer.rate=100", "schedule.warmup=0.9", "train.clip=none"
            ),
        ],
        ["train", *keys(Path("nobody/nothing"), "data.jsonl", Path("a"))],
        ["train", *keys(Path("model"), "nobody/nothing", Path("b"))],
        ["train", *keys(Path("model"), "data.jsonl", Path("c"), "optimizer.name=adamwx")],
        ["generate", "nan", "--prompt", "x"],
    )
    assert done.codes == [2] * 5, done.printed
    assert next(done.place.glob("nan/failure-step-*/batch.safetensors")), "the bundle is among what is searched"
    return done


def names(done: Session) -> set[str]:
    return {event[0] for event in done.events}


def test_nothing_is_unpickled(job: Session) -> None:
    assert "open" in names(job), "the hook is in place"
    assert "pickle.find_class" not in names(job)


def test_nobody_is_called_and_no_program_is_run(job: Session) -> None:
    assert not [name for name in names(job) if name.startswith(("socket.", "os.system", "os.exec", "os.posix_spawn"))]
    programs = [event[1] for event in job.events if event[0] == "subprocess.Popen"]
    assert set(programs) <= {"uname"}, "Python's platform module asks it for the processor"


def test_only_a_name_on_the_hub_makes_a_call(failures: Session) -> None:
    """The same hook sees the calls that there are, so that it would have seen others."""
    assert any(name.startswith("socket.") for name in names(failures))


def test_nothing_is_written_elsewhere(job: Session) -> None:
    allowed = [job.place / name for name in ("out", "exported", ".exported.tmp", ".exported.old", "tmp")]
    changed = {(job.place / event[1]).resolve() for event in job.events if event[0] == "open"}
    inside = {p for p in changed if any(p.is_relative_to(folder) for folder in allowed)}
    others = {str(p) for p in changed - inside}
    assert len(inside) > 20 and others <= {"/dev/null"}
    # Native code is not audited: look at the folder too.
    assert {p.name for p in job.place.iterdir()} == {"model", "data.jsonl", "home", "tmp", "out", "exported"}
    assert not [p for p in (job.place / "home").rglob("*") if p.is_file()]


@pytest.mark.proof
def test_kernels_are_compiled_once_into_the_cache_and_nothing_else_is_run(tmp_path: Path) -> None:
    place = tmp_path / "job"
    place.mkdir()
    short = keys(Path("model"), "data.jsonl", Path("out"), *SHORT)
    done = session(place, ["train", *short], off="")
    assert done.codes == [0], done.printed
    programs = [Path(event[1]).name for event in done.events if event[0] == "subprocess.Popen"]
    if build.kernels() is None:
        pytest.skip("no compiled kernels on this machine")
    compilers = {Path(name).name for name, *_ in build._compilers()}
    assert [name for name in programs if name != "uname"] == [c for c in programs if c in compilers]
    sources = len(list(build.SOURCES.glob("*.cpp")))
    assert sum(name in compilers for name in programs) == sources + 1, "each is compiled, then they are linked"
    (file,) = (p for p in (place / "home").rglob("*") if p.is_file())
    assert file.parent == place / "home" / ".cache" / "truetune" / "native" and file.suffix == ".so"
    assert not any((place / "tmp").iterdir())


def holders(place: Path, text: str) -> list[str]:
    return [str(p) for p in place.rglob("*") if p.is_file() and (text in p.name or text.encode() in p.read_bytes())]


@pytest.mark.parametrize("which", ["job", "failures"])
def test_no_secret_is_written_or_printed(which: str, request: pytest.FixtureRequest) -> None:
    done: Session = request.getfixturevalue(which)
    assert CANARY not in done.printed and not holders(done.place, CANARY)
    assert CANARY not in json.dumps(done.events)
    assert holders(done.place, "optimizer"), "the search finds what is there"


def test_arguments_of_a_program_that_calls_us_are_its_own(
    my_model: Path, my_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["pipeline.py", f"--api-key={CANARY}"])
    recipe = truetune.Recipe(
        model={"path": str(my_model), "precision": "fp32"},  # type: ignore[arg-type]
        data={"source": str(my_data), "max_length": 128},  # type: ignore[arg-type]
        train={"steps": 2},  # type: ignore[arg-type]
        evaluation={"samples": 0},  # type: ignore[arg-type]
        output={"folder": str(tmp_path / "out"), "merged": False},  # type: ignore[arg-type]
    )
    truetune.train(recipe, quiet=True)  # type: ignore[operator]
    assert not holders(tmp_path, CANARY) and facts(tmp_path / "out")["command"] is None


def test_the_command_can_be_pasted(job: Session) -> None:
    assert facts(job.place / "out")["command"].startswith("truetune train model.path=model data.source=data.jsonl")


SEES_NO_NETWORK = """
import errno, socket
try:
    socket.create_connection(("192.0.2.1", 80), timeout=5)
except OSError as error:
    assert error.errno == errno.ENETUNREACH, error
else:
    raise SystemExit("there is a network")
"""


@pytest.mark.proof
def test_the_main_job_needs_no_network(tmp_path: Path, evidence: Callable[..., None]) -> None:
    """In a network namespace that has no route and no other interface than a loopback that is down."""
    apart = ["unshare", "--net"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--net"]
    subprocess.run([*apart, sys.executable, "-c", SEES_NO_NETWORK], check=True, timeout=60)
    place = tmp_path / "job"
    place.mkdir()
    done = session(place, *whole_job(), around=apart)
    assert done.codes == [0] * len(whole_job()), done.printed
    evidence("no-network", commands=len(done.codes), failed=sum(map(bool, done.codes)))
