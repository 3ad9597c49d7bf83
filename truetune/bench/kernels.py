"""Every operation of ``kernels``, forward and backward, against its reference and against what torch offers for it.

The ways are timed in turns; a figure is a median, with the quartiles of its ratio to ours. Beside it stands the error
of outputs and gradients against the reference in float64, without which a time says nothing. An optimizer's step gets
fresh copies of what it changes, which no time has in it. What is asked: a bf16 model of hidden size 896 with heads of
64, 2,048 tokens.

On a GPU our Triton kernels are one more way. One that wins can be chosen for GPUs of that name (``winners``).
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import truetune
from truetune.errors import UserError
from truetune.kernels import linear_cross_entropy, lora_linear, packed_attention
from truetune.kernels.adamw import adamw
from truetune.kernels.adamw_8bit import adamw_8bit, pack
from truetune.kernels.attention import by_document
from truetune.kernels.gated import gated
from truetune.kernels.linear import linears
from truetune.kernels.native.memory import keep_memory
from truetune.kernels.newton_schulz import newton_schulz
from truetune.kernels.op import FAST_PATHS, Op, is_on
from truetune.kernels.rms_norm import rms_norm
from truetune.kernels.rope import rope
from truetune.kernels.triton import KERNELS, switched_on
from truetune.kernels.triton.choices import keep
from truetune.training.patience import write_text

HIDDEN, INNER, SIZE, TOKENS, RANK = 896, 4864, 64, 2048, 16
ENTRIES = 32_000, 151_936
"""Of vocabularies."""
MATRICES = 4
"""Of one shape, in a model's layers."""
WARM = 2
"""Calls before the first that counts."""
OURS, PLAIN, TORCH, CHUNKED, TRITON = "truetune", "reference", "torch", "chunked", "triton"


class Case(NamedTuple):
    """name of the operation, what it is asked, tensors that get gradients, and name -> function of them.

    products: the matrix products that every way needs, and nothing else; timed beside them. changes: whether the
    functions return nothing and change the tensors, which then get no gradients."""

    name: str
    asked: str
    tensors: list[Tensor]
    ways: dict[str, Callable[..., Any]]
    products: Callable[..., object] | None = None
    changes: bool = False


def cases() -> Iterator[Case]:
    """Every operation that a model calls, and those of optimizers."""
    yield from _attention()
    x, weight_D = _random(TOKENS, HIDDEN, dtype=torch.float32), _random(HIDDEN, dtype=torch.float32)
    yield Case(
        "rms_norm",
        f"{TOKENS} x {HIDDEN} fp32",
        [x, weight_D],
        {
            OURS: lambda x, w: rms_norm(x, w, 1e-6)[0],
            PLAIN: lambda x, w: rms_norm.reference(x, w, 1e-6)[0],
            TORCH: lambda x, w: F.rms_norm(x, (HIDDEN,), w, 1e-6),
        },
    )
    yield Case(
        "gated",
        f"{TOKENS} x {INNER} bf16, SiLU",
        [_random(TOKENS, INNER), _random(TOKENS, INNER)],
        {OURS: gated, PLAIN: gated.reference, TORCH: lambda gate, up: F.silu(gate) * up},
    )
    yield _rope()
    low, up = (_random(*shape, dtype=torch.float32) for shape in ((RANK, HIDDEN), (INNER, RANK)))
    weight = _random(INNER, HIDDEN)
    yield Case(
        "lora_linear",
        f"{TOKENS} x {HIDDEN} to {INNER}, rank {RANK}",
        [_random(TOKENS, HIDDEN), low, up],
        {
            OURS: lambda x, a, b: lora_linear(x, weight.to(x.dtype), None, a, b, 2.0),
            PLAIN: lambda x, a, b: lora_linear.reference(x, weight.to(x.dtype), None, a, b, 2.0),
        },
    )
    yield _trained()
    yield from map(_loss, ENTRIES)
    yield Case(
        "newton_schulz",
        f"{MATRICES} x {HIDDEN} x {HIDDEN} bf16, 5 rounds",
        [_random(MATRICES, HIDDEN, HIDDEN)],
        {OURS: newton_schulz, PLAIN: newton_schulz.reference},
    )
    for dtype in (torch.float32, torch.bfloat16):
        yield _step("adamw", adamw, dtype, _moments(dtype))
    yield _step("adamw_8bit", adamw_8bit, torch.bfloat16, [x for m in _moments(torch.float32) for x in _packed(m)])


def _step(name: str, operation: Op[..., None], dtype: torch.dtype, states: list[list[Tensor]]) -> Case:
    """A step of the weights of one layer; in bf16 rounded at random, which torch's own does not."""
    lists = [[_random(*shape, dtype=dtype) for shape in _shapes()] for _ in ("weights", "gradients")] + states
    count = len(lists[0])
    options: dict[str, Any] = {"rate": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "step": 3}
    options["seeds"] = list(range(count))

    def by(function: Callable[..., None]) -> Callable[..., None]:
        def stepped(*tensors: Tensor) -> None:
            function(*(list(tensors[i : i + count]) for i in range(0, len(tensors), count)), **options)

        return stepped

    asked = (
        f"{count} tensors of a layer, {sum(x.numel() for x in lists[0]):,} {'fp32' if dtype.itemsize == 4 else 'bf16'}"
    )
    flat = [x for tensors in lists for x in tensors]
    return Case(name, asked, flat, {OURS: by(operation), PLAIN: by(operation.reference)}, changes=True)


def _shapes() -> list[tuple[int, ...]]:
    return [(HIDDEN, HIDDEN)] * 4 + [(INNER, HIDDEN)] * 2 + [(HIDDEN, INNER), (HIDDEN,), (HIDDEN,)]


def _moments(dtype: torch.dtype) -> list[list[Tensor]]:
    means = [_random(*shape, dtype=torch.float32) for shape in _shapes()]
    return [means, [x.square() for x in means]]


def _packed(moment: list[Tensor]) -> list[list[Tensor]]:
    """Codes and scales."""
    signed = any((x < 0).any() for x in moment)
    return [[x[0] for x in part] for part in zip(*(pack(x[None], signed, 256) for x in moment), strict=True)]


def _trained() -> Case:
    def by(op: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Tensor]:
        def layer(x: Tensor, weight: Tensor) -> Tensor:
            with torch.autocast(x.device.type, torch.bfloat16, enabled=x.dtype != torch.float64):
                return op(x, [weight], [None])[0]

        return layer

    return Case(
        "linears",
        f"{TOKENS} x {HIDDEN} to {INNER}, trained in fp32, products in bf16",
        [_random(TOKENS, HIDDEN), _random(INNER, HIDDEN, dtype=torch.float32)],
        {OURS: by(linears), PLAIN: by(linears.reference)},
    )


def _attention() -> Iterator[Case]:
    for documents in (16, 4, 1):
        lengths = (TOKENS // documents,) * documents
        options = (lengths, SIZE**-0.5)
        yield Case(
            "packed_attention",
            f"{documents} x {lengths[0]} tokens, 14 and 2 heads of {SIZE}, bf16",
            [_random(heads, TOKENS, SIZE) for heads in (14, 2, 2)],
            {
                OURS: lambda q, k, v, o=options: packed_attention(q, k, v, *o),
                PLAIN: lambda q, k, v, o=options: packed_attention.reference(q, k, v, *o),
                TORCH: lambda q, k, v, o=options: by_document(q, k, v, *o),
            },
        )


def _rope() -> Case:
    angles = (torch.arange(TOKENS)[:, None] * 1e4 ** -(torch.arange(SIZE // 2) / (SIZE // 2))).repeat(1, 2)
    table = angles.cos(), angles.sin()

    def by_halves(q: Tensor, k: Tensor) -> Tensor:
        cos, sin = (t.to(q.dtype) for t in table)
        turned = (x * cos + torch.cat([-x[..., SIZE // 2 :], x[..., : SIZE // 2]], -1) * sin for x in (q, k))
        return torch.cat(list(turned))

    return Case(
        "rope",
        f"{TOKENS} tokens, 14 and 2 heads of {SIZE}",
        [_random(heads, TOKENS, SIZE) for heads in (14, 2)],
        {
            OURS: lambda q, k: torch.cat(rope(q, k, *table)),
            PLAIN: lambda q, k: torch.cat(rope.reference(q, k, *table)),
            TORCH: by_halves,
        },
    )


def _loss(entries: int) -> Case:
    """CHUNKED is torch's too, and does less: it gives the loss alone."""
    weight, labels = _random(entries, HIDDEN), torch.randint(0, entries, (TOKENS // 2,))
    chunks = torch.nn.LinearCrossEntropyOptions()
    return Case(
        "linear_cross_entropy",
        f"{TOKENS // 2} targets, {entries:,} entries, frozen head",
        [_random(TOKENS // 2, HIDDEN)],
        {
            OURS: lambda h: linear_cross_entropy(h, weight.to(h.dtype), labels).total,
            PLAIN: lambda h: linear_cross_entropy.reference(h, weight.to(h.dtype), labels).total,
            TORCH: lambda h: F.cross_entropy(F.linear(h, weight.to(h.dtype)).float(), labels, reduction="sum"),
            CHUNKED: lambda h: F.linear_cross_entropy(h, weight, labels, reduction="sum", options=chunks),
        },
        products=lambda h: h @ weight.T @ weight,
    )


def _random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape).mul(shape[-1] ** -0.5 if len(shape) == 2 else 1.0).to(dtype)


def measure(case: Case, repeats: int) -> dict[str, Any]:
    """Seconds of every call by way, and the largest relative error of outputs and gradients against float64.

    Beside them, where the case has them, those of the products alone."""
    truth = _observe(case, case.ways[PLAIN], [t.double() for t in case.tensors])
    seconds: dict[str, list[float]] = {way: [] for way in case.ways}
    errors: dict[str, float] = {}
    products: list[float] = []
    for i in range(WARM + repeats):
        for way, function in case.ways.items():
            tensors = [t.clone() for t in case.tensors] if case.changes else case.tensors
            start = _now(case.tensors[0])
            observed = _observe(case, function, tensors)
            if i >= WARM:
                seconds[way].append(_now(case.tensors[0]) - start)
            errors[way] = max(errors.get(way, 0.0), _error(observed, truth))
        if case.products:
            start = _now(case.tensors[0])
            case.products(*case.tensors)
            if i >= WARM:
                products.append(_now(case.tensors[0]) - start)
    found = {"name": case.name, "asked": case.asked, "seconds": seconds, "errors": errors}
    return found | ({"products": products} if products else {})


def _error(found: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """The largest relative error; infinite where something is no number."""
    errors = [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, truth, strict=True) if b.norm()]
    return max((e if math.isfinite(e) else math.inf for e in errors), default=0.0)


def _now(tensor: Tensor) -> float:
    """The time when all that was handed to the tensor's device is done."""
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter()


def with_triton(case: Case, device: str = "cuda") -> Case:
    """The case with our Triton kernel as one more way."""

    def kernel(*tensors: Tensor) -> Any:
        with switched_on(device, case.name):
            return case.ways[OURS](*tensors)

    return case._replace(ways=case.ways | {TRITON: kernel})


def winners(results: Sequence[dict[str, Any]]) -> list[str]:
    """Operations whose Triton kernel was faster than every other way in three quarters of the turns, whatever was
    asked of it, and erred at most twice as much as what it replaces."""
    won: dict[str, bool] = {}
    for found in results:
        if TRITON not in found["seconds"]:
            continue
        ours, errors = found["seconds"][TRITON], found["errors"]
        fastest = [min(turn) for turn in zip(*(s for way, s in found["seconds"].items() if way != TRITON), strict=True)]
        faster = sum(mine < theirs for mine, theirs in zip(ours, fastest, strict=True)) >= 0.75 * len(ours)
        right = errors[TRITON] <= 2 * errors[OURS]
        won[found["name"]] = won.get(found["name"], True) and faster and right
    return [name for name, did in won.items() if did]


def _observe(case: Case, function: Callable[..., Any], tensors: Sequence[Tensor]) -> list[Tensor]:
    if case.changes:
        function(*tensors)
        return list(tensors)
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = function(*leaves)
    if out.requires_grad:
        out.backward(torch.ones_like(out) if out.ndim == 0 else _readout(out))
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def _readout(out: Tensor) -> Tensor:
    """Fixed, and cheap beside what is timed."""
    row = torch.linspace(-1, 1, out.shape[-1], dtype=out.dtype, device=out.device)
    return row.expand_as(out).contiguous()


def write(only: Sequence[str], repeats: int, to: Path | None, choose: bool = False) -> None:
    """Measure and print; the raw samples go to ``to``. choose: keep what won for GPUs of this name.

    Raises UserError for an operation that there is not, and where there is nothing to choose.
    """
    torch.manual_seed(0)
    gpu, triton = torch.cuda.get_device_name() if torch.cuda.is_available() else None, find_spec("triton")
    if choose and (not gpu or only or not triton):
        raise UserError(
            "--choose decides over all our kernels on a GPU, "
            + ("and torch sees none; see truetune doctor" if not gpu else "")
            + ("so they are timed together; leave out --only" if gpu and only else "")
            + ("which need Triton; pip install triton" if gpu and not only else "")
        )
    if to:
        require_place(to)
    if not gpu:
        keep_memory()  # as every run does
    with torch.device("cuda" if gpu else "cpu"):
        chosen = list(cases())
    if gpu and triton:
        chosen = [with_triton(case) if case.name in KERNELS else case for case in chosen]
    names = list(dict.fromkeys(case.name for case in chosen))
    if unknown := sorted(set(only) - set(names)):
        raise UserError(f"there is no operation {unknown[0]} to time; choose among: {', '.join(names)}")
    found = []
    for case in chosen:
        if not only or case.name in only:
            found.append(measure(case, repeats))
            print("\n".join(_lines(found[-1])), flush=True)
    measured = {"machine": machine(), "repeats": repeats, "results": found}
    if choose and gpu:
        won = winners(found)
        file = keep(gpu, won, measured)
        print(f"chosen: {', '.join(won) or 'none of our kernels; torch is faster'} ({file})")
    if to:
        write_text(to, json.dumps(measured, indent=1) + "\n")
        print(f"raw samples: {to}")


def require_place(file: Path) -> None:
    """Raise UserError if ``file`` can't be written, before minutes are spent on what goes there."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"can't create {file.parent} ({error.strerror}); name another file with --to") from error
    if file.is_dir() or not os.access(file.parent, os.W_OK):
        raise UserError(f"can't write {file}; name another file with --to")


def _lines(found: dict[str, Any]) -> Iterator[str]:
    ours = found["seconds"][OURS]
    yield f"{found['name']}: {found['asked']}"
    alone = {"products": found["products"]} if "products" in found else {}
    for way, seconds in (found["seconds"] | alone).items():
        ratios = sorted(theirs / mine for theirs, mine in zip(seconds, ours, strict=True))
        low, high = ratios[len(ratios) // 4], ratios[(3 * len(ratios)) // 4]
        spread = "" if way == OURS else f"{statistics.median(ratios):8.2f} times ours ({low:.2f} to {high:.2f})"
        error = f"error {found['errors'][way]:.1e}" if way in found["errors"] else "alone        "
        yield f"  {way:10}{1e3 * statistics.median(seconds):9.2f} ms  {error}{spread}"


def machine() -> dict[str, Any]:
    """What was measured on, with what, and how: command, date, versions, processor, threads, fast paths."""
    return {
        "command": " ".join(["truetune", *(Path(a).name if Path(a).is_absolute() else a for a in sys.argv[1:])]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "truetune": truetune.__version__,
        "torch": torch.__version__,
        "cpu": str(torch.cpu.get_capabilities().get("cpu_name") or platform.processor()),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "fast_paths": [name for name in FAST_PATHS if is_on(name)],
    }
