"""What all sides train: one model, one adapter, the same documents in the same steps, as files that any Python reads.

A workload is a shape of ``shapes`` (a config of transformers) with random weights and documents, or a model's folder
with documents of the built-in data. Lengths of random documents are the quantiles of a lognormal (median 141, mean 178,
within 16 and 1,024), every step with one of each of its parts, so that all steps weigh nearly the same; tokens follow
Zipf's law, and about half of them are targets.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerFast

from truetune.assembly import pick_dtype
from truetune.data.batch import Document
from truetune.errors import UserError
from truetune.models.load import outline, quiet, skeleton
from truetune.rows import build_renderer, choose_rows, tokenized
from truetune.spelling import read

SHAPES = {file.stem: file for file in sorted((Path(__file__).parent / "shapes").glob("*.json"))}
DOCUMENTS = {"small": 16, "medium": 4}
"""Documents of a step; of any other model 16."""
RANK, ALPHA, RATE, CLIP, LONGEST, SEED = 16, 32, 1e-4, 1.0, 1024, 0
KEYS = ("model.precision", "optimizer.rate", "train.clip", "train.tokens_per_micro_batch")
"""Of the recipe, that may be chosen: all but the last hold for all sides, and that says how ours is computed."""
MEDIAN, SPREAD, SHORTEST = 141.0, 0.7, 16
"""Of the lognormal: exp of its mean, its standard deviation, and its least length."""


@dataclass(frozen=True)
class Workload:
    """steps: the documents of each optimizer step, the first of which warms up. job: ``job.json`` of the sides."""

    name: str
    mode: str
    config: PreTrainedConfig
    steps: list[list[Document]]
    job: dict[str, Any]

    @property
    def digest(self) -> str:
        """The first half of the SHA-256 of all documents."""
        found = hashlib.sha256()
        for document in (document for step in self.steps for document in step):
            found.update(document.tokens.tobytes() + document.targets.tobytes())
        return found.hexdigest()[:32]


def prepare(
    name: str, mode: str, rounds: int, folder: Path, documents: int | None = None, chosen_keys: Sequence[str] = ()
) -> Workload:
    """Write model, adapter, documents and ``job.json`` into ``folder``, for a warm-up step and ``rounds`` more.

    name: of ``SHAPES``, or a model's folder. mode: "lora" or "full". chosen_keys: of ``KEYS``, with values.
    Raises UserError for a model that there is not, for too few documents, and for any other key.
    """
    if other := [key for key in chosen_keys if key.partition("=")[0] not in KEYS]:
        raise UserError(f"--set takes {', '.join(KEYS)}, not {other[0]}, with which sides would differ; leave it out")
    model = folder / "model" if name in SHAPES else Path(name).resolve()
    lora, per_step = mode == "lora", documents or DOCUMENTS.get(name, 16)
    count = (rounds + 1) * per_step
    adapter = folder / "adapter" if lora else None
    keys = [
        f"model.path={model}",
        "data.source=python-docs",
        f"adapter.path={adapter}" if lora else "adapter.method=full",
        f"optimizer.rate={RATE}",
        f"train.clip={CLIP}",
        "device=cpu",
        *chosen_keys,
    ]
    recipe = read(None, keys)
    dtype = pick_dtype(recipe.model.precision, torch.device("cpu"))
    if name in SHAPES:
        config = AutoConfig.for_model(**json.loads(SHAPES[name].read_text(encoding="utf-8")))
        chosen = _random_documents(rounds + 1, per_step, config.vocab_size)
    elif Path(name).is_dir():
        config, chosen = outline(str(model)).config, _real_documents(model, count)
    else:
        raise UserError(f"there is no workload {name}; choose {', '.join(SHAPES)}, or name a model's folder")
    job = {
        "model": str(model),
        "adapter": str(adapter) if lora else None,
        "compute": "fp32" if dtype == torch.float32 else "bf16",
        "rate": recipe.optimizer.rate,
        "clip": recipe.train.clip,
        "longest": LONGEST,
        "documents": per_step,
        "threads": torch.get_num_threads(),
        "recipe": keys,
    }
    if name in SHAPES:
        _write_model(config, model, dtype if lora else torch.float32)
    if adapter:
        _write_adapter(config, str(model), adapter)
    _write_documents(chosen, folder / "documents.npz")
    (folder / "job.json").write_text(json.dumps(job, indent=1), encoding="utf-8")
    steps = [chosen[i : i + per_step] for i in range(0, count, per_step)]
    return Workload(Path(name).name, mode, config, steps, job)


def _random_documents(steps: int, per_step: int, vocabulary: int) -> list[Document]:
    generator = np.random.default_rng(SEED)
    parts = np.arange(steps * per_step).reshape(per_step, steps)  # a row for each part of the distribution
    places = generator.permuted(generator.permuted(parts, axis=1), axis=0).T.flatten()
    chosen: list[Document] = []
    for place in places:
        normal = NormalDist().inv_cdf((place + 0.5) / len(places))
        length = int(np.clip(MEDIAN * np.exp(SPREAD * normal), SHORTEST, LONGEST))
        prompt = max(1, int(length * np.clip(generator.normal(0.5, 0.18), 0.1, 0.9)))
        tokens = generator.zipf(1.2, length) % (vocabulary - 8) + 8
        chosen.append(Document(tokens.astype(np.int32), np.arange(length) >= prompt, len(chosen)))
    return chosen


def _real_documents(model: Path, count: int) -> list[Document]:
    """Documents of the built-in data under the model's own template, drawn by the seed."""
    recipe = read(None, [f"model.path={model}", "data.source=python-docs", f"data.max_length={LONGEST}"])
    known = outline(str(model))
    renderer = build_renderer(recipe, known.tokenizer, known.stop_ids)
    found = tokenized(recipe, choose_rows(recipe)[0], renderer).documents
    if len(found) < count:
        raise UserError(f"the built-in data has {len(found)} documents, not {count}; ask for fewer rounds or documents")
    return [found[int(i)] for i in np.random.default_rng(SEED).permutation(len(found))[:count]]


def _write_model(config: PreTrainedConfig, folder: Path, dtype: torch.dtype) -> None:
    """Random weights, drawn in fp32 and rounded to ``dtype``, with a tokenizer that nobody needs."""
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(SEED)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(dtype).save_pretrained(folder)
    words = Tokenizer(WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}, unk_token="<unk>"))
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def _write_adapter(config: PreTrainedConfig, model: str, folder: Path) -> None:
    """LoRA on every product but the head, fp32: A as PEFT draws it, uniform within 1 / sqrt(its inputs), B zero."""
    base: Any = skeleton(config)
    base.name_or_path = model  # which the adapter's config will name
    with quiet():
        lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
        adapted = get_peft_model(base, lora)
    generator = torch.Generator().manual_seed(SEED)
    tensors = {}
    for name, empty in get_peft_model_state_dict(adapted, save_embedding_layers=False).items():
        drawn = torch.zeros(empty.shape)
        if ".lora_A." in name:
            drawn.uniform_(-(empty.shape[1] ** -0.5), empty.shape[1] ** -0.5, generator=generator)
        tensors[name] = drawn
    adapted.peft_config["default"].save_pretrained(str(folder))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _write_documents(documents: Sequence[Document], file: Path) -> None:
    np.savez(
        file,
        tokens=np.concatenate([d.tokens for d in documents]).astype(np.int64),
        targets=np.concatenate([d.targets for d in documents]),
        lengths=np.array([len(d) for d in documents], np.int64),
    )
