"""Compiling on first use: once, whole or not at all, and never in the way."""

import re
from pathlib import Path

import pytest
import torch

from truetune.kernels.native import build

GOOD = 'extern "C" int answer() { return NUMBER; }\n'
FLAGS = ("-DNUMBER=1",)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRUETUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    return tmp_path / "cache" / "native"


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    if not list(build._compilers()):
        pytest.skip("no compiler")
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "attention.cpp").write_text(GOOD)
    return folder


def test_it_is_compiled_once_and_says_so(sources: Path, cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    build.load(sources, "one", FLAGS)
    (file,) = cache.iterdir()
    assert re.fullmatch(r"compiling kernels for this processor, once \.\.\. \d+ s\n", capfd.readouterr().err)
    assert str(file) in torch.ops.loaded_libraries
    build.load(sources, "one", FLAGS)
    assert capfd.readouterr() == ("", "")
    assert list(cache.iterdir()) == [file]


def test_whatever_it_depends_on_makes_another(sources: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def files() -> int:
        build.load(sources, "one", FLAGS)
        return len(list(cache.iterdir()))

    assert files() == 1
    (sources / "attention.cpp").write_text(GOOD + "// other\n")
    assert files() == 2
    (sources / "tiles.h").write_text("// other\n")
    assert files() == 3
    monkeypatch.setattr(build, "instructions", lambda: ["others"])
    assert files() == 4
    monkeypatch.setattr(torch, "__version__", "0")
    assert files() == 5
    build.load(sources, "one", ("-DNUMBER=2",))
    build.load(sources, "two", FLAGS)
    assert files() == 7
    (compiler,) = list(build._compilers())[:1]
    monkeypatch.setenv("CXX", f"{compiler[0]} -DOTHER")
    assert files() == 8


def test_without_a_compiler_there_is_none(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(build.BuildError, match=r"no C\+\+ compiler .* install g\+\+"):
        build.load(sources, "one", FLAGS)


@pytest.mark.parametrize(
    ("text", "reason"),
    [("#error wrong\n", "wrong"), ('extern "C" int f(); int g() { return f(); }\n', "undefined symbol")],
)
def test_what_does_not_compile_or_load_is_told_and_leaves_nothing_half(
    sources: Path, cache: Path, text: str, reason: str
) -> None:
    (sources / "attention.cpp").write_text(text)
    with pytest.raises(build.BuildError, match=reason):
        build.load(sources, "one", FLAGS)
    assert all(file.suffix == ".so" for file in cache.iterdir())


def test_a_compiler_that_fails_leaves_it_to_the_next(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "false")
    build.load(sources, "one", FLAGS)


def test_a_folder_that_others_write_is_not_run_from(sources: Path, cache: Path) -> None:
    cache.mkdir(parents=True)
    cache.chmod(0o777)
    with pytest.raises(build.BuildError, match="others can write"):
        build.load(sources, "one", FLAGS)


def test_a_cache_that_cannot_be_written_is_a_reason(sources: Path, cache: Path) -> None:
    cache.parent.mkdir()
    cache.write_text("in the way")
    with pytest.raises(build.BuildError, match="exists"):
        build.load(sources, "one", FLAGS)


def test_a_failure_is_one_note(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*_: object) -> None:
        raise build.BuildError("no luck")

    monkeypatch.setattr(build, "load", fail)
    monkeypatch.setattr(build, "instructions", lambda: ["avx2", "fma"])
    assert build.kernels.__wrapped__() is None
    assert capsys.readouterr().err == "note: kernels are torch's own, which are slower: no luck\n"
    monkeypatch.setattr(build, "instructions", lambda: ["sse2"])
    assert build.kernels.__wrapped__() is None
    assert not capsys.readouterr().err
