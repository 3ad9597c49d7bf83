"""Truetune against other frameworks: one model, the same documents, hyper-parameters and precision, in turns.

Every side is a process of its own (``peers``), in an environment of its own, and only one computes at a time. All take
one step to warm up, whose losses must agree, then as many as there are rounds: in each, the same documents on every
side, the order turned round from one to the next, and the machine's matrix products timed beside. What is counted
twice by different programs (tokens, targets, trained parameters and their dtype) must be equal, or nothing is said of
speed. CPU only; left out are clusters, GPUs and Windows.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

import truetune
from truetune.bench.child import KEEP_MEMORY, Child
from truetune.bench.flops import Cost
from truetune.bench.kernels import machine, require_place
from truetune.bench.table import FORMAT, OURS, noisy, table
from truetune.bench.workloads import RANK, Workload, prepare
from truetune.errors import UserError
from truetune.kernels.product import products
from truetune.models.load import skeleton
from truetune.training.patience import write_text

FOLDER = Path(__file__).parent / "peers"
GEMM, GEMM_TIMES = 2048, 5
"""Side of the square product that the peak is measured with, and how often a round does: the best counts."""
AGREE = {"bf16": 2**-8, "fp32": 1e-4}
"""Relative difference of first losses that rounding explains: one of bfloat16, and sums in another order."""


Start = Callable[[], Child]


class Peer(NamedTuple):
    """The script of a side, its options, and what it is."""

    script: str
    options: tuple[str, ...]
    what: str


PEERS = {
    "loop": Peer("loop", (), "a careful loop with transformers and PEFT"),
    "loop-single": Peer("loop", ("single",), "the same, one document at a time"),
    "loop-compiled": Peer("loop", ("compile",), "the same, its layers compiled by torch"),
    "hf-trainer": Peer("trainers", (), "transformers' Trainer"),
    "trl": Peer("trainers", ("trl",), "trl's SFTTrainer, packing"),
    "litgpt": Peer("litgpt_loop", (), "litgpt's model and loss in the loop of its scripts"),
}


class Asked(NamedTuple):
    """What the command line asked for. peers: name, or name=PYTHON. keys: of the recipe, as ``prepare`` takes. apart:
    no two sides are in memory at once, so that every round begins anew and is of the same two steps."""

    workload: str
    mode: str
    peers: Sequence[str]
    rounds: int
    documents: int | None
    keys: Sequence[str]
    keep_memory: bool
    apart: bool


def compare(asked: Asked, to: Path | None) -> None:
    """Measure and print; everything, raw, goes to ``to``.

    Raises UserError for a side that can't run or does not train the same, before any figure is printed of it.
    """
    pythons = _pythons(asked.peers)
    if asked.mode not in ("lora", "full"):
        raise UserError(f"--mode is lora or full, not {asked.mode}; choose one")
    if to:
        require_place(to)
    with tempfile.TemporaryDirectory(prefix="truetune-bench-") as name:
        folder, different = Path(name), 1 if asked.apart else asked.rounds
        workload = prepare(asked.workload, asked.mode, different, folder, asked.documents, asked.keys)
        result = _described(asked, workload, list(pythons))
        sides = {}
        for side, python in pythons.items():
            peer = PEERS.get(side, Peer("ours", (), ""))
            command = [python, str(FOLDER / f"{peer.script}.py"), name, *peer.options]
            environment = _environment(asked, workload, side)
            sides[side] = partial(Child, side, command, folder / f"{side}.log", environment)
        (_apart if asked.apart else _together)(asked.rounds, sides, workload, result)
    print(table([result]))
    for sentence in noisy(result):
        print(f"note: {sentence}")
    if to:
        write_text(to, json.dumps(result, indent=1) + "\n")
        print(f"raw samples: {to}")


def _together(rounds: int, sides: Mapping[str, Start], workload: Workload, result: dict[str, Any]) -> None:
    """Every side stays in memory, and trains on."""
    with ExitStack() as stack:
        children = {side: stack.enter_context(start()) for side, start in sides.items()}
        for side, child in children.items():
            result["sides"][side] = child.answer() | {"samples": []}
        _require_same_training(result)
        for side, child in children.items():
            result["sides"][side]["warm_up"] = _step(child, workload, 0)
        _require_same_losses(result, workload)
        for number in range(1, rounds + 1):
            for side in _begin_round(number, result):
                result["sides"][side]["samples"].append(_step(children[side], workload, number))
            _say_round(number, result)
        for side, child in children.items():
            result["sides"][side] |= child.ask("end")


def _apart(rounds: int, sides: Mapping[str, Start], workload: Workload, result: dict[str, Any]) -> None:
    """One side at a time is in memory: it starts, warms up and takes one step in every round."""
    for number in range(1, rounds + 1):
        for side in _begin_round(number, result):
            with sides[side]() as child:
                before = result["sides"].get(side, {"samples": [], "peak_bytes": 0})
                found = child.answer() | {"warm_up": _step(child, workload, 0)}
                found["samples"] = [*before["samples"], _step(child, workload, 1)]
                found |= child.ask("end")
                result["sides"][side] = found | {"peak_bytes": max(found["peak_bytes"], before["peak_bytes"])}
        _require_same_training(result)
        _require_same_losses(result, workload)
        _say_round(number, result)


def _pythons(peers: Sequence[str]) -> dict[str, str]:
    """Name of each side -> the Python that runs it; ours first."""
    found = {OURS: sys.executable}
    for peer in peers:
        name, _, python = peer.partition("=")
        if name not in PEERS:
            known = "; ".join(f"{name} ({peer.what})" for name, peer in PEERS.items())
            raise UserError(f"there is no peer {name}; choose among: {known}")
        if name in found:
            raise UserError(f"--peer {name} is there twice; keep one")
        found[name] = python or sys.executable
    return found


def _environment(asked: Asked, workload: Workload, side: str) -> dict[str, str]:
    """The same for all sides, but that ours must find this package, which may be a checkout."""
    own = {"PYTHONPATH": os.pathsep.join([str(Path(truetune.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])}
    return {
        "OMP_NUM_THREADS": str(workload.job["threads"]),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **(own if side == OURS else {}),
        **({"GLIBC_TUNABLES": KEEP_MEMORY} if asked.keep_memory else {}),
    }


def _described(asked: Asked, workload: Workload, order: Sequence[str]) -> dict[str, Any]:
    cost = Cost.of(workload.config, RANK if asked.mode == "lora" else None)
    steps = []
    for documents in [*workload.steps, *workload.steps[1:] * (asked.rounds - len(workload.steps) + 1)]:
        counted = {"tokens": sum(map(len, documents)), "targets": sum(d.target_count for d in documents)}
        steps.append(counted | {"flops": cost.step(documents)})
    found = machine()
    return {
        "format": FORMAT,
        "machine": found | {"command": re.sub(r"(--peer[ =][\w-]+)=\S+", r"\1", found["command"])},  # no one's paths
        "workload": workload.name,
        "mode": asked.mode,
        "job": {key: workload.job[key] for key in ("compute", "rate", "clip", "longest", "documents", "threads")},
        "keys": list(asked.keys),
        "keep_memory": asked.keep_memory,
        "apart": asked.apart,
        "frozen_bytes": _frozen_bytes(asked.mode, workload),
        "data": workload.digest,
        "steps": steps,
        "order": order,
        "rounds": [],
        "sides": {},
    }


def _frozen_bytes(mode: str, workload: Workload) -> int:
    """Of the weights that are not trained, each counted once where the model ties them."""
    if mode == "full":
        return 0
    elements = sum(p.numel() for p in skeleton(workload.config).parameters())
    return elements * (2 if workload.job["compute"] == "bf16" else 4)


def _step(child: Child, workload: Workload, number: int) -> dict[str, Any]:
    """One step of one side. Raises UserError unless it counted the tokens and targets that there are."""
    found = child.ask("step")
    documents = workload.steps[number]
    there = {"tokens": sum(map(len, documents)), "targets": sum(d.target_count for d in documents)}
    for what, count in there.items():
        if found.pop(what) != count:
            raise UserError(f"{child.name} did not train on all {count} {what} of step {number}; leave it out")
    return found


def _require_same_training(result: dict[str, Any]) -> None:
    ours = result["sides"][OURS]
    for name, side in result["sides"].items():
        for key, what in (("trained", "{} parameters"), ("dtypes", "in {}")):
            if side[key] != ours[key]:
                mine, theirs = (what.format(s[key]) for s in (ours, side))
                raise UserError(f"{name} trains {theirs}, {OURS} {mine}; that is no comparison, so leave it out")


def _require_same_losses(result: dict[str, Any], workload: Workload) -> None:
    """Raise UserError unless all sides saw the same first loss: the same weights and the same documents."""
    ours, bound = result["sides"][OURS]["warm_up"]["loss"], AGREE[workload.job["compute"]]
    for name, side in result["sides"].items():
        loss = side["warm_up"]["loss"]
        if not abs(loss - ours) <= bound * abs(ours):
            raise UserError(
                f"the first losses differ, {loss:.4f} of {name} and {ours:.4f} of {OURS}, by more than rounding "
                f"({bound:.1e} relative), so they don't train the same; leave {name} out, or report it"
            )


def _begin_round(number: int, result: dict[str, Any]) -> list[str]:
    """The sides in the order of the round, before which the machine's products are timed."""
    order = result["order"][:: 1 if number % 2 else -1]
    peak = {"bf16": gemm(torch.bfloat16), "fp32": gemm(torch.float32)}
    result["rounds"].append({"order": order, "gemm": peak})
    return order


def _say_round(number: int, result: dict[str, Any]) -> None:
    tokens = result["steps"][number]["tokens"]
    speeds = "  ".join(
        f"{name} {tokens / side['samples'][-1]['seconds']:,.0f}" for name, side in result["sides"].items()
    )
    print(f"round {number}  useful tokens/s: {speeds}", flush=True)


def gemm(dtype: torch.dtype) -> float:
    """FLOP/s of the machine's matrix product of squares, torch's or ours, the best of ``GEMM_TIMES`` each."""
    a, b = (torch.randn(GEMM, GEMM).to(dtype) for _ in range(2))
    best = 0.0
    for multiply in [lambda: a @ b, lambda: products([a], [b.T])] * GEMM_TIMES:
        start = time.perf_counter()
        multiply()
        best = max(best, 2 * GEMM**3 / (time.perf_counter() - start))
    return best
