"""What a run leaves behind for people: one self-contained HTML page, and a model card per export.

Both are made from the run folder alone (``run.json``, ``metrics.jsonl``, ``recipe.yaml``), at any time, also
of a run that stopped early.
"""

from truetune.report.card import card
from truetune.report.page import write

__all__ = ["card", "write"]
