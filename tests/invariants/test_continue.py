"""An adapter that is trained further, and adapters that are added: they begin where the earlier ones ended."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from folders import facts, invoke, keys, records, write_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from truetune.models.load import quiet
from truetune.report import card

SHORT = ("train.steps=2", "evaluation.samples=0", "evaluation.every=1", "schedule.name=constant", "output.merged=false")
WEIGHTS = "adapter_model.safetensors"


def run(model: Path, data: Path, folder: Path, *more: str) -> Path:
    result = invoke("train", *keys(model, data, folder, *SHORT, *more))
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture(scope="module")
def first(my_model: Path, my_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose adapter has settings of its own."""
    return run(my_model, my_data, tmp_path_factory.mktemp("first") / "run", *OWN)


OWN = ("adapter.rank=4", "adapter.rslora=true", "adapter.also=norms", "adapter.targets=[q_proj, v_proj]")


def evaluations(run: Path) -> list[float]:
    return [r["loss"] for r in records(run) if r["kind"] == "evaluation"]


def test_it_goes_on_where_the_adapter_ended(first: Path, my_model: Path, my_data: Path, tmp_path: Path) -> None:
    second = run(my_model, my_data, tmp_path / "second", f"adapter.path={first}")
    assert evaluations(second)[0] == pytest.approx(min(evaluations(first)[1:]), rel=1e-5)  # ended with its best
    assert min(evaluations(second)) < min(evaluations(first))
    was, now = (json.loads((r / "adapter" / "adapter_config.json").read_text()) for r in (first, second))
    for name in ("r", "lora_alpha", "use_rslora", "modules_to_save", "target_modules"):
        assert was[name] == now[name] or set(was[name]) == set(now[name])
    origin = facts(second)["model"]["adapter_from"]
    assert origin["path"] == str(first / "adapter") and len(origin["sha256"]) == 64
    text = card(second, tmp_path / "second" / "adapter").read_text()
    for label, value in (
        ("Rank, alpha, dropout", r"4, 32\D*, 0"),
        ("Trained in full beside", ".*norm"),
        ("Scaled by", ".*sqrt"),
    ):
        assert re.search(rf"{label} \| {value}", text.replace("\\", "")), (label, text)
    assert "Continues the adapter" in text
    # Its own resume finds the adapter again, from any folder.
    assert f"path: {first}" in (second / "recipe.yaml").read_text()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("adapter.rank=8",), r"adapter.rank is 8, but the adapter in .* has 4, and keeps its shapes; remove adapter"),
        (("adapter.rslora=false",), "adapter.rslora is False, but the adapter in .* has True"),
        (("adapter.targets=all-linear",), "adapter.targets is all-linear, but the adapter in .* has 4 modules"),
        (("adapter.also=head",), "adapter.also is head, but the adapter in"),
    ],
)
def test_keys_that_contradict_the_adapter_are_refused(
    more: tuple[str, ...], says: str, first: Path, my_model: Path, my_data: Path, tmp_path: Path
) -> None:
    result = invoke("train", *keys(my_model, my_data, tmp_path / "run", *SHORT, f"adapter.path={first}", *more))
    assert result.exit_code == 2 and re.fullmatch(rf"error: [^\n]*{says}[^\n]*\n", result.stderr), result.stderr


def damaged(folder: Path, kind: str) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    if kind == "lost":
        tensors = load_file(folder / WEIGHTS)
        tensors.pop(min(tensors))
        save_file(tensors, folder / WEIGHTS)
        return
    config |= {"pissa": {"init_lora_weights": "pissa"}, "bias": {"bias": "all"}, "rank": {"r": 5}}[kind]
    (folder / "adapter_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("lost", f"{WEIGHTS} lacks .*; export the adapter again"),
        ("pissa", "stands on a base that 'pissa' changed when its training began; convert it"),
        ("bias", "sets bias, which can't be trained further here; start a new adapter"),
        ("rank", "in another shape than its config; export the adapter again"),
    ],
)
def test_an_adapter_that_is_not_what_it_says_is_refused(
    kind: str, says: str, first: Path, my_model: Path, my_data: Path, tmp_path: Path
) -> None:
    shutil.copytree(first / "adapter", tmp_path / "adapter")
    damaged(tmp_path / "adapter", kind)
    arguments = [k for k in keys(my_model, my_data, tmp_path / "run", *SHORT) if not k.startswith("adapter.rank")]
    result = invoke("train", *arguments, f"adapter.path={tmp_path / 'adapter'}")
    assert result.exit_code == 2 and re.fullmatch(rf"error: [^\n]*{says}[^\n]*\n", result.stderr), result.stderr


def test_another_base_is_refused(first: Path, my_data: Path, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other", seed=3)
    result = invoke("train", *keys(other, my_data, tmp_path / "run", *SHORT, f"adapter.path={first}"))
    assert result.exit_code == 2 and "was trained on other weights" in result.stderr


# Adapters that are added.


def random_adapter(base: Path, folder: Path, seed: int, **options: object) -> Path:
    """A random adapter in plain PEFT's own hand."""
    torch.manual_seed(seed)
    with quiet():
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **options))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.normal_(0, 0.05)
    model.save_pretrained(str(folder))
    return folder


@pytest.fixture
def pair(my_model: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Adapters that differ in rank, alpha, scaling and targets."""
    one = random_adapter(my_model, tmp_path / "one", 1, r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    other = {"r": 3, "lora_alpha": 5, "use_rslora": True, "target_modules": ["v_proj", "down_proj", "lm_head"]}
    return one, random_adapter(my_model, tmp_path / "two", 2, **other)


def whole(base: Path, folder: Path) -> dict[str, torch.Tensor]:
    """The weights of the base with an adapter merged, by plain PEFT."""
    with quiet():
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).merge_and_unload()
    return {n: p.detach() for n, p in model.named_parameters()}


@pytest.mark.parametrize("merged", [False, True], ids=["adapter", "merged"])
def test_a_sum_of_adapters_is_the_sum_of_what_they_add(
    merged: bool, pair: tuple[Path, Path], my_model: Path, tmp_path: Path
) -> None:
    target = tmp_path / "sum"
    parts = [f"{pair[0]}=0.5", f"{pair[1]}=-1.5"]
    result = invoke("merge", *parts, "--to", str(target), *(["--merged"] if merged else []))
    assert result.exit_code == 0, result.output
    assert re.search(r"logits read back within \S+, bound", result.stdout)
    base = {n: p.detach() for n, p in AutoModelForCausalLM.from_pretrained(my_model).named_parameters()}
    one, two = (whole(my_model, folder) for folder in pair)
    if merged:
        got = {n: p.detach() for n, p in AutoModelForCausalLM.from_pretrained(target).named_parameters()}
    else:
        got = whole(my_model, target)
        own = json.loads((target / "truetune.json").read_text())
        assert [part["weight"] for part in own["merged"]] == [0.5, -1.5] and len(own["base_sha256"]) == 64
    for name, weight in base.items():
        expected = weight + 0.5 * (one[name] - weight) - 1.5 * (two[name] - weight)
        torch.testing.assert_close(got[name], expected, rtol=1e-5, atol=1e-6)
    assert (got["lm_head.weight"] - base["lm_head.weight"]).abs().max() > 1e-3


def test_what_can_not_be_added_is_refused(pair: tuple[Path, Path], first: Path, my_model: Path, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other", seed=3)
    elsewhere = random_adapter(other, tmp_path / "elsewhere", 4, r=2, target_modules=["q_proj"])
    dora = random_adapter(my_model, tmp_path / "dora", 5, r=2, target_modules=["q_proj"], use_dora=True)
    for parts, says in (
        ([f"{pair[0]}=1", f"{elsewhere}=1"], "stand on different bases .*; merge those of one base"),
        ([f"{pair[0]}=1", f"{dora}=1"], "is a DoRA adapter, which is no sum .*truetune export"),
        ([f"{pair[0]}=1", f"{first}=1"], r"holds modules trained in full \(.*norm\), of which a model has one"),
        ([f"{pair[0]}=1", f"{pair[0]}=2"], "is named twice; add up its weights"),
        ([f"{pair[0]}"], "is not ADAPTER_OR_RUN=WEIGHT; write for example"),
        ([f"{pair[0]}=nan"], "is not ADAPTER_OR_RUN=WEIGHT; write for example"),
        (["gone=1"], "neither an adapter nor a run that exported one; check the path"),
    ):
        result = invoke("merge", *parts, "--to", str(tmp_path / "sum"))
        assert result.exit_code == 2 and re.fullmatch(rf"error: [^\n]*{says}[^\n]*\n", result.stderr), result.stderr
        assert not (tmp_path / "sum").exists()
