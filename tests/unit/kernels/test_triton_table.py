"""The table of Triton kernels: who is chosen on CUDA, what is imported when, what a launch without values does."""

from __future__ import annotations

import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch
from interpreted import exact

from truetune.errors import UserError
from truetune.kernels import triton as table
from truetune.kernels.gated import gated
from truetune.kernels.triton import KERNELS, cases, choices, equal, switched_on
from truetune.kernels.triton.configurations import CONFIGURATIONS, choose
from truetune.kernels.triton.launch import recording


@pytest.fixture(autouse=True)
def _restored(monkeypatch: pytest.MonkeyPatch) -> None:
    for op in KERNELS.values():
        monkeypatch.setattr(op, "equals", dict(op.equals))


def test_nothing_is_chosen_on_cuda_until_it_was_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRUETUNE_CACHE", str(tmp_path))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    assert "cuda" not in gated.equals
    assert choices.chosen_for(torch.device("cuda")) == choices.chosen_for(torch.device("cpu")) == ()


def test_what_was_timed_to_win_is_chosen_for_its_gpu_and_its_versions(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TRUETUNE_CACHE", str(tmp_path))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    file = choices.keep("NVIDIA H100 80GB HBM3", ["lora_linear"], {"results": []})
    cuda = torch.device("cuda")
    assert file == tmp_path / "kernels" / "nvidia-h100-80gb-hbm3.json" and choices.chosen_for(cuda) == ("lora_linear",)
    before = file.read_text(encoding="utf-8")
    older = before.replace(torch.__version__, "2.12.0").replace("lora_linear", "a_kernel_of_then")
    file.write_text(older, encoding="utf-8")
    assert choices.chosen_for(cuda) == ()
    for wrong in ("{", before.replace("lora_linear", "os.system"), "[]"):
        file.write_text(wrong, encoding="utf-8")
        with pytest.raises(UserError, match="make it again: truetune bench kernels --choose"):
            choices.chosen_for(cuda)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: "NVIDIA A100")
    assert choices.chosen_for(cuda) == ()


def test_a_kernel_that_is_chosen_takes_torch_s_place() -> None:
    table.install(["gated"])
    x = torch.randn(8)
    with exact():
        torch.testing.assert_close(gated.equals["cuda"](x, x), gated.reference(x, x))


def test_without_triton_torch_s_own_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> ModuleSpec | None:
        return None

    monkeypatch.setattr(table, "find_spec", missing)
    table.install(["gated"])
    assert "cuda" not in gated.equals


def test_importing_the_package_imports_no_triton() -> None:
    code = "import sys, truetune.kernels; sys.exit('triton' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_switch_is_undone() -> None:
    before = {name: dict(op.equals) for name, op in KERNELS.items()}
    with switched_on("cpu", "gated"):
        assert gated.equals["cpu"] is not before["gated"]["cpu"]
        assert KERNELS["rope"].equals == before["rope"]
    assert {name: op.equals for name, op in KERNELS.items()} == before


def test_values_that_are_not_there_are_refused_or_noted() -> None:
    case = cases.gated(torch.bfloat16, "meta")
    with pytest.raises(ValueError, match="holds no values"):
        equal("gated")(**case.arguments)
    with recording("sm_80") as launches:
        y = equal("gated")(**case.arguments)
    assert [x.kernel.__name__ for x in launches] == ["gated_forward"] and y.is_meta


def test_the_first_row_that_fits_is_taken() -> None:
    assert choose("attention_keys", torch.bfloat16, "gfx942", 64) is CONFIGURATIONS["attention_keys"][0]
    assert choose("attention_keys", torch.bfloat16, "sm_90", 128) is CONFIGURATIONS["attention_keys"][1]
    assert choose("attention_keys", torch.float32, "sm_90", 256) is None
    assert choose("attention_keys", torch.bfloat16, "sm_90", 512) is None
