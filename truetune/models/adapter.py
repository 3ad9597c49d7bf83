"""The folder of an adapter as it is read: which base it names, whether these are its weights, and both together.

PEFT's own config says where the base was, not what it was; ``truetune.json`` beside it holds the base's sha256.
"""

from __future__ import annotations

import json
from pathlib import Path

from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import truetune
from truetune import versions
from truetune.errors import UserError
from truetune.models.load import Loaded, explained, quiet

CONFIG, WEIGHTS, OWN = "adapter_config.json", "adapter_model.safetensors", "truetune.json"


def note_base(folder: Path, loaded: Loaded) -> None:
    """Leave beside the adapter which weights it was trained on."""
    own = {"format": versions.ADAPTER, "truetune": truetune.__version__, "base_sha256": loaded.digest}
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
    _require_base(folder, loaded)
    with quiet(), explained(str(folder)):
        model = PeftModel.from_pretrained(loaded.model, folder)
        return model, AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def _require_base(folder: Path, loaded: Loaded) -> None:
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
