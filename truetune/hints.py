"""The commands that can come next, each true for what was written."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from truetune.models.export import GGUF_FILE, MODELFILE, place_of


def next_commands(folder: Path, kinds: Sequence[str]) -> list[str]:
    """What can be done with a run that is over, whose exports are of these kinds."""
    name = shlex.quote(str(folder))
    commands = [f'truetune generate {name} --prompt "..."', f"truetune report {name}"]
    if "adapter" in kinds and "merged" not in kinds:
        commands.append(f"truetune export {name} --merged")
    for kind in kinds:
        commands += commands_for(kind, folder, place_of(folder, kind))
    return commands


def commands_for(kind: str, folder: Path, place: Path) -> list[str]:
    """Commands of other programs that use the export of ``kind`` of the run ``folder`` that is in ``place``."""
    if kind.startswith("gguf-"):
        called = re.sub(r"[^a-z0-9_-]+", "-", folder.resolve().name.lower()).strip("-_") or "model"
        names = (GGUF_FILE.format(kind.removeprefix("gguf-")), MODELFILE)
        file, modelfile = (shlex.quote(str(place / name)) for name in names)
        return [f"llama-server -m {file} --jinja", f"ollama create {called} -f {modelfile}"]
    load = f'from transformers import pipeline; print(pipeline("text-generation", {json.dumps(str(place))})("..."))'
    return [] if kind == "adapter" else [f"python -c {shlex.quote(load)}"]
