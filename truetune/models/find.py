"""Whether there is a model at a path, said before what reads it is imported, which takes seconds."""

from __future__ import annotations

from pathlib import Path

from truetune.errors import UserError


def find(path: str, revision: str | None = None) -> Path | None:
    """The GGUF file or model folder on this machine that ``path`` names; None if it can only be a name on the hub.

    Raises UserError where it can be none of them, or names something else.
    """
    local = Path(path).expanduser()
    if revision is not None and local.exists():
        raise UserError(f"model.revision is for the hub, but {path} is on this machine; remove model.revision")
    if local.suffix == ".gguf":
        if not local.is_file():
            raise UserError(f"there is no file {path}; correct model.path")
        return local
    if local.is_dir():
        if not (local / "config.json").is_file():
            raise UserError(f"{path} has no config.json, so it is no Hugging Face model; correct model.path")
        return local
    if local.exists() or path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise UserError(f"{path} is neither a model folder nor a GGUF file; correct model.path")
    return None
