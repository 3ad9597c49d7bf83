"""Held-out loss, perplexity and accuracy; only scalars are kept, whatever the size of the set."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence

import torch

from truetune.data.batch import Batch, Document
from truetune.data.packing import best_fit_decreasing
from truetune.models.base import original_weights
from truetune.models.generate import answer
from truetune.models.load import Loaded
from truetune.models.wrap import CausalLM
from truetune.objectives import Objective
from truetune.training.record import Evaluation, Sample, Samples

PROMPT_OF_TEXT = 16
"""Tokens of a plain text (a document without a prompt) that are given as its prompt."""


class Evaluator:
    """Loss per target token over ``documents``, packed into batches of at most ``capacity`` tokens; no weights.

    A base that is trained upon in 8 or 4 bits is its original here: that is what the adapter will stand on.

    sources: name of a source -> places of its documents; where there are several, each has its own loss as well.
    """

    def __init__(
        self,
        documents: Sequence[Document],
        capacity: int,
        objective: Objective,
        sources: Mapping[str, range] | None = None,
    ) -> None:
        self.documents = documents
        self.objective = objective
        self.sources = sources if sources and len(sources) > 1 else {}
        self.packs = best_fit_decreasing([len(d) for d in documents], capacity)

    @torch.no_grad()
    def __call__(self, model: CausalLM, step: int) -> Evaluation:
        started = time.perf_counter()
        training = model.training
        model.eval()
        total, count, right, tokens = 0.0, 0, 0, 0
        of_document: dict[int, tuple[float, int]] = {}
        with original_weights(model):
            for pack in self.packs:
                batch = Batch.of([self.documents[i] for i in pack], model.device)
                terms = self.objective(model, batch)
                total += float(terms.losses.double().sum())
                right += int(terms.correct.sum())
                count += len(terms.losses)
                tokens += len(batch.tokens)
                counts = [self.documents[i].target_count for i in pack]
                sums = [float(part.double().sum()) for part in terms.losses.split(counts)]
                of_document |= dict(zip(pack, zip(sums, counts, strict=True), strict=True))
        model.train(training)
        loss = total / count
        perplexity = math.exp(loss) if loss < 700 else math.inf
        seconds = time.perf_counter() - started
        return Evaluation(
            step=step,
            loss=loss,
            perplexity=perplexity,
            accuracy=right / count,
            tokens=tokens,
            targets=count,
            seconds=seconds,
            documents=len(of_document),
            error=standard_error(list(of_document.values())),
            by_source={name: _mean([of_document[i] for i in places]) for name, places in self.sources.items()},
        )


def _mean(documents: Sequence[tuple[float, int]]) -> float:
    """Of (sum of losses, targets) of documents, the loss per target."""
    return sum(total for total, _ in documents) / sum(count for _, count in documents)


def standard_error(documents: Sequence[tuple[float, float]]) -> float | None:
    """Standard error of the loss per target, from (sum of losses, targets) of each document; None for fewer than two.

    Documents, not tokens, are what was drawn, so the loss is a ratio of two sums over a sample of documents; the
    variance of such a ratio, linearised (Cochran, Sampling Techniques, chapter 6), is
    m / (m - 1) * sum((l_i - L n_i)^2) / (sum n_i)^2.
    """
    m = len(documents)
    if m < 2:
        return None
    count = sum(n for _, n in documents)
    loss = sum(total for total, _ in documents) / count
    return math.sqrt(m / (m - 1) * sum((total - loss * n) ** 2 for total, n in documents)) / count


class Sampler:
    """Greedy answers to what precedes the first target of each document.

    questions: what each document asks, for people to read; where it is empty, its first tokens are shown.
    """

    def __init__(
        self, loaded: Loaded, documents: Sequence[Document], questions: Sequence[str], max_tokens: int
    ) -> None:
        self.tokenizer, self.stop_ids, self.max_tokens = loaded.tokenizer, loaded.stop_ids, max_tokens
        self.documents, self.questions = documents, questions

    def __call__(self, model: CausalLM, step: int) -> Samples:
        pairs = zip(self.documents, self.questions, strict=True)
        return Samples(step, tuple(self._sample(model, d, q) for d, q in pairs))

    def _sample(self, model: CausalLM, document: Document, question: str) -> Sample:
        first = int(document.targets.argmax())
        first = first if first > 1 else min(PROMPT_OF_TEXT, len(document) // 2)
        rest = document.targets[first:]
        length = len(rest) if rest.all() else int((~rest).argmax())
        prompt = [int(t) for t in document.tokens[:first]]
        with model.as_published() as hf, model.autocast():
            tokens, stopped = answer(hf, prompt, self.max_tokens, self.stop_ids)

        def text(ids: Sequence[int]) -> str:
            return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

        reference = document.tokens[first : first + length].tolist()
        return Sample(question or text(prompt), text(reference), text(tokens), stopped)
