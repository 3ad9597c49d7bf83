"""Checks before the first step, on real documents of at most 256 tokens.

Two optimizer steps are really taken, at the peak rate, and everything they touch is put back: weights,
optimizer state, gradients, random state. The second step is needed because LoRA's A can't have a gradient
before B has moved. Parity and isolation are then measured on the moved weights, where adapters matter.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from truetune.data.batch import IGNORE, Batch, Document
from truetune.data.prefixes import sharing_pairs
from truetune.models.adapt import unfused
from truetune.models.base import judged_base
from truetune.models.load import Loaded
from truetune.models.wrap import CausalLM
from truetune.optim import enough, set_rate, take_step
from truetune.training.gradient import accumulate, differentiate, mean_loss, norms_of
from truetune.training.integrity import fingerprints, integrity
from truetune.training.record import Checks, Verdict
from truetune.training.trainer import Trainer

TOKENS = 256
LOSS_BOUND = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Difference of a loss between two ways to compute it, as ``off`` measures it. bfloat16 has 8 bits: one rounding of
a logit is 4e-3 of it."""
GRADIENT_BOUND = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Relative L2 difference of a whole gradient; a leak between documents is of order one."""


class Preflight:
    """``Preflight(loaded)(trainer)`` gives the verdicts."""

    def __init__(self, loaded: Loaded) -> None:
        self.tokenizer, self.stop_ids = loaded.tokenizer, loaded.stop_ids

    def __call__(self, trainer: Trainer) -> Checks:
        documents = probe_documents(trainer)
        verdicts = [trainable(trainer.model), targets(documents), stops(trainer.documents, self.stop_ids)]
        if all(v.passed for v in verdicts):
            with restored(trainer):
                verdicts += (probed if _probes(trainer) else moved)(trainer, documents)
                verdicts += parity(trainer.model, trainer, documents)
                verdicts += neighbours(trainer.model, trainer, documents)
                if trainer.objective.filtered:
                    verdicts.append(filtering(trainer.model, trainer, documents))
                if any(batch.shared for batch in trainer.batches(0)):
                    verdicts += shared_prefix(trainer.model, trainer)
        return Checks(trainer.step, tuple(verdicts), self.shown(documents[0]))

    def shown(self, document: Document) -> str:
        """The document decoded, its targets between ⟦ and ⟧."""
        parts, start = [], 0
        edges = [*(np.flatnonzero(np.diff(document.targets.astype(np.int8))) + 1).tolist(), len(document)]
        for end in edges:
            text = str(self.tokenizer.decode(document.tokens[start:end].tolist()))
            parts.append(f"⟦{text}⟧" if document.targets[start] else text)
            start = end
        return "".join(parts)


def probe_documents(trainer: Trainer) -> list[Document]:
    """At least two documents of the first step, cut to 256 tokens in all but never to less than a target."""
    first = [trainer.documents[i] for i in trainer.stream.step(0)]
    chosen: list[Document] = []
    for document in first:
        if sum(map(len, chosen)) + len(document) <= TOKENS:
            chosen.append(document)
    if len(chosen) < 2:
        pair = first[:2] if len(first) > 1 else first * 2
        chosen = [crop(d, TOKENS // 2) for d in pair]
    return chosen


def crop(document: Document, length: int) -> Document:
    """At most ``length`` tokens around the first target of ``document``."""
    start = max(0, min(int(document.targets.argmax()) - length // 2, len(document) - length))
    return document.part(start, start + length)


def trainable(model: CausalLM) -> Verdict:
    trained = model.trainable().values()
    count = sum(p.numel() for p in trained)
    figure = f"{count:,} of {sum(p.numel() for p in model.parameters()):,} parameters in {len(trained)} tensors"
    return Verdict("something is trainable", count > 0, figure, "check adapter.targets")


def targets(documents: Sequence[Document]) -> Verdict:
    count, tokens = sum(d.target_count for d in documents), sum(map(len, documents))
    advice = "check data.format, and that the rows hold answers"
    return Verdict("targets exist", count > 0, f"{count} of {tokens} probe tokens are targets", advice)


def stops(documents: Sequence[Document], stop_ids: frozenset[int]) -> Verdict:
    """Every complete trained turn must end in a token that ends an answer, and that token be trained."""
    turns = 0
    bad = []
    for document in documents:
        turns += len(document.ends)
        last = ((int(document.tokens[end]), bool(document.targets[end])) for end in document.ends)
        bad += [(document.row, token) for token, trained in last if not (trained and token in stop_ids)]
    figure = f"{turns - len(bad):,} of {turns:,} turns" + (f" (not: row {bad[0][0]})" if bad else "")
    tokens = sorted({token for _, token in bad} - stop_ids)
    advice = (
        f"add {tokens} to eos_token_id in generation_config.json if that is what ends an answer"
        if tokens
        else "the chat template must end an answer in a stop token"
    ) + "; a model that is not trained to stop never stops"
    return Verdict("trained turns end in a stop token", not bad, figure, advice)


@contextmanager
def restored(trainer: Trainer) -> Iterator[None]:
    """Put weights, gradients, optimizer state, random state and mode back, whatever happens inside."""
    model, optimizer = trainer.model, trainer.optimizer
    weights = {n: p.detach().clone() for n, p in model.trainable().items()}
    state, rates = optimizer.state, [g["lr"] for g in optimizer.param_groups]
    training = model.training
    optimizer.state = defaultdict(dict)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            optimizer.state = state
            model.zero_grad(set_to_none=True)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            with torch.no_grad():
                for name, p in model.trainable().items():
                    p.copy_(weights[name])
            model.train(training)


def _probes(trainer: Trainer) -> bool:
    """Whether the optimizer takes no gradient: then none is taken here, which would need more memory than its steps."""
    return bool(getattr(trainer.optimizer, "probes", False))


def probed(trainer: Trainer, documents: Sequence[Document]) -> list[Verdict]:
    """``moved`` of an optimizer that takes no gradient: one step at the peak rate."""
    model, batch = trainer.model, Batch.of(documents, trainer.model.device)
    before = fingerprints(model.model)
    set_rate(trainer.optimizer, enough(trainer.optimizer))
    loss = differentiate(trainer.optimizer, model, trainer.objective, [batch]).total
    norm, _ = norms_of(trainer.optimizer, list(model.trainable().values()))
    slope = Verdict(
        "the slope along a random direction is finite",
        bool(norm.isfinite()),
        f"loss {float(loss):.4f}, estimate of norm {float(norm):.1e}; no gradient is taken, so none is checked",
        "a NaN wants a smaller optimizer.radius or another precision",
    )
    if slope.passed:
        take_step(trainer.optimizer, loss)
    return [slope, *integrity(model.model, before)] if slope.passed else [slope]


def moved(trainer: Trainer, documents: Sequence[Document]) -> list[Verdict]:
    """Take two steps at the peak rate, after those that the optimizer waits: gradients where they can be, movement
    where it must be."""
    model, batch = trainer.model, Batch.of(documents, trainer.model.device)
    before = fingerprints(model.model)
    model.eval()  # dropout would hide a gradient by chance
    set_rate(trainer.optimizer, enough(trainer.optimizer))
    called = _called(model, batch)
    seen: dict[str, bool] = {}
    finite = True
    for _ in range(2 + getattr(trainer.optimizer, "waits", 0)):
        trainer.model.zero_grad(set_to_none=True)
        loss = differentiate(trainer.optimizer, model, trainer.objective, [batch]).total
        for name, p in model.trainable().items():
            finite = finite and (p.grad is None or bool(torch.isfinite(p.grad).all()))
            seen[name] = seen.get(name, False) or (p.grad is not None and bool(p.grad.any()))
        take_step(trainer.optimizer, loss)
    idle = [n for n, ok in seen.items() if not ok and _unrouted(model, n, called)]
    dead = [n for n, ok in seen.items() if not ok and n not in idle]
    figure = f"{sum(seen.values())} of {len(seen)} tensors"
    figure += f" (not: {dead[0]})" if dead else ""
    figure += f"; {len(idle)} belong to experts that this batch was not routed to ({idle[0]}, ...)" if idle else ""
    gradient = Verdict(
        "every trained tensor gets a finite gradient",
        finite and not dead,
        figure if finite else "a gradient is NaN or infinite",
        "check that the tensor takes part in the forward; a NaN wants a lower rate or another precision",
    )
    return [gradient, *integrity(model.model, before, idle)]


@torch.no_grad()
def _called(model: CausalLM, batch: Batch) -> set[nn.Module]:
    called: set[nn.Module] = set()
    hooks = [m.register_forward_hook(lambda m, _a, _o: called.add(m)) for m in model.modules()]
    try:
        with model.autocast():
            model(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return called


def _unrouted(model: CausalLM, name: str, called: set[nn.Module]) -> bool:
    """Is the tensor inside an entry of a module list that was not called while a sibling was?"""
    parts = name.split(".")
    for i in range(1, len(parts)):
        parent = model.get_submodule("model." + ".".join(parts[:i]))
        if isinstance(parent, nn.ModuleList):
            child = parent[int(parts[i])]
            if child not in called and any(m in called for m in parent):
                return True
    return False


@torch.no_grad()
def parity(model: CausalLM, trainer: Trainer, documents: Sequence[Document]) -> list[Verdict]:
    """Our loss against logits of the plain Hugging Face model, one document at a time, eager attention; and the router
    loss, if there is one, against its own."""
    model.eval()
    batch = Batch.of(documents, model.device)
    terms, router = trainer.objective(model, batch), trainer.objective.router
    plain: list[Tensor] = []
    balance = 0.0
    weights = (batch.labels != IGNORE).float() if batch.weights is None else batch.weights
    columns = (column.split(batch.lengths) for column in (batch.tokens, batch.labels, weights))
    with judged_base(model.hf), model.as_published("eager") as hf, unfused(hf), model.autocast():
        for tokens, labels, weight in zip(*columns, strict=True):
            out = hf(input_ids=tokens[None], use_cache=False, **({"output_router_logits": True} if router else {}))
            logits, chosen = out.logits[0].float(), labels != IGNORE
            plain.append(F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")[chosen])
            if router:
                balance += router.coefficient * float(out.aux_loss * weight.sum())
    theirs = torch.cat(plain).double()
    pairs = {"loss": (float(terms.losses.double().mean()), float(theirs.mean()))}
    if terms.router is not None:
        count = trainer.objective.count(batch)
        pairs["router loss"] = (float(terms.router) / count, balance / count)
    bound = LOSS_BOUND[model.dtype]
    advice = "this model is not computed rightly here; please report it with its config"
    verdicts = []
    for name, (mine, plainly) in pairs.items():
        difference = off(mine, plainly)
        figure = f"{mine:.4f} against {plainly:.4f}: {difference:.1e} relative, bound {bound:.0e}"
        verdicts.append(Verdict(f"{name} equals plain Hugging Face", difference <= bound, figure, advice))
    return verdicts


def neighbours(model: CausalLM, trainer: Trainer, documents: Sequence[Document]) -> list[Verdict]:
    """My loss and gradient, nothing left out, beside neighbours of other content, length and order, against mine
    alone."""
    mine, other = documents[0], documents[1]
    generator = np.random.default_rng(0)
    stranger = replace(other, tokens=generator.permutation(other.tokens), targets=np.zeros_like(other.targets))
    short = stranger.part(0, len(other) // 2 + 1)
    model.eval()
    loss, gradient = _mine(model, trainer, [mine])
    worst_loss, worst_gradient = 0.0, 0.0
    for pack in ([mine, stranger], [short, mine], [stranger, mine, short]):
        got, g = _mine(model, trainer, pack)
        worst_loss = max(worst_loss, off(got, loss))
        worst_gradient = max(worst_gradient, distance(g, gradient))
    advice = "documents leak into each other; please report the model's config"
    return _unchanged("neighbours do not change my", model.dtype, worst_loss, worst_gradient, advice, _probes(trainer))


def filtering(model: CausalLM, trainer: Trainer, documents: Sequence[Document]) -> Verdict:
    """The gradient as it is trained with, which leaves out what is small, against all of it."""
    model.eval()
    batches, bound = [Batch.of(documents, model.device)], GRADIENT_BOUND[model.dtype]
    found: list[list[Tensor | None]] = []
    for objective in (trainer.objective, trainer.objective.exact):
        trainer.model.zero_grad(set_to_none=True)
        accumulate(model, objective, batches)
        found.append([p.grad for p in model.trainable().values()])
    changed = distance(*found)
    advice = "too much of this model's gradient is small; remove train.filtered_loss"
    figure = f"{changed:.1e} relative, bound {bound:.0e}"
    return Verdict("filtering hardly changes the gradient", changed <= bound, figure, advice)


def shared_prefix(model: CausalLM, trainer: Trainer) -> list[Verdict]:
    """Loss and gradient of two documents of the first step that begin alike, that computed once, against twice.

    The two that are shortest together; there must be some that share.
    """
    members = [trainer.documents[i] for i in trainer.stream.step(0)]
    pair = min(sharing_pairs(members), key=lambda pair: sum(map(len, pair)))
    model.eval()
    loss, gradient = _mine(model, trainer, pair)
    got, g = _mine(model, trainer, pair, shares=True)
    advice = "set TRUETUNE_OFF=shared_prefixes to train without it, and please report the model's config"
    found = off(got, loss), distance(g, gradient)
    return _unchanged("shared prefixes do not change the", model.dtype, *found, advice, _probes(trainer))


def _unchanged(
    what: str, dtype: torch.dtype, loss: float, gradient: float, advice: str, without: bool
) -> list[Verdict]:
    """without: whether no gradient was taken, of which then nothing is said."""
    figures = (("loss", loss, LOSS_BOUND[dtype]), ("gradient", gradient, GRADIENT_BOUND[dtype]))[: 1 if without else 2]
    return [
        Verdict(f"{what} {name}", found <= bound, f"{found:.1e} relative, bound {bound:.0e}", advice)
        for name, found, bound in figures
    ]


def _mine(
    model: CausalLM, trainer: Trainer, pack: Sequence[Document], shares: bool = False
) -> tuple[float, list[Tensor | None]]:
    trainer.model.zero_grad(set_to_none=True)
    batches = [Batch.of(pack, model.device, shares)]
    if _probes(trainer):
        return float(mean_loss(model, trainer.objective.exact, batches)), []
    loss = float(accumulate(model, trainer.objective.exact, batches))
    return loss, [p.grad for p in model.trainable().values()]  # the next one gets tensors of its own


def off(loss: float, truth: float) -> float:
    """The difference relative to ``truth``, or to 1 nat where that is more: what a rounded logit does to a loss does
    not shrink with the loss, so a model that knows its rows by heart would fail any other bound."""
    return abs(loss - truth) / max(abs(truth), 1.0)


def distance(a: Sequence[Tensor | None], b: Sequence[Tensor | None]) -> float:
    """Relative L2 distance of two gradients."""
    off = sum(
        float((x - y).double().square().sum()) for x, y in zip(a, b, strict=True) if x is not None and y is not None
    )
    size = sum(float(y.double().square().sum()) for y in b if y is not None)
    lost = any((x is None) != (y is None) for x, y in zip(a, b, strict=True))
    return math.inf if lost else math.sqrt(off / max(size, 1e-30))
