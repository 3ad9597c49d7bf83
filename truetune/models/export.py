"""The trained model leaves as an ordinary folder, and is read back before anyone is told that it is there.

The difference that is printed is the largest over the logits of real documents, between the live model and
what a stranger would load, both computed in fp32 so that only what was stored can differ. Weights stored in
bfloat16 are rounded once (relative 2^-9 each); the bound on their logits is stated in ``BOUND``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from truetune.errors import UserError
from truetune.models.adapt import START, unfused
from truetune.models.adapter import note_base
from truetune.models.base import original_weights
from truetune.models.join import write_joined
from truetune.models.load import Loaded, quiet, weights_digest
from truetune.models.targets import is_tied
from truetune.models.wrap import CausalLM

BOUND = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest difference of a logit allowed, relative to the largest logit, by the dtype that is stored."""


GGUF_FILE, MODELFILE = "model-{}.gguf", "Modelfile"
"""Of a GGUF export: the file with weights of a type, and what Ollama reads."""


@dataclass(frozen=True, slots=True)
class Export:
    """kind: "adapter", "merged", "model" or "gguf-TYPE"; difference and bound: of logits, absolute.

    note: what whoever uses it must know.
    """

    kind: str
    path: str
    difference: float
    bound: float
    note: str | None = None

    @property
    def passed(self) -> bool:
        return self.difference <= self.bound


def export_adapter(model: CausalLM, loaded: Loaded, folder: Path, probe: Sequence[Sequence[int]]) -> Export:
    """Write the adapter in PEFT's layout, with the tokenizer; read it back over a freshly loaded base.

    probe: documents as token ids. The adapter's config names its base by ``loaded.source``.
    """
    if not isinstance(model.model, PeftModel):
        raise UserError("this run trained no adapter; export the model instead")
    if weights_digest(loaded.folder) != loaded.digest:
        raise UserError(
            f"the base model in {loaded.folder} is gone or has changed since the run began; restore it, then go on "
            "with --resume"
        )
    config = model.model.peft_config["default"]
    local = Path(loaded.source).expanduser().exists()
    config.base_model_name_or_path = str(loaded.folder.resolve()) if local else loaded.source
    config.revision = None if local else loaded.revision
    config.inference_mode = True
    with quiet():
        model.model.save_pretrained(str(folder), selected_adapters=["default"], save_embedding_layers=False)
    if START in model.model.peft_config:
        write_joined(model.model, {"default": 1.0, START: 1.0}, folder)
    note_base(folder, loaded)
    loaded.tokenizer.save_pretrained(folder)
    _same_tokenizer(loaded, folder)
    got = read_back(lambda: _with_adapter(loaded, folder), probe)
    return compare("adapter", folder, live_logits(model, probe), got, torch.float32)


def export_merged(model: CausalLM, loaded: Loaded, folder: Path, probe: Sequence[Sequence[int]]) -> Export:
    """Write the whole model, adapters merged in fp32, in the dtype its base is stored in; read it back.

    Where that dtype would change the logits by more than its bound, the model is written in fp32.
    """
    return export_whole(model.model, model.route.published, loaded, folder, live_logits(model, probe), probe)


def export_whole(
    model: PreTrainedModel | PeftModel,
    attention: str,
    loaded: Loaded,
    folder: Path,
    truth: Tensor,
    probe: Sequence[Sequence[int]],
) -> Export:
    """As ``export_merged``; ``truth``: the live model's logits of ``probe``; ``attention``: what its config names."""
    kind = "merged" if isinstance(model, PeftModel) else "model"
    loaded.tokenizer.save_pretrained(folder)
    _same_tokenizer(loaded, folder)
    for dtype in dict.fromkeys((stored_dtype(loaded), torch.float32)):
        _write_whole(model, attention, folder, dtype)
        got = read_back(lambda: reload(loaded, folder, "auto"), probe)
        export = compare(kind, folder, truth, got, dtype)
        if export.passed:
            break
    return export


def place_of(folder: Path, kind: str) -> Path:
    """Where an export of the run ``folder`` stands."""
    return folder / kind


def writer_of(kind: str) -> Callable[..., Export]:
    """The function that writes ``kind``: "adapter", "merged", "model" or "gguf-TYPE"."""
    if kind.startswith("gguf-"):
        from truetune.models.gguf.write import export_gguf

        return partial(export_gguf, precision=kind.removeprefix("gguf-"))
    return export_adapter if kind == "adapter" else export_merged


def _write_whole(model: PreTrainedModel | PeftModel, attention: str, folder: Path, dtype: torch.dtype) -> None:
    whole = merged_copy(model, attention).to(dtype)  # type: ignore[arg-type]  # as in assembly: the signature is lost
    whole.config.dtype = dtype
    for earlier in folder.glob("*.safetensors*"):  # of another dtype
        earlier.unlink()
    with quiet():
        whole.save_pretrained(folder)


def merged_copy(model: PreTrainedModel | PeftModel, attention: str) -> PreTrainedModel:
    """The model in fp32, adapters merged, with the attention that its library gives it."""
    with original_weights(model):
        whole = copy.deepcopy(model).float()
    if isinstance(whole, PeftModel):
        _untie_adapted_head(whole)
        with quiet():
            whole = whole.merge_and_unload()
    whole.set_attn_implementation(attention)
    return whole


def _untie_adapted_head(model: PeftModel) -> None:
    """Give a tied head that LoRA adapts a weight of its own: merging must leave the embeddings as they are."""
    hf = cast(PreTrainedModel, model.get_base_model())
    head = cast(nn.Module, hf.get_output_embeddings())
    if isinstance(head, LoraLinear) and is_tied(hf):
        head.base_layer.weight = nn.Parameter(
            cast(Tensor, head.base_layer.weight).detach().clone(), requires_grad=False
        )


def reload(loaded: Loaded, folder: Path, dtype: torch.dtype | str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=loaded.trust_remote_code)


def stored_dtype(loaded: Loaded) -> torch.dtype:
    """The dtype of the base model's own files."""
    dtype = loaded.config_dtype
    return dtype if dtype in BOUND else torch.float32


@torch.no_grad()
def live_logits(model: CausalLM, probe: Sequence[Sequence[int]]) -> Tensor:
    """Logits [sum of lengths, V] of the live model, in fp32, by Hugging Face's and PEFT's own code."""
    with model.as_published() as hf, unfused(hf):
        return logits(copy.deepcopy(hf).float(), probe)


@torch.no_grad()
def logits(hf: PreTrainedModel | PeftModel, probe: Sequence[Sequence[int]]) -> Tensor:
    """Logits [sum of lengths, V] of the documents of ``probe``, one at a time."""
    device = next(hf.parameters()).device
    rows = [hf(input_ids=torch.tensor([list(ids)], device=device), use_cache=False).logits[0] for ids in probe]
    return torch.cat(rows).cpu()


def read_back(load: Callable[[], PreTrainedModel | PeftModel], probe: Sequence[Sequence[int]]) -> Tensor:
    """The same of what ``load`` finds, in fp32."""
    with quiet():
        return logits(load().float().eval(), probe)


def _with_adapter(loaded: Loaded, folder: Path) -> PeftModel:
    dtype = next(loaded.model.parameters()).dtype  # what was trained upon; fp32 then, that no trained weight is rounded
    return PeftModel.from_pretrained(reload(loaded, loaded.folder, dtype).float(), folder)


def compare(kind: str, folder: Path, truth: Tensor, got: Tensor, dtype: torch.dtype) -> Export:
    """How far ``got`` is from ``truth``, and how far it may be where weights are stored in ``dtype``."""
    difference = float((got - truth).abs().max())
    return Export(kind, str(folder), difference, BOUND[dtype] * float(truth.abs().max()))


def _same_tokenizer(loaded: Loaded, folder: Path) -> None:
    """Raise UserError unless the written tokenizer renders and encodes as the live one does."""
    again = AutoTokenizer.from_pretrained(folder, trust_remote_code=loaded.trust_remote_code)
    text = "A line, <tag> and\n\tthree  spaces; 1234 é 漢."
    same = again(text)["input_ids"] == loaded.tokenizer(text)["input_ids"]
    if not same or again.chat_template != loaded.tokenizer.chat_template:
        raise UserError("the tokenizer does not read back as it was written; please report it with its files")
