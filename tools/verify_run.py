"""Recomputes the figures of a finished run with plain transformers and PEFT, importing nothing of Truetune.

    python tools/verify_run.py [RUN]          the newest run under runs/ by default

From the base model, the exported weights and the rows in RUN/data it recomputes: token and target counts, the
held-out loss before and after, and the first step's loss; and it shows what the adapter does. Documents are
taken one at a time, targets are found by rendering, and the loss is a plain sum of cross-entropies.
Exit status 1 when a figure disagrees with run.json by more than 1e-3 relative (counts: by anything).
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers import logging as transformers_logging

TOLERANCE = 1e-3
warnings.simplefilter("ignore", FutureWarning)
transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()

Spans = tuple[list[int], list[bool]]


def render(tokenizer: Any, messages: list[dict], **options: Any) -> list[int]:
    text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def conversation(tokenizer: Any, messages: list[dict], stops: set[int], context: int = 0) -> Spans:
    """Ids, and which are targets: what each assistant turn after ``context`` adds, through its stop token."""
    ids = render(tokenizer, messages)
    targets = [False] * len(ids)
    for i, message in enumerate(messages):
        if message["role"] == "assistant" and i >= context:
            start = len(render(tokenizer, messages[:i], add_generation_prompt=True))
            end = len(render(tokenizer, messages[: i + 1]))
            ending = [k for k in range(start, end) if ids[k] in stops]
            end = ending[-1] + 1 if ending else end
            targets[start:end] = [True] * (end - start)
    return ids, targets


def document(tokenizer: Any, row: dict, stops: set[int]) -> Spans:
    if "messages" in row:
        return conversation(tokenizer, row["messages"], stops)
    if "prompt" in row and tokenizer.chat_template:
        turns = [row["prompt"], row["completion"]]
        if isinstance(turns[0], str):
            turns = [[{"role": r, "content": t}] for r, t in zip(("user", "assistant"), turns, strict=True)]
        return conversation(tokenizer, turns[0] + turns[1], stops, context=len(turns[0]))
    ids = tokenizer(row.get("prompt", "") + row.get("completion", row.get("text", "")))["input_ids"]
    ids += [] if ids[-1] == tokenizer.eos_token_id else [tokenizer.eos_token_id]
    start = len(tokenizer(row["prompt"])["input_ids"]) if "prompt" in row else 1
    return ids, [k >= max(start, 1) for k in range(len(ids))]


@torch.no_grad()
def measure(model: Any, documents: list[Spans]) -> float:
    """Mean cross-entropy over all targets, one document at a time, in fp32."""
    total, count = 0.0, 0
    for ids, targets in documents:
        tokens = torch.tensor([ids])
        logits = model(input_ids=tokens, use_cache=False).logits[0, :-1]
        chosen = torch.tensor(targets[1:])
        losses = torch.nn.functional.cross_entropy(logits[chosen], tokens[0, 1:][chosen], reduction="sum")
        total, count = total + float(losses), count + int(chosen.sum())
    return total / count


def main(run: Path) -> int:
    facts = json.loads((run / "run.json").read_text())
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    first = next(r for r in records if r["kind"] == "step")
    before, after = facts["result"]["before"], facts["result"]["after"]
    base = facts["model"]["path"]
    dtype = getattr(torch, facts["model"]["precision"])
    adapted = (run / "adapter").is_dir()
    # A frozen base is trained as rounded to its precision; its losses are recomputed in fp32 all the same.
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype if adapted else torch.float32).float().eval()
    tokenizer = AutoTokenizer.from_pretrained(run / ("adapter" if adapted else "model"))
    ends = model.generation_config.eos_token_id
    stops = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
    longest = facts["recipe"]["data"]["max_length"]
    sets: dict[str, list[Spans]] = {}
    for name in ("evaluation", "first_step"):
        rows = [json.loads(line) for line in (run / "data" / f"{name}.jsonl").read_text("utf-8").splitlines()]
        pairs = [document(tokenizer, row, stops) for row in rows]
        sets[name] = [(ids[:longest], targets[:longest]) for ids, targets in pairs]
    held_out = sets["evaluation"]
    lines = [
        ("held-out tokens", before["tokens"], sum(len(i) for i, _ in held_out), 0.0),
        ("held-out targets", before["targets"], sum(sum(t) for _, t in held_out), 0.0),
        ("first step's tokens", first["tokens"], sum(len(i) for i, _ in sets["first_step"]), 0.0),
        ("first step's targets", first["targets"], sum(sum(t) for _, t in sets["first_step"]), 0.0),
        ("held-out loss before", before["loss"], measure(model, held_out), TOLERANCE),
    ]
    dropout = [v for k, v in model.config.to_dict().items() if ("drop" in k or "pdrop" in k) and isinstance(v, float)]
    if not any([*dropout, facts["recipe"]["adapter"]["dropout"]]):  # a loss under dropout can't be recomputed
        loss = measure(model, sets["first_step"])
        lines.append(("first step's loss", first["loss"], loss, TOLERANCE))
    probe = torch.tensor([held_out[0][0]])
    plain = model(input_ids=probe).logits.detach()
    if adapted:
        model = PeftModel.from_pretrained(model, run / "adapter").eval()
    else:
        model = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32).eval()
    lines.append(("held-out loss after", after["loss"], measure(model, held_out), TOLERANCE))
    effect = float((model(input_ids=probe).logits.detach() - plain).abs().max())
    good = effect > 0
    print(f"{run}: recomputed without Truetune\n{'':24}{'the run said':>14}{'recomputed':>14}")
    for name, said, found, tolerance in lines:
        agrees = abs(said - found) <= tolerance * abs(found)
        good = good and agrees
        print(f"{name:24}{said:14.6g}{found:14.6g}  {'agrees' if agrees else 'DISAGREES'}")
    print(f"{'training moves logits by':24}{'':14}{effect:14.6g}  {'' if effect > 0 else 'NOTHING WAS LEARNED'}")
    return 0 if good else 1


if __name__ == "__main__":
    runs = sorted((p.parent for p in Path("runs").glob("*/run.json")), key=lambda p: p.stat().st_mtime)
    if len(sys.argv) < 2 and not runs:
        sys.exit("there is no run under runs/; name a run folder")
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else runs[-1]))
