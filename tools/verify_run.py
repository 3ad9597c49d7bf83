"""Recomputes the figures of a finished run with plain transformers and PEFT, importing nothing of Truetune.

    python tools/verify_run.py [RUN]          the newest run under runs/ by default

From the base model, the exported weights and the rows in RUN/data it recomputes: token and target counts, the
held-out loss before and after, and the first step's loss; and it shows what the adapter does. Documents are
taken one at a time, targets are found by rendering, and the loss is a plain sum of cross-entropies.
All is computed in fp32. Where a run in bfloat16 told a loss that differs by more than 1e-3 relative, the plain
model's is computed under bfloat16 as well: rounding moves each target's loss by chance, so two such means may differ by
three standard errors of what it does to one target, which the line then shows. With few targets that is much. Counts
must be equal. Exit status 1 when a figure disagrees, 2 for what is not known here: weights, tools, unrolled or split
rows, and other formats than messages, prompt-completion and text.
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
COLUMNS = {"messages": "messages", "prompt-completion": "prompt", "text": "text"}
"""The formats of rows that are known here, and the column that each is told by."""
warnings.simplefilter("ignore", FutureWarning)
transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()

Spans = tuple[list[int], list[bool]]
Line = tuple[str, float, float, bool, str]  # figure, what the run said, what was found, whether they agree, a remark


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
def measure(model: Any, documents: list[Spans], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Cross-entropy of every target, one document at a time; ``dtype`` is that of products."""
    found = []
    for ids, targets in documents:
        tokens = torch.tensor([ids])
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            logits = model(input_ids=tokens, use_cache=False).logits[0, :-1].float()
        chosen = torch.tensor(targets[1:])
        found.append(torch.nn.functional.cross_entropy(logits[chosen], tokens[0, 1:][chosen], reduction="none"))
    return torch.cat(found).double()


def compared(name: str, said: float, model: Any, documents: list[Spans], dtype: torch.dtype) -> Line:
    """A mean loss that the run said beside the same recomputed."""
    losses = measure(model, documents)
    found = float(losses.mean())
    if abs(said - found) <= TOLERANCE * found or dtype == torch.float32:
        return name, said, found, abs(said - found) <= TOLERANCE * found, ""
    rounded = measure(model, documents, dtype)
    middle, bound = float(rounded.mean()), 3 * float((rounded - losses).std()) * (2 / len(losses)) ** 0.5
    remark = f"(plain, in {str(dtype).removeprefix('torch.')}: {middle:.6g} ± {bound:.2g} with {len(losses):,} targets)"
    return name, said, found, abs(said - middle) <= bound, remark


def beyond(facts: dict, rows: list[dict]) -> str:
    """What the run did that this verifier does not know how to do; nothing if it knows all."""
    data = facts["recipe"]["data"]
    if facts["model"].get("adapter_from"):
        return "it trained an earlier adapter further"
    formats = {form for side in ("train", "evaluation") for form in facts["data"][side]["format"].split(", ")}
    if any(data.get(key) not in (None, known) for key, known in (("targets", "assistant"), ("too_long", "truncate"))):
        return "it set data.targets or data.too_long"
    if any(
        n
        for part in (facts["data"]["train"], facts["data"]["evaluation"])
        for note, n in part.get("notes", {}).items()
        if "adds" not in note
    ):
        return "its chat template needed more than a plain rendering"
    for row in rows:
        guess = next((form for form, column in COLUMNS.items() if column in row), None)
        if guess not in formats or formats - COLUMNS.keys():
            return "its rows have a format that is not known here"
        turns = row.get("messages") or []
        if row.get("tools") or row.get(data.get("weight_column")):
            return "its rows declare tools or have weights"
        if any(turn.get("tool_calls") or turn.get("weight") is not None for turn in turns):
            return "its rows call tools or have weights"
    return ""


def held_out_losses(when: str, told: dict, model: Any, documents: list[Spans], sources: list, dtype: Any) -> list[Line]:
    """The held-out loss, and that of each source where the run told several."""
    lines = [compared(f"held-out loss {when}", told["loss"], model, documents, dtype)]
    for name, loss in told.get("by_source", {}).items():
        mine = [document for document, source in zip(documents, sources, strict=True) if source == name]
        lines.append(compared(f"  of {name}", loss, model, mine, dtype))
    return lines


def main(run: Path) -> int:
    facts = json.loads((run / "run.json").read_text(encoding="utf-8"))
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
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
    sources: list[str | None] = []
    for name in ("evaluation", "first_step"):
        rows = [json.loads(line) for line in (run / "data" / f"{name}.jsonl").read_text("utf-8").splitlines()]
        if name == "evaluation":
            sources = [row.get("truetune.source") for row in rows]  # told where there are several
        if missing := beyond(facts, rows):
            print(f"{run}: cannot be recomputed here: {missing}")
            return 2
        pairs = [document(tokenizer, row, stops) for row in rows]
        sets[name] = [(ids[:longest], targets[:longest]) for ids, targets in pairs]
    held_out = sets["evaluation"]
    counts = [
        ("held-out tokens", before["tokens"], sum(len(i) for i, _ in held_out)),
        ("held-out targets", before["targets"], sum(sum(t) for _, t in held_out)),
        ("first step's tokens", first["tokens"], sum(len(i) for i, _ in sets["first_step"])),
        ("first step's targets", first["targets"], sum(sum(t) for _, t in sets["first_step"])),
    ]
    lines: list[Line] = [(name, said, found, said == found, "") for name, said, found in counts]
    lines += held_out_losses("before", before, model, held_out, sources, dtype)
    dropout = [v for k, v in model.config.to_dict().items() if ("drop" in k or "pdrop" in k) and isinstance(v, float)]
    if not any([*dropout, facts["recipe"]["adapter"]["dropout"]]):  # a loss under dropout can't be recomputed
        lines.append(compared("first step's loss", first["loss"], model, sets["first_step"], dtype))
    probe = torch.tensor([held_out[0][0]])
    plain = model(input_ids=probe).logits.detach()
    if adapted:
        model = PeftModel.from_pretrained(model, run / "adapter").eval()
    else:
        model = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32).eval()
    lines += held_out_losses("after", after, model, held_out, sources, dtype)
    effect = float((model(input_ids=probe).logits.detach() - plain).abs().max())
    good = effect > 0 and all(agrees for _, _, _, agrees, _ in lines)
    print(f"{run}: recomputed without Truetune\n{'':24}{'the run said':>14}{'recomputed':>14}")
    for name, said, found, agrees, remark in lines:
        print(f"{name:24}{said:14.6g}{found:14.6g}  {'agrees' if agrees else 'DISAGREES'} {remark}".rstrip())
    print(f"{'training moves logits by':24}{'':14}{effect:14.6g}  {'' if effect > 0 else 'NOTHING WAS LEARNED'}")
    return 0 if good else 1


def finished(run: Path) -> bool:
    file = run / "run.json"
    return file.is_file() and json.loads(file.read_text(encoding="utf-8")).get("status") == "finished"


if __name__ == "__main__":
    if len(sys.argv) > 1 and not finished(Path(sys.argv[1])):
        sys.exit(f"{sys.argv[1]} is not the folder of a finished run; usage: python tools/verify_run.py [RUN]")
    runs = sorted((p.parent for p in Path("runs").glob("*/run.json")), key=lambda p: p.stat().st_mtime)
    done = [Path(sys.argv[1])] if len(sys.argv) > 1 else [run for run in runs if finished(run)]
    if not done:
        sys.exit("there is no finished run under runs/; name a run folder")
    sys.exit(main(done[-1]))
