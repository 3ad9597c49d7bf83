"""Every promise is seen to fail on a build that is broken for it, in at least two ways each.

Each fault is a classic of the field, put into the program's own code for the length of a test.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from folders import invoke, keys, write_model

from truetune import promises, run, spelling
from truetune.data import stream as streams
from truetune.data.batch import IGNORE, Batch
from truetune.data.dataset import DataReport
from truetune.data.stream import Stream
from truetune.errors import UserError
from truetune.kernels import int8_linear
from truetune.models import adapt, export, route
from truetune.objectives.next_token import NextToken
from truetune.promises import PROMISES, crash, gradients
from truetune.promises.ground import Ground
from truetune.rows import Side
from truetune.training import checkpoint, trainer
from truetune.training.checkpoint import Checkpoints
from truetune.training.trainer import Trainer

Patch = pytest.MonkeyPatch


def prepared(model: Path, data: Path, place: Path, *more: str) -> Ground:
    recipe = spelling.read(None, keys(model, data, place / "run", *more))
    (place / "spare").mkdir(parents=True)
    return Ground.prepare(recipe, place / "proof", place / "spare")


@pytest.fixture(scope="module")
def lora(my_model: Path, my_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Ground:
    return prepared(my_model, my_data, tmp_path_factory.mktemp("lora"), "adapter.lora_plus_ratio=4")


@pytest.fixture(scope="module")
def full(my_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Ground:
    """Every weight of a model with learned positions."""
    place = tmp_path_factory.mktemp("full")
    return prepared(write_model(place / "model", "gpt2"), my_data, place, "adapter.method=full")


@pytest.fixture(scope="module")
def dropout(my_model: Path, my_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Ground:
    return prepared(my_model, my_data, tmp_path_factory.mktemp("dropout"), "adapter.dropout=0.2")


@pytest.fixture
def ground(lora: Ground, tmp_path: Path) -> Ground:
    """As prepared, with a spare folder of the test's own."""
    return dataclasses.replace(lora, spare=tmp_path, failed=[])


def refuses(name: str, ground: Ground, says: str = "") -> None:
    verdict = PROMISES[name](ground)
    assert not verdict.passed and says in verdict.figure, verdict


def test_unbroken_all_hold(lora: Ground, full: Ground, dropout: Ground, tmp_path: Path) -> None:
    """Without which the tests below would say nothing."""
    for number, one in enumerate((lora, full, dropout)):
        (tmp_path / str(number)).mkdir()
        one = dataclasses.replace(one, spare=tmp_path / str(number), failed=[])
        assert [n for n, p in PROMISES.items() if not p(one).passed] == []


# accumulation


def test_mean_of_means(ground: Ground, monkeypatch: Patch) -> None:
    summed = NextToken.__call__

    def mean(self: NextToken, model: Any, batch: Batch) -> Any:
        terms = summed(self, model, batch)
        return dataclasses.replace(terms, total=terms.total / len(terms.losses))

    monkeypatch.setattr(NextToken, "__call__", mean)
    monkeypatch.setattr(NextToken, "count", lambda self, batch: 1.0)
    refuses("accumulation", ground)


def test_a_dropped_micro_batch(ground: Ground, monkeypatch: Patch) -> None:
    whole = gradients.accumulate
    monkeypatch.setattr(gradients, "accumulate", lambda m, o, b: whole(m, o, b[:-1] or b))
    refuses("accumulation", ground)


def test_a_denominator_of_tokens_per_micro_batch(ground: Ground, monkeypatch: Patch) -> None:
    monkeypatch.setattr(NextToken, "count", lambda self, batch: max(map(len, (batch.tokens,))) ** 0.5)
    refuses("accumulation", ground)


# isolation


def one_long_document(monkeypatch: Patch) -> None:
    attention = route.packed_attention
    monkeypatch.setattr(
        route, "packed_attention", lambda q, k, v, lengths, **options: attention(q, k, v, (sum(lengths),), **options)
    )


def changed_batches(monkeypatch: Patch, change: Callable[[Batch], dict[str, Any]]) -> None:
    made = Batch.of.__func__  # type: ignore[attr-defined]

    def of(cls: type[Batch], *arguments: Any) -> Batch:
        batch = made(cls, *arguments)
        changed = dataclasses.replace(batch, **change(batch))
        learned = (changed.labels != IGNORE).nonzero()[:, 0]
        weight = torch.ones(len(learned)) if changed.weights is None else changed.weights
        return dataclasses.replace(changed, learned=learned, total=float(weight.double().sum()))

    monkeypatch.setattr(Batch, "of", classmethod(of))


def test_attention_across_documents(ground: Ground, monkeypatch: Patch) -> None:
    one_long_document(monkeypatch)
    refuses("isolation", ground)


def test_positions_that_do_not_restart(full: Ground, monkeypatch: Patch) -> None:
    changed_batches(monkeypatch, lambda b: {"positions": torch.arange(len(b.tokens))})
    refuses("isolation", full)


def test_a_label_across_the_border(ground: Ground, monkeypatch: Patch) -> None:
    def across(batch: Batch) -> dict[str, Any]:
        labels, ends = batch.labels.clone(), torch.tensor(batch.lengths).cumsum(0)[:-1]
        labels[ends - 1] = batch.tokens[ends]
        return {"labels": labels}

    changed_batches(monkeypatch, across)
    refuses("isolation", ground)


# conservation


def test_a_document_lost_in_packing(ground: Ground, monkeypatch: Patch) -> None:
    whole = Stream.micro_batches
    monkeypatch.setattr(Stream, "micro_batches", lambda self, t: [*whole(self, t)[:-1], whole(self, t)[-1][1:] or [0]])
    refuses("conservation", ground, "labels of")


def test_a_document_twice(ground: Ground, monkeypatch: Patch) -> None:
    monkeypatch.setattr(streams, "_order", lambda seed, epoch, sources: torch.arange(sources[0][0]).numpy() // 2)
    refuses("conservation", ground, "comes twice before all others of its source came once")


def test_a_label_lost(ground: Ground, monkeypatch: Patch) -> None:
    def lost(batch: Batch) -> dict[str, Any]:
        labels = batch.labels.clone()
        labels[(labels != IGNORE).nonzero()[-1]] = IGNORE
        return {"labels": labels}

    changed_batches(monkeypatch, lost)
    refuses("conservation", ground, "labels of")


def telling(side: Side, report: DataReport) -> Side:
    """The side, whose only source has the account ``report``."""
    return Side((dataclasses.replace(side.parts[0], report=report),))


@pytest.mark.parametrize("part", ["targets", "targets_cut", "documents"])
def test_a_report_that_tells_less(ground: Ground, part: str) -> None:
    job = ground.job
    (only,) = job.train.parts
    false = dataclasses.replace(only.report, **{part: getattr(only.report, part) + 1})
    told = dataclasses.replace(job, train=telling(job.train, false))
    refuses("conservation", dataclasses.replace(ground, job=told), "counted")


# exact resume


@pytest.mark.parametrize("lost", ["optimizer", "step"])
def test_a_resume_that_forgets(ground: Ground, monkeypatch: Patch, lost: str) -> None:
    whole = Trainer.resume

    def resume(self: Trainer, step: int) -> None:
        whole(self, step)
        if lost == "optimizer":
            self.optimizer.state.clear()
        else:
            self.step = max(0, self.step - 1)

    monkeypatch.setattr(Trainer, "resume", resume)
    refuses("exact resume", ground, "differs")


def test_a_resume_without_the_random_state(dropout: Ground, tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(trainer.torch, "set_rng_state", lambda state: None)
    refuses("exact resume", dataclasses.replace(dropout, spare=tmp_path), "differs")


# parity


def test_labels_that_are_not_shifted(ground: Ground, monkeypatch: Patch) -> None:
    changed_batches(monkeypatch, lambda b: {"labels": torch.where(b.labels == IGNORE, IGNORE, b.tokens)})
    refuses("parity", ground)


def test_an_adapter_that_counts_twice(ground: Ground, monkeypatch: Patch) -> None:
    plain = adapt.lora_linear
    monkeypatch.setattr(adapt, "lora_linear", lambda x, w, b, a, c, scaling: plain(x, w, b, a, c, 2 * scaling))
    refuses("parity", ground)


def test_a_gradient_without_its_scale(ground: Ground, monkeypatch: Patch) -> None:
    """The loss is right; only the gradient of the adapter's first factor is not."""

    def halved(x: Any, w: Any, b: Any, a: torch.Tensor, c: Any, scaling: float) -> Any:
        return adapt_linear(x, w, b, a / 2 + (a / 2).detach(), c, scaling)

    adapt_linear = adapt.lora_linear
    monkeypatch.setattr(adapt, "lora_linear", halved)
    refuses("parity", ground)


@pytest.mark.skipif(not int8_linear.available(torch.device("cpu")), reason="no compiled products of bytes")
def test_a_gradient_of_bytes_that_is_too_long(
    my_model: Path, my_data: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    """Nothing but the gradient to the input is wrong, and that only as it is trained."""
    ground = prepared(my_model, my_data, tmp_path, "model.base=int8", "model.precision=bf16")
    assert PROMISES["parity"](ground).passed
    product = int8_linear._product

    def wrong(quantized: Any, weight: Any, scale: Any, *others: Any) -> torch.Tensor:
        return product(quantized, weight, scale, *others) * (1.0 if scale is not None else 1.5)

    monkeypatch.setattr(int8_linear, "_product", wrong)
    refuses("parity", ground)


def test_a_stale_tied_weight_in_the_export(my_data: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    model = write_model(tmp_path / "model", "qwen2")
    whole = export._write_whole

    def stale(live: Any, attention: str, folder: Path, dtype: torch.dtype) -> None:
        head = live.get_output_embeddings().weight
        with torch.no_grad():
            kept = head.clone()
            head += 0.3
            whole(live, attention, folder, dtype)
            head.copy_(kept)

    monkeypatch.setattr(export, "_write_whole", stale)
    result = invoke("prove", *keys(model, my_data, tmp_path / "run"))
    assert result.exit_code == 1
    assert "FAILS  the run itself" in result.stdout and "logits that differ" in result.stdout


# real training


def test_a_swapped_ratio(ground: Ground) -> None:
    groups = ground.trainer.optimizer.param_groups
    peaks = [g["peak"] for g in groups]
    try:
        for group, peak in zip(groups, reversed(peaks), strict=True):
            group["peak"] = peak
        refuses("real training", ground, "peak rate")
    finally:
        for group, peak in zip(groups, peaks, strict=True):
            group["peak"] = peak


def test_a_frozen_adapter(ground: Ground) -> None:
    weight = next(iter(ground.trainer.model.trainable().values()))
    try:
        weight.requires_grad_(False)
        refuses("real training", ground, "is not trained")
    finally:
        weight.requires_grad_(True)


def test_a_tensor_that_the_optimizer_does_not_hold(ground: Ground) -> None:
    group = ground.trainer.optimizer.param_groups[0]
    left_out = group["params"].pop()
    try:
        refuses("real training", ground, "does not hold")
    finally:
        group["params"].append(left_out)


def test_an_optimizer_that_does_nothing(ground: Ground, monkeypatch: Patch) -> None:
    monkeypatch.setattr(ground.trainer.optimizer, "step", lambda: None)
    refuses("real training", ground, "can't be learned")


def test_an_optimizer_that_moves_at_rate_zero(ground: Ground, monkeypatch: Patch) -> None:
    optimizer, step = ground.trainer.optimizer, ground.trainer.optimizer.step

    @torch.no_grad()
    def decaying() -> None:
        step()
        for group in optimizer.param_groups:
            for p in group["params"]:
                p *= 0.999

    monkeypatch.setattr(optimizer, "step", decaying)
    refuses("real training", ground, "moved at rate zero")


# nothing silent


def test_a_non_finite_gradient_that_is_not_looked_at(ground: Ground, monkeypatch: Patch) -> None:
    monkeypatch.setattr(trainer, "require_finite", lambda *_: None)
    refuses("nothing silent", ground, "planted nan")


def test_a_key_that_is_not_read(ground: Ground) -> None:
    refuses("nothing silent", dataclasses.replace(ground, read=ground.read - {"train.tokens_per_step"}), "never read")


@pytest.mark.parametrize("part", ["truncated", "dropped"])
def test_rows_that_go_by_in_silence(ground: Ground, part: str) -> None:
    job = ground.job
    (only,) = job.train.parts
    false = dataclasses.replace(only.report, **{part: 3 if part == "truncated" else {"empty": 3}})
    told = dataclasses.replace(job, train=telling(job.train, false))
    refuses("nothing silent", dataclasses.replace(ground, job=told), "counted")


# determinism


def test_a_start_by_the_clock(my_model: Path, my_data: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    seed = torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda _: seed(random.SystemRandom().randrange(1 << 40)))
    refuses("determinism", prepared(my_model, my_data, tmp_path), "differs")


def test_an_order_by_the_clock(my_model: Path, my_data: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    real, salt = streams._order, itertools.count()

    def salted(seed: int, epoch: int, sources: tuple[tuple[int, float], ...]) -> Any:
        return real(seed + salted.salt, epoch, sources)  # type: ignore[attr-defined]

    whole = run.train
    salted.salt = 0  # type: ignore[attr-defined]

    def then_another(*arguments: Any, **options: Any) -> Path:
        folder = whole(*arguments, **options)
        salted.salt = 1 + next(salt)  # type: ignore[attr-defined]
        return folder

    monkeypatch.setattr(streams, "_order", salted)
    monkeypatch.setattr(run, "train", then_another)
    refuses("determinism", prepared(my_model, my_data, tmp_path), "losses are")


# crash safety


def test_checkpoints_that_nobody_verifies(ground: Ground, monkeypatch: Patch) -> None:
    monkeypatch.setattr(checkpoint, "verify", lambda folder: None)
    refuses("crash safety", ground)


def test_files_that_are_not_synced(ground: Ground, monkeypatch: Patch) -> None:
    monkeypatch.setattr(checkpoint, "_sync", lambda path: None)
    refuses("crash safety", ground, "emptied")


def test_old_checkpoints_removed_before_the_new_one_stands(ground: Ground, monkeypatch: Patch) -> None:
    save = Checkpoints.save

    def careless(self: Checkpoints, *arguments: Any, **options: Any) -> Path:
        for step in self.steps():
            checkpoint.shutil.rmtree(self.path(step))
        return save(self, *arguments, **options)

    monkeypatch.setattr(crash.Checkpoints, "save", careless)
    refuses("crash safety", ground, "holds no intact checkpoint")


def test_a_manifest_without_its_own_digest(ground: Ground, monkeypatch: Patch) -> None:
    def loose(folder: Path) -> None:
        try:
            files = json.loads((folder / checkpoint.MANIFEST).read_bytes())["files"]
            whole = all(checkpoint._digest(folder / name) == digest for name, digest in files.items())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            whole = False
        if not whole:
            raise UserError("it is damaged; use another")

    monkeypatch.setattr(checkpoint, "verify", loose)
    refuses("crash safety", ground, "were not refused")


# honest speed


def test_tokens_counted_twice(ground: Ground) -> None:
    steps = [s | {"tokens": 2 * s["tokens"]} for s in ground.run.steps]
    ground.__dict__["run"] = SimpleNamespace(steps=steps)
    refuses("honest speed", ground, "claims")


def test_a_clock_that_stands_still_during_the_backward(ground: Ground, monkeypatch: Patch) -> None:
    fast = [dataclasses.replace(r, seconds=r.seconds / 3) for r in ground.records if r.kind == "step"]
    refuses("honest speed", dataclasses.replace(ground, records=fast), "another clock")


def test_no_speed_beside_a_failed_promise(ground: Ground) -> None:
    ground.failed.append("isolation")
    refuses("honest speed", ground, "withheld, since isolation does not hold")


def test_a_promise_that_meets_an_error_does_not_hold(ground: Ground) -> None:
    def stumbles(_: Ground) -> Any:
        raise UserError("the disk is full; free some space")

    verdict = promises._tried("exact resume", stumbles, ground)
    assert not verdict.passed and verdict.figure.startswith("the disk is full")
    assert ground.failed == ["exact resume"]
