"""Writes the figures of ``docs/trust.md`` from ``results/trust``, where `make proof` leaves them.

    python tools/trust.py

Everything between the two marks of the page is made anew; the rest is left alone.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- figures: made by tools/trust.py -->", "<!-- end of figures -->"


def table(folder: Path) -> str:
    """One row per proof: its name, and every figure it kept."""
    rows = [f"| {file.stem} | {_spelled(json.loads(file.read_bytes()))} |" for file in sorted(folder.glob("*.json"))]
    return "\n".join(["| proof | figures |", "|---|---|", *rows])


def _spelled(figures: dict[str, int | float | str]) -> str:
    """``name: value`` pairs; a value that is a sentence stands on a line of its own."""
    parts = [f"{key}: {value:,}" if isinstance(value, int) else f"{key}: {value}" for key, value in figures.items()]
    return ("<br>" if any(len(part) > 60 for part in parts) else "; ").join(parts).replace("|", r"\|")


def main(page: Path, folder: Path) -> None:
    text = page.read_text(encoding="utf-8")
    before, mark, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (mark and end):
        sys.exit(f"{page} lacks the marks that the figures stand between; restore them")
    page.write_text(f"{before}{BEGIN}\n\n{table(folder)}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main(ROOT / "docs" / "trust.md", ROOT / "results" / "trust")
