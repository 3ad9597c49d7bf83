"""Recipes that no one should write: as YAML, as TOML, as arguments."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from fuzzing import JUNK, SCALARS, WORDS, Target, damaged
from hypothesis import strategies as st

from truetune import spelling

Written = tuple[str, bytes, list[str]]
"""How the file's name ends, what it holds, and the arguments after it."""

GOOD: dict[str, dict[str, Any]] = {
    "model": {"path": "a/model", "precision": "fp32"},
    "data": {"source": "rows.jsonl", "rows": 10, "max_length": 64, "cut_limit": 0.5},
    "evaluation": {"rows": 4, "samples": 0},
    "adapter": {"method": "lora", "rank": 4, "alpha": 8.0, "targets": ["q_proj"]},
    "optimizer": {"name": "adamw", "rate": 1e-3, "betas": [0.9, 0.95]},
    "schedule": {"name": "linear", "warmup": 0.1},
    "train": {"steps": 3, "seed": 1, "clip": None},
    "checkpoint": {"every": 2, "keep": 1},
    "output": {"folder": "out", "merged": False},
}
KEYS = [(section, key) for section, keys in GOOD.items() for key in keys]
FRAGMENTS = [
    b"&a ", b"*a", b"!!python/object/apply:os.system [ls]", b"!!binary x", b"<<: {a: 1}\n", b"\t", b"\0", b"\xff\xfe",
    b"\xc2\x85", b"\xe2\x80\xa8", b"\xef\xbb\xbf", b"---\n", b"...\n", b"%YAML 1.1\n", b"? ", b"- ", b"{", b"[", b"'",
    b'"', b"|\n", b">\n", b"=", b"\n[train]\n", b"\n[[train]]\n", b"'''", b"1979-05-27", b"0x" + b"f" * 9000,
    b"9" * 9000, b"train:\n  steps: 1\n", b"steps: " * 30, b"a." * 5000 + b"a = 1\n", b"{a: " * 500, b"[" * 2000,
    b"# " * 300,
]  # fmt: skip
LAUGHS = b"a: &a [x]\n" + b"".join(b"%c: &%c [*%c,*%c,*%c]\n" % (i, i, i - 1, i - 1, i - 1) for i in range(98, 110))


@st.composite
def values(draw: Any) -> dict[str, Any]:
    recipe: dict[str, Any] = {section: dict(keys) for section, keys in GOOD.items()}
    for _ in range(draw(st.integers(0, 3))):
        section, key = draw(st.sampled_from(KEYS))
        if not isinstance(recipe.get(section), dict):
            continue
        match draw(st.sampled_from(["value", "key", "section", "moved", "missing", "version"])):
            case "value":
                recipe[section][key] = draw(JUNK)
            case "key":
                recipe[section][draw(st.sampled_from([key[:-1], key + "s", key.upper(), "name"]) | WORDS)] = draw(
                    SCALARS
                )
            case "section":
                recipe[section] = draw(JUNK)
            case "moved":
                recipe.setdefault(draw(WORDS), {"x": 1})
            case "missing":
                recipe[section].pop(key, None)
            case "version":
                recipe["version"] = draw(SCALARS)
    return recipe


def as_yaml(recipe: dict[str, Any]) -> bytes:
    try:
        return yaml.safe_dump(recipe, allow_unicode=True).encode("utf-8", "surrogatepass")
    except RecursionError:
        return json.dumps(recipe).encode()


def as_toml(recipe: dict[str, Any]) -> bytes:
    lines = []
    for section, keys in recipe.items():
        lines += [f"[{section}]"] if isinstance(keys, dict) else [f"{section} = {json.dumps(keys)}"]
        lines += [f"{key} = {json.dumps(value)}" for key, value in (keys.items() if isinstance(keys, dict) else ())]
    return "\n".join(lines).encode("utf-8", "surrogatepass")


@st.composite
def files(draw: Any) -> Written:
    suffix = draw(st.sampled_from([".yaml", ".toml"]))
    data = draw(values().map(as_yaml if suffix == ".yaml" else as_toml))
    match draw(st.sampled_from(["whole", "whole", "whole", "fragment", "damaged", "encoded", "odd"])):
        case "fragment":
            at = draw(st.integers(0, len(data)))
            data = data[:at] + draw(st.sampled_from(FRAGMENTS)) + data[at:]
        case "damaged":
            data = draw(damaged(data))
        case "encoded":
            name = draw(st.sampled_from(["utf-16", "utf-32", "utf-8-sig", "latin-1"]))
            data = data.decode("utf-8", "replace").encode(name, "replace")
        case "odd":
            data = draw(st.sampled_from([LAUGHS, b"", b"x: 1\n" * 40_000, *FRAGMENTS]) | st.binary(max_size=60))
    return suffix, data, draw(arguments)


@st.composite
def argument(draw: Any) -> str:
    section, key = draw(st.sampled_from(KEYS))
    name = draw(
        st.sampled_from([f"{section}.{key}", f"{section}.{key}", section, f"{section}.{key}.x", "a." * 3000]) | WORDS
    )
    value = draw(SCALARS.map(str) | st.sampled_from(["[", "[1, 2", '"', "{a: 1}", "[[1]]", "none", "json:loads", ":"]))
    return f"{name}={value}" if draw(st.integers(0, 9)) else name


arguments = st.just([]) | st.lists(argument(), max_size=2)


def target(folder: Path, share: float) -> Target:
    def act(written: Written) -> None:
        suffix, data, more = written
        file = folder / f"recipe{suffix}"
        file.write_bytes(data)
        recipe = spelling.read(str(file), more)
        spelling.write(recipe, folder / "again.yaml")
        assert spelling.read(str(folder / "again.yaml")) == recipe

    return Target("recipes", files(), act, share)
