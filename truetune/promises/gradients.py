"""Promises about one gradient: however a step is split, whoever stands beside, and against Hugging Face's own.

The reference of parity is written here once more, from the documents: it shares neither batches, nor labels, nor
attention, nor loss with what is trained. Where training filters its gradient, these are of all of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from truetune.checks.preflight import distance, off
from truetune.data.batch import Batch, Document
from truetune.data.packing import best_fit_decreasing
from truetune.models.adapt import unfused
from truetune.models.base import reference_base
from truetune.models.route import disproof
from truetune.models.router import Router
from truetune.models.wrap import CausalLM
from truetune.objectives import Objective
from truetune.promises.ground import EXACT, Ground
from truetune.training.gradient import accumulate
from truetune.training.record import Verdict

Gradient = list[Tensor | None]


def accumulation(ground: Ground) -> Verdict:
    """Any split of a step into micro-batches gives the big batch's loss and gradient."""
    documents = ground.documents
    half = best_fit_decreasing([len(d) for d in documents], max(len(d) for d in documents))
    shuffled = [documents[i] for i in np.random.default_rng(0).permutation(len(documents))]
    splits = {
        "one by one": [[d] for d in documents],
        "packed": [[documents[i] for i in members] for members in half],
        "a short last one": [documents[:-1], documents[-1:]],
        "in another order": [shuffled[:1], shuffled[1:]],
    }
    truth = measure(ground.twin, ground.trainer.objective.exact, [documents])
    found = {name: measure(ground.twin, ground.trainer.objective.exact, packs) for name, packs in splits.items()}
    return _close(ground, truth, found, "of the big batch's", "a micro-batch does not weigh what its targets weigh")


def isolation(ground: Ground) -> Verdict:
    """Neighbours of other content, length, order and number change neither my loss nor my gradient."""
    twin, objective = ground.twin, ground.trainer.objective.exact
    mine, other, third = ground.documents[:3]
    a, b = stranger(other, 0), stranger(third, 1)
    short = a.part(0, len(a) // 2 + 1)
    length = 2 * len(mine) + len(a)
    long = replace(a, tokens=np.resize(a.tokens, length), targets=np.resize(a.targets, length))
    packs = {
        "content": [mine, a],
        "order": [b, mine],
        "length": [short, mine],
        "a longer one": [long, mine],
        "number": [a, mine, b, short],
    }
    truth = measure(twin, objective, [[mine]])
    found = {name: measure(twin, objective, [pack]) for name, pack in packs.items()}
    advice = "documents leak into each other; please report the model's config"
    verdict = _close(ground, truth, found, "of mine alone", advice)
    # Windows and limits of positions are longer than these documents; on a small copy they are made shorter.
    fault = disproof(twin.hf, twin.tail.decoder, twin.route)
    if fault:
        return replace(verdict, passed=False, figure=f"on a small copy with short windows, {fault}")
    return verdict


def parity(ground: Ground) -> Verdict:
    """Loss and gradient equal plain Hugging Face's, and what was exported gives the live model's logits."""
    model, objective, documents = ground.trainer.model.eval(), ground.trainer.objective.exact, ground.documents
    truth = plain(ground.twin, documents, objective.router)
    found = {"float64" if ground.exact else "one batch": measure(ground.twin, objective, [documents])}
    advice = "this model is not computed rightly here; please report it with its config"
    # Eager attention takes its softmax in fp32, whatever the weights are.
    verdict = _close(ground, truth, found, "of plain Hugging Face's", advice, slack=10 if ground.exact else 1)
    if ground.exact:
        # As it is trained, our error may be twice the plain one's: the rest is what rounding does by chance.
        with reference_base(model.hf):
            beside = plain(model, documents, objective.router)
        ours, theirs = (distance(g, truth[1]) for _, g in (measure(model, objective, [documents]), beside))
        dtype, bound = str(model.dtype).removeprefix("torch."), 2 * theirs + EXACT
        dtype += f" over {ground.recipe.model.base}" if ground.recipe.model.base else ""
        told = f"{verdict.figure}; in {dtype} its error is {ours:.1e}, plain {theirs:.1e} (bound {bound:.0e})"
        verdict = replace(verdict, passed=verdict.passed and ours <= bound, figure=told)
    exports = ground.run.facts["exports"]
    told = ", ".join(f"{e['kind']} {e['difference']:.1e} (bound {e['bound']:.1e})" for e in exports)
    passed = verdict.passed and bool(exports) and all(e["passed"] for e in exports)
    return replace(verdict, passed=passed, figure=f"{verdict.figure}; exported logits: {told or 'none'}")


def stranger(document: Document, seed: int) -> Document:
    """Its tokens in another order, and nothing to learn."""
    tokens = np.random.default_rng(seed).permutation(document.tokens)
    return replace(document, tokens=tokens, targets=np.zeros_like(document.targets), ends=(), weights=None)


def measure(model: CausalLM, objective: Objective, packs: Sequence[Sequence[Document]]) -> tuple[float, Gradient]:
    """The loss over the step that ``packs`` make up, and its gradient, by the code that trains."""
    model.zero_grad(set_to_none=True)
    loss = float(accumulate(model, objective, [Batch.of(pack, model.device) for pack in packs]))
    return loss, _taken(model)


def plain(model: CausalLM, documents: Sequence[Document], router: Router | None = None) -> tuple[float, Gradient]:
    """The same from logits of the plain Hugging Face model, one document at a time, eager attention.

    A router loss is the model's own of each document, by the document's targets.
    """
    model.zero_grad(set_to_none=True)
    weights = [np.ones(len(d), np.float32) if d.weights is None else d.weights for d in documents]
    count, loss = sum(float(w[d.targets].astype(float).sum()) for d, w in zip(documents, weights, strict=True)), 0.0
    with model.as_published("eager") as hf, unfused(hf):
        for document, weight in zip(documents, weights, strict=True):
            tokens = torch.from_numpy(document.tokens.astype(np.int64)).to(model.device)
            wanted = torch.from_numpy(document.targets[1:]).to(model.device)
            with model.autocast():
                asked = {"output_router_logits": True} if router else {}
                out = hf(input_ids=tokens[None], use_cache=False, **asked)
            logits = out.logits[0, :-1]
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            losses = F.cross_entropy(logits[wanted], tokens[1:][wanted], reduction="none")
            weight_N = torch.from_numpy(weight[1:]).to(model.device)[wanted]
            share = (losses * weight_N).sum() / count
            if router:
                share = share + router.coefficient * out.aux_loss * weight_N.sum() / count
            share.backward()
            loss += float(share.detach())
    return loss, _taken(model)


def _taken(model: CausalLM) -> Gradient:
    gradient = [p.grad for p in model.trainable().values()]
    model.zero_grad(set_to_none=True)
    return gradient


def _close(
    ground: Ground,
    truth: tuple[float, Gradient],
    found: dict[str, tuple[float, Gradient]],
    whose: str,
    advice: str,
    slack: float = 1.0,
) -> Verdict:
    """The worst relative difference of a loss and of a whole gradient (L2) from the truth; ``slack`` on bounds."""
    bound, gradient_bound, dtype = ground.bounds
    bound, gradient_bound = slack * bound, slack * gradient_bound
    worst, worst_gradient, failed = 0.0, 0.0, []
    for name, (loss, gradient) in found.items():
        loss_off, gradient_off = off(loss, truth[0]), distance(gradient, truth[1])
        if not (loss_off <= bound and gradient_off <= gradient_bound):  # a NaN is not within any bound
            failed.append(name)
        worst, worst_gradient = max(loss_off, worst), max(gradient_off, worst_gradient)
    figure = (
        f"loss within {worst:.1e} (bound {bound:.0e}), gradient within {worst_gradient:.1e} "
        f"(bound {gradient_bound:.0e}) {whose}, {dtype}"
    )
    return Verdict("", not failed, figure + (f"; not: {', '.join(failed)}" if failed else ""), advice)
