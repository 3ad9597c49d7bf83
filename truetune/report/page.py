"""``report.html``: the whole run on one self-contained page, from the run folder alone.

Inline CSS and SVG, no script and no network (the page's own content security policy forbids both). Everything
that comes from data, model or run is escaped by jinja2's autoescape.
"""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup, escape

from truetune.report import facts
from truetune.report.folder import Json, Run, explained
from truetune.report.plots import Curve, Plot, moving
from truetune.training.patience import write_text
from truetune.training.sinks import TARGETS, clean, size

_SAMPLE = 1500
_ALARMS = 20


def write(run_folder: Path) -> Path:
    """Write ``report.html`` into ``run_folder`` and return its path.

    Raises UserError where the folder is no run folder or a file in it is damaged.
    """
    with explained(run_folder):
        text = render(Run.read(run_folder))
    return write_text(run_folder / "report.html", text)


def render(run: Run) -> str:
    """The page as HTML."""
    alarms = run.records["alarm"]
    return template("page.html").render(
        run=run,
        facts=facts,
        plots=plots(run),
        samples=samples(run),
        alarms=alarms[:_ALARMS],
        further_alarms=len(alarms[_ALARMS:]),
        evaluations=run.records["evaluation"],
        best=max((e["step"] for e in run.records["evaluation"] if e["best"]), default=None),  # each was, so far
        learned=learned(run),
    )


@cache
def template(name: str) -> Template:
    """A template of this folder or of inspection's, strict and escaping."""
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(f"truetune.{package}", ".") for package in ("report", "inspection")]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=True,
    )
    environment.filters |= {
        "number": facts.number,
        "percent": facts.percent,
        "count": facts.count,
        "clean": clean,
        "excerpt": partial(clean, limit=_SAMPLE),
    }
    return environment.get_template(name)


def plots(run: Run) -> list[tuple[Plot, str]]:
    """Every plot with the sentence below it."""
    return [_loss(run), _rate(run), _gradient(run), _speed(run), _memory(run)]


def _points(records: list[Json], name: str) -> list[tuple[float, float | None]]:
    return [(record["step"], record[name]) for record in records]


def _window(run: Run) -> int:
    """Steps that a smoothed curve averages: a tenth of the run."""
    return max(5, len(run.steps) // 10)


def _loss(run: Run) -> tuple[Plot, str]:
    window = _window(run)
    weighed = [(s["step"], s["loss"], s["targets"]) for s in run.steps]
    curves = [
        Curve("training, each step", "raw", _points(run.steps, "loss")),
        Curve(f"training, mean of {window} steps", "smooth", moving(weighed, window)[window - 1 :]),
        Curve("held out", "dots", _points(run.records["evaluation"], "loss")),
    ]
    broken = sum(s["loss"] is None for s in run.steps)
    told = f"The loss of {broken:,} steps was not finite." if broken else "Nats per target token."
    alarms = [(a["step"], f"{a['name']}: {clean(a['message'], 200)}") for a in run.records["alarm"][:_ALARMS]]
    return Plot("Loss", curves, alarms=alarms), told


def _rate(run: Run) -> tuple[Plot, str]:
    planned = run.get("plan.schedule") or _points(run.steps, "planned")
    curves = [Curve("actual", "smooth", _points(run.steps, "rate")), Curve("planned", "plan", planned)]
    gaps = [abs(s["rate"] - s["planned"]) for s in run.steps if None not in (s["rate"], s["planned"])]
    told = f"Largest difference from the plan: {max(gaps):.1e}." if gaps else "The plan of the run."
    if gaps and not any(gaps):
        told = f"As planned in each of {len(gaps):,} steps."
    return Plot("Learning rate", curves), told


def _gradient(run: Run) -> tuple[Plot, str]:
    norms = [s["gradient_norm"] for s in run.steps]
    curves = [Curve("each step", "smooth", _points(run.steps, "gradient_norm"))]
    told = "L2 norm before clipping."
    clip = run.get("recipe.train.clip")
    if clip and norms:
        clipped = sum(norm is not None and norm > clip for norm in norms)
        told = f"L2 norm before clipping at {clip:g}; {clipped:,} of {len(norms):,} steps were clipped."
        curves.append(Curve("clip", "plan", [(run.steps[0]["step"], clip), (run.step, clip)]))
    if dead := sum(not norm for norm in norms):
        told += f" In {dead:,} steps it was zero or not finite."
    return Plot("Gradient norm", curves, log=True), told


def _speed(run: Run) -> tuple[Plot, str]:
    if run.void:
        return Plot("Tokens per second", []), f"Not quoted: {run.void}"
    window = _window(run)
    weighed = [(s["step"], s["tokens_per_second"], s["seconds"]) for s in run.steps]
    curves = [
        Curve("each step", "raw", _points(run.steps, "tokens_per_second")),
        Curve(f"mean of {window} steps", "smooth", moving(weighed, window)[window - 1 :]),
    ]
    return Plot("Tokens per second", curves, zero=True), "Real tokens: nothing is padding."


def _memory(run: Run) -> tuple[Plot, str]:
    points = [(s["step"], s["memory"] / 2**30) for s in run.steps]
    told = f"Resident memory of the process; peak {size(run.memory)}." if run.memory else ""
    return Plot("Memory, GiB", [Curve("each step", "smooth", points)], zero=True), told


def learned(run: Run) -> Markup:
    """The document that the preflight showed, its targets marked."""
    shown = [checks["shown"] for checks in run.records["checks"] if checks.get("shown")]
    escaped = str(escape(clean(shown[-1], _SAMPLE))) if shown else ""
    return Markup(TARGETS.sub(r"<mark>\1</mark>", escaped))


def samples(run: Run) -> Json:
    """The held-out prompts with their answers at the first and at the last step that was sampled."""
    records = run.records["samples"]
    if not records:
        return {"columns": [], "rows": []}
    ends = [records[0]] if len(records) == 1 else [records[0], records[-1]]
    rows = []
    for index, sample in enumerate(ends[-1]["samples"]):
        answers = [end["samples"][index] if index < len(end["samples"]) else None for end in ends]
        rows.append({"prompt": sample["prompt"], "reference": sample["reference"], "answers": answers})
    columns = ["Before training" if e["step"] == 0 else f"After step {e['step']:,}" for e in ends]
    return {"columns": columns, "rows": rows}
