"""The folder of an adapter as it is read: which base it names, whether these are its weights, and both together.

PEFT's own config says where the base was, not what it was; ``truetune.json`` beside it holds the base's sha256.
An adapter that is trained further keeps its shapes: of its config only what is trained here is taken up, and any
other setting is refused, since it would change what is computed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import truetune
from truetune import versions
from truetune.errors import UserError
from truetune.models.adapt import insert, lora_layers
from truetune.models.load import Loaded, explained, quiet
from truetune.models.targets import adapted_linears, in_full

CONFIG, WEIGHTS, OWN = "adapter_config.json", "adapter_model.safetensors", "truetune.json"
SHAPES = {
    "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "target_modules", "exclude_modules", "modules_to_save",
    "ensure_weight_tying", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern",
}  # fmt: skip
"""Settings of PEFT that an adapter trained further keeps."""
ELSEWHERE = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "init_lora_weights", "modules_to_tie", "target_modules_to_tie",
}  # fmt: skip
"""Settings that say nothing of what is computed; how the weights began is asked apart."""
WRITTEN = {
    "rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "rslora": "use_rslora", "dora": "use_dora",
}  # fmt: skip
"""Keys of a recipe, and what they are called in PEFT's config."""


def note_base(folder: Path, loaded: Loaded, **more: Any) -> None:
    """Leave beside the adapter which weights it was trained on, and ``more``."""
    own = {"format": versions.ADAPTER, "truetune": truetune.__version__, "base_sha256": loaded.digest, **more}
    (folder / OWN).write_text(json.dumps(own, indent=1), encoding="utf-8")


def base_of(folder: Path) -> tuple[str, str | None]:
    """The base model that the adapter in ``folder`` names, and its revision on the hub.

    Raises UserError for a config that is damaged, and where there are no weights as safetensors: PEFT would unpickle
    others, or ask the hub for them.
    """
    try:
        config = json.loads((folder / CONFIG).read_bytes())
        name, revision = config["base_model_name_or_path"], config.get("revision")
        if not isinstance(name, str) or not isinstance(revision, str | None):
            raise TypeError("it names no base model")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / CONFIG} is damaged ({error}); export the adapter again") from error
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"{folder} has no {WEIGHTS}, and nothing else is read; convert the adapter")
    return name, None if Path(name).exists() else revision


def with_adapter(loaded: Loaded, folder: Path) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """``loaded`` with the adapter upon it, and the adapter's tokenizer, whose chat template was trained.

    Raises UserError if the adapter was trained on other weights; one that does not say on which is let pass.
    """
    require_base(folder, loaded)
    with quiet(), explained(str(folder)):
        model = PeftModel.from_pretrained(loaded.model, folder)
        return model, AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def require_base(folder: Path, loaded: Loaded) -> None:
    """Raise UserError if the adapter in ``folder`` says that it was trained on other weights than ``loaded``."""
    file = folder / OWN
    if not file.is_file():
        return
    try:
        own = json.loads(file.read_bytes())
        versions.require(file, own["format"], versions.ADAPTER, own.get("truetune"))
        then = str(own["base_sha256"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is damaged ({error}); export the adapter again") from error
    if then != loaded.digest:
        raise UserError(
            f"the adapter in {folder} was trained on other weights than {loaded.source} has now ({then[:12]}, not "
            f"{loaded.digest[:12]}); restore that model, or use the merged one"
        )


def folder_of(path: str) -> Path:
    """The folder of the adapter that ``path`` names: itself, or that of a run. Raises UserError where there is none."""
    folder = Path(path).expanduser()
    inner = folder / "adapter"
    found = inner if (inner / CONFIG).is_file() else folder
    if not (found / CONFIG).is_file():
        raise UserError(
            f"{path} has no {CONFIG}, so it is neither an adapter nor a run that exported one; check the path"
        )
    return found


def provenance(path: str) -> dict[str, str]:
    """Where an adapter that is trained further came from, and which weights it had."""
    file = folder_of(path) / WEIGHTS
    with file.open("rb") as stream:
        return {"path": str(file.parent.resolve()), "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def continued(loaded: Loaded, head: str, path: str, written: Mapping[str, Any]) -> PeftModel:
    """``loaded.model`` with the adapter at ``path`` in it, to be trained further.

    written: keys of ``adapter`` in the recipe that the user wrote, with their values.
    Raises UserError if they contradict the adapter, if it was trained on other weights, or is none that LoRA here is.
    """
    folder = folder_of(path)
    base_of(folder)
    require_base(folder, loaded)
    config = shapes(folder)
    for key in [k for k in WRITTEN if k in written]:
        if written[key] != getattr(config, WRITTEN[key]):
            _contradicts(key, written[key], getattr(config, WRITTEN[key]), folder)
    full = in_full(loaded.model, head, written["also"]) if "also" in written else []
    wanted = adapted_linears(loaded.model, head, written["targets"], full) if "targets" in written else []
    with explained(str(folder)):
        model = insert(loaded.model, config)
        tensors = load_file(folder / WEIGHTS)
    if "also" in written and set(full) != set(config.modules_to_save or ()):
        _contradicts("also", written["also"], sorted(config.modules_to_save or ()), folder)
    layers = {n.removeprefix("base_model.model.") for n in lora_layers(model)}
    if "targets" in written and set(wanted) != layers:
        _contradicts("targets", written["targets"], f"{len(layers)} modules", folder)
    _take(model, tensors, folder)
    return model


def shapes(folder: Path) -> LoraConfig:
    """A config with what can be trained further of the one in ``folder``. Raises UserError for any other setting."""
    with explained(str(folder)):
        theirs = PeftConfig.from_pretrained(str(folder))
    if not isinstance(theirs, LoraConfig):
        raise UserError(f"{folder} holds {theirs.peft_type} and not LoRA, which alone can be trained further here")
    if theirs.init_lora_weights not in (True, False, "gaussian"):
        raise UserError(
            f"{folder} stands on a base that {theirs.init_lora_weights!r} changed when its training began; convert it "
            "to LoRA with PEFT's path_initial_model_for_weight_conversion"
        )
    plain = LoraConfig()
    for field in fields(LoraConfig):
        value = getattr(theirs, field.name)
        if field.name not in SHAPES | ELSEWHERE and value != getattr(plain, field.name):
            raise UserError(f"{folder} sets {field.name}, which can't be trained further here; start a new adapter")
    return LoraConfig(task_type="CAUSAL_LM", **{name: getattr(theirs, name) for name in SHAPES})


@torch.no_grad()
def _take(model: PeftModel, tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """Load ``tensors`` into the adapter of ``model``. Raises UserError unless they are all of its, in its shapes."""
    own = get_peft_model_state_dict(model, save_embedding_layers=False)
    for name in sorted(own.keys() ^ tensors.keys()):
        kind = "lacks" if name in own else "has a surplus"
        raise UserError(f"{folder / WEIGHTS} {kind} {name}, by its own config; export the adapter again")
    for name, tensor in own.items():
        if tensor.shape != tensors[name].shape:
            raise UserError(f"{folder / WEIGHTS} has {name} in another shape than its config; export the adapter again")
    set_peft_model_state_dict(model, tensors)


def _contradicts(key: str, here: Any, there: Any, folder: Path) -> None:
    raise UserError(
        f"adapter.{key} is {here}, but the adapter in {folder} has {there}, and keeps its shapes; remove adapter.{key}"
    )
