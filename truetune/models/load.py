"""A model and its tokenizer from a Hugging Face folder, the hub, or a GGUF file.

A GGUF file is unpacked once into an ordinary folder in the cache and loaded from there afterwards.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
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
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers import logging as transformers_logging

from truetune.cache import cache_folder
from truetune.errors import UserError, shortage
from truetune.models.find import find

_SHARED_LAYERS = 1000
"""Layers that may share their tensors with others."""


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


@dataclass(frozen=True, slots=True)
class Outline:
    """A model without its weights: where it was read from, its config and tokenizer, and what ends its answers."""

    folder: Path
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    stop_ids: frozenset[int]


def outline(
    path: str, *, revision: str | None = None, trust_remote_code: bool = False, weights: bool = False
) -> Outline:
    """Read what there is of a model beside its weights; from the hub, these are fetched only if ``weights``.

    Raises UserError when there is no such model, or its files are damaged.
    """
    folder = resolve(path, revision, weights)
    with quiet(), explained(path):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        if getattr(config, "quantization_config", None):
            raise UserError(f"{path} holds quantised weights, which can't be trained here; name the original model")
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        tokenizer("")  # what is wrong with its files may show only in use
        written = (folder / "generation_config.json").is_file()
        generation = GenerationConfig.from_pretrained(folder) if written else GenerationConfig.from_model_config(config)
    _require_plain_names(path, tokenizer)
    return Outline(folder, config, tokenizer, stop_ids(tokenizer, generation, config))


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
    known = outline(path, revision=revision, trust_remote_code=trust_remote_code, weights=True)
    folder = known.folder
    config: Any = known.config
    with quiet(), explained(path):
        _require_size(path, folder, config, trust_remote_code)
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
    if broken := [n for n, p in model.named_parameters() if p.is_floating_point() and not torch.isfinite(p).all()]:
        raise UserError(f"{path} has weights that are NaN or infinite ({broken[0]}); get an intact copy of the model")
    model.generation_config.max_length = None
    return Loaded(
        model,
        known.tokenizer,
        path,
        folder,
        weights_digest(folder),
        known.stop_ids,
        config.dtype,
        trust_remote_code,
        revision,
    )


def _require_plain_names(path: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UserError for chat templates whose names would not do as names of the files that they are saved in."""
    named = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
    if wrong := [name for name in named if not re.fullmatch(r"\w[\w.-]*", name)]:
        raise UserError(f"{path} has a chat template of the name {wrong[0]!a}; rename it in tokenizer_config.json")


def _require_size(path: str, folder: Path, config: PreTrainedConfig, trust_remote_code: bool) -> None:
    """Raise UserError where the config asks for far more weights than the files hold, before any takes memory."""
    held = tensors = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as stored:
            shapes = [stored.get_slice(name).get_shape() for name in stored.keys()]  # noqa: SIM118
        held, tensors = held + sum(map(math.prod, shapes)), tensors + len(shapes)
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if layers > tensors + _SHARED_LAYERS:
        raise UserError(f"{path} asks for {layers:,} layers, but holds {tensors:,} tensors; correct its config.json")
    wanted = sum(p.numel() for p in skeleton(config, trust_remote_code).parameters())
    if held and wanted > 2 * held:
        raise UserError(f"{path} asks for {wanted:,} weights, but holds {held:,}; get weights and config of one model")


def skeleton(config: PreTrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a config, without memory for its weights."""
    with quiet(), torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return model


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


def resolve(path: str, revision: str | None = None, weights: bool = True) -> Path:
    """The local folder that ``path`` stands for: itself, an unpacked GGUF, or a snapshot from the hub.

    weights: whether a snapshot has to hold them.
    """
    if local := find(path, revision):
        return _unpacked(local) if local.suffix == ".gguf" else local
    patterns = ["*.json", "*.jinja", "*.model", "*.txt", "*.py", *(["*.safetensors"] if weights else [])]
    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=patterns))
    except Exception as error:  # of the hub's client, of its transport, of the disk
        raise UserError(
            f"there is no folder {path} here, and it could not be had from the hub ({_reason(error)}); check the path, "
            "or name a folder, a GGUF file, or a hub id that can be reached"
        ) from error


def stop_ids(
    tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig, config: PreTrainedConfig
) -> frozenset[int]:
    found: set[int] = set()
    for value in (tokenizer.eos_token_id, generation.eos_token_id, config.get_text_config().eos_token_id):
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(token) is int and 0 <= token < 2**31 for token in ids):
            raise UserError(
                f"eos_token_id is {value!r}, but must be a token's number, from 0, or a list of them; correct "
                "config.json and generation_config.json"
            )
        found.update(ids)
    return frozenset(found)


def weights_digest(folder: Path) -> str:
    """sha256 over the weight files, in the order of their names: the identity of a base model."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


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
        with quiet(), explained(str(file)):
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
            model = AutoModelForCausalLM.from_pretrained(
                file.parent,
                gguf_file=file.name,
                trust_remote_code=False,
                dtype=torch.bfloat16,
                **_dequantized(),
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


def _dequantized() -> dict[str, Any]:
    """How to ask for plain weights; releases before there was a choice give nothing else."""
    try:
        from transformers.utils.quantization_config import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


@contextlib.contextmanager
def explained(path: str) -> Iterator[None]:
    """Turn the library's refusal into one sentence."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # what parsers of damaged files raise is of every kind
        if shortage(error):
            raise
        if "trust_remote_code" in str(error):
            raise UserError(
                f"{path} comes with Python code of its own, which is run only with model.trust_remote_code=true; read "
                "it first, or choose another model"
            ) from error
        raise UserError(
            f"can't load {path} as a causal language model ({_reason(error)}); name a folder, a GGUF file, or a hub "
            "id that can be reached"
        ) from error


def _reason(error: Exception) -> str:
    """What a library says, on one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    reason = " ".join(lines if lines[0].endswith(":") else lines[:1]).rstrip(".")
    reason = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", reason)
    if not isinstance(error, OSError | ValueError):
        reason = f"{type(error).__name__} {reason}".strip()
    return reason[:300]


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
            warnings.filterwarnings("ignore", ".*(tie_word_embeddings|no longer tied|tied modules)")  # seen to here
            yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
