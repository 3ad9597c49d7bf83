"""Writes the figures of some pages under ``docs`` from where `make proof` leaves them.

    python tools/trust.py

Everything between the two marks of a page is made anew; the rest is left alone.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- figures: made by tools/trust.py -->", "<!-- end of figures -->"


def table(files: Iterable[Path]) -> str:
    """One row per proof: its name, and every figure it kept."""
    rows = [f"| {file.stem} | {_spelled(json.loads(file.read_bytes()))} |" for file in sorted(files)]
    return "\n".join(["| proof | figures |", "|---|---|", *rows])


def _spelled(figures: dict[str, int | float | str]) -> str:
    """``name: value`` pairs; a value that is a sentence stands on a line of its own."""
    parts = [f"{key}: {value:,}" if isinstance(value, int) else f"{key}: {value}" for key, value in figures.items()]
    return ("<br>" if any(len(part) > 60 for part in parts) else "; ").join(parts).replace("|", r"\|")


def templates(file: Path) -> str:
    """One row per chat template, one column per conversation; a sentence of refusal stands below, by its number."""
    found: dict[str, dict[str, str]] = json.loads(file.read_bytes())
    columns = list(next(iter(found.values())))
    said = sorted({v for row in found.values() for v in row.values() if v.startswith("refused")})
    lines = ["| template | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, row in found.items():
        cells = (f"refused {said.index(row[c]) + 1}" if row[c] in said else row[c] for c in columns)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    reasons = [f"{i}. {text.removeprefix('refused: ')}".replace("<", "&lt;") for i, text in enumerate(said, 1)]
    return "\n".join([*lines, "", "Refused with the sentence:", "", *reasons])


def families(folder: Path) -> str:
    """One row per family of models: its figures, in bold what failed."""
    rows = []
    for file in sorted(folder.glob("*.json")):
        kept = json.loads(file.read_bytes())
        failed = kept["failed"].split(", ")
        cells = [kept["family"], kept["features"], kept["route"]]
        for method in ("full", "lora"):
            for dtype in ("fp32", "bf16"):
                figure = kept[f"{method}_{dtype}"]
                cells.append(f"**{figure}**" if f"{method} {dtype}" in failed else figure)
        rows.append(f"| {' | '.join([*cells, kept['largest']])} |")
    head = ("family", "exercises", "route", "full fp32", "full bf16", "LoRA fp32", "LoRA bf16", "largest in fp32")
    return "\n".join([f"| {' | '.join(head)} |", "|" + "---|" * len(head), *rows])


def main(page: Path, figures: str) -> None:
    text = page.read_text(encoding="utf-8")
    before, mark, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (mark and end):
        sys.exit(f"{page} lacks the marks that the figures stand between; restore them")
    page.write_text(f"{before}{BEGIN}\n\n{figures}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    TRUST = ROOT / "results" / "trust"
    kept = set(TRUST.glob("*.json"))
    exported = {file for file in kept if file.stem.startswith("gguf-")}
    main(ROOT / "docs" / "trust.md", table(kept - exported))
    main(ROOT / "docs" / "export.md", table(exported))
    main(ROOT / "docs" / "chat-templates.md", templates(ROOT / "results" / "chat-templates.json"))
    main(ROOT / "docs" / "families.md", families(TRUST / "families"))
