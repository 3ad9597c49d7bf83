"""A synthetic run folder, with rows that try to break out of the page."""

import json
import math
import random

import pytest
import yaml

from truetune.training.record import (
    Alarm,
    Checks,
    Evaluation,
    Sample,
    Samples,
    Saved,
    Step,
    Verdict,
    as_json,
)
from truetune.training.sinks import JsonLines

HOSTILE = (
    "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>"
    "</text></svg><svg onload=alert(2)> \x1b[31mred\x1b]0;t\x07 \u202eevil ]]> `` ``` {{ 7*7 }} | a & b"
    "\ud800 https://evil.example www.evil.example"
)
STEPS = 70


def rate(step: int) -> float:
    return 5e-4 * min(1, step / 4) * (1 - max(0, step - 4) / (STEPS - 4))


def evaluation(step: int, loss: float, best: bool = False) -> Evaluation:
    return Evaluation(step, loss, math.exp(loss), 0.42 - 0.05 * (loss - 3.2), 13_400, 5_020, 6.1, best)


def verdicts(*failing: str) -> tuple[Verdict, ...]:
    figures = {
        "labels shift": "0 of 4,812 labels differ from the next token",
        "chat template": "8 of 8 rendered prompts come back unchanged",
        "stop token": "3,620 of 3,620 trained turns end in a trained stop token",
        "packing": "perturbed neighbour changes the loss by 0, bound 0",
        "gradient": "largest relative difference 2.1e-06, bound 1.0e-05",
        "weights moved": "420 of 420 trainable tensors moved and are finite",
        "reload": "largest logit difference 0, bound 0.001",
    }
    return tuple(
        Verdict(n, n not in failing, f, "lower data.max_length, then run truetune check") for n, f in figures.items()
    )


def samples(step: int, answers: list[str], stopped: bool, hostile: bool) -> Samples:
    asked = [
        "What does `textwrap.dedent(text)` do?",
        "Explain os.path.commonpath.",
        "What does heapq.nlargest do?",
    ]
    right = [
        "Remove any common leading whitespace from every line in `text`.",
        "Given a sequence of path names, returns the longest common sub-path.",
        "Find the n largest elements in a dataset.",
    ]
    made = [Sample(q, r, a, stopped) for q, r, a in zip(asked, right, answers, strict=True)]
    if hostile:
        made.append(Sample(HOSTILE, HOSTILE, HOSTILE * (1 if stopped else 30), stopped))
    return Samples(step, tuple(made))


def records(hostile: bool, steps: int, failing: tuple[str, ...]) -> list:
    noise = random.Random(0)
    void = bool(failing)
    found: list = [
        Checks(0, verdicts(*failing), HOSTILE + "⟦" if hostile else "<|user|>What?\n⟦Remove & trim.<|end|>⟧")
    ]
    long = (
        "The `textwrap.dedent(text)` function in Python is a built-in function that is used to remove any "
        "leading whitespace from a string. It takes a string as argument and returns a new string with the "
        "same content but without any leading whitespace. Here is an example:\n\nimport textwrap\n"
        "text = '''\n    hello\n    '''"
    )
    found += [evaluation(0, 3.587), samples(0, [long, long[:180], long[4:150]], False, hostile)]
    for step in range(1, steps + 1):
        loss = 2.75 + 0.95 * math.exp(-step / 18) + noise.gauss(0, 0.11)
        norm = 0.9 + 2.2 * math.exp(-step / 10) + abs(noise.gauss(0, 0.2))
        seconds = 0.95 + abs(noise.gauss(0, 0.06))
        tokens = 700 + noise.randrange(90)
        speed = None if void else tokens / seconds
        memory = int((1.1 + 0.25 * (1 - math.exp(-step / 3))) * 2**30)
        found.append(
            Step(
                step,
                loss,
                rate(step),
                rate(step),
                norm,
                tokens,
                tokens * 37 // 100,
                10,
                1,
                seconds,
                memory,
                speed,
            )
        )
        if step % 18 == 0 or step == steps:
            found.append(evaluation(step, 2.86 + 0.73 * math.exp(-step / 20), True))
            found.append(Saved(step, f"checkpoints/{step:06d}", "end" if step == steps else "schedule"))
    if hostile and steps:
        found.append(Alarm(min(40, steps), HOSTILE, HOSTILE, voids=False))
    if steps == STEPS:
        short = [
            "Remove leading whitespace from each line.",
            "Return the longest common path.",
            "Return a list.",
        ]
        found.append(samples(steps, short, True, hostile))
    return found


def run_json(hostile: bool, steps: int, failing: tuple[str, ...]) -> dict:
    text = HOSTILE if hostile else "python-docs"
    part = {
        "source": text,
        "format": "messages",
        "digest": "b1946ac92492d2347c6235b4d2611184" * 2,
        "template": "60303ae22b998861bce3b28f" * 2,
        "rows": 3980,
        "documents": 3620,
        "tokens": 272_000,
        "targets": 100_240,
        "truncated": 12,
        "targets_cut": 87,
        "dropped": {"no targets": 3, text: 2},
        "shortest": 31,
        "median": 73.0,
        "mean": 75.2,
        "longest": 212,
        "tokens_by_role": {"template": 87_000, "user": 84_760, "assistant": 100_240, text: 10},
        "targets_by_role": {"assistant": 100_240},
    }
    held_out = {"rows": 360, "documents": 200, "tokens": 13_400, "targets": 5020, "truncated": 0}
    speed, targets_speed = (None, None) if failing else (771.4, 285.4)
    return {
        "format": 1,
        "truetune": "0.1.0",
        "name": f"docs {HOSTILE}" if hostile else "python-docs-lora",
        "started": "2026-10-02T14:03:22+00:00",
        "finished": "2026-10-02T14:06:01+00:00",
        "status": "finished",
        "command": "truetune train recipe.yaml optimizer.rate=5e-4",
        "recipe": {
            "model": {"path": "acme/tiny-chat"},
            "data": {"source": text, "max_length": 1024},
            "adapter": {
                "method": "lora",
                "rank": 16,
                "alpha": 32.0,
                "dropout": 0.0,
                "targets": "all-linear",
                "lora_plus_ratio": 1.0,
            },
            "optimizer": {"name": "adamw", "rate": 5e-4, "weight_decay": 0.01},
            "schedule": {"name": "linear", "warmup": 0.06},
            "train": {"tokens_per_step": 768, "clip": 1.0, "seed": 0},
        },
        "environment": {
            "python": "3.11.2",
            "torch": "2.13.0+cpu",
            "transformers": "5.23.0",
            "peft": "0.21.0",
            "platform": "Linux 6.1 x86_64",
            "cpu": "AMD EPYC 9R14",
            "cores": 2,
            "threads": 2,
            "memory_bytes": 16 * 2**30,
            "device": "cpu",
        },
        "model": {
            "path": "/home/someone/models/tiny-chat",
            "source": "acme/tiny-chat",
            "sha256": "9f86d081884c7d659a2feaa0" * 2,
            "family": "llama",
            "parameters": 139_400_000,
            "trainable": 4_884_480,
            "precision": "bf16",
            "route": "documents",
            "template_sha256": "60303ae22b998861bce3b28f" * 2,
            "license": "apache-2.0",
        },
        "data": {"train": part, "evaluation": part | held_out},
        "plan": {
            "steps": STEPS,
            "tokens": 54_000,
            "targets": 19_980,
            "epochs": 0.2,
            "schedule": [[step, rate(step)] for step in range(1, STEPS + 1)],
        },
        "result": {
            "before": as_json(evaluation(0, 3.587)),
            "after": as_json(evaluation(steps, 2.882)),
            "steps": steps,
            "tokens": 54_120,
            "targets": 20_024,
            "seconds": 70.2,
            "tokens_per_second": speed,
            "targets_per_second": targets_speed,
            "peak_memory": int(1.39 * 2**30),
        },
        "exports": [
            {"kind": "adapter", "path": "runs/x/adapter", "difference": 0.0, "bound": 1e-3, "passed": True},
            {"kind": "merged", "path": "runs/x/merged", "difference": 3.1e-4, "bound": 1e-3, "passed": True},
        ],
        "verdicts": [],
        "void": failing[0] if failing else None,
        "next": ["truetune ask runs/python-docs-lora", "truetune prove runs/python-docs-lora"],
    }


@pytest.fixture
def make_run(tmp_path):
    """make_run(hostile, steps, failing, facts=change(run.json) or None) -> run folder."""

    def make(hostile=False, steps=STEPS, failing=(), facts=lambda facts: facts, name="run"):
        folder = tmp_path / name
        folder.mkdir()
        lines = JsonLines(folder / "metrics.jsonl")
        for record in records(hostile, steps, failing):
            lines.write(record)
        lines.close()
        summary = facts(run_json(hostile, steps, failing)) if facts else None
        if summary is not None:
            (folder / "run.json").write_text(json.dumps(summary))
            (folder / "recipe.yaml").write_text(yaml.safe_dump(summary.get("recipe", {}), sort_keys=False))
        return folder

    return make
