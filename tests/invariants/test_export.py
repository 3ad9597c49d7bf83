"""What leaves is what was trained: read back by plain PEFT and transformers, and refused where it is not."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import torch
import transformers
from folders import facts, invoke, keep_jobs, keys, tokenizer, write_model
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from truetune.assembly import Job
from truetune.data.batch import Batch
from truetune.data.chat import DEFAULT_TEMPLATE
from truetune.models.export import live_logits
from truetune.models.load import quiet

pytestmark = pytest.mark.filterwarnings("ignore:Found missing adapter keys")

TEXT = "A line, <tag> and\n\tthree   spaces; 1234 é 漢 <|im_end|>"
SHORT = ("train.steps=2", "evaluation.samples=0", "optimizer.rate=3e-2", "schedule.name=constant")


class Trained(NamedTuple):
    job: Job
    base: Path
    folder: Path


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory, my_data: Path) -> Callable[..., Trained]:
    """``train(family, method, dtype)``: a short run, made once."""
    made: dict[tuple[Any, ...], Trained] = {}

    def run(family: str, method: str = "lora", dtype: torch.dtype = torch.float32) -> Trained:
        kind = (family, method, dtype)
        if kind not in made:
            place = tmp_path_factory.mktemp(family)
            base = write_model(place / "base", family, dtype=dtype)
            with pytest.MonkeyPatch.context() as patch:
                jobs = keep_jobs(patch)
                arguments = keys(base, my_data, place / "run", f"adapter.method={method}", *SHORT)
                assert invoke("train", *arguments).exit_code == 0
            made[kind] = Trained(jobs[0], base, place / "run")
        return made[kind]

    return run


@torch.no_grad()
def live(trained: Trained) -> torch.Tensor:
    """Logits by our own computation, of documents that share a pack."""
    model = trained.job.trainer.model.eval()
    batch = Batch.of(trained.job.evaluation.documents[:3])
    assert model.head.scale == 1 and model.head.softcap is None
    return torch.nn.functional.linear(model(batch).float(), model.head.weight.float())


@torch.no_grad()
def plain(model: Any, trained: Trained) -> torch.Tensor:
    """Logits of the same documents, one at a time, by whatever was loaded."""
    documents = trained.job.evaluation.documents[:3]
    rows = [model.eval()(input_ids=torch.from_numpy(d.tokens).long()[None]).logits[0] for d in documents]
    return torch.cat(rows).float()


def load(folder: Path, **options: Any) -> Any:
    with quiet():
        return AutoModelForCausalLM.from_pretrained(folder, **({"dtype": torch.float32} | options))


def off(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


FAMILIES = pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])


@FAMILIES
def test_adapter_and_merged_model_are_the_live_model(family: str, train: Callable[..., Trained]) -> None:
    trained = train(family)
    truth, base = live(trained), load(trained.base)
    untrained = plain(base, trained)
    with quiet():
        unmerged = PeftModel.from_pretrained(base, trained.folder / "adapter")
    assert off(plain(unmerged, trained), truth) < 1e-5
    assert off(plain(load(trained.folder / "merged"), trained), truth) < 1e-5
    assert off(untrained, truth) > 0.1  # what was learned is far more than the tolerance
    config = json.loads((trained.folder / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(trained.base) and config["inference_mode"]
    assert config["fan_in_fan_out"] == (family == "gpt2")
    exports = {e["kind"]: e for e in facts(trained.folder)["exports"]}
    assert exports["adapter"]["difference"] < 1e-5 and exports["merged"]["difference"] < 1e-5


@FAMILIES
def test_a_model_trained_whole_is_read_back(family: str, train: Callable[..., Trained]) -> None:
    trained = train(family, "full")
    assert not (trained.folder / "adapter").exists() and not (trained.folder / "merged").exists()
    assert off(plain(load(trained.folder / "model"), trained), live(trained)) < 1e-5
    assert off(plain(load(trained.base), trained), live(trained)) > 0.1


@pytest.mark.parametrize("method", ["lora", "full"])
@FAMILIES
def test_tied_weights_are_stored_once_and_tied_again(family: str, method: str, train: Callable[..., Trained]) -> None:
    trained, tied = train(family, method), family != "llama"
    folder = trained.folder / ("merged" if method == "lora" else "model")
    stored = load_file(folder / "model.safetensors")
    assert stored.keys() == load_file(trained.base / "model.safetensors").keys()
    assert ("lm_head.weight" in stored) == (not tied)
    model = load(folder)
    assert model.config.tie_word_embeddings == tied
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    assert model.config._attn_implementation != "truetune"


@pytest.mark.parametrize("place", ["adapter", "merged"])
def test_tokenizer_and_template_come_along(place: str, train: Callable[..., Trained]) -> None:
    trained = train("llama")
    theirs, ours = AutoTokenizer.from_pretrained(trained.folder / place), tokenizer()
    assert theirs(TEXT)["input_ids"] == ours(TEXT)["input_ids"] and theirs.decode(ours(TEXT)["input_ids"]) == TEXT
    chat = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "It."}]
    for options in ({}, {"add_generation_prompt": True}):
        rendered = [t.apply_chat_template(chat, tokenize=False, **options) for t in (theirs, ours)]
        assert rendered[0] == rendered[1]
    assert (theirs.eos_token, theirs.bos_token) == (ours.eos_token, ours.bos_token)


def test_the_template_that_was_used_leaves_where_the_tokenizer_had_none(my_data: Path, tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", template=None)
    assert invoke("train", *keys(base, my_data, tmp_path / "run", *SHORT)).exit_code == 0
    for place in ("adapter", "merged"):
        assert DEFAULT_TEMPLATE in AutoTokenizer.from_pretrained(tmp_path / "run" / place).chat_template


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_base_stored_in_bfloat16_is_merged_into_bfloat16(family: str, train: Callable[..., Trained]) -> None:
    trained = train(family, "lora", torch.bfloat16)
    stored = load_file(trained.folder / "merged" / "model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.bfloat16}
    adapter = load_file(trained.folder / "adapter" / "adapter_model.safetensors")
    assert {t.dtype for t in adapter.values()} == {torch.float32}
    merged = {e["kind"]: e for e in facts(trained.folder)["exports"]}["merged"]
    difference = off(plain(load(trained.folder / "merged"), trained), live(trained))
    assert 0 < difference <= merged["bound"] and 0 < merged["difference"] <= merged["bound"]
    # The bound tells rounding from a fault: an adapter that was not merged is beyond it.
    assert off(plain(load(trained.base), trained), live(trained)) > merged["bound"]


# An export that is wrong is not kept.


def rewrite(folder: Path, name: str, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name, {"format": "pt"})


def after(patch: pytest.MonkeyPatch, owner: type, change: Callable[[Path], None]) -> None:
    """Make ``change`` to whatever ``owner.save_pretrained`` has written."""
    real = owner.save_pretrained

    def saving(self: Any, folder: str, *arguments: Any, **options: Any) -> Any:
        result = real(self, folder, *arguments, **options)
        change(Path(folder))
        return result

    patch.setattr(owner, "save_pretrained", saving)


def layers_swapped(patch: pytest.MonkeyPatch) -> None:
    def swap(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if ".layers.0." in n]:
            other = name.replace(".layers.0.", ".layers.1.")
            tensors[name], tensors[other] = tensors[other], tensors[name]

    after(patch, PeftModel, lambda f: rewrite(f, "adapter_model.safetensors", swap))


def adapter_of_nan(patch: pytest.MonkeyPatch) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        next(iter(tensors.values()))[0, 0] = float("nan")

    after(patch, PeftModel, lambda f: rewrite(f, "adapter_model.safetensors", spoil))


def adapter_renamed(patch: pytest.MonkeyPatch) -> None:
    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.replace("lora_B", "lora_b")] = tensors.pop(name)

    after(patch, PeftModel, lambda f: rewrite(f, "adapter_model.safetensors", rename))


def not_scaled(patch: pytest.MonkeyPatch) -> None:
    def change(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_alpha": 4}))

    after(patch, PeftModel, change)


def not_merged(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(peft.tuners.lora.LoraModel, "merge_and_unload", peft.tuners.lora.LoraModel.unload)


def head_untied(patch: pytest.MonkeyPatch) -> None:
    def add_head(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].roll(1, 0)

    def change(folder: Path) -> None:
        rewrite(folder, "model.safetensors", add_head)
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": False}))

    after(patch, transformers.PreTrainedModel, change)


def template_lost(patch: pytest.MonkeyPatch) -> None:
    after(patch, transformers.PreTrainedTokenizerBase, lambda f: (f / "chat_template.jinja").unlink())


FAR = r"reads back with logits that differ by \S+, above the bound \S+, and was not kept; please report it"


@pytest.mark.parametrize(
    ("spoil", "kind", "says"),
    [
        (layers_swapped, "adapter", f"the adapter {FAR}"),
        (adapter_of_nan, "adapter", f"the adapter {FAR}"),
        (adapter_renamed, "adapter", f"the adapter {FAR}"),
        (not_scaled, "adapter", f"the adapter {FAR}"),
        (not_merged, "merged", f"the merged {FAR}"),
        (head_untied, "merged", f"the merged {FAR}"),
        (template_lost, "adapter", "the tokenizer does not read back as it was written; please report it"),
    ],
)
def test_a_broken_export_is_refused_and_leaves_no_folder(
    spoil: Callable[[pytest.MonkeyPatch], None],
    kind: str,
    says: str,
    train: Callable[..., Trained],
    my_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, folder = train("qwen2").base, tmp_path / "run"
    spoil(monkeypatch)
    result = invoke("train", *keys(base, my_data, folder, *SHORT))
    assert result.exit_code == 2 and re.fullmatch(rf"error: {says}[^\n]*\n", result.stderr), result.stderr
    assert not (folder / kind).exists() and not [p for p in folder.iterdir() if p.name.startswith(".")]
    assert facts(folder)["status"] == "failed" and f"{kind}  /" not in result.stdout
    assert "Failed at step 2" in (folder / "report.html").read_text()
    # Afterwards the same run is exported from its checkpoint, once what was wrong has been put right.
    monkeypatch.undo()
    assert invoke("export", str(folder), f"--{kind}").exit_code == 0
    assert (folder / kind).is_dir()


# Every way to adapt.

ADAPTED = [
    ("llama", torch.float32, ("adapter.dora=true", "adapter.rslora=true", "adapter.also=[norms, head]")),
    ("qwen2", torch.bfloat16, ("adapter.init=pissa", "adapter.rslora=true", "adapter.lora_plus_ratio=4")),
    ("qwen2", torch.float32, ("adapter.targets=.*", "adapter.also=norms")),
    ("qwen2", torch.bfloat16, ("adapter.also=embeddings", "model.precision=bf16")),
    ("llama", torch.bfloat16, ("adapter.init=pissa", "adapter.targets=.*", "model.precision=bf16")),
]


@pytest.mark.parametrize(("family", "dtype", "more"), ADAPTED, ids=str)
def test_it_loads_over_the_original_base_in_plain_peft(
    family: str, dtype: torch.dtype, more: tuple[str, ...], my_data: Path, tmp_path: Path
) -> None:
    base, folder = write_model(tmp_path / "base", family, dtype=dtype), tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        jobs = keep_jobs(patch)
        result = invoke("train", *keys(base, my_data, folder, *SHORT, *more))
        assert result.exit_code == 0, result.output
    model, documents = jobs[0].trainer.model, jobs[0].evaluation.documents[:3]
    probe = [d.tokens.tolist() for d in documents]
    truth, trained = live_logits(model, probe), Trained(jobs[0], base, folder)
    with quiet():
        adapted = PeftModel.from_pretrained(load(base), folder / "adapter")
    assert off(plain(adapted, trained), truth) < 1e-5 * float(truth.abs().max())
    merged = {e["kind"]: e for e in facts(folder)["exports"]}["merged"]
    whole = load(folder / "merged")
    assert off(plain(whole, trained), truth) <= merged["bound"]
    assert off(plain(load(base), trained), truth) > 0.1
    tied = family == "qwen2" and "adapter.targets=.*" not in more
    head, embeddings = whole.get_output_embeddings().weight, whole.get_input_embeddings().weight
    assert (head is embeddings) == tied == whole.config.tie_word_embeddings
    if "adapter.also=embeddings" not in more:  # LoRA on a tied head leaves the embeddings as they were
        assert torch.equal(embeddings, load(base).get_input_embeddings().weight)
