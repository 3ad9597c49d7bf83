"""A model and its tokenizer from a Hugging Face folder, the hub, or a GGUF file.

A GGUF file is unpacked once into an ordinary folder in the cache and loaded from there afterwards.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers import logging as transformers_logging
from transformers.utils.quantization_config import GgufConfig

from truetune.errors import UserError


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model with what belongs to it.

    source: what the user named; folder: where it was read from; digest: sha256 of its weight files;
    stop_ids: tokens that end an answer, from the tokenizer and the generation config together;
    config_dtype: what its files hold, by its config.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: str
    folder: Path
    digest: str
    stop_ids: frozenset[int]
    config_dtype: torch.dtype | None = None
    trust_remote_code: bool = False
    revision: str | None = None


def load(
    path: str,
    *,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Loaded:
    """Read model and tokenizer, with the weights in ``dtype``.

    Raises UserError when there is no such model, or when it is no causal language model.
    """
    folder = resolve(path, revision)
    with quiet(), _explained(path):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        if getattr(config, "quantization_config", None):
            raise UserError(f"{path} holds quantised weights, which can't be trained here; name the original model")
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, in a sentence
        )
    model, report = loaded
    if report["mismatched_keys"]:
        name, stored, wanted = min(report["mismatched_keys"])
        raise UserError(
            f"{path} has {name} of shape {list(stored)} where its config asks for {list(wanted)}; get weights and "
            "config of the same model"
        )
    if lost := sorted(report["missing_keys"]):
        raise UserError(
            f"{path} lacks {len(lost)} weights that its config asks for ({lost[0]}, ...), which would start at "
            "random; get the complete model"
        )
    model.generation_config.max_length = None
    return Loaded(
        model,
        tokenizer,
        path,
        folder,
        weights_digest(folder),
        stop_ids(tokenizer, model),
        config.dtype,
        trust_remote_code,
        revision,
    )


@torch.no_grad()
def require_causal(model: PreTrainedModel) -> None:
    """Raise UserError if later tokens change earlier logits: such a model would read its targets.

    Encoders are loaded as causal models without complaint, and their loss falls beautifully.
    """
    tokens = torch.arange(1, 9, device=model.device)[None]
    others = torch.where(tokens > 4, 1, tokens)
    training = model.training
    model.eval()
    first, second = (model(input_ids=t, use_cache=False).logits[0, :4].float() for t in (tokens, others))
    model.train(training)
    bound = 1e-4 if model.dtype == torch.float32 else 2e-2  # experts may round differently in other company
    if float((first - second).abs().max()) > bound * float(first.abs().max()):
        raise UserError(
            f"{type(model).__name__} sees later tokens, so it is no causal language model; choose a model that is one"
        )


def resolve(path: str, revision: str | None = None) -> Path:
    """The local folder that ``path`` stands for: itself, an unpacked GGUF, or a snapshot from the hub."""
    local = Path(path).expanduser()
    if local.suffix == ".gguf":
        if not local.is_file():
            raise UserError(f"there is no file {path}; correct model.path")
        return _unpacked(local)
    if local.is_dir():
        if not (local / "config.json").is_file():
            raise UserError(f"{path} has no config.json, so it is no Hugging Face model; correct model.path")
        return local
    if local.exists() or path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise UserError(f"{path} is neither a model folder nor a GGUF file; correct model.path")
    with _explained(path):
        patterns = ["*.json", "*.jinja", "*.safetensors", "*.model", "*.txt", "*.py"]
        return Path(snapshot_download(path, revision=revision, allow_patterns=patterns))


def stop_ids(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> frozenset[int]:
    found: set[int] = set()
    for value in (tokenizer.eos_token_id, model.generation_config.eos_token_id, model.config.eos_token_id):
        if value is not None:
            found.update([value] if isinstance(value, int) else value)
    return frozenset(found)


def weights_digest(folder: Path) -> str:
    """sha256 over the weight files, in the order of their names: the identity of a base model."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def cache_folder() -> Path:
    """Where converted models are kept: $TRUETUNE_CACHE, or truetune in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "truetune"
    return Path(os.environ.get("TRUETUNE_CACHE") or default)


def _unpacked(file: Path) -> Path:
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise UserError("reading a GGUF file needs the extra: pip install 'truetune[gguf]'") from error
    with file.open("rb") as stream:
        identity = hashlib.file_digest(stream, "sha256").hexdigest()
    target = cache_folder() / f"{file.stem}-{identity[:12]}"
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=target.parent))
    try:
        with quiet(), _explained(str(file)):
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
            model = AutoModelForCausalLM.from_pretrained(
                file.parent,
                gguf_file=file.name,
                dtype=torch.bfloat16,
                quantization_config=GgufConfig(dequantize=True),
            )
            model.save_pretrained(scratch)
            tokenizer.save_pretrained(scratch)
        scratch.rename(target)
    except OSError:
        if not target.is_dir():  # else another process was first
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


@contextlib.contextmanager
def _explained(path: str) -> Iterator[None]:
    """Turn the library's refusal into one sentence."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # what parsers of damaged files raise is of every kind
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
        reason = " ".join(lines if lines[0].endswith(":") else lines[:1]).rstrip(".")
        reason = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", reason)
        if not isinstance(error, OSError | ValueError):
            reason = f"{type(error).__name__} {reason}".strip()
        raise UserError(
            f"can't load {path} as a causal language model ({reason[:300]}); name a folder, a GGUF file, or a hub "
            "id that can be reached"
        ) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep progress bars and advice of the libraries off the screen; errors still come as exceptions."""
    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # between the libraries; the user can't act on it
            yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
