"""MeZO: its slope is the directional derivative, it keeps nothing, resumes, minimises, and whole runs are checked."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from folders import invoke, keys, records, same_file, write_model
from tiny import random_documents, tiny, tiny_trainer, wrap
from torch import Tensor

from truetune.assembly import assemble
from truetune.errors import UserError
from truetune.optim import OPTIMIZERS, parameter_groups, set_rate
from truetune.spelling import read
from truetune.training.record import Checks, Step
from truetune.training.trainer import Trainer

SHAPES = [(3,), (7, 5), (2, 3, 4), (1, 6)]


def weights(dtype: torch.dtype = torch.float64) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for s in SHAPES]


def build(parameters: list[torch.nn.Parameter], rate: float = 0.01, **options: float) -> torch.optim.Optimizer:
    torch.manual_seed(3)
    groups = [{"params": half, "lr": rate, "peak": rate} for half in (parameters[:2], parameters[2:])]
    return OPTIMIZERS["mezo"](groups, rate, **options)


def quadratic(parameters: list[torch.nn.Parameter]) -> Callable[[], Tensor]:
    """A sum of squares with weights, and a linear part."""
    return lambda: sum(((i + 1) * p.square() / 2 + p).sum() for i, p in enumerate(parameters))  # type: ignore[return-value]


def step(optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor]) -> None:
    optimizer.probe(loss)  # type: ignore[attr-defined]
    optimizer.step()


def test_the_slope_is_the_directional_derivative_and_the_step_is_along_it() -> None:
    """Central differences of a quadratic are exact; the direction is read from the step itself."""
    ps = weights()
    optimizer = build(ps, 0.01, weight_decay=0.1)
    optimizer.param_groups[1]["weight_decay"] = 0.0
    before = [p.detach().clone() for p in ps]
    last = torch.zeros((), dtype=torch.float64)
    for _ in range(3):
        gradient = [(k + 1) * p.detach() + 1 for k, p in enumerate(ps)]
        optimizer.probe(quadratic(ps))  # type: ignore[attr-defined]
        slope, (l2, l1) = float(optimizer.slope), map(float, optimizer.lengths)  # type: ignore[attr-defined]
        for p, x in zip(ps, before, strict=True):
            torch.testing.assert_close(p.detach(), x, rtol=1e-14, atol=1e-14)
        optimizer.step()
        kept = [0.999, 0.999, 1.0, 1.0]
        z = [(x * k - p.detach()) / (0.01 * slope) for x, k, p in zip(before, kept, ps, strict=True)]
        assert sum(float((g * d).sum()) for g, d in zip(gradient, z, strict=True)) == pytest.approx(slope, rel=1e-6)
        flat = torch.cat([d.flatten() for d in z])
        assert 0.5 < float(flat.std()) < 1.6
        assert (l2, l1) == pytest.approx((abs(slope) * float(flat.norm()), abs(slope) * float(flat.norm(1))), rel=1e-6)
        before = [p.detach().clone() for p in ps]
        assert not torch.allclose(flat, last), "each step has its own direction"
        last = flat


def test_estimates_are_the_gradient_in_the_mean() -> None:
    ps = weights()
    optimizer, total = build(ps, 1.0), [torch.zeros_like(p) for p in ps]
    start = [p.detach().clone() for p in ps]
    for _ in range(4000):
        step(optimizer, quadratic(ps))
        for sum_, p, x in zip(total, ps, start, strict=True):
            sum_ += x - p.detach()
            p.data.copy_(x)
    mean = torch.cat([t.flatten() / 4000 for t in total])
    gradient = torch.cat([((k + 1) * x + 1).flatten() for k, x in enumerate(start)])
    assert float((mean - gradient).norm() / gradient.norm()) < 1.5 * (len(gradient) / 4000) ** 0.5


def test_a_seed_gives_the_course_and_a_resume_goes_on_with_it() -> None:
    straight = weights(torch.float32)
    optimizer = build(straight)
    for t in range(6):
        if t == 3:
            state, resumed = copy.deepcopy((optimizer.state_dict(), straight))
        step(optimizer, quadratic(straight))
    other = build(resumed)
    other.load_state_dict(state)
    for _ in range(3):
        step(other, quadratic(resumed))
    again, elsewhere = weights(torch.float32), weights(torch.float32)
    third, fourth = build(again), build(elsewhere)
    torch.manual_seed(4)
    for _ in range(6):
        step(fourth, quadratic(elsewhere))
    torch.manual_seed(3)
    for _ in range(6):
        step(third, quadratic(again))
    for a, b, c, d in zip(straight, resumed, again, elsewhere, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c) and not torch.equal(a, d)


def test_it_minimises_and_keeps_no_state() -> None:
    ps = weights(torch.float32)
    optimizer, loss = build(ps, 3e-3), quadratic(ps)
    least = -sum(p.numel() / (2 * (i + 1)) for i, p in enumerate(ps))
    before = float(loss().detach()) - least
    for t in range(800):
        set_rate(optimizer, 1 - t / 800)
        step(optimizer, loss)
    assert float(loss().detach()) - least < 0.05 * before
    assert optimizer.state_bytes() == 0  # type: ignore[attr-defined]
    assert all(state.keys() == {"step"} for state in optimizer.state.values())


def test_its_options_are_checked_and_a_step_needs_a_probe() -> None:
    with pytest.raises(UserError, match=r"optimizer.radius is out of its range; choose a small positive number"):
        build(weights(), radius=0.0)
    with pytest.raises(TypeError, match="call probe"):
        build(weights()).step()


def trainer_of(rule: str, documents: int = 30) -> Trainer:
    model = wrap(tiny("gpt2", resid_pdrop=0.2))
    trainer = tiny_trainer(model, random_documents(documents), rate=1e-4, length={"steps": 3}, clip=None)
    trainer.optimizer = OPTIMIZERS[rule](parameter_groups(model.trainable().items(), 1e-4), 1e-4)
    return trainer


@pytest.mark.parametrize("rule", ["mezo", "adamw"])
def test_a_step_keeps_nothing_for_a_backward_pass(rule: str) -> None:
    """No tensor is saved, no gradient made, and dropout, which would be other in both losses, is off."""
    trainer, saved = trainer_of(rule), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        losses = [r.loss for r in trainer.steps() if isinstance(r, Step)]
    assert bool(saved) == (rule == "adamw") and len(losses) == 3
    if rule == "mezo":
        assert all(p.grad is None for p in trainer.model.parameters())
        assert losses == [r.loss for r in trainer_of(rule).steps() if isinstance(r, Step)]


def test_a_loss_that_is_no_number_leaves_the_weights() -> None:
    trainer = trainer_of("mezo")
    before = {n: p.detach().clone() for n, p in trainer.model.trainable().items()}
    trainer.optimizer.param_groups[0]["params"][0].data[0] = float("nan")
    with pytest.raises(UserError, match="the loss of step 1 is nan; no weight was changed"):
        list(trainer.steps())
    moved = [n for n, p in trainer.model.trainable().items() if not torch.allclose(p, before[n], atol=1e-6)]
    assert len(moved) <= 1


MEZO = ("optimizer.name=mezo", "train.clip=none", "optimizer.rate=1e-4", "schedule.name=constant", "schedule.warmup=0")
SHORT = ("evaluation.samples=0", "output.merged=false", "checkpoint.keep=9", "checkpoint.every=1", "train.steps=4")


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_run_is_checked_by_what_it_has_and_resumes(method: str, my_data: Path, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "llama")
    run, again = tmp_path / "run", tmp_path / "again"
    asked = [f"adapter.method={method}"] if method == "full" else ["optimizer.radius=1e-2"]
    for folder in (run, again):
        result = invoke("train", *keys(model, my_data, folder, *asked, *SHORT, *MEZO))
        assert result.exit_code == 0, result.output
    last = Path("checkpoints") / "step-00000004"
    for file in (run / last).glob("*.safetensors"):
        assert same_file(file, again / last / file.name), file.name
    told = [v["name"] for r in records(run) if r["kind"] == "checks" for v in r["verdicts"]]
    assert "the slope along a random direction is finite" in told and not any("my gradient" in name for name in told)
    assert {"every trained tensor moved", "no frozen tensor moved", "neighbours do not change my loss"} <= set(told)
    job = assemble(read(None, keys(model, my_data, again, *asked, *SHORT, *MEZO)), again)
    job.trainer.resume(2)
    rest = [r for r in job.trainer.steps() if isinstance(r, Step | Checks)]
    steps = [r for r in records(run) if r["kind"] == "step"][2:]
    mine = [r for r in rest if isinstance(r, Step)]
    assert [(r.loss, r.gradient_norm) for r in mine] == [(r["loss"], r["gradient_norm"]) for r in steps]
    assert all(r.gradient_norm > 0 and r.gradient_norm_l1 > r.gradient_norm for r in mine)
    (checks,) = (r for r in rest if isinstance(r, Checks) and len(r.verdicts) == 3)
    count = len(job.trainer.model.trainable())
    assert checks.verdicts[0].figure == f"{count} of {count}"


@pytest.mark.parametrize(
    ("key", "sentence"),
    [
        ("train.clip=1.0", "train.clip means nothing .* takes no gradients .* set train.clip=none"),
        ("train.clip_growth=1.01", "train.clip_growth means nothing"),
        ("train.activation_memory=1.0", "train.activation_memory means nothing"),
        ("train.filtered_loss=true", "train.filtered_loss means nothing .* drops nothing; remove it"),
        ("adapter.dropout=0.1", "adapter.dropout means nothing .* drops nothing; remove it"),
        ("optimizer.mechanic=true", "optimizer.mechanic means nothing"),
        ("optimizer.ema=0.9", "optimizer.ema means nothing"),
        ("optimizer.takes=[matrices]", "optimizer.takes means nothing .* takes all"),
        ("model.weights=bf16", "model.weights=bf16 does not go with .* set model.weights=fp32"),
    ],
)
def test_what_is_about_gradients_is_refused(key: str, sentence: str, my_model: Path, my_data: Path) -> None:
    more = [k for k in keys(my_model, my_data, Path("run"), *MEZO, key) if not k.startswith("model.precision")]
    with pytest.raises(UserError, match=sentence):
        assemble(read(None, more))
