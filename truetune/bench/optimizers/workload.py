"""What the methods train: a small model from scratch on real text, or LoRA on a model that the user names.

``text``: a Llama of 1.1 M parameters and a byte-level BPE, made for it at run time, on the source of Python's standard
library, which every machine has; files are held out whole, and of each some lines from its middle count. A seed means
other initial weights and another order. Any other name is a model's folder: rank 16 on all products, on docstrings of
the standard library as questions and answers. All of it is kept in the cache, under its digest; another Python has
another text, and so another comparison.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from truetune.bench.optimizers.trial import Setting, Trial
from truetune.cache import cache_folder
from truetune.data import python_docs
from truetune.errors import UserError
from truetune.models.load import quiet, weights_digest
from truetune.recipe import Recipe
from truetune.training.checkpoint import atomic_folder

TEXT = "text"
SHAPE: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 2048, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 256, "tie_word_embeddings": True,
    "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
RANK = 16
"""Of LoRA."""
TOKENS = {True: 262_144, False: 8_192}
"""Of a run of budget 1: from scratch, and of LoRA."""
WARMUP = 0.1
HELD_OUT = 0.06
"""Share of the files."""
EXCERPT, EXCERPTS, QUESTIONS = 2_000, 24, 32
"""Characters of a held-out file that count, files at most, and held-out rows of the docstrings."""
_NO_TEXT = {"test", "tests", "idle_test", "idlelib", "lib2to3", "pydoc_data", "encodings", "tkinter", "turtledemo"}
"""Folders of the library that are left out: tests, and tables."""


@dataclass(frozen=True)
class Workload:
    """folder: of rows and, from scratch, of models. model: the folder of the user's."""

    setting: Setting
    folder: Path
    model: Path | None

    def recipe(self, trial: Trial) -> Recipe:
        """The whole of a trial."""
        model = self.model or _initial(self.folder, trial.seed)
        parts: dict[str, dict[str, Any]] = {
            "model": {"path": str(model)},
            "data": {"source": str(self.folder / "train.jsonl")},
            "evaluation": {"source": str(self.folder / "test.jsonl")},
            "train": {"tokens": round(trial.budget * self.setting.tokens), "seed": trial.seed},
        }
        shared = {key: part | parts.get(key, {}) for key, part in _shared(self.setting.full).items()}
        schedule = {"name": "linear" if trial.falls else "constant", "warmup": WARMUP}
        return Recipe.model_validate(shared | {"optimizer": trial.options, "schedule": schedule})


def _shared(full: bool) -> dict[str, dict[str, Any]]:
    """Of the recipe what all methods have."""
    step = 2048 if full else 256
    return {
        "model": {"precision": "fp32" if full else "bf16"},
        "data": {"max_length": 256, "too_long": "split"},
        # All that are held out; of LoRA at both ends alone, since a look takes as long as five steps.
        "evaluation": {"rows": 1 << 20, "samples": 0} | ({} if full else {"every": 1 << 20}),
        "adapter": {"method": "full"} if full else {"rank": RANK, "alpha": 2.0 * RANK},
        "train": {"tokens_per_step": step, "tokens_per_micro_batch": step, "clip": 1.0},
    }


def prepare(name: str, tokens: int | None) -> Workload:
    """name: ``TEXT`` or a model's folder. tokens: of a run of budget 1, by default ``TOKENS``.

    Raises UserError for a folder that there is not.
    """
    full = name == TEXT
    if not full and not Path(name).is_dir():
        raise UserError(f"there is no workload {name}; choose {TEXT}, or name a model's folder")
    train, test = _split(_texts()) if full else _docstrings()
    found = hashlib.sha256(json.dumps([_shared(full), WARMUP, SHAPE if full else None]).encode())
    for row in (*train, *test):
        found.update(json.dumps(row).encode() + b"\n")
    if not full:
        found.update(weights_digest(Path(name)).encode())
    data = found.hexdigest()[:16]
    folder = cache_folder() / "bench-optimizers" / data
    if not folder.is_dir():
        with atomic_folder(folder) as scratch:
            for file, rows in (("train", train), ("test", test)):
                (scratch / f"{file}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
            if full:
                _train_tokenizer(row["text"] for row in train).save_pretrained(scratch / "tokenizer")
    rank = (SHAPE["hidden_size"] if full else RANK) // 4
    setting = Setting(name if full else Path(name).resolve().name, data, tokens or TOKENS[full], full, rank)
    return Workload(setting, folder, None if full else Path(name).resolve())


def _texts() -> list[tuple[str, str]]:
    """(path, text) of the library's source, in the order of the paths."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = (file.relative_to(root) for file in root.rglob("*.py"))
    kept = sorted(p for p in paths if _module(p) in sys.stdlib_module_names and not _NO_TEXT & set(p.parts))
    found = ((p.as_posix(), (root / p).read_text(encoding="utf-8", errors="replace")) for p in kept)
    return [(path, text) for path, text in found if text.strip()]


def _module(path: Path) -> str:
    return path.parts[0].removesuffix(".py")


def _split(texts: list[tuple[str, str]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows to train on, and excerpts of the files whose paths have the smallest digests."""
    ranked = sorted(texts, key=lambda pair: hashlib.sha256(pair[0].encode()).digest())
    count = min(EXCERPTS, max(1, round(HELD_OUT * len(ranked))))
    middles = ((text, max(0, len(text) - EXCERPT) // 2) for _, text in ranked[:count])
    test = [{"text": text[start : start + EXCERPT]} for text, start in middles]
    return [{"text": text} for _, text in ranked[count:]], test


def _docstrings() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    train, test = (python_docs.rows(split) for split in python_docs.SPLITS)
    return train, random.Random(0).sample(test, min(QUESTIONS, len(test)))


def _train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    size = SHAPE["vocab_size"]
    inner.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=size, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False),
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", pad_token="<end>")


def _initial(folder: Path, seed: int) -> Path:
    """The model before its first step, random by the seed."""
    place = folder.with_name(f"{folder.name}-{seed}")
    if not place.is_dir():
        with atomic_folder(place) as scratch, torch.random.fork_rng(devices=[]), quiet():
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SHAPE), dtype=torch.float32)
            model.save_pretrained(scratch)
            PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer").save_pretrained(scratch)
    return place
