"""The model card: ``README.md`` of an export, in the Hugging Face hub's spelling, from the run folder alone.

What comes from data, model or run is Markdown-escaped. A base model that is no hub id is left out of the
front matter, because the hub refuses a card that names a folder. Samples are left out: they may quote private
rows.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from truetune.report import facts
from truetune.report.folder import Json, Run, explained
from truetune.training.patience import write_text

_MARKS = re.compile(r"[\\`*_\[\]<>|#!~&$@]|(?<=:)//|(?<=www)\.")
_CHAT = """\
messages = [{"role": "user", "content": "Your question"}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
)"""
_TEXT = 'inputs = tokenizer("The beginning of a text", return_tensors="pt")'


def card(run_folder: Path, target: Path) -> Path:
    """Write ``target/README.md`` from the run in ``run_folder`` and return its path.

    ``target`` is the folder of an adapter or of a whole model, already written; or the run folder itself,
    whose card describes the run's first export. Raises UserError where ``run_folder`` is no run folder.
    """
    with explained(run_folder):
        text = render(Run.read(run_folder), target)
    return write_text(target / "README.md", text)


def render(run: Run, target: Path) -> str:
    """The card as Markdown."""
    place = _place(run, target)
    return _template().render(
        run=run,
        facts=facts,
        front=yaml.safe_dump(front(run, _is_adapter(place)), sort_keys=False, allow_unicode=True),
        what=_what(run, place),
        warnings=_warnings(run),
        load=_load(run, place, target),
        table=_table,
        measures=[
            ("Loss (nats per target token)", facts.number, "loss"),
            ("Perplexity", facts.number, "perplexity"),
            ("Next token right", facts.percent, "accuracy"),
        ],
    )


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("truetune.report", "."),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
    )
    environment.filters |= {
        "md": markdown,
        "number": facts.number,
        "percent": facts.percent,
        "count": facts.count,
    }
    return environment.get_template("card.md")


def markdown(text: str) -> str:
    """``text`` as one line of plain Markdown: no mark-up, no HTML, no link, no new table cell."""
    return _MARKS.sub(lambda mark: "".join(f"\\{c}" for c in mark[0]), re.sub(r"[ \t\n]+", " ", text).strip(" "))


def front(run: Run, adapter: bool) -> Json:
    """The YAML front matter. Of the base model and the data only what the hub can know is named."""
    base, source = (
        name if facts.is_hub_id(name) else None
        for name in (run.get("model.source", ""), run.get("data.train.source", ""))
    )
    found = {
        "base_model": base,
        "base_model_relation": ("adapter" if adapter else "finetune") if base else None,
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "license": run.get("model.license"),
        "datasets": [source] if source else None,
        "tags": ["truetune", *(["lora"] if run.get("recipe.adapter.method") == "lora" else [])],
    }
    return {key: value for key, value in found.items() if value is not None}


def _is_adapter(place: Path | None) -> bool:
    return place is not None and (place / "adapter_config.json").is_file()


def _place(run: Run, target: Path) -> Path | None:
    """The folder with the weights that the card describes, None where nothing is exported yet."""
    below = [target / Path(export["path"]).name for export in run.get("exports", [])]
    holds = ("adapter_config.json", "config.json")
    return next((p for p in (target, *below) if any((p / name).is_file() for name in holds)), None)


def _what(run: Run, place: Path | None) -> str:
    base, source = run.get("model.source", run.get("model.path")), run.get("data.train.source")
    name = markdown(facts.called(base)) if base else "a base model that is not recorded"
    made = "A LoRA adapter for" if _is_adapter(place) else "A fine-tuned copy of"
    data = f", trained on {markdown(facts.called(source))}" if source else ""
    return f"{made} {name}{data} with Truetune {markdown(run.get('truetune', ''))}".rstrip() + "."


def _warnings(run: Run) -> list[str]:
    """What whoever loads the model must know first."""
    found = list(run.gaps)
    if run.get("status") != "finished":
        found.append(facts.status(run))
    found += [f"The check “{v['name']}” failed: {v['figure']}." for v in run.failed]
    found += [f"Alarm at step {a['step']:,}: {a['name']}." for a in run.records["alarm"] if a["voids"]]
    found += [f"The export “{e['kind']}”: {e['note']}." for e in run.get("exports", []) if e.get("note")]
    differing = [export["kind"] for export in run.get("exports", []) if not export["passed"]]
    found += [f"The export “{kind}” does not give the trained model's logits." for kind in differing]
    return found


def _load(run: Run, place: Path | None, target: Path) -> str:
    if place is None:
        return ""
    package, name = (
        ("peft", "AutoPeftModelForCausalLM") if _is_adapter(place) else ("transformers", "AutoModelForCausalLM")
    )
    packages = {"transformers": ["AutoTokenizer"]}
    packages.setdefault(package, []).insert(0, name)
    imports = [f"from {p} import {', '.join(names)}" for p, names in sorted(packages.items())]
    folder = "." if place == target else place.relative_to(target).as_posix()
    chat = run.get("data.train.template") is not None
    return "\n".join(
        [
            *imports,
            "",
            f"path = {json.dumps(folder, ensure_ascii=False)}  # this folder, or its name on the hub",
            f"model = {name}.from_pretrained(path)",
            "tokenizer = AutoTokenizer.from_pretrained(path)",
            _CHAT if chat else _TEXT,
            "answer = model.generate(**inputs, max_new_tokens=96, do_sample=False)",
            'print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
        ]
    )


def _table(rows: list[facts.Row]) -> str:
    lines = [f"| {markdown(label)} | {markdown(value)} |" for label, value in rows]
    return "\n".join(["| | |", "|---|---|", *lines, ""]) if rows else ""
